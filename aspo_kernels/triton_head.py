"""A chunk of tokens through the head, as Triton kernels: what `linear_logps` does to each tile on a GPU.

The same functions as `torch_head`, without a wait for the device anywhere: a row with a logit far above its shift
raises the shift inside the kernel that finds it. Two ways to make the exponentials of a tile:

    tile    a library GEMM writes the tile of fp32 products, which stays in the L2 cache; one pass over it does the rest
    fused   one GEMM with the rest in its epilogue; the products never leave the registers

Axes: n tokens of a chunk, the first m of them with a gradient; v entries of a slice of the vocabulary; H hidden, the
rank of a LoRA on the head included. In a kernel N is n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aspo_kernels.tiles import Chunk, Head, gradient_operand_dtype

CANDIDATE = "tile"  # or "fused": private, until a GPU has said which is faster where

# A logit this far above its row's shift raises the shift: E = exp(z - shift) then stays within exp(30), and within
# exp(9) where E is rounded to fp16, which ends at 65504.
MAX_LEAD = 30.0
MAX_LEAD_FP16 = 9.0


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _logits(z, bias, logit_scale, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """The epilogue: logits of products, and the soft-cap's derivative (1 without a cap)."""
    z = (z + bias) * logit_scale
    derivative = 1.0
    if HAS_SOFTCAP:
        tanh = 1 - 2 / (tl.exp(2 * z / softcap) + 1)  # where exp overflows, tanh is 1, as it should be
        z = softcap * tanh
        derivative = 1 - tanh * tanh
    return z / temperature, derivative


