"""The oracle: every operation once more in plain torch, written to be read beside its equation, in any float dtype.

Slow and hungry on purpose: full logits, Python loops over sentences, ordinary autograd. The tests check this file by
gradcheck and by numbers worked out by hand, and every other backend against this file in fp64.

Axes: N counted tokens, V vocabulary, H hidden, S sentences, R responses, B items.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from aspo_kernels.layout import SentenceLayout


def logits(
    hidden: Tensor,  # (N, H)
    head: Tensor,  # (V, H)
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """z = cap(logit_scale * (x W^T + bias)) / temperature, cap(z) = softcap * tanh(z / softcap).  (N, V)."""
    z = hidden @ head.T
    if bias is not None:
        z = z + bias
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax(z)[n, targets[n]].  (N, V), (N,) -> (N,)."""
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def linear_logps(
    hidden: Tensor, head: Tensor, targets: Tensor, bias: Tensor | None = None, **epilogue: float | None
) -> Tensor:
    """token_logps(logits(hidden, head, ...), targets).  (N,)."""
    return token_logps(logits(hidden, head, bias, **epilogue), targets)  # type: ignore[arg-type]


def sentence_sums(values: Tensor, layout: SentenceLayout) -> list[Tensor]:
    """sum_{t in s} values[t] for every sentence s: S scalars."""
    offsets = layout.sentence_offsets.tolist()
    return [values[a:b].sum() for a, b in pairwise(offsets)]


def response_sums(values: Tensor, layout: SentenceLayout) -> list[Tensor]:
    """sum_{t in y} values[t] for every response y: R scalars."""
    offsets = layout.response_token_offsets.tolist()
    return [values[a:b].sum() for a, b in pairwise(offsets)]


def minmax(values: list[float]) -> list[float]:
    """(v - min) / (max - min), and all 0 where max - min <= 1e-5."""
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high - low > 1e-5 else 0.0 for v in values]


def perplexity_scores(nlls: list[float], scale: str = "ppl") -> list[float]:
    """min-max of -PPL over one response's sentences: low perplexity -> 1.

    `ppl`: expm1(nll - nll_max) / expm1(nll_min - nll_max), which is minmax(-exp(nll)) without its overflow.
    `nll`: minmax(-nll).
    """
    low, high = min(nlls), max(nlls)
    if high - low <= 1e-5:
        return [0.0] * len(nlls)
    if scale == "nll":
        return [(high - nll) / (high - low) for nll in nlls]
    return [math.expm1(nll - high) / math.expm1(low - high) for nll in nlls]


def aspo_weights(
    similarity: list[float] | None, nlls: list[float], alpha: float = 0.5, perplexity_scale: str = "ppl"
) -> list[float]:
    """w_i = alpha * S'_i + (1 - alpha) * PPL'_i over the sentences of one response (methods: ASPO)."""
    ppl_scores = perplexity_scores(nlls, perplexity_scale)
    if similarity is None:  # ASPO-P
        return ppl_scores
    return [alpha * s + (1 - alpha) * p for s, p in zip(minmax(similarity), ppl_scores, strict=True)]


def length_ratio(weights: list[float], ratios: list[float], lengths: list[int], normalizer: str) -> float:
    """R_c / R_c* of one chosen response; see docs/math.md for what is certain here and what is our choice."""
    sentence = len(weights) / sum(1 + w for w in weights)
    if normalizer == "none":
        return 1.0
    if normalizer == "sentence":
        return sentence
    if normalizer == "token":
        return sum(lengths) / sum((1 + w) * n for w, n in zip(weights, lengths, strict=True))
    if normalizer != "reward":
        raise ValueError(f"normalizer {normalizer!r}: choose sentence, token, none or reward")
    plain, weighted = sum(ratios), sum((1 + w) * h for w, h in zip(weights, ratios, strict=True))
    if abs(weighted) <= 1e-6 or plain / weighted <= 0:
        return sentence
    return min(max(plain / weighted, 0.5), 1.0)


