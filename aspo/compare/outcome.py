"""What `aspo compare` finds: intervals, differences, and verdicts on what was declared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aspo.compare.grid import Result, keeps_form
from aspo.compare.plan import START, Declared, Run, first_data
from aspo.compare.statistics import Interval, Table, holm, interval, resampled, seed_interval
from aspo.compare.work import read_result
from aspo.evaluation.figures import Figure
from aspo.evaluation.metrics import available

FAIR = 0.02  # of the baseline's coverage and length
REWARDS = {
    "chosen_reward_final": "chosen, at the end",
    "chosen_reward_min": "chosen, least",
    "rejected_reward_final": "rejected, at the end",
    "margin_accuracy_final": "chosen above rejected",
}
EXTRA = {"kl": "KL to start, nats", "image_gap": "image gap, nats"}
VERDICTS = {
    ("higher", 1): "agrees",
    ("higher", -1): "disagrees",
    ("lower", 1): "disagrees",
    ("lower", -1): "agrees",
    ("none", 1): "disagrees: higher",
    ("none", -1): "disagrees: lower",
    ("none", 0): "no difference shown",
}


@dataclass(frozen=True)
class Verdict:
    """A declared comparison: the difference of the primary figure, and what it says of what was expected."""

    comparison: dict[str, str]
    difference: Interval | None  # None: one of the two was not run
    p_holm: float
    verdict: str


@dataclass(frozen=True)
class Outcome:
    """results[name]: one result.json a seed. systems[name][figure], and differences[name][figure] to the baseline."""

    declared: Declared
    scenes: int
    figures: list[Figure]
    results: dict[str, list[Result]]
    systems: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]
    verdicts: list[Verdict]
    failed: list[str]
    data_seconds: float = 0.0  # of the clock, for the data steps, by processes of one thread
    smoke: bool = False
    notes: tuple[str, ...] = ()  # lines of the table: when it was opened, what is not alike

    @property
    def seeds(self) -> int:
        return len(self.results[self.declared.baseline])

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What the grid chose, by system."""
        return {name: of[0]["settings"] for name, of in self.results.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """Processor time by system; the start model is measured once for all seeds."""
        once = {name: {r["key"]: r for r in of}.values() for name, of in self.results.items()}
        return {name: sum(sum(r["seconds"].values()) for r in of) for name, of in once.items()}

    @property
    def codes(self) -> int:
        """States of this project's code that made the results."""
        return len({code for of in self.results.values() for result in of for code in result["code"]})

    @cached_property
    def extra(self) -> dict[str, dict[str, Interval]]:
        """Figures that are one number a seed."""
        return {
            name: {
                e: seed_interval([r["extra"][e] for r in of])
                for e in (*EXTRA, *REWARDS)
                if all(e in r["extra"] for r in of)
            }
            for name, of in self.results.items()
        }

    @cached_property
    def extra_differences(self) -> dict[str, dict[str, Interval]]:
        """`extra` minus the baseline's, paired by seed; what both have."""
        base = self.results[self.declared.baseline]
        return {
            name: {
                e: seed_interval([r["extra"][e] - b["extra"][e] for r, b in zip(self.results[name], base, strict=True)])
                for e in by
                if e in self.extra[self.declared.baseline]
            }
            for name, by in self.extra.items()
            if name != self.declared.baseline
        }

    @cached_property
    def form_lost(self) -> dict[str, list[list[str]]]:
        """What each seed's answers lost of the form that the grid asks for; empty without the start model."""
        if START not in self.results:
            return {}
        start, form = self.results[START][0], self.declared.form
        return {name: [keeps_form(result, start, form) for result in of] for name, of in self.results.items()}

    @property
    def form_kept(self) -> dict[str, int]:
        """How many seeds' answers keep it."""
        return {name: sum(not lost for lost in of) for name, of in self.form_lost.items()}

    @property
    def fair(self) -> dict[str, bool]:
        """Whether a system's coverage and length are both within 2 % of the baseline's."""
        base = self.systems[self.declared.baseline]
        return {
            name: all(abs(by[f].value - base[f].value) <= FAIR * base[f].value for f in ("coverage", "tokens"))
            for name, by in self.systems.items()
        }


def analyse(
    tables: Mapping[str, Table],
    runs: Mapping[str, Sequence[Run]],
    declared: Declared,
    failed: Sequence[str] = (),
    resamples: int = 2000,
    smoke: bool = False,
    notes: Sequence[str] = (),
) -> Outcome:
    """Intervals of every figure, differences to the baseline, and the declared comparisons with Holm's correction."""
    figures = available(set.intersection(*(set(table.names) for table in tables.values())))
    values = resampled(tables, figures, resamples)
    seeds, scenes = next(iter(tables.values())).counts.shape[:2]

    def difference(a: str, b: str, figure: str) -> Interval:
        return interval(values[a][figure] - values[b][figure], seeds)

    compared: list[Interval | None] = [
        difference(c["system"], c["against"], declared.primary)
        if {c["system"], c["against"]} <= values.keys()
        else None
        for c in declared.comparisons
    ]
    adjusted = holm([math.nan if i is None else i.p for i in compared])
    return Outcome(
        declared,
        scenes,
        figures,
        {name: [read_result(run) for run in of] for name, of in runs.items()},
        {name: {f.name: interval(by[f.name], seeds) for f in figures} for name, by in values.items()},
        {
            name: {f.name: difference(name, declared.baseline, f.name) for f in figures}
            for name in values
            if name != declared.baseline
        },
        [
            Verdict(comparison, found, p, judge(comparison["direction"], found, p))
            for comparison, found, p in zip(declared.comparisons, compared, adjusted, strict=True)
        ],
        list(failed),
        data_seconds(runs),
        smoke,
        tuple(notes),
    )


def data_seconds(runs: Mapping[str, Sequence[Run]]) -> float:
    """What the runs' data steps took, each counted once. Those of later iterations are part of a run's training."""
    steps = {planned.key: planned for of in runs.values() for run in of for planned in first_data(run) if planned.done}
    return sum(json.loads(planned.marker.read_text(encoding="utf-8"))["seconds"] for planned in steps.values())


def judge(direction: str, found: Interval | None, p_holm: float) -> str:
    """What a difference says of the direction that was expected, at 5 % after Holm's correction."""
    if found is None:
        return "not run"
    if math.isnan(p_holm):
        return "cannot tell"
    sign = 0 if p_holm >= 0.05 else 1 if found.value > 0 else -1
    return VERDICTS.get((direction, sign), "cannot tell")
