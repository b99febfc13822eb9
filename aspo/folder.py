"""The native form of a data set: a folder with `rows.jsonl`, one JSON row a line, and `images/` beside it.

Image entries are paths relative to the folder. Lines are only ever appended, so a killed command loses at most the line
it was writing; whoever appends next cuts that off.
"""

import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

ROWS_FILE = "rows.jsonl"
IMAGE_COLUMNS = ("images", "chosen_images", "rejected_images", "negative_images")
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
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


def load_images(row: Row, column: str = "images", root: str | Path | None = None) -> list[Image.Image]:
    """The images of one of the row's image columns, decoded to RGB. Relative paths start at `root`."""
    return [_open_image(entry, root) for entry in image_entries(row, column)]


def image_bytes(entry: Any, root: str | Path | None = None) -> bytes:
    """The encoded bytes of an image entry: a file's content as it is, a PIL image as PNG."""
    if isinstance(entry, Image.Image):
        buffer = io.BytesIO()
        (entry if entry.mode in PNG_MODES else entry.convert("RGB")).save(buffer, format="PNG")
        return buffer.getvalue()
    if isinstance(entry, Mapping) and entry.get("bytes") is not None:
        return entry["bytes"]
    return image_path(entry, root).read_bytes()


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
    if not isinstance(entry, Image.Image) and not (isinstance(entry, Mapping) and entry.get("bytes") is not None):
        path = image_path(entry, folder).absolute()
        if path.is_relative_to(folder.absolute()) and path.is_file():
            return path.relative_to(folder.absolute()).as_posix()
    content = image_bytes(entry, folder)
    name = hashlib.sha256(content).hexdigest()[:24] + (path.suffix.lower() if path else ".png")
    target = folder / "images" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{name}.{secrets.token_hex(4)}.partial")  # other processes may store it too
        partial.write_bytes(content)
        partial.replace(target)
    return f"images/{name}"


def image_entries(row: Row, column: str = "images") -> list[Any]:
    """The entries of an image column ("images": or of `image`), which may be one entry or a list."""
    found = row[column] if row.get(column) is not None else row.get("image") if column == "images" else None
    if found is None:
        return []
    return [found] if isinstance(found, str | Path | Mapping | Image.Image) else list(found)


def image_path(entry: Any, root: str | Path | None) -> Path:
    """Where an image entry without bytes lies; a relative path starts at `root`."""
    path = entry.get("path") if isinstance(entry, Mapping) else entry
    if not isinstance(path, str | Path):
        raise ValueError(
            f"an image must be a path, a PIL image or a dict with 'bytes' or 'path', got {type(entry).__name__}"
        )
    return Path(root or "", path)


def _open_image(entry: Any, root: str | Path | None) -> Image.Image:
    if isinstance(entry, Image.Image):
        return entry.convert("RGB")
    try:
        return Image.open(io.BytesIO(image_bytes(entry, root))).convert("RGB")
    except OSError as error:
        raise _unreadable(entry, error) from error


def check_image(entry: Any) -> None:
    """That an image entry is one, by its first bytes: nothing is decoded."""
    if isinstance(entry, Image.Image):
        return
    content = entry.get("bytes") if isinstance(entry, Mapping) else None
    try:
        with Image.open(image_path(entry, None) if content is None else io.BytesIO(content)):
            pass
    except OSError as error:
        raise _unreadable(entry, error) from error


def _unreadable(entry: Any, error: OSError) -> ValueError:
    name = entry.get("path") if isinstance(entry, Mapping) else entry
    why = "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
    return ValueError(f"image {name or 'in the row'} cannot be read: {why}")
