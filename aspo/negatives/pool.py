"""The pool of images that negatives are picked from, and where its images stay: in the files of their data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from aspo.folder import image_entries
from aspo.negatives.embeddings import image_key
from aspo.rows import load_rows

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pool:
    """Distinct images that negatives may be, in the order in which they were first seen.

    entries: of the images; those in a data set stay there. scenes: their truth where it is known (the embedded
    world's). features: (m, d), or None where nothing is compared.
    """

    keys: list[str]
    entries: Sequence[Any]
    scenes: list[Any]
    features: Tensor | None = None

    @property
    def digest(self) -> str:
        """A hash of what is in it."""
        return hashlib.sha256(" ".join(self.keys).encode()).hexdigest()[:16]


def read_pool(source: str | Path | Sequence[Row], image_root: str | Path | None = None) -> Pool:
    """The distinct images of rows (anything that `load_rows` reads), or of a folder of image files and its folders.

    Raises ValueError where there are none, or one cannot be read.
    """
    if isinstance(source, str | Path) and not str(source).startswith("world:") and Path(source).is_dir():
        files = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        native = any((Path(source) / name).exists() for name in ("rows.jsonl", "state.json", "dataset_dict.json"))
        if files and not native:
            return _pool([{"images": [str(path)]} for path in files], source)
    rows = load_rows(source, kind="prompt", image_root=image_root) if isinstance(source, str | Path) else source
    return _pool(rows, source if isinstance(source, str | Path) else "the data")


def _pool(rows: Sequence[Row], source: str | Path) -> Pool:
    distinct: dict[str, tuple[tuple[int, int], Any]] = {}
    for n, row in enumerate(rows):
        for k, entry in enumerate(image_entries(row)):
            distinct.setdefault(image_key(entry), ((n, k), row.get("scene")))
    if not distinct:
        raise ValueError(f"{source} holds no images to pick negatives from; name others with --pool")
    places, scenes = ([value[i] for value in distinct.values()] for i in (0, 1))
    return Pool(list(distinct), entries_of(rows, places), scenes)


class Later(Sequence[Any]):
    """`size` things, each of which `get(n)` gives when it is asked for: nothing is kept."""

    def __init__(self, size: int, get: Callable[[int], Any]) -> None:
        self.size, self.get = size, get

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, n: Any) -> Any:
        if not 0 <= n < self.size:
            raise IndexError(n)
        return self.get(n)


def entries_of(rows: Sequence[Row], places: Sequence[tuple[int, int]]) -> Sequence[Any]:
    """The image entries at places (row, number in it). A data set's stay in its files until they are asked for."""
    if not isinstance(rows, datasets.Dataset):
        return [image_entries(rows[n])[k] for n, k in places]
    images = rows.select_columns([name for name in ("image", "images") if name in rows.column_names])
    return Later(len(places), lambda n: image_entries(images[places[n][0]])[places[n][1]])


def chained(first: Sequence[Any], second: Sequence[Any]) -> Sequence[Any]:
    """Both, one behind the other."""
    size = len(first)
    return Later(size + len(second), lambda n: first[n] if n < size else second[n - size])
