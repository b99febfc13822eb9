"""Attention over token trees: each route computes what a model computes for each response alone.

In float64, so that no tolerance leaves room for a key too many: attention itself within 1e-12, whole models within 1e-5
(their norms and rotary tables are float32 all the same).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import IMAGE_TOKENS, tiny_llava
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask, flex_attention
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import blockwise_overlay, create_causal_mask, sliding_window_overlay

from aspo.shared_prefix.attention import routes_to_try, tree_attention_inputs, tree_block_mask, tree_mask, with_route
from aspo.shared_prefix.segments import KEYWORD, NAME, SdpaSegments, tree_attention
from aspo.shared_prefix.tree import Item, TokenTree
from aspo.shared_prefix.varlen import VarlenSegments

VOCABULARY = 61
SMALL: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 128},
}
WINDOW = 6
TREES = {
    "rows": TokenTree.place([(7, (5, 3)), (4, (6, 2)), (9, (1, 11))], packed=False),
    "packed": TokenTree.place([(7, (5, 3)), (4, (6, 2)), (9, (1, 11))], packed=True),
    "plain": TokenTree.place([(3, (5,)), (6, (0,)), (0, (9,))], packed=False),
    "three branches": TokenTree.place([(5, (3, 4, 2)), (3, (1, 1, 1))], packed=True),
    "empty prefix": TokenTree.place([(0, (3, 4)), (2, (5,))], packed=True),
    "empty branches": TokenTree.place([(4, (0, 3, 0)), (3, (2, 0)), (5, ())], packed=False),
    "holes": TokenTree((3, 24), (Item(0, 2, 5, (3, 2)), Item(0, 15, 3, (1, 4)), Item(2, 1, 4, (2, 2)))),
}
CPU_ROUTES = ("mask", "segments", "varlen")


def loop_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float | None
) -> Tensor:
    """What a varlen flash-attention kernel computes, sequence by sequence."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    out = []
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).double() for x in (k, v))
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1].double(), k[k0:k1]) * (scale or q.shape[2] ** -0.5)
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[k0:k1]))
    return torch.cat(out).to(q.dtype)


def tree_inputs(model: nn.Module, tree: TokenTree, route: str, blocks: Tensor | None = None) -> dict[str, Any]:
    """A model's inputs for a tree, its route set; varlen with `loop_kernel` in place of a GPU's."""
    with_route(model, route)
    inputs = tree_attention_inputs(model, tree, "cpu", "segments" if route == "varlen" else route, blocks)
    if route == "varlen":
        inputs[KEYWORD] = VarlenSegments.make(tree, "cpu", loop_kernel)
    return inputs


