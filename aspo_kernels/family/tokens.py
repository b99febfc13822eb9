"""Objectives whose pair loss weighs tokens by numbers that come with the data (`Inputs.token_scores`).

c_t is a token's weight, l_t = logp_t - ref_logp_t its log-ratio. Without scores (all 0) each of them is DPO, or DPO of
the mean token. Axes: N tokens, R responses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aspo_kernels.checks import check_finite, check_positive
from aspo_kernels.objectives import Inputs, Result, register


def _weighted_pair(x: Inputs, weights: Tensor, beta: float) -> Result:
    """-log sigmoid(beta (sum_t c_t l_t of y_c - that of y_r)).  weights: (N,), detached."""
    weighted = x.sum_by(weights * x.token_logratios, x.layout.response_token_offsets)
    chosen, rejected = x.pair(weighted)
    margins = beta * (chosen - rejected)
    return Result(-F.logsigmoid(margins), {**x.reward_stats(beta, margins), "token_weights": weights})


def _over(x: Inputs, weights: Tensor, totals: Tensor) -> Tensor:
    """Weights, (N,), over their response's number, (R,); 1 where that is 0, as behind a padded layout's end."""
    totals = x.spread(totals)
    return weights / torch.where(totals > 0, totals, 1.0)


@register("weighted_dpo", reads=["token_scores"])
def weighted_dpo(x: Inputs, beta: float = 0.1, gain: float = 1.0) -> Result:
    """-log sigmoid(beta (sum_t c_t l_t of y_c - that of y_r)), c_t = max(0, 1 + gain s_t).  (ours)

    s_t, the token's score, in both responses: -1 takes a token out, 1 counts it twice, no score leaves it alone.
    """
    check_positive("beta", beta)
    check_finite("gain", gain)
    return _weighted_pair(x, (1 + gain * x.need("token_scores").detach()).clamp_min(0.0), beta)


@register("ddpo", reads=["token_scores"])
def ddpo(x: Inputs, beta: float = 0.5, gamma: float = 5.0) -> Result:
    """-log sigmoid(beta (a(y_c) - a(y_r))), a(y) = sum_t c_t l_t / sum_t c_t.  (DDPO of RLHF-V, arXiv 2312.00849)

    c_t = gamma in segments that a person corrected (score above 0), else 1.
    """
    check_positive("beta", beta)
    check_positive("gamma", gamma)
    weights = torch.where(x.need("token_scores") > 0, gamma, 1.0).to(x.logps.dtype)
    return _weighted_pair(x, _over(x, weights, x.sum_by(weights, x.layout.response_token_offsets)), beta)


@register("fisao", reads=["token_scores"])
def fisao(x: Inputs, beta: float = 0.1, k: float = 1.0) -> Result:
    """-log sigmoid(beta (sum_t c_t l_t of y_c - that of y_r)).  (FiSAO-style, arXiv 2410.14148; this form is ours)

    c_t = clip(1 + k r_t, 0, 2) on chosen, clip(1 - k r_t, 0, 2) on rejected, each divided by its response's mean. r_t,
    the token's score, is the verifier's reward. r = 0 everywhere is exactly DPO; a response whose weights are all 0
    says nothing. TLDR's token scores are used the same way.
    """
    check_positive("beta", beta)
    check_finite("k", k)
    sign = x.spread(torch.where(x.layout.role == 0, 1.0, -1.0).to(x.logps.dtype))
    weights = (1 + k * sign * x.need("token_scores").detach()).clamp(0.0, 2.0)
    means = x.sum_by(weights, x.layout.response_token_offsets) / x.lengths
    return _weighted_pair(x, _over(x, weights, means), beta)
