"""What a model answers about rows whose truth is known, reduced to counts: one function per kind of truth.

`JUDGES[kind](model, processor, rows, options, start, vocabulary)` gives one item per row; `start` is the first row's
number in the whole evaluation (sampling is seeded by it).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aspo.evaluation.metrics import (
    YES_NO_SPLITS,
    Counts,
    JudgedClaim,
    ObjectVocabulary,
    answer_counts,
    chair_counts,
    claim_counts,
    minimal_pair_counts,
    yes_no_counts,
)
from aspo.evaluation.minimal_pairs import margins
from aspo.folder import image_bytes, image_entries
from aspo.generation import Answer, generate_answers
from aspo.world.language import Claim, judge, minimal_pairs, questions, stateable
from aspo.world.scenes import Scene

ANSWER_TOKENS = 8  # of a yes/no question's answer

Row = Mapping[str, Any]
Item = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What changes an item's result besides its row and the model."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0  # of sampled answers, of the world's questions and of which minimal pairs are taken
    batch_size: int = 16
    questions: int | None = None  # yes/no questions per scene and split, half of them "yes"; None = all
    minimal_pairs: int | None = None  # per scene; None = one for every object

    def __post_init__(self) -> None:
        if self.questions is not None and (self.questions < 0 or self.questions % 2):
            raise ValueError(f"questions is {self.questions}; it must be even (half yes, half no), 0 for none")
        if self.minimal_pairs is not None and self.minimal_pairs < 0:
            raise ValueError(f"minimal_pairs is {self.minimal_pairs}; it must not be negative")


def image_hash(row: Row) -> str:
    """A hash of the row's images as they are stored."""
    digest = hashlib.sha256()
    for entry in image_entries(row):
        digest.update(hashlib.sha256(image_bytes(entry)).digest())
    return digest.hexdigest()


def _generate(
    model: Any, processor: Any, rows: Sequence[Row], options: Options, start: int, tokens: int
) -> list[Answer]:
    return generate_answers(
        model,
        processor,
        rows,
        max_new_tokens=tokens,
        temperature=options.temperature,
        seed=options.seed + start,
        batch_size=options.batch_size,
    )


def judge_scenes(model: Any, processor: Any, rows: list[Row], options: Options, start: int, _: Any) -> list[Item]:
    """Descriptions, yes/no questions and minimal pairs of rows of the world."""
    scenes = [Scene.from_json(row["scene"]) for row in rows]
    answers = _generate(model, processor, rows, options, start, options.max_new_tokens)
    asked = [_scene_questions(scene, options) for scene in scenes]
    flat = [{**row, "prompt": question} for row, qs in zip(rows, asked, strict=True) for _, question, _ in qs]
    said = iter(_generate(model, processor, flat, options, start, ANSWER_TOKENS))
    pairs = [_scene_pairs(scene, options) for scene in scenes]
    pair_margins = margins(model, processor, rows, pairs, options.batch_size)
    items = []
    judged = zip(scenes, answers, asked, pairs, pair_margins, [row.get("cluster") for row in rows], strict=True)
    for scene, answer, qs, scene_pairs, of_scene, cluster in judged:
        claims = judge(answer.text, scene)
        counts = scene_counts(claims, scene) | answer_counts(answer.text, answer.num_tokens, answer.finished)
        replies = [(split, question, truth, next(said).text) for split, question, truth in qs]
        if replies:
            counts |= yes_no_counts([(split, truth, reply) for split, _, truth, reply in replies])
        if scene_pairs:
            against = [judge(false, scene)[0].states_prior for _, false in scene_pairs]
            counts |= minimal_pair_counts(of_scene, against)
        items.append(
            {
                "text": answer.text,
                "sentences": [{"text": c.text, "verdict": c.verdict, "true": c.true} for c in claims],
                "questions": [
                    dict(zip(("split", "question", "answer", "said"), reply, strict=True)) for reply in replies
                ],
                "minimal_pairs": [
                    {"true": true, "false": false, "margin": margin}
                    for (true, false), margin in zip(scene_pairs, of_scene, strict=True)
                ],
                "counts": counts,
            }
        )
        if cluster is not None:
            items[-1]["cluster"] = cluster
    return items


def scene_counts(claims: Sequence[Claim], scene: Scene) -> Counts:
    """Counts of a judged answer about a scene (one claim per sentence)."""
    strata = {"usual": ("consistent",), "unusual": ("violating",), "held_out": ("violating", "held_out")}
    judged = []
    for number, claim in enumerate(claims):
        names_object = claim.kind in ("colour", "size", "place", "object")
        judged.append(
            JudgedClaim(
                sentence=number,
                verdict=claim.verdict,
                fact=claim.fact,
                strata=strata.get(claim.stratum or "", ()),
                named=claim.subject if names_object else None,
                named_present=claim.subject in scene.by_shape,
            )
        )
    return claim_counts(judged, [claim.text for claim in claims], stateable(scene), len(scene.things))


def _scene_questions(scene: Scene, options: Options) -> list[tuple[str, str, str]]:
    """(split, question, truth), in each split as many "yes" as "no"."""
    chosen = []
    for split in YES_NO_SPLITS:
        asked = questions(scene, split, options.seed)
        for truth in ("yes", "no"):
            same = [question for question, answer in asked if answer == truth]
            half = len(same) if options.questions is None else options.questions // 2
            chosen += [(split, question, truth) for question in same[:half]]
    return chosen


def _scene_pairs(scene: Scene, options: Options) -> list[tuple[str, str]]:
    """(true sentence, false sentence); fewer than all are drawn, for the first objects are the easy ones."""
    pairs = minimal_pairs(scene)
    if options.minimal_pairs is None or options.minimal_pairs >= len(pairs):
        return pairs
    return random.Random(f"{scene.content_hash}:{options.seed}").sample(pairs, options.minimal_pairs)


def split_and_truth(row: Row) -> tuple[str, str]:
    """Of a yes/no question; "all" is no split, but all questions."""
    return str(row.get("split") or "all"), str(row["answer"]).strip().casefold()


def judge_questions(model: Any, processor: Any, rows: list[Row], options: Options, start: int, _: Any) -> list[Item]:
    """Yes/no questions; those about one image form a cluster."""
    items = []
    for row, answer in zip(rows, _generate(model, processor, rows, options, start, ANSWER_TOKENS), strict=True):
        counts = yes_no_counts([(*split_and_truth(row), answer.text)])
        cluster = image_hash(row) if row.get("cluster") is None else row["cluster"]
        items.append({"text": answer.text, "cluster": cluster, "counts": counts})
    return items


def judge_objects(
    model: Any, processor: Any, rows: list[Row], options: Options, start: int, vocabulary: ObjectVocabulary | None
) -> list[Item]:
    """Descriptions of images whose objects are listed."""
    assert vocabulary is not None  # the row's kind was settled with it
    items = []
    answers = _generate(model, processor, rows, options, start, options.max_new_tokens)
    for row, answer in zip(rows, answers, strict=True):
        counts = answer_counts(answer.text, answer.num_tokens, answer.finished)
        counts |= chair_counts(answer.text, row["objects"], vocabulary)
        named = vocabulary.mentions(answer.text)
        items.append({"text": answer.text, "named": named, "cluster": row.get("cluster"), "counts": counts})
    return items


JUDGES = {"scene": judge_scenes, "question": judge_questions, "objects": judge_objects}
