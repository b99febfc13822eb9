"""What `aspo compare` writes: table.md, table.json, figures.csv, seeds.csv and the plots."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from aspo.compare.outcome import EXTRA, Outcome
from aspo.compare.plan import Run
from aspo.compare.statistics import Interval
from aspo.compare.table import markdown
from aspo.resume import nan_to_null, write_json

RECORD = (  # of an outcome, in table.json
    "seeds",
    "scenes",
    "systems",
    "differences",
    "extra",
    "extra_differences",
    "verdicts",
    "settings",
    "seconds",
    "data_seconds",
    "failed",
    "form_kept",
    "smoke",
    "notes",
    "codes",
)


def write_all(outcome: Outcome, out: Path, curves: Mapping[str, Sequence[Run]]) -> None:
    """All files, the table last."""
    from aspo.compare.plots import plot_differences, plot_rewards  # matplotlib: only where something is drawn

    write_csv(outcome, out / "figures.csv")
    write_seeds(outcome, out / "seeds.csv")
    plot_differences(outcome, out / "differences.svg")
    if curves:
        plot_rewards(curves, out / "rewards.svg")
    record = {name: getattr(outcome, name) for name in RECORD}
    write_json(out / "table.json", nan_to_null(record, asdict))
    (out / "table.md").write_text(markdown(outcome), encoding="utf-8")


def write_csv(outcome: Outcome, path: Path) -> None:
    """One line per system and figure: value, interval, and the difference to the baseline with its interval and p."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["system", "figure", "value", "low", "high", "difference", "diff_low", "diff_high", "diff_p"])
        for name, by in outcome.systems.items():
            for figure in outcome.figures:
                own = by[figure.name]
                other = outcome.differences.get(name, {}).get(figure.name)
                writer.writerow([name, figure.name, own.value, own.low, own.high, *_difference(other)])
            for extra, own in outcome.extra[name].items():
                other = outcome.extra_differences.get(name, {}).get(extra)
                writer.writerow([name, extra, own.value, own.low, own.high, *_difference(other)])


def _difference(found: Interval | None) -> list[float | str]:
    return [""] * 4 if found is None else [found.value, found.low, found.high, found.p]


def write_seeds(outcome: Outcome, path: Path) -> None:
    """One line per run: its figures, and what its answers lost of the start model's form (empty: nothing)."""
    figures = [*outcome.results[outcome.declared.baseline][0]["summary"], *EXTRA]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["system", "seed", *figures, "lost"])
        for name, of in outcome.results.items():
            lost = outcome.form_lost.get(name, [[]] * len(of))
            for seed, (result, what) in enumerate(zip(of, lost, strict=True)):
                values = result["summary"] | result["extra"]
                writer.writerow([name, seed, *(values.get(figure, "") for figure in figures), "; ".join(what)])
