"""The loss inside other people's trainers: TRL, ms-swift, LLaMA-Factory. docs/integrations.md shows each.

Nothing is imported here: each module needs the package that it plugs into.
"""
