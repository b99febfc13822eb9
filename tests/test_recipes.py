"""Recipes: what is refused, how settings and variants change one, and that `aspo run` runs, keeps and resumes steps."""

import argparse
import json
import os
from pathlib import Path

import pytest
import yaml
from PIL import Image

import aspo
from aspo import cli
from aspo.folder import write_rows
from aspo.recipes import command as recipes
from aspo.recipes import keys as keys_module
from aspo.recipes.command import data_plan, run_recipe
from aspo.recipes.keys import environment_key, options_key, source_key
from aspo.recipes.recipe import arguments, changed, check_recipe, expand, load_recipe, parse_settings

ROOT = Path(aspo.__file__).parent.parent / "recipes"
OURS = sorted([*ROOT.glob("world/*.yaml"), *ROOT.glob("ablations/*.yaml"), *ROOT.glob("regimes/*.yaml")])
RECIPE = {
    "name": "Mine",
    "model": "world",
    "data": [{"pairs": {"noise-step": 300, "temperature": 1.0}}, {"score": {"scorer": "world"}}],
    "train": {"loss_type": "aspo", "alpha": 1.0, "learning_rate": "1e-4"},
}


@pytest.fixture(autouse=True)
def commands(monkeypatch):
    """All commands are there, whether or not the command line lists them."""
    monkeypatch.setitem(cli.COMMANDS, "controls", ("aspo.world.controls", ""))


