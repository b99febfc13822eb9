"""A head that is spread over processes: vocabulary parallelism, and heads that FSDP keeps in shards.

Vocabulary parallel: every process holds rows start..stop of the head, and the same hidden states and targets. The owner
of a target gives its logit to all, the first shift; each process adds up its own exponentials and may raise its own
shift; one gather of (shift, sum) then brings all to the largest shift, in the order of the ranks, so that all get the
same bits. Two small collectives a chunk of n tokens, n and 2n numbers, and one of n x H where the hidden states want a
gradient.

A shard of FSDP holds rows for storage only, and every process has its own tokens: such a head is gathered whole, once a
call. Axes: n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from aspo_kernels.tiles import Chunk, Head

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MaybeTensor = TypeVar("MaybeTensor", bound=Tensor | None)


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
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("a VocabularyShard needs torch.distributed: call init_process_group first")

    @classmethod
    def of(cls, head: DTensor) -> tuple[Tensor, VocabularyShard]:
        """This process's rows of a head that is sharded on dim 0, and which they are (a bias: its `to_local()`).

        The rows are differentiable: their gradient becomes head.grad, a DTensor sharded as head is.

        Raises:
            ValueError: another placement, a mesh of more than one dimension, or fewer rows than fill every shard; the
                same in all processes.
        """
        if not is_sharded(head):
            raise ValueError(f"VocabularyShard.of takes a DTensor, got a {type(head).__name__}")
        mesh, size = head.device_mesh, head.shape[0]
        if mesh.ndim != 1 or not head.placements[0].is_shard(0):
            raise ValueError(
                f"the head is placed as {head.placements} on a mesh of {mesh.ndim} dimensions: VocabularyShard.of "
                "takes Shard(0) on one; redistribute it, or use gather_head"
            )
        ranks, step = mesh.size(), -(-size // mesh.size())  # DTensor cuts as torch.chunk does
        if step * (ranks - 1) >= size:
            raise ValueError(f"{size} rows in shards of {step} leave the last of {ranks} processes none: use fewer")
        start = mesh.get_local_rank() * step
        return head.to_local(), cls(start, min(start + step, size), size, mesh.get_group())

    def check(self, head: Tensor, validate: bool = False) -> None:
        """Raise ValueError unless `head` has this shard's rows; with `validate` also, in all processes alike, unless
        their shards make up the whole vocabulary."""
        if is_sharded(head):
            raise ValueError("head is a DTensor: with a VocabularyShard pass its rows (VocabularyShard.of gives both)")
        mine = (self.start, self.stop, self.size, head.shape[0])
        shards: list[Any] = [mine]
        if validate:
            group = vocabulary_group(self.group_name)
            shards = [None] * group.size()
            dist.all_gather_object(shards, mine, group)
        for start, stop, size, rows in shards:
            if rows != stop - start:
                raise ValueError(f"the head has {rows} rows but its VocabularyShard is {start}..{stop} of {size}")
        if validate:
            cuts = sorted(shards)
            ends = [0, *(stop for _, stop, *_ in cuts)]
            if [start for start, *_ in cuts] != ends[:-1] or {size for _, _, size, _ in cuts} != {ends[-1]}:
                shown = ", ".join(f"{start}..{stop} of {size}" for start, stop, size, _ in shards)
                raise ValueError(f"the shards {shown} do not make up one vocabulary, each row once")

    @property
    def group_name(self) -> str:
        """What torch finds the process group by."""
        group = dist.group.WORLD if self.group is None else self.group
        return str(group.group_name)  # type: ignore[union-attr]


def vocabulary_group(name: str) -> dist.ProcessGroup:
    """The process group of `VocabularyShard.group_name`."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def share_targets(chunk: Chunk, start: int, group: dist.ProcessGroup) -> None:
    """Each target's logit from the process that holds its row (0 elsewhere) to all: the common first shift.

    start: the vocabulary's entry that is row 0 of this part of the head. NaN for a target below 0, which nobody holds.
    """
    dist.all_reduce(chunk.z_y, group=group)
    chunk.z_y.masked_fill_(chunk.y < -start, float("nan"))
    chunk.shift.copy_(chunk.z_y)


def merge_sums(chunk: Chunk, head: Head, raise_to: Callable[[Chunk, Head, Tensor], None], group: Any) -> None:
    """Bring all processes to the largest of their shifts, and their sums together."""
    every = chunk.sums.new_empty(group.size(), *chunk.sums.shape)
    dist.all_gather(list(every.unbind(0)), chunk.sums, group=group)
    shifts, totals = every.unbind(1)
    shift = shifts.amax(0)
    raise_to(chunk, head, shift)
    chunk.total.copy_((totals * (shifts - shift).exp()).sum(0))


def sum_weighted(chunk: Chunk | None, group: dist.ProcessGroup | None) -> dist.Work | None:
    """Start summing a chunk's `weighted` over the group, in place; None where there is nothing to sum."""
    if chunk is None or chunk.weighted is None or group is None:
        return None
    return dist.all_reduce(chunk.weighted, group=group, async_op=True)


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor; asked without importing it, which takes seconds."""
    return hasattr(tensor, "full_tensor")


def gather_if_frozen(name: str, tensor: MaybeTensor) -> MaybeTensor:
    """A DTensor that wants no gradient, whole: one gather. Anything else as it is.

    Raises:
        ValueError: a DTensor that wants a gradient, for which there are two answers.
    """
    if not is_sharded(tensor):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():  # type: ignore[union-attr]
        raise ValueError(
            f"{name} is a DTensor that requires a gradient: pass gather_head({name}) where each process has its own "
            f"tokens (FSDP), or both of VocabularyShard.of({name}) where all have the same (tensor parallel)"
        )
    return tensor.full_tensor()  # type: ignore[union-attr]


def gather_head(head: DTensor, grad: str = "mean") -> Tensor:
    """A sharded head whole, by one gather; the gradient that comes back is reduced over the processes, each getting its
    own rows.

    To be called once a step, outside `linear_logps`. For a head that is stored wider than it multiplies, cast first:
    `gather_head(head.to(torch.bfloat16))` gathers half the bytes.

    Args:
        head: a DTensor on any mesh: the head's weight (V, H), a bias, or a LoRA's factor.
        grad: "mean" over the mesh's processes, as FSDP does with its own gradients, each process's loss being a mean
            over its own tokens; or "sum".

    Raises:
        ValueError: something that is no DTensor; another `grad`.
    """
    if not is_sharded(head):
        raise ValueError(f"gather_head takes a DTensor, got a {type(head).__name__}: a whole head needs no gathering")
    if grad not in ("mean", "sum"):
        raise ValueError(f"grad is {grad!r}; choose mean or sum")
    return _GatherHead.apply(head, grad)


class _GatherHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: DTensor, grad: str) -> Tensor:
        ctx.mesh, ctx.placements, ctx.mean = head.device_mesh, head.placements, grad == "mean"
        return head.full_tensor()

    @staticmethod
    def backward(ctx: Any, d_head: Tensor) -> tuple[Tensor, None]:
        from torch.distributed.tensor import DTensor, Partial

        partial = DTensor.from_local(d_head, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        mine = partial.redistribute(placements=ctx.placements)
        return mine / ctx.mesh.size() if ctx.mean else mine, None
