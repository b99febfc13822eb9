"""The fused way to the exponentials of a tile: one GEMM with the epilogue, the products never leave the registers.

Axes: n tokens of a chunk (N in a kernel), v entries of a slice of the vocabulary, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aspo_kernels.tiles import Chunk, Head
from aspo_kernels.triton_epilogue import logits, max_lead, operand, rescale_row, scalars

# The longest rows, in entries, of operands that this kernel takes: offsets within a block then fit an int32.
MAX_STRIDE = 2**23


@triton.jit
def _fused_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, shift_ptr, entry_ptr, e_ptr, partial_ptr,
    stride_xn, stride_wv, stride_en, N, m, start, width, H, logit_scale, softcap, temperature, lead,
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
    # int64 where a block begins; within one, MAX_STRIDE keeps int32 enough and spares registers.
    in_n, in_v, offs_h = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_H)
    first_n, first_v = (block_n * BLOCK_N).to(tl.int64), (block_v * BLOCK_V).to(tl.int64)
    offs_n, offs_v = block_n * BLOCK_N + in_n, block_v * BLOCK_V + in_v
    mask_n, mask_v = offs_n < N, offs_v < width
    x_ptrs = x_ptr + first_n * stride_xn + (in_n[:, None] * stride_xn + offs_h[None, :])
    w_ptrs = w_ptr + first_v * stride_wv + (in_v[None, :] * stride_wv + offs_h[:, None])
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
    z, derivative = logits(z, bias, logit_scale, softcap, temperature, HAS_SOFTCAP)
    shift = tl.load(shift_ptr + offs_n, mask=mask_n, other=0.0)
    target = tl.load(y_ptr + offs_n, mask=mask_n, other=-1)[:, None] == (offs_v + start)[None, :]
    if AGAIN:
        entry = tl.load(entry_ptr + offs_n, mask=mask_n, other=0.0)
        e = tl.where(target, entry[:, None], tl.exp(z - shift[:, None]) * derivative)
    else:
        z = tl.where(mask_v[None, :], z, float("-inf"))
        highest = tl.max(z, 1)
        shift = tl.where(highest > shift + lead, highest, shift)
        e = tl.where(target, 0.0, tl.exp(z - shift[:, None]))
        tl.store(partial_ptr + block_v * N + offs_n, shift, mask=mask_n)
        tl.store(partial_ptr + (blocks_v + block_v) * N + offs_n, tl.sum(e, 1), mask=mask_n)
        e *= derivative
    if HAS_E:
        e_ptrs = e_ptr + first_n * stride_en + (in_n[:, None] * stride_en + offs_v[None, :])
        tl.store(e_ptrs, operand(e, e_ptr.dtype.element_ty), mask=(offs_n < m)[:, None] & mask_v[None, :])


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
        rescale_row(weighted_ptr + n * stride_wn, rescale, H, 1024)
        rescale_row(e_ptr + n * stride_en - kept, rescale, kept, 1024)
        for block in range(0, blocks_v):
            lower = tl.load(partial_ptr + block * N + n) - shift
            size = tl.minimum(width - block * BLOCK_V, BLOCK_V)
            rescale_row(e_ptr + n * stride_en + block * BLOCK_V, tl.exp(lower), size, BLOCK_V)


class Blocks(NamedTuple):
    """A fused tile's block of tokens, vocabulary and hidden entries, and how it is run."""

    n: int
    v: int
    h: int
    num_warps: int
    num_stages: int


def fused_blocks(dtype: torch.dtype, softcap: bool) -> Blocks:
    """The fused kernel's blocks on the current device.

    The operands of all stages have to fit its shared memory, and the fp32 block its registers, twice with a soft-cap.
    """
    if dtype == torch.float32:
        return Blocks(64, 64, 32, 4, 2)
    arch = _arch()
    if isinstance(arch, str):  # AMD
        return Blocks(128, 128, 64, 8, 2)
    large = arch in (90, 100, 103) and not softcap
    return Blocks(128, 256, 64, 8, 3) if large else Blocks(128, 128, 64, 8, 3)


def fused_tile(
    chunk: Chunk,
    head: Head,
    part: slice,
    e: Tensor,  # (m, v) where E d goes, behind `done` columns of earlier slices that are still wanted
    m: int,
    weighted: Tensor,  # (m, H), read where hidden > 0
    hidden: int,
    done: int,
) -> None:
    """One slice of the vocabulary: E d of the first m tokens, and the chunk's sums."""
    n, width = chunk.y.shape[0], part.stop - part.start
    blocks = fused_blocks(chunk.x.dtype, head.epilogue.softcap is not None)
    count = triton.cdiv(width, blocks.v)
    partial = chunk.sums.new_empty(2, count, n)
    _launch(chunk.x, chunk.y, head, part, chunk.shift, None, e, m, partial, blocks)
    _merge_kernel[(n,)](
        partial, chunk.sums, e, weighted, e.stride(0), weighted.stride(0), n, m, width, count, hidden, done,
        BLOCK_V=blocks.v, BLOCKS=triton.next_power_of_2(count), num_warps=1,
    )  # fmt: skip


def fused_again(x: Tensor, y: Tensor, head: Head, part: slice, shift: Tensor, entry: Tensor, out: Tensor) -> None:
    """As torch_head.exps_again."""
    blocks = fused_blocks(x.dtype, head.epilogue.softcap is not None)
    _launch(x, y, head, part, shift, entry, out, out.shape[0], shift, blocks)


def _launch(
    x: Tensor, y: Tensor, head: Head, part: slice, shift: Tensor, entry: Tensor | None, e: Tensor, m: int,
    partial: Tensor, blocks: Blocks,
) -> None:  # fmt: skip
    n, width, w, bias = y.shape[0], part.stop - part.start, head.weight[part], head.bias_of(part)
    _fused_kernel[(triton.cdiv(n, blocks.n) * triton.cdiv(width, blocks.v),)](
        x, w, bias, y, shift, entry, e, partial, x.stride(0), w.stride(0), e.stride(0), n, m, part.start,
        width, x.shape[1], *scalars(head.epilogue), max_lead(e.dtype), HAS_BIAS=bias is not None,
        HAS_SOFTCAP=head.epilogue.softcap is not None, AGAIN=entry is not None, HAS_E=m > 0,
        BLOCK_N=blocks.n, BLOCK_V=blocks.v, BLOCK_H=blocks.h, GROUP_N=8,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip


def _arch() -> int | str:
    """Compute capability x 10 of the current NVIDIA device, AMD's name of its own, 0 under the interpreter."""
    try:
        return triton.runtime.driver.active.get_current_target().arch
    except RuntimeError:
        return 0
