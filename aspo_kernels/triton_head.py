"""A chunk of tokens through the head, as Triton kernels: what `linear_logps` does to each tile on a GPU.

The same functions as `torch_head`, without a wait for the device anywhere: a row with a logit far above its shift
raises the shift inside the kernel that finds it. Two ways to make the exponentials of a tile:

    tile    a library GEMM writes the tile of fp32 products, which stays in the L2 cache; one pass over it does the rest
    fused   one GEMM with the rest in its epilogue; the products never leave the registers

Axes: n tokens of a chunk, the first m of them with a gradient; v entries of a slice of the vocabulary; H hidden, the
rank of a LoRA on the head included. In a kernel N is n.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aspo_kernels.tiles import Chunk, Head, gradient_operand_dtype, widen
from aspo_kernels.triton_epilogue import (
    logits,
    max_lead,
    operand,
    operand_scale,
    rescale_row,
    row_logits,
    scalars,
    target_entry,
)
from aspo_kernels.triton_fused import MAX_STRIDE, fused_again, fused_tile

CANDIDATE = "tile"  # or "fused": private, until a GPU has said which is faster where

# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _start_kernel(
    x_ptr, rows_ptr, bias_ptr, y_ptr, z_ptr, sums_ptr,
    stride_xn, stride_rn, N, H, V, logit_scale, softcap, temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SHARDED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per token: z_y = x W[y] with the epilogue, which is the first shift; the sum starts at 0.

    A whole head has every target's row: for a target outside [0, V), z_y is NaN.
    """
    n = tl.program_id(0).to(tl.int64)
    products = tl.zeros([BLOCK_H], tl.float32)
    for h in range(0, H, BLOCK_H):
        offs = h + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + n * stride_xn + offs, mask=offs < H, other=0.0).to(tl.float32)
        products += x * tl.load(rows_ptr + n * stride_rn + offs, mask=offs < H, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n).to(tl.float32)
    z, _ = logits(tl.sum(products), bias, logit_scale, softcap, temperature, HAS_SOFTCAP)
    if not SHARDED:
        y = tl.load(y_ptr + n)
        z = tl.where((y >= 0) & (y < V), z, float("nan"))
    tl.store(z_ptr + n, z)
    tl.store(sums_ptr + n, z)
    tl.store(sums_ptr + N + n, 0.0)


