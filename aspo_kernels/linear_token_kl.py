"""The KL divergence of the policy from the reference at every token, over the whole vocabulary, without logits.

With p and p_ref the two softmax distributions over the vocabulary at a token,

    kl = KL(p_ref || p) = sum_v p_ref (log p_ref - log p)        d kl / d z = p - p_ref        d logp / d z = 1[y] - p

What one pass over both heads sums, with a shift c and c_ref for each (the target's logit, or the largest one so far),
u = z - c, E = exp(u), R = exp(u_ref), and the target left out of S, S_ref and M, t = u_y:

    M  = sum_{v != y} R_v (u_ref - u)        Z  = S + e^t
    dS = sum_{v != y} (R_v - E_v)            dZ = Z_ref - Z = dS + e^{t_ref} - e^t
    kl = (M + e^{t_ref} (t_ref - t)) / Z_ref - log(Z_ref / Z),        log(Z_ref / Z) = log1p(dZ / Z)

All of it is exactly 0 where both agree, and vanishes as both become certain of the target. dS is summed, since the
rounding of two logarithms of size 10 would be that of a token's whole divergence early in a training; what remains is
the rounding of R and E, which is 1e-7 over many tokens of the vocabulary. Shifts raised by a = c' - c and a_ref turn,
with r = e^{-a} and r_ref = e^{-a_ref},

    M into r_ref (M + (a - a_ref) S_ref)        dS into r_ref dS + (r_ref - r) S

With a frozen head the forward also forms, from A = sum E d W and B = sum (R - E) d W (d the soft-cap's derivative, the
policy's, and W the policy's),

    G = d logp / d x = -slope A / Z        D = d kl / d x = -slope (B - A dZ / Z) / Z_ref

with the target's rows, -S d_y W[y] in A and -dS d_y W[y] in B; the backward is g_logp G + g_kl D. B goes through raised
shifts as dS does. R - E is rounded after the subtraction, so that D keeps its digits where the policy has hardly left
the reference.

Passes over the head (2 N H V FLOP, the reference's counted as the policy's): 2u without gradients; frozen head 4u, the
backward without the head; trainable head 2u, and in the backward both z again and dX and dW, 4u. Axes: as in `tiles`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aspo_kernels import reference
from aspo_kernels.checks import check_backend, check_finite_logps, check_head, check_targets
from aspo_kernels.head_kl import head_token_kl
from aspo_kernels.tiles import Epilogue, cast_for_autocast, statistics_dtype
from aspo_kernels.vocabulary import gather_if_frozen


class TokenKL(NamedTuple):
    """One fp32 number a token, (N,) each."""

    kl: Tensor  # nats
    logps: Tensor
    ref_logps: Tensor  # carries no gradient


def linear_token_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: Tensor,
    ref_head: Tensor | None,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    validate: bool = False,
) -> TokenKL:
    """`kl = (p_ref * (log p_ref - log p)).sum(-1)` of two softmax distributions over the vocabulary, without logits.

    TDPO (arXiv 2404.11999) sums it over a response, once with gradient (rejected) and once without (chosen):
    `segment_sum(out.kl, ...)`, and `.detach()` of it where it is to carry none. Under torch.no_grad(), or where nothing
    requires a gradient, none is prepared.

    Args:
        hidden, ref_hidden: (N, H) and (N, H_ref) fp32, bf16 or fp16 (fp64 stays fp64): policy and reference at the same
            counted tokens. N = 0 is fine. No gradient reaches the reference.
        head, ref_head: (V, H) and (V, H_ref), each of its hidden states' dtype and device; None = head and bias as they
            are, without gradient. Under autocast all are cast to autocast's dtype.
        targets: (N,) int64 in [0, V).
        bias, ref_bias, logit_scale, softcap, temperature: z = cap(logit_scale * (x W^T + bias)) / temperature with
            cap(z) = softcap * tanh(z / softcap); each head has its own bias (V,), -inf for a token that is masked. A
            token that the policy masks and the reference does not makes the divergence inf.
        backend: "auto" | "torch" | "triton" | "reference" (full logits, for comparison).
        validate: check targets' contents on an accelerator too (waits for the device). Without it a negative
            target such as -100 gives NaN there, in its token's numbers and in every gradient that they reach; one of
            V or more stops at torch's device assertion.

    Returns:
        TokenKL, kl and logps differentiable once in hidden, head and bias. kl is 0 where policy and reference agree;
        where they nearly do, rounding may make it negative, by less than 1e-7.

    Raises:
        ValueError: wrong shapes, dtypes, devices or options; on the CPU also a target outside [0, V) or a
            log-probability that is not finite.
    """
    if ref_head is None and ref_bias is not None:
        raise ValueError("ref_bias is the bias of ref_head: give both, or neither for the policy's own")
    hidden, ref_hidden, head, ref_head, bias, ref_bias = cast_for_autocast(  # type: ignore[assignment]
        hidden.device.type, hidden, ref_hidden, head, ref_head, bias, ref_bias
    )
    head, bias = gather_if_frozen("head", head), gather_if_frozen("bias", bias)
    check_head(hidden, head, bias)
    if ref_head is None:
        ref_head, ref_bias = head, bias
    ref_head = gather_if_frozen("ref_head", ref_head.detach())
    ref_bias = gather_if_frozen("ref_bias", ref_bias if ref_bias is None else ref_bias.detach())
    check_head(ref_hidden, ref_head, ref_bias, "ref_hidden")
    _check_pair(hidden, ref_hidden, head, ref_head)
    check_targets(targets, hidden.shape[0], head.shape[0], hidden.device, validate)
    epilogue = Epilogue(logit_scale, softcap, temperature)
    backend = check_backend(backend, hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        operands = (hidden, ref_hidden.detach(), head, ref_head, targets, bias, ref_bias)
        if backend == "reference":
            dtype = statistics_dtype(hidden.dtype)
            wide = (t if t is None or t is targets else t.to(dtype) for t in operands)
            outputs = reference.linear_token_kl(*wide, **epilogue.options)  # type: ignore[arg-type]
        else:
            trainable = head.requires_grad or (bias is not None and bias.requires_grad)
            row_grads = torch.is_grad_enabled() and hidden.requires_grad and not trainable
            outputs = head_token_kl(
                *operands, epilogue.logit_scale, epilogue.softcap, epilogue.temperature, backend, row_grads
            )[:3]
    check_finite_logps(outputs[1], targets)
    check_finite_logps(outputs[2], targets)
    return TokenKL(*outputs)


def _check_pair(hidden: Tensor, ref_hidden: Tensor, head: Tensor, ref_head: Tensor) -> None:
    """That policy and reference have the same tokens, vocabulary and device."""
    if hidden.shape[0] != ref_hidden.shape[0] or head.shape[0] != ref_head.shape[0]:
        raise ValueError(
            f"policy and reference must have the same tokens and vocabulary, got {hidden.shape[0]} and "
            f"{ref_hidden.shape[0]} hidden states, heads of {head.shape[0]} and {ref_head.shape[0]} rows"
        )
    if hidden.device != ref_hidden.device:
        raise ValueError(f"hidden is on {hidden.device} but ref_hidden on {ref_hidden.device}")
