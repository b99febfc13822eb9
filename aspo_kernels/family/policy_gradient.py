"""The clipped token-level policy gradient: what an on-policy loop does with a reward for each generated token.

    loss_t = -min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t) + kl_coef * kl_t,    rho_t = exp(logp_t - old_logp_t)

(PPO, arXiv 1707.06347; a token is an action.) Not a pair objective, hence not registered: `aspo online` calls it.
Axes: N generated tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aspo_kernels.checks import check_positive


class PolicyGradient(NamedTuple):
    """losses: (N,), differentiable; the loss of a step is their mean. ratios: (N,) rho. clipped: (N,) bool, where the
    clip holds and the token has no policy gradient. Both detached."""

    losses: Tensor
    ratios: Tensor
    clipped: Tensor


def clipped_policy_gradient(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    token_kl: Tensor | None = None,
    *,
    clip: float = 0.2,
    kl_coef: float = 0.1,
) -> PolicyGradient:
    """`-torch.min(rho * A, rho.clamp(1 - clip, 1 + clip) * A) + kl_coef * token_kl`, rho = exp(logps - old_logps).

    Args:
        logps: (N,) log-probabilities of the generated tokens, differentiable.
        old_logps: (N,) those of the policy that generated them. At the first step they are equal and rho is 1.
        advantages: (N,), detached here; 0 = the token has no reward.
        token_kl: (N,) differentiable divergence from the reference at each token, nats; None only with kl_coef 0.
        clip: in (0, 1). kl_coef: 0 or more.

    Raises ValueError for other shapes or options, a missing token_kl, and on the CPU values that are not finite.
    """
    if not 0.0 < clip < 1.0:
        raise ValueError(f"clip is {clip}; it must be between 0 and 1")
    if kl_coef != 0:
        check_positive("kl_coef", kl_coef)
    if (token_kl is None) != (kl_coef == 0):
        raise ValueError(f"kl_coef is {kl_coef}, and token_kl is {'missing' if token_kl is None else 'given'}")
    named = {"logps": logps, "old_logps": old_logps, "advantages": advantages, "token_kl": token_kl}
    for name, values in named.items():
        if values is None:
            continue
        if values.shape != logps.shape or values.dim() != 1 or not values.is_floating_point():
            raise ValueError(f"{name} must be floating point {tuple(logps.shape)}, got {values.dtype} {values.shape}")
        if values.device.type == "cpu" and not bool(torch.isfinite(values).all()):
            at = int(torch.nonzero(~torch.isfinite(values))[0])
            raise ValueError(f"{name}[{at}] is {float(values[at])}; it must be finite")
    advantages = advantages.detach()
    ratios = torch.exp(logps - old_logps.detach())
    held = ratios.clamp(1 - clip, 1 + clip)
    gains = torch.min(ratios * advantages, held * advantages)
    losses = -gains if token_kl is None else -gains + kl_coef * token_kl
    clipped = (held * advantages < ratios * advantages).detach()
    return PolicyGradient(losses, ratios.detach(), clipped)


def sampled_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """`(ref - logp).exp() - 1 - (ref - logp)`, (N,): an estimate of KL(policy || reference) from the sampled tokens.

    Never negative; over tokens drawn from the policy its mean is the divergence (Schulman's k3). Its gradient there is
    that of KL(reference || policy) in the mean.
    """
    difference = ref_logps.detach() - logps
    return torch.expm1(difference) - difference
