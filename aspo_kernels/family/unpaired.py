"""KTO: single responses with a label instead of pairs (arXiv 2402.01306)."""

from __future__ import annotations

import torch

from aspo_kernels.checks import check_positive
from aspo_kernels.objectives import Inputs, Result, register


@register("kto", reads=["desirable"])
def kto(x: Inputs, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Result:
    """w sigmoid(-+beta (h(y) - z)), - for a desirable response, + for another; z = max(0, mean_i h(y'_i)), detached.

    Role 0 is the response, role 1 a response to another prompt of the batch (y'), which estimates the divergence from
    the reference: the mean over the responses that are in one forward pass together. TRL averages it over the
    processes too, which this does not.
    """
    for name, value in (("beta", beta), ("desirable_weight", desirable_weight)):
        check_positive(name, value)
    check_positive("undesirable_weight", undesirable_weight)
    h, of_others = x.pair(x.response_logratios)
    z = of_others.detach().mean().clamp_min(0.0)
    good = x.need("desirable")
    losses = torch.where(
        good,
        desirable_weight * torch.sigmoid(-beta * (h - z)),
        undesirable_weight * torch.sigmoid(beta * (h - z)),
    )
    return Result(losses, {"rewards": beta * h.detach(), "kl": z})
