"""The grid of `aspo compare --grid`: the same few learning rates and betas for every system, on validation scenes.

The rule, written down before it was used: of a system's runs that keep their form, the one with the best validation
figure; of equal ones the smaller learning rate. Form is kept where, beside the start model's answers,

    unparseable <= 1 %     duplicate <= start + 1 point     eos >= 99 %     tokens within 5 %     coverage >= 98 %

(the last two of start's; a declared file can set other limits). With several seeds a setting keeps its form where it
does with each, and its figure is their mean. Where no run keeps it, the system gets its smallest
learning rate, and grid.md and chosen.yaml say so. They also say where the chosen rate is the least or the greatest that
was tried: a better one may lie beyond.
A matched system is another one at the learning rate that gives it a third one's divergence from the start model.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from aspo.compare.plan import START, Declared, System
from aspo.evaluation.metrics import BY_NAME
from aspo.recipes.recipe import Recipe
from aspo.resume import nan_to_null, write_json
from aspo_kernels import objectives

KL_TOLERANCE = 0.15  # of the divergence that a matched system is to have; its own standard error is about that
MATCH_TRIES = 6
LEARNING_RATE = {"train": "train.learning_rate", "online": "online.learning-rate"}
Result = Mapping[str, Any]


def candidates(recipe: Recipe, declared: Declared) -> list[dict[str, Any]]:
    """Settings to try: every learning rate with every multiple of the recipe's beta, where it has one."""
    rates = declared.grid["learning_rate"]
    key = LEARNING_RATE[recipe.final.command]
    beta = own_beta(recipe)
    if beta is None:
        return [{key: rate} for rate in rates]
    times = declared.grid.get("beta_times", [1])
    return [{key: rate, "train.beta": beta * k} for k, rate in itertools.product(times, rates)]


def own_beta(recipe: Recipe) -> float | None:
    """The recipe's beta or its objective's default; None where it has none, or several objectives differ in it."""
    options = recipe.final.options
    if recipe.final.command != "train":
        return None
    if "beta" in options:
        return float(options["beta"])
    names = options.get("loss_type", "aspo")
    known = [objectives.options(name) for name in ([names] if isinstance(names, str) else names)]
    defaults = {found["beta"] for found in known if "beta" in found}
    return float(defaults.pop()) if len(defaults) == 1 else None


def merged(results: Sequence[Result]) -> Result:
    """A setting's results with several seeds as one: means of the figures, each result under "each"."""
    if len(results) == 1:
        return results[0]
    means = {
        part: {name: math.fsum(r[part][name] for r in results) / len(results) for name in results[0][part]}
        for part in ("summary", "extra")
    }
    return {**results[0], **means, "each": list(results)}


def keeps_form(result: Result, start: Result, form: Mapping[str, float]) -> list[str]:
    """What a run's answers (with several seeds, any one's) lost beside the start model's; empty where they keep it."""
    if "each" in result:
        return [f"{lost} in seed {r['seed']}" for r in result["each"] for lost in keeps_form(r, start, form)]
    new, old = result["summary"], start["summary"]
    kept = {
        "unparseable": new["unparseable"] <= form["unparseable"],
        "duplicate": new["duplicate"] <= old["duplicate"] + form["duplicate"],
        "eos": new["eos"] >= form["eos"],
        "tokens": abs(new["tokens"] - old["tokens"]) <= form["tokens"] * old["tokens"],
        "coverage": new["coverage"] >= form["coverage"] * old["coverage"],
    }  # False where a figure is undefined, NaN: no answer has a sentence
    return [f"{name} {new[name]:.{1 if name == 'tokens' else 3}f}" for name, holds in kept.items() if not holds]


def choose(results: Sequence[Result], start: Result, declared: Declared) -> tuple[Result, bool]:
    """(the run that the rule picks, whether it keeps its form)."""
    kept = [result for result in results if not keeps_form(result, start, declared.form)]
    sign = -1 if BY_NAME[declared.primary].better == "higher" else 1
    if kept:
        return min(kept, key=lambda r: (sign * r["summary"][declared.primary], _rate(r["settings"]))), True
    return min(results, key=lambda r: _rate(r["settings"])), False


def _rate(settings: Mapping[str, Any]) -> float:
    return float(next(value for key, value in settings.items() if key in LEARNING_RATE.values()))


def at_edge(result: Result, declared: Declared) -> bool:
    """Whether a run's learning rate is the least or the greatest of the grid."""
    rates = declared.grid["learning_rate"]
    return _rate(result["settings"]) in (min(rates), max(rates))


def tries(systems: Sequence[System], declared: Declared) -> list[System]:
    """Every system with every setting of the grid; those that are matched to another come later."""
    matched = {entry["system"] for entry in declared.matched}
    return [
        System(system.name, system.recipe, settings)
        for system in systems
        if system.recipe is not None and system.name not in matched
        for settings in candidates(system.recipe, declared)
    ]


