"""`aspo train` as users start it: by accelerate's launcher on two processes, and alone."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import tiny_llava, tiny_rows

from aspo.data import write_rows

ROOT = Path(__file__).parent.parent
# Not `accelerate launch --cpu --num_processes 2`, which without mpirun starts one process (accelerate 1.15).
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", ROOT / "configs" / "accelerate" / "cpu.yaml", "-m")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = [sys.executable, *map(str, command)]
    return subprocess.run(given, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("launch")
    write_rows(folder / "rows", [{**row, "id": f"row-{n}"} for n, row in enumerate(tiny_rows(23))])
    model = tiny_llava(folder / "llava")
    shared = ["--max_steps", 20, "--learning_rate", 1e-3, "--logging_steps", 5, "--report_to", "none", "--use_cpu"]
    return ["train", "--model_name_or_path", model, "--train_data", folder / "rows", "--loss_type", "aspo", *shared]


def test_two_processes_end_with_the_weights_of_one(flags, tmp_path):
    alone = run("-m", "aspo", *flags, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 4)
    assert alone.returncode == 0, alone.stderr
    both = run(*LAUNCH, "aspo", *flags, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", 2)
    assert both.returncode == 0, both.stderr
    assert both.stderr.count("results in") == 1 and "2 processes" in both.stderr  # one of them speaks
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 8
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    assert max(float(one[name].abs().max()) for name in one if "lora_B" in name) > 1e-3
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["processes"] == 2 and record["step"] == "4 pairs" and record["steps"] == 20 and record["finished"]
    again = run(*LAUNCH, "aspo", *flags, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", 2)
    assert again.returncode == 0 and again.stderr.count("is finished; choose another --output_dir") == 1


def test_an_error_of_all_processes_is_told_and_ends_them(flags, tmp_path):
    failed = run(*LAUNCH, "aspo", *flags, "--output_dir", tmp_path / "out", "--alpha", 7)
    assert failed.returncode != 0 and "alpha" in failed.stderr
