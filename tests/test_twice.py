"""A second trainer, and a second training: nothing is left of the first one."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import pytest
import torch
from tiny import tiny_llava, tiny_rows

from aspo.config import AspoConfig
from aspo.data import Collator
from aspo.model import load_model
from aspo.trainer import AspoTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("twice") / "llava")


@pytest.fixture
def make(folder, tmp_path):
    """make(trainer's arguments, **options) -> a trainer on a fresh copy of the tiny model."""

    def build(given=None, **options):
        model, processor = load_model(folder)
        defaults = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "loss_type": ["dpo"]}
        args = AspoConfig(output_dir=str(tmp_path / "out"), **{**defaults, **options})
        return AspoTrainer(model, args, tiny_rows(4), None, processor, **(given or {}))

    return build


def test_two_trainers_may_be_given_the_same_collator(make, folder):
    collator = Collator(load_model(folder)[1])
    first = make({"data_collator": collator}, shared_prefix="on", padding_free=True, precompute_ref_log_probs=True)
    assert first.data_collator.padding_free and first.data_collator.reference is not None
    assert not collator.makes_trees and collator.reference is None and collator.forward_tokens is None
    other = load_model(folder)[0]
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(0.5)
    second = make({"data_collator": collator, "ref_model": other}, shared_prefix="off", forward_tokens=2000)
    assert not second.data_collator.makes_trees and first.data_collator.forward_tokens is None
    ref_logps = [trainer.pair_losses(trainer.data_collator(tiny_rows(2)))[0].ref_logps for trainer in (first, second)]
    assert (ref_logps[0] - ref_logps[1]).abs().max() > 0.01  # its own reference was run


def test_a_second_training_logs_its_own_steps_alone(make):
    trainer = make(max_steps=3, logging_steps=2, learning_rate=1e-2, per_device_train_batch_size=4)
    trainer.train()  # the third step's numbers are not logged
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    trainer.args.max_steps = trainer.args.logging_steps = 1
    trainer.train()
    (logged,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged["rewards/chosen"] == logged["rewards/rejected"] == 0.0  # of the start model, before its step
