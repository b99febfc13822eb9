"""The verifier of token rewards: how well an object word fits the image, and what such a similarity is worth.

    s = cos(text("a word"), image)          one number for a whole object word, its sub-words share it
    r = (s - mu_c) / scale                  where s >= mu_c + margin
        (s - mu_h) / scale                  where s <= mu_h - margin
        0                                   between the two, and for every other token

mu_c and mu_h are the mean similarities of right and of hallucinated object words on rows set apart (calibration), scale
their pooled standard deviation. In the manner of FiSAO (arXiv 2410.14148), whose reward equations could not be read in
full: this piecewise form is ours. docs/fisao.md has the rest.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from aspo.folder import image_entries, load_images, row_name
from aspo.model import inference
from aspo.policy import vision_tower
from aspo.prompts import named
from aspo.rewards.object_words import ObjectVocabulary, ObjectWord
from aspo.scorers import Scorer

BARE_WORD = "{}"
WORLD_TEMPLATE = "The {}"
"""The embedded CLIP's tokenizer has a token for a word behind a space only; alone, "circle" falls apart into pieces
that its text tower never read in training, and nothing separates (docs/fisao.md)."""
SAME_FEATURES = 0.02  # of their norm: what another dtype or attention kernel may change; another tower is far above
Row = Mapping[str, Any]


@dataclass(frozen=True)
class ScoredWord:
    """An object word of a text and its similarity to the image."""

    word: ObjectWord
    score: float


@dataclass(frozen=True)
class Verifier:
    """Finds the object words of texts and scores them against images.

    template: what the text tower reads, "{}" standing for the word (its vocabulary entry: singular, spelled right).
    """

    scorer: Scorer
    vocabulary: ObjectVocabulary
    template: str = BARE_WORD

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(f'template is {self.template!r}; it must hold "{{}}" once, the place of the word')

    @cached_property
    def _word_features(self) -> dict[str, Tensor]:
        entries = self.vocabulary.entries
        features = self.scorer.text_features([self.template.replace("{}", entry) for entry in entries])
        return dict(zip(entries, features, strict=True))

    def words(self, row: Row, text: str) -> list[ObjectWord]:
        """The object words of a text that can be scored: those of a row without an image cannot.

        Raises ValueError where there are some and the row has several images.
        """
        count = len(image_entries(row))
        found = self.vocabulary.words(text, fuzzy=True) if count else []
        if found and count > 1:
            raise ValueError(f"{row_name(row)}: it has {count} images; words are scored against one")
        return found

    def scores(self, rows: Sequence[Row], texts: Sequence[Sequence[str]]) -> list[list[list[ScoredWord]]]:
        """The scored object words of each text of each row; every image is encoded once.

        A row without an image has none. Raises ValueError as `words` does, and for a similarity that is not finite.
        """
        words = [[self.words(row, text) for text in of_row] for row, of_row in zip(rows, texts, strict=True)]
        wanted = [n for n, of_row in enumerate(words) if any(of_row)]
        if not wanted:
            return [[[] for _ in of_row] for of_row in words]
        images = self.scorer.image_features([named(rows[n], load_images, rows[n])[0] for n in wanted])
        of_image = dict(zip(wanted, images, strict=True))
        scored: list[list[list[ScoredWord]]] = []
        for n, of_row in enumerate(words):
            scored.append([[self._score(rows[n], word, of_image[n]) for word in found] for found in of_row])
        return scored

    def _score(self, row: Row, word: ObjectWord, image: Tensor) -> ScoredWord:
        value = float(self._word_features[word.entry] @ image)
        if not math.isfinite(value):
            raise ValueError(
                f"{row_name(row)}: the similarity of {word.entry!r} to its image is {value}; check the image and the "
                "scorer's weights"
            )
        return ScoredWord(word, value)


@dataclass(frozen=True)
class Calibration:
    """What similarities are worth: the two baselines, the scale, and what they were measured on.

    auc: share of (right, hallucinated) words where the right one scores higher. counts: answers and words.
    scorer, template, vocabulary: what makes a verifier that gives such scores; identity: of the scorer's weights.
    image_tower: `compare_towers`, or None.
    """

    mu_correct: float
    mu_hallucinated: float
    scale: float
    margin: float
    auc: float
    counts: dict[str, int]
    scorer: str = ""
    identity: str = ""
    template: str = BARE_WORD
    vocabulary: tuple[str, ...] = ()
    image_tower: dict[str, Any] | None = None

    def reward(self, score: float) -> float:
        """r of one object word (the module's formula)."""
        if score >= self.mu_correct + self.margin:
            return (score - self.mu_correct) / self.scale
        if score <= self.mu_hallucinated - self.margin:
            return (score - self.mu_hallucinated) / self.scale
        return 0.0

    def spans(self, words: Sequence[ScoredWord]) -> list[tuple[int, int, float]]:
        """[start, end, r] of object words: what `<column>_token_scores` holds."""
        return [(scored.word.start, scored.word.end, self.reward(scored.score)) for scored in words]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Read calibration.json. Raises ValueError where it is none."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return Calibration(**{**values, "vocabulary": tuple(values["vocabulary"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no calibration of `aspo rewards --method fisao`: {error}") from error


