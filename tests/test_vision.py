"""The vision tower runs once an image and step, and nothing else changes: values, gradients, which image is seen."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, family, text, tokenizer, unequal_rows
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny import tiny_image
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
)

from aspo.data import Collator
from aspo.model import trunk_hidden
from aspo.policy import vision_tower
from aspo.shared_prefix.attention import with_route
from aspo.shared_prefix.forward import tree_inputs
from aspo.vision.tower import VisionFeatures, is_frozen

CHECK = 3  # entries that run once for each tower, to see that it can be cut
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # other batch sizes make other roundings


pytestmark = pytest.mark.usefixtures("frozen_modules")


@pytest.fixture
def llava():
    """A LLaVA whose tower is frozen, and the inputs of three rows: six images, three of them distinct."""
    model, processor = family("LLaVA-1.5")
    vision_tower(model).requires_grad_(False)
    return model, Collator(processor)(unequal_rows())["model_inputs"]


def count_images(tower):
    """The sizes of the batches that the tower computes: entries, or patches where they are packed."""
    seen = []
    convolution = next(m for m in tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    convolution.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    return seen


def hidden(model, inputs):
    with torch.no_grad():
        return trunk_hidden(model, inputs)


def gradients(model, run):
    """The gradients of a loss in which every hidden state counts differently."""
    model.zero_grad()
    states = run()
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- every family ----


@pytest.mark.parametrize("name", FAMILIES)
def test_each_image_runs_once_and_nothing_changes(name):
    model, processor = family(name)
    tower = vision_tower(model).requires_grad_(False)
    rows = unequal_rows()
    inputs = Collator(processor)(rows)["model_inputs"]
    other = Collator(processor)([{**rows[0], "images": [tiny_image("yellow")]}, *rows[1:]])["model_inputs"]
    expected, expected_other = hidden(model, inputs), hidden(model, other)
    assert (expected - expected_other).abs().max() > 1e-3
    seen = count_images(tower)
    hidden(model, inputs)
    plain = seen.pop()
    vision = VisionFeatures([model])
    for step in range(2):
        seen.clear()
        with vision.step():
            assert torch.equal(hidden(model, inputs), expected)
            assert torch.equal(hidden(model, inputs), expected)
        assert len(seen) == (1 if step else 1 + 2)
        assert seen[-1] <= plain / 2  # fewer where tiles of one image are equal
    assert vision.computed <= vision.asked / 4 and vision.computed * plain == vision.asked // 4 * 2 * seen[-1]
    with vision.step():
        torch.testing.assert_close(hidden(model, other), expected_other, **ROUNDING)
        torch.testing.assert_close(hidden(model, inputs), expected, **ROUNDING)


@pytest.mark.parametrize("route", ["mask", "segments"])
@pytest.mark.parametrize("name", ["LLaVA-NeXT", "Qwen2.5-VL"])
def test_with_a_shared_prefix(name, route):
    model, processor = family(name)
    seen = count_images(vision_tower(model).requires_grad_(False))
    batch = Collator(processor, shared_prefix=True)(unequal_rows(2))
    with_route(model, route)
    inputs = tree_inputs(model, batch["model_inputs"], batch["tree"], route)
    expected = hidden(model, inputs)
    vision = VisionFeatures([model])
    for _ in range(2):
        with vision.step():
            assert all(torch.equal(hidden(model, inputs), expected) for _ in range(2))
    assert seen[0] == seen[3] == seen[4] and len(seen) == 5


def test_text_only_batches_and_models_pass(llava):
    model, _ = llava
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = hidden(model, {"input_ids": ids})
    with VisionFeatures([model, None, model.model.language_model]).step():
        assert torch.equal(hidden(model, {"input_ids": ids}), expected)


# ---- gradients ----


@pytest.mark.parametrize("mode", ["step", "disk"])
def test_a_trained_projector_gets_the_same_gradients(llava, tmp_path, mode):
    model, inputs = llava
    expected = gradients(model, lambda: trunk_hidden(model, inputs))
    vision = VisionFeatures([model], mode, tmp_path if mode == "disk" else None)
    for _ in range(2):
        with vision.step():
            with torch.inference_mode():  # a reference run so must not leave features that cannot be trained on
                trunk_hidden(model, inputs)
            got = gradients(model, lambda: trunk_hidden(model, inputs))
        assert got.keys() == expected.keys() and any("projector" in name for name in got)
        assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("name", ["LLaVA-1.5", "LLaVA-NeXT", "Qwen3-VL"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trained_tower_gets_the_same_gradients_and_is_not_kept(name, checkpointing):
    model, processor = family(name)
    inputs = Collator(processor)(unequal_rows())["model_inputs"]
    seen = count_images(vision_tower(model))
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    expected = gradients(model, lambda: trunk_hidden(model, inputs))
    plain = seen[0]
    vision = VisionFeatures([model])
    for _ in range(2):
        seen.clear()
        with vision.step():
            got = gradients(model, lambda: trunk_hidden(model, inputs))
        assert seen[-1] == plain / 2
    assert vision._step == {} and got.keys() == expected.keys()
    assert any("patch_embed" in name for name in got)
    scale = max(g.abs().max() for g in expected.values())
    assert all((got[name] - expected[name]).abs().max() < 1e-5 * scale for name in got)


def test_an_adapter_on_the_tower_is_not_shared_with_the_reference(llava):
    model, inputs = llava
    policy = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower.*q_proj", init_lora_weights=False))
    expected = hidden(policy, inputs)
    with policy.disable_adapter():
        expected_reference = hidden(policy, inputs)
    assert (expected - expected_reference).abs().max() > 1e-3
    for parameter in policy.parameters():  # an adapter that is only looked at is one too
        parameter.requires_grad_(False)
    assert not is_frozen(vision_tower(policy))
    with VisionFeatures([policy]).step():
        with policy.disable_adapter():
            torch.testing.assert_close(hidden(policy, inputs), expected_reference, **ROUNDING)
        torch.testing.assert_close(hidden(policy, inputs), expected, **ROUNDING)


# ---- the reference ----


def test_the_reference_without_the_adapter_shares(llava):
    model, inputs = llava
    policy = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    seen = count_images(vision_tower(policy))
    vision = VisionFeatures([policy])
    for _ in range(2):
        with vision.step():
            with policy.disable_adapter():
                reference = hidden(policy, inputs)
            trained = trunk_hidden(policy, inputs)
    assert seen == [1, 2, 3, 3] and trained.requires_grad
    assert (trained - reference).abs().max() > 1e-3


def test_two_models_share_as_long_as_their_towers_are_equal(llava):
    policy, inputs = llava
    reference = copy.deepcopy(policy).requires_grad_(False)
    seen = [count_images(vision_tower(model)) for model in (policy, reference)]
    vision = VisionFeatures([policy, reference])

    def images():
        for batches in seen:
            batches.clear()
        with vision.step():
            got = hidden(reference, inputs), hidden(policy, inputs)
        batches = [list(batches) for batches in seen]
        expected = hidden(reference, inputs), hidden(policy, inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        return batches

    assert images() == [[], [1, 2, 3]]
    assert images() == [[], [3]]
    with torch.no_grad():
        next(vision_tower(policy).parameters()).add_(0.5)
    assert images() == [[1, 2, 3], [3]]
    assert images() == [[3], [3]]
    vision_tower(policy).load_state_dict(vision_tower(reference).state_dict())
    assert images() == [[], [3]]
    vision_tower(policy).requires_grad_(True)
    assert images()[1] == [3] and seen[0] != []


def test_autocast_has_its_own_features(llava):
    model, inputs = llava
    contexts = {"fp32": nullcontext, "bf16": lambda: torch.autocast("cpu", torch.bfloat16)}
    expected = {}
    for name, context in contexts.items():
        with context():
            expected[name] = hidden(model, inputs)
    assert not torch.equal(*expected.values())
    with VisionFeatures([model]).step():
        for name in ("fp32", "bf16", "fp32"):
            with contexts[name]():
                assert torch.equal(hidden(model, inputs), expected[name])


# ---- left alone, put back ----


def test_forwards_are_put_back(llava):
    model, inputs = llava
    tower = vision_tower(model)
    vision = VisionFeatures([model])
    with pytest.raises(KeyError), vision.step():
        raise KeyError
    assert "forward" not in vars(tower)
    own = tower.forward = tower.forward
    with vision.step():
        assert tower.forward is not own
        hidden(model, inputs)
        with pytest.raises(RuntimeError, match="once a step"), vision.step():
            pass
    assert vars(tower)["forward"] is own and vision._step == {} and vision._hashed == {}
    with VisionFeatures([model], "none").step():
        assert tower.forward is own


def test_dropout_stays_random(llava):
    model, inputs = llava
    tower = vision_tower(model).train()
    for module in tower.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    with VisionFeatures([model]).step():
        assert not torch.equal(hidden(model, inputs), hidden(model, inputs))
        tower.eval()
        assert torch.equal(hidden(model, inputs), hidden(model, inputs))


def test_pixels_that_change_between_two_calls_are_seen(llava):
    model, inputs = llava
    vision = VisionFeatures([model])
    with vision.step():
        hidden(model, inputs)
        inputs["pixel_values"].mul_(-1)
        got = hidden(model, inputs)
    torch.testing.assert_close(got, hidden(model, inputs), **ROUNDING)


def test_a_checkpoint_around_the_model(llava):
    """Its recomputation calls the tower again, in the backward."""
    model, inputs = llava
    expected = gradients(model, lambda: trunk_hidden(model, inputs))
    vision = VisionFeatures([model])

    def run():
        with vision.step():
            return checkpoint(trunk_hidden, model, inputs, use_reentrant=False)

    got = gradients(model, run)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    vision_tower(model).requires_grad_(True)
    with pytest.raises(CheckpointError):
        gradients(model, run)
    expected = gradients(model, lambda: trunk_hidden(model, inputs))
    with vision.step():  # the backward inside too
        got = gradients(model, lambda: checkpoint(trunk_hidden, model, inputs, use_reentrant=False))
    assert all(torch.allclose(got[name], expected[name], **ROUNDING) for name in expected)


# ---- towers that cannot be cut ----


def pixtral():
    """A LLaVA with Pixtral's tower, which packs the patches of all images into one row."""
    tok = tokenizer(("<image>",))
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=40, patch_size=10
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**text(tok)), image_token_index=3,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[3] * 16, 5, 6]])
    pixels, sizes = torch.randn(1, 3, 40, 40), torch.tensor([[40, 40]])
    return model, {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}


