"""Fuzzing of what reads strangers' data: `python -m tests.fuzz --minutes 10 splitter` (rows, layout, config).

Each target is a module with `INPUTS`, a strategy of inputs that JSON can hold, and `check(value)`, which feeds one to
the code and raises where a property does not hold: a valid result, or a ValueError that says what is wrong.
"""
