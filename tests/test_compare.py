"""`aspo compare`: intervals and tests by hand, the grid's rule, going on after a stop, and what is written."""

import argparse
import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from interval_coverage import ACCURACY, coverage, table
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import tiny_llava, tiny_rows

import aspo
from aspo import cli
from aspo.compare import command as compare
from aspo.compare import grid as compare_grid
from aspo.compare import notes as compare_notes
from aspo.compare import work as compare_work
from aspo.compare.files import write_all
from aspo.compare.grid import candidates, choose, keeps_form, match_kl, next_rate
from aspo.compare.outcome import analyse, judge
from aspo.compare.plan import START, Scenes, System, budgeted, first_data, load_declared, make_run, systems_of
from aspo.compare.statistics import Table, holm, interval, resampled, t_cdf, t_interval, t_quantile
from aspo.compare.table import markdown
from aspo.compare.work import answer_kl, is_done, read_counts
from aspo.generation import Answer
from aspo.model import load_model
from aspo.recipes.recipe import load_recipe

ROOT = Path(aspo.__file__).parent.parent / "recipes"


@pytest.fixture(autouse=True)
def commands(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "controls", ("aspo.world.controls", ""))


# ---- statistics ----


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (10, 2.228), (30, 2.042)]
)
def test_t_is_that_of_the_tables(freedom, expected):
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=6e-4)
    assert t_cdf(expected, freedom) == pytest.approx(0.975, abs=1e-4)
    assert t_cdf(-expected, freedom) == pytest.approx(0.025, abs=1e-4) and t_cdf(0.0, freedom) == 0.5


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.01, math.nan, math.nan])
    assert adjusted[0] == pytest.approx(0.03) and math.isnan(adjusted[1])  # those that were not run count too
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_both_seeds_and_scenes_are_resampled():
    """Where only one of the two matters, the resamples' spread is that factor's own standard error."""
    rng = np.random.default_rng(0)
    by_seed, by_scene = rng.random((8, 1)), rng.random((1, 500))
    values = resampled(
        {"a": table(np.repeat(by_seed, 500, 1)), "b": table(np.repeat(by_scene, 8, 0))}, [ACCURACY], 4000
    )
    a, b = values["a"]["accuracy"], values["b"]["accuracy"]
    assert (a[0], b[0]) == pytest.approx((by_seed.mean(), by_scene.mean())) and len(a) == 4001
    assert a[1:].std() == pytest.approx(by_seed.std() / math.sqrt(8), rel=0.05)
    assert b[1:].std() == pytest.approx(by_scene.std() / math.sqrt(500), rel=0.05)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    right = rng.random((4, 200)) < 0.5
    values = resampled({"a": table(right), "b": table(right), "c": table(right * 0.9)}, [ACCURACY], 200)
    same = interval(values["a"]["accuracy"] - values["b"]["accuracy"], 4)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    other = interval(values["a"]["accuracy"] - values["c"]["accuracy"], 4)
    alone = interval(values["a"]["accuracy"], 4)
    assert other.value == pytest.approx(0.1 * right.mean())
    assert other.high - other.low == pytest.approx(0.1 * (alone.high - alone.low))


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"differ in \(seeds, scenes\)"):
        resampled({"a": table(np.ones((2, 5))), "b": table(np.ones((3, 5)))}, [ACCURACY])
    with pytest.raises(ValueError, match="b has no counts of asked"):
        resampled({"a": table(np.ones((2, 5))), "b": Table(np.ones((2, 5, 1)), ("right",))}, [ACCURACY])
    assert math.isnan(interval(np.array([0.5, 0.4, 0.6]), seeds=1).low)  # one seed has no spread


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Also where seeds alone would not: their intervals leave out what other scenes would have given."""
    t, _, seeds_alone = coverage(80, 8, 300, 0.02, 0.3, 0.1)
    assert t >= 0.93 and seeds_alone < 0.85
    t, percentiles, _ = coverage(80, 4, 300, 0.3, 0.05, 0.05)
    assert t >= 0.9 and percentiles < t


# ---- what is declared ----

DECLARED = {
    "baseline": "DPO",
    "model": "world",
    "data": "world:train",
    "prompts": 32,
    "test": {"data": "world:test", "scenes": 20, "skip": 5, "minimal_pairs": 1},
    "validation": {"data": "world:validation", "scenes": 10},
    "budget": {"max_steps": 6},
    "grid": {"learning_rate": [1e-4, 2e-4], "beta_times": [1, 3], "seed": 100},
    "comparisons": [{"system": "ASPO", "against": "DPO", "direction": "higher", "expected_by": "paper"}],
}


def _declared(tmp_path, **changes):
    path = tmp_path / "declared.yaml"
    path.write_text(yaml.safe_dump({**DECLARED, **changes}))
    return load_declared(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comparison": []}, "unknown key 'comparison'; did you mean 'comparisons'"),
        ({"test": {"data": "x", "scene": 3}}, "test: unknown key 'scene'"),
        ({"grid": {"beta": [1]}}, "grid: unknown key 'beta'"),
        ({"form": {"token": 1}}, "form: unknown key 'token'"),
        ({"primary": "minimal_pairs"}, "unknown figure 'minimal_pairs'"),
        ({"primary": "tokens"}, "primary is tokens, of which neither more nor less is better"),
        ({"comparisons": [{"system": "A", "against": "B", "direction": "up"}]}, "unknown direction 'up'"),
        ({"comparisons": [{"system": "A", "direction": "none"}]}, "needs system, against and direction"),
        ({"comparisons": {"system": "A"}}, "comparisons is .*must be a list"),
        ({"matched": [{"system": "A", "recipe": "B", "kl_of": "C"}]}, "matched: unknown key 'recipe'"),
        ({"matched": [{"system": "A", "kl_of": "C"}]}, "needs system, recipe_of and kl_of"),
        ({"prompts": "abc"}, "prompts is 'abc'; it must be a whole number from 1"),
        ({"test": {"data": "x", "scenes": 0}}, "test: scenes is 0"),
        ({"test": {"data": "x"}}, "test: scenes is missing"),
        ({"test": "world:test"}, "test: 'world:test' must be"),
        ({"test": {"data": "world:validation", "scenes": 5, "skip": 9}}, "test and validation share rows"),
        ({"validation": {"data": "world:train", "scenes": 5, "skip": 31}}, "validation and data share rows"),
        ({"grid": {"learning_rate": ["3e-4"], "seed": 100}}, "write 3.0e-4"),
        ({"grid": {"learning_rate": 3.0, "seed": 100}}, "must be a list of numbers"),
        ({"curves": "DPO"}, "curves is 'DPO'"),
    ],
)
def test_a_bad_declaration_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        _declared(tmp_path, **changes)


def test_the_shipped_declarations_can_be_read():
    for path in ROOT.glob("*.yaml"):
        declared = load_declared(path)
        assert declared.test.skip >= 1000 and declared.test.scenes >= 5000  # not those that the demo has opened


@pytest.mark.parametrize(
    ("direction", "value", "p", "verdict"),
    [
        ("higher", 1.0, 0.04, "agrees"),
        ("higher", -1.0, 0.04, "disagrees"),
        ("higher", 1.0, 0.06, "cannot tell"),
        ("lower", -1.0, 0.01, "agrees"),
        ("lower", 1.0, 0.01, "disagrees"),
        ("none", 1.0, 0.01, "disagrees: higher"),
        ("none", 1.0, 0.5, "no difference shown"),
        ("higher", 1.0, math.nan, "cannot tell"),
    ],
)
def test_verdicts(direction, value, p, verdict):
    assert judge(direction, t_interval(value, 0.4, 7), p) == verdict
    assert judge(direction, None, math.nan) == "not run"


def test_every_system_has_the_declared_budget(tmp_path):
    declared = _declared(tmp_path)
    paths = [ROOT / "world" / f"{name}.yaml" for name in ("dpo", "aspo_s")]
    systems = systems_of(paths, declared)
    assert [system.name for system in systems] == ["DPO", "ASPO-S"]
    for system in systems:
        assert system.recipe.final.options["max_steps"] == 6 and system.recipe.final.options["save_strategy"] == "no"
        assert system.recipe.data[0].options["limit"] == 32
    thrice = dataclasses.replace(load_recipe(paths[0]), iterations=3)
    assert budgeted(thrice, declared).final.options["max_steps"] == 2
    assert budgeted(thrice, declared).data[0].options["limit"] == 11  # of 32 prompts, in three rounds
    with pytest.raises(ValueError, match="'DPO' is taken"):
        systems_of([paths[0], paths[0]], declared)
    with pytest.raises(ValueError, match="no recipe is the baseline 'DPO'"):
        systems_of(paths[1:], declared)


def test_a_run_is_known_by_all_that_decides_its_figures(tmp_path):
    declared = _declared(tmp_path)
    (dpo,) = systems_of([ROOT / "world" / "dpo.yaml"], declared)

    rows = tmp_path / "rows.jsonl"
    rows.write_text("1")

    def key(system=dpo, seed=0, scenes=declared.test, **changes):
        return make_run(system, seed, scenes, dataclasses.replace(declared, **changes), tmp_path).key

    def of_file():
        return key(scenes=dataclasses.replace(declared.test, data=str(rows)))

    first = of_file()
    rows.write_text("2")
    assert of_file() != first  # rows in a file are known by their content
    others = [
        key(System("DPO", dpo.recipe, {"train.learning_rate": 1.0})),
        key(seed=1),
        key(scenes=dataclasses.replace(declared.test, minimal_pairs=2)),
        key(data="world:calibration"),
        key(System(START, None)),
    ]
    assert key() == key(System("Another name", dpo.recipe)) and len({key(), *others}) == 6


# ---- the grid ----


def _result(primary, rate, **changes):
    good = {
        "unparseable": 0.0,
        "duplicate": 0.0,
        "eos": 1.0,
        "tokens": 26.0,
        "coverage": 0.63,
        "hallucinated_sentences": 0.3,
    }
    return {
        "summary": {**good, "minimal_pair_accuracy": primary, **changes},
        "settings": {"train.learning_rate": rate, "train.beta": 0.1},
        "extra": {"kl": 1e4 * rate},
        "scenes": 10,
    }


STARTED = _result(0.48, 0.0)


@pytest.mark.parametrize(
    "lost",
    [{"unparseable": 0.02}, {"duplicate": 0.02}, {"eos": 0.98}, {"tokens": 24.0}, {"tokens": 28.0}, {"coverage": 0.6}],
)
def test_a_run_that_lost_its_form_is_not_chosen(tmp_path, lost):
    declared = _declared(tmp_path)
    better, worse = _result(0.6, 2e-4, **lost), _result(0.5, 1e-4)
    assert len(keeps_form(better, STARTED, declared.form)) == 1 and not keeps_form(worse, STARTED, declared.form)
    assert choose([better, worse], STARTED, declared) == (worse, True)
    assert choose([better], STARTED, declared) == (better, False)


def test_with_several_seeds_form_is_kept_in_each_and_figures_are_means(tmp_path):
    declared = _declared(tmp_path, grid={"learning_rate": [1e-4, 2e-4], "seed": [100, 101]})
    bold = [{**_result(p, 2e-4, tokens=t), "seed": s} for p, t, s in ((0.6, 26.0, 100), (0.7, 20.0, 101))]
    shy = [{**_result(p, 1e-4), "seed": s} for p, s in ((0.5, 100), (0.52, 101))]
    bold, shy = compare_grid.merged(bold), compare_grid.merged(shy)
    assert keeps_form(bold, STARTED, declared.form) == ["tokens 20.0 in seed 101"]
    assert choose([bold, shy], STARTED, declared) == (shy, True)
    assert shy["summary"]["minimal_pair_accuracy"] == pytest.approx(0.51) and shy["extra"]["kl"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="each is to be there once"):
        _declared(tmp_path, grid={"seed": [100, 100]})


def test_a_grid_of_several_seeds_trains_each(tmp_path, work):
    _declared(tmp_path, grid={**DECLARED["grid"], "seed": [100, 101]})
    assert compare.run(_arguments(tmp_path, "--grid")) == 0
    results = [json.loads(p.read_text()) for p in (tmp_path / "out" / "runs").glob("*/*/result.json")]
    assert sorted(result["seed"] for result in results) == [100] * 9 + [101] * 8  # the start model once
    assert "seeds 100, 101" in (tmp_path / "out" / "grid.md").read_text()
    _declared(tmp_path, grid={**DECLARED["grid"], "seed": [100, 1]})
    with pytest.raises(ValueError, match="the grid's seed, 1, is one of --seeds 2"):
        compare.run(_arguments(tmp_path, "--seeds", 2))


def test_the_best_is_chosen_and_of_equals_the_smallest_step(tmp_path):
    declared = _declared(tmp_path)
    runs = [_result(0.5, 3e-4), _result(0.6, 2e-4, coverage=0.7), _result(0.6, 1e-4)]
    assert choose(runs, STARTED, declared) == (runs[2], True)
    bad = [_result(0.5, 3e-4, eos=0.0), _result(0.6, 2e-4, eos=0.0)]
    assert choose(bad, STARTED, declared) == (bad[1], False)
    lower = _declared(tmp_path, primary="hallucinated_sentences")
    fewer = [_result(0.5, 1e-4), _result(0.5, 3e-4, hallucinated_sentences=0.2)]
    assert choose(fewer, STARTED, lower) == (fewer[1], True)


def test_every_system_gets_the_same_grid(tmp_path):
    declared = _declared(tmp_path)
    dpo, simpo, sft = (load_recipe(ROOT / "world" / f"{name}.yaml") for name in ("dpo", "simpo", "sft"))
    assert [(c["train.learning_rate"], c["train.beta"]) for c in candidates(dpo, declared)] == [
        (1e-4, 0.1),
        (2e-4, 0.1),
        (1e-4, pytest.approx(0.3)),
        (2e-4, pytest.approx(0.3)),
    ]
    assert {c["train.beta"] for c in candidates(simpo, declared)} == {2.0, 6.0}
    assert candidates(sft, declared) == [{"train.learning_rate": 1e-4}, {"train.learning_rate": 2e-4}]
    default = dataclasses.replace(dpo, final=dataclasses.replace(dpo.final, options={"loss_type": "simpo"}))
    assert {c["train.beta"] for c in candidates(default, declared)} == {2.0, 6.0}


def test_a_divergence_is_matched_by_interpolation():
    assert next_rate({1e-4: 1.0, 4e-4: 16.0}, 4.0) == pytest.approx(2e-4)
    assert next_rate({1e-4: 1.0, 4e-4: 16.0}, 20.0) == pytest.approx(6e-4)
    assert next_rate({1e-4: 1.0, 4e-4: 16.0}, 0.5) == pytest.approx(6.67e-5)
    tried = []

    def run_all(systems):
        (system,) = systems
        rate = system.settings["train.learning_rate"]
        tried.append(rate)
        result = {**_result(0.5, rate), "extra": {"kl": 1e9 * rate**2.5}}
        return {(system.name, compare_grid.as_key(system.settings)): result}

    known = [{**_result(0.5, rate), "extra": {"kl": 1e9 * rate**2.5}} for rate in (1e-4, 3e-4)]
    found = match_kl(System("twin", None), 1e9 * 5e-4**2.5, known, run_all)
    assert found[-1]["extra"]["kl"] == pytest.approx(1e9 * 5e-4**2.5, rel=0.1) and len(tried) == len(found) <= 3


def test_the_grid_writes_what_it_tried_and_chose(tmp_path):
    matched = [{"system": "DPO at ASPO-S's KL", "recipe_of": "DPO", "kl_of": "ASPO-S"}]
    declared = _declared(tmp_path, matched=matched)
    systems = systems_of([ROOT / "world" / f"{name}.yaml" for name in ("dpo", "aspo_s")], declared)

    def run_all(wanted):
        made = {}
        for system in wanted:
            rate = system.settings.get("train.learning_rate", 0.0)
            result = _result(0.48 + 100 * rate, rate)
            if system.name == "ASPO-S":
                result["extra"]["kl"] *= 3
            made[system.name, compare_grid.as_key(system.settings)] = {**result, "settings": system.settings}
        return made

    chosen = yaml.safe_load(compare_grid.run_grid(systems, declared, run_all, tmp_path).read_text())
    assert {name: settings["train.learning_rate"] for name, settings in chosen.items()} == {
        "DPO": 2e-4,
        "ASPO-S": 2e-4,
        "DPO at ASPO-S's KL": pytest.approx(6e-4, rel=0.16),
    }
    table = (tmp_path / "grid.md").read_text()
    assert table.count("| DPO |") == 4 and table.count("chosen") == 3 and "0.4800" in table
    assert table.count("chosen, at the edge") == 2  # the matched one's rate is no grid's
    assert "edge of the grid: DPO; ASPO-S\n" in (tmp_path / "chosen.yaml").read_text()


# ---- running, stopping, going on ----


class Work:
    """Stands in for `compare_work.work`: notes tasks, makes results; fails for names in `fail`, ends after `stop`."""

    def __init__(self):
        self.done, self.fail, self.stop, self.before = [], (), None, lambda: None

    def __call__(self, task):
        self.before()
        name = task.system.name if hasattr(task, "system") else task.folder.name.split("-")[0]
        if self.stop is not None and len(self.done) >= self.stop:
            raise KeyboardInterrupt
        if name in self.fail:
            return {"name": name, "seconds": 1.0, "error": "it broke"}
        self.done.append(name)
        if hasattr(task, "system"):
            _fake_run(task)
        else:
            task.marker.parent.mkdir(parents=True, exist_ok=True)
            task.marker.write_text('{"seconds": 1.0}')
        return {"name": name, "seconds": 1.0, "error": None}


GAIN = {START: 0.0, "DPO": 0.05, "ASPO": 0.15}


def _fake_run(run, scenes=60):
    rng = np.random.default_rng(run.seed + 7)
    names = ["pairs", "pairs_right", "checkable_sentences", "false_sentences", "covered_facts", "stateable", "answers"]
    names += ["tokens", "item_rate", "items_with_rate", "sentences", "prior_pairs", "prior_pairs_right"]
    counts = np.ones((scenes, len(names)))
    counts[:, 1] = rng.random(scenes) < 0.5 + GAIN.get(run.system.name, 0.0)
    tokens = counts[:, 7] = 26 if run.system.name != "ASPO" or run.seed == 2 else 20
    run.folder.mkdir(parents=True, exist_ok=True)
    metadata = {"names": json.dumps(names), "ids": json.dumps([str(k) for k in range(scenes)])}
    save_file({"counts": counts}, run.folder / compare_work.COUNTS, metadata=metadata)
    history = [{"step": s, "rewards/chosen": 0.1 * s, "rewards/rejected": -0.1 * s} for s in (5, 10)]
    (run.folder / "train" / "model").mkdir(parents=True, exist_ok=True)
    (run.folder / "train" / "model" / "log_history.json").write_text(json.dumps([*history, {"step": 10, "runtime": 3}]))
    run.result.write_text(
        json.dumps(
            {
                "key": run.key,
                "code": ["one"],
                "settings": run.system.settings,
                "seconds": {"train": 2.0},
                "extra": {"kl": 1.0 + run.seed, "image_gap": 3.0 + (run.system.name == "ASPO") * (1 + run.seed % 2)},
                "summary": {**_result(0.5, 0.0)["summary"], "tokens": tokens},
                "seed": run.seed,
                "scenes": scenes,
            }
        )
    )


@pytest.fixture
def work(monkeypatch):
    work = Work()
    monkeypatch.setattr(compare, "work", work)
    return work


def _arguments(tmp_path, *more, names=("dpo", "aspo")):
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    recipes = [str(ROOT / "world" / f"{name}.yaml") for name in names]
    (tmp_path / "chosen").mkdir(exist_ok=True)
    (tmp_path / "chosen" / "declared.yaml").write_text(
        yaml.safe_dump({"DPO": {"train.learning_rate": 1e-4}, "ASPO": {"train.learning_rate": 2e-4}})
    )
    given = [*recipes, "--declared", tmp_path / "declared.yaml", "--out", tmp_path / "out", *more]
    return parser.parse_args(list(map(str, given)))


def test_it_goes_on_where_it_was_stopped(tmp_path, work, capsys):
    _declared(tmp_path, curves=["DPO"])
    arguments = _arguments(tmp_path, "--seeds", 3)
    work.stop = 9  # 3 seeds x (pairs, score), then runs
    with pytest.raises(KeyboardInterrupt):
        compare.run(arguments)
    first = list(work.done)
    assert sorted(first[:6]) == ["pairs"] * 3 + ["score"] * 3
    work.stop = None
    assert compare.run(arguments) == 0
    assert sorted(work.done[6:]) == ["ASPO"] * 3 + ["DPO"] * 3 + [START]
    assert "3 done before; 0 data steps" in capsys.readouterr().out
    done = len(work.done)
    table = (tmp_path / "out" / "table.md").read_bytes(), (tmp_path / "out" / "differences.svg").read_bytes()
    assert compare.run(arguments) == 0 and len(work.done) == done
    assert table == ((tmp_path / "out" / "table.md").read_bytes(), (tmp_path / "out" / "differences.svg").read_bytes())
    assert (tmp_path / "out" / "rewards.svg").is_file()


def test_a_half_made_run_is_made_again(tmp_path, work):
    _declared(tmp_path)
    assert compare.run(_arguments(tmp_path, "--seeds", 2)) == 0
    (result,) = (tmp_path / "out" / "runs" / "dpo").glob("seed-1-*/result.json")
    stray = result.with_name("stray")
    stray.write_text("left by a kill")
    result.write_text('{"key": "cut o')
    before = len(work.done)
    assert compare.run(_arguments(tmp_path, "--seeds", 2)) == 0
    assert work.done[before:] == ["DPO"] and not stray.exists()


def test_a_failure_is_told_and_the_others_go_on(tmp_path, work, capsys):
    _declared(tmp_path)
    work.fail = ("ASPO",)
    assert compare.run(_arguments(tmp_path, "--seeds", 2)) == 1
    said = capsys.readouterr()
    assert said.err.count("failed: ASPO: it broke") == 2 and "not run" in said.out and "**Failed: ASPO" in said.out
    assert (tmp_path / "out" / "table.md").is_file()
    work.fail = ("score",)
    assert compare.run(_arguments(tmp_path, "--seeds", 3)) == 1  # ASPO's new seed waits for its step
    assert "ASPO, seed 2: one of its data steps failed" in capsys.readouterr().err
    work.fail = ("DPO",)
    with pytest.raises(ValueError, match="baseline 'DPO' is not complete"):
        compare.run(_arguments(tmp_path, "--seeds", 4))


def test_answers_without_a_sentence_cost_neither_grid_nor_table(tmp_path, monkeypatch):
    """A collapsed run has no rate of hallucinated sentences, and a baseline that says nothing covers nothing."""
    undefined = ("hallucinated_sentences", "unparseable", "duplicate")

    def collapse(run):
        result = json.loads(run.result.read_text())
        result["summary"] |= {**dict.fromkeys(undefined), "coverage": 0.0, "tokens": 1.0}
        result["extra"]["kl"] = math.nan
        run.result.write_text(json.dumps(result))
        with safe_open(run.folder / compare_work.COUNTS, framework="numpy") as file:
            names, metadata = json.loads(file.metadata()["names"]), file.metadata()
            counts = file.get_tensor("counts")
        for name in ("checkable_sentences", "false_sentences", "covered_facts", "sentences"):
            counts[:, names.index(name)] = 0
        save_file({"counts": counts}, run.folder / compare_work.COUNTS, metadata=metadata)

    class Collapsing(Work):
        def __call__(self, task):
            done = super().__call__(task)
            if hasattr(task, "system") and task.system.name == "DPO":
                collapse(task)
            return done

    monkeypatch.setattr(compare, "work", Collapsing())
    matched = [{"system": "ASPO at DPO's KL", "recipe_of": "ASPO", "kl_of": "DPO"}]
    _declared(tmp_path, matched=matched, grid={**DECLARED["grid"], "seed": [100, 101]})
    assert compare.run(_arguments(tmp_path, "--grid")) == 0
    out = tmp_path / "out"
    assert "| nan |" in (out / "grid.md").read_text()
    assert "# No run kept its form: DPO; ASPO\n" in (out / "chosen.yaml").read_text()
    json.loads((out / "grid.json").read_text(), parse_constant=pytest.fail)
    _declared(tmp_path)
    assert compare.run(_arguments(tmp_path, "--seeds", 2)) == 0
    table = json.loads((out / "table.json").read_text(), parse_constant=pytest.fail)
    assert table["systems"]["DPO"]["hallucinated_sentences"]["value"] is None
    assert table["systems"]["DPO"]["coverage"]["value"] == 0.0 and table["form_kept"]["DPO"] == 0


def test_settings_must_be_chosen_and_one_works_at_a_time(tmp_path, work):
    _declared(tmp_path)
    arguments = _arguments(tmp_path)
    (tmp_path / "chosen" / "declared.yaml").write_text("DPO: {}\n")
    with pytest.raises(ValueError, match="no settings for 'ASPO'"):
        compare.run(arguments)
    (tmp_path / "chosen" / "declared.yaml").unlink()
    with pytest.raises(ValueError, match="choose settings with --grid first"):
        compare.run(arguments)
    (tmp_path / "chosen" / "declared.yaml").write_text("- DPO\n")
    with pytest.raises(ValueError, match=r"must hold `system: {setting: value}` lines"):
        compare.run(arguments)
    (tmp_path / "chosen" / "declared.yaml").unlink()
    arguments.quick, arguments.chosen = True, tmp_path / "other.yaml"
    with pytest.raises(ValueError, match="would not be read"):
        compare.run(arguments)
    (tmp_path / "out").mkdir(exist_ok=True)
    with compare.locked(tmp_path / "out"), pytest.raises(ValueError, match="another `aspo compare`"):
        compare.run(_arguments(tmp_path))
    assert work.done == []


def test_pairs_of_its_own_are_told(tmp_path):
    declared = _declared(tmp_path)
    systems = systems_of([ROOT / "world" / f"{name}.yaml" for name in ("dpo", "aspo", "seva")], declared)
    runs = {s.name: [make_run(s, 0, declared.test, declared, tmp_path)] for s in (System(START, None), *systems)}
    assert compare_notes.own_pairs(runs, declared) == ["SeVa"]


def test_dry_run_and_quick_leave_test_scenes_closed(tmp_path, work, monkeypatch, capsys):
    declared = _declared(tmp_path)
    assert compare.run(_arguments(tmp_path, "--seeds", 2, "--dry-run")) == 0
    assert work.done == [] and "5 runs, 0 done before; 4 data steps to do" in capsys.readouterr().out
    assert compare.run(_arguments(tmp_path, "--grid", "--dry-run")) == 0
    assert work.done == [] and "9 runs, 0 done before; 2 data steps" in capsys.readouterr().out  # 2 x 4 and the start
    small = compare.quick(declared)
    assert small.test.data == small.validation.data == "world:validation"
    assert compare.run(_arguments(tmp_path, "--quick")) == 0
    assert "SMOKE RUN" in (tmp_path / "out" / "table.md").read_text()


def test_the_table_says_what_was_declared_and_what_is_fair(tmp_path):
    comparisons = [*DECLARED["comparisons"], {"system": "MISP-DPO", "against": "DPO", "direction": "higher"}]
    declared = _declared(tmp_path, comparisons=comparisons)
    runs = {}
    for system in [System(START, None), *systems_of([ROOT / "world" / f"{n}.yaml" for n in ("dpo", "aspo")], declared)]:
        runs[system.name] = [make_run(system, seed, declared.test, declared, tmp_path) for seed in range(4)]
        for run in runs[system.name]:
            _fake_run(run, scenes=800)
    for planned in first_data(runs["ASPO"][0]):
        planned.marker.parent.mkdir(exist_ok=True)
        planned.marker.write_text('{"seconds": 7.0}')
    tables = {name: read_counts(of) for name, of in runs.items()}
    outcome = analyse(tables, runs, declared, resamples=500)
    first, second = outcome.verdicts
    p = outcome.differences["ASPO"]["minimal_pair_accuracy"].p
    assert (first.verdict, second.verdict) == ("agrees", "not run")
    assert first.p_holm == pytest.approx(2 * p)  # of two declared, though one was not run
    assert first.difference.value == pytest.approx(0.1, abs=0.03)
    assert outcome.fair == {START: True, "DPO": True, "ASPO": False}  # ASPO's answers are shorter
    assert outcome.form_kept == {START: 4, "DPO": 4, "ASPO": 1}
    assert outcome.extra["DPO"]["kl"].value == pytest.approx(2.5)
    gap = outcome.extra_differences["ASPO"]["image_gap"]
    assert gap.value == pytest.approx(1.5) and gap.low < 1.5 < gap.high and "DPO" not in outcome.extra_differences
    assert outcome.data_seconds == 14.0  # pairs, which both share, and similarities
    write_all(outcome, tmp_path, {"$\\alpha$, and $": runs["DPO"]})
    seeds = (tmp_path / "seeds.csv").read_text().splitlines()
    lost = [line.split(",")[-1] for line in seeds if line.startswith("ASPO,")]
    assert lost == ["tokens 20.0", "tokens 20.0", "", "tokens 20.0"]
    assert "$" in (tmp_path / "rewards.svg").read_text()
    text = markdown(outcome)
    assert "| MISP-DPO − DPO | higher |  | − |  | not run |" in text and "| ASPO − DPO | higher | paper |" in text
    lines = (tmp_path / "figures.csv").read_text().splitlines()
    assert any(line.startswith("ASPO,minimal_pair_accuracy,") for line in lines)
    assert json.loads((tmp_path / "table.json").read_text())["verdicts"][0]["verdict"] == "agrees"
    with pytest.raises(ValueError, match="other scenes or counts"):
        _fake_run(runs["DPO"][1], scenes=700)
        read_counts(runs["DPO"])


def test_a_worker_tells_of_an_error_and_keeps_its_words(tmp_path, monkeypatch):
    declared = _declared(tmp_path)
    (dpo,) = systems_of([ROOT / "world" / "dpo.yaml"], declared)
    run = make_run(dpo, 0, declared.test, declared, tmp_path)

    def broken(*_):
        print("what it was doing")
        raise ValueError("no\nluck")

    monkeypatch.setattr(compare_work, "run_recipe", broken)
    outcome = compare_work.work(run)
    assert outcome["name"] == "DPO, seed 0" and outcome["error"].startswith("no luck (log: ")
    assert "what it was doing" in (run.folder / "log.txt").read_text() and not is_done(run)


def test_the_divergence_of_answers_is_that_of_the_logits(tmp_path):
    """KL(model || start) summed over the answer's tokens, both ways of computing it."""
    start, processor = load_model(tiny_llava(tmp_path))
    model, _ = load_model(tmp_path)
    rows = tiny_rows(3)
    assert answer_kl(model, start, processor, rows) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)
    total = 0.0
    for row in rows:
        batch = compare_work.Collator(processor, responses=("chosen",))([row])
        with torch.no_grad():
            p, q = (m(**batch["model_inputs"]).logits.flatten(0, 1).double().log_softmax(-1) for m in (model, start))
        kept = batch["layout"].hidden_index
        total += float((p[kept].exp() * (p[kept] - q[kept])).sum())
    assert answer_kl(model, start, processor, rows) == pytest.approx(total / 3, rel=1e-4)
    assert total > 0.01


