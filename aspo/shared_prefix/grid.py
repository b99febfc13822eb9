"""From token ids to the grid that a model reads: items placed in rows, and the SentenceLayout of their responses.

Axes: R rows and T columns of the grid, N counted tokens, U of them that differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aspo.shared_prefix.tree import TokenTree
from aspo_kernels.layout import SentenceLayout, without_final_eos

NOT_COUNTED = -1  # in Response.sentences


class Response(NamedTuple):
    """One response as tokens: its ids and the sentence of each (NOT_COUNTED: part of the response, but no target).

    Its first `inside` tokens are in the processor's tensors already, at the end of the prompt (a response with images).
    weights: one for each sentence. scores: one for each token. alternative: other targets at its own positions, which
    make a response of the next role without being in the grid.
    """

    group: int
    role: int
    ids: list[int]
    sentences: list[int]
    similarity: list[float] | None = None
    inside: int = 0
    weights: list[float] | None = None
    scores: list[float] | None = None
    alternative: list[int] | None = None

    def with_targets(self, role: int) -> Response:
        """The alternative as a response of its own."""
        assert self.alternative is not None
        return Response(self.group, role, self.alternative, self.sentences, inside=self.inside)


class GridItem(NamedTuple):
    """What becomes an item of the tree: row `source` of the processor's tensors, `prompt` tokens long, and its
    responses."""

    source: int
    prompt: int
    responses: tuple[Response, ...]

    @property
    def common(self) -> int:
        """Tokens with which all responses begin; at least one token is left to each."""
        if len(self.responses) < 2:
            return 0
        shortest = min(len(response.ids) for response in self.responses)
        columns = zip(*(response.ids for response in self.responses), strict=False)
        return next((n for n, column in enumerate(columns) if len(set(column)) > 1 or n == shortest - 1), 0)


@dataclass(frozen=True)
class Distinct:
    """Counted tokens that are the same prediction, in several responses: the common start of chosen and rejected.

    first: (U,) which of the N counted tokens to compute; the first `in_pair` of them count in the chosen (role 0) and
    in the rejected response (role 1). inverse: (N,) where each token's result lies in those U.
    """

    first: Tensor
    inverse: Tensor
    in_pair: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Distinct:
        """The same on another device."""
        first, inverse = (x.to(device, non_blocking=non_blocking) for x in (self.first, self.inverse))
        return Distinct(first, inverse, self.in_pair)


def place(items: Sequence[GridItem], packed: bool) -> TokenTree:
    """Where the items lie: the common start of an item's responses belongs to its prefix."""
    lengths = []
    for item in items:
        common = item.common
        lengths.append((item.prompt + common, tuple(len(r.ids) - r.inside - common for r in item.responses)))
    return TokenTree.place(lengths, packed)


def grid_inputs(
    tree: TokenTree,
    items: Sequence[GridItem],
    prompt_inputs: Mapping[str, Tensor],
    aligned: Mapping[str, tuple[Tensor, int]],
    pad_token_id: int,
) -> dict[str, Tensor]:
    """input_ids, attention_mask (1 = token) and the tensors that have one entry a token, each (R, T).

    aligned: such a tensor of the prompts, and its value on a response's tokens.
    """
    input_ids = torch.full(tree.shape, pad_token_id)
    grids = {name: torch.zeros(tree.shape, dtype=value.dtype) for name, (value, _) in aligned.items()}
    for place, item in zip(tree.items, items, strict=True):
        end = place.start + item.prompt
        input_ids[place.row, place.start : end] = prompt_inputs["input_ids"][item.source, : item.prompt]
        common = place.prefix - item.prompt
        if item.responses:
            input_ids[place.row, end : end + common] = torch.tensor(item.responses[0].ids[:common], dtype=torch.long)
        for k, response in enumerate(item.responses):
            start = place.branch_start(k)
            ids = torch.tensor(response.ids[response.inside + common :], dtype=torch.long)
            input_ids[place.row, start : start + len(ids)] = ids
        for name, (value, of_response) in aligned.items():
            grids[name][place.row, place.start : place.start + place.length] = of_response
            grids[name][place.row, place.start : end] = value[item.source, : item.prompt]
    return {"input_ids": input_ids, "attention_mask": (tree.item_ids >= 0).long(), **grids}


def in_layout_order(items: Sequence[GridItem]) -> list[tuple[Response, int, int]]:
    """Every response as the layout has them, by role and then by group, with its item and its branch there.

    An alternative follows as a response of the role behind its item's others, at the place of the response that it is
    of: the same role whatever else is in the batch.
    """
    answers = [(r, at, k) for at, item in enumerate(items) for k, r in enumerate(item.responses)]
    last: dict[int, int] = {}
    for response, _, _ in answers:
        last[response.group] = max(last.get(response.group, 0), response.role)
    answers += [(r.with_targets(last[r.group] + 1), at, k) for r, at, k in answers if r.alternative is not None]
    return sorted(answers, key=lambda answer: (answer[0].role, answer[0].group))