def _write(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**RECIPE, **changes}.items() if v is not None}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iteration": 2}, "unknown key 'iteration'; did you mean 'iterations'"),
        ({"name": None}, "no name"),
        ({"about": 3}, "about is 3"),
        ({"train": None}, "neither; give one of train and online"),
        ({"online": {}}, "train and online; give one"),
        ({"data": [{"pair": {}}]}, "data step 1: unknown command 'pair'; did you mean 'pairs'"),
        ({"data": [{"pairs": {}, "score": {}}]}, "data step 1 is .*one `command"),
        ({"data": [{"train": {}}]}, "unknown command 'train'"),
        ({"data": [{"pairs": [1]}]}, "must be a mapping"),
        ({"iterations": 0}, "iterations is 0"),
        ({"iterations": True}, "iterations is True"),
        ({"data": None, "iterations": 2}, "no data steps to repeat"),
        ({"vary": {"train.alpha": 0.5}}, "vary is"),
        ({"vary": []}, "vary is"),
        ({"vary": {"rewards.method": ["fisao"]}}, "'rewards.method' is none of this recipe's"),
        ({"vary": [{"as": "a"}, {"as": "a"}]}, "same name"),
    ],
)
def test_a_bad_form_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(_write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [{"pairs": {"noise-stp": 3}}]}, r"data step 1 \(pairs\): unknown flag 'noise-stp'; did you mean"),
        ({"data": [{"pairs": {"noise_step": 3}}]}, "unknown flag 'noise_step'; did you mean 'noise-step'"),
        ({"data": [{"pairs": {"noise-step": "much"}}]}, "noise-step: invalid int value: 'much'"),
        ({"data": [{"pairs": {"out": "x"}}]}, "--out is set by `aspo run`"),
        ({"data": [{"score": {}}]}, r"data step 1 \(score\).*--scorer"),
        ({"train": {"aplha": 1}}, "train: unknown field 'aplha'; did you mean 'alpha'"),
        ({"train": {"loss_type": "dop"}}, "train.*dop"),
        ({"train": {"loss_type": "dpo", "alpha": 1}}, "alpha"),
        ({"train": {"loss_type": "dpo", "beta": "big"}}, "beta"),
        ({"train": {"output_dir": "x"}}, "output_dir is set by `aspo run`"),
        ({"train": None, "online": {"round": 3}}, "online: unknown flag 'round'; did you mean 'rounds'"),
    ],
)
def test_a_bad_flag_or_field_is_refused_with_the_nearest(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_recipe(load_recipe(_write(tmp_path, **changes)))


def test_settings_change_every_step_of_a_command_and_leave_the_recipe_alone(tmp_path):
    recipe = load_recipe(_write(tmp_path))
    other = changed(recipe, parse_settings(["train.alpha=0.5", "pairs.temperature=null", "train.objective_kwargs.k=2"]))
    assert other.final.options["alpha"] == 0.5 and other.final.options["objective_kwargs"] == {"k": 2}
    assert other.data[0].options == {"noise-step": 300}
    assert recipe.data[0].options["temperature"] == 1.0 and recipe.final.options["alpha"] == 1.0
    for bad in ("negatives.count=3", "alpha=1"):
        with pytest.raises(ValueError, match="none of this recipe's"):
            changed(recipe, parse_settings([bad]))
    with pytest.raises(ValueError, match="not key=value"):
        parse_settings(["train.alpha"])


def test_variants_are_a_grid_or_named_ones(tmp_path):
    grid = expand(load_recipe(_write(tmp_path, vary={"train.alpha": [0, 1], "pairs.noise-step": [300, 500]})))
    assert [r.name for r in grid][:2] == ["Mine [alpha=0 noise-step=300]", "Mine [alpha=0 noise-step=500]"]
    assert [(r.final.options["alpha"], r.data[0].options["noise-step"]) for r in grid][2:] == [(1, 300), (1, 500)]
    named = expand(load_recipe(_write(tmp_path, vary=[{"as": "same"}, {"as": "p", "train.alpha": 0}])))
    assert [(r.name, r.final.options["alpha"]) for r in named] == [("Mine [same]", 1.0), ("Mine [p]", 0)]


def test_a_command_line_is_what_the_recipe_says(tmp_path):
    recipe = load_recipe(_write(tmp_path, data=[{"score": {"scorer": "world", "rejected": True, "limit": None}}]))
    line = arguments(recipe.data[0], "m", "rows", Path("o"), 7)
    assert line == ["score", "--data", "rows", "--scorer", "world", "--rejected", "--out", "o"]  # no --model, no --seed
    train = arguments(recipe.final, "m", "rows", Path("o"), 7)
    flags = dict(zip(train[1::2], train[2::2], strict=True))
    assert flags["--seed"] == "7" and flags["--train_data"] == "rows" and flags["--learning_rate"] == "1e-4"


def test_a_step_is_known_by_all_that_decides_what_it_makes(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("1\n")

    def keys(recipe, model="m", seed=0, data=str(rows), cache=tmp_path):
        return [planned.key for planned in data_plan(recipe, "x", model, data, cache, seed)]

    recipe = load_recipe(_write(tmp_path))
    first = keys(recipe)
    assert first == keys(recipe, cache=tmp_path / "elsewhere")
    assert first == keys(changed(recipe, {"train.alpha": 0.0}, "Other"))
    later = keys(changed(recipe, {"score.batch-size": 3}))
    assert later[0] == first[0] and later[1] != first[1]
    for other in (keys(changed(recipe, {"pairs.noise-step": 5})), keys(recipe, "n"), keys(recipe, seed=1)):
        assert other[0] != first[0] and other[1] != first[1]
    rows.write_text("2\n")
    assert not set(keys(recipe)) & set(first)


def test_source_keys_are_of_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.jsonl").write_text("x")
    before = source_key(str(tmp_path / "a"))
    (tmp_path / "a" / "settings.json").write_text("anything")  # images and notes beside the rows do not count
    assert source_key(str(tmp_path / "a")) == before
    (tmp_path / "a" / "rows.jsonl").write_text("y")
    assert source_key(str(tmp_path / "a")) != before
    assert len({source_key(name) for name in ("world", "world:train", "world:test", "owner/model")}) == 4
    assert source_key("owner/model") == "owner/model"  # no place here: a hub's name


def test_only_places_are_known_by_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "misp").mkdir()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "weights").write_text("1")
    given = {"method": "misp", "scorer": "open_clip:clip", "pool": "clip", "calibration": "{before}/calibration.json"}
    before = options_key("pairs", given)
    assert before["method"] == "misp" and before["calibration"] == given["calibration"]  # though "misp" is there
    (tmp_path / "clip" / "weights").write_text("2")
    after = options_key("pairs", given)
    assert {name for name in given if before[name] != after[name]} == {"scorer", "pool"}
    assert options_key("score", {"scorer": "world"}) == {"scorer": source_key("world")}  # its CLIP, too


def test_plugins_are_known_by_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plugin = tmp_path / "mine.py"
    plugin.write_text("target = 1")
    given = {"plugins": ["mine.py", "a.module"], "loss_type": ["mine.py", "dpo"]}
    before = options_key("train", given)
    assert before["plugins"][1] == "a.module" and before["loss_type"] == given["loss_type"]
    assert options_key("train", {"plugins": "mine.py"})["plugins"] == before["plugins"][0]
    plugin.write_text("target = 2")
    assert options_key("train", given)["plugins"][0] != before["plugins"][0]


def test_an_open_clip_scorers_weights_are_known_by_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.pt").write_text("1")
    scorers = ("open_clip:ViT-B-32/clip.pt", f"open_clip:ViT-B-32/{tmp_path / 'clip.pt'}", "open_clip:ViT-L-14/clip.pt")
    tag = {"scorer": "open_clip:ViT-B-32/openai"}
    before = [options_key("score", {"scorer": scorer})["scorer"] for scorer in scorers]
    assert before[0] == before[1] != before[2] and options_key("score", tag) == tag
    (tmp_path / "clip.pt").write_text("2")
    after = [options_key("score", {"scorer": scorer})["scorer"] for scorer in scorers]
    assert not set(before) & set(after)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "native"])
