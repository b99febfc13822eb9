"""Rows with `<column>_token_scores`: the folder that `aspo rewards` writes, whatever gives the scores."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aspo import shards
from aspo.evaluation.judges import image_hash
from aspo.folder import ROWS_FILE, image_entries, read_lines, row_line, row_name
from aspo.resume import check_settings, write_json
from aspo.rows import load_rows
from aspo.scores import images_column
from aspo.validate import validate_rows

SETTINGS_FILE = "settings.json"
JOB = "rewards"  # the name of its shards
COLUMNS = ("chosen", "rejected")
Row = Mapping[str, Any]
Spans = Sequence[tuple[int, int, float]]  # [start, end, r]
Score = Callable[[Sequence[Row]], Sequence[Mapping[str, Spans]]]  # of each row, by column


def load_preferences(args: argparse.Namespace) -> Any:
    """The rows of --data, checked; they must not lie in --out."""
    if Path(args.data).resolve() == args.out.resolve():
        raise ValueError(f"--out {args.out} is --data: name another folder, so that the rows stay as they are")
    rows = load_rows(args.data, limit=args.limit, image_root=args.image_root)
    validate_rows(rows)
    return rows


def read_with(row: Row, column: str) -> Row:
    """The row with the images that a response is read with as its `images`."""
    own = images_column(row, column)
    return row if own == "images" else {**row, "images": row[own]}


def readings(row: Row) -> list[tuple[Row, list[str]]]:
    """The row as its responses are read, and which: those with the same images together."""
    columns: dict[str, list[str]] = {}
    for column in COLUMNS:
        columns.setdefault(images_column(row, column), []).append(column)
    return [(read_with(row, together[0]), together) for together in columns.values()]


def check_apart(known_rows: Sequence[Row], rows: Sequence[Row], flag: str) -> None:
    """ValueError where a row's image is one of the rows of `flag`: what is fitted to an image must not judge it."""
    known = {image_hash(row): row for row in known_rows if image_entries(row)}
    for row in rows:
        for read, _ in readings(row):
            if image_entries(read) and (twin := known.get(image_hash(read))) is not None:
                raise ValueError(
                    f"{row_name(row)} of --data has the image of {row_name(twin)} of {flag}, whose rows must be "
                    "neither trained on nor evaluated: take others"
                )


def begin(out: Path, settings: Mapping[str, Any], processes: shards.Processes, free: tuple[str, ...] = ()) -> None:
    """Note the settings of a command's folder; ValueError where it was begun with others or by something else.

    free: settings that may be given later (None before).
    """
    path = out / SETTINGS_FILE
    there = "rows" if (out / ROWS_FILE).exists() or (out / shards.SHARDS_FOLDER).exists() else None
    check_settings(path, settings, "aspo rewards", there, later=free)
    processes.once("", lambda: write_json(path, settings))


def write_scored(
    rows: Any,
    load: Callable[[], Score],
    out: Path,
    batch_size: int,
    decides: Mapping[str, Any],
    engine: shards.Engine,
) -> None:
    """The rows with `<column>_token_scores` in `out`, batch by batch.

    load: gives what scores a batch. decides: what the scores depend on besides the rows, as JSON.
    """

    def lines() -> shards.Make:
        score = load()

        def make(batch: Sequence[Row], start: int) -> dict[str, list[str]]:
            made = []
            for row, spans in zip(batch, score(batch), strict=True):
                columns = {f"{name}_token_scores": list(value) for name, value in spans.items()}
                made.append(row_line(out, {**row, **columns}))
            return {ROWS_FILE: made}

        return make

    if not shards.check_older(engine.processes, out, JOB, ROWS_FILE, rows["id"]):
        shards.run_job(shards.Job(out, JOB, rows, decides, lines, batch_size, title="scoring"), engine)


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
