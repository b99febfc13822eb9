"""The native form of a data set: a folder with `rows.jsonl`, one JSON row a line, and `images/` beside it.

Image entries are paths relative to the folder. Lines are only ever appended, so a killed command loses at most the line
it was writing; whoever appends next cuts that off.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aspo.images import check_image, image_bytes, image_entries, image_path, in_memory, is_file, load_images

ROWS_FILE = "rows.jsonl"
IMAGE_COLUMNS = ("images", "chosen_images", "rejected_images", "negative_images")
Row = Mapping[str, Any]


def row_name(row: Row) -> str:
    """How errors call a row."""
    return f"row {row['id']!r}" if row.get("id") is not None else "a row without id"


def write_rows(folder: str | Path, rows: Iterable[Row]) -> None:
    """Write a data set in our native form: rows.jsonl and images/. An existing rows.jsonl is replaced."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (ROWS_FILE + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(row_line(folder, row))
    partial.replace(folder / ROWS_FILE)


def append_row(folder: str | Path, row: Row) -> None:
    """Add one row to a native folder (made if absent); a last line that a kill left unfinished is cut off first."""
    folder = Path(folder)
    append_line(folder / ROWS_FILE, row_line(folder, row))


def append_line(path: Path, line: str) -> None:
    """Append a line to a file of lines; what a killed writer left behind the last line break is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(line.encode())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON objects of a file of lines, for a command that resumes: an unfinished last line is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is no JSON ({error}): delete that line") from error


def row_line(folder: Path, row: Row) -> str:
    """The row as a JSON line; its images are put into `folder/images` under a name made of their content."""
    plain = {k: value for k, value in row.items() if k not in ("image", *IMAGE_COLUMNS) and value is not None}
    for column in IMAGE_COLUMNS:
        if entries := image_entries(row, column):
            plain[column] = [_store_image(folder, entry) for entry in entries]
    return json.dumps(plain, ensure_ascii=False) + "\n"


def _store_image(folder: Path, entry: Any) -> str:
    """Put an image into the folder, under a name made of its content, unless it is there; returns its relative path."""
    path = None
    if not in_memory(entry):
        path = image_path(entry, folder)
        if is_file(path) and (place := path.resolve()).is_relative_to(folder.resolve()):
            return place.relative_to(folder.resolve()).as_posix()
    content = image_bytes(entry, folder)
    name = hashlib.sha256(content).hexdigest()[:24] + (path.suffix.lower() if path else ".png")
    target = folder / "images" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{name}.{secrets.token_hex(4)}.partial")  # other processes may store it too
        try:
            partial.write_bytes(content)
        except OSError as error:  # a full disk's names no file
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(target)) from error
        partial.replace(target)
    return f"images/{name}"


__all__ = ["append_row", "check_image", "image_bytes", "image_entries", "image_path", "load_images", "write_rows"]
