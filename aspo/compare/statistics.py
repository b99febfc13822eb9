"""Paired differences over seeds and scenes: bootstrap of both, t intervals for few seeds, Holm's correction.

Every system is trained once for each seed and judged on the same scenes. A resample draws seeds and scenes, each with
replacement and apart (every seed meets every scene: Owen's "pigeonhole" bootstrap, Ann. Appl. Stat. 1, 2007), the same
draw for every system, and recomputes each figure from the resampled sums. Few seeds make a percentile interval too
narrow: it takes the sample's own spread for the population's, and knows no t. So the interval is

    estimate -/+ t_{S - 1, 0.975} * sd(resamples)        S seeds

and p comes from the same t. docs/evidence.md shows how often such intervals hold the truth in simulations.
Axes: S seeds, I scenes, C counts, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aspo.evaluation.figures import Figure

LEVEL = 0.95
_CHUNK_ELEMENTS = 4_000_000  # scene weights held at once


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval and two-sided p of "it is 0"; NaN where it is undefined."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Table:
    """Counts of one system, (S, I, C) float64, C named by `names`, I by `ids` (the scenes)."""

    counts: np.ndarray
    names: tuple[str, ...]
    ids: tuple[str, ...] = ()


def resampled(
    tables: Mapping[str, Table], figures: Sequence[Figure], resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """system -> figure -> (1 + R,) values, the first of the sample itself, the rest of its resamples.

    Raises ValueError where systems differ in seeds or scenes, or have no count that a figure needs.
    """
    shapes = {table.counts.shape[:2] for table in tables.values()}
    if len(shapes) != 1:
        raise ValueError(f"systems differ in (seeds, scenes): {sorted(shapes)}")
    ((seeds, scenes),) = shapes
    first, *others = tables
    if other := [name for name in others if tables[name].ids != tables[first].ids]:
        raise ValueError(f"{other[0]} and {first} were judged on other scenes: evaluate them on the same")
    needed = sorted({name for figure in figures for name in figure.needs})
    matrices = {}
    for system, table in tables.items():
        if missing := set(needed) - set(table.names):
            raise ValueError(f"{system} has no counts of {', '.join(sorted(missing))}: evaluate it again")
        picked = table.counts[:, :, [table.names.index(name) for name in needed]]
        matrices[system] = picked.transpose(1, 0, 2).reshape(scenes, -1)  # (I, S * C)
    sums: dict[str, list[np.ndarray]] = {system: [] for system in tables}
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK_ELEMENTS // scenes)
    done = -1  # the sample itself comes first
    while done < resamples:
        if done < 0:
            of_scenes, of_seeds = np.ones((1, scenes)), np.ones((1, seeds))
        else:
            size = min(step, resamples - done)
            of_scenes = generator.multinomial(scenes, np.full(scenes, 1 / scenes), size=size).astype(np.float64)
            of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=size).astype(np.float64)
        done = max(done, 0) + (len(of_scenes) if done >= 0 else 0)
        for system, matrix in matrices.items():
            of_both = (of_scenes @ matrix).reshape(len(of_scenes), seeds, len(needed))
            sums[system].append(np.einsum("rs,rsc->rc", of_seeds, of_both))
    found: dict[str, dict[str, np.ndarray]] = {}
    for system, parts in sums.items():
        total = np.concatenate(parts)
        by_name = {name: total[:, k] for k, name in enumerate(needed)}
        found[system] = {figure.name: figure.compute(by_name) for figure in figures}
    return found


def interval(values: np.ndarray, seeds: int) -> Interval:
    """The interval of (1 + R,) values of `resampled`, or of a difference of two."""
    value, drawn = float(values[0]), values[1:][~np.isnan(values[1:])]
    if math.isnan(value) or not drawn.size or seeds < 2:
        return Interval(value, math.nan, math.nan, math.nan)
    return t_interval(value, float(drawn.std()), seeds - 1)


def t_interval(value: float, error: float, freedom: int) -> Interval:
    """value -/+ t * error, with p of the same t."""
    if error == 0:
        return Interval(value, value, value, 1.0 if value == 0 else 0.0)
    half = t_quantile(0.5 + LEVEL / 2, freedom) * error
    return Interval(value, value - half, value + half, 2 * (1 - t_cdf(abs(value) / error, freedom)))


def seed_interval(values: Sequence[float]) -> Interval:
    """The t interval of one number a seed (for figures that are no sums over scenes)."""
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return Interval(float(array.mean()) if array.size else math.nan, math.nan, math.nan, math.nan)
    return t_interval(float(array.mean()), float(array.std(ddof=1)) / math.sqrt(array.size), array.size - 1)


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    if freedom < 1:
        raise ValueError(f"degrees of freedom are {freedom}; they must be at least 1")
    theta = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    within = (2 / math.pi) * (theta + sine * total) if odd else sine * total
    return (1 + within) / 2


def t_quantile(probability: float, freedom: int) -> float:
    """The t whose `t_cdf` is `probability` (0.5 to 1), by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (Scand. J. Statist. 6, 1979), in the order given.

    NaN, of a comparison that was declared but not run, stays NaN and counts as one of the family.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[index] = largest
    return adjusted
