"""Tiles of products to statistics, to the two distributions of a token KL, and to their dz, in plain torch.

`triton_stats` has the same functions as GPU kernels. Every function may write over the products that it is given. The
shift of a row is its largest logit so far, the target's own to begin with: no exponential is above 1, so that a moment
keeps its digits wherever the row's mass lies. Axes: n tokens, v entries of a slice of the vocabulary, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aspo_kernels.tiles import Chunk, Head


def add_stats_(chunk: Chunk, extra: Tensor, z: Tensor, head: Head, part: slice) -> None:
    """One slice of the vocabulary to the chunk's shift and total, and to extra.

    extra: (3, n) sum_{v != y} E_v (z_v - shift); max_{v != y} z_v; z_y as these products have it, so that it ties with
    a twin of its row. z: (n, v) products.
    """
    head.logits_(z, part)
    moment, largest, target = extra
    here, at = _targets_inside(chunk.y, part)
    target[here] = z[here, at]
    z[here, at] = float("-inf")
    highest = z.amax(1)
    torch.maximum(largest, highest, out=largest)
    shift = torch.maximum(chunk.shift, highest)
    lower = chunk.shift - shift
    rescale = lower.exp()
    e = z.sub_(shift[:, None]).exp_()
    moment.add_(lower * chunk.total).mul_(rescale).add_(torch.special.xlogy(e, e).sum(1))  # z - shift = log E
    chunk.total.mul_(rescale).add_(e.sum(1))
    chunk.shift.copy_(shift)


def write_stats_grad(z: Tensor, y: Tensor, head: Head, part: slice, rows: Tensor, out: Tensor) -> None:
    """dz = p (a - b log p) d, and entry d at the target.  z: (n, v) products, out: (n, v).

    rows: (5, n) shift, log sum_v exp(z_v - shift), a, b, entry. d: the soft-cap's derivative.
    """
    derivative = head.logits_(z, part)
    shift, log_total, a, b, entry = rows[:, :, None]
    log_p = z.sub_(shift).sub_(log_total)
    p = log_p.exp()
    dz = a * p - b * torch.where(p > 0, p * log_p, 0)  # a masked rival has p = 0 and log p = -inf
    _write(dz, derivative, y, part, entry, out)


def add_pair_(
    chunk: Chunk,
    extra: Tensor,  # (2, n)
    z: Tensor,  # (n, v)
    ref_z: Tensor,  # (n, v)
    head: Head,
    ref_head: Head,
    part: slice,
    operand_dtype: torch.dtype | None,
) -> Tensor | None:
    """One slice of the vocabulary to shift and total of n policy rows and n reference rows, and to extra.

    extra: sum_{v != y} R_v (u_ref - u), u = z - shift, with the policy's E = exp(u) and the reference's R; and
    sum_{v != y} (R - E), which keeps digits that the difference of the totals has lost where the two are close.
    Returns (2n, v): E d and (R - E) d, d the policy's derivative of the soft-cap; None if operand_dtype is.
    """
    moment, difference = extra
    n = moment.shape[0]
    derivative = head.logits_(z, part)
    ref_head.logits_(ref_z, part)
    here, at = _targets_inside(chunk.y[:n], part)
    z[here, at] = ref_z[here, at] = float("-inf")
    shift = torch.maximum(chunk.shift, torch.cat([z.amax(1), ref_z.amax(1)]))
    lower = chunk.shift - shift
    rescale = lower.exp()
    u, ref_u = z.sub_(shift[:n, None]), ref_z.sub_(shift[n:, None])
    e, ref_e = u.exp(), ref_u.exp()
    moment.add_((lower[n:] - lower[:n]) * chunk.total[n:]).mul_(rescale[n:])
    moment.add_(torch.where(ref_e > 0, ref_e * (ref_u - u), 0).sum(1))
    difference.mul_(rescale[n:]).add_((rescale[n:] - rescale[:n]) * chunk.total[:n]).add_((ref_e - e).sum(1))
    chunk.total.mul_(rescale).add_(torch.cat([e.sum(1), ref_e.sum(1)]))
    chunk.shift.copy_(shift)
    if chunk.weighted is None or operand_dtype is None:
        return None
    raised = torch.nonzero((lower[:n] != 0) | (lower[n:] != 0)).flatten()
    factor, ref_factor = rescale[raised, None], rescale[n + raised, None]
    weighted = chunk.weighted[raised]
    chunk.weighted[n + raised] = chunk.weighted[n + raised] * ref_factor + weighted * (ref_factor - factor)
    chunk.weighted[raised] = weighted * factor
    operand = torch.cat([e, ref_e.sub_(e)])
    if derivative is not None:
        operand.view(2, n, -1).mul_(derivative)
    return operand.to(operand_dtype)


def write_pair_grad(
    z: Tensor, ref_z: Tensor, y: Tensor, head: Head, ref_head: Head, part: slice, rows: Tensor, out: Tensor
) -> None:
    """dz = (a (p - p_ref) - b p) d, and entry d at the target.  z, ref_z: (n, v) products, out: (n, v).

    rows: (7, n) shift and log sum_v exp(z_v - shift) of the policy, the same of the reference, a, b, entry.
    """
    derivative = head.logits_(z, part)
    ref_head.logits_(ref_z, part)
    shift, log_total, ref_shift, ref_log_total, a, b, entry = rows[:, :, None]
    p = z.sub_(shift).sub_(log_total).exp_()
    ref_p = ref_z.sub_(ref_shift).sub_(ref_log_total).exp_()
    _write(a * (p - ref_p) - b * p, derivative, y, part, entry, out)


def _targets_inside(y: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Tokens whose target lies in this slice, and where in it."""
    here = torch.nonzero((y >= part.start) & (y < part.stop)).flatten()
    return here, y[here] - part.start


def _write(dz: Tensor, derivative: Tensor | None, y: Tensor, part: slice, entry: Tensor, out: Tensor) -> None:
    here, at = _targets_inside(y, part)
    dz[here, at] = entry[here, 0]
    out.copy_(dz if derivative is None else dz.mul_(derivative))
