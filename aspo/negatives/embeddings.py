"""CLIP features of images and texts, kept on disk under their content: each is encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aspo.atomic import write_atomic
from aspo.folder import image_bytes, load_images
from aspo.progress import progress_bar
from aspo.scorers import Scorer
from aspo.shards import Engine

SHARD = 2048  # features in a file at most
BLOCK = 256  # features that one process makes at a time, where several do; a kill loses at most so many


def image_key(entry: Any, root: str | Path | None = None) -> str:
    """The key of an image entry: a hash of its encoded bytes. ValueError names an image that cannot be read."""
    try:
        return "image-" + hashlib.sha256(image_bytes(entry, root)).hexdigest()[:32]
    except OSError as error:
        name = entry if isinstance(entry, str | Path) else entry.get("path")
        raise ValueError(
            f"image {name} cannot be read: {error.strerror or error}; restore it or drop its row"
        ) from error


def text_key(text: str) -> str:
    """The key of a text."""
    return "text-" + hashlib.sha256(text.encode()).hexdigest()[:32]


_HowTo = tuple[Callable[[int], str], Callable[[list[int]], Tensor]]  # names the n-th; encodes those


class Embeddings:
    """Unit features of one scorer, in `folder/*.safetensors`; files of another scorer are left alone.

    A shard is written under another name and renamed. Raises ValueError where a feature is not finite (nothing that was
    computed before is lost), or a shard cannot be read.
    """

    def __init__(self, folder: Path, scorer: Scorer, batch_size: int = 64) -> None:
        self.folder, self.scorer, self.batch_size = folder, scorer, batch_size
        folder.mkdir(parents=True, exist_ok=True)
        self._features: dict[str, Tensor] = {}
        self._fresh: list[str] = []
        self.reload()

    def __reduce__(self) -> tuple[Any, ...]:
        return Embeddings, (self.folder, self.scorer, self.batch_size)

    def reload(self) -> None:
        """Read what is in the folder, other processes' features too."""
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as shard:
                    about = shard.metadata() or {}
                    if about.get("scorer") == self.scorer.identity:
                        self._features.update(zip(about["keys"].split(), shard.get_tensor("features"), strict=True))
            except (SafetensorError, KeyError, ValueError) as error:
                raise ValueError(f"{path} is no file of features: {error}; delete it") from error

    def images(
        self,
        keys: Sequence[str],
        entries: Sequence[Any],
        root: str | Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """(n, d) fp32, unit norm, in the order of `keys` (see `image_key`), which name `entries`."""
        return self._get(keys, *self._of_images(entries, root), progress)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, d) fp32, unit norm; a text longer than the tower takes is the mean of its windows, normalised."""
        return self._get([text_key(text) for text in texts], *self._of_texts(texts), None)

    def fill_images(
        self,
        engine: Engine,
        keys: Sequence[str],
        entries: Sequence[Any],
        root: str | Path | None = None,
        title: str = "CLIP features",
    ) -> None:
        """Make the features that are missing, shared out among all processes, which call this together."""
        self._fill(engine, keys, lambda: self._of_images(entries, root), title)

    def fill_texts(self, engine: Engine, texts: Sequence[str]) -> None:
        """As `fill_images`."""
        self._fill(engine, [text_key(text) for text in texts], lambda: self._of_texts(texts), "features of prompts")

    def _fill(self, engine: Engine, keys: Sequence[str], of: Callable[[], _HowTo], title: str) -> None:
        """Blocks are cut from all keys, missing or not: so they, and with them the batches, stay what they are."""
        first = {key: n for n, key in reversed(list(enumerate(keys)))}
        distinct = sorted(first.values())
        blocks = [distinct[start : start + BLOCK] for start in range(0, len(distinct), BLOCK)]

        def lacking() -> list[int]:
            return [b for b, block in enumerate(blocks) if any(keys[n] not in self._features for n in block)]

        def work(b: int, told: Callable[[int], None]) -> None:
            name, encode = of()
            block = blocks[b]
            self._get(
                [keys[n] for n in block],
                lambda n: name(block[n]),
                lambda chosen: encode([block[n] for n in chosen]),
                told,
            )

        # One list, of which each takes its share; all have read the folder.
        missing = engine.processes.once("", lacking)
        bar = progress_bar()
        bar.disable = not (engine.processes.main and missing)
        with bar:
            task = bar.add_task(title, total=None)
            engine.spread(missing, lambda: work, lambda n: bar.advance(task, n))
        engine.processes.gather(None)
        self.reload()

    def _of_images(self, entries: Sequence[Any], root: str | Path | None) -> _HowTo:
        def encode(chosen: list[int]) -> Tensor:
            return self.scorer.image_features([_decoded(entries[n], root) for n in chosen])

        return lambda n: f"image {_name(entries[n])}", encode

    def _of_texts(self, texts: Sequence[str]) -> _HowTo:
        def encode(chosen: list[int]) -> Tensor:
            return torch.nn.functional.normalize(self.scorer.text_features([texts[n] for n in chosen]), dim=-1)

        return lambda n: f"prompt {texts[n][:60]!r}", encode

    def _get(
        self,
        keys: Sequence[str],
        name: Callable[[int], str],
        encode: Callable[[list[int]], Tensor],
        progress: Callable[[int], None] | None,
    ) -> Tensor:
        first = {key: n for n, key in reversed(list(enumerate(keys))) if key not in self._features}
        missing = sorted(first.values())
        if progress is not None:
            progress(len(keys) - len(missing))
        try:
            for start in range(0, len(missing), self.batch_size):
                batch = missing[start : start + self.batch_size]
                features = encode(batch).float().cpu()
                finite = features.isfinite().all(-1)
                for n, feature, good in zip(batch, features, finite.tolist(), strict=True):
                    if not good:
                        raise ValueError(f"{name(n)}: its CLIP features are not finite; drop it, or check the scorer")
                    self._features[keys[n]] = feature
                    self._fresh.append(keys[n])
                if len(self._fresh) >= SHARD:
                    self._flush()
                if progress is not None:
                    progress(len(batch))
        finally:
            self._flush()
        return torch.stack([self._features[key] for key in keys])

    def _flush(self) -> None:
        if not self._fresh:
            return
        keys = " ".join(self._fresh)
        path = self.folder / f"{hashlib.sha256(keys.encode()).hexdigest()[:24]}.safetensors"
        features = torch.stack([self._features[key] for key in self._fresh])
        write_atomic(path, [save({"features": features}, {"scorer": self.scorer.identity, "keys": keys})])
        self._fresh = []


def _decoded(entry: Any, root: str | Path | None) -> Image.Image:
    return load_images({"images": [entry]}, root=root)[0]


def _name(entry: Any) -> str:
    path = entry.get("path") if isinstance(entry, dict) else entry
    return str(path) if isinstance(path, str | Path) else "in memory"
