"""Which tokens of a TokenTree may see which, told to a transformers model in one of four ways (routes).

    mask      a 4-D boolean mask: every model, every window and block, any device
    segments  one SDPA call for each sequence (`aspo.shared_prefix.segments`): no mask, no wasted pairs
    varlen    one flash-attention call for all sequences: CUDA, bf16 or fp16
    flex      a FlexAttention block mask: CUDA; windows, blocks and soft-caps without a dense mask

`routes_to_try` says which ones a model can take, `with_route` sets one, `tree_attention_inputs` makes a batch's inputs.
Axes: R rows, T columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from aspo.model import base_model
from aspo.shared_prefix.segments import KEYWORD, NAME, SdpaSegments
from aspo.shared_prefix.tree import TokenTree
from aspo.shared_prefix.varlen import VarlenSegments, varlen_kernel

ROUTES = ("varlen", "segments", "mask", "flex")
ATTENTION = ("full_attention", "sliding_attention")  # layer types of transformers' configurations that we know
BLOCKS = {"segments": {"gemma3"}, "varlen": {"gemma3", "paligemma"}}  # model types with blocks that a route cannot do
ONE_MASK = {"paligemma"}  # model types that make one mask for all layers of the one given


def tree_mask(
    tree: TokenTree, device: torch.device | str, blocks: Tensor | None = None, window: int | None = None
) -> Tensor:
    """(R, 1, T, T) bool on a device, True where the query (third axis) may see the key (fourth).

    A token sees itself, the earlier tokens of its branch and those of its item's prefix. Padding sees itself only.
    blocks: (R, T) int, tokens of one id >= 0 see each other both ways; -1 = none. A block never crosses branches.
    window: only keys less than this many positions before the query, as transformers' `sliding_window`.
    Raises ValueError for a block that goes over the end of a prefix that several branches share.
    """
    rows, columns = tree.shape
    sees = _sees(tree, device, blocks, window)
    r, c = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return sees(r[:, None, None], r, c[None, :, None], c[None, None, :])[:, None]


def tree_block_mask(
    tree: TokenTree, device: torch.device | str, blocks: Tensor | None = None, window: int | None = None
) -> BlockMask:
    """`tree_mask` as FlexAttention's block mask. Compiled on an accelerator, where the dense mask is never built."""
    rows, columns = tree.shape
    sees = _sees(tree, device, blocks, window)
    on_cpu = torch.device(device).type == "cpu"
    return create_block_mask(sees, rows, None, columns, columns, device=device, _compile=not on_cpu)


