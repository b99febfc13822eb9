"""Objectives of a pair of responses that read their log-probabilities alone: DPO and its nearest relatives.

h(y) is a response's log-ratio, |y| its counted tokens. Axes: B pairs, R responses.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from aspo_kernels.checks import check_choice, check_finite, check_positive
from aspo_kernels.objectives import Inputs, Result, register

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
MAX_EXPONENT = 80.0  # exp of more is no fp32 number


@register("dpo", difference_only=True)
def dpo(x: Inputs, beta: float = 0.1, label_smoothing: float = 0.0) -> Result:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), m = beta (h(y_c) - h(y_r)).  (DPO, arXiv 2305.18290)"""
    check_positive("beta", beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
    chosen, rejected = x.pair(x.response_logratios)
    m = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(m) - label_smoothing * F.logsigmoid(-m)
    return Result(losses, x.reward_stats(beta))


@register("ipo")
def ipo(x: Inputs, beta: float = 0.1) -> Result:
    """(d - 1 / (2 beta))^2, d = h(y_c) / |y_c| - h(y_r) / |y_r|.  (IPO, arXiv 2310.12036; per token as TRL does)"""
    check_positive("beta", beta)
    chosen, rejected = x.pair(x.response_logratios / x.lengths)
    return Result((chosen - rejected - 1 / (2 * beta)) ** 2, x.reward_stats(beta))


@register("hinge", difference_only=True)
def hinge(x: Inputs, beta: float = 0.1) -> Result:
    """max(0, 1 - beta (h(y_c) - h(y_r))).  (SLiC-HF, arXiv 2305.10425)"""
    check_positive("beta", beta)
    chosen, rejected = x.pair(x.response_logratios)
    return Result(torch.relu(1 - beta * (chosen - rejected)), x.reward_stats(beta))


@register("simpo", needs_reference=False)
def simpo(x: Inputs, beta: float = 2.0, gamma: float = 1.0) -> Result:
    """-log sigmoid(beta (logp(y_c) / |y_c| - logp(y_r) / |y_r|) - gamma).  (SimPO, arXiv 2405.14734)"""
    check_positive("beta", beta)
    check_finite("gamma", gamma)
    chosen, rejected = x.pair(beta * x.response_logps / x.lengths)
    stats = {"chosen_rewards": chosen, "rejected_rewards": rejected, "margins": chosen - rejected}
    return Result(-F.logsigmoid(chosen - rejected - gamma), {k: v.detach() for k, v in stats.items()})


@register("sft", needs_reference=False)
def sft(x: Inputs) -> Result:
    """-logp(y_c) / |y_c|: the chosen response's mean negative log-likelihood per token."""
    losses = -(x.response_logps / x.lengths)[x.layout.with_role(0)]
    return Result(losses, {"nll": losses.detach()})


@register("orpo", needs_reference=False)
def orpo(x: Inputs, beta: float = 0.1) -> Result:
    """-logp(y_c) / |y_c| - beta log sigmoid(log-odds of y_c - log-odds of y_r), p the mean token's.  (ORPO, 2403.07691)

    log odds(p) = log p - log(1 - p). The likelihood term counts the response's tokens; TRL's counts the prompt's too.
    """
    check_positive("beta", beta)
    log_p = x.response_logps / x.lengths
    chosen, rejected = x.pair(log_p - _log1mexp(log_p))
    nll = -x.pair(log_p)[0]
    stats = dict(zip(("chosen_rewards", "rejected_rewards"), x.pair(beta * log_p.detach()), strict=True))
    return Result(nll - beta * F.logsigmoid(chosen - rejected), {**stats, "nll": nll.detach()})


def _log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)) for log_p <= 0, in the form that keeps its digits on each side of 1/2."""
    below = log_p.clamp_max(-(torch.finfo(log_p.dtype).tiny ** 0.5))  # a certain response has no odds: kept finite
    likely = below > -math.log(2)
    # Each form gets a number that suits it where it is not taken: 0 times its infinite slope would be NaN.
    of_likely = torch.log(-torch.expm1(torch.where(likely, below, -1.0)))
    return torch.where(likely, of_likely, torch.log1p(-torch.exp(torch.where(likely, -1.0, below))))


@register("f_dpo")
def f_dpo(x: Inputs, beta: float = 0.1, f_divergence: str = "js_divergence", f_alpha: float = 0.5) -> Result:
    """-log sigmoid(beta (f'(u_c) - f'(u_r))), u = exp(h(y)).  (f-DPO, arXiv 2309.16240; divergences as TRL has them)

    f'(u): reverse_kl log u (DPO); forward_kl 1 - 1/u; js_divergence log(2u / (1 + u)); alpha_divergence
    (u^(f_alpha - 1) - 1) / (f_alpha - 1), DPO at f_alpha = 1. Exponents are cut at 80.
    """
    check_positive("beta", beta)
    check_choice("f_divergence", f_divergence, F_DIVERGENCES)
    check_finite("f_alpha", f_alpha)
    h = x.response_logratios
    if f_divergence == "forward_kl":
        scores = 1 - torch.exp((-h).clamp_max(MAX_EXPONENT))
    elif f_divergence == "js_divergence":
        scores = math.log(2) + F.logsigmoid(h)
    elif f_divergence == "alpha_divergence" and abs(f_alpha - 1) >= 1e-6:
        scores = torch.expm1(((f_alpha - 1) * h).clamp_max(MAX_EXPONENT)) / (f_alpha - 1)
    else:
        scores = h
    chosen, rejected = x.pair(scores)
    return Result(-F.logsigmoid(beta * (chosen - rejected)), x.reward_stats(beta, beta * (chosen - rejected)))


@register("wpo", reads=["sharp_logps"])
def wpo(x: Inputs, beta: float = 0.1) -> Result:
    """-v_c v_r log sigmoid(beta (h(y_c) - h(y_r))), v = exp(mean_t(logp_t - log sum_v p_v^2)).  (WPO, arXiv 2406.11827)

    v, detached, is how likely a response is under the policy now, against the policy's own answers: 1 for an answer
    that is on-policy. As TRL has it (eq. 2), the product is not clipped. Costs one pass over the head without gradient.
    """
    check_positive("beta", beta)
    on_policy = x.need("sharp_logps").detach() - x.logps.detach()  # = logp - log sum_v p_v^2
    v = torch.exp(x.sum_by(on_policy, x.layout.response_token_offsets) / x.lengths)
    weights = torch.mul(*x.pair(v))
    chosen, rejected = x.pair(x.response_logratios)
    return Result(-weights * F.logsigmoid(beta * (chosen - rejected)), {**x.reward_stats(beta), "on_policy": weights})
