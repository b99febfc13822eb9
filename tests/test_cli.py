"""The `aspo` command: help, one clear line on bad input, exit codes, and `aspo train`'s options from YAML and flags."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import argparse
import json
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image
from tiny import tiny_llava, tiny_rows
from transformers.utils.versions import require_version

from aspo import cli, train
from aspo.data import write_rows


@pytest.fixture
def command(monkeypatch):
    """command(run) -> register a fake sub-command `fake` whose module runs `run(args)`."""

    def register(run):
        module = types.ModuleType("fake_command")
        module.add_arguments = lambda parser: parser.add_argument("--depth", type=int, default=1)
        module.run = run
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "for this test"))

    return register


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - cli.SEVERAL))
def test_a_command_of_one_process_is_refused_under_a_launcher(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"aspo {command}: it runs as one process, and a launcher started 2")
    assert error.count("\n") == 1


def test_help_lists_the_commands(capsys):
    assert cli.main([]) == 0 and cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("pairs", "score", "train", "eval", "report", "demo"))


def test_help_imports_no_transformers():
    code = "import sys, aspo.cli as c; c.main(['--help']); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("aspo-kernels ")


def test_unknown_commands_and_flags(capsys, command):
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    command(lambda args: 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fake", "--dept", "3"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "did you mean --depth?" in message
    with pytest.raises(SystemExit) as stop:
        cli.main(["fake", "--depth", "deep"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "'deep'" in message


def test_the_exit_status_is_the_commands(command):
    command(lambda args: args.depth)
    assert cli.main(["fake", "--depth", "7"]) == 7


@pytest.mark.parametrize(
    "error",
    [ValueError("row 3\nis bad"), FileNotFoundError(2, "No such file", "x.json"), ImportError("no flash attention")],
)
def test_bad_input_is_one_line(capsys, command, error):
    def run(args):
        raise error

    command(run)
    assert cli.main(["fake"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("aspo fake: ") and message.count("\n") == 1
    assert cli.main(["--traceback", "fake"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt(capsys, command):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["fake"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_missing_package_says_what_to_install(capsys, command):
    def run(args):
        import no_such_package  # noqa: F401

    command(run)
    assert cli.main(["fake"]) == 2
    assert 'no_such_package, which is not installed: pip install "aspo-kernels[train]"' in capsys.readouterr().err


def test_a_missing_distribution_is_named_alone(capsys, command):
    def run(args):
        require_version("no-such.package>=0.9.3", "Try: pip install -U something")

    command(run)
    assert cli.main(["fake"]) == 2
    name = "no-such.package"
    assert f"needs {name}, which is not installed: pip install {name}\n" in capsys.readouterr().err


# ---- aspo train ----


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--batch_size", "did you mean --per_device_train_batch_size?"),
        ("--batch-size=4", "did you mean --per_device_train_batch_size?"),
        ("--lr", "did you mean --learning_rate?"),
        ("--epochs", "did you mean --num_train_epochs?"),
        ("--model", "did you mean --model_name_or_path?"),
        ("--data", "did you mean --train_data?"),
        ("--out", "did you mean --output_dir?"),
        ("--output", "did you mean --output_dir?"),
        ("--lerning_rate", "did you mean --learning_rate?"),
        ("--trust_remote_code", "put it before the command: aspo --trust_remote_code train ..."),
    ],
)
def test_what_an_unknown_flag_meant(flag, meant, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", flag, "4"])
    assert capsys.readouterr().err.startswith(f"aspo train: unknown argument '{flag}'; {meant}")


def test_an_unknown_key_of_yaml_is_told_by_its_other_name(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-5")
    with pytest.raises(ValueError, match="unknown option 'lr'; did you mean learning_rate"):
        parse("--config", str(file), *REQUIRED)


def parse(*flags):
    parser = cli.Parser()
    train.add_arguments(parser)
    return train.parse_config(parser.parse_args([*flags]))


REQUIRED = ("--model_name_or_path", "world", "--train_data", "rows", "--output_dir", "out", "--use_cpu")


def test_flags():
    config = parse(
        *REQUIRED, "--loss_type", "dpo", "sft", "--loss_weights", "1", "0.1", "--beta", "0.3", "--no_use_lora"
    )
    assert config.loss_type == ["dpo", "sft"] and config.loss_weights == [1.0, 0.1]
    assert config.beta == 0.3 and not config.use_lora
    assert config.output_dir == "out" and config.learning_rate == 2e-5
    assert parse(*REQUIRED, "--learning-rate", "3e-4", "--use-lora", "false").learning_rate == 3e-4


def test_yaml_and_flags_over_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: world\ntrain_data: rows\noutput_dir: out\nuse_cpu: true\n"
        "learning_rate: 1e-5\nloss_type: [dpo, sft]\nloss_weights: [1, 0.5]\nmax_length: null\nlora_r: 4\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    config = parse("--config", str(file))
    assert config.learning_rate == 1e-5  # YAML itself reads 1e-5 as text
    assert config.loss_type == ["dpo", "sft"] and config.max_length is None
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    config = parse("--config", str(file), "--learning_rate", "2e-4", "--max_length", "64")
    assert (config.learning_rate, config.max_length, config.lora_r) == (2e-4, 64, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 0.1", "unknown option 'betta'; did you mean beta?"),
        ("beta: high", "high"),
        ("beta: [0.1", "run.yaml is no YAML"),
        ("- beta", "must hold `option: value` lines"),
        ("alpha: 0.3\nloss_type: dpo", "takes no option alpha"),
        ("learning_rate:", "--learning_rate is null: give it a value, or leave it out"),
        ("run_name: --boom", "run.yaml: --run_name is given '--boom', which reads as a flag, not as a value"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("--config", str(file), *REQUIRED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--per_device_train_batch_size", "0", "--gradient_accumulation_steps", "-1"),
            "per_device_train_batch_size is 0, gradient_accumulation_steps is -1; the least is 1",
        ),
        (("--per_device_eval_batch_size", "0"), "per_device_eval_batch_size is 0; the least is 1"),
        (("--num_train_epochs", "0"), "num_train_epochs is 0; it must be positive, or max_steps"),
        (("--lora_r", "0"), "lora_r is 0"),
        (("--fp16", "--bf16"), "fp16 and bf16 are both on: choose one$"),
        (("--fsdp", "full_shard"), r"accelerate launch --config_file configs/accelerate/fsdp2\.yaml"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(*REQUIRED, *flags)


def test_a_cpu_is_told_to_be_named(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="choose one, and without a GPU add --use_cpu"):
        parse(*REQUIRED[:-1], "--fp16", "--bf16")
    with pytest.raises(ValueError, match="bf16 is on, but there is no GPU that computes in it: on a CPU add --use_cpu"):
        parse(*REQUIRED[:-1], "--bf16")


def test_a_config_that_is_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"^--config .*nope\.yaml: no such file$"):
        parse("--config", str(tmp_path / "nope.yaml"), *REQUIRED)
    with pytest.raises(ValueError, match=r"^--config .*: a folder$"):
        parse("--config", str(tmp_path), *REQUIRED)


def test_train_names_its_own_option_for_images_outside(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "out.png")
    row = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "images": [str(tmp_path / "out.png")]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--model_name_or_path", "world", "--train_data", str(tmp_path / "data/rows.jsonl"), "--use_cpu"]
    assert cli.main(["train", *flags, "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "--image_root /" in message and "--image-root" not in message


def test_what_must_be_given():
    with pytest.raises(ValueError, match="--train_data is missing: the preference rows"):
        parse("--model_name_or_path", "world", "--output_dir", "out")


def test_train_help_shows_ours_first_and_hides_the_rest(monkeypatch):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    text = parser.format_help()
    assert text.index("--loss_type") < text.index("--learning_rate")
    assert "--ddp_backend" not in text and "--help-all" in text and "==SUPPRESS==" not in text
    monkeypatch.setattr(sys, "argv", ["aspo", "train", "--help-all"])
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    assert "--ddp_backend" in parser.format_help()


def test_train_ends_with_one_line_on_bad_rows(tmp_path, capsys):
    model = tiny_llava(tmp_path / "model")
    rows = tiny_rows(3)
    rows[2]["rejected"] = rows[2]["chosen"]
    write_rows(tmp_path / "rows", rows)
    flags = ["--model_name_or_path", str(model), "--train_data", str(tmp_path / "rows")]
    assert cli.main(["train", *flags, "--output_dir", str(tmp_path / "out"), "--use_cpu"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("aspo train: ") and "row 2" in message
    assert not (tmp_path / "out").exists()
    assert cli.main(["train", *flags[:3], str(tmp_path / "gone"), "--output_dir", str(tmp_path / "out")]) == 2
    assert "gone" in capsys.readouterr().err.splitlines()[-1]
    for some in (["--eval_data", str(tmp_path / "rows")], ["--eval_strategy", "epoch"]):
        assert cli.main(["train", *flags, "--output_dir", str(tmp_path / "out"), "--use_cpu", *some]) == 2
        assert "give both or neither" in capsys.readouterr().err.splitlines()[-1]
