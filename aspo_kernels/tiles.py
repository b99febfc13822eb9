"""One tile of the head: its matrix products, the epilogue that makes logits of them, and what a chunk of tokens
carries from tile to tile.

Axes: n tokens of a chunk, of which the first m get a gradient, v vocabulary entries of a slice, V vocabulary, H hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NARROW = (torch.bfloat16, torch.float16)


class TileSize(NamedTuple):
    """tokens: of a chunk. bytes: of a tile of fp32 logits. width: most vocabulary entries of a tile. gradient_tokens:
    most tokens whose E of one slice exists at a time when the gradient of the head is recomputed."""

    tokens: int
    bytes: int
    width: int
    gradient_tokens: int


# On a CPU a few buffers of a tile's size live at once and should stay in the last-level cache.
CPU_TILE = TileSize(2048, 8 * 2**20, 2**31, 2048)
# On a GPU, by the least hidden size: the product E W is n x H, which with a short H needs many tokens to give every
# multiprocessor a block. Predicted by benchmarks.model, not measured yet: docs/performance.md.
GPU_TILES = ((4096, TileSize(1024, 16 * 2**20, 8192, 8192)), (0, TileSize(8192, 64 * 2**20, 8192, 8192)))


def tile_size(hidden: Tensor) -> TileSize:
    """How the head is cut for hidden states (N, H) like these."""
    return CPU_TILE if hidden.device.type == "cpu" else gpu_tile(hidden.shape[1])


def gpu_tile(hidden_size: int) -> TileSize:
    """The row of GPU_TILES for hidden states of this size."""
    return next(size for least, size in GPU_TILES if hidden_size >= least)


def token_chunks(tokens: int, step: int = CPU_TILE.tokens) -> list[slice]:
    """Chunks of at most `step` tokens."""
    return [slice(n, min(n + step, tokens)) for n in range(0, tokens, step)]


def vocabulary_slices(vocabulary: int, tokens: int, size: TileSize = CPU_TILE) -> list[slice]:
    """Slices of the vocabulary so that an fp32 tile of `tokens` rows takes about size.bytes."""
    width = min(max(64, size.bytes // (4 * max(tokens, 1)) // 64 * 64), size.width)
    return [slice(v, min(v + width, vocabulary)) for v in range(0, vocabulary, width)]


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
    def options(self) -> dict[str, Any]:
        """The keywords that it was made from."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap, "temperature": self.temperature}

    def derivative(self, z: Tensor) -> Tensor | None:
        """The soft-cap's factor in dz / d(x W^T) at the logits z, or None where there is no cap."""
        return None if self.softcap is None else 1 - (z * (self.temperature / self.softcap)) ** 2

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


@dataclass(frozen=True)
class Head:
    """An output head, or one rank's part of it.

    With LoRA on the head, `lora` is LoRA's B (V, r) and the hidden states have r more columns, scaling * x A^T:
    z = [x, scaling x A^T] [W, B]^T, as two products, so that W is never copied.
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora: Tensor | None  # (V, r)
    epilogue: Epilogue
    sharded: bool = False  # whether this is one rank's part, which does not hold every target's row

    @property
    def size(self) -> int:
        """V."""
        return self.weight.shape[0]

    def products(self, x: Tensor, part: slice) -> Tensor:
        """x [W, B]^T of one slice of the vocabulary, before bias and epilogue.  (n, H + r) `widen`ed -> (n, v)."""
        if self.lora is None:
            return products(x, self.weight[part])
        width = self.weight.shape[1]
        return products(x[:, :width], self.weight[part]).add_(products(x[:, width:], self.lora[part]))

    def bias_of(self, part: slice) -> Tensor | None:
        """One slice of the bias, its numbers adjacent, as the kernels read it; None where there is no bias.  (v,)."""
        return None if self.bias is None else self.bias[part].contiguous()

    def logits_(self, z: Tensor, part: slice) -> Tensor | None:
        """Products of one slice to logits, in place; returns the soft-cap's derivative or None.  (n, v)."""
        bias = self.bias_of(part)
        return self.epilogue.apply_(z, None if bias is None else bias.to(z.dtype))

    def pull_back_(self, total: Tensor, operand: Tensor, part: slice) -> None:
        """total += operand [W, B] of one slice of the vocabulary.  (m, H + r), (m, v)."""
        width = self.weight.shape[1]
        add_product_(total[:, :width], operand, self.weight[part])
        if self.lora is not None:
            add_product_(total[:, width:], operand, self.lora[part])

    def rows(self, y: Tensor) -> Tensor:
        """[W, B][y], zeros where y lies in no row of this part of the head.  (n,) -> (n, H + r)."""
        rows = self.entries(self.weight, y)
        return rows if self.lora is None else torch.cat([rows, self.entries(self.lora, y)], 1)

    def entries(self, table: Tensor, y: Tensor) -> Tensor:
        """table[y], zeros where y lies in no row of this part of the head.  (V, ...), (n,) -> (n, ...)."""
        if not self.sharded:
            return table[y]
        here = ((y >= 0) & (y < self.size)).view(-1, *[1] * (table.dim() - 1))
        return torch.where(here, table[y.clamp(0, self.size - 1)], 0)


