"""The hook inside LLaMA-Factory itself, where it is installed: with DPO its losses are LLaMA-Factory's own."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import json

import pytest

pytest.importorskip("llamafactory.train.dpo.trainer", exc_type=ImportError)

import torch
from llamafactory.train.dpo import trainer as dpo
from llamafactory.train.tuner import run_exp
from tiny import tiny_llava, tiny_rows

from aspo.integrations import llama_factory


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(finetuning_type, **options) -> the logged steps and the evaluation, of whichever trainer is in place."""
    monkeypatch.setattr(dpo, "CustomDPOTrainer", dpo.CustomDPOTrainer)  # undo `install` afterwards
    model = tiny_llava(tmp_path / "llava")
    pairs = []
    for i, row in enumerate(tiny_rows(5)):
        row["images"][0].save(tmp_path / f"{i}.png")
        prompt = [{"from": "human", "value": "<image>" + row["prompt"]}]
        answers = {k: {"from": "gpt", "value": row[k]} for k in ("chosen", "rejected")}
        pairs.append({"conversations": prompt, **answers, "images": [str(tmp_path / f"{i}.png")]})
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    info = {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": info}))

    def run(finetuning_type, name, **options):
        out = tmp_path / name
        fixed = {"stage": "dpo", "do_train": True, "do_eval": True, "model_name_or_path": str(model), "seed": 1}
        fixed |= {"dataset": "pairs", "eval_dataset": "pairs", "dataset_dir": str(tmp_path), "template": "llava"}
        fixed |= {"output_dir": str(out), "report_to": "none", "save_strategy": "no", "use_cpu": True}
        fixed |= {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0, "max_grad_norm": 0.0}
        fixed |= {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, "lora_target": "all"}
        fixed |= {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2, "overwrite_cache": True}
        torch.manual_seed(0)
        run_exp({**fixed, "finetuning_type": finetuning_type, **options})
        logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
        return [log for log in logs if "loss" in log], json.loads((out / "eval_results.json").read_text())

    return run


@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_dpo_equals_llama_factorys(train, finetuning_type):
    theirs, their_eval = train(finetuning_type, "theirs")
    llama_factory.install("dpo")
    ours, our_eval = train(finetuning_type, "ours")
    assert len(ours) == len(theirs) == 4 and abs(theirs[-1]["loss"] - 0.6931) > 0.01
    for name in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected"):
        values = [log[name] for log in ours], [log[name] for log in theirs]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-4), name
    assert our_eval["eval_loss"] == pytest.approx(their_eval["eval_loss"], rel=1e-4)


def test_aspo_reads_the_scored_rows(train):
    llama_factory.install("aspo", alpha=1.0, scored_rows=tiny_rows(5))
    steps, _ = train("lora", "aspo")
    assert all(log["sentences/similarity_mean"] > 0 and log["sentences/weight_mean"] > 0 for log in steps)


def test_what_would_be_ignored_is_refused(train):
    with pytest.raises(ValueError, match="no scored_rows"):
        llama_factory.install("aspo")
    llama_factory.install("dpo")
    with pytest.raises(ValueError, match=r"pref_ftx=0\.1"):
        train("lora", "refused", pref_ftx=0.1)
    with pytest.raises(ValueError, match="pref_loss='hinge'"):
        train("lora", "refused", pref_loss="hinge")
