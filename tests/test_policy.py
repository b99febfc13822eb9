"""What a model that is handed in may be: kernels, adapters, and weights that its owner froze."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llava

from aspo import policy
from aspo.config import AspoConfig
from aspo.model import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("policy") / "llava")


def test_ligers_kernels_ask_where_the_model_will_train_and_not_where_it_is_still(folder, monkeypatch):
    liger = ModuleType("liger_kernel.transformers.monkey_patch")
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llava": None}
    monkeypatch.setattr(policy, "is_liger_kernel_available", lambda: True)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, liger.__name__, liger)
    model = load_model(folder, device="cpu")[0]
    policy.check_liger(model, torch.device("cuda"))
    with pytest.raises(ValueError, match="trained on the CPU"):
        policy.check_liger(model, torch.device("cpu"))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_an_adapter_that_trains_its_base_cannot_be_its_own_reference(folder, tmp_path, bias):
    args = AspoConfig(output_dir=str(tmp_path), use_cpu=True)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"], bias=bias)
    model = get_peft_model(load_model(folder)[0], config)
    if bias == "all":
        with pytest.raises(ValueError, match=r"weights of the adapter's base model train too, .*bias for one"):
            policy.policy_and_reference(model, args, None, True)
    else:
        policy.policy_and_reference(model, args, None, True)
    policy.policy_and_reference(model, args, load_model(folder)[0], True)
    policy.policy_and_reference(model, args, None, False)  # no reference, or one that is cached


def test_what_its_owner_froze_stays_frozen_in_full_fine_tuning(folder, tmp_path):
    def trained(model, **options):
        args = AspoConfig(output_dir=str(tmp_path), use_cpu=True, use_lora=False, **options)
        made, _ = policy.policy_and_reference(model, args, None, False)
        return {name for name, p in made.named_parameters() if p.requires_grad}

    every = {name for name, _ in load_model(folder)[0].named_parameters()}
    embeddings = {name for name in every if "embed_tokens" in name}
    tower = {name for name in every if "vision_tower" in name}
    assert embeddings and tower
    model = load_model(folder)[0]
    model.get_input_embeddings().requires_grad_(False)
    assert trained(model) == every - embeddings - tower
    assert trained(model, freeze_vision=False) == every - embeddings  # the tower that the first call froze
    model.requires_grad_(False)  # as merge_and_unload leaves it
    assert trained(model) == every - tower
