"""YAML from strangers: options of `aspo train`, recipes, files of declared comparisons, chosen settings."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from aspo.compare.command import read_chosen
from aspo.compare.plan import Declared, load_declared
from aspo.config import AspoConfig
from aspo.recipes.recipe import DATA_COMMANDS, KEYS, Recipe, check_recipe, expand, load_recipe
from aspo.train import parse_config

from .guard import refusal

# `plugins` names Python to import, which is what it is for; what transformers does with these is not ours.
NOT_DRAWN = {"plugins", "deepspeed", "fsdp", "fsdp_config", "accelerator_config", "liger_kernel_config", "hub_token"}
OPTIONS = sorted({f.name for f in dataclasses.fields(AspoConfig) if f.init} - NOT_DRAWN)
OURS = sorted(set(AspoConfig.__annotations__) - NOT_DRAWN)
WORDS = (
    *("world", "dpo", "aspo", "misp", "sigmoid", "auto", "bfloat16", "policy", "sentence", "on", "off", "null", "yes"),
    *(
        "1e-5",
        "nan",
        "-inf",
        "0x1F",
        "1_000",
        "12:30:45",
        "2020-99-99",
        "2020-01-01",
        "--plugins",
        "--help",
        "-1",
        "-x",
    ),
    *("{rows}", "{before}", "{", "%s", "%(prog)s", "../../x", "a\nb", "\x00", "\ud800", "", " ", "é", "=", "<<", "!x"),
)
TEXT = st.sampled_from(WORDS) | st.text(max_size=8)
NUMBER = st.integers(-2, 40) | st.sampled_from((0.5, 1e-5, -1.0, float("nan"), float("inf"), 10**30, 10**400, 2**63))
LEAF = st.none() | st.booleans() | NUMBER | TEXT
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5
)
FLAGS = st.dictionaries(
    st.sampled_from(("method", "limit", "scorer", "count", "data", "out", "seed")) | TEXT, JSON, max_size=3
)
TRAIN = st.dictionaries(st.sampled_from(OURS) | st.sampled_from(OPTIONS) | TEXT, JSON, max_size=4)
NEEDED = {"model_name_or_path": "world", "train_data": "world:train", "output_dir": "out", "report_to": "none"}
DATA_STEP = st.sampled_from(DATA_COMMANDS) | st.dictionaries(
    st.sampled_from(DATA_COMMANDS) | TEXT, FLAGS | JSON, max_size=2
)
VARY = st.dictionaries(
    st.sampled_from(("train.beta", "train.alpha", "pairs.limit", "train")) | TEXT, st.lists(JSON, max_size=3)
)
RECIPE = st.fixed_dictionaries(
    {"name": st.just("a") | JSON, "train": TRAIN | JSON},
    optional={
        **dict.fromkeys(("about", "source", "ours", "model", "iterations", "other"), JSON),
        "data": st.lists(DATA_STEP | JSON, max_size=3) | JSON,
        "online": FLAGS | JSON,
        "vary": VARY
        | st.lists(st.fixed_dictionaries({"as": TEXT | JSON}, optional={"train.beta": JSON}), max_size=3)
        | JSON,
    },
)
SCENES = st.fixed_dictionaries(
    {"data": st.just("world:test") | JSON, "scenes": st.integers(-1, 9) | JSON}, optional={"skip": JSON}
)
COMPARISON = st.fixed_dictionaries(
    {"system": TEXT | JSON, "against": TEXT | JSON, "direction": st.just("higher") | JSON}
)
DECLARED_KEYS = sorted(f.name for f in dataclasses.fields(Declared))
DECLARED = st.fixed_dictionaries(
    {
        **{"baseline": st.just("DPO") | JSON, "model": st.just("world") | JSON, "data": st.just("world:train") | JSON},
        **{"prompts": st.just(15) | JSON, "test": SCENES | JSON, "validation": SCENES | JSON},
        "comparisons": st.lists(COMPARISON | JSON, max_size=2) | JSON,
    },
    optional={
        **{
            "budget": TRAIN | JSON,
            "grid": st.dictionaries(TEXT, JSON, max_size=2) | JSON,
            "form": JSON,
            "curves": JSON,
        },
        **{"matched": st.lists(JSON, max_size=2) | JSON, "primary": JSON, "other": JSON},
    },
)
CHOSEN = st.dictionaries(TEXT, st.dictionaries(TEXT, JSON, max_size=2) | JSON, max_size=3)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
RAW = st.sampled_from(
    (BOMB, "a: &a [*a]\n", "? [a]\n: b\n", "a: !!python/object/apply:os.system [id]\n", "[" * 3000, "a: " * 50)
)
SYNTAX = st.lists(
    st.sampled_from(
        (
            "a",
            ":",
            " ",
            "\n",
            "- ",
            "&x ",
            "*x",
            "[",
            "]",
            "{",
            "}",
            "!!",
            "|",
            ">",
            "#",
            "'",
            '"',
            "?",
            "<<: ",
            "---\n",
            "\t",
            "0",
            "1:2",
            "@",
            "%",
        )
    ),
    max_size=14,
).map("".join)
WRITTEN = st.one_of(TRAIN.map(lambda options: NEEDED | options), RECIPE, DECLARED, CHOSEN, JSON)
INPUTS = st.one_of(
    st.fixed_dictionaries({"file": st.just("train"), "yaml": TRAIN.map(lambda options: _dump(NEEDED | options))}),
    st.fixed_dictionaries({"file": st.just("recipe"), "yaml": RECIPE.map(lambda recipe: _dump(recipe))}),
    st.fixed_dictionaries({"file": st.just("declared"), "yaml": DECLARED.map(lambda declared: _dump(declared))}),
    st.fixed_dictionaries(
        {
            "file": st.sampled_from(("train", "recipe", "declared", "chosen", "chosen")),
            "yaml": CHOSEN.map(lambda chosen: _dump(chosen)) | RAW | SYNTAX | TEXT,
            "bytes": st.none() | st.none() | st.binary(max_size=30).map(lambda raw: base64.b64encode(raw).decode()),
        }
    ),
)  # fmt: skip


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False)


def check(value: Any) -> None:
    """What a file says, of the types that its readers promise; or a ValueError that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.yaml"
        raw = value.get("bytes")
        path.write_bytes(value["yaml"].encode(errors="surrogatepass") if raw is None else base64.b64decode(raw))
        with refusal(path.name, "--"):
            CHECKS[value["file"]](path)


def _train(path: Path) -> None:
    try:
        config = parse_config(argparse.Namespace(config=path))
    except ValueError as error:  # a single option's value: named by the option, as a flag's would be
        raise ValueError(f"-- {error}") from error
    assert all(name in config.objective().options for name in config.objective_options())


def _recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe) and set(KEYS) >= {"name"}
    assert isinstance(recipe.name, str) and recipe.iterations >= 1
    for variant in expand(recipe)[:3]:
        check_recipe(variant)


def _declared(path: Path) -> None:
    declared = load_declared(path)
    assert isinstance(declared.baseline, str) and declared.prompts >= 1
    assert declared.test.scenes >= 1


def _chosen(path: Path) -> None:
    assert all(isinstance(settings, dict) for settings in read_chosen(path, []).values())


CHECKS = {"train": _train, "recipe": _recipe, "declared": _declared, "chosen": _chosen}
