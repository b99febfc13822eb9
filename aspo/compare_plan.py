"""What `aspo compare` is to do: the comparisons declared beforehand, the systems of the recipes, and each run's key."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from aspo.keys import environment_key, key_of, options_key, source_key
from aspo.metrics import BY_NAME
from aspo.recipe import Recipe, changed, check_recipe, command_parser, expand, load_recipe, require_known
from aspo.recipes import data_plan

DIRECTIONS = ("higher", "lower", "none")
START = "start model"  # its own row of the table: nothing is trained
FORM = {"unparseable": 0.01, "duplicate": 0.01, "eos": 0.99, "tokens": 0.05, "coverage": 0.98}
EXTRA_SCENES = 300  # validation scenes on which the divergence and the image's part are measured
TEST_SEED = 0  # of which minimal pairs are taken, and of the noise on images
BATCH = 250  # rows at a time, of evaluation: sampled answers depend on it
MAX_NEW_TOKENS = 64
BLANK = (217, 217, 217)  # the mean colour of the world's pictures


@dataclass(frozen=True)
class Scenes:
    """Rows to evaluate on: `scenes` of `data` behind the first `skip`."""

    data: str
    scenes: int
    skip: int = 0
    minimal_pairs: int | None = 3
    noise_step: int = 0


@dataclass(frozen=True)
class Declared:
    """A file of comparisons declared beforehand. docs/evidence.md describes its keys.

    budget: fields of AspoConfig that every system trains with. grid: `learning_rate` and `beta_times` to try, `seed`.
    form: what a run of the grid must keep, see FORM. matched: systems that are another one at a third one's divergence.
    comparisons: `system`, `against`, `direction` (what is expected of the primary figure), `expected_by`, `reported`.
    """

    path: Path
    baseline: str
    model: str
    data: str
    prompts: int
    test: Scenes
    validation: Scenes
    comparisons: tuple[dict[str, str], ...]
    primary: str = "minimal_pair_accuracy"
    budget: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    form: dict[str, float] = field(default_factory=lambda: dict(FORM))
    matched: tuple[dict[str, str], ...] = ()
    curves: tuple[str, ...] = ()


def load_declared(path: str | Path) -> Declared:
    """Read the file. Raises ValueError for an unknown key, figure or direction, or a missing value."""
    path = Path(path)
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(read, Mapping):
        raise ValueError(f"{path} must hold `key: value` lines, not a {type(read).__name__}")
    fields = {f.name: f for f in dataclasses.fields(Declared) if f.name != "path"}
    for key in read:
        require_known(key, fields, f"{path}: unknown key")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in read]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    values = dict(read)
    for key in ("test", "validation"):
        for name in values[key]:
            require_known(name, [f.name for f in dataclasses.fields(Scenes)], f"{path}: {key}: unknown key")
        values[key] = Scenes(**values[key])
    for key in values.get("form", {}):
        require_known(key, FORM, f"{path}: form: unknown key")
    values["form"] = {**FORM, **values.get("form", {})}
    for key in values.get("grid", {}):
        require_known(key, ("learning_rate", "beta_times", "seed"), f"{path}: grid: unknown key")
    for entry in values["comparisons"]:
        for key in entry:
            require_known(key, ("system", "against", "direction", "expected_by", "reported"), f"{path}: unknown key")
        if {"system", "against", "direction"} - entry.keys():
            raise ValueError(f"{path}: comparison {entry} needs system, against and direction")
        require_known(entry["direction"], DIRECTIONS, f"{path}: unknown direction")
    require_known(values.get("primary", "minimal_pair_accuracy"), BY_NAME, f"{path}: unknown figure")
    tuples = {key: tuple(values[key]) for key in ("comparisons", "matched", "curves") if key in values}
    return Declared(path=path, **{**values, **tuples})


@dataclass(frozen=True)
class System:
    """One row of the table. recipe: None = untrained. settings: changes to it, such as those that the grid chose."""

    name: str
    recipe: Recipe | None
    settings: dict[str, Any] = field(default_factory=dict)


def systems_of(paths: Sequence[Path], declared: Declared) -> list[System]:
    """Every variant of every recipe, with the declared budget and prompts; all are checked.

    Raises ValueError for two of one name, a baseline that no recipe has, or a recipe that does not pass its check.
    """
    found: dict[str, System] = {}
    for path in paths:
        for recipe in expand(load_recipe(path)):
            if recipe.name in found or recipe.name == START:
                raise ValueError(f"{path}: the name {recipe.name!r} is taken; give every recipe its own")
            recipe = budgeted(recipe, declared)
            check_recipe(recipe)
            found[recipe.name] = System(recipe.name, recipe)
    for entry in declared.matched:
        require_known(entry["recipe_of"], found, f"{declared.path}: matched: unknown system")
        twin = found[entry["recipe_of"]].recipe
        assert twin is not None  # the untrained model is no recipe's
        found[entry["system"]] = System(entry["system"], dataclasses.replace(twin, name=entry["system"]))
    require_known(declared.baseline, found, f"{declared.path}: no recipe is the baseline")
    return list(found.values())


def budgeted(recipe: Recipe, declared: Declared) -> Recipe:
    """The recipe with the budget that all systems share: training fields, and prompts of its first data step.

    A recipe of several iterations divides the steps and the prompts among them. `online` recipes keep their own.
    """
    settings: dict[str, Any] = {}
    if recipe.final.command == "train":
        settings = {f"train.{name}": value for name, value in declared.budget.items()}
        settings |= {"train.save_strategy": "no", "train.report_to": "none", "train.disable_tqdm": True}
        if recipe.iterations > 1 and "max_steps" in declared.budget:
            settings["train.max_steps"] = math.ceil(declared.budget["max_steps"] / recipe.iterations)
    if recipe.data:
        first = recipe.data[0]
        if (
            "--limit" in command_parser(first.command)._option_string_actions
            and first.options.get("data", "") is not None
        ):
            prompts = math.ceil(declared.prompts / recipe.iterations)
            limited = dataclasses.replace(first, options={**first.options, "limit": prompts})
            recipe = dataclasses.replace(recipe, data=(limited, *recipe.data[1:]))
    return changed(recipe, settings)


@dataclass(frozen=True)
class Run:
    """One system trained with one seed and evaluated: everything a worker needs."""

    system: System
    seed: int
    scenes: Scenes
    extra: Scenes
    model: str
    data: str
    cache: Path
    folder: Path
    key: str

    @property
    def recipe(self) -> Recipe | None:
        """With the system's settings."""
        return None if self.system.recipe is None else changed(self.system.recipe, self.system.settings)

    @property
    def result(self) -> Path:
        return self.folder / "result.json"