@pytest.mark.parametrize("copies", [1, 2])
def test_a_tower_that_packs_all_images_runs_once_a_call(copies, tmp_path):
    model, inputs = pixtral()
    inputs = {name: torch.cat([value] * copies) for name, value in inputs.items()}
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    expected, expected_other = hidden(model, inputs), hidden(model, other)
    trained = gradients(model, lambda: trunk_hidden(model, inputs))
    with VisionFeatures([model]).step():
        got = gradients(model, lambda: trunk_hidden(model, inputs))
    assert all(torch.equal(got[name], trained[name]) for name in trained)
    seen = count_images(vision_tower(model).requires_grad_(False))
    vision = VisionFeatures([model], "disk", tmp_path)
    for step in range(2):
        seen.clear()
        with pytest.warns(UserWarning, match="keeps nothing") if step == 0 else nullcontext(), vision.step():
            assert all(torch.equal(hidden(model, inputs), expected) for _ in range(3))
            assert torch.equal(hidden(model, other), expected_other)
        assert seen == ([] if step else [1, 2]) + [copies, copies]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_tower_whose_images_see_each_other_is_found_out(llava):
    model, inputs = llava
    layer = next(m for name, m in vision_tower(model).named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_hook(lambda module, args, output: output - output.mean(0, keepdim=True))
    expected = hidden(model, inputs)
    seen = count_images(vision_tower(model))
    vision = VisionFeatures([model])
    with vision.step():
        assert all(torch.equal(hidden(model, inputs), expected) for _ in range(2))
    assert seen == [1, 2, 6] and list(vision._can_be_cut.values()) == [False]


def test_arguments_that_belong_to_no_image_are_not_cut():
    model, processor = family("Qwen2-VL")
    inputs = dict(Collator(processor)(unequal_rows())["model_inputs"])
    ends = inputs["image_grid_thw"].prod(-1).cumsum(0, dtype=torch.int32)
    inputs["image_cu_seqlens"] = nn.functional.pad(ends, (1, 0))  # Qwen-VL makes it of the grid where it is not given
    expected = hidden(model, inputs)
    seen = count_images(vision_tower(model).requires_grad_(False))
    with VisionFeatures([model]).step():
        assert all(torch.equal(hidden(model, inputs), expected) for _ in range(2))
    assert seen == [int(ends[-1])]


# ---- on disk ----


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["LLaVA-1.5", "Qwen3-VL", "Idefics3"])
def test_the_second_epoch_runs_no_tower(name, tmp_path):
    model, processor = family(name)
    seen = count_images(vision_tower(model).requires_grad_(False))
    collate, rows = Collator(processor), unequal_rows(4)
    batches = [collate(rows[:2])["model_inputs"], collate(rows[2:])["model_inputs"]]
    expected = [hidden(model, inputs) for inputs in batches]
    for run in range(2):  # the second one: another program
        seen.clear()
        vision = VisionFeatures([model], "disk", tmp_path)
        for _, (inputs, states) in itertools.product(range(2), zip(batches, expected, strict=True)):
            with vision.step():
                torch.testing.assert_close(hidden(model, inputs), states, **ROUNDING)
        vision.flush()
        assert len(seen) == (0 if run else 2 + 2)
        assert len(shards(tmp_path)) == 1
    seen.clear()
    mixed = collate([rows[3], rows[0]])["model_inputs"]  # other batches of the same images
    with vision.step():
        got = hidden(model, mixed)
    assert seen == []
    torch.testing.assert_close(got, hidden(model, mixed), **ROUNDING)


