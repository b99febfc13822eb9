"""Keys: short hashes of all that decides what a data step or a run makes, by which what is done is found again."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aspo.folder import IMAGE_COLUMNS, ROWS_FILE, is_file

HASHED_BYTES = 256 * 2**20  # files up to this size are known by their content, larger ones by size and time
PACKAGES = ("torch", "transformers", "peft", "accelerate", "open_clip_torch", "numpy", "Pillow")
WORLD_ROWS = 4  # of a split of the world, by which its generator is known
# Flags and training fields whose values can be places; a value of another one stands for itself, whatever lies there.
PLACES = ("data", "pool", "calibrate", "train", "image-root", "scorer", "objects", "model", "after", "calibration")
TRAIN_PLACES = ("eval_data", "deepspeed", "plugins")
IMAGE_OF_CONTENT = re.compile(r"images/[0-9a-f]{24}(\.\w+)?")  # as native folders name images: by their content


def key_of(*parts: Any) -> str:
    """A short hash of JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def source_key(source: str) -> str:
    """The key of rows, of a model or of a scorer by its place: of what the files there hold.

    "world" is known by the embedded models, "world:<split>" by its first rows; any name that is no place on this
    machine, such as a hub's, stands for itself. Image files that the rows of a .jsonl or .json file name beside it are
    known by size and time: there are many, and they are looked at for every command.
    """
    if source == "world":
        from aspo.world import assets_dir

        return _files_key(assets_dir())
    if source.startswith("world:"):
        return _world_rows_key(source)
    path = Path(source)
    if path.is_dir() and (path / ROWS_FILE).is_file():
        path = path / ROWS_FILE
    if not path.exists():
        return source
    images = _images_key(path) if path.suffix in (".jsonl", ".json") else None
    return _files_key(path) if images is None else key_of(_files_key(path), images)


def options_key(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A step's options with the key of what is there in the place of every place."""
    places = TRAIN_PLACES if command == "train" else PLACES
    return {name: _place_key(name, value) if name in places else value for name, value in options.items()}


def _place_key(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_place_key(name, entry) for entry in value]
    if not isinstance(value, str):
        return value
    path = Path(value)
    if name == "image-root" and path.is_dir():  # many large files, read for every command: by name, size and time
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return key_of([[p.relative_to(path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns] for p in files])
    kind, colon, rest = value.partition(":")
    if name == "scorer" and colon and kind in ("open_clip", "transformers"):
        architecture, slash, weights = rest.partition("/")
        if kind == "open_clip" and not Path(rest).is_dir() and Path(weights).is_file():
            return kind + colon + architecture + slash + source_key(weights)
        return kind + colon + source_key(rest)
    return source_key(value)


def _images_key(path: Path) -> str | None:
    """Of the image files beside a file of rows that its rows name; None where their names say all."""
    status = path.stat()
    if status.st_size > HASHED_BYTES:
        return None
    names = _named_images(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)
    files = [(name, path.parent / name) for name in names]
    found = [[name, f.stat().st_size, f.stat().st_mtime_ns] for name, f in files if is_file(f)]
    return key_of(found) if found else None


@functools.cache
def _named_images(file: Path, *_: int) -> list[str]:
    """Those that are not named by their content. Of rows that cannot be read none: the step that reads them says so."""
    content = file.read_bytes()
    try:
        rows = (
            [json.loads(line) for line in content.splitlines() if line.strip()]
            if file.suffix == ".jsonl"
            else json.loads(content)
        )
    except (ValueError, RecursionError):
        return []
    found: dict[str, None] = {}
    for row in rows if isinstance(rows, list) else ():
        for column in ("image", *IMAGE_COLUMNS):
            entries = row.get(column) if isinstance(row, Mapping) else None
            for entry in entries if isinstance(entries, list) else [entries]:
                name = entry.get("path") if isinstance(entry, Mapping) else entry
                if isinstance(name, str) and not IMAGE_OF_CONTENT.fullmatch(name):
                    found[name] = None
    return list(found)


def _files_key(path: Path) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return key_of([[p.relative_to(path).as_posix() if p != path else p.name, _file_key(p)] for p in files])


def _file_key(file: Path) -> str:
    status = file.stat()
    if status.st_size > HASHED_BYTES:
        return f"{status.st_size}-{status.st_mtime_ns}"
    return _content(file.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)


@functools.cache
def _content(file: Path, *_: int) -> str:
    """Read once for a size, time and inode: a comparison asks for the same start model at every run."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


@functools.cache
def _world_rows_key(source: str) -> str:
    from aspo.folder import image_bytes, image_entries
    from aspo.rows import load_rows

    rows = load_rows(source, kind="prompt", limit=WORLD_ROWS)
    images = [[hashlib.sha256(image_bytes(entry)).hexdigest() for entry in image_entries(row)] for row in rows]
    return key_of(source, [[row["prompt"], row["scene"]] for row in rows], images)


@functools.cache
def environment_key() -> str:
    """Of the versions of what computes: Python, the machine's kind, and the packages that decide a figure."""
    return key_of(platform.python_version(), platform.machine(), *(_version(package) for package in PACKAGES))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def code_key() -> str:
    """Of this project's own code as it was when the process first asked. Noted in results, not part of their keys."""
    root = Path(__file__).parent.parent  # aspo
    files = sorted([*root.rglob("*.py"), *(root.parent / "aspo_kernels").rglob("*.py")])
    return key_of([[p.relative_to(root.parent).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()] for p in files])