@triton.jit
def _target_entry(total, z_y, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """What stands for the target in E d: -S d_y."""
    entry = -total
    if HAS_SOFTCAP:
        tanh = z_y * temperature / softcap
        entry *= 1 - tanh * tanh
    return entry


@triton.jit
def _rescale_row(ptr, factor, size, BLOCK: tl.constexpr):
    """`size` numbers from ptr on, times factor."""
    for first in range(0, size, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        value = tl.load(ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
        tl.store(ptr + offs, (value * factor).to(ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _start_kernel(
    x_ptr, rows_ptr, bias_ptr, z_ptr, sums_ptr,
    stride_xn, stride_rn, N, H, logit_scale, softcap, temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SUMS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per token: z_y = x W[y] with the epilogue, which is the first shift; the other sums start at 0."""
    n = tl.program_id(0).to(tl.int64)
    products = tl.zeros([BLOCK_H], tl.float32)
    for h in range(0, H, BLOCK_H):
        offs = h + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + n * stride_xn + offs, mask=offs < H, other=0.0).to(tl.float32)
        products += x * tl.load(rows_ptr + n * stride_rn + offs, mask=offs < H, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n).to(tl.float32)
    z, _ = _logits(tl.sum(products), bias, logit_scale, softcap, temperature, HAS_SOFTCAP)
    tl.store(z_ptr + n, z)
    tl.store(sums_ptr + n, z)
    for k in tl.static_range(1, SUMS):
        tl.store(sums_ptr + k * N + n, 0.0)


@triton.jit
def _exps_kernel(
    z_ptr, bias_ptr, y_ptr, sums_ptr, e_ptr, weighted_ptr,
    stride_zn, stride_en, stride_wn, N, m, start, width, H, kept, logit_scale, softcap, temperature, max_lead,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_STATISTICS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per token: its row of a tile of products to E, its sums, and a raised shift where one is due.

    sums: (2 or 4, N) shift, total, moment, largest. E: (m, width), behind `kept` columns of earlier slices that are
    still wanted. weighted: (m, H), H = 0 where there is none.
    """
    n = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < width
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + n * stride_zn + offs_v, mask=mask_v, other=0.0)
    z, derivative = _logits(z, bias, logit_scale, softcap, temperature, HAS_SOFTCAP)
    before = tl.load(sums_ptr + n)
    highest = tl.max(tl.where(mask_v, z, float("-inf")))
    shift = tl.where(highest > before + max_lead, highest, before)
    rescale = tl.exp(before - shift)
    rival = mask_v & (offs_v + start != tl.load(y_ptr + n))
    e = tl.where(rival, tl.exp(z - shift), 0.0)
    total = tl.load(sums_ptr + N + n)
    tl.store(sums_ptr + n, shift)
    tl.store(sums_ptr + N + n, total * rescale + tl.sum(e))
    if HAS_STATISTICS:
        moment = tl.load(sums_ptr + 2 * N + n) + (before - shift) * total
        moment = moment * rescale + tl.sum(tl.where(e > 0, e * (z - shift), 0.0))
        tl.store(sums_ptr + 2 * N + n, moment)
        tl.store(sums_ptr + 3 * N + n, tl.maximum(tl.load(sums_ptr + 3 * N + n) * rescale, tl.max(e)))
    if n < m:
        tl.store(e_ptr + n * stride_en + offs_v, (e * derivative).to(e_ptr.dtype.element_ty), mask=mask_v)
        if shift != before:
            _rescale_row(weighted_ptr + n * stride_wn, rescale, H, 1024)
            _rescale_row(e_ptr + n * stride_en - kept, rescale, kept, 1024)


@triton.jit
def _exps_again_kernel(
    z_ptr, bias_ptr, y_ptr, shift_ptr, entry_ptr, e_ptr,
    stride_zn, stride_en, start, width, logit_scale, softcap, temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per token: its row of a tile of products to E d with the final shift and the target's entry."""
    n = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < width
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + n * stride_zn + offs_v, mask=mask_v, other=0.0)
    z, derivative = _logits(z, bias, logit_scale, softcap, temperature, HAS_SOFTCAP)
    e = tl.exp(z - tl.load(shift_ptr + n)) * derivative
    e = tl.where(offs_v + start == tl.load(y_ptr + n), tl.load(entry_ptr + n), e)
    tl.store(e_ptr + n * stride_en + offs_v, e.to(e_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def _fused_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, shift_ptr, entry_ptr, e_ptr, partial_ptr,
    stride_xn, stride_wv, stride_en, N, m, start, width, H, logit_scale, softcap, temperature, max_lead,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, AGAIN: tl.constexpr, HAS_E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """One program per block of E: the product, then `_exps_kernel` (or with AGAIN `_exps_again_kernel`) on it.

    A row's shift and sum within this block go to partial (2, blocks of v, N) for `_merge_kernel`.
    """
    blocks_n, blocks_v = tl.cdiv(N, BLOCK_N), tl.cdiv(width, BLOCK_V)
    # Blocks of GROUP_N x blocks_v run side by side, so that they share x and W in the L2 cache.
    group = tl.program_id(0) // (GROUP_N * blocks_v)
    rows = tl.minimum(blocks_n - group * GROUP_N, GROUP_N)
    block_n = group * GROUP_N + tl.program_id(0) % (GROUP_N * blocks_v) % rows
    block_v = tl.program_id(0) % (GROUP_N * blocks_v) // rows
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_n, mask_v = offs_n < N, offs_v < width
    offs_h = tl.arange(0, BLOCK_H)
    x_ptrs = x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn + offs_h[None, :]
    w_ptrs = w_ptr + offs_v.to(tl.int64)[None, :] * stride_wv + offs_h[:, None]
    z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for h in range(0, H, BLOCK_H):
        x = tl.load(x_ptrs, mask=mask_n[:, None] & (offs_h[None, :] < H - h), other=0.0)
        w = tl.load(w_ptrs, mask=mask_v[None, :] & (offs_h[:, None] < H - h), other=0.0)
        z = tl.dot(x, w, z, input_precision="ieee")
        x_ptrs += BLOCK_H
        w_ptrs += BLOCK_H
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
    z, derivative = _logits(z, bias, logit_scale, softcap, temperature, HAS_SOFTCAP)
    shift = tl.load(shift_ptr + offs_n, mask=mask_n, other=0.0)
    target = tl.load(y_ptr + offs_n, mask=mask_n, other=-1)[:, None] == (offs_v + start)[None, :]
    if AGAIN:
        entry = tl.load(entry_ptr + offs_n, mask=mask_n, other=0.0)
        e = tl.where(target, entry[:, None], tl.exp(z - shift[:, None]) * derivative)
    else:
        highest = tl.max(tl.where(mask_v[None, :], z, float("-inf")), 1)
        shift = tl.where(highest > shift + max_lead, highest, shift)
        e = tl.where(mask_v[None, :] & (target == 0), tl.exp(z - shift[:, None]), 0.0)
        tl.store(partial_ptr + block_v * N + offs_n, shift, mask=mask_n)
        tl.store(partial_ptr + (blocks_v + block_v) * N + offs_n, tl.sum(e, 1), mask=mask_n)
        e *= derivative
    if HAS_E:
        e_ptrs = e_ptr + offs_n.to(tl.int64)[:, None] * stride_en + offs_v[None, :]
        tl.store(e_ptrs, e.to(e_ptr.dtype.element_ty), mask=(offs_n < m)[:, None] & mask_v[None, :])


@triton.jit
def _merge_kernel(
    partial_ptr, sums_ptr, e_ptr, weighted_ptr,
    stride_en, stride_wn, N, m, width, blocks_v, H, kept, BLOCK_V: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program per token: the sums of a fused tile's blocks, all brought to the largest of their shifts."""
    n = tl.program_id(0).to(tl.int64)
    offs_b = tl.arange(0, BLOCKS)
    mask_b = offs_b < blocks_v
    before = tl.load(sums_ptr + n)
    shifts = tl.load(partial_ptr + offs_b * N + n, mask=mask_b, other=float("-inf"))
    shift = tl.maximum(tl.max(shifts), before)
    sums = tl.load(partial_ptr + (blocks_v + offs_b) * N + n, mask=mask_b, other=0.0)
    rescale = tl.exp(before - shift)
    total = tl.load(sums_ptr + N + n) * rescale + tl.sum(sums * tl.exp(shifts - shift))
    tl.store(sums_ptr + n, shift)
    tl.store(sums_ptr + N + n, total)
    if (n < m) & (shift != before):
        _rescale_row(weighted_ptr + n * stride_wn, rescale, H, 1024)
        _rescale_row(e_ptr + n * stride_en - kept, rescale, kept, 1024)
        for block in range(0, blocks_v):
            lower = tl.load(partial_ptr + block * N + n) - shift
            size = tl.minimum(width - block * BLOCK_V, BLOCK_V)
            _rescale_row(e_ptr + n * stride_en + block * BLOCK_V, tl.exp(lower), size, BLOCK_V)


@triton.jit
def _raise_kernel(
    shift_ptr, sums_ptr, e_ptr, weighted_ptr, stride_en, stride_wn, N, m, H, kept, HAS_STATISTICS: tl.constexpr,
):  # fmt: skip
    """One program per token: another shift after the last slice."""
    n = tl.program_id(0).to(tl.int64)
    before, shift = tl.load(sums_ptr + n), tl.load(shift_ptr + n)
    if shift != before:
        rescale = tl.exp(before - shift)
        total = tl.load(sums_ptr + N + n)
        tl.store(sums_ptr + n, shift)
        tl.store(sums_ptr + N + n, total * rescale)
        if HAS_STATISTICS:
            moment = tl.load(sums_ptr + 2 * N + n) + (before - shift) * total
            tl.store(sums_ptr + 2 * N + n, moment * rescale)
            tl.store(sums_ptr + 3 * N + n, tl.load(sums_ptr + 3 * N + n) * rescale)
        if n < m:
            _rescale_row(weighted_ptr + n * stride_wn, rescale, H, 1024)
            _rescale_row(e_ptr + n * stride_en, rescale, kept, 1024)


@triton.jit
def _target_rows_kernel(
    rows_ptr, z_ptr, total_ptr, weighted_ptr, stride_rn, stride_wn, H, softcap, temperature,
    HAS_SOFTCAP: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per token: weighted += -S d_y W[y]."""
    n = tl.program_id(0).to(tl.int64)
    entry = _target_entry(tl.load(total_ptr + n), tl.load(z_ptr + n), softcap, temperature, HAS_SOFTCAP)
    for h in range(0, H, BLOCK_H):
        offs = h + tl.arange(0, BLOCK_H)
        row = tl.load(rows_ptr + n * stride_rn + offs, mask=offs < H, other=0.0).to(tl.float32)
        weighted = tl.load(weighted_ptr + n * stride_wn + offs, mask=offs < H, other=0.0)
        tl.store(weighted_ptr + n * stride_wn + offs, weighted + entry * row, mask=offs < H)


@triton.jit
def _finish_kernel(
    y_ptr, z_ptr, sums_ptr, out_ptr, weighted_ptr, grad_ptr, exps_ptr,
    stride_wn, stride_gn, stride_en, N, m, H, V, slope, softcap, temperature,
    HAS_SOFTCAP: tl.constexpr, HAS_EXPS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per token: out (4, N) logp, shift, denominator, target entry; G; the target's entry in kept E."""
    n = tl.program_id(0).to(tl.int64)
    shift, total, z = tl.load(sums_ptr + n), tl.load(sums_ptr + N + n), tl.load(z_ptr + n)
    t = z - shift
    denominator = total + tl.exp(t)
    # log1p(S) as log(w) S / (w - 1), w = 1 + S: the rounding of w cancels. (Kahan)
    w = 1 + total
    log1p = tl.where(w == 1, total, tl.log(w) * (total / (w - 1)))
    entry = _target_entry(total, z, softcap, temperature, HAS_SOFTCAP)
    tl.store(out_ptr + n, tl.where(t == 0, -log1p, t - tl.log(denominator)))
    tl.store(out_ptr + N + n, shift)
    tl.store(out_ptr + 2 * N + n, denominator)
    tl.store(out_ptr + 3 * N + n, entry)
    if n < m:
        for h in range(0, H, BLOCK_H):
            offs = h + tl.arange(0, BLOCK_H)
            row = tl.load(weighted_ptr + n * stride_wn + offs, mask=offs < H, other=0.0)
            row = row * (-slope / denominator)
            tl.store(grad_ptr + n * stride_gn + offs, row.to(grad_ptr.dtype.element_ty), mask=offs < H)
        if HAS_EXPS:
            y = tl.load(y_ptr + n)
            if (y >= 0) & (y < V):
                tl.store(exps_ptr + n * stride_en + y, entry.to(exps_ptr.dtype.element_ty))


# -------------------------------------------------------------------------------------------------------- launchers


class Blocks(NamedTuple):
    """A fused tile's block of tokens, vocabulary and hidden entries, and how it is run."""

    n: int
    v: int
    h: int
    num_warps: int
    num_stages: int


def fused_blocks(dtype: torch.dtype) -> Blocks:
    """The fused kernel's blocks on the current device: the operands of all stages have to fit its shared memory."""
    if dtype == torch.float32:
        return Blocks(64, 64, 32, 4, 2)
    arch = _arch()
    if isinstance(arch, str):  # AMD
        return Blocks(128, 128, 64, 8, 2)
    return Blocks(128, 256, 64, 8, 3) if arch in (90, 100, 103) else Blocks(128, 128, 64, 8, 3)


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` fp32 numbers: 16 to 32 of them a thread."""
    return max(1, min(16, block // 512))


def operand_dtype(dtype: torch.dtype, kept: bool) -> torch.dtype:
    """What E is rounded to before it is multiplied: kept ones as in torch_head, others to the head's own dtype."""
    return gradient_operand_dtype(dtype) if kept else dtype


def start(x: Tensor, y: Tensor, head: Head, statistics: bool = False) -> Chunk:
    """As torch_head.start."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = head.rows(y)
    bias = None if head.bias is None else head.entries(head.bias, y)
    chunk = Chunk(x, y, x.new_empty(y.shape[0], dtype=torch.float32), _empty_sums(x, statistics))
    _start_kernel[y.shape](
        x, rows, bias, chunk.z_y, chunk.sums, x.stride(0), rows.stride(0), y.shape[0], x.shape[1],
        *_epilogue(head), HAS_BIAS=bias is not None, HAS_SOFTCAP=head.epilogue.softcap is not None,
        SUMS=chunk.sums.shape[0], BLOCK_H=1024, num_warps=4,
    )  # fmt: skip
    return chunk


def exps_tile(chunk: Chunk, head: Head, part: slice, operand_dtype: torch.dtype | None) -> Tensor | None:
    """As torch_head.exps_tile."""
    n, width = chunk.y.shape[0], part.stop - part.start
    kept = chunk.exps if chunk.exps is not None else chunk.weighted
    m = 0 if operand_dtype is None or kept is None else kept.shape[0]
    if chunk.exps is not None:
        e, done = chunk.exps[:, part], part.start
    else:
        e, done = chunk.x.new_empty(m, width, dtype=operand_dtype or torch.float32), 0
    weighted, hidden = (e, 0) if chunk.weighted is None else (chunk.weighted, chunk.weighted.shape[1])
    lead = MAX_LEAD_FP16 if e.dtype == torch.float16 else MAX_LEAD
    sizes = (e.stride(0), weighted.stride(0), n, m)
    if _fuses(chunk.x, head) and not chunk.has_statistics:
        tile = _launch_fused(chunk.x, chunk.y, head, part, chunk.shift, None, e, m, lead)
        _merge_kernel[(n,)](
            tile.partial, chunk.sums, e, weighted, *sizes, width, tile.blocks, hidden, done,
            BLOCK_V=tile.width, BLOCKS=triton.next_power_of_2(tile.blocks), num_warps=1,
        )  # fmt: skip
    else:
        z = head.products(chunk.x, part)
        block = triton.next_power_of_2(width)
        bias = None if head.bias is None else head.bias[part]
        _exps_kernel[(n,)](
            z, bias, chunk.y, chunk.sums, e, weighted, z.stride(0), *sizes, part.start, width, hidden, done,
            *_epilogue(head), lead, HAS_BIAS=bias is not None, HAS_SOFTCAP=head.epilogue.softcap is not None,
            HAS_STATISTICS=chunk.has_statistics, BLOCK_V=block, num_warps=row_warps(block),
        )  # fmt: skip
    return None if operand_dtype is None else e


def raise_to(chunk: Chunk, head: Head, shift: Tensor) -> None:
    """As torch_head.raise_to."""
    weighted, hidden = (shift, 0) if chunk.weighted is None else (chunk.weighted, chunk.weighted.shape[1])
    exps, kept = (shift, 0) if chunk.exps is None else (chunk.exps, chunk.exps.shape[1])
    m = max(x.shape[0] if size else 0 for x, size in ((weighted, hidden), (exps, kept)))
    _raise_kernel[shift.shape](
        shift, chunk.sums, exps, weighted, exps.stride(0), weighted.stride(0), shift.shape[0], m, hidden, kept,
        HAS_STATISTICS=chunk.has_statistics, num_warps=4,
    )  # fmt: skip


def add_target_rows_(chunk: Chunk, head: Head) -> None:
    """As torch_head.add_target_rows_."""
    if chunk.weighted is None:
        return
    rows = head.rows(chunk.y[: chunk.weighted.shape[0]])
    _, softcap, temperature = _epilogue(head)
    _target_rows_kernel[(rows.shape[0],)](
        rows, chunk.z_y, chunk.total, chunk.weighted, rows.stride(0), chunk.weighted.stride(0), rows.shape[1],
        softcap, temperature, HAS_SOFTCAP=head.epilogue.softcap is not None, BLOCK_H=1024, num_warps=4,
    )  # fmt: skip


def finish(chunk: Chunk, head: Head, row_grad: Tensor | None) -> Tensor:
    """As torch_head.finish."""
    n = chunk.y.shape[0]
    out = chunk.z_y.new_empty(4, n)
    if row_grad is None or chunk.weighted is None:
        weighted, grad, hidden = out, out, 0
    else:
        weighted, grad, hidden = chunk.weighted, row_grad, row_grad.shape[1]
    exps = out if chunk.exps is None else chunk.exps
    m = max(0 if row_grad is None else row_grad.shape[0], 0 if chunk.exps is None else chunk.exps.shape[0])
    _, softcap, temperature = _epilogue(head)
    _finish_kernel[(n,)](
        chunk.y, chunk.z_y, chunk.sums, out, weighted, grad, exps,
        weighted.stride(0), grad.stride(0), exps.stride(0), n, m, hidden, head.size,
        head.epilogue.slope, softcap, temperature, HAS_SOFTCAP=head.epilogue.softcap is not None,
        HAS_EXPS=chunk.exps is not None, BLOCK_H=1024, num_warps=4,
    )  # fmt: skip
    return out


def exps_again(x: Tensor, y: Tensor, head: Head, part: slice, shift: Tensor, target_entry: Tensor, out: Tensor) -> None:
    """As torch_head.exps_again."""
    n, width = out.shape
    if _fuses(x, head):
        _launch_fused(x if x.stride(1) == 1 else x.contiguous(), y, head, part, shift, target_entry, out, n, 0.0)
        return
    z = head.products(x, part)
    block = triton.next_power_of_2(width)
    bias = None if head.bias is None else head.bias[part]
    _exps_again_kernel[(n,)](
        z, bias, y, shift, target_entry, out, z.stride(0), out.stride(0), part.start, width, *_epilogue(head),
        HAS_BIAS=bias is not None, HAS_SOFTCAP=head.epilogue.softcap is not None, BLOCK_V=block,
        num_warps=row_warps(block),
    )  # fmt: skip


class _Partial(NamedTuple):
    """The sums of a fused tile's blocks of `width` vocabulary entries: (2, blocks, n) shifts and totals."""

    partial: Tensor
    blocks: int
    width: int


def _launch_fused(
    x: Tensor, y: Tensor, head: Head, part: slice, shift: Tensor, target_entry: Tensor | None, e: Tensor, m: int,
    lead: float,
) -> _Partial:  # fmt: skip
    n, width = y.shape[0], part.stop - part.start
    blocks = fused_blocks(x.dtype)
    count = triton.cdiv(width, blocks.v)
    partial = x.new_empty(2, count, n, dtype=torch.float32) if target_entry is None else shift
    w = head.weight[part]
    bias = None if head.bias is None else head.bias[part]
    _fused_kernel[(triton.cdiv(n, blocks.n) * count,)](
        x, w, bias, y, shift, target_entry, e, partial, x.stride(0), w.stride(0), e.stride(0), n, m, part.start,
        width, x.shape[1], *_epilogue(head), lead, HAS_BIAS=bias is not None,
        HAS_SOFTCAP=head.epilogue.softcap is not None, AGAIN=target_entry is not None, HAS_E=m > 0,
        BLOCK_N=blocks.n, BLOCK_V=blocks.v, BLOCK_H=blocks.h, GROUP_N=8,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip
    return _Partial(partial, count, blocks.v)


def _fuses(x: Tensor, head: Head) -> bool:
    """Whether the fused kernel takes these operands; the other way takes all."""
    return CANDIDATE == "fused" and head.lora is None and head.weight.stride(1) == 1


def _arch() -> int | str:
    """Compute capability x 10 of the current NVIDIA device, AMD's name of its own, 0 under the interpreter."""
    try:
        return triton.runtime.driver.active.get_current_target().arch
    except RuntimeError:
        return 0


def _empty_sums(x: Tensor, statistics: bool) -> Tensor:
    return x.new_empty(4 if statistics else 2, x.shape[0], dtype=torch.float32)


def _epilogue(head: Head) -> tuple[float, float, float]:
    """logit_scale, softcap (any number where there is none), temperature."""
    e = head.epilogue
    return e.logit_scale, 1.0 if e.softcap is None else e.softcap, e.temperature
