"""Log-probabilities, entropy, log-sum-exp and top-1 hits straight from hidden states, differentiable, without logits.

With c the shift of the exponentials, E_v = exp(z_v - c), t = z_y - c, S = sum_{v != y} E_v, Z = S + e^t and
M = sum_{v != y} E_v (z_v - c), which all come from one pass over the head,

    logp = t - log Z        lse = c + log Z        H = log Z - (M + e^t t) / Z

c starts as the target's logit and follows the largest logit that the row has shown: E <= 1 and M has terms of one sign,
so that H and logp keep their digits as p_y -> 1 (t = 0, log Z = log1p(S)), and an error of one rounding of 1 where
another token takes the mass. A shift raised from c to c' turns M into exp(c - c') (M + (c - c') S).

    d logp / d z = 1[y] - p        d lse / d z = p        d H / d z = -p (log p + H)

so that with upstream gradients g the gradient of the logits is dz = p (g_lse - g_logp - g_H (log p + H)) + 1[y] g_logp.

Passes over the head (2 N H V FLOP): 1u forward; backward 2u with a frozen head (z again, dX), 3u with a trainable one
(dW too). Only the operands and four numbers a token are kept in between. The gradients are made of two sums over the
vocabulary, of E W and of E (z - c) W: to form both in the forward would be 3u as well, but in every call, also where no
gradient reaches the outputs, and would keep two N x H arrays. For log-probabilities alone `linear_logps` is the cheaper
call. Axes: as in `tiles`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from aspo_kernels import reference
from aspo_kernels.checks import (
    check_backend,
    check_finite_logps,
    check_head,
    check_targets,
    refuse_double_backward,
)
from aspo_kernels.head import head_ops
from aspo_kernels.recompute import gradient_outputs, log_total, pull_back, stats_ops
from aspo_kernels.tiles import (
    Epilogue,
    Head,
    cast_for_autocast,
    op_context,
    statistics_dtype,
    tile_size,
    token_chunks,
    vocabulary_slices,
    widen,
)
from aspo_kernels.vocabulary import gather_if_frozen

OUTPUTS = ("entropy", "lse", "top1")


class LinearStats(NamedTuple):
    """One number a token, (N,) each; None where not asked for."""

    logps: Tensor  # fp32, log p of the target
    entropy: Tensor | None  # fp32, nats
    lse: Tensor | None  # fp32, log sum_v exp(z_v)
    top1: Tensor | None  # bool, whether no logit is above the target's


def linear_stats(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    outputs: tuple[str, ...] = OUTPUTS,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    validate: bool = False,
) -> LinearStats:
    """`z = hidden @ head.T; p = z.softmax(-1); entropy = -(p * p.log()).sum(-1), lse = z.logsumexp(-1), ...`

    Args:
        hidden: (N, H) fp32, bf16 or fp16 (fp64 stays fp64), one row per counted token. N = 0 is fine.
        head: (V, H), hidden's dtype and device. Under autocast both are cast to autocast's dtype.
        targets: (N,) int64 in [0, V).
        outputs: which of "entropy", "lse", "top1" to return beside the log-probabilities.
        bias, logit_scale, softcap, temperature: z = cap(logit_scale * (x W^T + bias)) / temperature with
            cap(z) = softcap * tanh(z / softcap); bias is (V,), and -inf for a token that is masked.
        backend: "auto" | "torch" | "triton" | "reference" (full logits, for comparison).
        validate: check targets' contents on an accelerator too (waits for the device). Without it a negative
            target such as -100 gives NaN there, in its token's numbers and in every gradient that they reach; one of
            V or more stops at torch's device assertion.

    Returns:
        LinearStats. logps, entropy and lse are differentiable once in hidden, head and bias; top1 is true where the
        target's logit is the largest, ties included.

    Raises:
        ValueError: wrong shapes, dtypes, devices or options; on the CPU also a target outside [0, V) or a
            log-probability that is not finite.
    """
    unknown = [name for name in outputs if name not in OUTPUTS]
    if isinstance(outputs, str) or unknown:
        raise ValueError(f"outputs is {outputs!r}; give a tuple of {', '.join(OUTPUTS)}")
    hidden, head, bias = cast_for_autocast(hidden.device.type, hidden, head, bias)  # type: ignore[assignment]
    head, bias = gather_if_frozen("head", head), gather_if_frozen("bias", bias)
    check_head(hidden, head, bias)
    check_targets(targets, hidden.shape[0], head.shape[0], hidden.device, validate)
    epilogue = Epilogue(logit_scale, softcap, temperature)
    backend = check_backend(backend, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "reference":
            dtype = statistics_dtype(hidden.dtype)
            wide_bias = bias if bias is None else bias.to(dtype)
            wide = (hidden.to(dtype), head.to(dtype), targets, wide_bias)
            logps, *rest = reference.linear_stats(*wide, **epilogue.options)
        else:
            logps, *rest, _ = _linear_stats(
                hidden, head, bias, targets, epilogue.logit_scale, epilogue.softcap, epilogue.temperature, backend
            )
    check_finite_logps(logps, targets)
    return LinearStats(logps, *(t if name in outputs else None for name, t in zip(OUTPUTS, rest, strict=True)))


@torch.library.custom_op("aspo_kernels::linear_stats", mutates_args=())
def _linear_stats(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy, lse, top1 (N,), and for the backward (4, N): shift, log Z, and logps and entropy again."""
    head = Head(weight, bias, None, Epilogue(logit_scale, softcap, temperature))
    logps, entropy, lse, top1, rows = outputs = _outputs(hidden)
    y = targets.contiguous()
    size, ops, add_stats_ = tile_size(hidden), head_ops(backend), stats_ops(backend).add_stats_
    with op_context(hidden):
        for part in token_chunks(hidden.shape[0], size.tokens):
            x = widen(hidden[part])
            chunk = ops.start(x, y[part], head)
            extra = chunk.z_y.new_zeros(3, x.shape[0])
            moment, largest, target = extra
            largest.fill_(float("-inf"))
            for columns in vocabulary_slices(head.size, x.shape[0], size):
                add_stats_(chunk, extra, head.products(x, columns), head, columns)
            logps[part], shift, denominator, _ = ops.finish(chunk, head, None)
            t, log_z = chunk.z_y - shift, log_total(logps[part], chunk.z_y, shift, denominator)
            entropy[part] = log_z - (moment + t.exp() * t) / denominator
            lse[part] = shift + log_z
            top1[part] = largest <= target
            rows[:, part] = torch.stack([shift, log_z, logps[part], entropy[part]])
    return outputs


