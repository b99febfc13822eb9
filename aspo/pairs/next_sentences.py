"""Candidates for an answer's next sentence and how well each fits the image: what CSR and SENTINEL are made of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from aspo.data import load_images, row_name
from aspo.folder import image_entries
from aspo.generation import NextSentence, generate_sentences
from aspo.model import response_logps
from aspo.pairs import Load, Options, Row
from aspo.prompts import named
from aspo.scorers import Scorer
from aspo.sentences import Splitter, split_sentences
from aspo.validate import IMAGE_PLACEHOLDER
from aspo_kernels.segments import segment_sum

OPTIONS = {  # of both methods
    "model": None,
    "scorer": None,
    "engine": "transformers",
    "candidates": 5,
    "max_sentences": 16,
    "max_new_tokens": 64,
    "temperature": 1.0,
    "language": "en",
    "seed": 0,
    "batch_size": 16,
    "dtype": "float32",
    "device": None,
}
ENGINES = ("transformers", "vllm")


class Candidate(NamedTuple):
    """A sampled next sentence, with the whitespace in front of it, and its mean log-probability per token.

    ends: the answer ends with it. `logp` is taken at temperature 1 without the end-of-turn token; None where it was not
    asked for, 0 for a sentence without text.
    """

    text: str
    ends: bool
    logp: float | None


class Sampler(Protocol):
    """Samples next sentences."""

    def candidates(
        self, rows: Sequence[Row], beginnings: Sequence[str], count: int, seed: int
    ) -> list[list[Candidate]]:
        """`count` samples or fewer behind each row's beginning.

        Texts that were cut off, or say "<image>", are left out; of equal ones the first is kept.
        """


def check(rows: Sequence[Row], options: Options) -> None:
    """What both methods ask of their rows and options."""
    split_sentences(".", options["language"])  # an unknown language stops here
    if options["engine"] not in ENGINES:
        raise ValueError(f"--engine is {options['engine']!r}; it must be one of {', '.join(ENGINES)}")
    if options["temperature"] <= 0:
        raise ValueError(
            f"--temperature is {options['temperature']:g}; next sentences are sampled, so it must be above 0"
        )
    for row in rows:
        if (images := len(image_entries(row))) > 1:
            raise ValueError(f"{row_name(row)}: it has {images} images; sentences are judged against exactly one")


def load_sampler(options: Options, load: Load, with_logps: bool) -> Sampler:
    """The sampler of --engine."""
    if options["engine"] == "vllm":
        from aspo.pairs.vllm_sampler import VllmSampler

        return VllmSampler(options, with_logps)
    return TransformersSampler(*load(), options, with_logps)


def step_seed(seed: int, start: int, step: int) -> int:
    """Of one step's samples: from the run's seed, the batch's place and the step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{start}/{step}".encode()).digest()[:4])


def distinct(sentences: Sequence[NextSentence]) -> list[NextSentence]:
    """Those that are complete and hold no image mark, each text once with an end behind it and once without."""
    found: dict[tuple[str, bool], NextSentence] = {}
    for sentence in sentences:
        if sentence.complete and IMAGE_PLACEHOLDER not in sentence.text:
            found.setdefault((sentence.text.strip(), sentence.ends), sentence)
    return [*found.values()]


@dataclass(frozen=True)
class TransformersSampler:
    """A `Sampler` that samples with `generate` and reads log-probabilities teacher-forced, without logits."""

    model: torch.nn.Module
    processor: Any
    options: Options
    with_logps: bool

    def candidates(
        self, rows: Sequence[Row], beginnings: Sequence[str], count: int, seed: int
    ) -> list[list[Candidate]]:
        """See `Sampler`."""
        splitter = splitter_of(self.options)
        sentences = generate_sentences(
            self.model,
            self.processor,
            [row for row in rows for _ in range(count)],
            [beginning for beginning in beginnings for _ in range(count)],
            seed=seed,
            splitter=splitter,
            **{name: self.options[name] for name in ("max_new_tokens", "temperature", "batch_size")},
        )
        kept = [distinct(sentences[n * count : (n + 1) * count]) for n in range(len(rows))]
        logps = self._logps(rows, beginnings, kept) if self.with_logps else {}
        return [
            [Candidate(s.text, s.ends, logps.get((n, s.text), 0.0) if self.with_logps else None) for s in of_row]
            for n, of_row in enumerate(kept)
        ]

    def _logps(
        self, rows: Sequence[Row], beginnings: Sequence[str], kept: Sequence[Sequence[NextSentence]]
    ) -> dict[tuple[int, str], float]:
        """(row, text) -> the sentence's mean log-probability per token."""
        asked = [(n, s.text) for n, of_row in enumerate(kept) for s in of_row if s.text]
        values = last_sentence_logps(
            self.model,
            self.processor,
            [rows[n] for n, _ in asked],
            [beginnings[n] for n, _ in asked],
            [text for _, text in asked],
            self.options["batch_size"],
        )
        return dict(zip(asked, values, strict=True))


def last_sentence_logps(
    model: torch.nn.Module,
    processor: Any,
    rows: Sequence[Row],
    beginnings: Sequence[str],
    sentences: Sequence[str],
    batch_size: int,
) -> Iterator[float]:
    """Mean log-probability per token of each sentence behind its beginning, the end-of-turn token left out."""
    whole = []
    for row, beginning, sentence in zip(rows, beginnings, sentences, strict=True):
        text = beginning + sentence
        spans = [[0, len(beginning)], [len(beginning), len(text)]] if beginning else [[0, len(text)]]
        asked = {name: row[name] for name in ("id", "prompt", "images") if row.get(name) is not None}
        whole.append({**asked, "chosen": text, "chosen_sentences": spans})
    for batch in response_logps(model, processor, whole, batch_size=batch_size, responses=("chosen",)):
        layout = batch.layout
        counted = torch.ones_like(batch.logps) if layout.perplexity_mask is None else layout.perplexity_mask.float()
        sums = segment_sum(batch.logps * counted, layout.sentence_offsets)
        lengths = segment_sum(counted, layout.sentence_offsets)
        last = layout.response_offsets[1:] - 1
        yield from (sums / lengths.clamp_min(1))[last].tolist()


def splitter_of(options: Options) -> Splitter:
    """The splitter of --language."""
    return lambda text: split_sentences(text, options["language"])


class Similarity:
    """Cosines of sentences with the image of a row; each image and each sentence of a batch is encoded once."""

    def __init__(self, scorer: Scorer, rows: Sequence[Row]) -> None:
        self.scorer, self.rows = scorer, {row["id"]: row for row in rows}
        pictures = [named(row, load_images, row)[0] for row in rows]
        self._images = dict(zip(self.rows, scorer.image_features(pictures), strict=True)) if rows else {}
        self._known: dict[tuple[str, str], float] = {}

    def __call__(self, sentences: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], float]:
        """id of a row -> sentences; returns (id, sentence) -> cosine. Raises ValueError where one is not finite."""
        asked = [(name, text) for name, texts in sentences.items() for text in texts]
        wanted = [pair for pair in asked if pair not in self._known]
        texts = list(dict.fromkeys(text for _, text in wanted))
        features = dict(zip(texts, self.scorer.text_features(texts), strict=True)) if texts else {}
        for name, text in wanted:
            value = float(self._images[name] @ features[text])
            if not math.isfinite(value):
                raise ValueError(f"{row_name(self.rows[name])}: the similarity of {text!r} to its image is {value}")
            self._known[name, text] = value
        return {pair: self._known[pair] for pair in asked}