def make_run(system: System, seed: int, scenes: Scenes, declared: Declared, out: Path) -> Run:
    """The run of a system and seed, whose folder is named by a key of everything that decides its figures.

    That is everything but the code, which result.json notes (`aspo.keys.code_key`).
    """
    extra = dataclasses.replace(declared.validation, scenes=min(EXTRA_SCENES, declared.validation.scenes))
    recipe = None if system.recipe is None else changed(system.recipe, system.settings)
    if recipe is not None and recipe.test:
        step = int(recipe.test["noise-step"])
        scenes, extra = (dataclasses.replace(s, noise_step=step) for s in (scenes, extra))
    model = declared.model if recipe is None else model_of(recipe, declared)
    what = None
    if recipe is not None:
        steps = [[step.command, options_key(step.command, step.options)] for step in recipe.steps]
        what = [steps, recipe.iterations, source_key(declared.data)]
    judged = [[dataclasses.asdict(s), source_key(s.data)] for s in (scenes, extra)]
    measured = [TEST_SEED, BATCH, MAX_NEW_TOKENS, BLANK]
    key = key_of(what, seed, source_key(model), judged, measured, environment_key())
    slug = re.sub(r"[^a-z0-9]+", "-", system.name.lower()).strip("-")
    return Run(
        system,
        seed,
        scenes,
        extra,
        model,
        declared.data,
        out / "cache",
        out / "runs" / slug / f"seed-{seed}-{key[:8]}",
        key,
    )


def model_of(recipe: Recipe, declared: Declared) -> str:
    """A recipe's own start model (a regime has one), or the declared one."""
    return recipe.model or declared.model


def first_data(run: Run) -> list[Any]:
    """The data steps of a run's first iteration, which it shares with the runs of the same first steps."""
    recipe = run.recipe
    if recipe is None:
        return []
    return data_plan(recipe, run.model, source_key(run.model), run.data, run.cache, run.seed)
