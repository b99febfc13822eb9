"""Killed, interrupted and repeated runs: they go on from the last complete checkpoint and end as if never stopped."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import ended
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import tiny_llava, tiny_rows

from aspo import cli
from aspo.checkpoints import is_complete, last_checkpoint
from aspo.data import write_rows
from aspo.resume import differences, write_json
from aspo.rows import load_rows

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY = 12, 4
SECONDS = 240  # after which a command counts as hanging

# An objective that takes its time, so that a test can act in the middle of a run.
SLOW = """
import time
from aspo_kernels.objectives import Inputs, Result, get, register

@register("slow_aspo")
def slow_aspo(x: Inputs, beta: float = 0.1, alpha: float = 0.5) -> Result:
    time.sleep(0.05)
    return get("aspo")(x, beta=beta, alpha=alpha)
"""

# A run that dies by itself within a step: a kill from outside may come too late.
MORTAL = """
import os
from injected import AtStep, die

if "DIE_AT" in os.environ:
    AtStep(int(os.environ["DIE_AT"]), (0,), die)(0)
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny_llava(folder / "model")
    write_rows(folder / "rows", tiny_rows(16))
    (folder / "slow.py").write_text(SLOW)
    (folder / "mortal.py").write_text(MORTAL)
    return folder


def flags(workplace, output, *more):
    """3 micro-batches of 1 pair a step, 16 pairs: 6 steps an epoch, the last one of a single pair; 2 epochs."""
    return [
        *("train", "--model_name_or_path", workplace / "model", "--train_data", workplace / "rows"),
        *("--output_dir", output, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 3),
        *(
            "--num_train_epochs",
            2,
            "--learning_rate",
            1e-3,
            "--save_steps",
            SAVE_EVERY,
            "--logging_steps",
            1,
            "--use_cpu",
        ),
        *more,
    ]


