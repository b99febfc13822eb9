"""What a model that is handed in may be: kernels, adapters, and weights that its owner froze."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import sys
from types import ModuleType

import pytest
import torch
from tiny import tiny_llava

from aspo import policy
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