def _sees(
    tree: TokenTree, device: torch.device | str, blocks: Tensor | None, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(row, head, query column, key column) -> bool; broadcasts, and then every large temporary is bool."""
    item, branch = tree.item_ids, tree.branch_ids
    alone = -1 - torch.arange(tree.shape[1], dtype=torch.int32).expand(tree.shape)  # an id for each padding token
    first = item * (int(branch.max()) + 1 if branch.numel() else 1)
    own = torch.where(item < 0, alone, first + branch).to(device)
    prefix = torch.where(item < 0, alone, first).to(device)
    block = None if blocks is None else _block_ids(tree, blocks).to(device)
    positions = tree.positions.to(device)

    def sees(r: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = ((own[r, k] == own[r, q]) | (own[r, k] == prefix[r, q])) & (k <= q)
        if block is not None:
            seen = seen | ((block[r, k] == block[r, q]) & (block[r, q] >= 0))
        if window is not None:
            seen = seen & (positions[r, k] > positions[r, q] - window)
        return seen

    return sees


def _block_ids(tree: TokenTree, blocks: Tensor) -> Tensor:
    """(R, T) int64 on the CPU: an id for each block of each branch, -1 outside of blocks and in padding."""
    if blocks.shape != tree.shape or blocks.is_floating_point():
        raise ValueError(f"blocks are {tuple(blocks.shape)} {blocks.dtype}; they must be whole numbers of {tree.shape}")
    blocks = blocks.cpu().long()
    ids = torch.full_like(blocks, -1)
    number: dict[tuple[int, int, int], int] = {}
    for index, item in enumerate(tree.items):
        shares = len(item.branches) > 1  # else its prefix and branch are one sequence
        for part, length in enumerate((item.prefix, *item.branches) if shares else (item.length,)):
            start = item.start if part == 0 else item.branch_start(part - 1)
            of_part = blocks[item.row, start : start + length]
            for block in set(of_part[of_part >= 0].tolist()):
                if (index, 0, block) in number:
                    raise ValueError(
                        f"item {index}: tokens that see each other both ways lie in its prefix and in branch {part}, "
                        "so the prefix depends on the response; turn the shared prefix off"
                    )
                number[index, part, block] = len(number)
                ids[item.row, start : start + length][of_part == block] = len(number) - 1
    return ids


def _leading_blocks(tree: TokenTree, blocks: Tensor) -> list[int]:
    """How many of each item's first tokens are one block. Raises ValueError where there are other blocks."""
    ids, lengths = _block_ids(tree, blocks), []
    for index, item in enumerate(tree.items):
        of_item = ids[item.row, item.start : item.start + item.length]
        leading = int(((of_item == of_item[:1]) & (of_item >= 0)).long().cumprod(0).sum())
        if (of_item[leading:] >= 0).any():
            raise ValueError(
                f"item {index}: tokens that see each other both ways do not all lie at its start: use the route mask"
            )
        lengths.append(leading)
    return lengths


def routes_to_try(
    model: nn.Module, requested: str = "auto", *, dtype: torch.dtype | None = None, longest: int | None = None
) -> list[str]:
    """The routes that a model can take, the fastest first; only the one that was requested, unless that is "auto".

    dtype: what attention computes in: autocast's, else None = the model's own.
    longest: tokens of the longest sequence (prefix and one branch) that will come; None = any.
    A model with eager attention keeps it (auto), and "flex" is only taken when it is asked for.
    Raises ValueError for a requested route that the model cannot take, saying why.
    """
    outer = base_model(model)
    if requested == "auto":
        if outer.config.get_text_config()._attn_implementation == "eager":
            return ["mask"]
        return [route for route in ROUTES if route != "flex" and _why_not(outer, route, dtype, longest) is None]
    if requested not in ROUTES:
        raise ValueError(f"attention route {requested!r} is not known; choose auto or one of {', '.join(ROUTES)}")
    if (reason := _why_not(outer, requested, dtype, longest)) is not None:
        raise ValueError(f"{type(outer).__name__} cannot take the attention route {requested}: {reason}")
    return [requested]


def _why_not(outer: Any, route: str, dtype: torch.dtype | None, longest: int | None) -> str | None:
    """Why a model cannot take a route; None where it can. Every model can take masks."""
    if route == "mask":
        return None
    text, parts = outer.config.get_text_config(), _text_models(outer)
    if not parts or not all(part._can_set_attn_implementation() for part in parts):
        return "its attention layers do not ask transformers' AttentionInterface; use mask"
    if route == "flex":
        if outer.device.type == "cpu":
            return "FlexAttention has no backward on the CPU; use segments or mask"
        return None if all(part._supports_flex_attn for part in parts) else "transformers has no FlexAttention for it"
    if getattr(text, "attn_logit_softcapping", None) is not None or not all(part._supports_sdpa for part in parts):
        return "its attention has a soft-cap, or something else that SDPA cannot do; use mask or flex"
    if unknown := _unknown_layers(outer):
        return f"it has layers of {unknown}"
    window, _ = _sliding_window(outer)
    if window is not None and (longest is None or window < longest):
        return f"its sliding window of {window} tokens may be shorter than a sequence; use mask or flex"
    if outer.config.model_type in BLOCKS[route]:
        return "tokens of its prompt see each other both ways; use mask or flex"
    return _why_not_varlen(outer, text, dtype) if route == "varlen" else None


def _why_not_varlen(outer: Any, text: Any, dtype: torch.dtype | None) -> str | None:
    if outer.device.type != "cuda" or varlen_kernel() is None:
        return "there is no varlen flash-attention kernel for its device; use segments"
    dtype = dtype or outer.get_input_embeddings().weight.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attention computes in bfloat16 or float16, the model in {dtype}; use segments"
    if any(getattr(part, "attention_dropout", 0.0) for model in _text_models(outer) for part in model.modules()):
        return "its attention has dropout, which varlen attention has not: turn disable_dropout on, or use segments"
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return None if width % 8 == 0 and width <= 256 else f"flash-attention has no heads of width {width}; use segments"


def with_route(model: nn.Module, route: str) -> str:
    """Make a model's text attention take a route, until another is set; returns transformers' name of what it was.

    It stays set through the backward pass, where gradient checkpointing runs the layers again. Batches without a tree
    are attended to as before (segments, varlen: by SDPA). Vision towers keep theirs.
    """
    outer = base_model(model)
    text, parts = outer.config.get_text_config(), _text_models(outer)
    before = text._attn_implementation
    name = {"segments": NAME, "varlen": NAME, "flex": "flex_attention"}.get(route, "sdpa")
    if route == "mask" and (before == "eager" or not all(part._supports_sdpa for part in parts)):
        name = "eager"
    if name != before:
        set_text_attention(outer, name)
    if text._attn_implementation != name:
        raise ValueError(f"{type(outer).__name__} keeps its {before} attention; route {route} needs {name}")
    return before


def set_text_attention(model: nn.Module, name: str) -> None:
    """Set transformers' attention implementation of a model's language model; vision towers keep theirs."""
    for part in _text_models(base_model(model)):
        part.set_attn_implementation(name)


def _text_models(outer: Any) -> list[PreTrainedModel]:
    """The parts of a model that read the text configuration: its language model."""
    text = outer.config.get_text_config()
    return [part for part in outer.modules() if isinstance(part, PreTrainedModel) and part.config is text]


def _sliding_window(outer: Any) -> tuple[int | None, bool]:
    """The sliding window of a model's text layers (None = there is none), and whether every layer has it."""
    text = outer.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or [ATTENTION[window is not None]])
    return (window, len(kinds) == 1) if ATTENTION[1] in kinds else (None, True)


