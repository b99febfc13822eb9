"""Every real model family trains: the right modules, LoRA with everything on and off, DoRA, full, checkpointing."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import math
import re

import pytest
import torch
from families import FAMILIES, family, rows_of
from torch import nn

from aspo.config import AspoConfig
from aspo.policy import lora_targets, vision_tower
from aspo.trainer import AspoTrainer

every_family = pytest.mark.parametrize("name", FAMILIES)
QUICK = ("LLaVA-1.5", "InstructBLIP", "Qwen2.5-VL")
every_way = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


pytestmark = pytest.mark.usefixtures("frozen_modules")


@every_family
def test_the_right_modules(name):
    model, _ = family(name)
    tower = vision_tower(model)
    names = {module: path for path, module in model.named_modules()}
    assert re.search(r"(vision|visual)[a-z_]*$", names[tower]) and len(list(tower.parameters())) > 10
    head = model.get_output_embeddings()
    adapted = [path for path in names.values() if re.fullmatch(lora_targets(model), path)]
    of_text = [path for path, module in model.named_modules() if re.search(r"(language|text)_model\.", path)
               and isinstance(module, nn.Linear) and module is not head]  # fmt: skip
    assert sorted(adapted) == sorted(of_text) and len(adapted) == 2 * 7  # q k v o, gate up down


def trained(name, folder, **options):
    """The model after two steps of gradient descent, and its weights before, by name."""
    model, processor = family(name)
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    config = AspoConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", report_to=[], max_steps=2,
        logging_steps=1, optim="sgd", learning_rate=0.05, per_device_train_batch_size=4, max_length=None, **options,
    )  # fmt: skip
    trainer = AspoTrainer(model, config, rows_of(name), processing_class=processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[1] < losses[0] - 1e-3
    return trainer.model, before


def check_adapted(policy, before):
    """Only the adapters have changed, all of them."""
    adapters = {path: p for path, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in path for path in adapters)
    assert all(p.abs().max() > 0 for path, p in adapters.items() if "lora_B" in path)
    base = {path.replace("base_layer.", ""): p for path, p in policy.get_base_model().named_parameters()}
    assert all(torch.equal(base[path], value) for path, value in before.items())


ON = {"shared_prefix": "on", "padding_free": True, "vision_cache": "step", "precompute_ref_log_probs": True}
OFF = {"shared_prefix": "off", "vision_cache": "none"}


@every_family
def test_lora_trains_the_same_with_everything_on(name, tmp_path):
    plain, before = trained(name, tmp_path / "off", **OFF)
    check_adapted(plain, before)
    policy, _ = trained(name, tmp_path / "on", **ON)
    for p, expected in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", every_way)
def test_gradient_checkpointing(name, tmp_path):
    check_adapted(*trained(name, tmp_path, gradient_checkpointing=True))


@pytest.mark.parametrize("name", every_way)
def test_dora(name, tmp_path):
    policy, before = trained(name, tmp_path, use_dora=True)
    check_adapted(policy, before)
    assert any("lora_magnitude_vector" in path for path, p in policy.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", every_way)
def test_full_fine_tuning(name, tmp_path):
    policy, before = trained(name, tmp_path, use_lora=False)
    frozen = {id(p) for p in vision_tower(policy).parameters()}
    of_text = {id(p) for p in policy.get_decoder().parameters()}
    changed = {id(p) for path, p in policy.named_parameters() if not torch.equal(p, before[path])}
    assert not changed & frozen and changed > of_text  # and the projector