def _outputs(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, tokens = statistics_dtype(hidden.dtype), hidden.shape[0]
    logps, entropy, lse = (hidden.new_empty(tokens, dtype=dtype) for _ in range(3))
    top1 = hidden.new_empty(tokens, dtype=torch.bool)
    return logps, entropy, lse, top1, hidden.new_empty(4, tokens, dtype=dtype)


@_linear_stats.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float | None,
    temperature: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(hidden)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *ctx.options = inputs
    *_, top1, rows = output
    ctx.mark_non_differentiable(top1, rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, rows)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_stats")
    g = upstream[:3]  # of logps, entropy, lse
    if all(grad is None for grad in g):
        return (None,) * 8
    hidden, weight, bias, targets, rows = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = _stats_grads(*g, hidden, weight, bias, targets, rows, *needs, *ctx.options)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *(None,) * 5)


_linear_stats.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("aspo_kernels::linear_stats_grads", mutates_args=())
def _stats_grads(
    grad_logps: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    grad_lse: Tensor | None,  # (N,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,  # (4, N) shift, log Z, logps, entropy
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden (N, H), weight (V, H) and bias (V,); empty where not needed."""
    head = Head(weight, bias, None, Epilogue(logit_scale, softcap, temperature))
    y = targets.contiguous()
    shift, log_z, logps, entropy = rows
    g_logp, g_h, g_lse = (torch.zeros_like(logps) if g is None else g for g in (grad_logps, grad_entropy, grad_lse))
    # dz = p (a - b log p); 1 - p_y = -expm1(logp) keeps the target's entry exact as p_y -> 1
    a, b = g_lse - g_logp - g_h * entropy, g_h
    entry = logps.exp() * (g_lse - g_h * (logps + entropy)) - g_logp * logps.expm1()
    coefficients = torch.stack([shift, log_z, *(head.epilogue.slope * r for r in (a, b, entry))])
    write_stats_grad = stats_ops(backend).write_stats_grad

    def write_tile(tokens: slice, columns: slice, out: Tensor) -> None:
        z = head.products(widen(hidden[tokens]), columns)
        write_stats_grad(z, y[tokens], head, columns, coefficients[:, tokens], out)

    with op_context(hidden):
        return pull_back(hidden, head, (needs_hidden, needs_weight, needs_bias), write_tile)


@_stats_grads.register_fake
def _(
    grad_logps: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, targets: Tensor, rows: Tensor, needs_hidden: bool, needs_weight: bool, needs_bias: bool,
    logit_scale: float, softcap: float | None, temperature: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return gradient_outputs(hidden, weight, needs_hidden, needs_weight, needs_bias)