def test_the_divergence_is_of_what_was_sampled(monkeypatch):
    """No end of turn behind an answer that was cut off, and nothing in the place of an empty one."""
    model, processor = load_model("world")
    answers = [Answer("a red circle.", 5, True), Answer("a blue", 3, False), Answer(" ", 1, True)]
    monkeypatch.setattr(compare_work, "generate_answers", lambda *_, **__: answers)
    monkeypatch.setattr(compare_work, "start_model", lambda name: name)
    asked = []
    monkeypatch.setattr(compare_work, "answer_kl", lambda model, start, processor, rows: asked.extend(rows) or 0.5)
    compare_work.extra_figures(model, "start", processor, Scenes("world:validation", 3))
    assert [(row["chosen"], row["unfinished"]) for row in asked] == [("a red circle.", False), ("a blue", True)]
    assert math.isnan(answer_kl(model, model, processor, []))


def test_extra_figures_are_of_the_model_against_its_start(monkeypatch):
    model, processor = load_model("world")
    asked = []
    monkeypatch.setattr(compare_work, "start_model", lambda name: name)
    monkeypatch.setattr(compare_work, "answer_kl", lambda *given: asked.append(given) or 0.5)
    found = compare_work.extra_figures(model, "its start", processor, Scenes("world:validation", 3))
    ((of, start, _, rows),) = asked
    assert of is model and start == "its start" and len(rows) == 3 and found["kl"] == 0.5
    assert 5 < found["image_gap"] < 200  # the model does look: a true description needs the image
    noised = compare_work.extra_figures(model, "its start", processor, Scenes("world:validation", 3, noise_step=999))
    assert noised["image_gap"] < found["image_gap"]


