"""Attention over a TokenTree without a mask: only pairs of tokens that see each other are computed.

An item's prefix and first branch are one causal sequence. Every further branch is a sequence of queries against the
keys of prefix ++ branch, causal with its last query at the last key (lower right). `SdpaSegments` is one call of
`scaled_dot_product_attention` for each sequence, `varlen.VarlenSegments` one flash-attention call for all. Either
reaches the attention layers as the keyword `tree_segments`, which transformers' models hand down; the attention
function registered as "aspo_tree" reads it there.
Axes: R rows, T columns, h query heads, k key heads, d and e width of a key's and a value's head, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from aspo.shared_prefix.tree import Item, TokenTree

NAME = "aspo_tree"  # of our attention function among transformers'
KEYWORD = "tree_segments"  # under which a batch's segments reach it


class Segments(Protocol):
    """What computes the attention of a batch; made once for each batch."""

    @property
    def tree(self) -> TokenTree: ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
        """(R, h, T, d), (R, k, T, d), (R, k, T, e) -> (R, T, h, e); 0 at padding."""
        ...


@dataclass(frozen=True, eq=False)
class SdpaSegments:
    """A tree's attention as calls of torch's SDPA, one for each sequence, on any device and in any dtype.

    blocks: for each item, how many of its first tokens see each other both ways (PaliGemma's prompt); 0 = none.
    masks: (n_q, n_k) -> lower-right causal mask, for each sequence that has fewer queries than keys.
    """

    tree: TokenTree
    blocks: tuple[int, ...]
    masks: dict[tuple[int, int], Tensor]

    @classmethod
    def make(cls, tree: TokenTree, device: torch.device | str, blocks: Sequence[int] = ()) -> SdpaSegments:
        """A tree's segments on a device. Raises ValueError for a block that goes over its prefix's end."""
        leading = tuple(blocks) or (0,) * len(tree.items)
        sizes = set()
        for item, block in zip(tree.items, leading, strict=True):
            first = item.prefix + sum(item.branches[:1])
            if block > (first if len(item.branches) < 2 else item.prefix):
                raise ValueError(f"a block of {block} tokens that see each other goes over the end of {item}'s prefix")
            others = [n for n in item.branches[1:] if not again(item.prefix, n)]
            sizes |= {(first - block, first), *((n, item.prefix + n) for n in others)}
        masks = {
            (n_q, n_k): torch.ones(n_q, n_k, dtype=torch.bool, device=device).tril(n_k - n_q)
            for n_q, n_k in sizes
            if 0 < n_q < n_k
        }
        return cls(tree, leading, masks)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
        """(R, h, T, d), (R, k, T, d), (R, k, T, e) -> (R, T, h, e); 0 at padding."""
        query, key, value = autocast(query, key, value)
        if query.device.type != "cpu":  # there SDPA falls back to its slow path for grouped heads with a mask
            key, value = repeat_heads(query, key, value)

        def call(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
            n_q, n_k = q.shape[2], k.shape[2]
            if n_q == 0:
                return v.new_zeros(1, 0, q.shape[1], v.shape[3])
            mask = self.masks[n_q, n_k] if causal and n_q < n_k else None
            out = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, causal and mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            return out.transpose(1, 2)

        rows: list[list[tuple[Item, int]]] = [[] for _ in range(self.tree.shape[0])]
        for item, block in zip(self.tree.items, self.blocks, strict=True):
            rows[item.row].append((item, block))
        tensors = zip(rows, query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([_attend_row(items, q, k, v, call) for items, q, k, v in tensors])


def again(prefix: int, branch: int) -> bool:
    """Whether to compute the prefix's queries again with a branch, and drop them.

    It is a square causal call then, which skips the half above its diagonal: (prefix + branch)^2 / 2 pairs, where a
    mask over the branch's queries takes branch (prefix + branch), hidden pairs too.
    """
    return prefix < branch


def _attend_row(
    items: list[tuple[Item, int]], query: Tensor, key: Tensor, value: Tensor, call: Callable[..., Tensor]
) -> Tensor:
    """One row of `SdpaSegments.attend`: (1, h, T, d), (1, k, T, d), (1, k, T, e) -> (1, T, h, e).

    The row is cut by `split`, whose backward is one concatenation; that of a slice fills a whole row with zeros.
    """
    sizes, end = [], 0
    for item, _ in items:
        sizes += [item.start - end, item.prefix + sum(item.branches[:1]), *item.branches[1:]]
        end = item.start + item.length
    sizes.append(query.shape[2] - end)
    pieces = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)

    def padding(q: Tensor, _: Tensor, v: Tensor) -> Tensor:
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])

    out = []
    for item, block in items:
        out.append(padding(*next(pieces)))
        q, k, v = next(pieces)
        if block:
            out.append(call(q[:, :, :block], k[:, :, :block], v[:, :, :block], causal=False))
        out.append(call(q[:, :, block:], k, v))
        prefix = [x[:, :, : item.prefix] for x in (q, k, v)]
        for length in item.branches[1:]:
            q, k, v = (torch.cat(pair, 2) for pair in zip(prefix, next(pieces), strict=True))
            if again(item.prefix, length):
                out.append(call(q, k, v)[:, item.prefix :])
            else:
                out.append(call(q[:, :, item.prefix :], k, v))
    out.append(padding(*next(pieces)))
    return torch.cat(out, 1)


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads (dimension 1) as the queries."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on: as it casts the arguments of SDPA, but before they are cut."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) if x.dtype == torch.float32 else x for x in tensors)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    tree_segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function "aspo_tree": `tree_segments.attend`, and exactly "sdpa" without that keyword.

    Raises ValueError for what the segments cannot do: a sliding window shorter than the longest sequence, softcap,
    attention sinks, a position bias, attention that is not causal; and where a tree was meant but did not arrive.
    """
    if tree_segments is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ValueError(
                f"{type(module).__name__} got no {KEYWORD}: the model does not hand keyword arguments down to its "
                "attention layers; use the route mask"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    tree = tree_segments.tree
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} has {name}, which needs the route mask with eager attention")
    window = kwargs.get("sliding_window")
    if window is not None and window < tree.longest_sequence:
        raise ValueError(
            f"the sliding window of {window} tokens is shorter than a sequence of {tree.longest_sequence}: use the "
            "route mask or flex"
        )
    if is_causal is False:  # not module.is_causal: PaliGemma's says False, and means its prompt
        raise ValueError(f"{type(module).__name__} is not causal: responses cannot share a prefix, nor a row")
    if (query.shape[0], query.shape[2]) != tree.shape or key.shape[2] != tree.shape[1]:
        raise ValueError(
            f"{query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys for a tree of {tree.shape}"
        )
    return tree_segments.attend(query, key, value, scaling, dropout), None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without its own, a model's 2-D masks and causality would be dropped
