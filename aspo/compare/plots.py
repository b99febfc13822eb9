"""The plots of `aspo compare`: differences.svg and rewards.svg."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from aspo.compare.outcome import Outcome
from aspo.compare.plan import START, Run
from aspo.compare.work import reward_history
from aspo.evaluation.metrics import BY_NAME


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
    left.set_yticks(range(len(ordered)), [_literal(name) for name in ordered], fontsize=8)
    left.set_xlabel(f"{primary.label}, points above {_literal(outcome.declared.baseline)}")
    left.set_title("filled: coverage and length within 2 % of the baseline's", fontsize=9)
    for name, by in outcome.systems.items():
        x, y = 100 * by["coverage"].value, 100 * by["hallucinated_sentences"].value
        right.plot(x, y, "s" if name in (START, outcome.declared.baseline) else "o", color="black", markersize=4)
        right.annotate(_literal(name), (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
    right.set_xlabel("coverage (%)")
    right.set_ylabel("hallucinated sentences (%)")
    _save(figure, path)


def plot_rewards(curves: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Chosen and rejected reward over training, means over seeds, one colour a system."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for number, (name, runs) in enumerate(curves.items()):
        histories = [{int(entry["step"]): entry for entry in reward_history(run)} for run in runs]
        steps = sorted(set.intersection(*(set(history) for history in histories)))
        for side, style in (("chosen", "-"), ("rejected", "--")):
            means = [sum(h[step][f"rewards/{side}"] for h in histories) / len(histories) for step in steps]
            axes.plot(steps, means, style, color=f"C{number}", label=_literal(f"{name}, {side}"))
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("reward, beta x log-ratio")
    axes.legend(fontsize=8)
    _save(figure, path)


def _literal(name: str) -> str:
    """A name as matplotlib shows it: between two dollars it would read mathematics."""
    return name.replace("$", r"\$")


def _save(figure: Any, path: Path) -> None:
    """The same bytes for the same figures."""
    with plt.rc_context({"svg.hashsalt": "aspo"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
