"""What `aspo compare` says beside its figures: when the test scenes were opened, and what is not alike."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from aspo.compare.grid import own_beta
from aspo.compare.plan import START, Declared, Run, System, first_data
from aspo.resume import write_json

OPENED = "opened.json"


def note_opening(out: Path, declared: Declared, chosen: Path | None, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """Note in OUT/opened.json what is declared and chosen, before a test scene is read; returns the table's lines.

    The file holds every opening whose hashes differ from the one before, and every recipe, settings included, of each
    system that was run. A system that joins later changes nothing about the others.
    Raises ValueError where the file cannot be read: it must not be written over.
    """
    path = out / OPENED
    now = {"declared": _sha256(declared.path), "chosen": _sha256(chosen)}
    recipes = {name: key for name, of in runs.items() if (key := _recipe_hash(of[0])) is not None}
    record: dict = {"openings": [], "recipes": {}}
    if path.exists():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            first = record["openings"][0]["time"]
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(f"{path} cannot be read ({error}): restore it, or use another --out") from error
    else:
        first = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    hashes = [{name: opening[name] for name in now} for opening in record["openings"]]
    if not hashes or hashes[-1] != now:
        opened = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        record["openings"].append({"time": opened, **now})
    for name, key in recipes.items():
        if key not in record["recipes"].setdefault(name, []):
            record["recipes"][name].append(key)
    changed = [name for name in recipes if len(record["recipes"][name]) > 1]
    write_json(path, record)
    settings = "the recipes' own" if chosen is None else f"`{chosen.name}` {now['chosen']}"
    lines = [
        f"Test scenes first opened {first} (`{OPENED}`). sha256: declared `{declared.path.name}` {now['declared']}; "
        f"settings {settings}."
    ]
    if any(before["declared"] != now["declared"] for before in hashes):
        lines.append("**The declared file changed after the test scenes were opened.**")
    if changed:
        lines.append(f"**Recipes or their settings changed after the test scenes were opened: {'; '.join(changed)}.**")
    return lines


def _sha256(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _recipe_hash(run: Run) -> str | None:
    if (recipe := run.recipe) is None:
        return None
    steps = [[step.command, step.options] for step in recipe.steps]
    return hashlib.sha256(json.dumps([steps, recipe.iterations], sort_keys=True, default=str).encode()).hexdigest()


def own_pairs(runs: Mapping[str, Sequence[Run]], declared: Declared) -> list[str]:
    """Systems that do not train on the baseline's pairs: their first step is another one."""
    shared = {planned.key for planned in first_data(runs[declared.baseline][0])[:1]}
    return [
        name
        for name, of in runs.items()
        if name != START and {planned.key for planned in first_data(of[0])[:1]} != shared
    ]


def unlike(runs: Mapping[str, Sequence[Run]], declared: Declared) -> list[str]:
    """A line for each way in which a system's training is not like the baseline's."""
    lines = []
    if own := own_pairs(runs, declared):
        lines.append(f"On pairs or answers of their own, not on {declared.baseline}'s: {'; '.join(own)}.")
    fewer = []
    for name, of in runs.items():
        if (recipe := of[0].recipe) is None:
            continue
        if recipe.iterations > 1 and recipe.data:
            prompts = recipe.data[0].options.get("limit", "all")
            steps = recipe.final.options.get("max_steps", "all")
            lines.append(
                f"{name}: {recipe.iterations} iterations of {steps} steps, each on the same first {prompts} prompts."
            )
        if recipe.final.options.get("loss_type") == "kto":
            size = recipe.final.options.get("per_device_train_batch_size", "N")
            lines.append(f"{name}: a step has {size} answers, not {size} pairs.")
        if recipe.final.command == "online":
            lines.append(f"{name}: samples its own answers, with a budget of its own (see its recipe).")
        if own_beta(recipe) is None and len(declared.grid.get("beta_times", [])) > 1:
            fewer.append(name)
    if fewer:
        lines.append(f"Without a beta, so with fewer settings tried in the grid: {'; '.join(fewer)}.")
    return lines


def not_given(systems: Sequence[System], declared: Declared) -> list[str]:
    """Names in the declared comparisons and curves that no given recipe has: those comparisons are not run."""
    named = [c[side] for c in declared.comparisons for side in ("system", "against")] + list(declared.curves)
    known = {START, *(system.name for system in systems)}
    return [name for name in dict.fromkeys(named) if name not in known]
