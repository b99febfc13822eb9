"""Sums, minima and maxima over the segments of a packed vector, in a fixed order on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """out[s] = sum(values[offsets[s]:offsets[s+1]]), summed in fp64.  (N,), (S+1,) -> (S,), differentiable.

    fp64 costs nothing at these sizes, and in fp32 a 100,000-token response would lose its second decimal.
    """
    return torch.segment_reduce(values.double(), "sum", offsets=offsets).to(values.dtype)


def segment_min(values: Tensor, offsets: Tensor) -> Tensor:
    """out[s] = min(values[offsets[s]:offsets[s+1]]); segments must not be empty.  (N,), (S+1,) -> (S,)."""
    return torch.segment_reduce(values, "min", offsets=offsets)


def segment_max(values: Tensor, offsets: Tensor) -> Tensor:
    """out[s] = max(values[offsets[s]:offsets[s+1]]); segments must not be empty.  (N,), (S+1,) -> (S,)."""
    return torch.segment_reduce(values, "max", offsets=offsets)


def spread_over(per_segment: Tensor, offsets: Tensor, total: int) -> Tensor:
    """Repeat each segment's value over its entries.  (S,), (S+1,) -> (total,); `total` spares a device sync."""
    return torch.repeat_interleave(per_segment, offsets.diff(), output_size=total)


def segment_minmax(values: Tensor, offsets: Tensor, min_range: float = 1e-5) -> Tensor:
    """(v - min) / (max - min) within each segment; 0 for all of a segment whose range is <= min_range."""
    low = spread_over(segment_min(values, offsets), offsets, values.numel())
    high = spread_over(segment_max(values, offsets), offsets, values.numel())
    spread = high - low
    return torch.where(spread > min_range, (values - low) / spread.clamp_min(min_range), 0.0)