def test_a_kill_leaves_a_usable_cache(llava, tmp_path):
    model, inputs = llava
    seen = count_images(vision_tower(model))
    expected = hidden(model, inputs)
    vision = VisionFeatures([model], "disk", tmp_path)
    half = {name: value[:1] for name, value in inputs.items()}
    with vision.step():
        hidden(model, half)
    (folder,) = vision._folders.values()
    folder.shard_bytes = 1  # each step's images at once
    with vision.step():
        hidden(model, half)
    assert len(shards(tmp_path)) == 1
    (folder.folder / "x.1.unfinished").write_bytes(shards(tmp_path)[0].read_bytes()[:100])
    seen.clear()
    again = VisionFeatures([model], "disk", tmp_path)
    with again.step():
        torch.testing.assert_close(hidden(model, inputs), expected, **ROUNDING)
    assert seen == [2]  # of three


def test_other_weights_do_not_read_it(llava, tmp_path):
    model, inputs = llava
    tower = vision_tower(model)
    for _ in range(2):
        vision = VisionFeatures([model], "disk", tmp_path)
        with vision.step():
            got = hidden(model, inputs)
        vision.flush()
        torch.testing.assert_close(got, hidden(model, inputs), **ROUNDING)
        with torch.no_grad():
            list(tower.parameters())[-1].mul_(1.001)
            list(tower.parameters())[3].mul_(2)
    assert len(list(tmp_path.iterdir())) == 2
    tower.config._attn_implementation = "eager"
    with vision.step():
        hidden(model, inputs)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped, first", "flipped, last", "renamed", "empty"])
