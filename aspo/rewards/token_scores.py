"""Rows with `<column>_token_scores`: the folder that `aspo rewards` writes, whatever gives the scores."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aspo.evaluation.judges import image_hash
from aspo.folder import ROWS_FILE, append_row, image_entries, read_lines, row_name
from aspo.resume import check_settings, write_json
from aspo.rows import load_rows
from aspo.scores import progress_bar
from aspo.validate import validate_rows

SETTINGS_FILE = "settings.json"
COLUMNS = ("chosen", "rejected")
Row = Mapping[str, Any]
Spans = Sequence[tuple[int, int, float]]  # [start, end, r]


def load_preferences(args: argparse.Namespace) -> Any:
    """The rows of --data, checked; they must not lie in --out."""
    if Path(args.data).resolve() == args.out.resolve():
        raise ValueError(f"--out {args.out} is --data: name another folder, so that the rows stay as they are")
    rows = load_rows(args.data, limit=args.limit, image_root=args.image_root)
    validate_rows(rows)
    return rows


def check_apart(known_rows: Sequence[Row], rows: Sequence[Row], flag: str) -> None:
    """ValueError where a row's image is one of the rows of `flag`: what is fitted to an image must not judge it."""
    known = {image_hash(row): row for row in known_rows if image_entries(row)}
    for row in rows:
        if image_entries(row) and (twin := known.get(image_hash(row))) is not None:
            raise ValueError(
                f"{row_name(row)} of --data has the image of {row_name(twin)} of {flag}, whose rows must be neither "
                "trained on nor evaluated: take others"
            )


def begin(out: Path, settings: Mapping[str, Any], free: tuple[str, ...] = ()) -> None:
    """Note the settings of a command's folder; ValueError where it was begun with others or by something else.

    free: settings that may be given later (None before).
    """
    path = out / SETTINGS_FILE
    there = "rows" if (out / ROWS_FILE).exists() else None
    check_settings(path, settings, "aspo rewards", there, later=free)
    write_json(path, settings)


def write_scored(
    rows: Sequence[Row], score: Callable[[Sequence[Row]], Sequence[Mapping[str, Spans]]], out: Path, batch_size: int
) -> None:
    """Append the rows with `<column>_token_scores` that `out` does not hold yet, batch by batch."""
    there = [line["id"] for line in read_lines(out / ROWS_FILE)]
    if any(there[i] != rows[i]["id"] for i in range(min(len(there), len(rows)))):
        raise ValueError(f"{out / ROWS_FILE} holds other rows than --data: use another --out")
    with progress_bar() as bar:
        task = bar.add_task("scoring", total=len(rows))
        for start in range(0, len(rows), batch_size):
            batch = [dict(rows[i]) for i in range(start, min(start + batch_size, len(rows)))]
            if start + len(batch) > len(there):
                made = list(zip(batch, score(batch), strict=True))
                for row, spans in made[max(len(there) - start, 0) :]:
                    append_row(out, {**row, **{f"{name}_token_scores": list(value) for name, value in spans.items()}})
            bar.advance(task, len(batch))


def scored_summary(out: Path) -> str:
    """How many words and rows got a reward."""
    lines = []
    rows = list(read_lines(out / ROWS_FILE))
    for column in COLUMNS:
        spans = [row[f"{column}_token_scores"] for row in rows]
        values = [value for of_row in spans for _, _, value in of_row]
        up, down = sum(value > 0 for value in values), sum(value < 0 for value in values)
        mean = sum(values) / max(len(values), 1)
        lines.append(
            f"  {column}: {len(values)} scored spans, {up} above 0, {down} below; mean {mean:+.3f}; "
            f"{sum(not of_row for of_row in spans)} responses without any"
        )
    return "\n".join([f"{len(rows)} rows scored, in {out}", *lines])