def aspo_loss(
    logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,)
    layout: SentenceLayout,
    similarity: Tensor | None = None,  # (S_chosen,)
    beta: float = 0.1,
    alpha: float = 0.5,
    normalizer: str = "sentence",
    perplexity: str = "policy",
    perplexity_scale: str = "ppl",
) -> dict[str, Tensor]:
    """-log sigmoid(M*) per item, M* = (R_c / R_c*) sum_i beta (1 + w_i) h(s_i^c) - beta h(y_r).

    Source: ASPO, arXiv 2505.19100. Returns losses and margins (B,), weights and sentence log-ratios (S_chosen,).
    """
    log_ratios = logps - ref_logps.detach()
    h_sentence = sentence_sums(log_ratios, layout)
    h_response = response_sums(log_ratios, layout)
    nll_from = (logps if perplexity == "policy" else ref_logps).detach()
    offsets, rows = layout.sentence_offsets.tolist(), layout.response_offsets.tolist()
    chosen, rejected = layout.with_role(0).tolist(), layout.with_role(1).tolist()
    mask = layout.perplexity_mask if layout.perplexity_mask is not None else torch.ones_like(logps, dtype=torch.bool)

    weights: dict[int, float] = {}
    margins, position = [], dict(zip(layout.chosen_sentences.tolist(), range(logps.numel()), strict=False))
    for c, r in zip(chosen, rejected, strict=True):
        sentences = range(rows[c], rows[c + 1])
        spans = [slice(offsets[s], offsets[s + 1]) for s in sentences]
        nlls = [float(-nll_from[span][mask[span]].mean()) for span in spans]
        scores = None if similarity is None else [float(similarity[position[s]]) for s in sentences]
        w = aspo_weights(scores, nlls, alpha, perplexity_scale)
        lengths = [span.stop - span.start for span in spans]
        ratio = length_ratio(w, [float(h_sentence[s].detach()) for s in sentences], lengths, normalizer)
        weighted = sum((1 + w_i) * h_sentence[s] for w_i, s in zip(w, sentences, strict=True))
        margins.append(ratio * beta * weighted - beta * h_response[r])
        weights.update(zip(sentences, w, strict=True))

    margin = torch.stack(margins)
    in_order = layout.chosen_sentences.tolist()
    return {
        "losses": -F.logsigmoid(margin),
        "margins": margin,
        "sentence_weights": torch.tensor([weights[s] for s in in_order], dtype=logps.dtype),
        "sentence_logratios": torch.stack([h_sentence[s] for s in in_order]),
    }


def dpo_loss(
    logps: Tensor, ref_logps: Tensor, layout: SentenceLayout, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), m = beta (h(y_c) - h(y_r)).  (B,).  (DPO, arXiv 2305.18290)"""
    h = response_sums(logps - ref_logps.detach(), layout)
    margins = [
        beta * (h[c] - h[r]) for c, r in zip(layout.with_role(0).tolist(), layout.with_role(1).tolist(), strict=True)
    ]
    m = torch.stack(margins)
    return -(1 - label_smoothing) * F.logsigmoid(m) - label_smoothing * F.logsigmoid(-m)


def linear_stats(
    hidden: Tensor, head: Tensor, targets: Tensor, bias: Tensor | None = None, **epilogue: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p_y, the entropy -sum p log p, logsumexp(z), and whether no logit is above the target's.  (N,) each."""
    z = logits(hidden, head, bias, **epilogue)  # type: ignore[arg-type]
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)
    target = z.gather(-1, targets[:, None])
    return token_logps(z, targets), entropy, z.logsumexp(-1), (z <= target).all(-1)


def linear_token_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    head: Tensor,
    ref_head: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **epilogue: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(reference || policy) over the vocabulary at every token, and log p_y of policy and reference.  (N,) each."""
    z = logits(hidden, head, bias, **epilogue)  # type: ignore[arg-type]
    ref_z = logits(ref_hidden, ref_head, ref_bias, **epilogue).detach()  # type: ignore[arg-type]
    log_p, ref_log_p = z.log_softmax(-1), ref_z.log_softmax(-1)
    terms = torch.where(ref_log_p == -math.inf, 0, ref_log_p.exp() * (ref_log_p - log_p))
    return terms.sum(-1), token_logps(z, targets), token_logps(ref_z, targets)
