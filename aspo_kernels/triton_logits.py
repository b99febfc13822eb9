"""The Triton kernels of `token_logps`: one read of the logits forward, one read and one write backward.

Axes: N tokens, M = R T rows of logits, V vocabulary. Row m is logits[m // T, m % T]; (M, V) logits have R = 1.
Forward, one program per token: the sum of exp(u - shift) over the rivals, u = (z - z_y) / temperature (docs/math.md 1).
Every lane keeps a shift of its own, max(0, its largest u): one exp per entry, no exchange between lanes before the end,
no sum above V. Backward, one program per row: the gradients of all its tokens in a fixed order, no atomics.
A target outside [0, V), which only the CPU looks for unasked, makes its token and its row's gradient NaN; nothing else
is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from aspo_kernels.torch_logits import RowTokens

MAX_BLOCK_V = 4096
ENTRIES_PER_LANE = 16  # two 16-byte loads of bf16


def launch_options(vocabulary: int) -> dict[str, int]:
    """BLOCK_V and num_warps of both kernels for rows of this length."""
    block_v = min(MAX_BLOCK_V, max(16, triton.next_power_of_2(vocabulary)))
    return {"BLOCK_V": block_v, "num_warps": min(8, max(1, block_v // (32 * ENTRIES_PER_LANE)))}


def forward(
    logits: Tensor,  # (R, T, V), any strides
    rows: Tensor | None,  # (N,)
    targets: Tensor,  # (N,)
    temperature: float,
    logps: Tensor,  # (N,) fp32, written
    statistics: Tensor,  # (N, 2) fp32, written: the target's logit, the log-probability
) -> None:
    """log_softmax(logits[rows] / temperature) at the targets."""
    _forward_kernel[(targets.numel(),)](
        logps, statistics, logits, targets if rows is None else rows, targets, logits.shape[2], logits.shape[1],
        *logits.stride(), 1 / temperature, HAS_ROWS=rows is not None, **launch_options(logits.shape[2]),
    )  # fmt: skip


def backward(
    d_logits: Tensor,  # (R, T, V), any strides; may be `logits`
    grad_logps: Tensor,  # (N,) contiguous
    logits: Tensor,  # (R, T, V)
    tokens: RowTokens | None,  # None = token m is the only one of row m
    targets: Tensor,  # (N,)
    statistics: Tensor,  # (N, 2)
    temperature: float,
) -> None:
    """d_logits[m] = sum over tokens n of row m of grad_logps[n] / temperature * (1[v = targets[n]] - p[m, v])."""
    order, bounds = (targets, targets) if tokens is None else (tokens.order, tokens.bounds)
    _backward_kernel[(logits.shape[0] * logits.shape[1],)](
        d_logits, grad_logps, logits, order, bounds, targets, statistics, logits.shape[2], logits.shape[1],
        *d_logits.stride(), *logits.stride(), 1 / temperature,
        HAS_ROWS=tokens is not None, **launch_options(logits.shape[2]),
    )  # fmt: skip


@triton.jit
def _log1p(x):
    w = 1.0 + x
    lost = w == 1.0
    return tl.where(lost, x, tl.log(w) * (x / tl.where(lost, 1.0, w - 1.0)))  # x / (w - 1) undoes w's rounding


@triton.jit
def _expm1(x):  # x <= 0
    w = tl.exp(x)
    near = (x > -1.0) & (w < 1.0)
    return tl.where(near, (w - 1.0) * (x / tl.log(tl.where(near, w, 0.5))), tl.where(x > -1.0, x, w - 1.0))


@triton.jit
def _token(order_ptr, k, HAS_ROWS: tl.constexpr):
    n = k
    if HAS_ROWS:
        n = tl.load(order_ptr + k)
    return n


@triton.jit
def _forward_kernel(
    logps_ptr,
    statistics_ptr,
    z_ptr,
    rows_ptr,
    targets_ptr,
    V,
    T,
    stride_zr,
    stride_zt,
    stride_zv,
    inv_temperature,
    HAS_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = n
    if HAS_ROWS:
        row = tl.load(rows_ptr + n)
    z_ptr += (row // T) * stride_zr + (row % T) * stride_zt
    target = tl.load(targets_ptr + n)
    exists = (target >= 0) & (target < V)
    z_target = tl.load(z_ptr + target * stride_zv, mask=exists, other=float("nan")).to(tl.float32)
    shift = tl.zeros([BLOCK_V], tl.float32) + (z_target - z_target)  # NaN where the target's logit is not finite
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_ptr + offs_v.to(tl.int64) * stride_zv, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        u = tl.where(offs_v == target, float("-inf"), (z - z_target) * inv_temperature)
        e = tl.exp(-tl.abs(u - shift))  # of the smaller of the two, relative to the larger
        total = tl.where(u > shift, total * e + 1.0, total + e)
        shift = tl.maximum(u, shift)
    top = tl.max(shift, 0)
    rivals = tl.sum(total * tl.exp(shift - top), 0)
    # top > 0: a rival has u = top, so that rivals >= 1 and both terms are positive; nothing cancels.
    logp = -tl.where(top > 0.0, top + tl.log(rivals + tl.exp(-top)), _log1p(rivals))
    tl.store(logps_ptr + n, logp)
    tl.store(statistics_ptr + 2 * n, z_target)
    tl.store(statistics_ptr + 2 * n + 1, logp)  # once more: the caller may overwrite logps


@triton.jit
def _backward_kernel(
    d_ptr,
    grad_ptr,
    z_ptr,
    order_ptr,
    bounds_ptr,
    targets_ptr,
    statistics_ptr,
    V,
    T,
    stride_dr,
    stride_dt,
    stride_dv,
    stride_zr,
    stride_zt,
    stride_zv,
    inv_temperature,
    HAS_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d_ptr += (row // T) * stride_dr + (row % T) * stride_dt
    z_ptr += (row // T) * stride_zr + (row % T) * stride_zt
    first = row
    last = row + 1
    if HAS_ROWS:
        first = tl.load(bounds_ptr + row)
        last = tl.load(bounds_ptr + row + 1)
    if first == last:
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            zeros = tl.zeros([BLOCK_V], d_ptr.dtype.element_ty)
            tl.store(d_ptr + offs_v.to(tl.int64) * stride_dv, zeros, mask=offs_v < V)
    else:
        g_row = 0.0
        for k in range(first, last):
            n = _token(order_ptr, k, HAS_ROWS)
            g_row += tl.load(grad_ptr + n) * inv_temperature
            if HAS_ROWS:  # the NaN of any of its tokens makes the row NaN
                logp = tl.load(statistics_ptr + 2 * n + 1)
                g_row += logp - logp
        n = _token(order_ptr, first, HAS_ROWS)  # any token of the row serves as its reference
        z_target = tl.load(statistics_ptr + 2 * n)  # not from the logits: they may be overwritten below
        logp = tl.load(statistics_ptr + 2 * n + 1)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            z = tl.load(z_ptr + offs_v.to(tl.int64) * stride_zv, mask=offs_v < V, other=float("-inf")).to(tl.float32)
            d = -g_row * tl.exp((z - z_target) * inv_temperature + logp)
            tl.store(d_ptr + offs_v.to(tl.int64) * stride_dv, d.to(d_ptr.dtype.element_ty), mask=offs_v < V)
        tl.debug_barrier()  # the targets' places again, now from what keeps 1 - p's digits
        for k in range(first, last):
            n = _token(order_ptr, k, HAS_ROWS)
            target = tl.load(targets_ptr + n)
            logp = tl.load(statistics_ptr + 2 * n + 1)
            d_target = 0.0
            if HAS_ROWS:
                d_target += g_row - g_row
            for j in range(first, last):
                other = _token(order_ptr, j, HAS_ROWS)
                hit = tl.load(targets_ptr + other) == target
                d_target += tl.load(grad_ptr + other) * inv_temperature * tl.where(hit, -_expm1(logp), -tl.exp(logp))
            exists = (target >= 0) & (target < V)  # else there is no such place in this row
            tl.store(d_ptr + target * stride_dv, d_target, mask=exists)  # which rounds to the gradient's dtype
