"""Paired bootstrap intervals: resample items (clusters), recompute every figure from the resampled sums.

Systems are compared on the same items, so one set of resamples serves all of them and a difference is taken inside
each resample. A micro rate is recomputed as sum / sum in each resample, not averaged over items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from aspo.evaluation.metrics import Figure, available

_CHUNK_ELEMENTS = 4_000_000  # resample weights held at once: 32 MiB of int64


@dataclass(frozen=True)
class Estimate:
    """A figure with its percentile interval; `value` is the sample's own, not the resamples' mean. NaN: undefined."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Of a difference: its interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """`systems[system][figure]` and `differences[(a, b)][figure]` = a minus b."""

    systems: dict[str, dict[str, Estimate]]
    differences: dict[tuple[str, str], dict[str, Estimate]]
    figures: list[Figure]
    items: int
    clusters: int
    level: float


def compare(
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]],
    differences: Sequence[tuple[str, str]] = (),
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Figures of several systems on the same items, with paired bootstrap intervals.

    Args:
        evaluations: system -> its items as `aspo eval` stores them: {"id", "counts", optional "cluster", "asked"}.
            Items are joined by id, and items of one cluster (several questions about one image) are resampled together.
        differences: pairs (a, b) of systems; a minus b is estimated.
        resamples, level, seed: percentile bootstrap; the same seed gives the same intervals.

    Raises ValueError where systems were not evaluated on the same items.
    """
    if not evaluations:
        raise ValueError("no evaluation to compare; give at least one")
    if resamples < 100 or not 0 < level < 1:
        raise ValueError(f"resamples {resamples} must be at least 100 and level {level} between 0 and 1")
    for system in {name for pair in differences for name in pair}:
        if system not in evaluations:
            raise ValueError(f"difference asks for {system!r}, which is none of {sorted(evaluations)}")
    tables = {system: _by_id(system, items) for system, items in evaluations.items()}
    first, *others = tables
    for system in others:
        _check_same_items(first, tables[first], system, tables[system])

    ids = list(tables[first])
    counted = set.intersection(
        *({name for item in table.values() for name in item["counts"]} for table in tables.values())
    )
    figures = available(counted)
    names = sorted({name for figure in figures for name in figure.needs})
    clusters = {key: index for index, key in enumerate(dict.fromkeys(_cluster(tables[first][i]) for i in ids))}
    rows = np.array([clusters[_cluster(tables[first][i])] for i in ids])
    sums: dict[str, np.ndarray] = {}  # system -> (1 + resamples, count names); row 0 is the sample itself
    weights = multiplicities(len(clusters), resamples, seed)
    matrices = {system: _matrix(table, ids, names, rows, len(clusters)) for system, table in tables.items()}
    for chunk in weights:
        for system, matrix in matrices.items():
            part = chunk @ matrix
            sums[system] = np.concatenate([sums[system], part]) if system in sums else part
    values = {
        system: {figure.name: figure.compute({name: total[:, k] for k, name in enumerate(names)}) for figure in figures}
        for system, total in sums.items()
    }
    return Comparison(
        systems={system: {f.name: estimate(by[f.name], level) for f in figures} for system, by in values.items()},
        differences={
            (a, b): {f.name: estimate(values[a][f.name] - values[b][f.name], level) for f in figures}
            for a, b in differences
        },
        figures=figures,
        items=len(ids),
        clusters=len(clusters),
        level=level,
    )


def _cluster(item: Mapping[str, Any]) -> str:
    return str(item["id"] if item.get("cluster") is None else item["cluster"])


def _by_id(system: str, items: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    table = {str(item["id"]): item for item in items}
    if not items or len(table) != len(items):
        raise ValueError(
            f"{system}: {len(items)} items with {len(table)} distinct ids; evaluate again with unique row ids"
        )
    return table


def _check_same_items(a: str, left: Mapping[str, Any], b: str, right: Mapping[str, Any]) -> None:
    missing = left.keys() ^ right.keys()
    if missing:
        raise ValueError(
            f"{a} has {len(left)} items, {b} {len(right)}, and {len(missing)} are in one only "
            f"(such as {min(missing)!r}); evaluate both on the same data with the same --limit"
        )
    # Benchmarks' items, and older ones, do not say what was asked.
    noted = [name for name in left if left[name].get("asked") is not None and right[name].get("asked") is not None]
    if other := [name for name in noted if left[name]["asked"] != right[name]["asked"]]:
        raise ValueError(
            f"{a} and {b} were asked different things in {len(other)} of {len(left)} items (such as {other[0]!r}): "
            "evaluate both on the same rows, with the same --questions, --minimal-pairs and --seed"
        )


def _matrix(
    table: Mapping[str, Mapping[str, Any]], ids: Sequence[str], names: Sequence[str], rows: np.ndarray, clusters: int
) -> np.ndarray:
    """(clusters, count names) sums of counts."""
    counts = np.array([[table[i]["counts"].get(name, 0.0) for name in names] for i in ids], dtype=np.float64)
    matrix = np.zeros((clusters, len(names)))
    np.add.at(matrix, rows, counts.reshape(len(ids), len(names)))
    return matrix


def multiplicities(clusters: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks of (rows, clusters) float64: copies of each cluster; the first row of all is ones, the sample itself."""
    generator = np.random.default_rng(seed)
    yield np.ones((1, clusters))
    step = max(1, _CHUNK_ELEMENTS // clusters)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        yield generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=size).astype(np.float64)


def estimate(values: np.ndarray, level: float) -> Estimate:
    """The percentile interval of (1 + resamples,) values, the sample's own first; NaN ones are left out."""
    drawn = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not drawn.size:
        return Estimate(float(values[0]), float("nan"), float("nan"))
    tail = 50 * (1 - level)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Estimate(float(values[0]), float(low), float(high))


def markdown(comparison: Comparison, names: Sequence[str] | None = None) -> str:
    """The comparison as a Markdown table: a column per system, then one per difference, "value [low, high]".

    `names` picks figures and their order; None = all. A difference whose interval excludes 0 is in bold.
    """
    figures = (
        comparison.figures if names is None else [f for name in names for f in comparison.figures if f.name == name]
    )
    head = ["figure", *map(_name, comparison.systems)]
    head += [f"{_name(a)} \N{MINUS SIGN} {_name(b)}" for a, b in comparison.differences]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for figure in figures:
        cells = [_cell(figure, by[figure.name]) for by in comparison.systems.values()]
        cells += [_cell(figure, by[figure.name], difference=True) for by in comparison.differences.values()]
        rows.append([figure.label + (" (%)" if figure.percent else ""), *cells])
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _name(system: str) -> str:
    """A system's name, often a file's, as a table can hold it."""
    return escape(" ".join(system.split()), quote=False).replace("|", "\\|")


def _cell(figure: Figure, estimate: Estimate, difference: bool = False) -> str:
    value, low, high = (figure.show(v, signed=difference) for v in (estimate.value, estimate.low, estimate.high))
    return f"**{value}** [{low}, {high}]" if difference and estimate.excludes_zero else f"{value} [{low}, {high}]"
