"""What `aspo compare` writes: table.md, table.json, figures.csv, and the plots differences.svg and rewards.svg."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from aspo.compare_plan import START, Declared, Run
from aspo.compare_statistics import Interval, Table, holm, interval, resampled, seed_interval
from aspo.figures import Figure
from aspo.metrics import BY_NAME, available
from aspo.resume import write_json

MINUS = "\N{MINUS SIGN}"
SHOWN = (
    "hallucinated_sentences",
    "false_claims_violating",
    "coverage",
    "claim_f1",
    "tokens",
    "unparseable",
    "duplicate",
)
FAIR = 0.02  # of the baseline's coverage and length
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
    """systems[name][figure] and differences[name][figure], to the baseline; extra[name] one number a seed."""

    declared: Declared
    seeds: int
    scenes: int
    figures: list[Figure]
    systems: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]
    extra: dict[str, dict[str, Interval]]
    verdicts: list[Verdict]
    settings: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    failed: list[str]
    smoke: bool = False
    own_pairs: tuple[str, ...] = ()  # systems that do not train on the baseline's pairs
    codes: int = 1  # states of this project's code that made the results

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
    own_pairs: Sequence[str] = (),
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
    verdicts = [
        Verdict(comparison, found, p, judge(comparison["direction"], found, p))
        for comparison, found, p in zip(declared.comparisons, compared, adjusted, strict=True)
    ]
    results = {name: [json.loads(run.result.read_text(encoding="utf-8")) for run in of] for name, of in runs.items()}
    return Outcome(
        declared,
        seeds,
        scenes,
        figures,
        {name: {f.name: interval(by[f.name], seeds) for f in figures} for name, by in values.items()},
        {
            name: {f.name: difference(name, declared.baseline, f.name) for f in figures}
            for name in values
            if name != declared.baseline
        },
        {name: {e: seed_interval([r["extra"][e] for r in of]) for e in EXTRA} for name, of in results.items()},
        verdicts,
        {name: of[0]["settings"] for name, of in results.items()},
        {name: sum(sum(r["seconds"].values()) for r in of) for name, of in results.items()},
        list(failed),
        smoke,
        tuple(own_pairs),
        len({code for of in results.values() for result in of for code in result["code"]}),
    )


def judge(direction: str, found: Interval | None, p_holm: float) -> str:
    """What a difference says of the direction that was expected, at 5 % after Holm's correction."""
    if found is None:
        return "not run"
    if math.isnan(p_holm):
        return "cannot tell"
    sign = 0 if p_holm >= 0.05 else 1 if found.value > 0 else -1
    return VERDICTS.get((direction, sign), "cannot tell")


def write_all(outcome: Outcome, out: Path, curves: Mapping[str, Sequence[Run]]) -> None:
    """All files, the table last."""
    write_csv(outcome, out / "figures.csv")
    plot_differences(outcome, out / "differences.svg")
    if curves:
        plot_rewards(curves, out / "rewards.svg")
    record = asdict(outcome)
    for name in ("declared", "figures"):
        record.pop(name)
    write_json(out / "table.json", json.loads(json.dumps(record), parse_constant=lambda _: None))
    (out / "table.md").write_text(markdown(outcome), encoding="utf-8")