def test_a_damaged_shard_is_computed_again(llava, tmp_path, damage):
    model, inputs = llava
    expected = hidden(model, inputs)
    vision = VisionFeatures([model], "disk", tmp_path)
    with vision.step():
        hidden(model, inputs)
    vision.flush()
    (path,) = shards(tmp_path)
    data = bytearray(path.read_bytes())
    if "flipped" in damage:  # one image only, and the shard stays, in front of the new one or behind it
        data[-50] ^= 64
        path = path.rename(path.with_name("0.safetensors" if "first" in damage else "z.safetensors"))
    others = {"cut": data[:-50], "renamed": data.replace(b"BaseModelOutput", b"BaseModelXutput"), "empty": b""}
    path.write_bytes(others.get(damage, data))
    vision = VisionFeatures([model], "disk", tmp_path)
    seen = count_images(vision_tower(model))
    with pytest.warns(UserWarning, match="computed again"), vision.step():
        assert torch.equal(hidden(model, inputs), expected)
    assert seen
    vision.flush()
    seen.clear()
    vision = VisionFeatures([model], "disk", tmp_path)
    with pytest.warns(UserWarning, match="checksum") if damage == "flipped, last" else nullcontext(), vision.step():
        torch.testing.assert_close(hidden(model, inputs), expected, **ROUNDING)
    assert seen == []


