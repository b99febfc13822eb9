"""A call of a vision tower, cut along dim 0 into the entries that the tower treats alone.

An entry is a picture, a tile (LLaVA-NeXT, Idefics3, InternVL, ...), or an image's packed patches where `grid_thw` says
how many (Qwen-VL).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aspo.vision.folder import Entry

MIN_NOISE = (
    0.01  # of the mean, what convolutions in TF32 may differ by with the batch; seeing another image is far above
)
TELLING = (Tensor, bool, int, float, str, torch.dtype, type(None))  # arguments whose repr tells all but a content


class TowerCall:
    """The arguments of a tower's call.

    tensors: those among the arguments; device: the first one's.
    counts: rows of dim 0 of each entry; None where the call cannot be cut.
    signature: a hash of everything but the tensors' contents and number of rows.
    """

    def __init__(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self.device = self.tensors[0].device if self.tensors else torch.device("cpu")
        grid = kwargs.get("grid_thw")
        self._units = {1} if grid is None else {1, int(getattr(tower, "spatial_merge_size", 1)) ** 2}
        self.counts = self._counts(grid)
        kind = self.device.type
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        described = [(x.dtype, tuple(x.shape[1:])) if isinstance(x, Tensor) else x for x in self._leaves]
        self.signature = hash_of(repr((self._autocast, self._spec, described)))

    def _counts(self, grid: Any) -> list[int] | None:
        """The patches of each image, or one row an entry; None unless every tensor has so many rows or entries.

        Without a grid, a first tensor of two dimensions may be patches of images that are not told.
        """
        packed = isinstance(grid, Tensor) and grid.dim() == 2
        if not all(isinstance(leaf, TELLING) for leaf in self._leaves) or any(x.dim() == 0 for x in self.tensors):
            return None
        if not self.tensors or not (packed or self.tensors[0].dim() > 2):
            return None
        counts = grid.prod(-1).tolist() if packed else [1] * len(self.tensors[0])
        fits = all(len(tensor) in (sum(counts), len(counts)) for tensor in self.tensors)
        return counts if counts and fits else None

    def _sizes(self, tensor: Tensor) -> list[int]:
        assert self.counts is not None
        return self.counts if len(tensor) == sum(self.counts) else [1] * len(self.counts)

    def keys(self) -> list[str]:
        """A key of each entry: the signature and a hash of the entry's bits."""
        parts = [content(tensor).split(self._sizes(tensor)) for tensor in self.tensors]
        return [f"{self.signature}-{hash_of(*entry)}" for entry in zip(*parts, strict=True)]

    def whole_key(self) -> str:
        """A key of the call as a whole."""
        lengths = repr([len(tensor) if tensor.dim() else None for tensor in self.tensors])
        return f"{self.signature}-{hash_of(lengths, *map(content, self.tensors))}"

    def run(self, original: Any, index: list[int], invert: bool = False) -> list[Entry] | None:
        """The tower's outputs for these entries, one by one; None where they are not as many as they should be.

        invert: 1 - x instead of the last entry's values.
        """
        assert self.counts is not None
        if index == list(range(len(self.counts))):
            output = original(*self.args, **self.kwargs)
        else:
            leaves = list(self._leaves)
            for place, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    parts = leaf.split(self._sizes(leaf))
                    taken = [parts[i] for i in index]
                    if invert and leaf.is_floating_point():
                        taken[-1] = 1 - taken[-1]
                    leaves[place] = torch.cat(taken)
            args, kwargs = pytree.tree_unflatten(leaves, self._spec)
            output = original(*args, **kwargs)
        return self._cut(output, [self.counts[i] for i in index])

    def _cut(self, output: Any, counts: list[int]) -> list[Entry] | None:
        """A tensor has a row for every row of the input, or for every merged patch of packed images."""
        leaves, spec = pytree.tree_flatten(output)
        columns: list[Sequence[Any]] = []
        for leaf in leaves:
            if leaf is None:
                columns.append([None] * len(counts))
                continue
            unit = sum(counts) // max(len(leaf), 1) if isinstance(leaf, Tensor) and leaf.dim() else 0
            if unit not in self._units or len(leaf) * unit != sum(counts) or any(count % unit for count in counts):
                return None
            columns.append(leaf.split([count // unit for count in counts]))
        return [(list(parts), spec) for parts in zip(*columns, strict=True)]

    def can_be_cut(self, original: Any) -> bool:
        """Whether the first entry gives the same outputs alone and beside another one, which is seen by running both.

        Same up to rounding, which depends on the batch: of means, the square root of the dtype's precision.
        """
        alone, both = self.run(original, [0]), self.run(original, [0, 0], invert=True)
        if alone is None or both is None or alone[0][1] != both[0][1]:
            return False
        for a, b in zip(alone[0][0], both[0][0], strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                precision = max(torch.finfo(dtype).eps for dtype in (a.dtype, self._autocast or a.dtype))
                noise = max(MIN_NOISE, precision**0.5)
                if not (a - b).abs().mean(dtype=torch.float32) <= noise * a.abs().mean(dtype=torch.float32):
                    return False
        return True


def content(tensor: Tensor) -> Tensor:
    """(E, ...) of any dtype and device -> (E, bytes) uint8 on the CPU."""
    rows = tensor.detach().cpu().contiguous()
    return (rows.flatten(1) if rows.dim() > 1 else rows.reshape(-1, 1)).view(torch.uint8)


def hash_of(*parts: Tensor | str) -> str:
    """32 hexadecimal digits: XXH3's 128 bits of texts and of tensors on the CPU, one behind the other."""
    state = xxhash.xxh3_128()
    for part in parts:
        data: Any = part.encode() if isinstance(part, str) else part.numpy()
        state.update(data)
    return state.hexdigest()