def build(kind: type, config: Any) -> Any:
    """A model with random weights, in float64; its norms' weights are no longer 1."""
    model = kind(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@cache
def llava(folder: Any) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(tiny_llava(folder / "llava")).double().eval()


@pytest.fixture(params=["llama", "qwen2", "llava"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    if request.param == "llava":
        return llava(tmp_path_factory.getbasetemp())
    if request.param == "qwen2":
        return build(Qwen2ForCausalLM, Qwen2Config(**SMALL))
    return build(LlamaForCausalLM, LlamaConfig(**{**SMALL, "num_key_value_heads": 4}))


def make_batch(model: Any, tree: TokenTree) -> dict[str, Tensor]:
    """Random tokens of a tree; a LLaVA's items have an image where their prefix is long enough."""
    ids = torch.randint(4, VOCABULARY, tree.shape)
    batch = {"input_ids": torch.where(tree.item_ids < 0, 0, ids)}
    if hasattr(model.config, "vision_config"):
        pictured = [item for item in tree.items if item.prefix >= IMAGE_TOKENS]
        for item in pictured:
            batch["input_ids"][item.row, item.start : item.start + IMAGE_TOKENS] = model.config.image_token_id
        if pictured:
            batch["pixel_values"] = torch.randn(len(pictured), 3, 30, 30, dtype=torch.float64)
    return batch


def alone(model: Any, tree: TokenTree, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """(R, T, H): the hidden states where every response is a forward of its own with its own prefix; 0 at padding."""
    hidden = torch.zeros(*tree.shape, model.config.get_text_config().hidden_size, dtype=torch.float64)
    image = 0
    for item in tree.items:
        ids = batch["input_ids"][item.row]
        prefix = torch.arange(item.start, item.start + item.prefix)
        pixels = {}
        if (ids[prefix] == getattr(model.config, "image_token_id", -1)).any():
            pixels = {"pixel_values": batch["pixel_values"][image : image + 1]}
            image += 1
        for k, length in enumerate(item.branches or (0,)):
            columns = torch.cat([prefix, torch.arange(item.branch_start(k), item.branch_start(k) + length)])
            if len(columns) == 0:
                continue
            own = {name: value[item.row, columns][None] for name, value in options.items()}
            inputs = {"input_ids": ids[columns][None], **pixels, **own}
            out = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
            first = 0 if k == 0 else item.prefix  # the prefix is read once, from the first response
            hidden[item.row, columns[first:]] = out[first:]
    return hidden


def together(model: Any, tree: TokenTree, batch: dict[str, Tensor], route: str, blocks: Tensor | None = None) -> Tensor:
    inputs = tree_inputs(model, tree, route, blocks)
    trunk = model.get_base_model().base_model if hasattr(model, "get_base_model") else model.base_model
    positions = tree.positions + (trunk.config.model_type == "paligemma")
    hidden = trunk(**batch, **inputs, position_ids=positions, use_cache=False).last_hidden_state
    return hidden * (tree.item_ids >= 0)[..., None]


def gradients(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (hidden * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: Any, expected: Any) -> None:
    """Within what float32 norms leave of float64; gradients relative to their norms (a key's bias has only noise)."""
    if isinstance(actual, Tensor):
        return torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual.keys() == expected.keys()
    floor = 1e-4 * max(float(grad.norm()) for grad in expected.values())
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= 1e-5 * max(float(grad.norm()), floor), name


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_each_route_equals_each_response_alone(model: Any, tree: TokenTree) -> None:
    batch = make_batch(model, tree)
    with_route(model, "mask")
    expected = alone(model, tree, batch)
    expected_grads = gradients(model, expected)
    assert expected.abs().max() > 0.1 and len(expected_grads) > 10
    for route in CPU_ROUTES:
        hidden = together(model, tree, batch, route)
        assert_same(hidden, expected)
        assert_same(gradients(model, hidden), expected_grads)


@pytest.mark.parametrize("route", CPU_ROUTES)
def test_a_branch_is_blind_to_the_other(route: str) -> None:
    model, tree = build(LlamaForCausalLM, LlamaConfig(**SMALL)), TREES["packed"]
    batch = make_batch(model, tree)
    before = together(model, tree, batch, route)
    first = (tree.item_ids == 0) & (tree.branch_ids == 1)
    batch["input_ids"][first] = (batch["input_ids"][first] + 1) % VOCABULARY
    after = together(model, tree, batch, route)
    assert torch.equal(after[~first], before[~first])
    assert (after != before)[first].all(-1).all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("route", CPU_ROUTES)
def test_gradient_checkpointing(route: str, reentrant: bool) -> None:
    model, tree = build(Qwen2ForCausalLM, Qwen2Config(**SMALL)).train(), TREES["holes"]
    batch = make_batch(model, tree)
    expected = gradients(model, together(model, tree, batch, route))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model, together(model, tree, batch, route)), expected)


def brute_force(tree: TokenTree, blocks: Tensor | None, window: int | None) -> Tensor:
    """(R, 1, T, T), pair by pair, from the positions of each response alone."""
    sees = torch.eye(tree.shape[1], dtype=torch.bool).repeat(tree.shape[0], 1, 1)
    for item in tree.items:
        prefix = list(range(item.start, item.start + item.prefix))
        for k, length in enumerate(item.branches or (0,)):
            sequence = prefix + list(range(item.branch_start(k), item.branch_start(k) + length))
            for (i, q), (j, key) in itertools.product(enumerate(sequence), repeat=2):
                ids = (-1, -2) if blocks is None else (int(blocks[item.row, q]), int(blocks[item.row, key]))
                allowed = j <= i or (ids[0] == ids[1] and ids[0] >= 0)
                sees[item.row, q, key] = allowed and (window is None or i - j < window)
    return sees[:, None]


def image_blocks(tree: TokenTree) -> Tensor:
    """Two images of three tokens in each prefix that has room, and one in each item's last branch, of the same id."""
    blocks = torch.full(tree.shape, -1)
    for item in tree.items:
        if item.prefix >= 7:
            blocks[item.row, item.start : item.start + 3] = 0
            blocks[item.row, item.start + 4 : item.start + 7] = 1
        if item.branches and item.branches[-1] > 3:
            start = item.branch_start(len(item.branches) - 1)
            blocks[item.row, start : start + 3] = 2
    return blocks


@pytest.mark.parametrize("window", [None, 1, WINDOW])
@pytest.mark.parametrize("with_blocks", [False, True])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_masks_pair_by_pair(tree: TokenTree, with_blocks: bool, window: int | None) -> None:
    blocks = image_blocks(tree) if with_blocks else None
    expected = brute_force(tree, blocks, window)
    assert torch.equal(tree_mask(tree, "cpu", blocks, window), expected)
    flex = tree_block_mask(tree, "cpu", blocks, window)
    rows, columns = tree.shape
    assert torch.equal(create_mask(flex.mask_mod, rows, 1, columns, columns, "cpu"), expected)


def test_a_plain_mask_is_transformers_own() -> None:
    tree = TokenTree.place([(8, (5,)), (9, (2,))], packed=False)
    blocks, padding = image_blocks(tree), tree.item_ids >= 0
    config = Gemma3TextConfig(**SMALL, attn_implementation="sdpa")
    options: dict[str, Any] = {
        **{"config": config, "inputs_embeds": torch.zeros(*tree.shape, 4), "attention_mask": padding.long()},
        **{"past_key_values": None, "position_ids": None, "or_mask_function": blockwise_overlay(blocks)},
    }
    both = padding[:, None, :, None] & padding[:, None, None, :]  # what padding sees is its own affair
    full = create_causal_mask(**options)
    assert torch.equal(tree_mask(tree, "cpu", blocks) & both, full & both)
    sliding = create_causal_mask(**options, and_mask_function=sliding_window_overlay(WINDOW))
    assert torch.equal(tree_mask(tree, "cpu", blocks, WINDOW) & both, sliding & both)
    assert not torch.equal(full & both, sliding & both)


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    lengths = st.tuples(st.integers(0, 7), st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple))
    items = st.lists(lengths, min_size=1, max_size=4).filter(lambda drawn: any(p or any(b) for p, b in drawn))
    tree = TokenTree.place(draw(items), packed=draw(st.booleans()))
    return TokenTree((tree.shape[0], tree.shape[1] + draw(st.integers(0, 2))), tree.items)


@given(trees(), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.booleans(), st.integers(0, 2**16))
def test_segments_equal_the_mask(tree: TokenTree, heads: tuple[int, int], with_blocks: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = tree.shape

    def grid(count: int, width: int) -> Tensor:
        return torch.randn(rows, columns, count, width, generator=generator, dtype=torch.float64).transpose(1, 2)

    q, k, v = (x.requires_grad_() for x in (grid(heads[0], 8), grid(heads[1], 8), grid(heads[1], 8)))
    upstream = grid(heads[0], 8).transpose(1, 2)
    leading = [seed % (item.prefix + 1) if with_blocks else 0 for item in tree.items]
    blocks = torch.full(tree.shape, -1)
    for index, (item, block) in enumerate(zip(tree.items, leading, strict=True)):
        blocks[item.row, item.start : item.start + block] = index
    dense = F.scaled_dot_product_attention(q, k, v, tree_mask(tree, "cpu", blocks), scale=0.3, enable_gqa=True)
    expected = dense.transpose(1, 2) * (tree.item_ids >= 0)[..., None, None]
    expected_grads = torch.autograd.grad(expected, (q, k, v), upstream)
    ways: list[Any] = [SdpaSegments.make(tree, "cpu", leading)]
    if not with_blocks:
        ways.append(VarlenSegments.make(tree, "cpu", loop_kernel))
    for segments in ways:
        out = segments.attend(q, k, v, 0.3, 0.0)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        torch.testing.assert_close(grads, expected_grads, rtol=0, atol=1e-12)


def test_varlen_gathers_only_what_it_must() -> None:
    packed = TokenTree.place([(3, (2,)), (0, (4,))], packed=True)
    whole = VarlenSegments.make(packed, "cpu", loop_kernel)
    assert whole.tokens is None and whole.keys is None and whole.cu_q.tolist() == [0, 5, 9]
    shared = VarlenSegments.make(TokenTree.place([(3, (2, 1))], packed=True), "cpu", loop_kernel)
    assert shared.tokens is None and shared.keys is not None
    assert shared.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert (shared.cu_q.tolist(), shared.cu_k.tolist()) == ([0, 5, 6], [0, 5, 9])


def test_flex_attention_on_the_cpu() -> None:
    tree = TREES["holes"]
    blocks = image_blocks(tree)
    q, k, v = (torch.randn(3, 2, 24, 16) for _ in range(3))  # without gradients: it has none on a CPU
    out = flex_attention(q, k, v, block_mask=tree_block_mask(tree, "cpu", blocks, WINDOW))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, tree_mask(tree, "cpu", blocks, WINDOW)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gemma3", "mistral"])
def test_sliding_windows(kind: str, implementation: str) -> None:
    options = {**SMALL, "sliding_window": WINDOW, "attn_implementation": implementation, "head_dim": 8}
    if kind == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        model = build(Gemma3ForCausalLM, Gemma3TextConfig(**options, layer_types=kinds))
    else:
        model = build(MistralForCausalLM, MistralConfig(**options))
    tree = TREES["packed"]
    batch = make_batch(model, tree)
    hidden = together(model, tree, batch, "mask")
    assert_same(hidden, alone(model, tree, batch))
    assert model.config._attn_implementation == implementation
    with pytest.raises(ValueError, match="longer than the sliding window of 6"):
        tree_inputs(model, tree, "segments")
    short = TokenTree.place([(3, (2, 3)), (1, (5, 1))], packed=True)  # no sequence is longer than the window
    batch = make_batch(model, short)
    with_route(model, "mask")
    assert_same(together(model, short, batch, "segments"), alone(model, short, batch))


def test_soft_caps_need_masks() -> None:
    kinds = ["sliding_attention", "full_attention"]
    options = {**SMALL, "sliding_window": WINDOW, "head_dim": 8, "layer_types": kinds, "attn_logit_softcapping": 0.5}
    model = build(Gemma2ForCausalLM, Gemma2Config(**options, attn_implementation="eager"))
    tree = TREES["rows"]
    batch = make_batch(model, tree)
    assert routes_to_try(model) == ["mask"]
    assert_same(together(model, tree, batch, "mask"), alone(model, tree, batch))
    with pytest.raises(ValueError, match="soft-cap"):
        routes_to_try(model, "segments")


@pytest.fixture
def paligemma() -> Any:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SMALL, "model_type": "gemma", "head_dim": 8}
    vision = {**small, "image_size": 30, "patch_size": 10, "model_type": "siglip_vision_model"}
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_id=3, projection_dim=32)
    return build(PaliGemmaForConditionalGeneration, config)


@pytest.mark.parametrize("route", ["mask", "segments"])
def test_a_prompt_that_sees_itself_both_ways(paligemma: Any, route: str) -> None:
    tree = TokenTree.place([(7, (5, 3)), (4, (6, 2)), (6, (4,))], packed=True)
    prompts = (5, 4, 6)  # the first item's responses begin with the same two tokens: causal, but in its prefix
    types, blocks = torch.ones(tree.shape, dtype=torch.long), torch.full(tree.shape, -1)
    for index, (item, prompt) in enumerate(zip(tree.items, prompts, strict=True)):
        types[item.row, item.start : item.start + prompt] = 0
        blocks[item.row, item.start : item.start + prompt] = index
    batch = make_batch(paligemma, TokenTree.place([(0, (tree.shape[1],))], packed=True))
    batch["input_ids"][tree.item_ids < 0] = 0
    expected = alone(paligemma, tree, batch, token_type_ids=types)
    expected_grads = gradients(paligemma, expected)
    assert (expected - alone(paligemma, tree, batch)).abs().max() > 1e-3
    hidden = together(paligemma, tree, batch, route, blocks)
    assert_same(hidden, expected)
    assert_same(gradients(paligemma, hidden), expected_grads)


def test_blocks_that_a_route_cannot_do(paligemma: Any) -> None:
    tree = TokenTree.place([(5, (3, 2))], packed=True)
    inside = torch.tensor([[-1, 0, 0, -1, -1, -1, -1, -1, -1, -1]])
    with pytest.raises(ValueError, match="use the route mask"):
        tree_attention_inputs(paligemma, tree, "cpu", "segments", inside)
    leading = torch.tensor([[0, 0, 0, -1, -1, -1, -1, -1, -1, -1]])
    with pytest.raises(ValueError, match="varlen has no tokens that see each other both ways"):
        tree_attention_inputs(paligemma, tree, "cpu", "varlen", leading)
    across = torch.tensor([[-1, -1, -1, -1, 0, 0, -1, -1, -1, -1]])
    for route in ("mask", "segments"):
        with pytest.raises(ValueError, match="turn the shared prefix off"):
            tree_attention_inputs(paligemma, tree, "cpu", route, across)
    assert tree_mask(TokenTree.place([(5, (5,))], packed=True), "cpu", across)[0, 0, 4, 5]  # one sequence: no harm
    with pytest.raises(ValueError, match=r"\(1, 9\)"):
        tree_mask(tree, "cpu", across[:, 1:])
    with pytest.raises(ValueError, match="goes over the end"):
        SdpaSegments.make(tree, "cpu", [6])


def test_routes_on_a_cpu(model: Any) -> None:
    with_route(model, "mask")
    assert routes_to_try(model) == ["segments", "mask"]
    assert routes_to_try(model, "mask") == ["mask"]
    for route, reason in {"varlen": "no varlen flash-attention kernel", "flex": "no backward on the CPU"}.items():
        with pytest.raises(ValueError, match=reason):
            routes_to_try(model, route)
    with pytest.raises(ValueError, match="'fast' is not known"):
        routes_to_try(model, "fast")
    model.config.get_text_config()._attn_implementation = "eager"
    assert routes_to_try(model) == ["mask"]
    assert with_route(model, "mask") == "eager"
    assert with_route(model, "segments") == "eager"
    assert with_route(model, "mask") == NAME


def test_routes_of_a_sliding_window() -> None:
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=WINDOW))
    assert routes_to_try(model) == routes_to_try(model, longest=WINDOW + 1) == ["mask"]
    assert routes_to_try(model, longest=WINDOW) == ["segments", "mask"]
    with pytest.raises(ValueError, match="window of 6"):
        routes_to_try(model, "segments")


