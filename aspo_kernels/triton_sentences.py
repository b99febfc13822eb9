"""A response's sentences in Triton, within one program: log-ratios, mean negative log-likelihoods, their ranges.

`triton_aspo` calls them. Sums are in fp64, each in an order that the offsets alone decide: bit-identical from run to
run. Axes: N tokens, S sentences; n and s run over a block of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefix_sums(
    logps_ptr, ref_ptr, mask_ptr, prefix_ptr, first, last, FROM_REFERENCE: tl.constexpr, BLOCK: tl.constexpr
):
    """prefix[n] = sums over tokens first..n of the log-ratio, of the nll's log-probabilities, of the tokens it counts.

    With them any cut into sentences costs the same, one sentence of 100,000 tokens or 100,000 of one. In fp64 their
    differences are good to 1e-8 at 100,000 tokens of -200. The reference is subtracted before anything is summed.
    """
    ratio_sum = tl.full((), 0.0, tl.float64)
    logp_sum = tl.full((), 0.0, tl.float64)
    count_sum = tl.full((), 0.0, tl.float64)
    for begin in range(first, last, BLOCK):
        offs_n = begin + tl.arange(0, BLOCK)
        mask_n = offs_n < last
        logp = tl.load(logps_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float64)
        ref = tl.load(ref_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float64)
        ratio = logp - ref
        if FROM_REFERENCE:
            logp = ref
        if mask_ptr is not None:
            counts = tl.load(mask_ptr + offs_n, mask=mask_n, other=0) != 0
            logp = tl.where(counts, logp, 0.0)
            count = counts.to(tl.float64)
            tl.store(prefix_ptr + 3 * offs_n + 2, count_sum + tl.cumsum(count), mask=mask_n)
            count_sum += tl.sum(count)
        tl.store(prefix_ptr + 3 * offs_n, ratio_sum + tl.cumsum(ratio), mask=mask_n)
        tl.store(prefix_ptr + 3 * offs_n + 1, logp_sum + tl.cumsum(logp), mask=mask_n)
        ratio_sum += tl.sum(ratio)
        logp_sum += tl.sum(logp)
    return ratio_sum


@triton.jit
def sentence_statistics(prefix_ptr, mask_ptr, sentence_offsets_ptr, offs_s, mask_s, first_token):
    """Of a block of sentences: log-ratios, mean negative log-likelihoods, lengths."""
    begin = tl.load(sentence_offsets_ptr + offs_s, mask=mask_s, other=0)
    end = tl.load(sentence_offsets_ptr + offs_s + 1, mask=mask_s, other=1)
    later = mask_s & (begin > first_token)
    last, before = prefix_ptr + 3 * (end - 1), prefix_ptr + 3 * (begin - 1)
    ratio = tl.load(last, mask=mask_s, other=0.0) - tl.load(before, mask=later, other=0.0)
    logp = tl.load(last + 1, mask=mask_s, other=0.0) - tl.load(before + 1, mask=later, other=0.0)
    length = (end - begin).to(tl.float64)
    counted = length
    if mask_ptr is not None:
        counted = tl.load(last + 2, mask=mask_s, other=0.0) - tl.load(before + 2, mask=later, other=0.0)
    return ratio, -logp / tl.maximum(counted, 1.0), length


@triton.jit
def sentence_ranges(
    prefix_ptr, mask_ptr, similarity_ptr, sentence_offsets_ptr, first_token, first_sentence, last_sentence,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Least and greatest mean negative log-likelihood and similarity of a response's sentences."""
    nll_low, nll_high = tl.full((BLOCK,), float("inf"), tl.float64), tl.full((BLOCK,), float("-inf"), tl.float64)
    similarity_low, similarity_high = nll_low, nll_high
    for begin in range(first_sentence, last_sentence, BLOCK):
        offs_s = begin + tl.arange(0, BLOCK)
        mask_s = offs_s < last_sentence
        _, nll, _ = sentence_statistics(prefix_ptr, mask_ptr, sentence_offsets_ptr, offs_s, mask_s, first_token)
        nll_low = tl.where(mask_s, tl.minimum(nll_low, nll), nll_low)
        nll_high = tl.where(mask_s, tl.maximum(nll_high, nll), nll_high)
        if similarity_ptr is not None:
            similarity = tl.load(similarity_ptr + offs_s - first_sentence, mask=mask_s, other=0.0).to(tl.float64)
            similarity_low = tl.where(mask_s, tl.minimum(similarity_low, similarity), similarity_low)
            similarity_high = tl.where(mask_s, tl.maximum(similarity_high, similarity), similarity_high)
    return tl.min(nll_low), tl.max(nll_high), tl.min(similarity_low), tl.max(similarity_high)


@triton.jit
def response_sum(logps_ptr, ref_ptr, first, last, BLOCK: tl.constexpr):
    """h(y) of the response that holds tokens first..last-1."""
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(first, last, BLOCK):
        offs_n = begin + tl.arange(0, BLOCK)
        logp = tl.load(logps_ptr + offs_n, mask=offs_n < last, other=0.0).to(tl.float64)
        total += logp - tl.load(ref_ptr + offs_n, mask=offs_n < last, other=0.0).to(tl.float64)
    return tl.sum(total)
