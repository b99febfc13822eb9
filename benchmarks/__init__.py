"""Benchmarks: same inputs, same run, results checked before they are timed. See docs/performance.md."""