def test_images_beside_rows_are_known_by_size_and_time(tmp_path, name):
    rows = [{"prompt": "a", "image": "a.png"}, {"prompt": "b", "images": [{"path": "sub/b.png"}]}, {"prompt": "none"}]
    file = tmp_path / ("rows.jsonl" if name == "native" else name)
    lines = "".join(json.dumps(row) + "\n\n" for row in rows)
    file.write_text(json.dumps(rows) if name == "rows.json" else lines)
    source = str(tmp_path if name == "native" else file)
    keys = [source_key(source)]
    (tmp_path / "sub").mkdir()
    (tmp_path / "other.png").write_bytes(b"no row's")
    assert source_key(source) == keys[0]
    for image, content in (("a.png", b"1"), ("sub/b.png", b"1"), ("sub/b.png", b"22")):
        (tmp_path / image).write_bytes(content)
        keys.append(source_key(source))
    os.utime(tmp_path / "a.png", ns=(1, 1))
    keys.append(source_key(source))
    assert len(set(keys)) == 5


def test_images_of_a_native_folder_are_known_by_their_names(tmp_path):
    row = {"prompt": "a", "images": [Image.new("RGB", (4, 4))]}
    keys = []
    for n in range(2):
        write_rows(tmp_path / str(n), [row])
        (image,) = (tmp_path / str(n) / "images").iterdir()
        os.utime(image, ns=(n, n))
        keys.append(source_key(str(tmp_path / str(n))))
    assert keys[0] == keys[1]


def test_another_version_of_a_package_is_another_key(tmp_path, monkeypatch):
    def first():
        return data_plan(load_recipe(_write(tmp_path)), "x", "m", "world:train", tmp_path, 0)[0].key

    before = first()
    monkeypatch.setattr(keys_module, "_version", lambda package: "0" if package == "torch" else "1")
    environment_key.cache_clear()
    assert first() != before
    environment_key.cache_clear()


def test_an_unfinished_step_of_another_line_begins_anew(tmp_path, monkeypatch):
    """Its key is the same, but its command would refuse to go on: the model lies elsewhere now."""
    commands = Commands(monkeypatch)
    commands.fail = {"pairs": 1}
    recipe = load_recipe(_write(tmp_path))
    for model, kept in (("here", False), ("here", True), ("there", False)):
        (planned, _) = data_plan(recipe, model, "m", "world:train", tmp_path, 0)
        with pytest.raises(recipes.StepFailed):
            recipes.run_planned(planned)
        assert (planned.folder / "half").exists() == kept
        (planned.folder / "half").write_text("rows")


class Commands:
    """Stands in for `aspo.cli.main`: notes every command and makes its --out; fails where it is told to."""

    def __init__(self, monkeypatch):
        self.ran, self.fail = [], {}
        monkeypatch.setattr(cli, "main", self)

    def __call__(self, line):
        self.ran.append(line)
        out = line[line.index("--out") + 1] if "--out" in line else line[line.index("--output_dir") + 1]
        Path(out).mkdir(parents=True, exist_ok=True)
        return self.fail.get(line[0], 0)


def _flag(line, name):
    return line[line.index(name) + 1]


def test_steps_run_in_turn_and_are_kept(tmp_path, monkeypatch, capsys):
    commands = Commands(monkeypatch)
    recipe = load_recipe(_write(tmp_path))
    folder = run_recipe(recipe, "world", "world:train", tmp_path / "out", tmp_path / "cache", 3)
    pairs, score, train = commands.ran
    assert [line[0] for line in commands.ran] == ["pairs", "score", "train"]
    assert (_flag(pairs, "--data"), _flag(pairs, "--model"), _flag(pairs, "--seed")) == ("world:train", "world", "3")
    assert _flag(score, "--data") == _flag(pairs, "--out") and _flag(train, "--train_data") == _flag(score, "--out")
    assert Path(_flag(train, "--output_dir")) == folder == tmp_path / "out" / "model"
    run_recipe(recipe, "world", "world:train", tmp_path / "other", tmp_path / "cache", 3)
    assert [line[0] for line in commands.ran[3:]] == ["train"] and "(done before)" in capsys.readouterr().out


def test_a_failed_step_ends_the_run_and_is_not_kept(tmp_path, monkeypatch):
    commands = Commands(monkeypatch)
    commands.fail = {"score": 2}
    recipe = load_recipe(_write(tmp_path))
    with pytest.raises(recipes.StepFailed, match=r"aspo score .* ended with status 2"):
        run_recipe(recipe, "world", "world:train", tmp_path / "out", tmp_path / "cache", 0)
    commands.fail = {}
    run_recipe(recipe, "world", "world:train", tmp_path / "out", tmp_path / "cache", 0)
    assert [line[0] for line in commands.ran] == ["pairs", "score", "score", "train"]


