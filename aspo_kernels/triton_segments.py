"""Triton kernels of aspo_kernels.segments: one program a segment, a loop over its entries, fp64 inside.

Axes: N entries, S segments; s is a segment, n runs over a block of its entries.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def launch_options() -> dict[str, int]:
    """Block size and warps of every kernel here: 4 fp64 numbers a thread (with 8, registers run out). No shape counts:
    a loop over one block is as quick as a smaller block, and 100,000 tokens are a hundred blocks.
    """
    return {"BLOCK": 1024, "num_warps": 8}


@triton.jit
def segment_reduce_kernel(values_ptr, offsets_ptr, out_ptr, REDUCE: tl.constexpr, BLOCK: tl.constexpr):
    """out[s] = sum, min or max of values[offsets[s]:offsets[s+1]].  Grid (S,)."""
    s = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + s)
    last = tl.load(offsets_ptr + s + 1)
    start: tl.constexpr = 0.0 if REDUCE == "sum" else (float("inf") if REDUCE == "min" else float("-inf"))
    total = tl.full((BLOCK,), start, tl.float64)
    nans = tl.zeros((BLOCK,), tl.int32)
    for begin in range(first, last, BLOCK):
        offs_n = begin + tl.arange(0, BLOCK)
        x = tl.load(values_ptr + offs_n, mask=offs_n < last, other=start).to(tl.float64)
        if REDUCE == "sum":
            total += x
        elif REDUCE == "min":
            total = tl.minimum(total, x)
        else:
            total = tl.maximum(total, x)
        nans += (x != x).to(tl.int32)
    if REDUCE == "sum":
        result = tl.sum(total)
    else:
        result = tl.min(total) if REDUCE == "min" else tl.max(total)
        result = tl.where(tl.sum(nans) > 0, float("nan"), result)  # the hardware's minimum forgets a NaN
    tl.store(out_ptr + s, result.to(out_ptr.dtype.element_ty))


@triton.jit
def spread_over_kernel(values_ptr, offsets_ptr, out_ptr, num_entries, BLOCK: tl.constexpr):
    """out[n] = values[segment of n], 0 behind the last segment.  Grid (S+1,): the last program writes the zeros."""
    s = tl.program_id(0).to(tl.int64)
    num_segments = tl.num_programs(0) - 1
    first = tl.load(offsets_ptr + s)
    last = tl.load(offsets_ptr + s + 1, mask=s < num_segments, other=num_entries)
    value = tl.load(values_ptr + s, mask=s < num_segments, other=0.0)
    for begin in range(first, last, BLOCK):
        offs_n = begin + tl.arange(0, BLOCK)
        tl.store(out_ptr + offs_n, tl.zeros((BLOCK,), value.dtype) + value, mask=offs_n < last)


def segment_reduce(
    values: Tensor,  # (N,)
    offsets: Tensor,  # (S+1,)
    reduce: str,  # "sum", "min" or "max"
) -> Tensor:
    """(S,) in the values' dtype; see aspo_kernels.segments."""
    out = values.new_empty(offsets.numel() - 1)
    if out.numel():
        segment_reduce_kernel[(out.numel(),)](
            values.contiguous(), offsets.contiguous(), out, REDUCE=reduce, **launch_options()
        )
    return out


def spread_over(
    per_segment: Tensor,  # (S,)
    offsets: Tensor,  # (S+1,)
    total: int,
) -> Tensor:
    """(total,) in the values' dtype; see aspo_kernels.segments."""
    out = per_segment.new_empty(total)
    spread_over_kernel[(offsets.numel(),)](
        per_segment.contiguous(), offsets.contiguous(), out, total, **launch_options()
    )
    return out
