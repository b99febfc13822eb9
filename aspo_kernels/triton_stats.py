"""The functions of `torch_stats` as Triton kernels: one program per token, over its row of a tile of fp32 products.

The products come from a library GEMM and stay in the L2 cache. No wait for the device anywhere, no atomics. Axes: n
tokens, v entries of a slice of the vocabulary, H hidden; in a kernel N is n, and `width` is v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aspo_kernels.tiles import Chunk, Head
from aspo_kernels.triton_epilogue import operand, operand_scale, row_logits, scalars
from aspo_kernels.triton_head import row_warps


@triton.jit
def _add_stats_kernel(
    z_ptr, bias_ptr, y_ptr, sums_ptr, extra_ptr, stride_zn, N, start, width, logit_scale, softcap, temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """sums (2, N) shift, total; extra (3, N) moment, largest rival, target."""
    n = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < width
    z, _ = row_logits(
        z_ptr + n * stride_zn, bias_ptr, offs_v, mask_v, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    y = tl.load(y_ptr + n) - start
    rival = mask_v & (offs_v != y)
    highest = tl.max(tl.where(rival, z, float("-inf")))
    before, total = tl.load(sums_ptr + n), tl.load(sums_ptr + N + n)
    shift = tl.maximum(before, highest)
    rescale = tl.exp(before - shift)
    e = tl.where(rival, tl.exp(z - shift), 0.0)
    moment = (tl.load(extra_ptr + n) + (before - shift) * total) * rescale
    tl.store(sums_ptr + n, shift)
    tl.store(sums_ptr + N + n, total * rescale + tl.sum(e))
    tl.store(extra_ptr + n, moment + tl.sum(tl.where(e > 0, e * (z - shift), 0.0)))
    tl.store(extra_ptr + N + n, tl.maximum(tl.load(extra_ptr + N + n), highest))
    if (y >= 0) & (y < width):
        tl.store(extra_ptr + 2 * N + n, tl.sum(tl.where(offs_v == y, z, 0.0)))


@triton.jit
def _stats_grad_kernel(
    z_ptr, bias_ptr, y_ptr, rows_ptr, out_ptr,
    stride_zn, stride_rows, stride_on, start, width, logit_scale, softcap, temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """rows (5, N): shift, log total, a, b, entry.  out (N, width): (a p - b p log p) d, and entry d at the target."""
    n = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < width
    z, derivative = row_logits(
        z_ptr + n * stride_zn, bias_ptr, offs_v, mask_v, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    rows_ptr += n
    log_p = z - tl.load(rows_ptr) - tl.load(rows_ptr + stride_rows)
    p = tl.exp(log_p)
    a, b = tl.load(rows_ptr + 2 * stride_rows), tl.load(rows_ptr + 3 * stride_rows)
    dz = a * p - b * tl.where(p > 0, p * log_p, 0.0)
    dz = tl.where(offs_v == tl.load(y_ptr + n) - start, tl.load(rows_ptr + 4 * stride_rows), dz) * derivative
    tl.store(out_ptr + n * stride_on + offs_v, dz.to(out_ptr.dtype.element_ty), mask=mask_v)


@triton.jit
def _add_pair_kernel(
    z_ptr, ref_z_ptr, bias_ptr, ref_bias_ptr, y_ptr, sums_ptr, extra_ptr, e_ptr, weighted_ptr,
    stride_zn, stride_rn, stride_en, stride_wn, N, start, width, H, logit_scale, softcap, temperature,
    HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_E: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """sums (2, 2 N): shifts of policy and reference, totals.  extra (2, N).  e (2 N, width), weighted (2 N, H)."""
    n = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < width
    z, derivative = row_logits(
        z_ptr + n * stride_zn, bias_ptr, offs_v, mask_v, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    ref_z, _ = row_logits(
        ref_z_ptr + n * stride_rn, ref_bias_ptr, offs_v, mask_v, logit_scale, softcap, temperature,
        HAS_REF_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    rival = mask_v & (offs_v != tl.load(y_ptr + n) - start)
    before, ref_before = tl.load(sums_ptr + n), tl.load(sums_ptr + N + n)
    shift = tl.maximum(before, tl.max(tl.where(rival, z, float("-inf"))))
    ref_shift = tl.maximum(ref_before, tl.max(tl.where(rival, ref_z, float("-inf"))))
    lower, ref_lower = before - shift, ref_before - ref_shift
    rescale, ref_rescale = tl.exp(lower), tl.exp(ref_lower)
    u, ref_u = z - shift, ref_z - ref_shift
    e, ref_e = tl.where(rival, tl.exp(u), 0.0), tl.where(rival, tl.exp(ref_u), 0.0)
    total, ref_total = tl.load(sums_ptr + 2 * N + n), tl.load(sums_ptr + 3 * N + n)
    moment = (tl.load(extra_ptr + n) + (ref_lower - lower) * ref_total) * ref_rescale
    difference = tl.load(extra_ptr + N + n) * ref_rescale + (ref_rescale - rescale) * total
    tl.store(extra_ptr + n, moment + tl.sum(tl.where(ref_e > 0, ref_e * (ref_u - u), 0.0)))
    tl.store(extra_ptr + N + n, difference + tl.sum(ref_e - e))
    tl.store(sums_ptr + n, shift)
    tl.store(sums_ptr + N + n, ref_shift)
    tl.store(sums_ptr + 2 * N + n, total * rescale + tl.sum(e))
    tl.store(sums_ptr + 3 * N + n, ref_total * ref_rescale + tl.sum(ref_e))
    if HAS_E:
        e_type = e_ptr.dtype.element_ty
        tl.store(e_ptr + n * stride_en + offs_v, operand(e * derivative, e_type), mask=mask_v)
        tl.store(e_ptr + (N + n) * stride_en + offs_v, operand((ref_e - e) * derivative, e_type), mask=mask_v)
        if (lower != 0) | (ref_lower != 0):
            for h in range(0, H, BLOCK_H):
                offs_h = h + tl.arange(0, BLOCK_H)
                ptrs = weighted_ptr + n * stride_wn + offs_h
                ref_ptrs = weighted_ptr + (N + n) * stride_wn + offs_h
                weighted = tl.load(ptrs, mask=offs_h < H, other=0.0)
                ref_weighted = tl.load(ref_ptrs, mask=offs_h < H, other=0.0) * ref_rescale
                tl.store(ref_ptrs, ref_weighted + weighted * (ref_rescale - rescale), mask=offs_h < H)
                tl.store(ptrs, weighted * rescale, mask=offs_h < H)


@triton.jit
def _pair_grad_kernel(
    z_ptr, ref_z_ptr, bias_ptr, ref_bias_ptr, y_ptr, rows_ptr, out_ptr,
    stride_zn, stride_rn, stride_rows, stride_on, start, width, logit_scale, softcap, temperature,
    HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """rows (7, N): shift and log total of policy and reference, a, b, entry.  out (N, width): `write_pair_grad`."""
    n = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < width
    z, derivative = row_logits(
        z_ptr + n * stride_zn, bias_ptr, offs_v, mask_v, logit_scale, softcap, temperature, HAS_BIAS, HAS_SOFTCAP
    )
    ref_z, _ = row_logits(
        ref_z_ptr + n * stride_rn, ref_bias_ptr, offs_v, mask_v, logit_scale, softcap, temperature,
        HAS_REF_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    rows_ptr += n
    p = tl.exp(z - tl.load(rows_ptr) - tl.load(rows_ptr + stride_rows))
    ref_p = tl.exp(ref_z - tl.load(rows_ptr + 2 * stride_rows) - tl.load(rows_ptr + 3 * stride_rows))
    dz = tl.load(rows_ptr + 4 * stride_rows) * (p - ref_p) - tl.load(rows_ptr + 5 * stride_rows) * p
    dz = tl.where(offs_v == tl.load(y_ptr + n) - start, tl.load(rows_ptr + 6 * stride_rows), dz) * derivative
    tl.store(out_ptr + n * stride_on + offs_v, dz.to(out_ptr.dtype.element_ty), mask=mask_v)


# -------------------------------------------------------------------------------------------------------- launchers


def add_stats_(chunk: Chunk, extra: Tensor, z: Tensor, head: Head, part: slice) -> None:
    """As torch_stats.add_stats_."""
    n, width = z.shape
    block, bias = triton.next_power_of_2(width), head.bias_of(part)
    _add_stats_kernel[(n,)](
        z, bias, chunk.y, chunk.sums, extra, z.stride(0), n, part.start, width, *scalars(head.epilogue),
        HAS_BIAS=bias is not None, HAS_SOFTCAP=head.epilogue.softcap is not None, BLOCK_V=block,
        num_warps=row_warps(block),
    )  # fmt: skip


def write_stats_grad(z: Tensor, y: Tensor, head: Head, part: slice, rows: Tensor, out: Tensor) -> None:
    """As torch_stats.write_stats_grad."""
    n, width = z.shape
    block, bias = triton.next_power_of_2(width), head.bias_of(part)
    _stats_grad_kernel[(n,)](
        z, bias, y, rows, out, z.stride(0), rows.stride(0), out.stride(0), part.start, width,
        *scalars(head.epilogue), HAS_BIAS=bias is not None, HAS_SOFTCAP=head.epilogue.softcap is not None,
        BLOCK_V=block, num_warps=row_warps(block),
    )  # fmt: skip


def add_pair_(
    chunk: Chunk, extra: Tensor, z: Tensor, ref_z: Tensor, head: Head, ref_head: Head, part: slice,
    operand_dtype: torch.dtype | None,
) -> Tensor | None:  # fmt: skip
    """As torch_stats.add_pair_."""
    n, width = z.shape
    block, bias, ref_bias = triton.next_power_of_2(width), head.bias_of(part), ref_head.bias_of(part)
    has_e = operand_dtype is not None and chunk.weighted is not None
    e = z.new_empty(2 * n, width, dtype=operand_dtype) if has_e else z
    chunk.scale = operand_scale(e.dtype)
    weighted = chunk.weighted if chunk.weighted is not None and has_e else z
    _add_pair_kernel[(n,)](
        z, ref_z, bias, ref_bias, chunk.y, chunk.sums, extra, e, weighted, z.stride(0), ref_z.stride(0),
        e.stride(0), weighted.stride(0), n, part.start, width, weighted.shape[1], *scalars(head.epilogue),
        HAS_BIAS=bias is not None, HAS_REF_BIAS=ref_bias is not None, HAS_SOFTCAP=head.epilogue.softcap is not None,
        HAS_E=has_e, BLOCK_V=block, BLOCK_H=1024, num_warps=row_warps(block),
    )  # fmt: skip
    return e if has_e else None


def write_pair_grad(
    z: Tensor, ref_z: Tensor, y: Tensor, head: Head, ref_head: Head, part: slice, rows: Tensor, out: Tensor
) -> None:
    """As torch_stats.write_pair_grad."""
    n, width = z.shape
    block, bias, ref_bias = triton.next_power_of_2(width), head.bias_of(part), ref_head.bias_of(part)
    _pair_grad_kernel[(n,)](
        z, ref_z, bias, ref_bias, y, rows, out, z.stride(0), ref_z.stride(0), rows.stride(0), out.stride(0),
        part.start, width, *scalars(head.epilogue), HAS_BIAS=bias is not None, HAS_REF_BIAS=ref_bias is not None,
        HAS_SOFTCAP=head.epilogue.softcap is not None, BLOCK_V=block, num_warps=row_warps(block),
    )  # fmt: skip
