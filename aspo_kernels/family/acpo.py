"""ACPO: the rejected response's reward is scaled down where the pair has reached its target (arXiv 2603.22165)."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

from aspo_kernels.checks import check_choice, check_positive
from aspo_kernels.objectives import Inputs, Result, register

TARGETS = ("batch", "pair", "dataset")
MIN_REWARD = 1e-6  # a rejected reward above minus this is no divisor (step 0 has none)
STARVING = 4.0  # sigmoid(-4) = 0.018: a target above this leaves hardly any gradient


@register("acpo", reads=["pair_tokens"])
def acpo(x: Inputs, beta: float = 0.1, delta: float = 0.005, target: str = "batch") -> Result:
    """-log sigmoid(r(y_c) - a r(y_r)), r = beta h, a = sg[clip((r(y_c) - tau) / r(y_r), 0, 1)] or 1.

    tau = delta (|y_c| + |y_r|), the length-adaptive target: of the pair, or its mean over the pairs of an optimiser
    step ("batch") or of the data set (both from `Inputs.pair_tokens`; without it, over the pairs at hand). a = 1 is
    DPO. Clip, guard and delta per token are ours.
    """
    check_positive("beta", beta)
    check_positive("delta", delta)
    check_choice("target", target, TARGETS)
    h_chosen, h_rejected = x.pair(x.response_logratios)
    chosen, rejected = beta * h_chosen.detach(), beta * h_rejected.detach()
    tokens = torch.add(*x.pair(x.lengths))
    if target != "pair":
        tokens = tokens.mean() if x.pair_tokens is None else torch.full_like(tokens, x.pair_tokens)
    if x.pair_tokens is not None and delta * x.pair_tokens > STARVING:
        warnings.warn(
            f"acpo: the target delta * tokens is above {STARVING:g} (delta {delta:g}): the sigmoid of minus that "
            "leaves hardly any gradient. Lower delta.",
            stacklevel=2,
        )
    tau = delta * tokens
    usable = rejected < -MIN_REWARD
    ratio = (chosen - tau) / torch.where(usable, rejected, -1.0)
    a = torch.where(usable, ratio.clamp(0.0, 1.0), 1.0)
    margins = beta * (h_chosen - a * h_rejected)  # in this order a = 1 is DPO to the last bit
    stats = {**x.reward_stats(beta, margins), "acpo_scale": a, "acpo_target": tau.expand_as(a)}
    return Result(-F.logsigmoid(margins), stats)
