"""ASPO: sentence weights from image similarity and perplexity, and the weighted margin (arXiv 2505.19100).

The equations, what is certain of them and what is our choice: docs/math.md. In plain torch everything is computed for
all responses alike and read at the chosen ones; where Triton runs, one launch does the same, one program a pair.
Axes: N tokens, S sentences, R responses, B items.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aspo_kernels.checks import check_backend, check_choice, check_positive, refuse_double_backward
from aspo_kernels.layout import SentenceLayout
from aspo_kernels.objectives import Inputs, Result, register
from aspo_kernels.segments import segment_max, segment_min, segment_minmax, segment_sum, spread_over
from aspo_kernels.tiles import op_context

NORMALIZERS = ("sentence", "token", "none", "reward")
PERPLEXITIES = ("policy", "reference")
PERPLEXITY_SCALES = ("ppl", "nll")
WEIGHTS = ("computed", "given")
REJECTED_SIDES = ("whole", "aligned", "misaligned")
MIN_RANGE = 1e-5  # a spread this small, of similarities or of mean negative log-likelihoods, says nothing
MIN_WEIGHTED_LOGRATIO = 1e-6  # below this the `reward` normaliser is 0/0 (at step 0, always)


def check_options(
    beta: float,
    alpha: float,
    normalizer: str,
    perplexity: str,
    perplexity_scale: str,
    weights: str = "computed",
    rejected_side: str = "whole",
) -> None:
    """Raise ValueError for a value outside ASPO's options."""
    check_positive("beta", beta)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must be in [0, 1] (1 = similarity alone, 0 = perplexity alone)")
    for name, value, allowed in (
        ("normalizer", normalizer, NORMALIZERS),
        ("perplexity", perplexity, PERPLEXITIES),
        ("perplexity_scale", perplexity_scale, PERPLEXITY_SCALES),
        ("weights", weights, WEIGHTS),
        ("rejected_side", rejected_side, REJECTED_SIDES),
    ):
        check_choice(name, value, allowed)


def sentence_nll(logps: Tensor, layout: SentenceLayout, backend: str = "auto") -> Tensor:
    """nll_i = -mean_{t in s_i} logp_t over the tokens in `layout.perplexity_mask`.  (N,) -> (S,)."""
    mask = torch.ones_like(logps) if layout.perplexity_mask is None else layout.perplexity_mask.to(logps.dtype)
    offsets = layout.sentence_offsets
    return -segment_sum(logps * mask, offsets, backend) / segment_sum(mask, offsets, backend).clamp_min(1.0)


def perplexity_scores(nll: Tensor, offsets: Tensor, scale: str = "ppl", backend: str = "auto") -> Tensor:
    """PPL'_i = minmax(-PPL_i) over each response's sentences, low perplexity -> 1.  (S,), (R+1,) -> (S,).

    As expm1(nll_i - nll_max) / expm1(nll_min - nll_max), which never overflows; exp(95) in fp32 would.
    """
    if scale == "nll":
        return segment_minmax(-nll, offsets, MIN_RANGE, backend)
    low = spread_over(segment_min(nll, offsets, backend), offsets, nll.numel(), backend)
    high = spread_over(segment_max(nll, offsets, backend), offsets, nll.numel(), backend)
    spread = high - low
    return torch.where(spread > MIN_RANGE, torch.expm1(nll - high) / torch.expm1(-spread.clamp_min(MIN_RANGE)), 0.0)


def sentence_weights(
    x: Inputs, alpha: float, perplexity: str, perplexity_scale: str, rejected_side: str = "whole"
) -> Tensor:
    """w_i = alpha S'_i + (1 - alpha) PPL'_i, detached.  (S,), read at the chosen responses' sentences.

    With another rejected_side than "whole" at the rejected responses' too, which then need similarities as well.
    """
    layout = x.layout
    logps = x.logps.detach()
    if perplexity == "reference":
        if x.ref_logps is None:
            raise ValueError("perplexity='reference' needs reference log-probabilities")
        logps = x.ref_logps.detach()
    nll = sentence_nll(logps, layout, x.backend)
    weights = perplexity_scores(nll, layout.response_offsets, perplexity_scale, x.backend)
    if x.similarity is not None:
        similarity = torch.zeros_like(weights)
        if rejected_side != "whole" and alpha > 0:
            similarity = x.need("rejected_similarity").detach().to(weights.dtype).clone()
        similarity[layout.chosen_sentences] = x.similarity.detach().to(weights.dtype)
        by_similarity = segment_minmax(similarity, layout.response_offsets, MIN_RANGE, x.backend)
        weights = alpha * by_similarity + (1 - alpha) * weights
    return weights