def test_layers_that_are_no_attention() -> None:
    model = build(LlamaForCausalLM, LlamaConfig(**SMALL))
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert routes_to_try(model) == ["mask"]  # so that a caller who only tries gets the reason below
    with pytest.raises(ValueError, match="linear_attention"):
        routes_to_try(model, "segments")
    for route in ("mask", "segments"):
        with pytest.raises(ValueError, match="layers of linear_attention, which no mask keeps apart"):
            tree_attention_inputs(model, TREES["packed"], "cpu", route)


def test_the_vision_tower_keeps_its_attention(model: Any) -> None:
    lora: Any = get_peft_model(model, LoraConfig(target_modules=r".*\.q_proj", r=2, init_lora_weights=False))
    try:
        tree, batch = TREES["rows"], make_batch(model, TREES["rows"])
        masked = together(lora, tree, batch, "mask")
        assert_same(together(lora, tree, batch, "segments"), masked)
        text = model.config.get_text_config()
        assert text._attn_implementation == NAME
        assert NAME not in str(model.config.to_dict())
        if text is not model.config:
            assert model.config.vision_config._attn_implementation == "sdpa"
    finally:
        lora.unload()


def test_without_a_tree_it_is_sdpa() -> None:
    model = build(Qwen2ForCausalLM, Qwen2Config(**SMALL))
    ids, mask = torch.randint(4, VOCABULARY, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with_route(model, "mask")
    expected = [model.base_model(ids, attention_mask=m).last_hidden_state for m in (None, mask)]
    generated = model.generate(ids, max_new_tokens=5, do_sample=False)
    with_route(model, "segments")
    for m, hidden in zip((None, mask), expected, strict=True):
        assert torch.equal(model.base_model(ids, attention_mask=m).last_hidden_state, hidden)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)


