"""Rows and texts of the embedded world, in the forms that training and evaluation read."""

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from aspo.world.language import DESCRIBE, QUESTION_KINDS, questions, sentence
from aspo.world.scenes import USUAL, Scene, render, scenes

DEFAULT_ROWS = {"train": 1500, "validation": 500, "test": 1000, "calibration": 500}
"""Rows of each split where `rows` is not told how many."""

FIRST_SEED = {"test": 1}
"""Where a split's seeds begin. The test scenes of seed 0 were opened before the demo's settings were final (they were
chosen again, on validation scenes, after that run), so they are used up: `rows("test")` gives others."""

HABIT = (0.04, 0.2, 0.35, 0.5, 0.75, 0.9)
"""Chance that the k-th sentence of a base-training description is written from habit: the usual colour, unseen.

It grows towards the end, as hallucinations do in the answers of real vision-language models. From such texts the base
model learns to trust the picture at first and the prior later, though it sees every object equally well.
"""


def row(scene: Scene) -> dict[str, Any]:
    """The scene as one row: `id`, `prompt`, `images` (one PIL image) and `scene` (its truth as a JSON-able dict)."""
    row_id = f"{scene.split}-{scene.content_hash[:12]}"
    return {"id": row_id, "prompt": DESCRIBE, "images": [render(scene)], "scene": scene.to_json()}


def rows(split: str, n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """The first n rows of a split ("train", "validation", "test" or "calibration"), the same for the same seed.

    A smaller n gives a prefix of a larger one's rows. Raises ValueError on any other split.
    """
    if split not in DEFAULT_ROWS:
        raise ValueError(f"split {split!r} of the world has no rows; use one of {', '.join(DEFAULT_ROWS)}")
    if n is not None and n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    stream = scenes(split, seed + FIRST_SEED.get(split, 0))
    return [row(scene) for scene in islice(stream, DEFAULT_ROWS[split] if n is None else n)]


def describe_from_habit(scene: Scene, rng: random.Random, habit: Sequence[float] = HABIT) -> str:
    """A description in reading order whose k-th sentence gives the shape's usual colour unseen with chance habit[k]."""
    if len(habit) < len(scene.things):
        raise ValueError(
            f"habit has {len(habit)} chances, but the scene {len(scene.things)} objects; give one for each"
        )
    colours = [
        USUAL[thing.shape] if rng.random() < chance else thing.colour
        for thing, chance in zip(scene.things, habit, strict=False)
    ]
    return " ".join(sentence("colour", t.shape, colour) for t, colour in zip(scene.things, colours, strict=True))


Turn = tuple[str, str]
"""A prompt and its answer."""


def base_training(
    seed: int = 0, question_share: float = 0.3, habit: Sequence[float] = HABIT
) -> Iterator[tuple[Scene, list[Turn]]]:
    """An endless stream of scenes and conversations about them, for the base model.

    A conversation is one description by a describer of some `habit`, or in `question_share` of the cases the true
    answers to the yes/no questions of one kind. The scenes' colours follow the prior (85 % usual).
    """
    rng = random.Random(f"base-training:{seed}")
    for scene in scenes("base", seed):
        if rng.random() < question_share:
            asked = questions(scene, rng.choice(QUESTION_KINDS), seed=rng.getrandbits(16))
            yield scene, [(question, answer.capitalize() + ".") for question, answer in asked]
        else:
            yield scene, [(DESCRIBE, describe_from_habit(scene, rng, habit))]
