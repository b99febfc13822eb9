"""A model that differs from LLaVA where it matters: Qwen2-VL's 3-D positions, packed patches, vision tower."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import math

import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_image, tiny_rows, tiny_tokenizer
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from aspo.config import AspoConfig
from aspo.data import Collator
from aspo.generation import generate
from aspo.model import check_head, response_logps
from aspo.policy import vision_tower
from aspo.trainer import AspoTrainer

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


@pytest.fixture
def qwen():
    tokenizer = tiny_tokenizer(special_tokens=SPECIAL)
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(patch_size=5, merge_size=2, size={"shortest_edge": 400, "longest_edge": 3600}),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 5, "mlp_ratio": 2}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, SPECIAL[3:], strict=True)}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    return model.eval(), processor


def unequal_rows():
    """Three rows whose images have different numbers of patches."""
    rows = tiny_rows(3)
    rows[1]["images"] = [tiny_image("red").resize((90, 40))]
    rows[2]["images"] = [tiny_image("blue").resize((40, 60))]
    return rows


def test_batches_are_as_good_as_single_rows(qwen):
    model, processor = qwen
    rows = unequal_rows()
    assert check_head(model, Collator(processor)(rows)["model_inputs"]) < 1e-5
    alone = [generate(model, processor, [row], max_new_tokens=6)[0] for row in rows]
    assert generate(model, processor, rows, max_new_tokens=6) == alone
    (batch,) = response_logps(model, processor, rows)
    offsets = batch.layout.response_token_offsets
    for r, row in enumerate(rows):
        (single,) = response_logps(model, processor, [row])
        chosen = single.layout.response_token_offsets[1]
        expected = batch.logps[offsets[r] : offsets[r + 1]]
        torch.testing.assert_close(single.logps[:chosen], expected, rtol=1e-4, atol=1e-5)
    (other,) = response_logps(model, processor, [{**rows[0], "images": [tiny_image("yellow")]}])
    assert (other.logps[:5] - batch.logps[:5]).abs().max() > 1e-5


@pytest.mark.parametrize("use_lora", [True, False])
def test_it_trains(qwen, tmp_path, use_lora):
    model, processor = qwen
    options = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 3, "logging_steps": 1}
    config = AspoConfig(
        output_dir=str(tmp_path), use_lora=use_lora, learning_rate=1e-3, per_device_train_batch_size=3, **options
    )
    tower = {name: p.clone() for name, p in vision_tower(model).named_parameters()}
    trainer = AspoTrainer(model, config, unequal_rows(), processing_class=processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[2] < losses[1] < losses[0]
    assert len(tower) > 10 and all(torch.equal(p, tower[name]) for name, p in vision_tower(model).named_parameters())