def calibrate(correct: Sequence[float], hallucinated: Sequence[float], margin: float = 0.0) -> Calibration:
    """The baselines of two lists of similarities.

    Raises ValueError where one is empty, where the verifier does not separate (mu_c <= mu_h), or nothing varies.
    """
    if margin < 0 or not math.isfinite(margin):
        raise ValueError(f"margin is {margin}; it must be a finite number, 0 or more")
    counts = {"correct": len(correct), "hallucinated": len(hallucinated)}
    for kind, values in (("correct", correct), ("hallucinated", hallucinated)):
        if len(values) < 2:
            raise ValueError(
                f"{len(values)} {kind} object words were found in the calibration answers ({counts['correct']} "
                f"correct, {counts['hallucinated']} hallucinated); two of each are the least: give more calibration "
                "rows, or check the object vocabulary against the answers"
            )
    mu_c, mu_h, area = statistics.fmean(correct), statistics.fmean(hallucinated), auc(correct, hallucinated)
    if not mu_c > mu_h:
        raise ValueError(
            f"the verifier does not separate: the mean similarity is {mu_c:.4f} for {counts['correct']} correct object "
            f"words and {mu_h:.4f} for {counts['hallucinated']} hallucinated ones (AUC {area:.3f}); take another "
            "scorer, or another template for the words"
        )
    squares = sum((x - mu_c) ** 2 for x in correct) + sum((x - mu_h) ** 2 for x in hallucinated)
    scale = math.sqrt(squares / (len(correct) + len(hallucinated) - 2))
    if scale <= 1e-8:
        raise ValueError(f"the similarities of the calibration do not vary (standard deviation {scale:.1g})")
    return Calibration(mu_c, mu_h, scale, margin, area, counts)


def ranks(values: Sequence[float]) -> Tensor:
    """(n,) fp64, each value's rank from 1 on; equal values share the mean of their ranks."""
    _, place, count = torch.tensor(values, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[place]


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """Share of (right, wrong) pairs where the right one is higher, ties counting half; NaN where one is empty."""
    if not right or not wrong:
        return math.nan
    wins = ranks([*right, *wrong])[: len(right)].sum() - len(right) * (len(right) + 1) / 2
    return float(wins / (len(right) * len(wrong)))


def check_answerable(rows: Iterable[Row], fewest: int = 0) -> None:
    """ValueError, before any answer is made, for a row with an answer that could not be scored.

    fewest: images that it must have, 0 or 1; one is the most.
    """
    for row in rows:
        if not fewest <= (count := len(image_entries(row))) <= 1:
            raise ValueError(f"{row_name(row)}: it has {count} images; its answers are scored against one: drop it")


def compare_towers(model: nn.Module, scorer: Scorer) -> dict[str, Any]:
    """Whether the scorer's image tower is the model's own vision tower, by the features that both make of one image.

    Returns own (bool), layers (of the model's tower that the scorer's has too, "4 of 4"), difference (the largest,
    relative) or reason. The pixels that the scorer's tower reads go through the model's; every state between its layers
    must be among what the scorer's modules give. So it matters neither how a library names its weights nor whether an
    activation is the same: features are compared, not names.
    """
    tower: Any = vision_tower(model)
    if tower is None:
        return {"own": False, "reason": "the model has no vision tower"}
    pixels, outputs = _watched(scorer)
    if pixels is None:
        return {"own": False, "reason": "the scorer runs no torch module on pixels"}
    parameter = next(tower.parameters())
    try:
        with inference(tower):
            states = tower(pixels.to(parameter.device, parameter.dtype), output_hidden_states=True).hidden_states
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        return {"own": False, "reason": f"{type(tower).__name__} does not take the scorer's pixels: {reason}"}
    if not states:
        return {"own": False, "reason": f"{type(tower).__name__} shows no states between its layers"}
    layers = [min(_differences(state, outputs), default=math.inf) for state in states[1:]]
    same = sum(difference <= SAME_FEATURES for difference in layers)
    difference = max(layers)
    return {
        "own": same == len(layers),
        "layers": f"{same} of {len(layers)}",
        "difference": difference if math.isfinite(difference) else None,
    }


def _watched(scorer: Scorer) -> tuple[Tensor | None, list[Tensor]]:
    """The pixels (1, 3, height, width) that a scorer's tower reads, and every tensor that its modules give."""
    pixels: list[Tensor] = []
    outputs: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        first = inputs[0] if inputs else None
        if isinstance(first, Tensor) and first.dim() == 4 and first.shape[1] == 3 and not pixels:
            pixels.append(first.detach())
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            outputs.append(first.detach().float().cpu())

    noise = torch.randint(0, 256, (256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        scorer.image_features([Image.fromarray(noise.numpy(), "RGB")])
    finally:
        handle.remove()
    return (pixels[0] if pixels else None), outputs


def _differences(state: Tensor, outputs: Sequence[Tensor]) -> list[float]:
    """The relative difference of a state (1, tokens, width) to each output of as many numbers."""
    own = state.detach().float().cpu().flatten()
    return [float((output.flatten() - own).norm() / own.norm()) for output in outputs if output.numel() == own.numel()]
