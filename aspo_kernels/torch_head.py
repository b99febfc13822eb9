"""A chunk of tokens through the head, in plain torch: what `linear_logps` does to each tile on the CPU.

`triton_head` has the same functions as GPU kernels; `linear_logps` says what they are for. Axes as in `tiles`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aspo_kernels.tiles import Chunk, Head, gradient_operand_dtype, statistics_dtype, widen

# exp(40): a row whose sum passes this raises its shift. Far inside fp32, and 1 / S stays far above its smallest normal
# number, so that the products of the dW pass do not flush to zero.
MAX_SUM = 2.3e17


def operand_dtype(dtype: torch.dtype, kept: bool) -> torch.dtype:
    """What E is rounded to before it is multiplied."""
    return gradient_operand_dtype(dtype)


def start(x: Tensor, y: Tensor, head: Head) -> Chunk:
    """The targets' logits, which are the first shift; 0 where another process holds them.  (n, H), (n,).

    NaN where a whole head does not have the target, such as -100: its index would wrap to another token's row.
    """
    x, dtype = widen(x), statistics_dtype(x.dtype)
    z_y = (x.to(dtype) * head.rows(y).to(dtype)).sum(1)
    head.epilogue.apply_(z_y, None if head.bias is None else head.entries(head.bias, y).to(dtype))
    if not head.sharded:
        z_y.masked_fill_((y < 0) | (y >= head.size), float("nan"))
    return Chunk(x, y, z_y, torch.stack([z_y, torch.zeros_like(z_y)]))


def exps_tile(chunk: Chunk, head: Head, part: slice, operand_dtype: torch.dtype | None) -> Tensor | None:
    """One slice of the vocabulary: adds to the chunk's sums, and returns E d of its first m tokens.

    (m, v) in operand_dtype, a view of chunk.exps where that is kept; None if operand_dtype is.
    """
    z, derivative = _tile_logits(chunk.x, head, part)
    e = _shifted_exps(z, chunk.shift, chunk.y, part)
    sums = e.sum(1)
    too_large = torch.nonzero(~(sums < MAX_SUM)).flatten()  # ~(<) also catches NaN
    if too_large.numel():
        z = _tile_logits(chunk.x[too_large], head, part)[0]
        largest = z.amax(1)
        again = _shifted_exps(z, largest, chunk.y[too_large], part)
        raise_shift(chunk, too_large, largest, part.start)
        e[too_large], sums[too_large] = again, again.sum(1)
    chunk.total.add_(sums)
    if operand_dtype is None:
        return None
    e = e if derivative is None else e.mul_(derivative)
    kept = chunk.exps if chunk.exps is not None else chunk.weighted
    operand = e[: e.shape[0] if kept is None else kept.shape[0]].to(operand_dtype)
    if chunk.exps is not None:
        chunk.exps[:, part] = operand
    return operand


def raise_shift(chunk: Chunk, rows: Tensor, shift: Tensor, done: int) -> None:
    """Another shift for `rows`, whose exponentials of the vocabulary up to `done` exist already.  (k,), (k,)."""
    rescale = (chunk.shift[rows] - shift).exp()
    chunk.shift[rows] = shift
    chunk.total[rows] *= rescale
    for kept, width in ((chunk.weighted, None), (chunk.exps, done)):
        if kept is not None:
            inside = rows < kept.shape[0]
            kept[rows[inside], :width] *= rescale[inside, None]


def raise_to(chunk: Chunk, head: Head, shift: Tensor) -> None:
    """Another shift, nowhere lower, after the last slice.  (n,)."""
    rows = torch.nonzero(shift != chunk.shift).flatten()
    raise_shift(chunk, rows, shift[rows], head.size)


def add_target_rows_(chunk: Chunk, head: Head) -> None:
    """The targets' own part of `weighted`, -S d_y W[y], when S is complete."""
    if chunk.weighted is not None:
        m = chunk.weighted.shape[0]
        rows = head.rows(chunk.y[:m]).to(chunk.weighted.dtype)
        chunk.weighted.addcmul_(_target_entry(chunk, head)[:m, None], rows)


def finish(chunk: Chunk, head: Head, row_grad: Tensor | None) -> Tensor:
    """(4, n): log p, and what the backward needs, shift, denominator and the targets' entries in E d.

    Writes G = W[y] - p W into row_grad (m, H), and the targets' entries into chunk.exps.
    """
    # With t = z_y - c: logp = t - log(S + e^t), which for the usual t = 0 is -log1p(S).
    t = chunk.z_y - chunk.shift
    denominator = chunk.total + t.exp()
    logps = torch.where(t == 0, -chunk.total.log1p(), t - denominator.log())
    if row_grad is not None and chunk.weighted is not None:
        # G = (S W[y] - sum_{v != y} E_v W[v]) / (S + e^t), with E and S times the soft-cap's derivative
        scale = -head.epilogue.slope / denominator[: row_grad.shape[0]]
        row_grad.copy_(chunk.weighted.mul_(scale[:, None]))
    entry = _target_entry(chunk, head)
    if chunk.exps is not None:
        m = chunk.exps.shape[0]
        _put_at_targets(chunk.exps, chunk.y[:m], slice(0, head.size), entry[:m].to(chunk.exps.dtype))
    return torch.stack([logps, chunk.shift, denominator, entry])


def _target_entry(chunk: Chunk, head: Head) -> Tensor:
    """1 - p_y = S / (S + e^t): with -S in the target's place, E / (S + e^t) is exactly p - 1[y].  (n,)."""
    derivative = head.epilogue.derivative(chunk.z_y)
    return -chunk.total if derivative is None else -chunk.total * derivative


def exps_again(
    x: Tensor,  # (n, H)
    y: Tensor,  # (n,)
    head: Head,
    part: slice,
    shift: Tensor,  # (n,)
    target_entry: Tensor,  # (n,)
    out: Tensor,  # (n, v)
) -> None:
    """E d of one slice once more, with the targets' entries in place."""
    z, derivative = _tile_logits(widen(x), head, part)
    e = _shifted_exps(z, shift, y, part)
    e = e if derivative is None else e.mul_(derivative)
    out.copy_(_put_at_targets(e, y, part, target_entry))


def _tile_logits(x: Tensor, head: Head, part: slice) -> tuple[Tensor, Tensor | None]:
    """Logits of one slice of the vocabulary and the soft-cap's derivative.  (n, v)."""
    z = head.products(x, part)
    return z, head.logits_(z, part)


def _shifted_exps(z: Tensor, shift: Tensor, y: Tensor, part: slice) -> Tensor:
    """exp(z - shift) in place, 0 at the targets.  (n, v)."""
    return _put_at_targets(z.sub_(shift[:, None]).exp_(), y, part, torch.zeros_like(shift))


def _put_at_targets(e: Tensor, y: Tensor, part: slice, values: Tensor) -> Tensor:
    """e[n, y[n]] = values[n] for the targets inside this slice, in place.  (n, v), (n,), (n,)."""
    here = torch.nonzero((y >= part.start) & (y < part.stop)).flatten()
    e[here, y[here] - part.start] = values[here]
    return e
