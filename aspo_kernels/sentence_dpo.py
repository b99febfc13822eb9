"""`sentence_dpo_loss`: ASPO from hidden states (or from logits) to the loss, in one call.

hidden states -> per-token log-probabilities -> sentence log-ratios -> weighted margin -> loss. The first arrow is
`linear_logps`, the rest is the objective "aspo".
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aspo_kernels.aspo import aspo
from aspo_kernels.aspo import check_options as check_aspo_options
from aspo_kernels.checks import check_head
from aspo_kernels.layout import SentenceLayout
from aspo_kernels.linear_logps import Lora, policy_and_reference_logps
from aspo_kernels.objectives import Inputs
from aspo_kernels.sequence import SequenceShard
from aspo_kernels.tiles import Epilogue
from aspo_kernels.token_logps import gathered_token_logps
from aspo_kernels.vocabulary import VocabularyShard, gather_if_frozen

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class SentenceDPOOutput:
    """What `sentence_dpo_loss` returns; everything but `loss` is detached.

    loss: scalar, or (B,) with reduction="none". margins: (B,) M*. chosen_rewards, rejected_rewards: (B,) plain
    beta * h. sentence_weights, sentence_logratios: (S_chosen,). logps: (N,). reward_fallback_share: 0-d, the share of
    chosen responses for which normalizer="reward" fell back to "sentence"; None for the other normalisers.
    """

    loss: Tensor
    margins: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    sentence_weights: Tensor
    sentence_logratios: Tensor
    logps: Tensor
    reward_fallback_share: Tensor | None = None


def sentence_dpo_loss(
    hidden: Tensor,
    head: Tensor,
    layout: SentenceLayout,
    *,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    similarity: Tensor | None = None,
    sentence_weights: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.5,
    normalizer: str = "sentence",
    perplexity: str = "policy",
    perplexity_scale: str = "ppl",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    lora: Lora | None = None,
    vocabulary: VocabularyShard | None = None,
    sequence: SequenceShard | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    memory_budget: int | None = None,
    validate: bool = False,
) -> SentenceDPOOutput:
    """ASPO's loss: -log sigmoid((R_c / R_c*) sum_i beta (1 + w_i) h(s_i^c) - beta h(y_r)).  (arXiv 2505.19100)

    Args:
        hidden: (R, T, H) last hidden states of the policy, or (N, H) rows already gathered in the layout's order.
        head: (V, H) output embedding.
        layout: which tokens count and how they group; on hidden's device.
        ref_hidden, ref_head, ref_bias: the reference's hidden states (shaped like `hidden`) and its head, by default
            the policy's without its LoRA; no gradient ever reaches them. Where the heads are the same, each slice of
            it is read once for both. Or
        ref_logps: (N,) fp32, the reference's log-probabilities from a cache.
        similarity: (S_chosen,) raw cosine of each chosen sentence with the image, row after row; None = ASPO-P,
            whatever alpha is.
        sentence_weights: (S_chosen,) the weights w_i themselves, from any source, 0 or more, in place of computed ones;
            alpha, similarity and the perplexity options are then left alone.
        beta: strength of the margin. alpha: share of similarity in the weights, 1 = ASPO-S, 0 = ASPO-P.
        normalizer: R_c / R_c*: "sentence" K / sum(1 + w), "token", "none", or "reward".
        perplexity: whose perplexity weighs, "policy" (this step's forward) or "reference".
        perplexity_scale: "ppl" or "nll" (one outlier flattens "ppl" scores).
        bias, logit_scale, softcap, temperature, lora, vocabulary, backend, memory_budget, validate: as in
            `linear_logps`.
        sequence: which of the layout's tokens this process has the hidden states of, where they are spread over
            processes: hidden and ref_hidden are then (R, T_local, H), or (n, H) of those tokens. All else is the whole
            batch's, the same in every process, and so is the result; a process gets the gradients of its own tokens.
        reduction: over pairs, "mean", "sum" or "none" -> (B,).

    Raises:
        ValueError: wrong shapes, dtypes, devices or options; an empty chosen or rejected response; on the CPU also
            targets outside the vocabulary and values that are not finite. Each names the value and the fix.

    With no pairs the loss is a connected zero.
    """
    options: dict[str, Any] = {
        "beta": beta, "alpha": alpha, "normalizer": normalizer, "perplexity": perplexity,
        "perplexity_scale": perplexity_scale,
    }  # fmt: skip
    alike = {"layout": layout, "ref_logps": ref_logps, "similarity": similarity, "sentence_weights": sentence_weights}
    with nullcontext() if sequence is None else sequence.together(validate, **alike, **options, reduction=reduction):
        _check_call(reduction, (ref_hidden is None) == (ref_logps is None), "ref_hidden or ref_logps", layout)
        check_aspo_options(**options)
        if ref_logps is not None and (ref_head is not None or ref_bias is not None):
            raise ValueError("ref_head and ref_bias belong to ref_hidden; with ref_logps leave them out")
        if validate:
            layout.validate()
        logps, live_ref_logps = _both_logps(
            hidden, ref_hidden, head, ref_head, bias, ref_bias, layout, Epilogue(logit_scale, softcap, temperature),
            lora, vocabulary, sequence, backend, memory_budget, validate,
        )  # fmt: skip
    both = (logps,) if live_ref_logps is None else (logps, live_ref_logps)
    logps, *live = both if sequence is None else sequence.whole(*both, validate=validate)
    ref_logps = live[0] if live else ref_logps
    return _loss(layout, logps, ref_logps, similarity, sentence_weights, reduction, backend, **options)


def _both_logps(
    hidden: Tensor,
    ref_hidden: Tensor | None,
    head: Tensor,
    ref_head: Tensor | None,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    layout: SentenceLayout,
    epilogue: Epilogue,
    lora: Lora | None,
    vocabulary: VocabularyShard | None,
    sequence: SequenceShard | None,
    backend: str,
    memory_budget: int | None,
    validate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Of the policy, and of the reference where ref_hidden is given; with `sequence` of this process's tokens."""
    own_head = ref_head is None and (ref_bias is None or ref_bias is bias)
    same_head = lora is None and (own_head or (ref_head is head and ref_bias is bias))
    if ref_hidden is not None and ref_head is None and not same_head and vocabulary is None:  # two passes over one head
        head, bias = gather_if_frozen("head", head), gather_if_frozen("bias", bias)
    rows = _rows(hidden, layout, sequence, "hidden")
    ref_rows = None if ref_hidden is None else _rows(ref_hidden.detach(), layout, sequence, "ref_hidden")
    targets = layout.targets if sequence is None else sequence.local(layout.targets)
    if ref_rows is not None and not torch.is_autocast_enabled(hidden.device.type):  # which makes them alike
        check_head(ref_rows, head if ref_head is None else ref_head, ref_bias, "ref_hidden")
    logps, ref_logps = policy_and_reference_logps(
        rows, ref_rows if same_head else None, head, targets, bias, epilogue, lora, vocabulary, backend,
        memory_budget, validate,
    )  # fmt: skip
    if ref_rows is not None and not same_head:
        if ref_head is None:
            ref_head, ref_bias = head, bias if ref_bias is None else ref_bias
        with torch.no_grad():
            ref_logps, _ = policy_and_reference_logps(
                ref_rows, None, ref_head, targets, ref_bias, epilogue, None, vocabulary, backend, memory_budget,
                validate,
            )  # fmt: skip
    return logps, ref_logps


def sentence_dpo_loss_from_logits(
    logits: Tensor,
    layout: SentenceLayout,
    *,
    ref_logits: Tensor | None = None,
    ref_logps: Tensor | None = None,
    similarity: Tensor | None = None,
    sentence_weights: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.5,
    normalizer: str = "sentence",
    perplexity: str = "policy",
    perplexity_scale: str = "ppl",
    temperature: float = 1.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> SentenceDPOOutput:
    """`sentence_dpo_loss` for a trainer that has logits already: logits and ref_logits are (R, T, V).

    inplace_backward: the backward writes the gradient over the logits, see `token_logps`. The other arguments, the
    result and the errors are `sentence_dpo_loss`'s.
    """
    _check_call(reduction, (ref_logits is None) == (ref_logps is None), "ref_logits or ref_logps", layout)
    check_aspo_options(beta, alpha, normalizer, perplexity, perplexity_scale)
    if validate:
        layout.validate()
    rows, targets = layout.hidden_index, layout.targets
    _check_logits(logits, layout)
    logps = gathered_token_logps(
        logits, rows, targets, temperature, validate, inplace_backward=inplace_backward, backend=backend
    )
    if ref_logits is not None:
        _check_logits(ref_logits, layout, "ref_logits")
        with torch.no_grad():
            ref_logps = gathered_token_logps(ref_logits, rows, targets, temperature, backend=backend)
    return _loss(
        layout, logps, ref_logps, similarity, sentence_weights, reduction, backend, beta=beta, alpha=alpha,
        normalizer=normalizer, perplexity=perplexity, perplexity_scale=perplexity_scale,
    )  # fmt: skip


def gather_hidden(hidden: Tensor, layout: SentenceLayout, name: str = "hidden") -> Tensor:
    """The hidden states that predict the counted tokens: (R, T, H) -> (N, H); (N, H) is returned as it is.

    Indexing, not index_select: its backward sums duplicated rows in a fixed order on every device.
    """
    if layout.targets.device != hidden.device:
        raise ValueError(
            f"the layout is on {layout.targets.device} but {name} on {hidden.device}: use layout.to(device)"
        )
    if hidden.dim() == 2 and hidden.shape[0] == layout.num_tokens:
        return hidden
    if hidden.dim() != 3 or hidden.shape[0] * hidden.shape[1] < layout.hidden_rows:
        raise ValueError(
            f"{name} must be (R, T, H) with at least {layout.hidden_rows} rows in all, or ({layout.num_tokens}, H) "
            f"already gathered; got {tuple(hidden.shape)}"
        )
    _check_padded_shape(hidden, layout, name)
    return hidden.flatten(0, 1)[layout.hidden_index]


def _rows(hidden: Tensor, layout: SentenceLayout, sequence: SequenceShard | None, name: str) -> Tensor:
    """(N, H), or (n, H) of a SequenceShard's tokens."""
    return gather_hidden(hidden, layout, name) if sequence is None else sequence.local_rows(hidden, name)


def _check_logits(logits: Tensor, layout: SentenceLayout, name: str = "logits") -> None:
    if logits.dim() != 3 or not logits.is_floating_point() or logits.shape[0] * logits.shape[1] < layout.hidden_rows:
        raise ValueError(
            f"{name} must be floating point (R, T, V) with at least {layout.hidden_rows} rows in all; got "
            f"{logits.dtype} {tuple(logits.shape)}"
        )
    if layout.targets.device != logits.device:
        raise ValueError(
            f"the layout is on {layout.targets.device} but {name} on {logits.device}: use layout.to(device)"
        )
    _check_padded_shape(logits, layout, name)


def _check_padded_shape(padded: Tensor, layout: SentenceLayout, name: str) -> None:
    """(R, T) must be the labels': with another T every row after the first would be read too early or late."""
    if layout.padded_shape is not None and padded.shape[:2] != layout.padded_shape:
        raise ValueError(
            f"{name} is {tuple(padded.shape)} but the layout's labels were {layout.padded_shape}: labels[r, t] is the "
            f"token that {name}[r, t] predicts, so their (R, T) must be the same"
        )


def _check_call(reduction: str, both_or_neither: bool, one_of: str, layout: SentenceLayout) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; choose one of {', '.join(REDUCTIONS)}")
    if both_or_neither:
        raise ValueError(f"pass exactly one of {one_of}")
    layout.require_nonempty()


def _loss(
    layout: SentenceLayout,
    logps: Tensor,
    ref_logps: Tensor | None,
    similarity: Tensor | None,
    sentence_weights: Tensor | None,
    reduction: str,
    backend: str,
    **options: Any,
) -> SentenceDPOOutput:
    given = None
    if sentence_weights is not None:
        if sentence_weights.shape != layout.chosen_sentences.shape:
            raise ValueError(
                f"sentence_weights must be {tuple(layout.chosen_sentences.shape)}, one for each chosen sentence, got "
                f"{tuple(sentence_weights.shape)}"
            )
        looks = sentence_weights.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and bool((sentence_weights < 0).any()):
            raise ValueError(f"sentence_weights holds {float(sentence_weights.min())}; weights must be 0 or more")
        given = sentence_weights.new_zeros(layout.num_sentences).index_put((layout.chosen_sentences,), sentence_weights)
        options["weights"] = "given"
    inputs = Inputs(layout, logps, ref_logps, similarity, backend, sentence_weights=given)
    if layout.num_items == 0:
        none = logps[:0]  # what a padded layout has behind its end belongs to no pair
        zero, none = none.sum(), none.detach()  # of no tokens: a zero that the backward can start from
        return SentenceDPOOutput(zero + none if reduction == "none" else zero, *[none] * 6)
    result = aspo(inputs, **options)
    loss = result.losses if reduction == "none" else getattr(result.losses, reduction)()
    return SentenceDPOOutput(loss=loss, logps=logps.detach(), **result.stats)
