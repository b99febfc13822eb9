"""ASPO: sentence weights from image similarity and perplexity, and the weighted margin (arXiv 2505.19100).

The equations, what is certain of them and what is our choice: docs/math.md.
Axes: S sentences, R responses, B items; everything is computed for all responses alike and read at the chosen ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aspo_kernels.checks import check_positive
from aspo_kernels.layout import SentenceLayout
from aspo_kernels.objectives import Inputs, Result, register
from aspo_kernels.segments import segment_max, segment_min, segment_minmax, segment_sum, spread_over

NORMALIZERS = ("sentence", "token", "none", "reward")
PERPLEXITIES = ("policy", "reference")
PERPLEXITY_SCALES = ("ppl", "nll")
MIN_RANGE = 1e-5  # a spread this small, of similarities or of mean negative log-likelihoods, says nothing
MIN_WEIGHTED_LOGRATIO = 1e-6  # below this the `reward` normaliser is 0/0 (at step 0, always)


def check_options(beta: float, alpha: float, normalizer: str, perplexity: str, perplexity_scale: str) -> None:
    """Raise ValueError for a value outside ASPO's options."""
    check_positive("beta", beta)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must be in [0, 1] (1 = similarity alone, 0 = perplexity alone)")
    for name, value, allowed in (
        ("normalizer", normalizer, NORMALIZERS),
        ("perplexity", perplexity, PERPLEXITIES),
        ("perplexity_scale", perplexity_scale, PERPLEXITY_SCALES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def sentence_nll(logps: Tensor, layout: SentenceLayout) -> Tensor:
    """nll_i = -mean_{t in s_i} logp_t over the tokens in `layout.perplexity_mask`.  (N,) -> (S,)."""
    mask = torch.ones_like(logps) if layout.perplexity_mask is None else layout.perplexity_mask.to(logps.dtype)
    offsets = layout.sentence_offsets
    return -segment_sum(logps * mask, offsets) / segment_sum(mask, offsets).clamp_min(1.0)


def perplexity_scores(nll: Tensor, offsets: Tensor, scale: str = "ppl") -> Tensor:
    """PPL'_i = minmax(-PPL_i) over each response's sentences, low perplexity -> 1.  (S,), (R+1,) -> (S,).

    As expm1(nll_i - nll_max) / expm1(nll_min - nll_max), which never overflows; exp(95) in fp32 would.
    """
    if scale == "nll":
        return segment_minmax(-nll, offsets, MIN_RANGE)
    low = spread_over(segment_min(nll, offsets), offsets, nll.numel())
    high = spread_over(segment_max(nll, offsets), offsets, nll.numel())
    spread = high - low
    return torch.where(spread > MIN_RANGE, torch.expm1(nll - high) / torch.expm1(-spread.clamp_min(MIN_RANGE)), 0.0)


def sentence_weights(x: Inputs, alpha: float, perplexity: str, perplexity_scale: str) -> Tensor:
    """w_i = alpha S'_i + (1 - alpha) PPL'_i, detached.  (S,), read at the chosen responses' sentences only."""
    layout = x.layout
    logps = x.logps.detach()
    if perplexity == "reference":
        if x.ref_logps is None:
            raise ValueError("perplexity='reference' needs reference log-probabilities")
        logps = x.ref_logps.detach()
    weights = perplexity_scores(sentence_nll(logps, layout), layout.response_offsets, perplexity_scale)
    if x.similarity is not None:
        similarity = torch.zeros_like(weights)
        similarity[layout.chosen_sentences] = x.similarity.detach().to(weights.dtype)
        weights = alpha * segment_minmax(similarity, layout.response_offsets, MIN_RANGE) + (1 - alpha) * weights
    return weights


def length_ratio(x: Inputs, weights: Tensor, normalizer: str) -> tuple[Tensor, Tensor | None]:
    """R_c / R_c* of each response, (R,), detached; and for `reward` where it fell back to `sentence`, (R,) bool."""
    offsets, gain = x.layout.response_offsets, 1 + weights
    if normalizer == "none":
        return torch.ones_like(x.lengths), None
    if normalizer == "token":
        tokens = x.layout.sentence_offsets.diff().to(gain.dtype)
        return segment_sum(tokens, offsets) / segment_sum(gain * tokens, offsets), None
    sentence = offsets.diff().to(gain.dtype) / segment_sum(gain, offsets)
    if normalizer == "sentence":
        return sentence, None
    log_ratios = x.sentence_logratios.detach()
    plain, weighted = segment_sum(log_ratios, offsets), segment_sum(gain * log_ratios, offsets)
    usable = weighted.abs() > MIN_WEIGHTED_LOGRATIO
    ratio = plain / torch.where(usable, weighted, 1.0)
    fell_back = ~usable | (ratio <= 0)
    return torch.where(fell_back, sentence, ratio.clamp(0.5, 1.0)), fell_back


@register("aspo")
def aspo(
    x: Inputs,
    beta: float = 0.1,
    alpha: float = 0.5,
    normalizer: str = "sentence",
    perplexity: str = "policy",
    perplexity_scale: str = "ppl",
) -> Result:
    """-log sigmoid(M*), M* = (R_c / R_c*) sum_i beta (1 + w_i) h(s_i^c) - beta h(y_r).  (ASPO, arXiv 2505.19100)

    Without similarities it is ASPO-P whatever alpha is; alpha = 1 is ASPO-S. Constant w (normaliser `sentence` or
    `token`) is exactly DPO.
    """
    check_options(beta, alpha, normalizer, perplexity, perplexity_scale)
    weights = sentence_weights(x, alpha, perplexity, perplexity_scale)
    ratio, fell_back = length_ratio(x, weights, normalizer)
    weighted = ratio * segment_sum((1 + weights) * x.sentence_logratios, x.layout.response_offsets)
    margins = beta * (x.pair(weighted)[0] - x.pair(x.response_logratios)[1])
    stats = x.reward_stats(beta, margins)
    stats["sentence_weights"] = weights[x.layout.chosen_sentences]
    stats["sentence_logratios"] = x.sentence_logratios.detach()[x.layout.chosen_sentences]
    if fell_back is not None:
        stats["reward_fallback_share"] = x.pair(fell_back.to(margins.dtype))[0].mean()
    return Result(-F.logsigmoid(margins), stats)
