"""Layouts of a fixed capacity, for CUDA graphs: fields padded to a size, and what may be copied over what.

Axes: N counted tokens, S sentences, S_chosen sentences of chosen responses.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from aspo_kernels.layout import SentenceLayout


def padded_fields(layout: SentenceLayout, tokens: int, sentences: int, chosen_sentences: int) -> dict[str, Any]:
    """The fields that change when N, S and S_chosen become these capacities, as `SentenceLayout.padded_to` says."""
    for name, capacity, size in (
        ("tokens", tokens, layout.num_tokens),
        ("sentences", sentences, layout.num_sentences),
        ("chosen_sentences", chosen_sentences, layout.chosen_sentences.numel()),
    ):
        if capacity < size:
            raise ValueError(f"{name} is {capacity} but this layout has {size}: choose a larger capacity")
    if chosen_sentences > layout.chosen_sentences.numel() and sentences == layout.num_sentences:
        raise ValueError(
            f"sentences is {sentences}, all in use, but the tail of chosen_sentences needs an empty one: choose "
            f"sentences >= {sentences + 1}"
        )
    spare = torch.arange(tokens - layout.num_tokens, device=layout.targets.device)
    mask = layout.perplexity_mask
    return {
        "targets": F.pad(layout.targets, (0, spare.numel())),
        "hidden_index": torch.cat([layout.hidden_index, spare % max(layout.hidden_rows, 1)]),
        "sentence_offsets": torch.cat(
            [layout.sentence_offsets, layout.sentence_offsets[-1:].expand(sentences - layout.num_sentences)]
        ),
        "perplexity_mask": None if mask is None else F.pad(mask, (0, spare.numel())),
        "chosen_sentences": F.pad(
            layout.chosen_sentences, (0, chosen_sentences - layout.chosen_sentences.numel()), value=sentences - 1
        ),
        "padded": True,
    }


def tensors_to_copy(static: SentenceLayout, other: SentenceLayout) -> list[tuple[Tensor, Tensor]]:
    """(static's, other's) for every tensor; the errors of `SentenceLayout.copy_`."""
    pairs = []
    for name, mine, its in (*_tensors(static, other), *_role_tensors(static, other)):
        if (mine is None) != (its is None) or (mine is not None and mine.shape != its.shape):
            sizes = ["absent" if t is None else tuple(t.shape) for t in (its, mine)]
            raise ValueError(f"{name} is {sizes[0]} but {sizes[1]} in the layout to fill: use padded_to")
        if mine is not None:
            pairs.append((mine, its))
    if other.padded_shape != static.padded_shape or other.num_items != static.num_items:
        raise ValueError(
            f"padded_shape {other.padded_shape} and {other.num_items} items do not fit {static.padded_shape} and "
            f"{static.num_items} items of the layout to fill"
        )
    if static.padded_shape is None and other.hidden_rows > static.hidden_rows:
        raise ValueError(
            f"hidden_index reaches row {other.hidden_rows - 1} but the layout to fill has {static.hidden_rows} rows "
            "and its padded_shape is unknown: fill the layout that reaches further, or pass padded_shape"
        )
    return pairs


def _tensors(*layouts: SentenceLayout) -> list[tuple[Any, ...]]:
    """(name, a layout's tensor, the other's) for every field that may hold one."""
    names = [f.name for f in fields(layouts[0]) if any(isinstance(getattr(x, f.name), Tensor) for x in layouts)]
    return [(name, *(getattr(layout, name) for layout in layouts)) for name in names]


def _role_tensors(*layouts: SentenceLayout) -> list[tuple[Any, ...]]:
    """The same for role_responses."""
    by_role = zip_longest(*(layout.role_responses for layout in layouts))
    return [(f"the responses of role {role}", *rows) for role, rows in enumerate(by_role)]