def length_ratio(x: Inputs, weights: Tensor, normalizer: str) -> tuple[Tensor, Tensor | None]:
    """R_c / R_c* of each response, (R,), detached; and for `reward` where it fell back to `sentence`, (R,) bool."""
    offsets, gain = x.layout.response_offsets, 1 + weights
    if normalizer == "none":
        return torch.ones_like(x.lengths), None
    if normalizer == "token":
        tokens = x.layout.sentence_offsets.diff().to(gain.dtype)
        return x.sum_by(tokens, offsets) / x.sum_by(gain * tokens, offsets), None
    sentence = offsets.diff().to(gain.dtype) / x.sum_by(gain, offsets)
    if normalizer == "sentence":
        return sentence, None
    log_ratios = x.sentence_logratios.detach()
    plain, weighted = x.sum_by(log_ratios, offsets), x.sum_by(gain * log_ratios, offsets)
    usable = weighted.abs() > MIN_WEIGHTED_LOGRATIO
    ratio = plain / torch.where(usable, weighted, 1.0)
    fell_back = ~usable | (ratio <= 0)
    return torch.where(fell_back, sentence, ratio.clamp(0.5, 1.0)), fell_back


@register("aspo", reads=["sentence_weights", "rejected_similarity"])
def aspo(
    x: Inputs,
    beta: float = 0.1,
    alpha: float = 0.5,
    normalizer: str = "sentence",
    perplexity: str = "policy",
    perplexity_scale: str = "ppl",
    weights: str = "computed",
    rejected_side: str = "whole",
) -> Result:
    """-log sigmoid(M*), M* = (R_c / R_c*) sum_i beta (1 + w_i) h(s_i^c) - beta h(y_r).  (ASPO, arXiv 2505.19100)

    Without similarities it is ASPO-P whatever alpha is; alpha = 1 is ASPO-S. Constant w (normaliser `sentence` or
    `token`) is exactly DPO. weights="given" takes w from `Inputs.sentence_weights`. rejected_side weighs the rejected
    response by the same rule, which is ours: "aligned" by 1 + w_i, "misaligned" by 1 + (1 - w_i), so that what fits the
    image least is rejected most.
    """
    check_options(beta, alpha, normalizer, perplexity, perplexity_scale, weights, rejected_side)
    plain = weights == "computed" and rejected_side == "whole"
    if plain and x.ref_logps is not None and check_backend(x.backend, x.logps) == "triton":
        return _fused(x, x.ref_logps, beta, alpha, normalizer, perplexity, perplexity_scale)
    if weights == "given":
        w = x.need("sentence_weights").detach().to(x.logps.dtype)
    else:
        w = sentence_weights(x, alpha, perplexity, perplexity_scale, rejected_side)
    if rejected_side == "misaligned":
        chosen = torch.zeros_like(w, dtype=torch.bool).index_fill_(0, x.layout.chosen_sentences, True)
        offsets = x.layout.response_offsets
        several = spread_over((offsets.diff() > 1).to(w.dtype), offsets, w.numel(), x.backend)  # one sentence: w = 0
        w = torch.where(chosen, w, several * (1 - w).clamp_min(0.0))
    ratio, fell_back = length_ratio(x, w, normalizer)
    weighted = ratio * x.sum_by((1 + w) * x.sentence_logratios, x.layout.response_offsets)
    rejected = x.pair(x.response_logratios if rejected_side == "whole" else weighted)[1]
    margins = beta * (x.pair(weighted)[0] - rejected)
    stats = x.reward_stats(beta, margins)
    stats["sentence_weights"] = w[x.layout.chosen_sentences]
    stats["sentence_logratios"] = x.sentence_logratios.detach()[x.layout.chosen_sentences]
    if fell_back is not None:
        stats["reward_fallback_share"] = x.pair(fell_back.to(margins.dtype))[0].mean()
    return Result(-F.logsigmoid(margins), stats)


# --- the same in one launch ---