@dataclass
class Chunk:
    """Some tokens on their way through the vocabulary, and what they carry from slice to slice.

    E_v = exp(z_v - shift) for v != y. A raised shift rescales everything that was made with the old one.
    """

    x: Tensor  # (n, H)
    y: Tensor  # (n,) targets as rows of this part of the head; outside [0, V) on ranks that do not hold them
    z_y: Tensor  # (n,) the target's logit
    sums: Tensor  # (2, n) shift and total
    weighted: Tensor | None = None  # (m, H) scale sum_v E_v d_v W[v], d the soft-cap's derivative
    exps: Tensor | None = None  # (m, V) E d, kept for the backward
    scale: float = 1.0  # a power of two, for an E d that is rounded to fp16 (math.md 7)

    @property
    def shift(self) -> Tensor:
        """(n,)."""
        return self.sums[0]

    @property
    def total(self) -> Tensor:
        """(n,) S = sum_v E_v."""
        return self.sums[1]


@contextmanager
def op_context(tensor: Tensor) -> Iterator[None]:
    """For an operator's body: launches go to the tensor's device, and autocast, which is on in there too, is off."""
    with torch.accelerator.device_index(tensor.device.index), torch.autocast(tensor.device.type, enabled=False):
        yield


def cast_for_autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where it is on, differentiably; else as they are."""
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums and log-probabilities are fp32, and fp64 for fp64 inputs (which only tests have)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """What exp(z - shift) is kept in: fp16 could not hold it (exp(12) is inf there), bf16 has fp32's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def has_fp32_results(device: torch.device) -> bool:
    """Whether torch multiplies narrow operands there into an fp32 result: on NVIDIA's GPUs (ROCm's is untested)."""
    return device.type == "cuda" and torch.version.hip is None


def widen(x: Tensor) -> Tensor:
    """The left operand of `products`: fp32 where the device has no narrow product with an fp32 result."""
    return x.float() if x.dtype in _NARROW and not has_fp32_results(x.device) else x


def products(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T in statistics_dtype, never rounded to bf16 or fp16 on the way.  x: (n, H) `widen`ed, w: (v, H)."""
    if w.dtype == torch.bfloat16 and w.device.type == "cpu":
        # fp32 copies of bf16 values, multiplied with leave to round the operands to bf16, are the bf16 product with
        # an fp32 result: exact, and on the matrix units where the CPU has them. Only this slice of W is copied.
        with _bf16_operands():
            return torch.mm(x, w.T.float())
    if x.dtype in _NARROW:
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return matmul(x, w.to(x.dtype).T)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is fp32 and a and b may be narrow.  (m, n), (m, k), (k, n)."""
    if a.dtype == b.dtype and a.dtype in _NARROW and has_fp32_results(a.device):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return
    if a.dtype == torch.float16:  # its sums of E W would overflow
        a = a.float()
    if a.dtype == total.dtype and a.device.type != "cpu":
        total.addmm_(a, b.to(a.dtype))
    else:
        total += matmul(a, b.to(a.dtype))


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
