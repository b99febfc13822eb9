"""Counted tokens that are spread over processes: sequence parallelism.

Where a sequence is too long for one process (context parallelism, Ulysses), each process of a group has the hidden
states of some positions. The head's passes, which are the work, need nothing of the others, and a preference loss needs
one number a token: every process computes the log-probabilities of its own tokens, one all-reduce makes them whole in
every process, and from there all compute the same loss from the same bits. Sentences and responses that cross processes
need no care, and any objective fits (docs/math.md 26).

The sum is exact: of a token's numbers all but one are 0. Beside them goes a row of ones, so that a token which nobody
holds, or two do, is never read as a number. In the backward nothing is sent: a process takes its own tokens' gradients.
Axes: N tokens of the layout, n of them in this process, R rows and T columns of the grid, K numbers a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aspo_kernels.vocabulary import vocabulary_group

GRADS = ("sum", "mean")


@dataclass(frozen=True, eq=False)
class SequenceShard:
    """Which of a layout's tokens this process of `group` (None: all processes) has the hidden states of.

    Every token belongs to one process; a process may have none, and need not have neighbours. All have the same layout
    and everything that is given by token, sentence or response; only hidden states are spread.

    tokens: (n,) int64, in the order of this process's hidden states. size: N of the layout; with a shared prefix U, the
        number of predictions that differ, whose `whole` is then indexed by `Distinct.inverse`.
    rows: (n,) int64, where in this process's flattened hidden states (R, T_local, H) each token is predicted; None:
        they come as (n, H). grid: (R, T_local), which those must have.
    grad: how the gradients of the parameters, each process's being its own tokens' share, are reduced over the group
        afterwards: "sum", or "mean" where a wrapper averages over it (DDP or FSDP on a mesh with this dimension), for
        which the gradients of the tokens are multiplied by the group's size.
    """

    tokens: Tensor
    size: int
    group: Any = None
    rows: Tensor | None = None
    grid: tuple[int, int] | None = None
    grad: str = "sum"

    def __post_init__(self) -> None:
        # Contents are looked at where all processes do, or the others would wait for the one that raises.
        for name, value in (("tokens", self.tokens), ("rows", self.rows)):
            if value is not None and (value.dim() != 1 or value.dtype != torch.int64):
                raise ValueError(f"{name} must be (n,) int64, got {value.dtype} {tuple(value.shape)}")
        if (self.rows is None) != (self.grid is None):
            raise ValueError("rows and grid go together: the tokens' rows in hidden states of (R, T_local)")
        if self.rows is not None and self.rows.shape != self.tokens.shape:
            raise ValueError(f"rows has {self.rows.numel()} entries but tokens {self.tokens.numel()}")
        if self.grad not in GRADS:
            raise ValueError(f"grad is {self.grad!r}; choose sum or mean")
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("a SequenceShard needs torch.distributed: call init_process_group first")

    @classmethod
    def of_columns(
        cls, hidden_index: Tensor, shape: tuple[int, int], columns: Tensor, group: Any = None, grad: str = "sum"
    ) -> SequenceShard:
        """For a process that has columns `columns` of each row of the grid, in this order: what its slice of
        `torch.arange(T)` is, however the sequence was cut.

        Args:
            hidden_index: (N,), `SentenceLayout.hidden_index`; with a shared prefix `hidden_index[distinct.first]`.
            shape: (R, T) of the whole grid, `SentenceLayout.padded_shape`.
            columns: (T_local,) int64. Those outside 0..T-1 are padding.

        To be called on the CPU, as the batch comes from its loader; then `to(device)`.
        """
        if columns.dim() != 1 or columns.dtype != torch.int64:
            raise ValueError(f"columns must be (T_local,) int64, got {columns.dtype} {tuple(columns.shape)}")
        inside = torch.nonzero((columns >= 0) & (columns < shape[1])).flatten()
        place = columns.new_full((shape[1],), -1)
        place[columns[inside]] = inside
        row, column = hidden_index // shape[1], hidden_index % shape[1]
        tokens = torch.nonzero(place[column] >= 0).flatten()
        rows = row[tokens] * columns.numel() + place[column[tokens]]
        return cls(tokens, hidden_index.numel(), group, rows, (shape[0], columns.numel()), grad)

    @classmethod
    def even(cls, size: int, group: Any = None, grad: str = "sum") -> SequenceShard:
        """Consecutive parts of the packed tokens, as even as they go: for hidden states that come as (n, H)."""
        parts = torch.arange(size).tensor_split(dist.get_world_size(group))
        return cls(parts[dist.get_rank(group)], size, group, grad=grad)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SequenceShard:
        """The same on another device."""
        rows = None if self.rows is None else self.rows.to(device, non_blocking=non_blocking)
        return replace(self, tokens=self.tokens.to(device, non_blocking=non_blocking), rows=rows)

    def local(self, values: Tensor) -> Tensor:
        """What belongs to this process's tokens: (N, ...) -> (n, ...)."""
        if values.shape[:1] != (self.size,):
            raise ValueError(f"got {tuple(values.shape)} for a SequenceShard of {self.size} tokens: give all tokens'")
        _check_range("tokens", self.tokens, self.size)
        return values[self.tokens]

    def local_rows(self, hidden: Tensor, name: str = "hidden") -> Tensor:
        """The hidden states that predict this process's tokens: (R, T_local, H) -> (n, H); (n, H) as it is."""
        if self.tokens.device != hidden.device:
            raise ValueError(f"the SequenceShard is on {self.tokens.device} but {name} on {hidden.device}: use to()")
        if hidden.dim() == 2 and hidden.shape[0] == self.tokens.numel():
            return hidden
        if self.rows is None or hidden.dim() != 3 or hidden.shape[:2] != self.grid:
            grid = "" if self.grid is None else f"({self.grid[0]}, {self.grid[1]}, H) or "
            raise ValueError(
                f"{name} must be {grid}({self.tokens.numel()}, H), this process's part, for its SequenceShard; got "
                f"{tuple(hidden.shape)}"
            )
        _check_range("rows", self.rows, hidden.shape[0] * hidden.shape[1])
        return hidden.flatten(0, 1)[self.rows]

    def whole(self, *values: Tensor, validate: bool = False) -> tuple[Tensor, ...]:
        """Numbers of this process's tokens, (n,) each and of one floating dtype, as those of all tokens, (N,) each.

        One all-reduce of K + 1 rows of N numbers for K values, the same in every process to the bit. Differentiable:
        the upstream gradient, which all compute alike, is cut to the own tokens and not summed over the processes.

        Raises:
            ValueError: in all processes alike, on the CPU or with `validate` (which waits for the device): values that
                do not fit, tokens that no process holds or several do. Elsewhere such tokens come out as NaN.
        """
        with self.together(validate, values=(len(values), self.size, *(v.dtype for v in values))):
            self._check(values)
        stacked = torch.stack(values)
        shared, held = _share_tokens(stacked, self.tokens, self.size, self.grad == "mean", self.group_name)
        if self._looks(validate):
            bad = torch.nonzero(held != 1).flatten()
            if bad.numel():
                raise ValueError(
                    f"token {int(bad[0])} of {self.size} is held by {int(held[bad[0]])} processes of the group "
                    f"({bad.numel()} such tokens): each must be in one SequenceShard"
                )
        return tuple(row if v.requires_grad else row.detach() for row, v in zip(shared, values, strict=True))

    @contextmanager
    def together(self, validate: bool = False, **alike: Any) -> Iterator[None]:
        """All processes of the group leave this block, or none: what one raises in it, all raise.

        For what comes before `whole`, where the others would wait for a process that stopped. `alike`: what must be the
        same in all of them: tensors, dataclasses of tensors (a layout), numbers, strings, tuples of these, None.

        It looks on the CPU, or with `validate`; elsewhere, and under torch.compile, it does nothing.

        Raises:
            ValueError (RuntimeError for what was none): the first process's error, with its number; or what differs.
        """
        if not self._looks(validate):
            yield
            return
        failure = None
        try:
            yield
            said: Any = {name: _digest(value) for name, value in alike.items()}
        except Exception as error:
            failure, said = error, (str(error) or type(error).__name__, isinstance(error, ValueError))
        group = vocabulary_group(self.group_name)
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, said, group)
        process = dist.get_process_group_ranks(group)
        for rank, answer in zip(process, told, strict=True):
            if isinstance(answer, tuple):
                raise (ValueError if answer[1] else RuntimeError)(f"process {rank}: {answer[0]}") from failure
        for rank, answer in zip(process, told, strict=True):
            for name in told[0]:
                if answer.get(name) != told[0][name]:
                    raise ValueError(
                        f"{name} of process {rank} is not that of process {process[0]}: with a SequenceShard every "
                        "process of the group has the same batch, and only hidden states are its own"
                    )

    @property
    def group_name(self) -> str:
        """What torch finds the process group by."""
        group = dist.group.WORLD if self.group is None else self.group
        return str(group.group_name)  # type: ignore[union-attr]

    def _looks(self, validate: bool) -> bool:
        return not torch.compiler.is_compiling() and (validate or self.tokens.device.type == "cpu")

    def _check(self, values: tuple[Tensor, ...]) -> None:
        """Shapes and dtypes; on the CPU also that the tokens exist."""
        n = self.tokens.numel()
        for value in values:
            if value.shape != (n,) or not value.is_floating_point() or value.dtype != values[0].dtype:
                raise ValueError(
                    f"whole takes floating point ({n},) of one dtype, one number for each of this process's tokens; "
                    f"got {', '.join(f'{v.dtype} {tuple(v.shape)}' for v in values)}"
                )
        if not values:
            raise ValueError("whole takes at least one tensor")
        _check_range("tokens", self.tokens, self.size)


