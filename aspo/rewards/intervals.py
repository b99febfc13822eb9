"""AUCs and correlations with 95 % bootstrap intervals: whole answers are resampled.

The words and sentences of one answer are about one image and are not independent, so an answer is the unit. A resample
is how many copies of each answer it holds (`aspo.evaluation.statistics`, whose percentile interval is also taken);
with the copies as weights a figure is exactly that of the resampled list, ties included. All figures see the same
resamples, so that the difference of two is taken inside each. A: answers, R: resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from aspo.evaluation.statistics import estimate, multiplicities

RESAMPLES, LEVEL = 2000, 0.95
Judged = tuple[int, float, bool]  # the answer it stands in (0 to A - 1), its similarity, whether it is right
Statistic = Callable[[np.ndarray], float]  # (A,) float64 copies of each answer -> the figure; NaN: undefined


def resampled(statistics: Mapping[str, Statistic], answers: int, seed: int = 0) -> dict[str, np.ndarray]:
    """name -> (1 + R,) values: the sample's own first, then one of each resample of the `answers` answers."""
    values: dict[str, list[float]] = {name: [] for name in statistics}
    for chunk in multiplicities(answers, RESAMPLES, seed):
        for copies in chunk:
            for name, statistic in statistics.items():
                values[name].append(statistic(copies))
    return {name: np.array(drawn) for name, drawn in values.items()}


def interval(values: np.ndarray) -> dict[str, float | None]:
    """{"value", "low", "high"} of (1 + R,) values or of a difference of two; None where undefined."""
    found = estimate(values, LEVEL)
    return {name: None if math.isnan(x := getattr(found, name)) else x for name in ("value", "low", "high")}


def auc_of(judged: Sequence[Judged]) -> Statistic:
    """Share of (right, wrong) pairs where the right one is higher, ties counting half; NaN where one is missing."""
    answers = np.array([answer for answer, _, _ in judged], dtype=np.int64)
    right = np.array([truth for _, _, truth in judged], dtype=bool)
    levels = np.unique([value for _, value, _ in judged], return_inverse=True)[1]

    def area(copies: np.ndarray) -> float:
        weights = copies[answers]
        of_right, of_wrong = (np.bincount(levels, weights * kind) for kind in (right, ~right))
        pairs = of_right.sum() * of_wrong.sum()
        return float(of_right @ (of_wrong.cumsum() - of_wrong / 2) / pairs) if pairs else math.nan

    return area


def correlation_of(answers: Sequence[int], x: Sequence[float], y: Sequence[float], *, ranks: bool = False) -> Statistic:
    """Pearson's correlation of x and y, one number of each an answer, or Spearman's (ranks; equal values share theirs).

    NaN where fewer than three answers are there, or one side does not vary.
    """
    of_answer = np.array(answers, dtype=np.int64)
    sides = [np.unique(side, return_inverse=True) for side in (x, y)]  # distinct values, and which of them each has

    def correlation(copies: np.ndarray) -> float:
        weights = copies[of_answer]
        there = weights > 0
        if there.sum() < 3:
            return math.nan
        centred = []
        for values, levels in sides:
            if ranks:
                of_level = np.bincount(levels, weights)
                values = of_level.cumsum() - (of_level - 1) / 2
            side = values[levels]
            if np.ptp(side[there]) == 0:
                return math.nan
            centred.append(side - np.average(side, weights=weights))
        a, b = centred
        return float((weights * a * b).sum() / math.sqrt((weights * a * a).sum() * (weights * b * b).sum()))

    return correlation
