"""Processes that are killed, stopped or hang while they train: what is seen, what is kept, and how it goes on."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import injected
import pytest
from faults import KILLED, SECONDS, STEPS, Command, Place, assert_same, fault, kept, losses, run, said
from injected import AtStep, AtWrite

ROOT = Path(__file__).parents[1]
INTERRUPTED = 130
DROPOUT = ("--lora_dropout", 0.2, "--disable_dropout", "false")  # random numbers go on where they were
SECONDS_TO_END = 60  # in which the others notice a death, on a loaded machine too


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("options", [(), DROPOUT, ("--no_use_lora",)], ids=["LoRA", "dropout", "full"])
@fault(
    "SIGKILL during a step",
    sees="",
    kept="the last checkpoint: at most `save_steps` - 1 steps, and the one in hand, are lost",
    goes_on="the same command: the same weights, bit for bit",
)
def test_sigkill_during_a_step(place, tmp_path, options):
    argv, output = place.training(tmp_path / "out", *options), tmp_path / "out"
    status, _ = run(argv, tmp_path / "printed", fault=AtStep(6, (0,), injected.die))
    assert status == KILLED and kept(output) == ["checkpoint-4"]
    whole = place.whole(1, *options)
    assert f"going on from {output / 'checkpoint-4'}" in place.goes_on(argv, like=whole)
    assert losses(output) == losses(whole)


@fault(
    "SIGKILL during the first steps, before there is a checkpoint",
    sees="",
    kept="nothing",
    goes_on="the same command begins anew: the same weights, bit for bit",
)
def test_sigkill_before_the_first_checkpoint(place, tmp_path):
    argv, output = place.training(tmp_path / "out"), tmp_path / "out"
    assert run(argv, tmp_path / "printed", fault=AtStep(2, (0,), injected.die))[0] == KILLED
    assert kept(output) == []
    place.goes_on(argv)


@pytest.mark.parametrize(("file", "half"), [("adapter_model.safetensors", True), ("trainer_state.json", False)])
@fault(
    "SIGKILL while a checkpoint is written (`save_total_limit` 1)",
    sees="",
    kept="the checkpoint before: it is deleted only when the new one is whole and on the disk",
    goes_on="the same command passes the half one over, and writes it again: the same weights, bit for bit",
)
def test_sigkill_during_a_checkpoint(place, tmp_path, file, half):
    argv, output = place.training(tmp_path / "out", "--save_total_limit", 1), tmp_path / "out"
    status, _ = run(argv, tmp_path / "printed", fault=AtWrite("checkpoint-8", file, half))
    assert status == KILLED and kept(output) == ["checkpoint-4"] and (output / "checkpoint-8").is_dir()
    place.goes_on(argv)
    assert kept(output) == ["checkpoint-8"] and not (output / "checkpoint-4").exists()


@fault(
    "SIGKILL while an old checkpoint is deleted",
    sees="",
    kept="the new checkpoint; the rest of the old one counts as none",
    goes_on="the same command: the same weights, bit for bit",
)
def test_sigkill_during_a_deletion(place, tmp_path):
    argv, output = place.training(tmp_path / "out", "--save_total_limit", 1), tmp_path / "out"
    assert run(argv, tmp_path / "printed", fault=injected.at_deletion)[0] == KILLED
    assert kept(output) == ["checkpoint-8"] and (output / "checkpoint-4").is_dir()
    place.goes_on(argv)


@fault(
    "SIGKILL while the final model is written",
    sees="",
    kept="the last step's checkpoint",
    goes_on="the same command writes the model, without a further step: the same weights, bit for bit",
)
def test_sigkill_during_the_final_save(place, tmp_path):
    argv, output = place.training(tmp_path / "out"), tmp_path / "out"
    status, _ = run(argv, tmp_path / "printed", fault=AtWrite("out", "adapter_model.safetensors", True))
    assert status == KILLED and kept(output) == ["checkpoint-4", "checkpoint-8"]
    place.goes_on(argv)
    assert len(losses(output)) == STEPS


@fault(
    "Ctrl-C, or SIGTERM to any one of the processes",
    sees="interrupted; run the same command again to go on",
    kept="all: the step in hand is finished, and saved (exit status 130 everywhere)",
    goes_on="the same command: the same weights, bit for bit",
)
def test_sigterm_to_one_of_two(place, tmp_path, request):
    argv, output = place.training(tmp_path / "out", size=2), tmp_path / "out"
    statuses, texts = run(argv, tmp_path / "printed", 2, AtStep(6, (1,), injected.ask_to_stop))
    assert statuses == [INTERRUPTED] * 2, texts
    for text in texts:
        said(request.function, text)
    assert kept(output) == ["checkpoint-4", "checkpoint-6"]
    place.goes_on(argv, 2)


@pytest.mark.parametrize(("rank", "options"), [(0, ()), (1, DROPOUT)])
@fault(
    "SIGKILL of one of several processes",
    sees="aspo train: process <rank> of 2 waited for the others, and one of them has died or hangs (<why>). What is "
    "done is kept: run the same command again",
    kept="the last checkpoint; the others end by themselves within seconds (exit status 2), with a launcher or without",
    goes_on="the same command, on any number of processes: the same weights (bit for bit on the same number)",
)
def test_sigkill_of_one_of_two(place, tmp_path, request, rank, options):
    argv, output = place.training(tmp_path / "out", *options, size=2), tmp_path / "out"
    command = Command(argv, tmp_path / "printed", 2, AtStep(6, (rank,), injected.die))
    command.processes[rank].join(SECONDS)
    died = time.monotonic()
    statuses, texts = command.wait()
    seconds = time.monotonic() - died
    print(f"the other process ended {seconds:.1f} s after the death")
    assert statuses[rank] == KILLED and statuses[1 - rank] == 2 and seconds < SECONDS_TO_END
    said(request.function, texts[1 - rank])
    assert kept(output) == ["checkpoint-4"]
    place.goes_on(argv, 2, place.whole(2, *options))


@fault(
    "one of several processes hangs, or its machine is gone",
    sees="aspo train: process 0 of 2 waited for the others, and one of them has died or hangs (<why>). What is "
    "done is kept: run the same command again",
    kept="the last checkpoint; the others end after `--ddp_timeout` (default: 1800 s)",
    goes_on="the same command, on any number of processes: the same weights",
)
def test_one_of_two_hangs(place, tmp_path, request):
    wait = 10
    argv = place.training(tmp_path / "out", "--ddp_timeout", wait, size=2)
    command = Command(argv, tmp_path / "printed", 2, AtStep(6, (1,), injected.stop))
    command.until(lambda: len(kept(tmp_path / "out")) == 1)
    command.processes[0].join(SECONDS)
    os.kill(command.processes[1].pid, signal.SIGKILL)
    statuses, texts = command.wait()
    assert statuses == [2, KILLED] and "Timed out" in texts[0], texts
    said(request.function, texts[0])
    place.goes_on(argv, 2)


@fault(
    "SIGKILL of a process that loads data (`--dataloader_num_workers`)",
    sees="aspo train: a process that loads data has died (<why>): with too little memory for them, lower "
    "--dataloader_num_workers. What is done is kept: run the same command again",
    kept="the last checkpoint",
    goes_on="the same command: the same weights, bit for bit",
)
def test_sigkill_of_a_data_loader(place, tmp_path, request):
    one_by_one = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 6)  # or all were loaded before
    argv, output = place.training(tmp_path / "out", "--dataloader_num_workers", 1, *one_by_one), tmp_path / "out"
    status, text = run(argv, tmp_path / "printed", fault=AtStep(5, (0,), injected.kill_children))
    assert status == 2, text
    said(request.function, text)
    assert kept(output) == ["checkpoint-4"]
    place.goes_on(argv, like=place.whole(1, *one_by_one))


@pytest.mark.parametrize("size", [1, 2])
@fault(
    "the loss is no number, on one process or on any one of several",
    sees="aspo train: the loss is nan at step 5, in a batch of the rows <ids>. Nothing was saved since: the last "
    "checkpoint is good. Look at those rows, lower learning_rate, or train in bfloat16 instead of float16",
    kept="the last checkpoint, which is good; nothing that is no number is logged or saved (exit status 2 everywhere)",
    goes_on="the same command, when the cause is gone: the same weights, bit for bit",
)
def test_nan(place, tmp_path, request, size):
    argv, output = place.training(tmp_path / "out", size=size), tmp_path / "out"
    spoil = AtStep(6, (size - 1,), injected.spoil)
    statuses, texts = Command(argv, tmp_path / "printed", size, spoil).wait()
    assert statuses == [2] * size, texts
    for text in texts:
        said(request.function, text)
    named = texts[0].rpartition("rows ")[2].partition(". ")[0].split(", ")
    assert len(named) == {1: 4, 2: 1}[size] and all(name.startswith("row-") for name in named)
    assert kept(output) == ["checkpoint-4"] and len(losses(output)) == 5
    place.goes_on(argv, size)


PLUGIN = """
import os
from injected import AtStep, die

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    AtStep(6, (1,), die)(int(os.environ["RANK"]))
"""


@pytest.mark.slow
@fault(
    "one of torchrun's processes dies, with `--max-restarts` and `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`",
    sees="",
    kept="the last checkpoint; torchrun ends the others",
    goes_on="by itself: torchrun starts all of them again, and they end with the same weights, bit for bit",
)
def test_torchrun_restarts(place, tmp_path):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    argv = place.training(tmp_path / "out", "--plugins", tmp_path / "plugin.py", size=2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else they look for each other where the dead ones were
    command = [*launch, "--max-restarts", "1", "-m", "aspo", *map(str, argv)]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 0, ended.stderr
    assert f"going on from {tmp_path / 'out' / 'checkpoint-4'}" in ended.stderr
    assert_same(place.whole(2), tmp_path / "out")
