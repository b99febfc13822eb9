"""configs/accelerate: each file is accelerate's, has no key that it does not know, and starts; examples/slurm.sh too.

There is no GPU here: GPUs' files are started with fewer processes, which meet over gloo.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from forked import Port, ended

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
STATE = str(ROOT / "tests" / "accelerate_state.py")
SECONDS = 240  # after which a launcher counts as hanging


def config(name: str) -> str:
    return str(ROOT / "configs" / "accelerate" / f"{name}.yaml")


def environment(**more: str) -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "FSDP", "WORLD_SIZE", "RANK", "LOCAL"))
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def answers(*commands: list[str]) -> list[dict]:
    """What the processes of launchers that run side by side print."""
    started = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        for c in commands
    ]
    with ended(*started):
        printed = [process.communicate(timeout=SECONDS) for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(err[-3000:] for _, err in printed)
    return sorted((x for out, _ in printed for x in objects(out)), key=lambda x: x.get("rank", 0))


def objects(printed: str) -> list[dict]:
    """The JSON objects in what processes printed, whose lines may run into each other."""
    found, end = [], 0
    while (start := printed.find("{", end)) >= 0:
        read, end = json.JSONDecoder().raw_decode(printed, start)
        found.append(read)
    return found


def test_all_are_here():
    names = {"cpu", "eight_gpus", "fsdp2", "one_gpu", "two_nodes", "zero3"}
    assert {path.stem for path in CONFIGS} == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_is_accelerates_own_and_every_key_is_known(path):
    loaded = load_config_from_file(str(path))  # raises for an unknown key of the first level
    written = yaml.safe_load(path.read_text())
    for name, value in written.items():
        if name in ("compute_environment", "distributed_type"):
            continue
        assert getattr(loaded, name) == value
    assert isinstance(loaded, ClusterConfig) and loaded.num_processes > 0
    # Keys of the second level are options of the launcher; it would set what it does not know without a word.
    options = {action.dest for action in launch_command_parser()._actions}
    inner = [*(written.get("fsdp_config") or ()), *(written.get("deepspeed_config") or ())]
    unknown = [name for name in inner if name not in options | {"gradient_accumulation_steps", "gradient_clipping"}]
    assert not unknown
    assert {"gradient_accumulation_steps", "gradient_clipping"} <= options | set(inner) or not written.get(
        "deepspeed_config"
    )
    assert path.read_text().startswith("# ") and f"configs/accelerate/{path.name}" in path.read_text()


def test_processes_of_a_gpus_each():
    assert load_config_from_file(config("eight_gpus")).num_processes == 8
    two = load_config_from_file(config("two_nodes"))
    assert (two.num_machines, two.num_processes) == (2, 16)


def test_one_process_and_two():
    one = answers([*LAUNCH, "--config_file", config("one_gpu"), STATE])
    assert one == [{"processes": 1, "rank": 0, "precision": "bf16", "sum": 1}]
    two = answers([*LAUNCH, "--config_file", config("cpu"), STATE])
    assert [(x["processes"], x["rank"], x["sum"], x["precision"]) for x in two] == [(2, 0, 3, "no"), (2, 1, 3, "no")]


def test_eight_gpus_with_fewer_processes():
    found = answers(
        [*LAUNCH, "--config_file", config("eight_gpus"), "--num_processes", "2", "--main_process_port", "0", STATE]
    )
    assert [(x["processes"], x["sum"], x["precision"]) for x in found] == [(2, 3, "bf16")] * 2


def test_two_nodes_meet():
    with Port() as port:
        nodes = [
            [*LAUNCH, "--config_file", config("two_nodes"), "--num_processes", "2", "--machine_rank", str(rank),
             "--main_process_ip", "127.0.0.1", "--main_process_port", str(port), STATE]
            for rank in (0, 1)
        ]  # fmt: skip
        assert [(x["processes"], x["rank"], x["sum"]) for x in answers(*nodes)] == [(2, 0, 3), (2, 1, 3)]


def test_fsdp2_shards_a_model():
    command = [
        *LAUNCH,
        "--config_file",
        config("fsdp2"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        STATE,
        "fsdp2",
    ]
    found = answers(command)
    assert [(x["processes"], x["version"], x["reshard"]) for x in found] == [(2, 2, True)] * 2
    assert found[0]["shards"] == [[2, 4], [2], [1, 4], [1]] and found[1]["shards"] == [[2, 4], [2], [0, 4], [0]]


def test_zero3_shards_a_model():
    pytest.importorskip("deepspeed")
    command = [
        *LAUNCH,
        "--config_file",
        config("zero3"),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        *("--gradient_accumulation_steps", "1", "--gradient_clipping", "1.0"),  # Trainer fills in "auto"
        STATE,
        "zero3",
    ]
    assert answers(command) == [{"stage": 3, "processes": 2, "shards": [[0]] * 4}] * 2


# ---- SLURM ----

SRUN = """#!/usr/bin/env bash
# Two nodes of this machine.
shift  # --kill-on-bad-exit=1
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""


def test_slurm_script_is_bash():
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm.sh")], check=True)


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_slurm_script_starts_a_launcher_on_each_node(tmp_path, fails):
    """With a false srun, scontrol and train command; the launchers are real and meet."""
    tools = {
        "srun": SRUN,
        "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"\n',
        "accelerate": f'#!/bin/sh\nshift\nexec {sys.executable} -m accelerate.commands.launch "$@"\n',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    command = tmp_path / "aspo"
    command.mkdir()
    (command / "__init__.py").touch()
    script = (
        "import json, os, sys\n"
        "found = {'arguments': sys.argv[1:], 'rank': int(os.environ['RANK']), 'of': os.environ['WORLD_SIZE']}\n"
        "print(json.dumps(found))\n"
    )
    (command / "__main__.py").write_text(script + ("sys.exit(3)\n" if fails else ""))
    own = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": config("two_nodes"), "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip
    arguments = ["--train_data", "rows of mine", "--output_dir", "out"]
    with Port() as port:
        job = subprocess.Popen(
            [str(ROOT / "examples" / "slurm.sh"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=tmp_path, env=environment(**own, MASTER_PORT=str(port)),
        )  # fmt: skip
        with ended(job):
            printed, errors = job.communicate(timeout=SECONDS)
    assert (job.returncode != 0) == fails, errors[-2000:]
    assert ("exitcode  : 3" in errors) == fails
    found = sorted(objects(printed), key=lambda x: x["rank"])
    if not fails:
        assert [(x["rank"], x["of"]) for x in found] == [(0, "2"), (1, "2")]
        assert all(x["arguments"] == ["train", *arguments] for x in found)
