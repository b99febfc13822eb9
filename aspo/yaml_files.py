"""YAML from files and flags: plain values only, of a size that can be handled, or a ValueError that says where from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MOST_VALUES = 100_000  # with aliases written out: a few lines of them can stand for billions


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds. Raises ValueError, beginning with the file, where it is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, where: Any) -> Any:
    """What a text of YAML holds; `where` is what errors begin with."""
    try:
        value = yaml.safe_load(text)
        _count(value, {}, set())
    except RecursionError as error:
        raise ValueError(f"{where} is no YAML that can be read: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # PyYAML's own, and what its readers of dates and numbers raise on impossible ones
        raise ValueError(f"{where} is no YAML: {error}") from error
    return value


def flag_values(name: str, value: Any) -> list[str]:
    """A value as what stands behind --`name` on a command line. Raises ValueError where that would read as a flag."""
    values = value if isinstance(value, list) else [value]
    texts = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
    if flag := next((text for text in texts if text.startswith("--")), None):
        raise ValueError(f"--{name} is given {flag!r}, which reads as a flag, not as a value")
    return texts


def _count(value: Any, known: dict[int, int], above: set[int]) -> int:
    """How many values a value holds, aliases written out. Raises ValueError for too many, or one that holds itself."""
    if not isinstance(value, Mapping | list | tuple | set):
        return 1
    if id(value) in above:
        raise ValueError("an alias stands for what it is part of")
    if id(value) not in known:
        inner = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_count(v, known, above | {id(value)}) for v in inner)
    if known[id(value)] > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
    return known[id(value)]