def _check_range(name: str, index: Tensor, size: int) -> None:
    """On the CPU, where looking is free: 0 <= index < size."""
    if index.numel() and index.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            raise ValueError(f"a SequenceShard's {name} reach from {low} to {high}, but there are {size}")


def _digest(value: Any) -> str:
    """A short text that two processes agree on if, and but for chance only if, they have the same value."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.blake2b(content, digest_size=16).hexdigest()}"
    if is_dataclass(value):
        return " ".join(_digest(getattr(value, f.name)) for f in fields(value) if f.init)
    if isinstance(value, tuple):
        return " ".join(_digest(entry) for entry in value)
    return repr(value)


# --- the operator: numbers of own tokens -> those of all; its gradient is the own tokens' part ---


@torch.library.custom_op("aspo_kernels::share_tokens", mutates_args=())
def _share_tokens(values: Tensor, tokens: Tensor, size: int, mean: bool, group: str) -> tuple[Tensor, Tensor]:
    """values: (K, n) -> (K, N), NaN where not exactly one process holds the token; and how many do, (N,)."""
    table = values.new_zeros(values.shape[0] + 1, size)
    table.index_add_(1, tokens, torch.cat([values, values.new_ones(1, values.shape[1])]))
    if size:
        dist.all_reduce(table, group=vocabulary_group(group))
    shared, held = table[:-1], table[-1].clone()
    return torch.where(held == 1, shared, torch.nan), held


@_share_tokens.register_fake
def _(values: Tensor, tokens: Tensor, size: int, mean: bool, group: str) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape[0], size), values.new_empty(size)


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, tokens, _, mean, group = inputs
    ctx.factor = vocabulary_group(group).size() if mean else 1
    ctx.save_for_backward(tokens)
    ctx.mark_non_differentiable(output[1])


def _own_gradient(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    own = gradient[:, ctx.saved_tensors[0]]
    return own if ctx.factor == 1 else own * ctx.factor, None, None, None, None


_share_tokens.register_autograd(_own_gradient, setup_context=_save_tokens)
