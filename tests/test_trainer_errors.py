"""What AspoTrainer refuses: arguments that do not fit, collators of one's own, an evaluation of nothing."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import pytest
from tiny import tiny_llava, tiny_rows
from transformers import TrainingArguments

from aspo.config import AspoConfig
from aspo.data import Collator
from aspo.even_batches import PLACEHOLDER
from aspo.model import load_model
from aspo.trainer import AspoTrainer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model that no test trains, and its processor."""
    return load_model(tiny_llava(tmp_path_factory.mktemp("errors") / "llava"))


@pytest.fixture
def make(loaded, tmp_path):
    def build(train=True, eval_rows=None, data_collator=None, processor=True, **options):
        args = AspoConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, use_lora=False, **options
        )
        rows = tiny_rows(2) if train else None
        own = loaded[1] if processor else None
        return AspoTrainer(loaded[0], args, rows, eval_rows, own, data_collator=data_collator)

    return build


def test_arguments_that_do_not_fit(make, loaded, tmp_path, monkeypatch):
    model, processor = loaded
    with pytest.raises(ValueError, match="args is a TrainingArguments; AspoTrainer takes an AspoConfig"):
        AspoTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True), tiny_rows(2), None, processor)
    with pytest.raises(ValueError, match="processing_class is missing: pass the model's processor"):
        make(processor=False)
    monkeypatch.setattr(model, "hf_device_map", {"model": 0, "lm_head": 1}, raising=False)
    with pytest.raises(ValueError, match="the model is spread over several devices"):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs needs aspo.data.Collator: leave data_collator"),
        ({"forward_tokens": 100}, "forward_tokens needs aspo.data.Collator: leave data_collator out"),
        ({"loss_type": "acpo", "objective_kwargs": {"target": "dataset"}}, "target='dataset' needs train_dataset as"),
    ],
)
def test_options_that_need_our_collator(make, loaded, options, message):
    collator = Collator(loaded[1])
    with pytest.raises(ValueError, match=message):
        make(data_collator=lambda rows: collator(rows), **options)


def test_the_mean_length_of_a_dataset_needs_one(make):
    with pytest.raises(ValueError, match="target='dataset' needs train_dataset as rows with a length"):
        make(train=False, eval_rows=tiny_rows(2), loss_type="acpo", objective_kwargs={"target": "dataset"})


def test_several_processes_need_a_collator_that_passes_placeholders_on(make, loaded, monkeypatch):
    """They count for nothing; a collator that drops the column would let them count as pairs."""
    trainer = make(data_collator=lambda rows: {k: v for k, v in Collator(loaded[1])(rows).items() if k != PLACEHOLDER})
    batch = trainer.data_collator(tiny_rows(2))
    assert trainer._get_num_items_in_batch([batch, batch], trainer.args.device) == 4  # one process needs none
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match="data_collator's batches lack 'placeholder'"):
        trainer._get_num_items_in_batch([batch, batch], trainer.args.device)


def test_an_evaluation_of_no_pair(make):
    trainer = make(eval_rows=tiny_rows(3), dataloader_drop_last=True, per_device_eval_batch_size=4)
    with pytest.raises(ValueError, match="evaluation saw no pair: give more eval rows, or turn dataloader_drop_last"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"logging_nan_inf_filter": True}, "a loss that is not finite ends the run; leave it off"),
        ({"label_names": ["labels"]}, "the collator fixes what the loss reads"),
        ({"fp16_full_eval": True}, "it would convert the policy but not its reference"),
    ],
)
def test_options_of_trainers_that_would_not_be_followed(make, options, why):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* is not supported: {why}"):
        make(**options)