def test_a_tree_that_does_not_arrive_is_an_error() -> None:
    model, tree = build(LlamaForCausalLM, LlamaConfig(**SMALL)), TREES["packed"]
    batch, inputs = make_batch(model, tree), tree_inputs(model, tree, "segments")
    with pytest.raises(ValueError, match="LlamaAttention got no tree_segments"):
        model.base_model(**batch, attention_mask=inputs["attention_mask"])
    with_route(model, "mask")  # a layer that reads the mask itself cannot take the placeholder for one
    with pytest.raises(RuntimeError):
        model.base_model(**batch, **inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"sliding_window": 19}, "sliding window of 19"),
        ({"is_causal": False}, "not causal"),
        ({"rows": 2}, "2 rows of"),
    ],
)
def test_what_segments_refuse(options: dict[str, Any], message: str) -> None:
    tree, options = TREES["packed"], dict(options)
    q = torch.randn(options.pop("rows", 1), 4, tree.shape[1], 8)
    segments = SdpaSegments.make(tree, "cpu")
    tree_attention(nn.Module(), q[:1], q[:1], q[:1], None, tree_segments=segments, sliding_window=20)
    with pytest.raises(ValueError, match=message):
        tree_attention(nn.Module(), q, q, q, None, tree_segments=segments, **options)


