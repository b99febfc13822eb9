"""The whole of ASPO's objective as one Triton launch, one program a pair.  The specification: aspo_kernels.aspo.

Sums are in fp64, each in an order that the offsets alone decide: bit-identical from run to run.
Axes: N tokens, S sentences, R responses, B pairs; n and s run over a block of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aspo_kernels.triton_segments import launch_options
from aspo_kernels.triton_sentences import prefix_sums, response_sum, sentence_ranges, sentence_statistics

MIN_RANGE = tl.constexpr(1e-5)  # as in aspo_kernels.aspo
MIN_WEIGHTED_LOGRATIO = tl.constexpr(1e-6)


@triton.jit
def _scores(values, low, high, SCALE: tl.constexpr):
    """minmax(-v), or minmax(-exp(v)) for SCALE "ppl"; 0 where the range is <= MIN_RANGE.

    Above that range exp(x) - 1 in fp64 keeps eleven digits: no expm1 is needed, and nothing overflows.
    """
    spread = tl.maximum(high - low, MIN_RANGE)
    score = (high - values) / spread
    if SCALE == "ppl":
        score = (tl.exp(values - high) - 1) / (tl.exp(-spread) - 1)
    return tl.where(high - low > MIN_RANGE, score, 0.0)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), also where it is tiny: log1p(u) = log(1 + u) u / ((1 + u) - 1), and u where that is 0/0."""
    u = tl.exp(-tl.abs(x))
    rounded = 1 + u
    log1p = tl.where(rounded == 1, u, tl.log(rounded) * u / tl.where(rounded == 1, 1.0, rounded - 1))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _length_ratio(plain, weighted, gain, token_gain, sentences, tokens, NORMALIZER: tl.constexpr):
    """R_c / R_c*, and 1.0 where `reward` fell back to `sentence`.  See aspo_kernels.aspo.length_ratio."""
    ratio = sentences / gain
    fell_back = 0.0
    if NORMALIZER == "none":
        ratio = ratio * 0.0 + 1.0
    if NORMALIZER == "token":
        ratio = tokens / token_gain
    if NORMALIZER == "reward":
        usable = tl.abs(weighted) > MIN_WEIGHTED_LOGRATIO
        reward = plain / tl.where(usable, weighted, 1.0)
        unusable = (reward <= 0) | (usable == 0)
        ratio = tl.where(unusable, ratio, tl.minimum(tl.maximum(reward, 0.5), 1.0))
        fell_back = unusable.to(tl.float32)
    return ratio, fell_back


@triton.jit
def _chosen_gradient(
    g_ptr, weights_ptr, sentence_offsets_ptr, factor, first, last, first_sentence, last_sentence, BLOCK: tl.constexpr
):
    """g[n] = factor * (1 + w of n's sentence): the sentence is found by halving, for all tokens of a block at once."""
    widest = last_sentence - first_sentence
    step = widest * 0 + 1
    while step < widest:
        step = step * 2
    for begin in range(first, last, BLOCK):
        offs_n = begin + tl.arange(0, BLOCK)
        mask_n = offs_n < last
        s = tl.zeros((BLOCK,), tl.int64) + first_sentence  # the last one that begins at n or before
        half = step
        while half > 0:
            inside = s + half < last_sentence
            starts = tl.load(sentence_offsets_ptr + s + half, mask=inside, other=0)
            s = tl.where(inside & (starts <= offs_n), s + half, s)
            half = half >> 1
        weight = tl.load(weights_ptr + 2 * (s - first_sentence), mask=mask_n, other=0.0)
        tl.store(g_ptr + offs_n, (factor * (1 + weight)).to(tl.float32), mask=mask_n)


