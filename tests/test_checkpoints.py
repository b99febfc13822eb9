"""The end of a run: its best model is the result and its last checkpoint stays, whenever it was stopped or killed."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import json
from pathlib import Path

import pytest
import torch
from callbacks import StopAt
from safetensors.torch import load_file
from tiny import tiny_llava, tiny_rows

from aspo import cli
from aspo.checkpoints import checkpoints, last_checkpoint
from aspo.config import AspoConfig
from aspo.data import write_rows
from aspo.model import load_model
from aspo.trainer import AspoTrainer

# The margin grows with every step: the first checkpoint is the best where less of it is better.
BEST_IS_FIRST = {
    **{"loss_type": "dpo", "learning_rate": 3e-3, "lr_scheduler_type": "constant", "report_to": "none"},
    **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    **{"load_best_model_at_end": True, "metric_for_best_model": "rewards/margins", "greater_is_better": False},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_llava(folder / "model")
    write_rows(folder / "rows", tiny_rows(8))
    return folder


@pytest.mark.parametrize("use_lora", [True, False])
def test_a_run_killed_before_its_final_save_has_the_best_model_too(place, tmp_path, monkeypatch, use_lora):
    out, run = tmp_path / "out", ["train", "--use_cpu", "--max_steps", 2, *["--no_use_lora"] * (not use_lora)]
    run += ["--model_name_or_path", place / "model", "--train_data", place / "rows", "--eval_data", place / "rows"]
    run += ["--output_dir", out, *(x for name, value in BEST_IS_FIRST.items() for x in (f"--{name}", value))]
    with monkeypatch.context() as killed:
        killed.setattr(AspoTrainer, "save_state", lambda self: 1 / 0)  # behind the final save, which then goes
        with pytest.raises(ZeroDivisionError):
            cli.main([*map(str, run)])
    weights = out / ("adapter_model.safetensors" if use_lora else "model.safetensors")
    expected = load_file(weights)
    weights.unlink()
    history = json.loads((out / "log_history.json").read_text())
    assert cli.main([*map(str, run)]) == 0
    found, best, last = (load_file(path / weights.name) for path in (out, out / "checkpoint-1", out / "checkpoint-2"))
    assert all(torch.equal(found[name], value) and torch.equal(best[name], value) for name, value in expected.items())
    assert any(not torch.equal(last[name], value) for name, value in found.items())
    assert [path.name for path in checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]
    assert json.loads((out / "run.json").read_text())["steps"] == 2
    assert json.loads((out / "log_history.json").read_text())[: len(history)] == history


def test_the_checkpoint_of_an_interrupt_stays_beside_the_best_one(place, tmp_path):
    """save_total_limit 1 keeps the best one; of a run that is at its end Trainer keeps no other."""

    def train(*callbacks, resume=None):
        model, processor = load_model(place / "model")
        options = {**BEST_IS_FIRST, "save_total_limit": 1, "max_steps": 4, "use_cpu": True, "disable_tqdm": True}
        args = AspoConfig(output_dir=str(tmp_path), **options)
        trainer = AspoTrainer(model, args, tiny_rows(4), tiny_rows(2), processor, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.args.save_total_limit == 1
        return trainer.state.global_step, [path.name for path in checkpoints(tmp_path)]

    assert train(StopAt(3)) == (3, ["checkpoint-1", "checkpoint-3"])
    assert Path(str(last_checkpoint(tmp_path))).name == "checkpoint-3"
    assert train(resume=True) == (4, ["checkpoint-1"])
