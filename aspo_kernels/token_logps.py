"""Per-token log-probabilities from logits that a trainer already has: one pass, in fp32, with an in-place backward.

Axes: N tokens, M = R T rows of logits, V vocabulary. Two custom ops, forward and backward, each with a Triton kernel
(triton_logits.py) and a plain torch form (torch_logits.py). Derivation: docs/math.md 1 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aspo_kernels import reference, torch_logits
from aspo_kernels.checks import (
    check_backend,
    check_finite_logps,
    check_positive,
    check_targets,
    refuse_double_backward,
)
from aspo_kernels.tiles import op_context, statistics_dtype


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """`(logits / temperature).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]`.

    Args:
        logits: (N, V) fp32, bf16 or fp16, any strides; not written unless `inplace_backward`. A row whose entries are
            not adjacent (a transposed tensor) is read as it lies, which is slower than a copy is.
        targets: (N,) int64 in [0, V). Their logits must be finite; those of others may be -inf.
        inplace_backward: let the backward pass write the gradient over the logits, whose values are lost, also to
            whoever holds a view of them: N V entries less memory. The logits are intact until then; afterwards a second
            backward pass, here or through another operation that kept them, is an error. Without effect under
            torch.compile, which plans memory itself.
        backend: "auto" (Triton on a GPU), "torch", "triton" or "reference".
        validate: check targets' contents on an accelerator too (waits for the device). Without it, a target outside
            [0, V) makes its token's log-probability and its row's gradient NaN there (with backend "torch", torch's own
            device assertion stops the program).

    Returns:
        (N,) fp32, differentiable once in logits; the gradient has logits' dtype.

    Raises:
        ValueError: wrong shapes, dtypes or devices; a backend that cannot run here; `inplace_backward` for logits of
            which several entries share memory; on the CPU also a target outside [0, V) or a result that is not finite.
    """
    return gathered_token_logps(
        logits, None, targets, temperature, validate, inplace_backward=inplace_backward, backend=backend
    )


def gathered_token_logps(
    logits: Tensor,  # (M, V), or (R, T, V) whose row m is logits[m // T, m % T]: a slice of padded logits is not copied
    rows: Tensor | None,  # (N,) int64 in [0, M), duplicates allowed; None = all of (M, V) in order
    targets: Tensor,  # (N,)
    temperature: float = 1.0,
    validate: bool = False,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`token_logps(logits[rows], targets)` without copying the rows; duplicates' gradients are summed in order.  (N,).

    With `inplace_backward` the rows that no token names are overwritten too, with zeros.
    """
    shaped = logits.dim() == 2 or (logits.dim() == 3 and rows is not None)
    if not shaped or not logits.is_floating_point() or logits.shape[-1] == 0:
        raise ValueError(f"logits must be floating point (N, V) with V > 0, got {logits.dtype} {tuple(logits.shape)}")
    check_positive("temperature", temperature)
    backend = check_backend(backend, logits)
    size = logits.shape[:-1].numel() if rows is None else rows.numel()
    check_targets(targets, size, logits.shape[-1], logits.device, validate)
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    if inplace_backward and _shares_memory_with_itself(logits):
        raise ValueError(
            f"inplace_backward cannot overwrite logits of which several entries share memory, shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}: clone() them first, or leave inplace_backward out"
        )
    if backend == "reference":
        z = logits.flatten(0, -2).to(statistics_dtype(logits.dtype)) / temperature
        return reference.token_logps(z if rows is None else z[rows], targets)
    logits = logits if torch.is_grad_enabled() else logits.detach()
    logps = _forward_op(logits, rows, targets, temperature, backend, inplace_backward)[0]
    check_finite_logps(logps, targets)
    return logps


def _shares_memory_with_itself(x: Tensor) -> bool:
    """Whether two entries may have one address: some stride is no larger than what the smaller ones span."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


# --- the ops ---


@torch.library.custom_op("aspo_kernels::token_logps", mutates_args=())
def _forward_op(
    logits: Tensor,  # (M, V) or (R, T, V)
    rows: Tensor | None,
    targets: Tensor,
    temperature: float,
    backend: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    """logps (N,), and for the backward (N, 2): the target's logit and, again, the log-probability.

    Together they are the log-sum-exp, but without the rounding that it has where logits are large.
    """
    dtype = statistics_dtype(logits.dtype)
    logps = torch.empty(targets.numel(), dtype=dtype, device=logits.device)
    statistics = torch.empty(targets.numel(), 2, dtype=dtype, device=logits.device)
    if targets.numel():
        with op_context(logits):
            _forms(backend)[0](_grouped(logits), _dense(rows), targets.contiguous(), temperature, logps, statistics)
    return logps, statistics


@_forward_op.register_fake
def _(
    logits: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    temperature: float,
    backend: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(logits.dtype)
    return logits.new_empty(targets.numel(), dtype=dtype), logits.new_empty(targets.numel(), 2, dtype=dtype)


@torch.library.custom_op("aspo_kernels::token_logps_backward", mutates_args=())
def _backward_op(
    grad_logps: Tensor,
    logits: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    statistics: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    d_logits = torch.empty_like(logits)
    _write_gradient(d_logits, grad_logps, logits, rows, targets, statistics, temperature, backend)
    return d_logits


@_backward_op.register_fake
def _(
    grad_logps: Tensor,
    logits: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    statistics: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, rows, targets, ctx.temperature, ctx.backend, ctx.inplace_backward = inputs
    ctx.overwritten = False
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, rows, targets, output[1])


def _backward(ctx: Any, grad_logps: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("token_logps")
    nothing = (None,) * 5
    if grad_logps is None:
        return None, *nothing
    if ctx.overwritten:
        raise RuntimeError(
            "token_logps with inplace_backward=True wrote its gradient over the logits in the first backward pass; "
            "for a second one through the same graph use inplace_backward=False"
        )
    logits, rows, targets, statistics = ctx.saved_tensors
    if not ctx.inplace_backward:
        return _backward_op(grad_logps, logits, rows, targets, statistics, ctx.temperature, ctx.backend), *nothing
    ctx.overwritten = True
    d_logits = logits.detach()
    _write_gradient(d_logits, grad_logps, logits, rows, targets, statistics, ctx.temperature, ctx.backend)
    torch.autograd.graph.increment_version(logits)  # others that kept the logits get autograd's error, not our gradient
    return d_logits, *nothing


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _write_gradient(
    d_logits: Tensor,  # like logits, and may be the same memory
    grad_logps: Tensor,
    logits: Tensor,
    rows: Tensor | None,
    targets: Tensor,
    statistics: Tensor,
    temperature: float,
    backend: str,
) -> None:
    if not targets.numel():
        d_logits.zero_()
    elif d_logits.numel():
        tokens = None if rows is None else torch_logits.RowTokens.of(rows, logits.shape[:-1].numel())
        with op_context(logits):
            _forms(backend)[1](
                _grouped(d_logits), grad_logps.contiguous(), _grouped(logits.detach()), tokens, targets.contiguous(),
                statistics, temperature,
            )  # fmt: skip


def _forms(backend: str) -> tuple[Any, Any]:
    """The forward and backward of a backend; their arguments are those of triton_logits.forward and .backward."""
    if backend == "torch":
        return torch_logits.forward, torch_logits.backward
    from aspo_kernels import triton_logits

    return triton_logits.forward, triton_logits.backward


def _grouped(logits: Tensor) -> Tensor:
    return logits.unsqueeze(0) if logits.dim() == 2 else logits


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
