"""What the head's Triton kernels share: the epilogue, a raised shift, and the entry that stands for the target."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aspo_kernels.tiles import Epilogue

# A logit this far above its row's shift raises the shift: E = exp(z - shift) then stays within exp(30). Where E is
# rounded to fp16, which ends at 65504 and loses digits below 2^-14, it is multiplied by 2^14 before: exp(1.3) 2^14 =
# 60117. The lead is not 0: the target's own logit differs by rounding from product to product.
MAX_LEAD = 30.0
MAX_LEAD_FP16 = 1.3
FP16_SCALE = tl.constexpr(2.0**14)


def max_lead(dtype: torch.dtype) -> float:
    """How far above its row's shift a logit may lie before the shift is raised, for E in `dtype`."""
    return MAX_LEAD_FP16 if dtype == torch.float16 else MAX_LEAD


def operand_scale(dtype: torch.dtype) -> float:
    """What `operand` multiplies E by."""
    return float(FP16_SCALE.value) if dtype == torch.float16 else 1.0


def scalars(epilogue: Epilogue) -> tuple[float, float, float]:
    """logit_scale, softcap (any number where there is none), temperature, as the kernels take them."""
    return epilogue.logit_scale, 1.0 if epilogue.softcap is None else epilogue.softcap, epilogue.temperature


@triton.jit
def logits(z, bias, logit_scale, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """The epilogue: logits of products, and the soft-cap's derivative (1 without a cap)."""
    z = (z + bias) * logit_scale
    derivative = 1.0
    if HAS_SOFTCAP:
        u = z * (1 / softcap)
        tanh = 1 - 2 / (tl.exp(2 * u) + 1)  # where exp overflows, tanh is 1, as it should be
        s = u * u  # near 0 that difference has the rounding of 1, where Cephes's polynomial keeps u's digits
        series = 2.06390887954e-2 - 5.70498872745e-3 * s
        series = ((series * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s - 3.33332819422e-1
        tanh = tl.where(s < 0.390625, u + u * s * series, tanh)
        z = softcap * tanh
        derivative = 1 - tanh * tanh
    return z * (1 / temperature), derivative


@triton.jit
def row_logits(
    z_ptr, bias_ptr, offs_v, mask_v, logit_scale, softcap, temperature,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The epilogue on a row of a tile of products, in memory as fp32."""
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + offs_v, mask=mask_v, other=0.0)
    return logits(z, bias, logit_scale, softcap, temperature, HAS_SOFTCAP)


@triton.jit
def operand(e, dtype: tl.constexpr):
    """E as it is stored for a product: in fp16 times FP16_SCALE, a power of two, which the fp32 result is freed of."""
    if dtype == tl.float16:
        e *= FP16_SCALE
    return e.to(dtype)


@triton.jit
def target_entry(total, z_y, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """What stands for the target in E d: -S d_y."""
    entry = -total
    if HAS_SOFTCAP:
        tanh = z_y * (temperature / softcap)
        entry *= 1 - tanh * tanh
    return entry


@triton.jit
def rescale_row(ptr, factor, size, BLOCK: tl.constexpr):
    """`size` numbers from ptr on, times factor."""
    for first in range(0, size, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        value = tl.load(ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
        tl.store(ptr + offs, (value * factor).to(ptr.dtype.element_ty), mask=offs < size)
