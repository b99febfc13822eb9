"""The launches that `benchmarks.machine_code` compiles: the library's own functions, on tensors without data.

Shapes and dtypes are those of real models and batches (nothing is computed, so size is free): specialisations, block
sizes, warps and stages are then those of a real launch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import aspo_kernels
from aspo_kernels import segments

TOKENS, SENTENCES = 2048, 96


def kernel_modules() -> list[ModuleType]:
    """Every module of the library that holds Triton kernels."""
    names = sorted(path.stem for path in Path(aspo_kernels.__file__).parent.glob("triton_*.py"))
    return [importlib.import_module(f"aspo_kernels.{name}") for name in names]


def _empty(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda").requires_grad_(requires_grad)


def _segments(dtype: torch.dtype) -> None:
    values, offsets = _empty(TOKENS, dtype=dtype, requires_grad=True), _empty(SENTENCES + 1, dtype=torch.int64)
    segments.segment_sum(values, offsets).sum().backward()
    segments.segment_minmax(values, offsets)


CASES: dict[str, Callable[[], None]] = {
    "segments fp32": functools.partial(_segments, torch.float32),
    "segments bf16": functools.partial(_segments, torch.bfloat16),
}
