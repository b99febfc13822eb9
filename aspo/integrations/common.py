"""What the plug-ins share: running our forward inside a wrapped model, sentences of labelled tokens, a batch's loss.

ms-swift and LLaMA-Factory make the tokens themselves; a batch of theirs is rows of `input_ids` and `labels`, all chosen
responses and then all rejected ones, and the sentences are found again in the tokens.
Axes: B pairs, R = 2B rows, T padded length, N counted tokens, S sentences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aspo.meters import Meters, record
from aspo.model import base_model, output_head, trunk_hidden
from aspo.sentences import check_spans, sentences_without_tokens, split_sentences, token_sentences
from aspo_kernels import SentenceLayout, gather_hidden, objectives
from aspo_kernels.layout import IGNORE_INDEX

NOT_THE_TRUNKS = ("labels", "use_cache", "return_dict", "logits_to_keep")  # arguments that a trunk has no use for


@contextmanager
def forward_runs(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, a call of the model, however it is wrapped (PEFT, DDP, autocast), returns `function(**its arguments)`."""
    inner = base_model(model)
    own = vars(inner).get("forward")

    @functools.wraps(inner.forward)  # PEFT and ms-swift look at the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    inner.forward = forward
    try:
        yield
    finally:
        del inner.forward
        if own is not None:
            inner.forward = own


def labelled_logps(
    model: Any, unwrapped: Any, inputs: Mapping[str, Any], layout: SentenceLayout, backend: str
) -> Tensor:
    """(N,) log-probabilities of the layout's tokens, without logits. `model` is called, so that its wrappers act."""

    def run(**kwargs: Any) -> Tensor:
        hidden = trunk_hidden(unwrapped, {k: v for k, v in kwargs.items() if k not in NOT_THE_TRUNKS})
        return output_head(unwrapped).logps(gather_hidden(hidden, layout), layout.targets, backend)

    with forward_runs(unwrapped, run):
        return model(**inputs)


# ---- sentences of labelled tokens ----


class Scored(NamedTuple):
    """A chosen response's sentences: spans of its text without outer whitespace, and each one's similarity or None."""

    spans: list[tuple[int, int]]
    similarity: list[float] | None


def labelled_layout(
    labels: Tensor, tokenizer: Any, scored: Sequence[Scored | None]
) -> tuple[SentenceLayout, Tensor | None]:
    """The layout of (R, T) labels, which stand where their tokens are, and the similarities (S_chosen,) or None.

    scored: one entry for each chosen row; None = its sentences are cut here and have no similarity.
    Raises ValueError where rows with and without similarity meet, or spans do not fit the tokens' text.
    """
    sentence_ids = torch.zeros_like(labels)
    similarity: list[float] = []
    last = None
    for r, row in enumerate(labels):
        counted = torch.nonzero(row != IGNORE_INDEX).flatten()
        ids = row[counted].tolist()
        given = scored[r] if r < len(scored) else None
        sentences = _sentences(tokenizer, ids, given)
        sentence_ids[r, counted] = torch.tensor(sentences, dtype=labels.dtype)
        if given is not None and given.similarity is not None:
            similarity += given.similarity
        last = ids[-1] if ids and ids[-1] in _special_ids(tokenizer) else last
    with_similarity = sum(s is not None and s.similarity is not None for s in scored)
    if with_similarity not in (0, len(scored)):
        raise ValueError(f"{with_similarity} of {len(scored)} rows of a batch have similarities: score every row")
    none = labels.new_full((len(labels), 1), IGNORE_INDEX)
    targets = torch.cat([labels[:, 1:], none], dim=1)  # hidden[r, t] predicts the token at t + 1
    layout = SentenceLayout.from_labels(targets, sentence_ids.roll(-1, dims=1), last)
    return layout, torch.tensor(similarity, dtype=torch.float32) if with_similarity else None