def run_grid(
    systems: Sequence[System],
    declared: Declared,
    run_all: Callable[[Sequence[System]], dict[tuple[str, str], Result]],
    out: Path,
) -> Path:
    """Run the grid and write grid.json, grid.md and chosen.yaml into `out`; returns the last one's path.

    run_all: trains systems (with settings) on the grid's seeds and gives (name, settings as JSON) -> result.
    """
    tried = tries(systems, declared)
    results = run_all([System(START, None), *tried])
    if (START, "{}") not in results:
        raise ValueError("the start model was not evaluated: there is nothing to judge form by")
    start = results[START, "{}"]
    by_system: dict[str, list[Result]] = {}
    for system in tried:
        if (result := results.get((system.name, as_key(system.settings)))) is not None:  # else it failed, and said so
            by_system.setdefault(system.name, []).append(result)
    picks = {name: choose(found, start, declared) for name, found in by_system.items()}
    for entry in declared.matched:
        name = entry["system"]
        if entry["kl_of"] not in picks or entry["recipe_of"] not in picks:
            continue
        twin = next(system for system in systems if system.name == name)
        target = picks[entry["kl_of"]][0]["extra"]["kl"]
        if not target > 0:  # NaN: all of its answers are empty
            continue
        own = picks[entry["recipe_of"]][0]
        known = [r for r in by_system[entry["recipe_of"]] if _same_beta(r, own)]
        found = match_kl(twin, target, known, run_all)
        if not found:
            continue
        by_system[name] = found
        best = min(found, key=lambda r: abs(math.log(r["extra"]["kl"] / target)))
        picks[name] = best, not keeps_form(best, start, declared.form)
    return _write(out, declared, start, by_system, picks)


def as_key(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True)


def _same_beta(a: Result, b: Result) -> bool:
    return a["settings"].get("train.beta") == b["settings"].get("train.beta")


def match_kl(
    system: System,
    target: float,
    known: Sequence[Result],
    run_all: Callable[[Sequence[System]], dict[tuple[str, str], Result]],
) -> list[Result]:
    """Runs of `system` whose divergence comes ever closer to `target`, by log-log interpolation over learning rates."""
    key = next(name for name in known[0]["settings"] if name in LEARNING_RATE.values())
    points = {_rate(r["settings"]): r["extra"]["kl"] for r in known if r["extra"]["kl"] > 0}  # NaN: empty answers
    made: list[Result] = []
    for _ in range(MATCH_TRIES if points else 0):
        settings = {**known[0]["settings"], key: next_rate(points, target)}
        tried = System(system.name, system.recipe, settings)
        result = run_all([tried]).get((tried.name, as_key(settings)))
        if result is None or not result["extra"]["kl"] > 0:
            break
        made.append(result)
        points[settings[key]] = result["extra"]["kl"]
        if abs(result["extra"]["kl"] / target - 1) <= KL_TOLERANCE:
            break
    return made


def next_rate(points: Mapping[float, float], target: float) -> float:
    """The learning rate at which the divergence would be `target`: interpolated, or 1.5 times beyond the last known.

    points: learning rate -> divergence, both positive.
    """
    ordered = sorted(points.items())
    for (low, kl_low), (high, kl_high) in itertools.pairwise(ordered):
        if min(kl_low, kl_high) <= target <= max(kl_low, kl_high) and kl_low != kl_high:
            share = math.log(target / kl_low) / math.log(kl_high / kl_low)
            return float(f"{low * (high / low) ** share:.3g}")
    rate, divergence = ordered[-1] if target > ordered[-1][1] else ordered[0]
    return float(f"{rate * (1.5 if target > divergence else 1 / 1.5):.3g}")


def _write(
    out: Path,
    declared: Declared,
    start: Result,
    by_system: Mapping[str, Sequence[Result]],
    picks: Mapping[str, tuple[Result, bool]],
) -> Path:
    matched = {entry["system"] for entry in declared.matched}  # their rates are no grid's
    edge = [name for name, (result, _) in picks.items() if name not in matched and at_edge(result, declared)]
    seeds = declared.grid["seed"]
    lines = [
        f"Validation: {start['scenes']} scenes of {declared.validation.data}, "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; "
        f"start model: {declared.primary} {start['summary'][declared.primary]:.4f}",
        "",
        f"| system | settings | {declared.primary} | hallucinated | coverage | tokens | kl | form | |",
        "|---|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for name, results in by_system.items():
        for result in results:
            summary = result["summary"]
            settings = ", ".join(f"{key.rpartition('.')[2]} {value:g}" for key, value in result["settings"].items())
            lost = ", ".join(keeps_form(result, start, declared.form)) or "kept"
            lines.append(
                f"| {name} | {settings} | {summary[declared.primary]:.4f} | {summary['hallucinated_sentences']:.4f} | "
                f"{summary['coverage']:.4f} | {summary['tokens']:.2f} | {result['extra']['kl']:.3f} | {lost} | "
                f"{'' if result is not picks[name][0] else 'chosen, at the edge' if name in edge else 'chosen'} |"
            )
    (out / "grid.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(out / "grid.json", nan_to_null({"start": start, "runs": by_system}))
    path = out / "chosen.yaml"
    where = f"{start['scenes']} scenes of {declared.validation.data}"
    head = f"# Chosen by `aspo compare --grid` on {where}, by the rule of docs/evidence.md\n"
    lost_form = [name for name, (_, kept) in picks.items() if not kept]
    if lost_form:
        head += f"# No run kept its form: {'; '.join(lost_form)}\n"
    if edge:
        head += f"# The chosen learning rate is at the edge of the grid: {'; '.join(edge)}\n"
    chosen = {name: dict(result["settings"]) for name, (result, _) in picks.items()}
    path.write_text(head + yaml.safe_dump(chosen, sort_keys=False), encoding="utf-8")
    return path