@triton.jit
def aspo_kernel(
    logps_ptr,  # (N,)
    ref_ptr,  # (N,)
    mask_ptr,  # (N,) uint8 or None: tokens of a sentence's perplexity
    similarity_ptr,  # (S_chosen,) or None
    sentence_offsets_ptr,  # (S+1,)
    response_offsets_ptr,  # (R+1,)
    chosen_ptr,  # (B,) the chosen response of each item
    rejected_ptr,  # (B,)
    starts_ptr,  # (B,) where the item's sentences begin in similarity and sentence_stats
    losses_ptr,  # (B,)
    pair_stats_ptr,  # (B, 4): margin, chosen reward, rejected reward, whether `reward` fell back
    sentence_stats_ptr,  # (S_chosen, 2): weight, log-ratio
    g_ptr,  # (N,) d loss_b / d logp_n, or None
    prefix_ptr,  # (N, 3) fp64 scratch
    beta,
    alpha,
    NORMALIZER: tl.constexpr,
    SCALE: tl.constexpr,
    FROM_REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything of ASPO's objective for pair b.  Grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    chosen, rejected = tl.load(chosen_ptr + b), tl.load(rejected_ptr + b)
    first_sentence, last_sentence = tl.load(response_offsets_ptr + chosen), tl.load(response_offsets_ptr + chosen + 1)
    first, last = tl.load(sentence_offsets_ptr + first_sentence), tl.load(sentence_offsets_ptr + last_sentence)
    start = tl.load(starts_ptr + b)
    h_chosen = prefix_sums(logps_ptr, ref_ptr, mask_ptr, prefix_ptr, first, last, FROM_REFERENCE, BLOCK)
    tl.debug_barrier()  # the prefix sums are read by other threads than wrote them

    if similarity_ptr is not None:
        similarity_ptr += start
    sentence_stats_ptr += 2 * start
    low, high, least, most = sentence_ranges(
        prefix_ptr, mask_ptr, similarity_ptr, sentence_offsets_ptr, first, first_sentence, last_sentence, BLOCK
    )
    gain = tl.zeros((BLOCK,), tl.float64)
    token_gain, weighted = gain, gain
    for begin in range(first_sentence, last_sentence, BLOCK):
        offs_s = begin + tl.arange(0, BLOCK)
        mask_s = offs_s < last_sentence
        ratio, nll, length = sentence_statistics(prefix_ptr, mask_ptr, sentence_offsets_ptr, offs_s, mask_s, first)
        weight = _scores(nll, low, high, SCALE)
        if similarity_ptr is not None:
            similarity = tl.load(similarity_ptr + offs_s - first_sentence, mask=mask_s, other=0.0).to(tl.float64)
            weight = alpha * _scores(-similarity, -most, -least, "nll") + (1 - alpha) * weight
        gain += tl.where(mask_s, 1 + weight, 0.0)
        token_gain += tl.where(mask_s, (1 + weight) * length, 0.0)
        weighted += tl.where(mask_s, (1 + weight) * ratio, 0.0)
        at = sentence_stats_ptr + 2 * (offs_s - first_sentence)
        tl.store(at, weight.to(tl.float32), mask=mask_s)
        tl.store(at + 1, ratio.to(tl.float32), mask=mask_s)
    h_weighted = tl.sum(weighted)
    sentences, tokens = (last_sentence - first_sentence).to(tl.float64), (last - first).to(tl.float64)
    ratio, fell_back = _length_ratio(
        h_chosen, h_weighted, tl.sum(gain), tl.sum(token_gain), sentences, tokens, NORMALIZER
    )

    first_rejected = tl.load(sentence_offsets_ptr + tl.load(response_offsets_ptr + rejected))
    last_rejected = tl.load(sentence_offsets_ptr + tl.load(response_offsets_ptr + rejected + 1))
    h_rejected = response_sum(logps_ptr, ref_ptr, first_rejected, last_rejected, BLOCK)
    margin = beta * (ratio * h_weighted - h_rejected)
    tl.store(losses_ptr + b, _softplus(-margin).to(tl.float32))
    tl.store(pair_stats_ptr + 4 * b, margin.to(tl.float32))
    tl.store(pair_stats_ptr + 4 * b + 1, (beta * h_chosen).to(tl.float32))
    tl.store(pair_stats_ptr + 4 * b + 2, (beta * h_rejected).to(tl.float32))
    tl.store(pair_stats_ptr + 4 * b + 3, fell_back)

    if g_ptr is not None:
        slope = beta / (1 + tl.exp(margin))  # beta sigmoid(-M*)
        tl.debug_barrier()  # the weights too
        factor = -slope * ratio
        _chosen_gradient(
            g_ptr, sentence_stats_ptr, sentence_offsets_ptr, factor, first, last, first_sentence, last_sentence, BLOCK
        )
        for begin in range(first_rejected, last_rejected, BLOCK):
            offs_n = begin + tl.arange(0, BLOCK)
            tl.store(g_ptr + offs_n, tl.zeros((BLOCK,), tl.float32) + slope.to(tl.float32), mask=offs_n < last_rejected)


@triton.jit
def aspo_backward_kernel(
    g_ptr,  # (N,)
    upstream_ptr,  # (B,)
    stride_upstream,
    sentence_offsets_ptr,
    response_offsets_ptr,
    chosen_ptr,
    rejected_ptr,
    out_ptr,  # (N,)
    BLOCK: tl.constexpr,
):
    """out[n] = g[n] * upstream[pair of n].  Grid (B, 2): the chosen response and the rejected one."""
    b = tl.program_id(0).to(tl.int64)
    is_rejected = tl.program_id(1)
    response = tl.where(is_rejected == 1, tl.load(rejected_ptr + b), tl.load(chosen_ptr + b))
    first = tl.load(sentence_offsets_ptr + tl.load(response_offsets_ptr + response))
    last = tl.load(sentence_offsets_ptr + tl.load(response_offsets_ptr + response + 1))
    upstream = tl.load(upstream_ptr + b * stride_upstream)
    for begin in range(first, last, BLOCK):
        offs_n = begin + tl.arange(0, BLOCK)
        mask_n = offs_n < last
        product = tl.load(g_ptr + offs_n, mask=mask_n, other=0.0) * upstream
        tl.store(out_ptr + offs_n, product.to(out_ptr.dtype.element_ty), mask=mask_n)


def registers(logps: Tensor) -> dict[str, int]:
    """On NVIDIA, all the registers a thread can have: left alone, ptxas spills a few bytes to fit more blocks on an SM,
    and there are never more blocks than pairs. Other back ends do not know the option.
    """
    return {"maxnreg": 255} if logps.device.type == "cuda" and torch.version.hip is None else {}


def aspo_forward(
    logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,)
    similarity: Tensor | None,  # (S_chosen,)
    perplexity_mask: Tensor | None,  # (N,) bool
    sentence_offsets: Tensor,  # (S+1,)
    response_offsets: Tensor,  # (R+1,)
    chosen: Tensor,  # (B,)
    rejected: Tensor,  # (B,)
    chosen_starts: Tensor,  # (B,)
    out: tuple[Tensor, Tensor, Tensor, Tensor | None],  # fp32: losses, pair_stats, sentence_stats, g
    beta: float,
    alpha: float,
    normalizer: str,
    perplexity: str,
    perplexity_scale: str,
) -> None:
    """Fill `out`; its entries that belong to no pair stay as they are.  See aspo_kernel."""
    if not chosen.numel():
        return
    mask = None if perplexity_mask is None else perplexity_mask.contiguous().view(torch.uint8)
    aspo_kernel[(chosen.numel(),)](
        logps.contiguous(), ref_logps.contiguous(), mask, None if similarity is None else similarity.contiguous(),
        sentence_offsets, response_offsets, chosen, rejected, chosen_starts, *out,
        logps.new_empty(logps.numel(), 3, dtype=torch.float64), beta, alpha, NORMALIZER=normalizer,
        SCALE=perplexity_scale, FROM_REFERENCE=perplexity == "reference", **registers(logps), **launch_options(),
    )  # fmt: skip


def aspo_backward(
    g: Tensor,  # (N,)
    upstream: Tensor,  # (B,)
    sentence_offsets: Tensor,
    response_offsets: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    out: Tensor,  # (N,)
) -> None:
    """Fill `out` with g[n] * upstream[pair of n]; entries that belong to no pair stay as they are."""
    if chosen.numel():
        aspo_backward_kernel[(chosen.numel(), 2)](
            g, upstream, upstream.stride(0), sentence_offsets, response_offsets, chosen, rejected, out,
            **launch_options(),
        )  # fmt: skip
