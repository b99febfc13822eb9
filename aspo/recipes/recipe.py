"""Recipes: a system from data to result in one YAML file, and `aspo run`, which runs one.

    name: MISP-DPO
    about: one line on what it is
    source: arXiv 2509.25717
    ours: what in this file is our choice
    model: llava-hf/llava-1.5-7b-hf      # default of --model
    data:                                # commands in order; each reads the folder that the one before it wrote
      - pairs: {noise-step: 500}         # the command's flags; `aspo run` gives --model, --data, --out and --seed
      - score: {scorer: world}           # in a value, {rows} is what --data was given and {before} the folder of the
                                         # step before; `data: null` leaves --data out
    train: {loss_type: aspo, beta: 0.1}  # fields of AspoConfig; or `online:`, flags of `aspo online`
    iterations: 3                        # data and train again from the model of the iteration before (default 1)
    vary: {train.alpha: [0, 0.5, 1]}     # variants for `aspo compare`; a list of {as, setting...} names each one

Everything is checked before the first step runs. docs/recipes.md has the whole format.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import importlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aspo import cli
from aspo.yaml_files import flag_values, parse_yaml, read_yaml

DATA_COMMANDS = ("pairs", "score", "negatives", "rewards", "controls")
FINAL_COMMANDS = ("train", "online")
MANAGED = ("out",)  # flags that a step cannot set: `aspo run` does
ROWS, BEFORE = "{rows}", "{before}"  # in an option: what `aspo run --data` was given; the folder of the step before
TRAIN_MANAGED = ("model_name_or_path", "train_data", "output_dir", "resume_from_checkpoint")
TEXTS = ("name", "about", "source", "ours", "model")
KEYS = (*TEXTS, "data", *FINAL_COMMANDS, "iterations", "vary")


@dataclass(frozen=True)
class Step:
    """One data command and its flags (without dashes)."""

    command: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. `final`: what makes the model."""

    name: str
    path: Path
    data: tuple[Step, ...]
    final: Step
    model: str | None = None
    about: str = ""
    source: str = ""
    ours: str = ""
    iterations: int = 1
    vary: Any = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """Data steps, then the final one."""
        return *self.data, self.final


def read_mapping(path: Path) -> Mapping[Any, Any]:
    """What a YAML file of `key: value` lines holds. Raises ValueError for anything else."""
    read = read_yaml(path)
    if not isinstance(read, Mapping):
        raise ValueError(f"{path} must hold `key: value` lines, not a {type(read).__name__}")
    return read


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe's form; `check_recipe` checks its flags and fields. Raises ValueError naming what is wrong."""
    path = Path(path)
    read = read_mapping(path)
    for key in read:
        require_known(key, KEYS, f"{path}: unknown key")
    for key in TEXTS:
        if key in read and not (isinstance(read[key], str) and read[key].strip()):
            raise ValueError(f"{path}: {key} is {read[key]!r}; it must be a text")
    if "name" not in read:
        raise ValueError(f"{path}: it has no name")
    finals = [key for key in FINAL_COMMANDS if key in read]
    if len(finals) != 1:
        raise ValueError(f"{path}: it has {' and '.join(finals) or 'neither'}; give one of train and online")
    iterations = read.get("iterations", 1)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"{path}: iterations is {iterations!r}; it must be a number from 1")
    if iterations > 1 and not read.get("data"):
        raise ValueError(f"{path}: iterations is {iterations}, but there are no data steps to repeat")
    data = read.get("data") or ()
    if isinstance(data, str) or not isinstance(data, Sequence):
        raise ValueError(f"{path}: data is {str(data)[:80]!r}; it must be a list of steps")
    recipe = Recipe(
        **{key: read[key] for key in TEXTS if key in read},
        path=path,
        data=tuple(_step(path, number, entry) for number, entry in enumerate(data, start=1)),
        final=Step(finals[0], _options(path, finals[0], read[finals[0]])),
        iterations=iterations,
        vary=read.get("vary"),
    )
    for variant in expand(recipe):  # refuses a bad `vary`
        require_name(path, "name", variant.name)
    return recipe


def require_name(path: Path, what: str, text: Any) -> None:
    """ValueError for a text that tables and comments cannot hold as it is: a line of printable characters."""
    if not isinstance(text, str) or not text.strip() or not text.isprintable() or set("|<>`\\") & set(text):
        raise ValueError(f"{path}: {what} is {text!r}; it must be one line of text without | < > ` and \\")


