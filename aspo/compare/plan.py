"""What `aspo compare` is to do: the comparisons declared beforehand, the systems of the recipes, and each run's key."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aspo.evaluation.metrics import BY_NAME
from aspo.recipes.command import data_plan
from aspo.recipes.keys import environment_key, key_of, options_key, source_key
from aspo.recipes.recipe import (
    Recipe,
    changed,
    check_recipe,
    command_parser,
    expand,
    load_recipe,
    read_mapping,
    require_known,
    require_name,
)

DIRECTIONS = ("higher", "lower", "none")
START = "start model"  # its own row of the table: nothing is trained
FORM = {"unparseable": 0.01, "duplicate": 0.01, "eos": 0.99, "tokens": 0.05, "coverage": 0.98}
GRID = ("learning_rate", "beta_times", "seed")
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

    budget: fields of AspoConfig that every system trains with. grid: `learning_rate`, `beta_times`: what to try;
    `seed`: a list (the file may have one number).
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
    """Read the file. Raises ValueError for an unknown key, figure or direction, a missing or impossible value."""
    path = Path(path)
    read = read_mapping(path)
    fields = {f.name: f for f in dataclasses.fields(Declared) if f.name != "path"}
    for key in read:
        require_known(key, fields, f"{path}: unknown key")
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in read]:
        raise ValueError(f"{path}: {missing[0]} is missing")
    values = dict(read)
    for key in ("baseline", "model", "data"):
        if not isinstance(values[key], str):
            raise ValueError(f"{path}: {key} is {values[key]!r}; it must be a name")
    _need_number(path, "prompts", values["prompts"], 1)
    for key in ("test", "validation"):
        values[key] = _scenes(path, key, values[key])
    for key, known in (("form", FORM), ("grid", GRID)):
        _need_keys(path, key, values.setdefault(key, {}), known)
    _need_keys(path, "budget", values.get("budget", {}), None)
    for key, value in values["form"].items():
        _need_number(path, f"form: {key}", value, 0, whole=False)
    values["form"] = {**FORM, **values["form"]}
    values["grid"] = _grid(path, values["grid"])
    for key, needed, more in (
        ("comparisons", ("system", "against", "direction"), ("expected_by", "reported")),
        ("matched", ("system", "recipe_of", "kl_of"), ()),
    ):
        if not isinstance(values.get(key, []), list):
            raise ValueError(f"{path}: {key} is {values[key]!r}; it must be a list")
        for entry in values.get(key, []):
            _need_keys(path, key, entry, (*needed, *more))
            if set(needed) - entry.keys():
                raise ValueError(f"{path}: {key}: {entry} needs {', '.join(needed[:-1])} and {needed[-1]}")
            for name, text in entry.items():
                require_name(path, f"{key}: {name}", text)
    for entry in values["comparisons"]:
        require_known(entry["direction"], DIRECTIONS, f"{path}: unknown direction")
    if not isinstance(values.get("curves", []), list):
        raise ValueError(f"{path}: curves is {values['curves']!r}; it must be a list of systems")
    primary = values.get("primary", "minimal_pair_accuracy")
    require_known(primary, BY_NAME, f"{path}: unknown figure")
    if not BY_NAME[primary].better:
        raise ValueError(f"{path}: primary is {primary}, of which neither more nor less is better: name another figure")
    tuples = {key: tuple(values[key]) for key in ("comparisons", "matched", "curves") if key in values}
    declared = Declared(path=path, **{**values, **tuples})
    _need_apart(declared)
    return declared


def _need_keys(path: Path, what: str, found: Any, known: Iterable[str] | None) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: {what}: {found!r} must be `key: value`")
    for key in found:
        require_known(key, found if known is None else known, f"{path}: {what}: unknown key")


def _need_number(path: Path, what: str, value: Any, least: float, whole: bool = True) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value < least:
        hint = " (YAML reads 3e-4 as text: write 3.0e-4)" if isinstance(value, str) and not whole else ""
        raise ValueError(f"{path}: {what} is {value!r}; it must be a {'whole ' * whole}number from {least:g}{hint}")


def _grid(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The grid's values, `seed` as a list."""
    for key in ("learning_rate", "beta_times"):
        values = found.get(key, [1])
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid: {key} is {values!r}; it must be a list of numbers")
        for value in values:
            _need_number(path, f"grid: {key}", value, 0, whole=False)
    if "seed" not in found:
        return dict(found)
    seed = found["seed"]
    seeds = seed if isinstance(seed, list) and seed else [seed]
    for value in seeds:
        _need_number(path, "grid: seed", value, 0)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: grid: seed is {seed}; each is to be there once")
    return {**found, "seed": seeds}


def _scenes(path: Path, key: str, found: Any) -> Scenes:
    _need_keys(path, key, found, [f.name for f in dataclasses.fields(Scenes)])
    for name in ("data", "scenes"):
        if name not in found:
            raise ValueError(f"{path}: {key}: {name} is missing")
    least = {"scenes": 1, "skip": 0, "minimal_pairs": 0, "noise_step": 0}
    for name, value in found.items():
        if name != "data" and not (name == "minimal_pairs" and value is None):
            _need_number(path, f"{key}: {name}", value, least[name])
    return Scenes(**found)


def _need_apart(declared: Declared) -> None:
    """Raises ValueError where two of test, validation and training read the same rows."""
    parts = {
        "test": (declared.test.data, declared.test.skip, declared.test.scenes),
        "validation": (declared.validation.data, declared.validation.skip, declared.validation.scenes),
        "data": (declared.data, 0, declared.prompts),
    }
    for (one, (data, skip, count)), (two, (other, other_skip, other_count)) in itertools.combinations(parts.items(), 2):
        if data == other and skip < other_skip + other_count and other_skip < skip + count:
            raise ValueError(f"{declared.path}: {one} and {two} share rows of {data}: set skip, or another source")


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
        for key in ("recipe_of", "kl_of"):
            require_known(entry[key], found, f"{declared.path}: matched: no given recipe has")
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

    That is everything but the code, which result.json notes (`aspo.recipes.keys.code_key`).
    """
    extra = dataclasses.replace(declared.validation, scenes=min(EXTRA_SCENES, declared.validation.scenes))
    recipe = None if system.recipe is None else changed(system.recipe, system.settings)
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