def test_varlen_refuses_dropout_and_a_missing_kernel() -> None:
    tree = TREES["packed"]
    q = torch.randn(1, 4, tree.shape[1], 8)
    with pytest.raises(ValueError, match=r"dropout 0\.1"):
        VarlenSegments.make(tree, "cpu", loop_kernel).attend(q, q, q, None, 0.1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="install flash-attn"):
            VarlenSegments.make(tree, "cpu")


@pytest.mark.parametrize("make", [SdpaSegments.make, lambda *a: VarlenSegments.make(*a, loop_kernel)])
def test_autocast(make: Callable[..., Any]) -> None:
    tree = TREES["holes"]
    q, k, v = (torch.randn(3, 2, 24, 16) for _ in range(3))
    expected = make(tree, "cpu").attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = make(tree, "cpu").attend(q, k, v.bfloat16(), None, 0.0)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["segments", "varlen", "flex"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_routes_on_a_gpu(route: str, tree: TokenTree) -> None:
    config = LlamaConfig(**{**SMALL, "hidden_size": 64, "head_dim": 16})
    model: Any = LlamaForCausalLM(config).bfloat16().cuda()
    if route not in routes_to_try(model) and route != "flex":
        pytest.skip(f"this device has no route {route}")
    batch = {name: x.cuda() for name, x in make_batch(model, tree).items()}
    positions, real = tree.positions.cuda(), (tree.item_ids >= 0)[..., None].cuda()
    results = []
    for name in ("mask", route):
        with_route(model, name)
        inputs = tree_attention_inputs(model, tree, "cuda", name)
        hidden = model.base_model(**batch, **inputs, position_ids=positions, use_cache=False).last_hidden_state * real
        results.append((hidden, gradients(model, hidden.cpu())))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.02, atol=0.02)
    for name, grad in results[0][1].items():
        assert (results[1][1][name] - grad).norm() <= 0.03 * grad.norm(), name
