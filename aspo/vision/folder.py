"""Features of a frozen vision tower in files: shards of many images, written as they come, read one image at a time."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

Entry: TypeAlias = tuple[list[Any], pytree.TreeSpec]  # a tower's output for one image: tensors (or None), structure

SHARD_BYTES = 64 << 20
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, NotImplementedError)


class FeatureFolder:
    """Entries by key in `folder/*.safetensors`; other processes may write to the same folder.

    A shard is written under another name and renamed, so that a kill leaves no half shard; what was not yet written is
    computed again. A shard or an entry that cannot be read, or whose checksum is wrong, is skipped with a warning.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._where: dict[str, list[Path]] = {}  # more than one where one of them is damaged, or of another process
        self._seen: set[str] = set()
        self._listed_at = -1
        self._fresh: list[tuple[str, str]] = []  # keys of this step, and whose reads decide what is kept of them
        self._pending: dict[str, Entry] = {}
        self._bytes = 0
        self._reads: dict[str, set[int]] = {}
        self._warned = False

    def get(self, key: str, device: torch.device) -> Entry | None:
        """The entry of a key, on a device; None where there is none."""
        entry = self._pending.get(key) or self._read(key)
        if entry is None:
            return None
        leaves, spec = entry
        return [leaf if leaf is None else leaf.to(device) for leaf in leaves], spec

    def _read(self, key: str) -> Entry | None:
        if not self._where.get(key):
            self._list()
        shards = self._where.get(key, [])
        while shards:
            try:
                return _read_entry(shards[-1], key)
            except UNREADABLE as error:
                _warn_unreadable(shards.pop(), error)
        return None

    def add(self, entries: dict[str, Entry], signature: str) -> None:
        """Keep entries. Which of their `hidden_states` is known when the step ends, see `watch`."""
        self._pending.update(entries)
        self._fresh += [(key, signature) for key in entries]

    def watch(self, output: Any, signature: str) -> Any:
        """The output, its `hidden_states` (if it has any) noting which layers are read."""
        if isinstance(getattr(output, "hidden_states", None), tuple):
            output.hidden_states = Layers(output.hidden_states)
            output.hidden_states.reads = self._reads.setdefault(signature, set())
        return output

    def end_step(self) -> None:
        """Take this step's entries to the CPU, without the layers that nobody read; write a shard when it is full."""
        for key, signature in self._fresh:
            leaves, spec = _without_layers(self._pending[key], self._reads.get(signature))
            # a copy: a part of a larger tensor would keep all of it alive
            self._pending[key] = [leaf if leaf is None else leaf.to("cpu", copy=True) for leaf in leaves], spec
            self._bytes += sum(leaf.nbytes for leaf in self._pending[key][0] if leaf is not None)
        self._fresh = []
        if self._bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is not yet in a file as a shard, named after its keys."""
        if not self._pending:
            return
        tensors, about = {}, {}
        for key, (leaves, spec) in self._pending.items():
            named = {f"{key}.{i}": leaf.contiguous() for i, leaf in enumerate(leaves) if leaf is not None}
            tensors.update(named)
            checks = [None if leaf is None else _checksum(leaf) for leaf in leaves]
            about[key] = json.dumps({"structure": pytree.treespec_dumps(spec), "checksums": checks})
        name = hashlib.blake2b("".join(sorted(about)).encode(), digest_size=16).hexdigest()
        path = self.folder / f"{name}.safetensors"
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        save_file(tensors, unfinished, metadata=about)
        os.replace(unfinished, path)
        self._note(path, about)
        self._pending, self._bytes = {}, 0

    def warn_not_kept(self) -> None:
        """Say once that this tower's features are not kept."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "vision_cache='disk' keeps nothing: the outputs of this vision tower cannot be cut into images; its "
                "calls are shared within a step only",
                stacklevel=2,
            )

    def _list(self) -> None:
        """Note the keys of the shards that are new since the last time."""
        changed = self.folder.stat().st_mtime_ns
        if changed == self._listed_at:
            return
        self._listed_at = changed
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._seen:
                try:
                    with safe_open(path, "pt") as shard:
                        self._note(path, shard.metadata() or {})
                except UNREADABLE as error:
                    self._seen.add(path.name)
                    _warn_unreadable(path, error)

    def _note(self, path: Path, keys: Iterable[str]) -> None:
        self._seen.add(path.name)
        for key in keys:
            self._where.setdefault(key, []).append(path)


class Layers(tuple):
    """A tower's `hidden_states` that notes which of them are read, and says so where one was not kept."""

    reads: set[int]

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, SupportsIndex):
            self.reads.update(range(len(self)))
            return super().__getitem__(index)
        value = super().__getitem__(index)
        if value is None:
            raise RuntimeError(
                f"the model reads layer {index} of its vision tower, which is not among the features kept on disk: "
                "another program wrote them for other layers; use another folder for vision_cache='disk'"
            )
        self.reads.add(operator.index(index) % len(self))
        return value

    def __iter__(self) -> Any:
        self.reads.update(range(len(self)))
        return super().__iter__()


def _without_layers(entry: Entry, reads: set[int] | None) -> Entry:
    """The entry without the `hidden_states` that are not in `reads`; all of them where it is empty."""
    leaves, spec = entry
    if not reads:
        return entry
    output = pytree.tree_unflatten(leaves, spec)
    output.hidden_states = tuple(layer if i in reads else None for i, layer in enumerate(output.hidden_states))
    return pytree.tree_flatten(output)


def _read_entry(path: Path, key: str) -> Entry:
    with safe_open(path, "pt") as shard:
        about = json.loads(shard.metadata()[key])
        leaves: list[Any] = []
        for i, checksum in enumerate(about["checksums"]):
            leaves.append(None if checksum is None else shard.get_tensor(f"{key}.{i}"))
            if checksum is not None and _checksum(leaves[-1]) != checksum:
                raise ValueError(f"the checksum of {key} is wrong")
    return leaves, pytree.treespec_loads(about["structure"])


def _checksum(leaf: Tensor) -> int:
    return zlib.crc32(leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _warn_unreadable(path: Path, error: Exception) -> None:
    warnings.warn(f"{path}: {error}; its images are computed again. Delete it", stacklevel=3)
