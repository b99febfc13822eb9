"""A shard's file: the lines that were made of some rows, under a key of all that decides what they are.

The first line is a JSON object {"key", "parts": {file: number of lines}, "sha256": of all that follows}, the others are
the lines that go into the folder's files (rows.jsonl and others), part by part. A file is written under another name,
synced and renamed: it is there whole, or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aspo.atomic import write_atomic
from aspo.folder import IMAGE_COLUMNS, ROWS_FILE
from aspo.images import image_bytes, image_entries, image_path, in_memory

FORMAT = 1  # of the keys: what they are made of
NAME_DIGITS = 24  # of the SHA-256 of an image's bytes, by which `aspo.folder` names what it stores
Row = Mapping[str, Any]
Parts = Mapping[str, Sequence[str]]  # file in the folder -> JSON lines, each with its line break


class Damaged(ValueError):
    """A shard that is not what was written, or whose images are not."""


def shard_key(rows: Sequence[Row], start: int, settings: Mapping[str, Any], folder: Path) -> str:
    """The key of what is made of `rows`, the first of which is row `start` of the data: 32 hexadecimal digits.

    It changes with every value and every image of the rows, with their order, their place (batches at different places
    sample different numbers) and the settings; not with where the images lie.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, start, dict(settings)], sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(b"\n" + json.dumps(_content(row, folder), default=str).encode())
    return digest.hexdigest()[:32]


def rows_digest(rows: Any, settings: Mapping[str, Any]) -> str:
    """A hash of a job's settings and of everything in its rows but their images, which take long to read."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=str).encode())
    if hasattr(rows, "column_names"):  # a data set, which is read by columns in a tenth of the time
        names = sorted(set(rows.column_names) - {"image", *IMAGE_COLUMNS})
        parts: Iterable[Any] = rows.select_columns(names).iter(1000) if names else [len(rows)]
    else:
        parts = ({k: v for k, v in row.items() if k not in ("image", *IMAGE_COLUMNS)} for row in rows)
    for part in parts:
        digest.update(b"\n" + json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _content(row: Row, folder: Path) -> dict[str, Any]:
    """A row with the hashes of its images in their place; `datasets` fills absent values with None: left out."""
    content = {k: v for k, v in row.items() if k not in ("image", *IMAGE_COLUMNS) and v is not None}
    for column in IMAGE_COLUMNS:
        if entries := image_entries(row, column):
            content[column] = [_image_content(entry, folder) for entry in entries]
    return content


def _image_content(entry: Any, folder: Path) -> list[str]:
    """The hash of an image's bytes, and what of its place goes into the name that it is stored under."""
    path, name = _path(entry, folder), ""
    if path is not None:
        own = path.is_relative_to(folder.resolve())
        name = path.relative_to(folder.resolve()).as_posix() if own else path.suffix.lower()
    return [hashlib.sha256(image_bytes(entry, folder)).hexdigest(), name]


def _path(entry: Any, folder: Path) -> Path | None:
    """Where an image lies; None for one in memory."""
    return None if in_memory(entry) else image_path(entry, folder).resolve()


def write_shard(path: Path, key: str, parts: Parts) -> None:
    """Write a shard."""
    body = [line.encode() for lines in parts.values() for line in lines]
    head = {"key": key, "parts": {file: len(lines) for file, lines in parts.items()}, "sha256": _digest(body)}
    write_atomic(path, [json.dumps(head).encode() + b"\n", *body])


def read_shard(path: Path, key: str) -> dict[str, list[bytes]]:
    """The lines of a shard, by file. Raises Damaged where it is not what was written, FileNotFoundError without it."""
    with path.open("rb") as file:
        first, body = file.readline(), file.readlines()
    try:
        head = json.loads(first)
        counts, known = dict(head["parts"]), (head["key"], head["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is damaged (its first line is cut off, or no shard's)") from error
    if known != (key, _digest(body)) or sum(counts.values()) != len(body):
        raise Damaged(f"{path} is damaged (its content is not what was written)")
    parts, at = {}, 0
    for name, count in counts.items():
        parts[name] = body[at : at + count]
        at += count
    return parts


def _digest(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
    return digest.hexdigest()


def check_images(parts: Mapping[str, Sequence[bytes]], rows: Sequence[Row], folder: Path) -> None:
    """Raises Damaged where an image that the shard's rows name is gone, or is not the one that was stored.

    A stored file that is not is deleted: it would be taken for the image otherwise. rows: what the shard was made of;
    their own images may lie in the folder, and are left alone.
    """
    given = {_path(entry, folder) for row in rows for column in IMAGE_COLUMNS for entry in image_entries(row, column)}
    for line in parts.get(ROWS_FILE, ()):
        row = json.loads(line)
        for path in (folder.resolve() / entry for column in IMAGE_COLUMNS for entry in row.get(column, ())):
            if not path.is_file():
                raise Damaged(f"{path} is not there")
            named = path not in given and len(path.stem) == NAME_DIGITS
            if named and not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem):
                path.unlink()
                raise Damaged(f"{path} is not the image that was stored")
