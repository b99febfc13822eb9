"""Sums, minima and maxima over the segments of a packed vector, in a fixed order on every device.

Each is one custom operator: a Triton kernel where `check_backend` says so, `torch.segment_reduce` elsewhere; no host
sync, any length. Entries behind the last offset (the tail of a padded layout) belong to no segment: they are never
read, and what is spread over the entries is 0 there.
Axes: N entries, S segments; offsets are (S+1,) int64, `offsets[0] = 0`, `offsets[S] <= N`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aspo_kernels.checks import check_backend
from aspo_kernels.tiles import op_context


def segment_sum(values: Tensor, offsets: Tensor, backend: str = "auto") -> Tensor:
    """out[s] = sum(values[offsets[s]:offsets[s+1]]), summed in fp64; 0 for an empty segment.  (N,), (S+1,) -> (S,).

    Differentiable. fp64 costs nothing at these sizes, and in fp32 a 100,000-token response would lose its second
    decimal.
    """
    return _segment_sum(values, offsets, check_backend(backend, values) == "triton")


def segment_min(values: Tensor, offsets: Tensor, backend: str = "auto") -> Tensor:
    """out[s] = min(values[offsets[s]:offsets[s+1]]), inf for an empty segment; no gradient.  (N,), (S+1,) -> (S,)."""
    return _segment_extremum(values.detach(), offsets, False, check_backend(backend, values) == "triton")


def segment_max(values: Tensor, offsets: Tensor, backend: str = "auto") -> Tensor:
    """out[s] = max(values[offsets[s]:offsets[s+1]]), -inf for an empty segment; no gradient.  (N,), (S+1,) -> (S,)."""
    return _segment_extremum(values.detach(), offsets, True, check_backend(backend, values) == "triton")


def spread_over(per_segment: Tensor, offsets: Tensor, total: int, backend: str = "auto") -> Tensor:
    """Repeat each segment's value over its entries, 0 behind the last.  (S,), (S+1,) -> (total,), differentiable."""
    return _spread_over(per_segment, offsets, total, check_backend(backend, per_segment) == "triton")


def segment_minmax(values: Tensor, offsets: Tensor, min_range: float = 1e-5, backend: str = "auto") -> Tensor:
    """(v - min) / (max - min) within each segment; 0 for all of a segment whose range is <= min_range.

    The minimum and the maximum are constants to autograd.
    """
    low = spread_over(segment_min(values, offsets, backend), offsets, values.numel(), backend)
    high = spread_over(segment_max(values, offsets, backend), offsets, values.numel(), backend)
    spread = high - low
    return torch.where(spread > min_range, (values - low) / spread.clamp_min(min_range), 0.0)


# --- the operators; sum and spread are each other's gradient ---


@torch.library.custom_op("aspo_kernels::segment_sum", mutates_args=())
def _segment_sum(values: Tensor, offsets: Tensor, use_triton: bool) -> Tensor:
    if use_triton:
        from aspo_kernels.triton_segments import segment_reduce

        with op_context(values):
            return segment_reduce(values, offsets, "sum")
    # 0 by hand where there is nothing to reduce: segment_reduce refuses an empty input.
    if not values.numel():
        return values.new_zeros(offsets.numel() - 1)
    return torch.segment_reduce(values.double(), "sum", offsets=offsets).to(values.dtype)


@_segment_sum.register_fake
def _(values: Tensor, offsets: Tensor, use_triton: bool) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1)


@torch.library.custom_op("aspo_kernels::segment_extremum", mutates_args=())
def _segment_extremum(values: Tensor, offsets: Tensor, largest: bool, use_triton: bool) -> Tensor:
    if use_triton:
        from aspo_kernels.triton_segments import segment_reduce

        with op_context(values):
            return segment_reduce(values, offsets, "max" if largest else "min")
    if not values.numel():
        return values.new_full((offsets.numel() - 1,), float("-inf" if largest else "inf"))
    return torch.segment_reduce(values, "max" if largest else "min", offsets=offsets)


@_segment_extremum.register_fake
def _(values: Tensor, offsets: Tensor, largest: bool, use_triton: bool) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1)


@torch.library.custom_op("aspo_kernels::spread_over", mutates_args=())
def _spread_over(per_segment: Tensor, offsets: Tensor, total: int, use_triton: bool) -> Tensor:
    if use_triton:
        from aspo_kernels.triton_segments import spread_over as launch

        with op_context(per_segment):
            return launch(per_segment, offsets, total)
    values = torch.cat([per_segment, per_segment.new_zeros(1)])  # one segment more: the tail
    repeats = torch.cat([offsets.diff(), total - offsets[-1:]])
    return torch.repeat_interleave(values, repeats, output_size=total)  # output_size spares a device sync


@_spread_over.register_fake
def _(per_segment: Tensor, offsets: Tensor, total: int, use_triton: bool) -> Tensor:
    return per_segment.new_empty(total)


def _save_offsets(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, offsets, *_, ctx.use_triton = inputs
    ctx.total = values.shape[0]
    ctx.save_for_backward(offsets)


def _spread_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _spread_over(gradient, ctx.saved_tensors[0], ctx.total, ctx.use_triton), None, None


def _sum_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return _segment_sum(gradient, ctx.saved_tensors[0], ctx.use_triton), None, None, None


_segment_sum.register_autograd(_spread_gradient, setup_context=_save_offsets)
_spread_over.register_autograd(_sum_gradient, setup_context=_save_offsets)