def start(arguments, **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **more}
    return subprocess.Popen(
        [sys.executable, "-m", "aspo", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(output, step, process):
    """Until log_history.json shows `step`."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        history = output / "log_history.json"
        if history.is_file() and json.loads(history.read_text())[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[1]}")


def assert_same_weights(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name  # bit for bit


EVERYTHING = (
    *("--shared_prefix", "on", "--padding_free", "--token_budget", 130, "--num_train_epochs", 4),
    *("--vision_cache", "disk", "--precompute_ref_log_probs"),
)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), EVERYTHING], ids=["defaults", "packed and cached"])
def test_a_killed_run_ends_with_the_same_weights(workplace, tmp_path, options):
    more = ("--plugins", workplace / "mortal.py", *options)
    whole = start(flags(workplace, tmp_path / "whole", *more))
    killed = start(flags(workplace, tmp_path / "killed", *more), DIE_AT=str(SAVE_EVERY + 2))
    with ended(whole, killed):
        for run, status in ((killed, -signal.SIGKILL), (whole, 0)):
            errors = run.communicate(timeout=SECONDS)[1]
            assert run.returncode == status, errors
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    found = last_checkpoint(tmp_path / "killed")
    assert found is not None and found.name == f"checkpoint-{SAVE_EVERY}"
    half = tmp_path / "killed" / "checkpoint-5"  # as a kill in the middle of saving leaves it
    shutil.copytree(found, half)
    (half / "trainer_state.json").unlink()

    resumed = start(flags(workplace, tmp_path / "killed", *more))
    with ended(resumed):
        errors = resumed.communicate(timeout=SECONDS)[1]
    assert resumed.returncode == 0, errors
    assert f"going on from {found}" in errors
    name = "adapter_model.safetensors"
    assert_same_weights(tmp_path / "whole" / name, tmp_path / "killed" / name)
    histories = [json.loads((tmp_path / run / "log_history.json").read_text()) for run in ("whole", "killed")]
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in histories]
    steps = len(losses[0])
    assert losses[0] == losses[1] and (steps == STEPS or (options and steps > SAVE_EVERY + 2))
    record = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert record["finished"] and record["steps"] == steps and record["pairs"] == 16


def test_ctrl_c_saves_the_step_in_hand(workplace, tmp_path):
    slow = ("--loss_type", "slow_aspo", "--plugins", workplace / "slow.py")
    process = start(flags(workplace, tmp_path / "out", *slow))
    with ended(process):
        wait_for_step(tmp_path / "out", 2, process)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 130, errors
    assert "interrupted; run the same command again to go on" in errors
    history = json.loads((tmp_path / "out" / "log_history.json").read_text())
    found = last_checkpoint(tmp_path / "out")
    done = json.loads((found / "trainer_state.json").read_text())["global_step"]
    assert 2 < done < STEPS and done >= max(entry["step"] for entry in history if "loss" in entry)


@pytest.mark.parametrize("use_lora", [True, False])
def test_resuming_is_exact(workplace, tmp_path, use_lora):
    """The same in one process, from a checkpoint in the middle of the second epoch; full fine-tuning too."""
    more = ["--no_use_lora"] * (not use_lora)
    assert cli.main([*map(str, flags(workplace, tmp_path / "whole", "--save_total_limit", 9, *more))]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    resumed = tmp_path / "resumed"
    name = "adapter_model.safetensors" if use_lora else "model.safetensors"
    (resumed / name).unlink()
    shutil.rmtree(resumed / f"checkpoint-{STEPS}")
    write_json(resumed / "run.json", {**json.loads((resumed / "run.json").read_text()), "finished": None})
    assert last_checkpoint(resumed).name == "checkpoint-8"
    assert cli.main([*map(str, flags(workplace, resumed, "--save_total_limit", 9, *more))]) == 0
    assert_same_weights(tmp_path / "whole" / name, resumed / name)
    rewards = [
        [entry["rewards/margins"] for entry in json.loads((run / "log_history.json").read_text()) if "loss" in entry]
        for run in (tmp_path / "whole", resumed)
    ]
    assert rewards[0] == rewards[1]  # so the reference was the start model both times


def test_a_finished_run_is_left_alone_and_another_refused(workplace, tmp_path, capsys, monkeypatch):
    run = [*map(str, flags(workplace, tmp_path / "out", "--max_steps", 2))]
    assert cli.main(run) == 0
    weights = tmp_path / "out" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    capsys.readouterr()
    assert cli.main([*run, "--logging_steps", "7"]) == 0
    assert "is finished" in capsys.readouterr().err and weights.stat().st_mtime_ns == before
    assert cli.main([*run, "--beta", "0.7"]) == 2
    assert "beta: 0.1 -> 0.7" in capsys.readouterr().err
    write_rows(tmp_path / "rows", tiny_rows(15))
    assert cli.main([*run, "--train_data", str(tmp_path / "rows")]) == 2
    refused = capsys.readouterr().err
    assert "pairs_sha256" in refused and "train_data" not in refused
    monkeypatch.chdir(workplace)  # the same rows and model by another spelling, and the same rows elsewhere
    write_rows(tmp_path / "copy", tiny_rows(16))
    for rows in ("rows", tmp_path / "copy"):
        assert cli.main([*run, "--train_data", str(rows), "--model_name_or_path", "./model"]) == 0
        assert "is finished" in capsys.readouterr().err
    assert cli.main([*run, "--resume_from_checkpoint", str(tmp_path / "nothing")]) == 2
    assert "is no complete checkpoint" in capsys.readouterr().err
    (tmp_path / "out" / "run.json").unlink()
    assert cli.main(run) == 2
    assert "checkpoints of something else" in capsys.readouterr().err


@pytest.mark.parametrize("kept", ["native", "named by hand", "parquet"])
def test_other_images_are_another_run(workplace, tmp_path, capsys, kept):
    """Where nothing but negative images differs, as after another crop, a run is neither finished nor gone on with."""
    rows = [{**row, "negative_images": row["images"]} for row in tiny_rows(4)]
    other = [{**row, "negative_images": last["images"]} for row, last in zip(rows, rows[1:] + rows[:1], strict=True)]

    def data(name, of):
        folder = tmp_path / name
        if kept == "native":
            write_rows(folder, of)
            return folder
        folder.mkdir()
        if kept == "parquet":
            load_rows(of).to_parquet(folder / "rows.parquet")
        else:
            for n, row in enumerate(of):
                for column in ("images", "negative_images"):
                    row[column][0].save(folder / f"{column}-{n}.png")
            named = [{**row, **{c: f"{c}-{n}.png" for c in ("images", "negative_images")}} for n, row in enumerate(of)]
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
        return folder

    run = [*map(str, flags(workplace, tmp_path / "out", "--max_steps", 1, "--loss_type", "mdpo"))]
    assert cli.main([*run, "--train_data", str(data("rows", rows))]) == 0
    assert cli.main([*run, "--train_data", str(data("changed", other))]) == 2
    said = capsys.readouterr().err
    assert "images_sha256" in said and "pairs_sha256" not in said
    assert cli.main([*run, "--train_data", str(shutil.copytree(tmp_path / "rows", tmp_path / "moved"))]) == 0
    assert "is finished" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "run.json").read_text())  # of before images were noted
    write_json(tmp_path / "out" / "run.json", {k: v for k, v in record.items() if k != "images_sha256"})
    assert cli.main([*run, "--train_data", str(tmp_path / "rows")]) == 0


def test_a_run_that_failed_before_its_first_checkpoint_blocks_nothing(workplace, tmp_path, capsys):
    run = [*map(str, flags(workplace, tmp_path / "out", "--max_steps", 1))]
    assert cli.main([*run, "--max_length", "10"]) == 2
    assert "max_length 10" in capsys.readouterr().err.splitlines()[-1]  # the last line, not a progress bar
    assert cli.main(run) == 0


@pytest.mark.parametrize("text", ['{"config": ', '{"a": 1}', "[]"])
def test_a_run_json_of_something_else_is_refused(workplace, tmp_path, capsys, text):
    (tmp_path / "run.json").write_text(text)
    assert cli.main([*map(str, flags(workplace, tmp_path, "--max_steps", 1))]) == 2
    assert "run.json is no record of `aspo train`" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_run_killed_after_its_last_step_takes_no_further_one(workplace, tmp_path, use_lora):
    """Stopped between the last checkpoint and the final save, in the middle of an epoch."""
    more = ["--no_use_lora"] * (not use_lora)
    run = [*map(str, flags(workplace, tmp_path / "out", "--max_steps", 2, *more))]
    assert cli.main(run) == 0
    weights = tmp_path / "out" / ("adapter_model.safetensors" if use_lora else "model.safetensors")
    weights.rename(tmp_path / "expected.safetensors")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    write_json(tmp_path / "out" / "run.json", {**record, "finished": None})
    assert cli.main(run) == 0
    assert_same_weights(tmp_path / "expected.safetensors", weights)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == 2
    assert not (tmp_path / "out" / "checkpoint-3").exists()


# ---- complete checkpoints ----


@pytest.fixture(scope="module")
def checkpoint(workplace, tmp_path_factory):
    output = tmp_path_factory.mktemp("complete") / "out"
    assert cli.main([*map(str, flags(workplace, output, "--max_steps", 1))]) == 0
    return output / "checkpoint-1"


def test_a_checkpoint_is_complete(checkpoint):
    assert is_complete(checkpoint) and last_checkpoint(checkpoint.parent) == checkpoint


@given(
    name=st.sampled_from(
        ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    ),
    share=st.one_of(st.none(), st.floats(0.0, 0.99)),
)
def test_a_file_missing_or_cut_short_makes_it_incomplete(checkpoint, name, share):
    whole = (checkpoint / name).read_bytes()
    try:
        if share is None:
            (checkpoint / name).unlink()
        else:
            (checkpoint / name).write_bytes(whole[: int(share * len(whole.rstrip()))])
        assert not is_complete(checkpoint) and last_checkpoint(checkpoint.parent) is None
    finally:
        (checkpoint / name).write_bytes(whole)


def test_a_missing_shard_or_wrong_step_makes_it_incomplete(checkpoint, tmp_path):
    copy = tmp_path / "checkpoint-1"
    shutil.copytree(checkpoint, copy)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not is_complete(copy)
    shutil.copytree(checkpoint, tmp_path / "checkpoint-7")
    assert not is_complete(tmp_path / "checkpoint-7")
    assert not is_complete(tmp_path / "nowhere")


def test_differences():
    old = {"beta": 0.1, "save_steps": 4, "kept": [1, 2], "gone": 3}
    new = {"beta": 0.2, "save_steps": 8, "kept": (1, 2), "fresh": None}
    assert differences(old, new, ("save_",)) == ["beta: 0.1 -> 0.2", "gone: 3 -> None"]


def test_a_path_may_be_spelled_otherwise(tmp_path, monkeypatch):
    for name in ("rows", "others"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for spelling in (str(tmp_path / "rows"), "./rows", "others/../rows"):
        assert differences({"data": "rows"}, {"data": spelling}, ()) == []
    assert differences({"data": "rows"}, {"data": "others"}, ()) == ["data: rows -> others"]
    assert differences({"data": "rows"}, {"data": "gone"}, ()) == ["data: rows -> gone"]
