"""CLIP features of images and texts, kept on disk under their content: each is encoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aspo.folder import image_bytes, load_images
from aspo.scorers import Scorer

SHARD = 2048  # features in a file; a kill loses at most so many


def image_key(entry: Any, root: str | Path | None = None) -> str:
    """The key of an image entry: a hash of its encoded bytes. ValueError names an image that cannot be read."""
    try:
        return "image-" + hashlib.sha256(image_bytes(entry, root)).hexdigest()[:32]
    except OSError as error:
        name = entry if isinstance(entry, str | Path) else entry.get("path")
        raise ValueError(
            f"image {name} cannot be read: {error.strerror or error}; restore it or drop its row"
        ) from error


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
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as shard:
                    about = shard.metadata() or {}
                    if about.get("scorer") == scorer.identity:
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

        def encode(chosen: list[int]) -> Tensor:
            return self.scorer.image_features([_decoded(entries[n], root) for n in chosen])

        return self._get(keys, lambda n: f"image {_name(entries[n])}", encode, progress)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, d) fp32, unit norm; a text longer than the tower takes is the mean of its windows, normalised."""
        keys = ["text-" + hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]

        def encode(chosen: list[int]) -> Tensor:
            return torch.nn.functional.normalize(self.scorer.text_features([texts[n] for n in chosen]), dim=-1)

        return self._get(keys, lambda n: f"prompt {texts[n][:60]!r}", encode, None)

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
        partial = path.with_name(path.name + ".partial")
        features = torch.stack([self._features[key] for key in self._fresh])
        save_file({"features": features}, partial, {"scorer": self.scorer.identity, "keys": keys})
        partial.replace(path)
        self._fresh = []


def _decoded(entry: Any, root: str | Path | None) -> Image.Image:
    return load_images({"images": [entry]}, root=root)[0]


def _name(entry: Any) -> str:
    path = entry.get("path") if isinstance(entry, dict) else entry
    return str(path) if isinstance(path, str | Path) else "in memory"