def _unknown_layers(outer: Any) -> str:
    """The types of a model's text layers that are neither full nor sliding attention, such as linear_attention."""
    return ", ".join(sorted(set(getattr(outer.config.get_text_config(), "layer_types", None) or ()) - set(ATTENTION)))


def tree_attention_inputs(
    model: nn.Module, tree: TokenTree, device: torch.device | str, route: str, blocks: Tensor | None = None
) -> dict[str, Any]:
    """Keyword arguments for the forward of a model's trunk, with which it attends as a tree says; once for each batch.

    route: one of `routes_to_try`, set by `with_route`. blocks: as in `tree_mask`.
    Position ids are the caller's. Raises ValueError for a window or for blocks that the route cannot do, and for layers
    that are neither full nor sliding attention.
    """
    outer = base_model(model)
    if unknown := _unknown_layers(outer):
        raise ValueError(f"{type(outer).__name__} has layers of {unknown}, which no mask keeps apart")
    window, everywhere = _sliding_window(outer)
    if window is not None and window >= tree.longest_sequence:
        window = None
    if route in ("segments", "varlen"):
        if window is not None:
            raise ValueError(
                f"a sequence of {tree.longest_sequence} tokens is longer than the sliding window of {window}: use the "
                "route mask or flex"
            )
        leading = [] if blocks is None else _leading_blocks(tree, blocks)
        if route == "varlen" and any(leading):
            raise ValueError("the route varlen has no tokens that see each other both ways: use the route mask")
        varlen = route == "varlen"
        segments = VarlenSegments.make(tree, device) if varlen else SdpaSegments.make(tree, device, leading)
        # Four axes, so that it comes through as it is; no elements, so that a layer which reads it fails.
        return {"attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device), KEYWORD: segments}

    def mask(size: int | None) -> Tensor | BlockMask:
        if route == "flex":
            return tree_block_mask(tree, device, blocks, size)
        sees = tree_mask(tree, device, blocks, size)
        if outer.config.get_text_config()._attn_implementation != "eager":
            return sees
        dtype = outer.get_input_embeddings().weight.dtype  # eager attention adds its mask
        return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, torch.finfo(dtype).min)

    if window is None or everywhere:
        return {"attention_mask": mask(window)}
    if outer.config.model_type in ONE_MASK:
        raise ValueError(
            f"{type(outer).__name__} takes one mask for all layers, and a sequence of {tree.longest_sequence} tokens "
            f"is longer than the sliding window ({window}) of some: turn the shared prefix and padding_free off"
        )
    return {"attention_mask": dict(zip(ATTENTION, (mask(None), mask(window)), strict=True))}