def _sentences(tokenizer: Any, ids: list[int], given: Scored | None) -> list[int]:
    """The sentence of each token of a response."""
    text, offsets = token_offsets(tokenizer, ids)
    lead = len(text) - len(text.lstrip())
    text = text.strip()
    if not text:
        raise ValueError("a response has no text, or none of it is left by truncation: drop the row, or cut later")
    offsets = [tuple(min(max(x - lead, 0), len(text)) for x in offset) for offset in offsets]  # type: ignore[misc]
    try:
        spans = check_spans(text, given.spans if given is not None else split_sentences(text))
    except ValueError as error:
        raise ValueError(f"{error}; the response was read back from its tokens as ...{text[-40:]!r}") from error
    sentences = token_sentences(offsets, spans, text)
    missing = sentences_without_tokens(sentences, len(spans))
    if missing and given is not None and given.similarity is not None:
        words = text[slice(*spans[missing[0]])]
        raise ValueError(f"sentence {words!r} has no token of its own in this tokenizer: join it to the one before")
    rank = {s: n for n, s in enumerate(sorted(set(sentences)))}
    return [rank[s] for s in sentences]


def token_offsets(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """A response's text, up to its first special token, and the characters of each of its tokens there."""
    special = _special_ids(tokenizer)
    body = next((n for n, token in enumerate(ids) if token in special), len(ids))

    def decode(n: int) -> str:
        return tokenizer.decode(ids[:n], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    text = decode(body)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] == list(ids[:body]):
        offsets = [(a, b) for a, b in encoded["offset_mapping"]]
    else:  # tokens that this text alone would not give, e.g. behind a prompt: see where each one ends
        ends = [0, *(min(len(decode(n)), len(text)) for n in range(1, body + 1))]
        offsets = list(pairwise(ends))
    return text, offsets + [(len(text), len(text))] * (len(ids) - body)


def _special_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids) | {n for n, t in tokenizer.added_tokens_decoder.items() if t.special}


# ---- the objective ----


@dataclass(frozen=True)
class Settings:
    """The objective that a plug-in trains, its options without beta (the framework's), and the kernels' backend."""

    objective: objectives.Objective
    options: Mapping[str, Any]
    backend: str = "auto"

    @classmethod
    def make(
        cls, objective: str | Mapping[str, float] = "aspo", kernel_backend: str = "auto", **options: Any
    ) -> Settings:
        """objective: a name, or names with their weights. Raises ValueError for an option that it does not take."""
        if "beta" in options:
            raise ValueError(f"beta={options['beta']!r}: set the framework's own beta, which is the one that is used")
        members: Any = objective
        made = objectives.get(members) if isinstance(objective, str) else objectives.weighted_sum(members)
        made.check_options(options)
        pair = SentenceLayout.from_labels(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long))
        made(objectives.Inputs(pair, torch.zeros(2), torch.zeros(2), torch.zeros(1)), **options)  # refuses bad values
        return cls(made, options, kernel_backend)

    @property
    def needs_similarity(self) -> bool:
        """Whether rows without similarities would change what is trained."""
        return "alpha" in self.objective.options and self.options.get("alpha", self.objective.options["alpha"]) > 0

    def loss(
        self,
        layout: SentenceLayout,
        logps: Tensor,
        ref_logps: Tensor | None,
        similarity: Tensor | None,
        sample_weight: Tensor | None,
        beta: float,
    ) -> tuple[Tensor, dict[str, float]]:
        """The mean over pairs of sample_weight * loss, and the batch's metrics by TRL's names."""
        if similarity is None and self.needs_similarity:
            raise ValueError("the rows have no similarities: run `aspo score` on them, or set alpha=0 (ASPO-P)")
        given = objectives.Inputs(layout, logps, ref_logps, similarity, self.backend)
        options = {"beta": beta, **self.options} if "beta" in self.objective.options else self.options
        result = self.objective(given, **options)
        meters = Meters()
        record(meters, given, result)
        losses = result.losses if sample_weight is None else result.losses * sample_weight.to(result.losses)
        return losses.mean(), meters.drain()


def refuse(options: Any, ignored: Mapping[str, tuple[Any, str]], *, of: str) -> None:
    """ValueError for an option that is not at its default and that our loss would ignore. ignored: (default, why)."""
    for name, (default, why) in ignored.items():
        value = getattr(options, name, default)
        if value not in (default, None) and value:
            raise ValueError(f"{of} {name}={value!r} would be ignored: {why}")