def show(estimate: Interval, figure: Figure, signed: bool = False) -> str:
    """ "+1.2 [+0.3, +2.1]" in per cent or plain, as the figure says; the interval left out where there is none."""
    value, low, high = (figure.show(v, signed=signed) for v in (estimate.value, estimate.low, estimate.high))
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def markdown(outcome: Outcome) -> str:
    """The table, and above it the declared comparisons."""
    declared, primary = outcome.declared, BY_NAME[outcome.declared.primary]
    lines = ["**SMOKE RUN: too small to mean anything.**", ""] if outcome.smoke else []
    lines += [
        f"{len(outcome.systems)} systems, {outcome.seeds} seeds, {outcome.scenes} test scenes; "
        f"{declared.prompts} prompts and {_budget(declared)} for each. Below each other: 95 % intervals over seeds and "
        "scenes (docs/evidence.md).",
        "",
        f"## Declared beforehand ({declared.path.name}; primary figure: {primary.label}, points)",
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
    shown = [BY_NAME[name] for name in SHOWN if BY_NAME[name] in outcome.figures]
    head = ["system", primary.label, f"{MINUS} {declared.baseline}", *(f.label for f in shown), *EXTRA.values()]
    lines += [
        "",
        "## All systems",
        "",
        f"Differences to {declared.baseline} that were not declared beforehand describe; they test nothing.",
        "",
        "| " + " | ".join([*head, "within 2 %"]) + " |",
        "|---|" + "---:|" * (len(head) - 1) + "---|",
    ]
    for name, by in outcome.systems.items():
        other = "" if name == declared.baseline else show(outcome.differences[name][primary.name], primary, signed=True)
        extra = [f"{outcome.extra[name][e].value:.2f}" for e in EXTRA]
        cells = [show(by[primary.name], primary), other, *(show(by[f.name], f) for f in shown), *extra]
        lines.append("| " + " | ".join([name, *cells, "yes" if outcome.fair[name] else "no"]) + " |")
    lines += [
        "",
        "Rates in per cent. *within 2 %*: coverage and length are both within 2 % of the baseline's; where they",
    ]
    lines += ["are not, read the rate of hallucinated sentences beside coverage.", ""]
    if outcome.own_pairs:
        lines += [
            f"On pairs or answers of their own, not on {declared.baseline}'s: {', '.join(outcome.own_pairs)}.",
            "",
        ]
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


def _budget(declared: Declared) -> str:
    steps, size = declared.budget.get("max_steps"), declared.budget.get("per_device_train_batch_size")
    return f"{steps} steps of {size} pairs" if steps and size else "the same training"


def write_csv(outcome: Outcome, path: Path) -> None:
    """One line per system and figure: value, interval, and the difference to the baseline with its interval and p."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["system", "figure", "value", "low", "high", "difference", "diff_low", "diff_high", "diff_p"])
        for name, by in outcome.systems.items():
            for figure in outcome.figures:
                own = by[figure.name]
                other = outcome.differences.get(name, {}).get(figure.name)
                more = [other.value, other.low, other.high, other.p] if other else [""] * 4
                writer.writerow([name, figure.name, own.value, own.low, own.high, *more])
            for extra, own in outcome.extra[name].items():
                writer.writerow([name, extra, own.value, own.low, own.high, *[""] * 4])


def plot_differences(outcome: Outcome, path: Path) -> None:
    """Left: differences of the primary figure to the baseline. Right: hallucinated sentences against coverage."""
    primary = BY_NAME[outcome.declared.primary]
    scale = 100 if primary.percent else 1
    ordered = sorted(outcome.differences, key=lambda name: outcome.differences[name][primary.name].value)
    height = 1.2 + 0.27 * len(ordered)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, max(3.2, height)), layout="constrained")
    for row, name in enumerate(ordered):
        found = outcome.differences[name][primary.name]
        if not math.isnan(found.low):
            left.plot([scale * found.low, scale * found.high], [row, row], color="0.45", linewidth=1.4)
        left.plot(
            scale * found.value, row, "o", color="black" if outcome.fair[name] else "white", markeredgecolor="black"
        )
    left.axvline(0, color="0.7", linewidth=0.8)
    left.set_yticks(range(len(ordered)), ordered, fontsize=8)
    left.set_xlabel(f"{primary.label}, points above {outcome.declared.baseline}")
    left.set_title("filled: coverage and length within 2 % of the baseline's", fontsize=9)
    for name, by in outcome.systems.items():
        x, y = 100 * by["coverage"].value, 100 * by["hallucinated_sentences"].value
        right.plot(x, y, "s" if name in (START, outcome.declared.baseline) else "o", color="black", markersize=4)
        right.annotate(name, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
    right.set_xlabel("coverage (%)")
    right.set_ylabel("hallucinated sentences (%)")
    _save(figure, path)


def plot_rewards(curves: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Chosen and rejected reward over training, means over seeds, one colour a system."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for number, (name, runs) in enumerate(curves.items()):
        histories = [reward_history(run) for run in runs]
        steps = sorted(set.intersection(*(set(history) for history in histories)))
        for side, style in (("chosen", "-"), ("rejected", "--")):
            means = [sum(history[step][side] for history in histories) / len(histories) for step in steps]
            axes.plot(steps, means, style, color=f"C{number}", label=f"{name}, {side}")
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("reward, beta x log-ratio")
    axes.legend(fontsize=8)
    _save(figure, path)


def reward_history(run: Run) -> dict[int, dict[str, float]]:
    """step -> {"chosen", "rejected"} rewards of a run's training (its last iteration)."""
    log = json.loads((run.folder / "train" / "model" / "log_history.json").read_text(encoding="utf-8"))
    return {
        int(entry["step"]): {side: float(entry[f"rewards/{side}"]) for side in ("chosen", "rejected")}
        for entry in log
        if "rewards/chosen" in entry and "rewards/rejected" in entry
    }


def _save(figure: Any, path: Path) -> None:
    """The same bytes for the same figures."""
    with plt.rc_context({"svg.hashsalt": "aspo"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
