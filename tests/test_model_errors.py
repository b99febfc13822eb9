"""Models that a step cannot take: no head, no copy, no kernels, another kind than was asked for."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import sys
from types import ModuleType

import pytest
import torch
from tiny import tiny_llava, tiny_processor, tiny_rows, tiny_tokenizer
from transformers import LlamaConfig, LlamaModel

from aspo import policy
from aspo.config import AspoConfig
from aspo.data import Collator
from aspo.model import load_model, output_head, trunk_hidden
from aspo.pairs.povid import alternative_ids
from aspo.policy import policy_and_reference
from aspo.scorers import load_scorer
from aspo.shared_prefix.attention import tree_mask
from aspo.shared_prefix.forward import batch_to
from aspo.shared_prefix.tree import TokenTree
from aspo.trainer import AspoTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("models") / "llava")


def test_a_trunk_alone_has_no_head():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    trunk = LlamaModel(LlamaConfig(vocab_size=20, **small))
    message = r"LlamaModel has no output head; load it with a \.\.\.ForConditionalGeneration or \.\.\.ForCausalLM class"
    with pytest.raises(ValueError, match=message):
        trunk_hidden(trunk, {"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=message):
        output_head(trunk)


def test_a_model_in_zero_3s_shards_is_not_copied(folder, tmp_path):
    model, _ = load_model(folder)
    args = AspoConfig(output_dir=str(tmp_path), use_cpu=True, use_lora=False)
    next(model.parameters()).ds_id = 0  # DeepSpeed's mark
    with pytest.raises(ValueError, match="ZeRO-3 loads a model in shards, which cannot be copied: pass ref_model, or"):
        policy_and_reference(model, args, None, needs_reference=True)
    args.model_name_or_path = str(folder)  # which can be loaded once more
    assert policy_and_reference(model, args, None, needs_reference=True)[1] is not None


def test_ligers_kernels_need_the_package_and_the_model_type(folder, tmp_path, monkeypatch):
    model, processor = load_model(folder)
    args = AspoConfig(output_dir=str(tmp_path), use_cpu=True, use_liger_kernel=True)
    monkeypatch.setattr(policy, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="liger-kernel is not installed: pip install liger-kernel"):
        AspoTrainer(model, args, tiny_rows(2), None, processor)
    monkeypatch.setattr(policy, "is_liger_kernel_available", lambda: True)
    liger = ModuleType("liger_kernel.transformers.monkey_patch")
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen3": None}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, liger.__name__, liger)
    with pytest.raises(ValueError, match="Liger has no kernels for models of type 'llava': turn use_liger_kernel off"):
        AspoTrainer(load_model(folder)[0], args, tiny_rows(2), None, processor)


def test_a_scorer_is_a_clip(folder):
    with pytest.raises(ValueError, match="is a 'llava' model, not CLIP; others: via open_clip"):
        load_scorer(f"transformers:{folder}")


def test_noise_needs_pixels():
    rows = [{"id": "a", "prompt": "Hello.", "chosen": "It is red."}]
    with pytest.raises(ValueError, match="makes no pixel_values: noise cannot be put on its images"):
        alternative_ids(torch.nn.Linear(1, 1), tiny_tokenizer(), rows, noise_step=500, seed=0)


def test_blocks_are_whole_numbers_of_the_trees_shape():
    tree = TokenTree.place([(3, (2, 2))], packed=False)
    for blocks in (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(tree.shape)):
        with pytest.raises(ValueError, match=r"blocks are \(1, .*; they must be whole numbers of \(1, 7\)"):
            tree_mask(tree, "cpu", blocks)


def test_a_batch_in_parts_is_not_run_as_one():
    batch = Collator(tiny_processor(), forward_tokens=100)(tiny_rows(4))
    assert len(batch["parts"]) > 1
    with pytest.raises(ValueError, match="this batch is in parts: make it with forward_tokens=None"):
        batch_to(batch, torch.device("cpu"))
