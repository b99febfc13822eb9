"""A head that is spread over processes: vocabulary parallelism, and heads that FSDP keeps in shards.

Every process holds rows start..stop of the head, and the same hidden states and targets. The owner of a target gives
its logit to all; each process sums its own exponentials with its own shift; one gather of (shift, sum) brings all to
the largest shift, in the order of the ranks, so that all get the same bits. Two small collectives of N numbers, and
one of N x H where the hidden states want a gradient. Axes: n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aspo_kernels.tiles import Chunk, Head


@dataclass(frozen=True)
class VocabularyShard:
    """Rows start..stop of a head with `size` rows, held by this process of `group` (None: all processes).

    Shards may be uneven. The gradient of the hidden states comes out whole in every process, and that of the shard for
    its own rows: neither is to be summed over the group again.
    """

    start: int
    stop: int
    size: int
    group: Any = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.size:
            raise ValueError(f"a shard of rows {self.start}..{self.stop} does not fit a vocabulary of {self.size}")
        if not dist.is_initialized():
            raise ValueError("a VocabularyShard needs torch.distributed: call init_process_group first")

    def check(self, head: Tensor) -> None:
        """Raise ValueError unless `head` has this shard's rows."""
        if head.shape[0] != self.stop - self.start:
            raise ValueError(
                f"the head has {head.shape[0]} rows but its VocabularyShard is {self.start}..{self.stop} of {self.size}"
            )

    @property
    def group_name(self) -> str:
        """What torch finds the process group by."""
        group = dist.group.WORLD if self.group is None else self.group
        return str(group.group_name)  # type: ignore[union-attr]


def vocabulary_group(name: str) -> dist.ProcessGroup:
    """The process group of `VocabularyShard.group_name`."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def share_targets(chunk: Chunk, group: dist.ProcessGroup) -> None:
    """Each target's logit from the process that holds its row (0 elsewhere) to all: the common first shift."""
    dist.all_reduce(chunk.z_y, group=group)
    chunk.shift.copy_(chunk.z_y)


def merge_sums(chunk: Chunk, head: Head, raise_to: Callable[[Chunk, Head, Tensor], None], group: Any) -> None:
    """Bring all processes to the largest of their shifts, and their sums together."""
    mine = torch.stack([chunk.shift, chunk.total])
    every = mine.new_empty(group.size(), *mine.shape)
    dist.all_gather(list(every.unbind(0)), mine, group=group)
    shifts, totals = every.unbind(1)
    shift = shifts.amax(0)
    raise_to(chunk, head, shift)
    chunk.total.copy_((totals * (shifts - shift).exp()).sum(0))


def sum_over(tensor: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start summing `tensor` over the group, in place."""
    return dist.all_reduce(tensor, group=group, async_op=True)
