"""TokenTree: where each item of a batch lies in its grid of tokens, and which tokens may see which.

An item is a prefix (image, prompt, the common start of its responses) and the branches that go on from it, blind to
each other:

    | prefix | branch 1 | branch 2 |        one row, computed once, for two responses to one prompt

A branch's token sees the item's prefix and its own branch up to itself; positions restart at the prefix's end in every
branch. With one branch an item is an ordinary sequence, so that padded, packed and shared batches are all trees.
Axes: R rows and T columns of the grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Item(NamedTuple):
    """Tokens `start : start + prefix` of a row, then its branches, one behind the other. Lengths in tokens."""

    row: int
    start: int
    prefix: int
    branches: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of prefix and branches."""
        return self.prefix + sum(self.branches)

    def branch_start(self, branch: int) -> int:
        """The column where a branch begins."""
        return self.start + self.prefix + sum(self.branches[:branch])


@dataclass(frozen=True)
class TokenTree:
    """The items of a (R, T) grid, row after row; what no item covers is padding."""

    shape: tuple[int, int]
    items: tuple[Item, ...]

    @classmethod
    def place(cls, lengths: Sequence[tuple[int, tuple[int, ...]]], packed: bool) -> TokenTree:
        """A tree of items given as (prefix, branches): one behind the other in one row (packed), or a row each."""
        items, start = [], 0
        for index, (prefix, branches) in enumerate(lengths):
            items.append(Item(0 if packed else index, start if packed else 0, prefix, tuple(branches)))
            start += items[-1].length
        width = start if packed else max((item.length for item in items), default=0)
        return cls((1 if packed else len(items), width), tuple(items))

    @property
    def is_plain(self) -> bool:
        """Whether every row is one ordinary sequence: a causal model's own mask and positions are right."""
        return len({item.row for item in self.items}) == len(self.items) and all(
            item.start == 0 and len(item.branches) == 1 for item in self.items
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all items, padding left out."""
        return sum(item.length for item in self.items)

    @property
    def num_unshared_tokens(self) -> int:
        """Tokens of the same responses where each has its own prefix."""
        return sum(item.prefix * len(item.branches) + sum(item.branches) for item in self.items)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prefix with one branch."""
        return max((item.prefix + max(item.branches, default=0) for item in self.items), default=0)

    def segments(self) -> Iterator[tuple[int, int, int, slice]]:
        """(item, branch, row, columns) of every prefix (branch 0) and branch (1..), in the grid's order."""
        for index, item in enumerate(self.items):
            yield index, 0, item.row, slice(item.start, item.start + item.prefix)
            for k, length in enumerate(item.branches):
                begin = item.branch_start(k)
                yield index, k + 1, item.row, slice(begin, begin + length)

    @cached_property
    def item_ids(self) -> Tensor:
        """(R, T) int32, the item of each token; -1 = padding."""
        ids = torch.full(self.shape, -1, dtype=torch.int32)
        for index, _, row, columns in self.segments():
            ids[row, columns] = index
        return ids

    @cached_property
    def branch_ids(self) -> Tensor:
        """(R, T) int32, 0 = prefix (and padding), 1.. = branch."""
        ids = torch.zeros(self.shape, dtype=torch.int32)
        for _, branch, row, columns in self.segments():
            ids[row, columns] = branch
        return ids

    @cached_property
    def positions(self) -> Tensor:
        """(R, T) int64, each token's place in its own sequence, prefix + branch; 0 in padding."""
        positions = torch.zeros(self.shape, dtype=torch.long)
        for index, branch, row, columns in self.segments():
            first = self.items[index].prefix if branch else 0
            positions[row, columns] = torch.arange(first, first + columns.stop - columns.start)
        return positions
