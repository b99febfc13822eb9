"""Result files: a CSV under comment lines that say what it was measured on, and the same as JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "results"


def write(path: Path, header: Mapping[str, str], rows: Sequence[Mapping[str, object]], fields: Sequence[str]) -> None:
    """`path` as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        writer = csv.DictWriter(file, fields, restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def failure(error: Exception) -> str:
    """The status of a row whose figures an error took: "out of memory", or "failed: " and the error in one line.

    Not only torch.OutOfMemoryError says so: Triton's loader raises a RuntimeError, and our checks quote their causes.
    """
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
        return "out of memory"
    return f"failed: {text.splitlines()[0][:120]}"


def read(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What `write` wrote."""
    lines = path.read_text().splitlines()
    header = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return header, list(csv.DictReader(line for line in lines if not line.startswith("#")))