def test_layers_that_the_model_does_not_read_are_not_kept(llava, tmp_path):
    """A tower that gives all its layers: LLaVA reads the last but one of three."""
    model, inputs = llava

    def all_layers(module, args, kwargs):  # as transformers 5.17 asks for
        return args, {**kwargs, "output_hidden_states": True}

    vision_tower(model).register_forward_pre_hook(all_layers, with_kwargs=True)
    sizes = []
    for rows in (1, 3):  # the second time, one image has all its layers no more
        part = {name: value[:rows] for name, value in inputs.items()}
        vision = VisionFeatures([model], "disk", tmp_path)
        with vision.step():
            got = hidden(model, part)
        torch.testing.assert_close(got, hidden(model, part), **ROUNDING)
        vision.flush()
    for path in shards(tmp_path):
        with safe_open(path, "pt") as shard:
            sizes += [tuple(shard.get_tensor(name).shape) for name in shard.keys()]  # noqa: SIM118  it is no dict
    assert sorted(sizes) == [(1, 16)] * 3 + [(1, 17, 16)] * 6  # pooled; the last hidden state and one layer
    vision = VisionFeatures([model], "disk", tmp_path)
    with vision.step(), pytest.raises(RuntimeError, match="layer 0 of its vision tower"):
        trunk_hidden(model, {**inputs, "vision_feature_layer": 0})


def test_what_is_refused(llava, tmp_path):
    model, inputs = llava
    with pytest.raises(ValueError, match="'always'"):
        VisionFeatures([model], "always")
    with pytest.raises(ValueError, match="needs a folder"):
        VisionFeatures([model], "disk")
    with pytest.raises(ValueError, match="needs a folder"):
        VisionFeatures([model], "step", tmp_path)
    next(vision_tower(model).parameters()).ds_id = 0  # as DeepSpeed ZeRO-3 marks what it shards
    with pytest.raises(ValueError, match="sharded"), VisionFeatures([model], "disk", tmp_path).step():
        hidden(model, inputs)
    with VisionFeatures([model]).step():
        hidden(model, inputs)
    vision_tower(model).requires_grad_(True)
    with pytest.raises(ValueError, match="this one trains"):
        VisionFeatures([model], "disk", tmp_path)
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model = LlamaForCausalLM(config)
    for reads_text in (model, get_peft_model(model, LoraConfig(target_modules=["q_proj"]))):
        assert vision_tower(reads_text) is None
        with pytest.raises(ValueError, match="has none: choose 'step'"):
            VisionFeatures([reads_text], "disk", tmp_path)