class Grid(NamedTuple):
    """Items, where they lie, and a model's inputs for them."""

    items: list[GridItem]
    tree: TokenTree
    model_inputs: dict[str, Tensor]


def in_parts(
    grids: Sequence[Grid], layout: SentenceLayout, distinct: Distinct | None
) -> tuple[list[dict[str, Any]], Tensor]:
    """Several grids of one layout as `parts`, each with model_inputs, tree and `index`: which of its flattened hidden
    states predict counted tokens. And the order in which those of all parts, joined, are the layout's (or distinct's).
    """
    wanted = layout.hidden_index if distinct is None else layout.hidden_index[distinct.first]
    parts, taken, start = [], [], 0
    for grid in grids:
        end = start + grid.tree.shape[0] * grid.tree.shape[1]
        mine = torch.nonzero((wanted >= start) & (wanted < end)).flatten()
        parts.append({"model_inputs": grid.model_inputs, "tree": grid.tree, "index": wanted[mine] - start})
        taken.append(mine)
        start = end
    return parts, torch.cat(taken).argsort()


def tree_layout(
    grids: Sequence[tuple[TokenTree, Sequence[GridItem]]], end_of_turn: int | None
) -> tuple[SentenceLayout, Distinct | None]:
    """The layout of the items' responses, by role and then by group, and which of its tokens are the same prediction.

    Of several grids the hidden states are taken to be flattened one behind the other.

    A response's first token behind the prefix is predicted by the prefix's last one, in every branch.
    """
    targets: list[int] = []
    index: list[int] = []
    sentence_offsets, response_offsets = [0], [0]
    items = [item for _, of_grid in grids for item in of_grid]
    starts = [0, *itertools.accumulate(tree.shape[0] * tree.shape[1] for tree, _ in grids)]
    places = [
        (place, start + place.row * tree.shape[1])
        for (tree, _), start in zip(grids, starts, strict=False)
        for place in tree.items
    ]
    answers = in_layout_order(items)
    for response, at, k in answers:
        (place, row), item = places[at], items[at]
        before = row + place.start + item.prompt - response.inside - 1  # what predicts its first token
        in_prefix = response.inside + place.prefix - item.prompt
        behind = row + place.branch_start(k) - in_prefix - 1
        previous = NOT_COUNTED
        for n, (token, sentence) in enumerate(zip(response.ids, response.sentences, strict=True)):
            if sentence == NOT_COUNTED:
                continue
            if sentence != previous and previous != NOT_COUNTED:
                sentence_offsets.append(len(targets))
            previous = sentence
            targets.append(token)
            index.append(n + (before if n <= in_prefix else behind))
        if previous != NOT_COUNTED:
            sentence_offsets.append(len(targets))
        response_offsets.append(len(sentence_offsets) - 1)
    tensors = [torch.tensor(x, dtype=torch.long) for x in (targets, index, sentence_offsets, response_offsets)]
    ids, hidden_index, sentences, answers_end = tensors
    layout = SentenceLayout(
        ids,
        hidden_index,
        sentences,
        answers_end,
        group=torch.tensor([response.group for response, _, _ in answers], dtype=torch.long),
        role=torch.tensor([response.role for response, _, _ in answers], dtype=torch.long),
        perplexity_mask=without_final_eos(ids, sentences, answers_end, end_of_turn),
        padded_shape=grids[0][0].shape if len(grids) == 1 else None,
    )
    shares_start = any(place.prefix > item.prompt for (place, _), item in zip(places, items, strict=True))
    return layout, _distinct(layout) if shares_start else None


def _distinct(layout: SentenceLayout) -> Distinct:
    """Tokens with equal (hidden_index, target) once each: those of a pair's both responses, then the others."""
    role = layout.role.repeat_interleave(layout.response_token_offsets.diff()).tolist()
    keys = list(zip(layout.hidden_index.tolist(), layout.targets.tolist(), strict=True))
    roles: dict[tuple[int, int], set[int]] = {}
    first: dict[tuple[int, int], int] = {}
    for n, (key, r) in enumerate(zip(keys, role, strict=True)):
        roles.setdefault(key, set()).add(r)
        first.setdefault(key, n)
    ordered = sorted(first, key=lambda key: not {0, 1} <= roles[key])  # stable: else in the order of appearance
    place_of = {key: n for n, key in enumerate(ordered)}
    return Distinct(
        torch.tensor([first[key] for key in ordered]),
        torch.tensor([place_of[key] for key in keys]),
        sum({0, 1} <= r for r in roles.values()),
    )