def require_known(name: Any, known: Iterable[str], what: str) -> None:
    """ValueError "<what> 'name'; did you mean ...?" where `name` is none of `known`."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(
            f"{what} {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
        )


def _options(path: Path, where: str, options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"{path}: {where} is {options!r}; it must be a mapping of options to values")
    return dict(options)


def _step(path: Path, number: int, entry: Any) -> Step:
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(f"{path}: data step {number} is {entry!r}; it must be one `command: {{flag: value}}`")
    ((command, options),) = entry.items()
    require_known(command, DATA_COMMANDS, f"{path}: data step {number}: unknown command")
    return Step(command, _options(path, f"data step {number} ({command})", options))


# ---- changing a recipe ----


def changed(recipe: Recipe, settings: Mapping[str, Any], name: str | None = None) -> Recipe:
    """The recipe with other settings: `COMMAND.FLAG` (of every such step) or `train.FIELD[.KEY]`; None drops it.

    Raises ValueError for a command that the recipe does not have.
    """
    steps = [Step(step.command, copy.deepcopy(step.options)) for step in recipe.steps]
    for setting, value in settings.items():
        command, _, rest = setting.partition(".")
        found = [step for step in steps if step.command == command]
        if not rest or not found:
            commands = ", ".join(dict.fromkeys(step.command for step in steps))
            raise ValueError(
                f"{recipe.path}: setting {setting!r} is none of this recipe's; write COMMAND.FLAG, commands: {commands}"
            )
        for step in found:
            *outer, last = rest.split(".")
            options = step.options
            for key in outer:
                options = options.setdefault(key, {})
            if value is None:
                options.pop(last, None)
            else:
                options[last] = value
    return dataclasses.replace(recipe, data=tuple(steps[:-1]), final=steps[-1], name=name or recipe.name)


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """["train.max_steps=2"] -> {"train.max_steps": 2}; values are read as YAML."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {text!r} is not key=value, such as train.max_steps=2")
        settings[key] = parse_yaml(value, f"--set {text!r}")
    return settings


def expand(recipe: Recipe) -> list[Recipe]:
    """The variants of a recipe with `vary`, named `name [setting=value]`, or the recipe itself."""
    vary = recipe.vary
    if vary is None:
        return [recipe]
    recipe = dataclasses.replace(recipe, vary=None)
    if isinstance(vary, Mapping) and vary and all(isinstance(values, list) and values for values in vary.values()):
        made = []
        for values in itertools.product(*vary.values()):
            settings = dict(zip(vary, values, strict=True))
            label = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
            made.append(changed(recipe, settings, f"{recipe.name} [{label}]"))
        return made
    if isinstance(vary, list) and vary and all(isinstance(v, Mapping) and isinstance(v.get("as"), str) for v in vary):
        if len({variant["as"] for variant in vary}) != len(vary):
            raise ValueError(f"{recipe.path}: two variants of `vary` have the same name")
        return [
            changed(recipe, {k: v for k, v in variant.items() if k != "as"}, f"{recipe.name} [{variant['as']}]")
            for variant in vary
        ]
    raise ValueError(
        f"{recipe.path}: vary is {vary!r}; write {{setting: [values]}} for a grid, or a list of "
        "{as: name, setting: value}"
    )


# ---- checking, and command lines ----


class _Strict(cli.Parser):
    def error(self, message: str):  # type: ignore[no-untyped-def]
        raise ValueError(message)


def command_parser(command: str) -> cli.Parser:
    """The parser of an `aspo` command, which raises ValueError instead of leaving the program."""
    require_known(command, cli.COMMANDS, "unknown command")
    parser = _Strict(prog=f"aspo {command}", exit_on_error=False)
    importlib.import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    return parser


def check_recipe(recipe: Recipe) -> None:
    """Parse every step as its command would. Raises ValueError for an unknown or missing flag or field, a bad value."""
    for number, step in enumerate(recipe.steps, start=1):
        where = f"{recipe.path}: {step.command}"
        if step is not recipe.final:
            where = f"{recipe.path}: data step {number} ({step.command})"
        try:
            if step.command == "train":
                check_train(step.options)
            else:
                _check_flags(step)
        except argparse.ArgumentError as error:
            raise ValueError(f"{where}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _check_flags(step: Step) -> None:
    parser = command_parser(step.command)
    flags = [option[2:] for option in parser._option_string_actions if option.startswith("--") and option != "--help"]
    for name in step.options:
        if name in MANAGED:
            raise ValueError(f"--{name} is set by `aspo run`: leave it out")
        require_known(name, [flag for flag in flags if flag not in MANAGED], "unknown flag")
    parser.parse_args(arguments(step, "model", "data", Path("out"), 0)[1:])


def check_train(options: Mapping[str, Any]) -> None:
    """Build the AspoConfig of `train` options. Raises ValueError for an unknown field, or a bad value."""
    from aspo.config import AspoConfig
    from aspo.train import parse_config

    fields = [option.name for option in dataclasses.fields(AspoConfig) if option.init]
    for name in options:
        if name in TRAIN_MANAGED:
            raise ValueError(f"{name} is set by `aspo run`: leave it out")
        require_known(name, fields, "unknown field")
    step = Step("train", dict(options))
    parse_config(command_parser("train").parse_args(arguments(step, "model", "data", Path("out"), 0)[1:]))


def arguments(step: Step, model: str, data: str, out: Path, seed: int, rows: str = "") -> list[str]:
    """The step's `aspo` command line. --model, --data and --seed are given where the step does not set them.

    data: the folder of the step before, or what `aspo run --data` was given, which is `rows` in every step.
    """
    options = {name: _filled(value, rows or data, data) for name, value in step.options.items()}
    if step.command == "train":
        from aspo.train import as_flags

        own = {"model_name_or_path": model, "train_data": data, "output_dir": str(out)}
        return ["train", *as_flags({"seed": seed, **options, **own})]
    known = command_parser(step.command)._option_string_actions
    given = {name: value for name, value in (("model", model), ("seed", seed)) if f"--{name}" in known}
    line = [step.command]
    for name, value in {**given, "data": data, **options, "out": str(out)}.items():
        if value is None or value is False:
            continue
        line += [f"--{name}", *([] if value is True else flag_values(name, value))]
    return line


def _filled(value: Any, rows: str, before: str) -> Any:
    return value.replace(ROWS, rows).replace(BEFORE, before) if isinstance(value, str) else value