def test_opening_the_test_scenes_is_noted_once_and_a_change_is_told(tmp_path, work):
    _declared(tmp_path)
    out = tmp_path / "out"
    assert compare.run(_arguments(tmp_path, "--seeds", 2, "--dry-run")) == 0 and not (out / "opened.json").exists()
    seen = []
    work.before = lambda: seen.append((out / "opened.json").exists())
    assert compare.run(_arguments(tmp_path, "--seeds", 2)) == 0
    assert seen and all(seen)  # before the first task
    record = (out / "opened.json").read_text()
    table = (out / "table.md").read_text()
    for hashed in json.loads(record)["openings"][0].values():
        assert hashed in table
    assert "changed after" not in table
    assert compare.run(_arguments(tmp_path, "--seeds", 2)) == 0 and (out / "opened.json").read_text() == record
    given = _arguments(tmp_path, "--seeds", 2)
    (tmp_path / "chosen" / "declared.yaml").write_text("DPO: {train.learning_rate: 3.0}\nASPO: {}\n")
    assert compare.run(given) == 0
    table = (out / "table.md").read_text()
    assert "The declared file changed" not in table
    assert "Recipes or their settings changed after the test scenes were opened: DPO; ASPO." in table
    assert (
        json.loads(record)["openings"][0]["time"] in table
        and len(json.loads((out / "opened.json").read_text())["openings"]) == 2
    )
    assert compare.run(_arguments(tmp_path, "--seeds", 2)) == 0  # the first settings again do not undo it
    assert "settings changed after" in (out / "table.md").read_text()
    (tmp_path / "declared.yaml").write_text((tmp_path / "declared.yaml").read_text() + "# another word\n")
    assert compare.run(_arguments(tmp_path, "--seeds", 2)) == 0
    assert "The declared file changed after the test scenes were opened" in (out / "table.md").read_text()
    (out / "opened.json").write_text("{")
    with pytest.raises(ValueError, match=r"opened\.json cannot be read"):
        compare.run(_arguments(tmp_path, "--seeds", 2))


