"""Checks at the public boundary. Each error names the value and what to do about it.

On an accelerator only what needs no device sync is looked at: shapes, dtypes, devices, options.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton", "reference")
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked up, not imported: that takes a second
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_backend(backend: str, tensor: Tensor) -> str:
    """The backend for tensors like this one: "torch", "triton" or "reference"; "auto" is triton where it can run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend not in ("auto", "triton"):
        return backend
    obstacle = _no_triton(tensor.device.type, tensor.dtype)
    if backend == "triton":
        if obstacle is not None:
            raise ValueError(f"backend='triton' cannot run here: {obstacle}; use backend='auto' or 'torch'")
        return "triton"
    # The interpreter is for tests: never chosen unasked.
    return "torch" if obstacle is not None or tensor.device.type == "cpu" else "triton"


def _no_triton(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take such tensors, or None where they can."""
    if dtype == torch.float64:
        return "its kernels have no float64"
    if not _HAS_TRITON:
        return "the package triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU (set TRITON_INTERPRET=1 before the program starts to interpret its kernels)"
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"it has no {device_type} device"
    return None


def check_head(hidden: Tensor, head: Tensor, bias: Tensor | None, name: str = "hidden") -> None:
    """hidden (N, H), head (V, H), bias (V,) or None: shapes, dtypes and devices."""
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or head.shape[0] == 0:
        raise ValueError(
            f"{name} must be (N, H) and its head (V, H) with V > 0, got {tuple(hidden.shape)} and {tuple(head.shape)}"
        )
    if hidden.dtype not in _FLOATS:
        raise ValueError(f"{name} is {hidden.dtype}; use float32, bfloat16 or float16")
    if bias is not None and bias.shape != (head.shape[0],):
        raise ValueError(f"bias must be ({head.shape[0]},) for this head, got {tuple(bias.shape)}")
    for other_name, other in (("head", head), ("bias", bias)):
        if other is None:
            continue
        if other.dtype != hidden.dtype:
            raise ValueError(f"{name} is {hidden.dtype} but its {other_name} {other.dtype}: cast one, or use autocast")
        if other.device != hidden.device:
            raise ValueError(f"{name} is on {hidden.device} but its {other_name} on {other.device}")


def check_lora(hidden: Tensor, head: Tensor, a: Tensor | None, b: Tensor | None, scaling: float) -> None:
    """A (r, H), B (V, r) and scaling of a LoRA on the head, or None: shapes, dtypes, devices."""
    if a is None or b is None:
        return
    shapes = (a.shape, b.shape)
    if a.dim() != 2 or b.dim() != 2 or shapes != ((b.shape[1], head.shape[1]), (head.shape[0], a.shape[0])):
        raise ValueError(
            f"lora must be (A (r, {head.shape[1]}), B ({head.shape[0]}, r), scaling) for this head, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not abs(scaling) < float("inf"):
        raise ValueError(f"lora's scaling is {scaling}; it must be finite")
    for name, tensor in (("A", a), ("B", b)):
        if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
            raise ValueError(
                f"lora's {name} is {tensor.dtype} on {tensor.device} but hidden {hidden.dtype} on {hidden.device}: "
                "cast it, or use autocast"
            )


def check_targets(targets: Tensor, size: int, vocabulary: int, device: torch.device, validate: bool = False) -> None:
    """targets (size,) int64 on `device`; that they lie in [0, vocabulary) on the CPU or with `validate`."""
    if targets.shape != (size,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be ({size},) int64, got {tuple(targets.shape)} {targets.dtype}")
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device} but the hidden states or logits on {device}")
    if size and (validate or device.type == "cpu") and not torch.compiler.is_compiling():
        for at in (int(targets.argmin()), int(targets.argmax())):
            if not 0 <= int(targets[at]) < vocabulary:
                raise ValueError(
                    f"targets[{at}] is {int(targets[at])}, outside the vocabulary [0, {vocabulary}); leave uncounted "
                    "positions (-100) out of the targets; with a part of a head give its VocabularyShard"
                )


def check_positive(name: str, value: float) -> None:
    """An option that must be positive and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; it must be positive and finite")


def check_finite(name: str, value: float) -> None:
    """An option that must be finite."""
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{name} is {value}; it must be finite")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """An option that must be one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}")


def check_finite_logps(logps: Tensor, targets: Tensor) -> None:
    """On the CPU, where looking is free: every log-probability is finite."""
    if torch.compiler.is_compiling() or logps.device.type != "cpu" or not logps.numel():
        return
    bad = torch.nonzero(~torch.isfinite(logps.detach())).flatten()
    if bad.numel():
        at = int(bad[0])
        value = float(logps.detach()[at])
        raise ValueError(
            f"the log-probability of token {at} (target {int(targets[at])}) is {value}: its hidden state, the "
            f"head or the bias holds NaN or inf, or the target is masked ({bad.numel()} such tokens)"
        )


def refuse_double_backward(name: str) -> None:
    """To be called in a backward pass, where gradients are only on if the pass itself is to be differentiated.

    `once_differentiable` would let it through as a constant where the upstream gradient is one: silently wrong.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} is differentiable once, and create_graph=True asks for more: leave it out, or use plain torch "
            "(log_softmax, or backend='reference')"
        )
