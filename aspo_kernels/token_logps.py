"""Per-token log-probabilities from logits that a trainer already has: one pass, in chunks of rows, in fp32.

Axes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aspo_kernels.checks import check_finite_logps, check_targets, refuse_double_backward
from aspo_kernels.tiles import Epilogue, statistics_dtype, token_chunks

ROW_CHUNK_BYTES = 64 * 2**20  # fp32 working memory of a chunk of rows


def token_logps(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, validate: bool = False) -> Tensor:
    """`(logits / temperature).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]`.

    Args:
        logits: (N, V) fp32, bf16 or fp16; never overwritten.
        targets: (N,) int64 in [0, V).
        validate: check targets' contents on an accelerator too (waits for the device).

    Returns:
        (N,) fp32, differentiable once in logits; the gradient has logits' dtype.

    Raises:
        ValueError: wrong shapes, dtypes or devices; on the CPU also a target outside [0, V) or a result that is not
            finite.
    """
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits must be floating point (N, V) with V > 0, got {logits.dtype} {tuple(logits.shape)}")
    return gathered_token_logps(logits, None, targets, temperature, validate)


def gathered_token_logps(
    logits: Tensor,  # (M, V)
    rows: Tensor | None,  # (N,) int64 rows of logits, duplicates allowed; None = all in order
    targets: Tensor,  # (N,)
    temperature: float = 1.0,
    validate: bool = False,
) -> Tensor:
    """`token_logps(logits[rows], targets)` without copying the rows.  (N,)."""
    size = logits.shape[0] if rows is None else rows.numel()
    check_targets(targets, size, logits.shape[-1], logits.device, validate)
    Epilogue(temperature=temperature)  # checks it
    logits = logits if torch.is_grad_enabled() else logits.detach()
    logps = _TokenLogps.apply(logits, rows, targets, temperature)
    check_finite_logps(logps, targets)
    return logps


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor | None, targets: Tensor, temperature: float) -> Tensor:
        dtype = statistics_dtype(logits.dtype)
        logps, lse = (torch.empty(targets.numel(), dtype=dtype, device=logits.device) for _ in range(2))
        for chunk in _row_chunks(targets.numel(), logits.shape[1]):
            z = (logits[chunk] if rows is None else logits[rows[chunk]]).to(dtype) / temperature
            lse[chunk] = z.logsumexp(1)
            logps[chunk] = z.gather(1, targets[chunk, None])[:, 0] - lse[chunk]
        ctx.save_for_backward(logits, rows, targets, lse)
        ctx.temperature = temperature
        return logps

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("token_logps")
        logits, rows, targets, lse = ctx.saved_tensors
        d_logits = torch.zeros_like(logits) if rows is not None else torch.empty_like(logits)
        for chunk in _row_chunks(targets.numel(), logits.shape[1]):
            z = (logits[chunk] if rows is None else logits[rows[chunk]]).to(lse.dtype) / ctx.temperature
            d_z = z.sub_(lse[chunk, None]).exp_().neg_()
            d_z.scatter_add_(1, targets[chunk, None], torch.ones_like(d_z[:, :1]))
            d_z = d_z.mul_(grad_logps[chunk, None] / ctx.temperature).to(logits.dtype)
            if rows is None:
                d_logits[chunk] = d_z
            else:
                d_logits.index_put_((rows[chunk],), d_z, accumulate=True)  # a fixed order, unlike index_add_ on CUDA
        return d_logits, None, None, None


def _row_chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, ROW_CHUNK_BYTES // (4 * vocabulary))
    return [
        slice(part.start + n, min(part.start + n + step, part.stop))
        for part in token_chunks(rows)
        for n in range(0, part.stop - part.start, step)
    ]
