"""Objectives with the divergence from the reference at every token: TDPO, and CHiP, which is built on it.

D(y) = sum_t KL(ref || policy) over the whole vocabulary (`linear_token_kl`: without logits, twice the passes over the
head of DPO's with a cached reference; here it must be run, a cache of log-probabilities is not enough).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aspo_kernels.checks import check_choice, check_finite, check_positive
from aspo_kernels.family.images import image_margin
from aspo_kernels.objectives import Inputs, Result, register


def _divergences(x: Inputs) -> tuple[Tensor, Tensor]:
    """D(y_c), D(y_r): (B,) each."""
    return x.pair(x.sum_by(x.need("token_kl"), x.layout.response_token_offsets))


@register("tdpo", reads=["token_kl"])
def tdpo(x: Inputs, beta: float = 0.1, tdpo_alpha: float = 0.5, variant: int = 2) -> Result:
    """-log sigmoid(beta (h(y_c) - h(y_r) - a (D(y_r) - sg[D(y_c)]))).  (TDPO2, arXiv 2404.11999)

    Variant 1 (TDPO1): a = 1, and D(y_c) has its gradient.
    """
    check_positive("beta", beta)
    check_finite("tdpo_alpha", tdpo_alpha)
    check_choice("variant", variant, (1, 2))
    h_chosen, h_rejected = x.pair(x.response_logratios)
    d_chosen, d_rejected = _divergences(x)
    further = d_rejected - d_chosen if variant == 1 else tdpo_alpha * (d_rejected - d_chosen.detach())
    margins = beta * (h_chosen - h_rejected - further)
    kl = {"chosen_kl": d_chosen.detach(), "rejected_kl": d_rejected.detach()}
    return Result(-F.logsigmoid(margins), {**x.reward_stats(beta, margins), **kl})


@register("chip", reads=["token_kl", "token_scores"], reads_negatives=True)
def chip(x: Inputs, beta: float = 0.1, tdpo_alpha: float = 0.1, segment_weight: float = 1.0) -> Result:
    """-log sigmoid(beta m), m = [g(y_c) - g(y_r)] + [g(y_c) - g(y_c | noised image)] - a (D(y_r) - sg[D(y_c)]).

    g(y) = sum_t c_t l_t, c_t = segment_weight in segments in which the responses differ (score above 0), else 1.
    (CHiP, arXiv 2501.16629, in its released form: one log-sigmoid over all terms. There, with segment weights, the
    noised image's reference is its plain sum times sum_t c_t; here every g is weighted alike.)
    """
    check_positive("beta", beta)
    check_positive("segment_weight", segment_weight)
    check_finite("tdpo_alpha", tdpo_alpha)
    ratios = x.token_logratios
    if segment_weight != 1.0:
        ratios = ratios * torch.where(x.need("token_scores") > 0, segment_weight, 1.0).to(ratios.dtype)
    g = x.sum_by(ratios, x.layout.response_token_offsets)
    chosen, rejected = x.pair(g)
    d_chosen, d_rejected = _divergences(x)
    image, _ = image_margin(x, g)
    margins = beta * (chosen - rejected + image - tdpo_alpha * (d_rejected - d_chosen.detach()))
    return Result(-F.logsigmoid(margins), {**x.reward_stats(beta, margins), "image_margins": beta * image.detach()})
