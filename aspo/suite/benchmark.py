"""What a benchmark is to us, and reading its files: one clear line for each that is missing or broken."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aspo.images import check_within, is_file

Row = Mapping[str, Any]
Item = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a benchmark's files were downloaded to; `images` only where they do not lie among them."""

    root: Path
    images: Path | None = None

    def file(self, *names: str) -> Path:
        """The file of the first of `names` (patterns are fine) that is there.

        Raises ValueError where none is, and where a pattern has several.
        """
        for name in names:
            found = sorted(self.root.glob(name))
            if len(found) > 1:
                several = ", ".join(str(path.relative_to(self.root)) for path in found)
                raise ValueError(
                    f"{self.root} has several {name}: {several}; keep the one to score in a folder of its own"
                )
            if found:
                return found[0]
        others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
        raise ValueError(f"{self.root} has no {names[0]}{others}: docs/suite.md says what the benchmark's folder holds")

    def image(self, name: str, *folders: str) -> str:
        """Where the image `name` lies: in --suite-images, else in the first of `folders` that has it, or would."""
        places = [self.images / name] if self.images is not None else [self.root / folder / name for folder in folders]
        found = next((place for place in places if is_file(place)), places[0]).absolute()
        check_within(found, [p.resolve() for p in (self.root, self.images) if p is not None], "--suite-images FOLDER")
        return str(found)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that is scored here.

    load: the rows: `id`, `prompt`, `images`, `cluster`, `max_new_tokens` and whatever scoring needs.
    score: (row, answer, judge's replies or None) -> an item's `counts` and what else is worth keeping.
    questions: (row, answer) -> the prompts that the judge gets.
    group: adds the counts of figures over several rows (pairs of questions) to one of their items.
    answers: (rows, items) -> the answers in the form that the benchmark's own scorer reads.
    """

    name: str
    title: str
    home: str  # where it comes from
    load: Callable[[Source], list[Row]]
    score: Callable[[Row, str, Sequence[str] | None], Item]
    answers: Callable[[Sequence[Row], Sequence[Item]], Any]
    questions: Callable[[Row, str], list[str]] | None = None
    judge_needed: bool = False  # else it only takes the place of our own matching
    group: Callable[[Sequence[Row], Sequence[Item]], None] | None = None


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError, naming the file, where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def read_rows(path: Path, *columns: str) -> list[dict[str, Any]]:
    """The rows of a .json list, of a .json or .jsonl file with an object a line, or of a .csv file.

    Raises ValueError for a file that is none of them, and for a row that lacks one of `columns`.
    """
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        rows: Any = list(csv.DictReader(text.splitlines()))
    elif text.lstrip().startswith("["):
        rows = read_json(path)
    else:
        rows = [_line(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no rows")
    for number, row in enumerate(rows, 1):
        need(row, f"{path}, row {number}", *columns)
    return rows


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}") from error


def need(row: Any, where: str, *columns: str) -> None:
    """ValueError where a row is no object, or lacks one of its columns."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}; it must be an object with {', '.join(columns)}")
    for column in columns:
        if row.get(column) is None:
            have = ", ".join(str(name) for name in row)
            raise ValueError(f"{where} has no {column!r}; it has {have}")
