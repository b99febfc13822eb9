"""What `aspo compare` writes: table.md, table.json, figures.csv, seeds.csv and the plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from aspo.compare.grid import keeps_form
from aspo.compare.plan import START, Declared, Run
from aspo.compare.table import EXTRA, Outcome, markdown
from aspo.resume import write_json


def write_all(outcome: Outcome, out: Path, curves: Mapping[str, Sequence[Run]]) -> None:
    """All files, the table last."""
    from aspo.compare.plots import plot_differences, plot_rewards  # matplotlib: only where something is drawn

    write_csv(outcome, out / "figures.csv")
    plot_differences(outcome, out / "differences.svg")
    if curves:
        plot_rewards(curves, out / "rewards.svg")
    record = asdict(outcome)
    for name in ("declared", "figures"):
        record.pop(name)
    write_json(out / "table.json", json.loads(json.dumps(record), parse_constant=lambda _: None))
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
                more = [other.value, other.low, other.high, other.p] if other else [""] * 4
                writer.writerow([name, figure.name, own.value, own.low, own.high, *more])
            for extra, own in outcome.extra[name].items():
                writer.writerow([name, extra, own.value, own.low, own.high, *[""] * 4])


def write_seeds(runs: Mapping[str, Sequence[Run]], declared: Declared, path: Path) -> None:
    """One line per run: its figures, and what its answers lost of the start model's form (empty: nothing)."""
    results = {name: [json.loads(run.result.read_text(encoding="utf-8")) for run in of] for name, of in runs.items()}
    figures = [*next(iter(results.values()))[0]["summary"], *EXTRA]
    start = results[START][0] if START in results else None
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["system", "seed", *figures, "lost"])
        for name, of in results.items():
            for seed, result in enumerate(of):
                values = result["summary"] | result["extra"]
                lost = keeps_form(result, start, declared.form) if start else []
                writer.writerow([name, seed, *(values.get(figure, "") for figure in figures), "; ".join(lost)])
