"""Rows and texts of the embedded world, in the forms that training and evaluation read."""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from aspo.world.language import DESCRIBE, QUESTION_KINDS, describe, questions
from aspo.world.scenes import Scene, render, scenes

DEFAULT_ROWS = {"train": 1500, "validation": 500, "test": 1000, "calibration": 500}
"""Rows of each split where `rows` is not told how many."""


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
    return [row(scene) for scene in islice(scenes(split, seed), DEFAULT_ROWS[split] if n is None else n)]


def base_training(seed: int = 0, question_share: float = 0.3) -> Iterator[tuple[Scene, str, str]]:
    """An endless stream of (scene, prompt, true answer) for the base model.

    The answer is a description in reading order, or in `question_share` of the cases that of a yes/no question. Colours
    follow the prior (85 % usual).
    """
    rng = random.Random(f"base-training:{seed}")
    for scene in scenes("base", seed):
        if rng.random() < question_share:
            question, answer = rng.choice(questions(scene, rng.choice(QUESTION_KINDS), seed=rng.getrandbits(16)))
            yield scene, question, answer.capitalize() + "."
        else:
            yield scene, DESCRIBE, describe(scene)
