"""The plug-in inside ms-swift itself, where it is installed: with DPO its losses are ms-swift's own."""

import aspo

# isort: split
import json

import pytest

pytest.importorskip("swift.rlhf_trainers.dpo_trainer", exc_type=ImportError)

import torch
from swift.arguments import RLHFArguments
from swift.pipelines import rlhf_main
from swift.trainers.trainer_factory import TrainerFactory
from tiny import tiny_llava, tiny_rows

import aspo.integrations


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(tuner, plug-in's call or None, **options) -> the logged steps, the evaluation's loss last."""
    monkeypatch.setitem(TrainerFactory.TRAINER_MAPPING, "dpo", TrainerFactory.TRAINER_MAPPING["dpo"])
    model = tiny_llava(tmp_path / "llava")
    for file in [*model.glob("*.json"), *model.glob("*.jinja")]:  # its LLaVA template ends an answer with this text
        file.write_text(file.read_text().replace("<eos>", "</s>"))
    pairs = []
    for i, row in enumerate(tiny_rows(6)):
        row["images"][0].save(tmp_path / f"{i}.png")
        turns = [("user", "<image>" + row["prompt"]), ("assistant", row["chosen"])]
        pair = {"messages": [{"role": role, "content": text} for role, text in turns]}
        pair |= {"rejected_response": row["rejected"], "images": [str(tmp_path / f"{i}.png")]}
        pairs.append({**pair, **{k: row[k] for k in ("chosen_sentences", "chosen_similarity")}})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))

    def run(tuner, call, **options):
        plugins = []
        if call is not None:
            (tmp_path / "plugin.py").write_text(f"from aspo.integrations import ms_swift\nms_swift.{call}\n")
            plugins = [str(tmp_path / "plugin.py")]
        out = tmp_path / f"{tuner}-{call is None}"
        fixed = {"rlhf_type": "dpo", "model": str(model), "model_type": "llava1_5_hf", "template": "llava1_5_hf"}
        fixed |= {"dataset": [str(tmp_path / "pairs.jsonl")], "split_dataset_ratio": 0.3, "load_from_cache_file": False}
        fixed |= {"output_dir": str(out), "add_version": False, "report_to": [], "save_strategy": "no", "use_cpu": True}
        fixed |= {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0, "max_grad_norm": 0.0}
        fixed |= {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4, "seed": 1}
        fixed |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 2}
        fixed |= {"torch_dtype": "float32", "bf16": False, "fp16": False, "lora_rank": 4, "lora_dropout": 0.0}
        fixed |= {"remove_unused_columns": False, "external_plugins": plugins, "dataloader_num_workers": 0}
        fixed |= {"use_hf": True}  # it would look its hub up for a model without a name there
        torch.manual_seed(0)
        rlhf_main(RLHFArguments(tuner_type=tuner, **{**fixed, **options}))
        logs = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
        return [log for log in logs if "loss" in log] + [log for log in logs if "eval_loss" in log]

    return run


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_dpo_equals_ms_swifts(train, tuner):
    theirs, ours = train(tuner, None), train(tuner, 'register("dpo")')
    assert len(ours) == len(theirs) == 5 and max(abs(log["loss"] - 0.6931) for log in theirs[:4]) > 0.02
    for mine, its in zip(ours, theirs, strict=True):
        for name in {"loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected", "eval_loss"} & set(
            its
        ):
            assert mine[name] == pytest.approx(its[name], rel=1e-3, abs=1e-4), name


def test_aspo_reads_the_rows_columns(train):
    *steps, _ = train("lora", 'register("aspo", alpha=1.0)')
    assert all(log["sentences/similarity_mean"] > 0 and log["sentences/weight_mean"] > 0 for log in steps)


@pytest.mark.parametrize("options", [{"rpo_alpha": 0.1}, {"loss_type": ["hinge"]}, {"label_smoothing": 0.1}])
def test_what_would_be_ignored_is_refused(train, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* would be ignored"):
        train("lora", 'register("dpo")', **options)


def test_columns_that_ms_swift_removes_are_missed(train):
    with pytest.raises(ValueError, match="no similarities"):
        train("lora", 'register("aspo")', remove_unused_columns=True)


def test_the_module_itself_is_no_plugin(train):
    """ms-swift puts a plug-in's folder on sys.path, where our trl.py would hide TRL."""
    (folder,) = aspo.integrations.__path__
    with pytest.raises(ImportError, match="a file of your own"):
        train("lora", None, external_plugins=[f"{folder}/ms_swift.py"])