@triton.jit
def _exps_kernel(
    z_ptr, bias_ptr, y_ptr, sums_ptr, e_ptr, weighted_ptr,
    stride_zn, stride_en, stride_wn, N, m, start, width, H, kept, logit_scale, softcap, temperature, lead,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program per token: its row of a tile of products to E, its sums, and a raised shift where one is due.

    sums: (2, N) shift and total. E: (m, width), behind `kept` columns of earlier slices that are
    still wanted. weighted: (m, H), H = 0 where there is none.
    """
    n = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < width
    z, derivative = row_logits(
        z_ptr + n * stride_zn, bias_ptr, offs_v, mask_v, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    before = tl.load(sums_ptr + n)
    highest = tl.max(tl.where(mask_v, z, float("-inf")))
    shift = tl.where(highest > before + lead, highest, before)
    rescale = tl.exp(before - shift)
    rival = mask_v & (offs_v + start != tl.load(y_ptr + n))
    e = tl.where(rival, tl.exp(z - shift), 0.0)
    total = tl.load(sums_ptr + N + n)
    tl.store(sums_ptr + n, shift)
    tl.store(sums_ptr + N + n, total * rescale + tl.sum(e))
    if n < m:
        tl.store(e_ptr + n * stride_en + offs_v, operand(e * derivative, e_ptr.dtype.element_ty), mask=mask_v)
        if shift != before:
            rescale_row(weighted_ptr + n * stride_wn, rescale, H, 1024)
            rescale_row(e_ptr + n * stride_en - kept, rescale, kept, 1024)


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
    z, derivative = row_logits(
        z_ptr + n * stride_zn, bias_ptr, offs_v, mask_v, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    e = tl.exp(z - tl.load(shift_ptr + n)) * derivative
    e = tl.where(offs_v + start == tl.load(y_ptr + n), tl.load(entry_ptr + n), e)
    tl.store(e_ptr + n * stride_en + offs_v, e.to(e_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def _raise_kernel(
    shift_ptr, sums_ptr, e_ptr, weighted_ptr, stride_en, stride_wn, N, m, H, kept
):  # fmt: skip
    """One program per token: another shift after the last slice."""
    n = tl.program_id(0).to(tl.int64)
    before, shift, total = tl.load(sums_ptr + n), tl.load(shift_ptr + n), tl.load(sums_ptr + N + n)
    tl.debug_barrier()  # all warps have read what one of them overwrites, or a late one would find nothing to rescale
    if shift != before:
        rescale = tl.exp(before - shift)
        tl.store(sums_ptr + n, shift)
        tl.store(sums_ptr + N + n, total * rescale)
        if n < m:
            rescale_row(weighted_ptr + n * stride_wn, rescale, H, 1024)
            rescale_row(e_ptr + n * stride_en, rescale, kept, 1024)


@triton.jit
def _target_rows_kernel(
    rows_ptr, z_ptr, total_ptr, weighted_ptr, stride_rn, stride_wn, H, scale, softcap, temperature,
    HAS_SOFTCAP: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per token: weighted += -scale S d_y W[y]."""
    n = tl.program_id(0).to(tl.int64)
    entry = scale * target_entry(tl.load(total_ptr + n), tl.load(z_ptr + n), softcap, temperature, HAS_SOFTCAP)
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
    entry = target_entry(total, z, softcap, temperature, HAS_SOFTCAP)
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


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` fp32 numbers, 32 of them a thread: with 16 the compiler spills."""
    return max(1, min(8, block // 1024))


def operand_dtype(dtype: torch.dtype, kept: bool) -> torch.dtype:
    """What E is rounded to before it is multiplied: kept ones as in torch_head, others to the head's own dtype."""
    return gradient_operand_dtype(dtype) if kept else dtype


def start(x: Tensor, y: Tensor, head: Head) -> Chunk:
    """As torch_head.start."""
    x = _operand(x, head)
    rows = head.rows(y)
    bias = None if head.bias is None else head.entries(head.bias, y)
    sums = x.new_empty(2, y.shape[0], dtype=torch.float32)
    chunk = Chunk(x, y, torch.empty_like(sums[0]), sums)
    _start_kernel[y.shape](
        x, rows, bias, y, chunk.z_y, chunk.sums, x.stride(0), rows.stride(0), y.shape[0], x.shape[1], head.size,
        *scalars(head.epilogue), HAS_BIAS=bias is not None, HAS_SOFTCAP=head.epilogue.softcap is not None,
        SHARDED=head.sharded, BLOCK_H=1024, num_warps=4,
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
    chunk.scale = operand_scale(e.dtype)
    weighted, hidden = (e, 0) if chunk.weighted is None else (chunk.weighted, chunk.weighted.shape[1])
    if _fuses(head):
        fused_tile(chunk, head, part, e, m, weighted, hidden, done)
    else:
        z = head.products(chunk.x, part)
        block = triton.next_power_of_2(width)
        bias = head.bias_of(part)
        _exps_kernel[(n,)](
            z, bias, chunk.y, chunk.sums, e, weighted, z.stride(0), e.stride(0), weighted.stride(0), n, m,
            part.start, width, hidden, done, *scalars(head.epilogue), max_lead(e.dtype), HAS_BIAS=bias is not None,
            HAS_SOFTCAP=head.epilogue.softcap is not None, BLOCK_V=block,
            num_warps=row_warps(block),
        )  # fmt: skip
    return None if operand_dtype is None else e


def raise_to(chunk: Chunk, head: Head, shift: Tensor) -> None:
    """As torch_head.raise_to."""
    weighted, hidden = (shift, 0) if chunk.weighted is None else (chunk.weighted, chunk.weighted.shape[1])
    exps, kept = (shift, 0) if chunk.exps is None else (chunk.exps, chunk.exps.shape[1])
    m = max(x.shape[0] if size else 0 for x, size in ((weighted, hidden), (exps, kept)))
    _raise_kernel[shift.shape](
        shift, chunk.sums, exps, weighted, exps.stride(0), weighted.stride(0), shift.shape[0], m, hidden, kept,
        num_warps=4,
    )  # fmt: skip


def add_target_rows_(chunk: Chunk, head: Head) -> None:
    """As torch_head.add_target_rows_."""
    if chunk.weighted is None:
        return
    rows = head.rows(chunk.y[: chunk.weighted.shape[0]])
    _, softcap, temperature = scalars(head.epilogue)
    _target_rows_kernel[(rows.shape[0],)](
        rows, chunk.z_y, chunk.total, chunk.weighted, rows.stride(0), chunk.weighted.stride(0), rows.shape[1],
        chunk.scale, softcap, temperature, HAS_SOFTCAP=head.epilogue.softcap is not None, BLOCK_H=1024, num_warps=4,
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
    _, softcap, temperature = scalars(head.epilogue)
    _finish_kernel[(n,)](
        chunk.y, chunk.z_y, chunk.sums, out, weighted, grad, exps,
        weighted.stride(0), grad.stride(0), exps.stride(0), n, m, hidden, head.size,
        head.epilogue.slope / chunk.scale, softcap, temperature, HAS_SOFTCAP=head.epilogue.softcap is not None,
        HAS_EXPS=chunk.exps is not None, BLOCK_H=1024, num_warps=4,
    )  # fmt: skip
    return out


def exps_again(x: Tensor, y: Tensor, head: Head, part: slice, shift: Tensor, target_entry: Tensor, out: Tensor) -> None:
    """As torch_head.exps_again."""
    n, width = out.shape
    x = _operand(x, head)
    if _fuses(head):
        fused_again(x, y, head, part, shift, target_entry, out)
        return
    z = head.products(x, part)
    block = triton.next_power_of_2(width)
    bias = head.bias_of(part)
    _exps_again_kernel[(n,)](
        z, bias, y, shift, target_entry, out, z.stride(0), out.stride(0), part.start, width, *scalars(head.epilogue),
        HAS_BIAS=bias is not None, HAS_SOFTCAP=head.epilogue.softcap is not None, BLOCK_V=block,
        num_warps=row_warps(block),
    )  # fmt: skip


def _operand(x: Tensor, head: Head) -> Tensor:
    """Hidden states as the products want them, each row contiguous."""
    x = x if _fuses(head) else widen(x)
    return x if x.stride(1) == 1 and x.stride(0) <= MAX_STRIDE else x.contiguous()


def _fuses(head: Head) -> bool:
    """Whether the fused kernel takes this head; the other way takes all."""
    rows_fit = head.weight.stride(1) == 1 and max(head.weight.stride(0), head.size) <= MAX_STRIDE
    return CANDIDATE == "fused" and head.lora is None and rows_fit