def test_flags_that_would_be_ignored_are_refused(tmp_path, work):
    _declared(tmp_path)
    for more, message in (
        (("--quick", "--seeds", 5), "--quick has 2 seeds"),
        (("--grid", "--seeds", 5), "drop --seeds and --chosen"),
        (("--grid", "--chosen", "x.yaml"), "drop --seeds and --chosen"),
        (("--seeds", 0), "--seeds is 0"),
        (("--seeds", 101), "the grid's seed, 100, is one of "),
    ):
        with pytest.raises(ValueError, match=message):
            compare.run(_arguments(tmp_path, *more))
    _declared(tmp_path, grid={"learning_rate": [1e-4]})
    with pytest.raises(ValueError, match="grid needs learning_rate and seed"):
        compare.run(_arguments(tmp_path, "--grid"))
    assert work.done == []


def test_scenes_that_are_not_there_are_told(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hello."}\n' * 3)
    with pytest.raises(ValueError, match=r"rows\.jsonl has 1 rows behind the first 2, not 4"):
        compare_work.scene_rows(Scenes(str(tmp_path / "rows.jsonl"), 4, skip=2))


def test_a_name_that_no_recipe_has_is_told(tmp_path, work, capsys):
    _declared(tmp_path, curves=["DPO", "DPPO"], comparisons=[{"system": "X", "against": "DPO", "direction": "none"}])
    assert compare.run(_arguments(tmp_path, "--dry-run")) == 0
    assert "no given recipe has: X; DPPO" in capsys.readouterr().out


class Deadly:
    """A task in whose hands the process dies, or one that raises what nobody expects; see `compare_work.work`."""

    def __init__(self, folder, how):
        self.folder, self.how = folder, how

    def __getattribute__(self, name):
        if name == "marker" or name == "done":  # the first thing that `run_planned` asks
            how = object.__getattribute__(self, "how")
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise SystemExit(3) if how == "exit" else AssertionError("not so")
        return object.__getattribute__(self, name)


def test_a_killed_process_and_any_exception_are_one_outcome_each(tmp_path):
    hows = ["assert", "kill", "exit", "assert"]
    tasks = [Deadly(tmp_path / f"{n}-{how}", how) for n, how in enumerate(hows)]
    found = {outcome["name"]: outcome["error"] for outcome in compare.results(tasks, 2)}
    assert set(found) == {task.folder.name for task in tasks} and all(found.values())
    assert "was killed" in found["1-kill"] and "AssertionError: not so" in found["3-assert"]
    assert next(compare.results(tasks[2:3], 1))["error"].startswith("SystemExit: 3")


def test_other_scenes_of_the_same_number_are_refused():
    a, b = table(np.ones((2, 3))), table(np.ones((2, 3)))
    with pytest.raises(ValueError, match="b and a were judged on other scenes"):
        resampled(
            {"a": dataclasses.replace(a, ids=("1", "2", "3")), "b": dataclasses.replace(b, ids=("1", "2", "4"))},
            [ACCURACY],
        )


def test_what_is_not_alike_is_told(tmp_path):
    declared = _declared(tmp_path)
    names = ("dpo", "csr", "kto", "sft", "fisao_online")
    systems = systems_of([ROOT / "world" / f"{name}.yaml" for name in names], declared)
    runs = {s.name: [make_run(s, 0, declared.test, declared, tmp_path)] for s in (System(START, None), *systems)}
    assert compare_notes.unlike(runs, declared) == [
        "On pairs or answers of their own, not on DPO's: CSR; FiSAO, on-policy.",
        "CSR: 3 iterations of 2 steps, each on the same first 11 prompts.",
        "KTO: a step has 16 answers, not 16 pairs.",
        "FiSAO, on-policy: samples its own answers, with a budget of its own (see its recipe).",
        "Without a beta, so with fewer settings tried in the grid: SFT on the chosen; FiSAO, on-policy.",
    ]


def test_rewards_are_read_off_the_training_log(tmp_path):
    declared = _declared(tmp_path)
    (dpo,) = systems_of([ROOT / "world" / "dpo.yaml"], declared)
    run = make_run(dpo, 0, declared.test, declared, tmp_path)
    assert compare_work.reward_figures(run) == {}
    log = [
        {"step": 5, "rewards/chosen": -0.4, "rewards/rejected": -0.5, "rewards/accuracies": 0.5},
        {"step": 10, "rewards/chosen": -0.1, "rewards/rejected": -0.9, "rewards/accuracies": 0.8},
        {"step": 10, "train_runtime": 3.0},
    ]
    (run.folder / "train" / "model").mkdir(parents=True)
    (run.folder / "train" / "model" / "log_history.json").write_text(json.dumps(log))
    assert compare_work.reward_figures(run) == {
        "chosen_reward_final": -0.1,
        "chosen_reward_min": -0.4,
        "rejected_reward_final": -0.9,
        "margin_accuracy_final": 0.8,
    }


def test_the_tenth_iteration_comes_behind_the_second(tmp_path):
    for name in ("iteration-2", "iteration-10"):
        (tmp_path / name / "merged").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert compare_work._base(SimpleNamespace(model="start"), tmp_path / "model") == str(
        tmp_path / "iteration-10" / "merged"
    )


@pytest.mark.slow
def test_quick_for_real(tmp_path, capsys):
    """Two systems and two seeds through every command, in two processes."""
    arguments = ["compare", *(str(ROOT / "world" / f"{n}.yaml") for n in ("dpo", "aspo"))]
    arguments += ["--declared", str(ROOT / "declared.yaml"), "--quick", "--jobs", "2", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "SMOKE RUN" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("pairs-*.done.json"))) == 2  # one for each seed, for both systems
    assert len(list((tmp_path / "runs").glob("*/*/result.json"))) == 5
    assert Scenes("world:validation", 32, 0, 2) == compare.quick(load_declared(ROOT / "declared.yaml")).test
