"""The torch form of `token_logps`: chunks of rows in fp32, the same shift and the same arguments as triton_logits.

Axes: N tokens, M = R T rows of logits, V vocabulary. Row m is logits[m // T, m % T]; (M, V) logits have R = 1.
Derivation: docs/math.md 1 and 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CPU_CHUNK_BYTES = 2 * 2**20  # fp32 working memory of a chunk of rows: stays in a core's cache
GPU_CHUNK_BYTES = 64 * 2**20  # enough work for a launch
MAX_LOG_SUM = 40.0  # the shift is raised so that no exponential is above e^40


class RowTokens(NamedTuple):
    """Which tokens each of M rows predicts: row m those in order[bounds[m]:bounds[m+1]], ascending."""

    rows: Tensor  # (N,)
    order: Tensor  # (N,)
    bounds: Tensor  # (M+1,)

    @classmethod
    def of(cls, rows: Tensor, size: int) -> RowTokens:
        """Without a host sync."""
        ascending, order = rows.sort(stable=True)
        return cls(rows, order, torch.searchsorted(ascending, torch.arange(size + 1, device=rows.device)))


def forward(
    logits: Tensor, rows: Tensor | None, targets: Tensor, temperature: float, logps: Tensor, statistics: Tensor
) -> None:
    for chunk in _chunks(targets.numel(), logits):
        z = _get_rows(logits, chunk if rows is None else rows[chunk]).to(logps.dtype, copy=True)
        z_target = z.gather(1, targets[chunk, None])
        shift = torch.maximum(z_target, z.amax(1, keepdim=True) - MAX_LOG_SUM * temperature)
        e = z.sub_(shift).div_(temperature).exp_()
        rivals = e.scatter_(1, targets[chunk, None], 0.0).sum(1)
        t = (z_target - shift)[:, 0] / temperature
        logps[chunk] = torch.where(t == 0, -rivals.log1p(), t - (rivals + t.exp()).log())
        statistics[chunk, 0] = z_target[:, 0]
    statistics[:, 1] = logps


def backward(
    d_logits: Tensor,
    grad_logps: Tensor,
    logits: Tensor,
    tokens: RowTokens | None,
    targets: Tensor,
    statistics: Tensor,
    temperature: float,
) -> None:
    """-sum(g) p row by row; then the targets' places are overwritten with sum(g of this target) - sum(g) p."""
    g, (z_target, logp) = grad_logps / temperature, statistics.unbind(1)
    g_row, first, used, empty = g, None, None, None
    at_target = -g * logp.expm1()
    if tokens is not None:
        g_row = g.new_zeros(tokens.bounds.numel() - 1).index_put_((tokens.rows,), g, accumulate=True)
        same_target = _sums_of_equals(tokens.rows * logits.shape[2] + targets, g)
        at_target = -same_target * logp.expm1() - (g_row[tokens.rows] - same_target) * logp.exp()
        first = tokens.order[tokens.bounds[:-1].clamp_max(g.numel() - 1)]
        empty = tokens.bounds.diff() == 0
        # On the CPU, where looking is free, prompts and padding are left out; elsewhere worked out and dropped.
        used = torch.arange(empty.numel(), device=g.device) if g.device.type != "cpu" else (~empty).nonzero()[:, 0]
        if g.device.type == "cpu":
            _set_rows(d_logits, empty.nonzero()[:, 0], d_logits.new_zeros(()))
    for chunk in _chunks(g.numel() if used is None else used.numel(), logits):
        at = chunk if used is None else used[chunk]
        token = chunk if first is None else first[at]
        d = _get_rows(logits, at).to(g.dtype, copy=True).sub_(z_target[token, None]).div_(temperature)
        d.add_(logp[token, None]).exp_().mul_(-g_row[at, None])
        _set_rows(d_logits, at, d if empty is None else d.masked_fill_(empty[at, None], 0.0))
    rows = torch.arange(g.numel(), device=g.device) if tokens is None else tokens.rows
    d_logits[rows // logits.shape[1], rows % logits.shape[1], targets] = at_target.to(d_logits.dtype)


def _sums_of_equals(keys: Tensor, values: Tensor) -> Tensor:
    """out[n] = sum of values[k] over all k with keys[k] = keys[n], in a fixed order and without a host sync."""
    first = torch.searchsorted(keys.sort()[0], keys)
    return torch.zeros_like(values).index_put_((first,), values, accumulate=True)[first]


def _get_rows(logits: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows of (R, T, V) by number: a slice (R = 1, a view) or (n,) int64 (a copy).  (n, V)."""
    return logits[0, rows] if isinstance(rows, slice) else logits[rows // logits.shape[1], rows % logits.shape[1]]


def _set_rows(logits: Tensor, rows: Tensor | slice, values: Tensor) -> None:
    if isinstance(rows, slice):
        logits[0, rows] = values
    else:
        logits[rows // logits.shape[1], rows % logits.shape[1]] = values.to(logits.dtype)


def _chunks(rows: int, logits: Tensor) -> list[slice]:
    size = CPU_CHUNK_BYTES if logits.device.type == "cpu" else GPU_CHUNK_BYTES
    step = max(1, size // (4 * logits.shape[2]))
    return [slice(n, min(n + step, rows)) for n in range(0, rows, step)]
