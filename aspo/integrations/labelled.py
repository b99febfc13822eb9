"""Sentences for trainers that make the tokens themselves: found again in a batch's labelled tokens.

A batch of ms-swift's or LLaMA-Factory's is rows of `input_ids` and `labels`, all chosen responses and then all rejected
ones. Axes: R rows, T padded length, S sentences.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aspo.folder import load_images
from aspo.sentences import check_spans, sentences_without_tokens, split_sentences, token_sentences
from aspo.validate import response_text
from aspo_kernels import SentenceLayout
from aspo_kernels.layout import IGNORE_INDEX


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


class ScoredRows:
    """Sentences and similarities of chosen answers, found by text and, where answers repeat, by their images.

    rows: as `aspo score` writes them (chosen, chosen_sentences, chosen_similarity, images).
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            self._rows[response_text(row["chosen"]).strip()].append(row)

    def find(self, text: str, images: Any) -> Scored:
        """The scored sentences of an answer about these images. Raises ValueError where there are none, or several."""
        found = self._rows.get(text.strip(), [])
        if not found:
            raise ValueError(
                f"no scored row has the chosen answer {text[:60]!r}...: score the rows that are trained on, and raise "
                "cutoff_len if it cuts answers"
            )
        scores = {self._scored(row) for row in found}
        if len(scores) > 1:
            keys = _image_keys({"images": images})
            scores = {self._scored(row) for row in found if _image_keys(row) == keys}
        if len(scores) != 1:
            raise ValueError(
                f"{len(found)} scored rows have the chosen answer {text[:60]!r}..., none with just its image"
            )
        spans, similarity = scores.pop()
        return Scored(list(spans), None if similarity is None else list(similarity))

    @staticmethod
    def _scored(row: Mapping[str, Any]) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...] | None]:
        text, similarity = response_text(row["chosen"]), row.get("chosen_similarity")
        lead, end = len(text) - len(text.lstrip()), len(text.strip())
        spans = tuple((max(a - lead, 0), min(b - lead, end)) for a, b in row["chosen_sentences"])
        return spans, None if similarity is None else tuple(similarity)


def _image_keys(row: Mapping[str, Any]) -> list[str]:
    images = load_images(row)
    return [hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest() for image in images]
