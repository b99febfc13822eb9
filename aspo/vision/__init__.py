"""Vision towers: one look at each image of a step, and a frozen tower's features kept in files."""
