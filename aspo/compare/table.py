"""What `aspo compare` finds: intervals, differences, verdicts on what was declared; and table.md, which tells it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aspo.compare.grid import Result, keeps_form
from aspo.compare.plan import START, Declared, Run
from aspo.compare.statistics import Interval, Table, holm, interval, resampled, seed_interval
from aspo.evaluation.figures import Figure
from aspo.evaluation.metrics import BY_NAME, available

MINUS = "\N{MINUS SIGN}"
SHOWN = (
    "hallucinated_sentences",
    "false_claims_violating",
    "coverage",
    "claim_f1",
    "chair_i",
    "chair_s",
    "tokens",
    "unparseable",
    "duplicate",
)
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
            name: all(abs(by[f].value / base[f].value - 1) <= FAIR for f in ("coverage", "tokens"))
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
        {name: [json.loads(run.result.read_text(encoding="utf-8")) for run in of] for name, of in runs.items()},
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
        smoke,
        tuple(notes),
    )


def judge(direction: str, found: Interval | None, p_holm: float) -> str:
    """What a difference says of the direction that was expected, at 5 % after Holm's correction."""
    if found is None:
        return "not run"
    if math.isnan(p_holm):
        return "cannot tell"
    sign = 0 if p_holm >= 0.05 else 1 if found.value > 0 else -1
    return VERDICTS.get((direction, sign), "cannot tell")


def show(estimate: Interval, figure: Figure, signed: bool = False) -> str:
    """ "+1.2 [+0.3, +2.1]" in per cent or plain, as the figure says; the interval left out where there is none."""
    value, low, high = (figure.show(v, signed=signed) for v in (estimate.value, estimate.low, estimate.high))
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def markdown(outcome: Outcome) -> str:
    """The table, and above it the declared comparisons."""
    declared = outcome.declared
    lines = ["**SMOKE RUN: too small to mean anything.**", ""] if outcome.smoke else []
    lines += [
        f"{len(outcome.systems)} systems, {outcome.seeds} seeds, {outcome.scenes} test scenes; "
        f"{declared.prompts} prompts and {_budget(declared)} for each. Below each other: 95 % intervals over seeds and "
        "scenes (docs/evidence.md).",
        "",
        *_verdicts(outcome),
        *_figures(outcome),
        *_rewards(outcome),
    ]
    lines += [line for note in outcome.notes for line in (note, "")]
    lines += ["Settings by system:", ""] if any(outcome.settings.values()) else []
    for name, settings in outcome.settings.items():
        if settings:
            told = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())
            lines.append(f"- {name}: {told}")
    lines += ["", *(f"**Failed: {line}**" for line in outcome.failed)]
    if outcome.codes > 1:
        lines.append(f"**Made by {outcome.codes} states of the code** (`code` in each result.json tells which).")
        lines.append("")
    lines.append(f"{sum(outcome.seconds.values()) / 3600:.2f} hours of one thread for training and evaluation.")
    return "\n".join(lines) + "\n"


def _verdicts(outcome: Outcome) -> list[str]:
    """The declared comparisons."""
    primary = BY_NAME[outcome.declared.primary]
    lines = [
        f"## Declared beforehand ({outcome.declared.path.name}; primary figure: {primary.label}, points)",
        "",
        "| comparison | expected | by | difference | p (Holm) | |",
        "|---|---|---|---:|---:|---|",
    ]
    for v in outcome.verdicts:
        c = v.comparison
        number = MINUS if v.difference is None else show(v.difference, primary, signed=True)
        p = "" if math.isnan(v.p_holm) else f"{v.p_holm:.3f}" if v.p_holm >= 0.001 else "< 0.001"
        reported = f" ({c['reported']})" if c.get("reported") else ""
        lines.append(
            f"| {c['system']} {MINUS} {c['against']} | {c['direction']}{reported} | {c.get('expected_by', '')} | "
            f"{number} | {p} | {v.verdict} |"
        )
    return [*lines, ""]


def _figures(outcome: Outcome) -> list[str]:
    """Every system with its figures."""
    primary, baseline = BY_NAME[outcome.declared.primary], outcome.declared.baseline
    shown = [BY_NAME[name] for name in SHOWN if BY_NAME[name] in outcome.figures]
    head = ["system", primary.label, f"{MINUS} {baseline}", *(f.label for f in shown), *EXTRA.values()]
    lines = [
        "## All systems",
        "",
        f"Differences to {baseline} that were not declared beforehand describe; they test nothing.",
        "",
        "| " + " | ".join([*head, "within 2 %", "form kept"]) + " |",
        "|---|" + "---:|" * (len(head) - 1) + "---|---|",
    ]
    for name, by in outcome.systems.items():
        other = "" if name == baseline else show(outcome.differences[name][primary.name], primary, signed=True)
        extra = [f"{outcome.extra[name][e].value:.2f}" for e in EXTRA]
        cells = [show(by[primary.name], primary), other, *(show(by[f.name], f) for f in shown), *extra]
        kept = f"{outcome.form_kept[name]} of {outcome.seeds}" if outcome.form_kept else ""
        lines.append("| " + " | ".join([name, *cells, "yes" if outcome.fair[name] else "no", kept]) + " |")
    return [
        *lines,
        "",
        "Rates in per cent. *within 2 %*: coverage and length are both within 2 % of the baseline's; where they",
        "are not, read the rate of hallucinated sentences beside coverage. *form kept*: how many seeds' answers keep",
        "the form that the grid asks of a setting (sentences that parse, no repetition, length, coverage).",
        "",
    ]


def _rewards(outcome: Outcome) -> list[str]:
    """The rewards of the systems that log them: a chosen one below 0 is likelihood lost (displacement)."""
    rows = [
        f"| {name} | " + " | ".join(_plain(by[e]) if e in by else "" for e in REWARDS) + " |"
        for name, by in outcome.extra.items()
        if "chosen_reward_final" in by
    ]
    if not rows:
        return []
    return [
        "## Rewards in training",
        "",
        "Of training pairs, beta x log-ratio, by each objective's own beta; the end is the last logged mean. A chosen "
        "reward below 0 is likelihood that the chosen answers lost.",
        "",
        "| system | " + " | ".join(REWARDS.values()) + " |",
        "|---|" + "---:|" * len(REWARDS),
        *rows,
        "",
    ]


def _plain(estimate: Interval) -> str:
    if math.isnan(estimate.low):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]".replace("-", MINUS)


def _budget(declared: Declared) -> str:
    steps, size = declared.budget.get("max_steps"), declared.budget.get("per_device_train_batch_size")
    return f"{steps} steps of {size} pairs" if steps and size else "the same training"