def test_placeholders_name_the_rows_and_the_step_before(tmp_path, monkeypatch):
    commands = Commands(monkeypatch)
    steps = [{"rewards": {"method": "fisao", "data": None, "calibrate": "c.jsonl"}}]
    online = {"data": "{rows}", "calibration": "{before}/calibration.json"}
    recipe = load_recipe(_write(tmp_path, data=steps, train=None, online=online))
    check_recipe(recipe)
    run_recipe(recipe, "world", "world:train", tmp_path / "out", tmp_path / "cache", 0)
    rewards, loop = commands.ran
    assert "--data" not in rewards
    assert _flag(loop, "--data") == "world:train"
    assert _flag(loop, "--calibration") == _flag(rewards, "--out") + "/calibration.json"


def test_iterations_begin_where_the_one_before_ended(tmp_path, monkeypatch):
    commands = Commands(monkeypatch)
    monkeypatch.setattr(recipes, "merged", lambda base, trained: trained / f"merged-with-{Path(base).name}")
    recipe = load_recipe(_write(tmp_path, iterations=3))
    run_recipe(recipe, "world", "world:train", tmp_path / "out", tmp_path / "cache", 0)
    assert [line[0] for line in commands.ran] == ["pairs", "score", "train"] * 3
    models = [_flag(line, "--model" if line[0] == "pairs" else "--model_name_or_path") for line in commands.ran[::3]]
    second, third = tmp_path / "out/iteration-1/merged-with-world", "iteration-2/merged-with-merged-with-world"
    assert models == ["world", str(second), str(tmp_path / "out" / third)]
    assert [_flag(line, "--model_name_or_path") for line in commands.ran[2::3]] == models
    assert len({_flag(line, "--out") for line in commands.ran[::3]}) == 3  # pairs of another model are other pairs
    assert _flag(commands.ran[-1], "--output_dir") == str(tmp_path / "out" / "model")


def _arguments(*argv):
    parser = argparse.ArgumentParser()
    recipes.add_arguments(parser)
    return parser.parse_args(list(map(str, argv)))


def test_the_command_checks_before_it_runs(tmp_path, monkeypatch, capsys):
    commands = Commands(monkeypatch)
    path = _write(tmp_path, vary=[{"as": "a"}, {"as": "b", "train.alpha": 0.25}])
    given = (path, "--data", "world:train", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="give --variant, one of 'a', 'b'"):
        recipes.run(_arguments(*given))
    with pytest.raises(ValueError, match="unknown field 'aplha'"):
        recipes.run(_arguments(*given, "--variant", "a", "--set", "train.aplha=1"))
    assert recipes.run(_arguments(*given, "--variant", "b", "--check")) == 0
    assert commands.ran == [] and "--alpha 0.25" in capsys.readouterr().out
    assert recipes.run(_arguments(*given, "--variant", "b", "--set", "pairs.limit=5")) == 0
    assert _flag(commands.ran[0], "--limit") == "5" and _flag(commands.ran[-1], "--alpha") == "0.25"
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["model"] == "world"
    commands.fail = {"train": 130}
    assert recipes.run(_arguments(*given[:-1], tmp_path / "again", "--variant", "a")) == 130
    assert recipes.run(_arguments(*given, "--variant", "a", "--set", "pairs.limit=7")) == 130
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["final"]["options"]["alpha"] == 0.25
    with pytest.raises(ValueError, match="names no model"):
        recipes.run(_arguments(_write(tmp_path, model=None), "--data", "x", "--out", tmp_path / "out"))
    with pytest.raises(ValueError, match="has no variants"):
        recipes.run(_arguments(_write(tmp_path), "--data", "x", "--out", tmp_path / "out", "--variant", "a"))


@pytest.mark.parametrize("path", OURS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_shipped_recipes_are_sound(path):
    for recipe in expand(load_recipe(path)):
        check_recipe(recipe)
        assert recipe.about and recipe.source and recipe.ours


def test_recipes_of_the_world_share_pairs_and_budget():
    """What `aspo compare` calls the same pairs: the first step is DPO's, but for methods that make their own."""
    baseline = load_recipe(ROOT / "world" / "dpo.yaml")
    shared = ("max_steps", "per_device_train_batch_size", "lr_scheduler_type", "warmup_steps", "lora_r", "lora_alpha")
    own = {"csr", "fisao_online", "kto", "povid", "sentinel", "seva"}
    for path in (ROOT / "world").glob("*.yaml"):
        recipe = load_recipe(path)
        assert path.stem in own or recipe.data[0] == baseline.data[0], path
        if recipe.final.command == "train" and recipe.iterations == 1:
            assert {k: recipe.final.options.get(k) for k in shared} == {k: baseline.final.options[k] for k in shared}
