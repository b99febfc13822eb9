"""Recipes: the commands that make a system's data, and its training, in one YAML file (docs/recipes.md)."""
