"""Matrix products for one tile of the head, and the epilogue that turns a tile of products into logits.

Axes: n tokens of a chunk, v vocabulary entries of a slice, H hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Working memory: a tile of TOKENS x V' logits in fp32 takes TILE_BYTES, a few such buffers live at once, and they
# should stay in a last-level cache. Measured in docs/performance.md.
TOKENS = 2048
TILE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Epilogue:
    """z = cap(logit_scale * (x W^T + bias)) / temperature, cap(z) = softcap * tanh(z / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        if not 0 < abs(self.logit_scale) < float("inf"):
            raise ValueError(f"logit_scale is {self.logit_scale}; it must be finite and not 0")

    @property
    def slope(self) -> float:
        """dz / d(x W^T) without the soft-cap's factor."""
        return self.logit_scale / self.temperature

    def apply_(self, z: Tensor, bias: Tensor | None) -> Tensor | None:
        """Turn products into logits in place; returns the soft-cap's derivative, or None where there is no cap."""
        if bias is not None:
            z.add_(bias)
        if self.softcap is None:
            if self.slope != 1.0:
                z.mul_(self.slope)
            return None
        z.mul_(self.logit_scale / self.softcap).tanh_()
        derivative = 1 - z * z
        z.mul_(self.softcap / self.temperature)
        return derivative


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums and log-probabilities are fp32, and fp64 for fp64 inputs (which only tests have)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """What exp(z - shift) is kept in: fp16 could not hold it (exp(12) is inf there), bf16 has fp32's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def vocabulary_slices(vocabulary: int, tokens: int) -> list[slice]:
    """Slices of the vocabulary so that an fp32 tile of `tokens` rows takes about TILE_BYTES."""
    width = max(64, TILE_BYTES // (4 * max(tokens, 1)) // 64 * 64)
    return [slice(v, min(v + width, vocabulary)) for v in range(0, vocabulary, width)]


def token_chunks(tokens: int) -> list[slice]:
    """Chunks of at most TOKENS tokens."""
    return [slice(n, min(n + TOKENS, tokens)) for n in range(0, tokens, TOKENS)]


def widen(x: Tensor) -> Tensor:
    """The left operand of `products`: fp32 where the device has no narrow product with an fp32 result (CPUs)."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


def products(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T in statistics_dtype, never rounded to bf16 or fp16 on the way.  x: (n, H) `widen`ed, w: (v, H)."""
    if w.dtype == torch.bfloat16 and w.device.type == "cpu":
        # fp32 copies of bf16 values, multiplied with leave to round the operands to bf16, are the bf16 product with
        # an fp32 result: exact, and on the matrix units where the CPU has them. Only this slice of W is copied.
        with _bf16_operands():
            return torch.mm(x, w.T.float())
    if w.dtype in (torch.bfloat16, torch.float16) and w.device.type == "cuda":
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return matmul(x, w.to(x.dtype).T)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype.  (m, k), (k, n) -> (m, n)."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and _HAS_ONEDNN_LINEAR:
        # oneDNN's fp32 product; torch.mm would take MKL's, 1.1 to 1.4 times slower where MKL is not at home.
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return torch.mm(a, b)


def _has_onednn_linear() -> bool:
    """Whether torch was built with oneDNN and its fp32 linear gives the right product."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], ""), a @ b)
    except (AttributeError, RuntimeError):
        return False


_HAS_ONEDNN_LINEAR = _has_onednn_linear()
_precision_lock = threading.Lock()


@contextmanager
def _bf16_operands() -> Iterator[None]:
    """Let oneDNN's fp32 matmul round its operands to bf16. A process-wide switch: locked, and put back at once."""
    matmul_flags = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _precision_lock:
        before = matmul_flags.fp32_precision
        matmul_flags.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul_flags.fp32_precision = before
