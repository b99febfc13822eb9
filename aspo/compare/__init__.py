"""`aspo compare`: systems from one start on the same pairs and steps, over seeds, on the same test scenes.

`plan` says which runs there are, `work` does one, `grid` chooses settings, `statistics` and `table` judge
(docs/evidence.md).
"""