def _fused(
    x: Inputs,
    ref_logps: Tensor,
    beta: float,
    alpha: float,
    normalizer: str,
    perplexity: str,
    perplexity_scale: str,
) -> Result:
    layout = x.layout
    losses, per_pair, per_sentence, _ = _aspo_forward(
        x.logps,
        ref_logps.detach(),
        None if x.similarity is None else x.similarity.detach(),
        layout.perplexity_mask,
        layout.sentence_offsets.contiguous(),  # the kernel reads adjacent numbers
        layout.response_offsets.contiguous(),
        layout.with_role(0),
        layout.with_role(1),
        layout.chosen_starts,
        layout.chosen_sentences.shape[0],
        beta,
        alpha,
        normalizer,
        perplexity,
        perplexity_scale,
        layout.num_responses == 2 * layout.num_items and not layout.padded,
        torch.is_grad_enabled() and x.logps.requires_grad,
    )
    margins, chosen_rewards, rejected_rewards, fell_back = per_pair.unbind(1)
    weights, log_ratios = per_sentence.unbind(1)
    stats = {
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "margins": margins,
        "sentence_weights": weights,
        "sentence_logratios": log_ratios,
    }
    if normalizer == "reward":
        stats["reward_fallback_share"] = fell_back.mean()
    return Result(losses, stats)


@torch.library.custom_op("aspo_kernels::aspo_forward", mutates_args=())
def _aspo_forward(
    logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,)
    similarity: Tensor | None,  # (S_chosen,)
    perplexity_mask: Tensor | None,  # (N,)
    sentence_offsets: Tensor,  # (S+1,)
    response_offsets: Tensor,  # (R+1,)
    chosen: Tensor,  # (B,)
    rejected: Tensor,  # (B,)
    chosen_starts: Tensor,  # (B,)
    num_chosen: int,  # S_chosen
    beta: float,
    alpha: float,
    normalizer: str,
    perplexity: str,
    perplexity_scale: str,
    complete: bool,  # every token belongs to a pair, every chosen sentence to a chosen response
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (B,); margin, chosen reward, rejected reward and fallback (B, 4); weight and log-ratio (S_chosen, 2);
    g_n = d loss_b / d logp_n (N,), or nothing without `with_gradient`. All fp32; only the losses are differentiable.
    """
    from aspo_kernels.triton_aspo import aspo_forward

    losses, per_pair, per_sentence, g = _outputs(logps, chosen, num_chosen, with_gradient)
    if not complete:  # what no pair holds is 0
        per_sentence.zero_()
        g.zero_()
    with op_context(logps):
        aspo_forward(
            logps, ref_logps, similarity, perplexity_mask, sentence_offsets, response_offsets, chosen, rejected,
            chosen_starts, (losses, per_pair, per_sentence, g if with_gradient else None),
            beta, alpha, normalizer, perplexity, perplexity_scale,
        )  # fmt: skip
    return losses, per_pair, per_sentence, g


def _outputs(
    logps: Tensor, chosen: Tensor, num_chosen: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs, num_tokens = chosen.shape[0], logps.shape[0] if with_gradient else 0
    shapes = ((pairs,), (pairs, 4), (num_chosen, 2), (num_tokens,))
    losses, per_pair, per_sentence, g = (logps.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return losses, per_pair, per_sentence, g


@_aspo_forward.register_fake
def _(logps, ref_logps, similarity, perplexity_mask, sentence_offsets, response_offsets, chosen, *rest):  # type: ignore[no-untyped-def]
    num_chosen, with_gradient = rest[2], rest[-1]
    return _outputs(logps, chosen, num_chosen, with_gradient)


@torch.library.custom_op("aspo_kernels::aspo_backward", mutates_args=())
def _aspo_backward(
    g: Tensor,  # (N,)
    upstream: Tensor,  # (B,)
    sentence_offsets: Tensor,
    response_offsets: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    complete: bool,
    dtype: torch.dtype,
) -> Tensor:
    """d_logps[n] = g[n] * upstream[pair of n].  (N,)."""
    from aspo_kernels.triton_aspo import aspo_backward

    d_logps = torch.empty_like(g, dtype=dtype)
    if not complete:
        d_logps.zero_()
    with op_context(g):
        aspo_backward(g, upstream, sentence_offsets, response_offsets, chosen, rejected, d_logps)
    return d_logps


@_aspo_backward.register_fake
def _(g, upstream, sentence_offsets, response_offsets, chosen, rejected, complete, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(g, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.complete, ctx.dtype = inputs[15], inputs[0].dtype
    ctx.save_for_backward(output[3], *inputs[4:8])


def _gradient(ctx: Any, upstream: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("aspo")
    d_logps = None if upstream is None else _aspo_backward(*_saved(ctx, upstream), ctx.complete, ctx.dtype)
    return d_logps, *[None] * 16


def _saved(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
    g, *where = ctx.saved_tensors
    return g, upstream, *where


_aspo_forward.register_autograd(_gradient, setup_context=_save)
