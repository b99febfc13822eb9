"""`aspo run`: a recipe's data steps, then its training, each kept under a key of all that decides what comes out."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from aspo import cli
from aspo.recipes.keys import code_key, environment_key, key_of, options_key, source_key
from aspo.recipes.recipe import (
    Recipe,
    arguments,
    changed,
    check_recipe,
    command_parser,
    expand,
    load_recipe,
    parse_settings,
)
from aspo.resume import write_json

DONE = ".done.json"  # beside a step's folder, once its command has ended
BEGUN = ".begun.json"  # the same, from before its command begins


@dataclass(frozen=True)
class Planned:
    """A data step with everything settled: what is run, where its rows will lie, and the key of their content."""

    line: list[str]
    folder: Path
    key: str

    @property
    def marker(self) -> Path:
        return self.folder.with_name(self.folder.name + DONE)

    @property
    def begun(self) -> Path:
        return self.folder.with_name(self.folder.name + BEGUN)

    @property
    def done(self) -> bool:
        return self.marker.is_file()


class StepFailed(Exception):
    """A command of a recipe ended with a status other than 0; it has said why."""

    def __init__(self, line: Sequence[str], status: int) -> None:
        super().__init__(f"aspo {shlex.join(line)}: ended with status {status}")
        self.status = status


def data_plan(recipe: Recipe, model: str, model_key: str, data: str, cache: Path, seed: int) -> list[Planned]:
    """The recipe's data steps. A folder in `cache` is named by its step's key, a hash of all that is before it too."""
    plan: list[Planned] = []
    key, source = key_of(source_key(data), environment_key()), data
    for step in recipe.data:
        known = command_parser(step.command)._option_string_actions
        chain = [model_key if "--model" in known else None, seed if "--seed" in known else None]
        key = key_of(step.command, options_key(step.command, step.options), *chain, key)
        folder = cache / f"{step.command}-{key}"
        plan.append(Planned(arguments(step, model, source, folder, seed, data), folder, key))
        source = str(folder)
    return plan


def run_planned(planned: Planned) -> None:
    """Run a data step unless it is done. One that was stopped goes on: its command does that itself.

    The same step by another line (its model or rows lie elsewhere now) would be refused by its command: it begins anew.
    """
    if planned.done:
        return
    if planned.folder.exists() and _line_begun(planned) != planned.line:
        shutil.rmtree(planned.folder)
    write_json(planned.begun, planned.line)
    start = time.perf_counter()
    status = cli.main(planned.line)
    if status:
        raise StepFailed(planned.line, status)
    seconds = round(time.perf_counter() - start, 1)
    command = shlex.join(["aspo", *planned.line])
    write_json(planned.marker, {"command": command, "key": planned.key, "seconds": seconds, "code": code_key()})


def _line_begun(planned: Planned) -> list[str] | None:
    try:
        return json.loads(planned.begun.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def run_recipe(recipe: Recipe, model: str, data: str, out: Path, cache: Path, seed: int) -> Path:
    """Run everything, one line each; returns the folder of the result. Raises StepFailed."""
    model_key = source_key(model)
    total = recipe.iterations * len(recipe.steps)
    number = 0

    def announce(line: Sequence[str], done: bool = False) -> None:
        nonlocal number
        number += 1
        print(f"[{number}/{total}] $ aspo {shlex.join(line)}" + ("  (done before)" if done else ""), flush=True)

    for iteration in range(1, recipe.iterations + 1):
        last = iteration == recipe.iterations
        folder = out / "model" if last else out / f"iteration-{iteration}"
        rows, rows_key = data, source_key(data)
        for planned in data_plan(recipe, model, model_key, data, cache, seed):
            announce(planned.line, planned.done)
            run_planned(planned)
            rows, rows_key = str(planned.folder), planned.key
        line = arguments(recipe.final, model, rows, folder, seed, data)
        announce(line)
        status = cli.main(line)
        if status:
            raise StepFailed(line, status)
        if not last:
            model_key = key_of(options_key(recipe.final.command, recipe.final.options), seed, model_key, rows_key)
            model = str(merged(model, folder))
    return folder


def merged(base: str, trained: Path) -> Path:
    """A folder with the whole model that `trained` holds: itself, or where it is an adapter, its sum with `base`."""
    from aspo.model import ADAPTER_CONFIG
    from aspo.policy import merge_adapter

    if not (trained / ADAPTER_CONFIG).is_file():
        return trained
    target = trained / "merged"
    return target if (target / "config.json").is_file() else merge_adapter(base, trained, target)


DESCRIPTION = """Run a recipe: its data steps, then its training.

  aspo run recipes/papers/dpo-llava-1.5-7b.yaml --data llava_instruct_150k.json --out runs/dpo
  aspo run recipes/world/aspo.yaml --model world --data world:train --out runs/aspo --set train.max_steps=20

A recipe is a YAML file (docs/recipes.md). All of it is checked before the first step. What a data step makes is kept in
--cache under a key of its command, its flags and everything before it: the same command run again goes on where it was
stopped, and recipes with the same first steps can share a cache. The result is in OUT/model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `aspo run`."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("recipe", type=Path, help="the recipe's file")
    add("--model", help="folder or hub name of the start model; world = the embedded one (default: the recipe's)")
    add("--data", required=True, help="rows that the first step reads: prompts, or preference rows for training alone")
    add("--out", required=True, type=Path, help="folder for everything it makes")
    add("--cache", type=Path, help="folder of the data steps' results (default: OUT/data)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting: COMMAND.FLAG=VALUE; repeatable",
    )
    add("--variant", help="which of the variants, where the recipe has `vary`")
    add("--seed", type=int, default=0, help="--seed of every step that has one and does not set it (default: 0)")
    add("--check", action="store_true", help="check the recipe and show its commands, but run nothing")


def run(args: argparse.Namespace) -> int:
    """`aspo run`; returns 0, or the status of the command that failed."""
    recipe = changed(_variant(load_recipe(args.recipe), args.variant), parse_settings(args.set))
    model = args.model or recipe.model
    if model is None:
        raise ValueError(f"{args.recipe} names no model: give --model")
    check_recipe(recipe)
    cache = args.cache or args.out / "data"
    if args.check:
        plan = [p.line for p in data_plan(recipe, model, source_key(model), args.data, cache, args.seed)]
        rows = plan[-1][plan[-1].index("--out") + 1] if plan else args.data
        for line in [*plan, arguments(recipe.final, model, rows, args.out / "model", args.seed, args.data)]:
            print(f"$ aspo {shlex.join(line)}")
        return 0
    try:
        folder = run_recipe(recipe, model, args.data, args.out, cache, args.seed)
    except StepFailed as failed:
        print(failed, file=sys.stderr)
        return failed.status
    # Last, so that it is always what made the result that is there.
    write_json(args.out / "recipe.json", {**asdict(recipe), "model": model, "rows": args.data, "seed": args.seed})
    print(f"{recipe.name}: done, in {folder}")
    return 0


def _variant(recipe: Recipe, wanted: str | None) -> Recipe:
    variants = {variant.name.removeprefix(recipe.name).strip(" []"): variant for variant in expand(recipe)}
    if recipe.vary is None:
        if wanted is not None:
            raise ValueError(f"{recipe.path} has no variants: drop --variant {wanted!r}")
        return recipe
    if wanted not in variants:
        raise ValueError(f"{recipe.path} has variants: give --variant, one of {', '.join(map(repr, variants))}")
    return variants[wanted]
