"""Figures of negatives that were picked: how false the chosen response is of them, how far they lie apart.

Where the truth of an image is known (the embedded world's `scene`, `negative_scenes`), each sentence of the chosen
response is judged against each negative. A crop shows the objects of whose middle (the 16 x 16 pixels around the grid
cell's centre) it holds half or more; sizes and places in it are those of the whole picture, so that only claims about
colours, objects and counts are judged rightly. Noise changes no truth, only what can be seen.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from aspo.validate import response_text

MIDDLE = 16  # pixels of the side of a cell's middle, about an object's
Row = Mapping[str, Any]
Mark = tuple[str, bool | None]  # a sentence, and whether it is true of an image; None = cannot be judged


class Mean(NamedTuple):
    """A mean over rows and its standard error (NaN for one row)."""

    value: float
    error: float
    rows: int


def mean_of_rows(values: Sequence[float]) -> Mean | None:
    """The mean of one value a row; None where there are none."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(statistics.fmean(values), error, len(values))


def scene_in_box(scene: Mapping[str, Any], box: tuple[int, int, int, int]) -> dict[str, Any]:
    """The scene of the objects that a part of the picture shows; box: (left, top, right, bottom) pixels."""
    from aspo.world.scenes import CELL, PLACES

    left, top, right, bottom = box
    seen = []
    for thing in scene["things"]:
        row, column = divmod(PLACES.index(thing["place"]), 3)
        x, y = (column + 0.5) * CELL, (row + 0.5) * CELL
        width = min(right, x + MIDDLE / 2) - max(left, x - MIDDLE / 2)
        height = min(bottom, y + MIDDLE / 2) - max(top, y - MIDDLE / 2)
        if width > 0 and height > 0 and width * height >= MIDDLE**2 / 2:
            seen.append(thing)
    return {**scene, "things": seen}


def judged(text: str, scene: Mapping[str, Any]) -> list[Mark]:
    """The sentences of a response, each with its truth in a scene."""
    from aspo.world.language import judge
    from aspo.world.scenes import Scene

    claims = judge(text, Scene.from_json(dict(scene)))
    return [(claim.text, claim.verdict == "true" if claim.checkable else None) for claim in claims]


def truth_figures(rows: Sequence[Row]) -> dict[str, Mean]:
    """Of rows with `scene` and `negative_scenes`, each a mean over rows.

    false_negatives: share of negatives of which every sentence (that can be judged) of the chosen response is true.
    as_true: share of negatives of which at least as many of its sentences are true as of the right image.
    true_sentences, true_of_right: share of its sentences that are true of a negative, and of the right image.
    """
    found: dict[str, list[float]] = {
        name: [] for name in ("false_negatives", "as_true", "true_sentences", "true_of_right")
    }
    for row in rows:
        if row.get("scene") is None or not row.get("negative_scenes"):
            continue
        text = response_text(row["chosen"])
        right = _truths(text, row["scene"])
        negatives = [_truths(text, scene) for scene in row["negative_scenes"]]
        if not right:
            continue
        found["false_negatives"].append(statistics.fmean(all(truths) for truths in negatives))
        found["as_true"].append(statistics.fmean(sum(truths) >= sum(right) for truths in negatives))
        found["true_sentences"].append(statistics.fmean(statistics.fmean(truths) for truths in negatives))
        found["true_of_right"].append(statistics.fmean(right))
    means = {name: mean_of_rows(values) for name, values in found.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def _truths(text: str, scene: Mapping[str, Any]) -> list[bool]:
    return [truth for _, truth in judged(text, scene) if truth is not None]


def similarity_figures(right: Tensor, negatives: Tensor) -> dict[str, Mean]:
    """Means over rows. right: (n, d) unit features, negatives: (n, N, d).

    cosine: of a negative to the right image. pairwise_cosine: of two negatives of a row (N of at least 2).
    """
    means = {"cosine": mean_of_rows((negatives @ right.unsqueeze(-1)).squeeze(-1).mean(1).tolist())}
    count = negatives.shape[1]
    if count > 1:
        among = (negatives @ negatives.transpose(1, 2)).sum((1, 2)) - negatives.square().sum((1, 2))
        means["pairwise_cosine"] = mean_of_rows((among / (count * (count - 1))).tolist())
    return {name: mean for name, mean in means.items() if mean is not None}


def reuse_figures(keys: Sequence[Sequence[str]]) -> dict[str, float]:
    """distinct: different images over images picked. most_used: share of the rows that have the commonest one."""
    counts = Counter(key for of_row in keys for key in of_row)
    if not counts:
        return {}
    return {"distinct": len(counts) / sum(counts.values()), "most_used": counts.most_common(1)[0][1] / len(keys)}
