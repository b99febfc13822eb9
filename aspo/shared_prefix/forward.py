"""One forward of a batch whose items share prefixes or rows: positions, who sees whom, log-probabilities.

A model runs such a batch as it runs any other; what is added is its `position_ids` and its attention
(`attention`). That this is what the model would have computed row by row is never assumed: `exact` compares.
Axes: R rows and T columns of the grid, H hidden size, N counted tokens, U of them that differ (`grid.Distinct`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aspo.model import HeadParams, base_model, head_module, inference, output_head, trunk_hidden
from aspo.processes import inside
from aspo.sharded import with_image_gradients
from aspo.shared_prefix.attention import tree_attention_inputs
from aspo.shared_prefix.grid import Distinct
from aspo.shared_prefix.tree import TokenTree
from aspo.vision.tower import VisionFeatures
from aspo_kernels import SentenceLayout, gather_hidden, objectives

# A batch's entries that an objective reads as they are (`objectives.Inputs`).
COLUMNS = (
    *("similarity", "rejected_similarity", "sentence_weights", "token_scores", "negative_log_q"),
    "desirable",
)
ONE_BASED = {"paligemma"}  # model types that number a sequence's positions from 1


class TokenNumbers(NamedTuple):
    """What a forward gives of each counted token, (N,) each; the fields are `objectives.Inputs`'."""

    logps: Tensor
    ref_logps: Tensor | None = None
    token_kl: Tensor | None = None
    sharp_logps: Tensor | None = None


@dataclass
class PairForward:
    """Runs batches of `aspo.data.Collator` through a policy and its reference.

    policy: the model that trains, a PeftModel where ref_model is None (the reference is then the model without it).
    route: how attention is told who sees whom, see `aspo.shared_prefix.attention.routes_to_try`.
    skip_common: leave out the gradient of tokens with which both responses of a pair begin; right where it cancels
        (`Objective.difference_only`). Their log-probabilities stay.
    backend: of the loss kernels.
    vision: what spares the vision tower an image that it has seen in this step.
    ref_wrapped: how ref_model is called, where it is sharded.

    A sharded policy's batch is run `aspo.processes.inside` it; either head is read inside the module that holds it.
    """

    policy: nn.Module
    ref_model: nn.Module | None
    route: str
    skip_common: bool
    backend: str
    vision: VisionFeatures | None = None
    ref_wrapped: nn.Module | None = None

    def logps(self, batch: Mapping[str, Any], with_reference: bool) -> tuple[Tensor, Tensor | None]:
        """The first two of `numbers`."""
        return self.numbers(batch, with_reference)[:2]

    def numbers(self, batch: Mapping[str, Any], with_reference: bool, reads: Collection[str] = ()) -> TokenNumbers:
        """Log-probabilities of the counted tokens under the policy, and under its reference where it is wanted.

        The batch's model inputs and layout are on the model's device. Cached reference log-probabilities (`ref_logps`)
        are taken as they are. token_kl and sharp_logps only where they are in `reads`.
        """
        layout, distinct = batch["layout"], batch.get("distinct")
        distinct = None if distinct is None else distinct.to(layout.targets.device)
        inputs = self._inputs(self.policy, batch) if "parts" not in batch else {}
        ref_logps = batch.get("ref_logps") if with_reference else None
        with_kl = "token_kl" in reads
        vision = self._vision(batch)
        with nullcontext() if vision is None else vision.step():
            ref_rows = None
            if with_reference and ref_logps is None:
                if self.ref_model is not None and not with_kl:
                    ref_logps = self._own_reference(batch, layout, distinct)
                else:
                    ref_rows = self._reference_rows(inputs, batch, layout, distinct)
            rows = self._rows(self.policy, inputs, batch, layout, distinct)
        rows = with_image_gradients(rows, self.policy)
        if with_kl and ref_rows is None:
            raise ValueError(
                "the objective reads the reference's whole distribution at each token, which no cache of "
                "log-probabilities holds: turn precompute_ref_log_probs off, and drop the rows' ref_chosen_logps"
            )

        def read(rows: Tensor) -> TokenNumbers:
            return self._numbers(rows, ref_rows, ref_logps, layout, distinct, reads)

        return inside(head_module(self.policy), read, rows)

    def _numbers(
        self,
        rows: Tensor,
        ref_rows: Tensor | None,
        ref_logps: Tensor | None,
        layout: SentenceLayout,
        distinct: Distinct | None,
        reads: Collection[str],
    ) -> TokenNumbers:
        """From hidden states to numbers; log-probabilities in one pass where policy and reference have one head."""
        head, targets = output_head(self.policy), counted_targets(layout, distinct)
        sharp = None
        if "sharp_logps" in reads:
            with torch.no_grad():
                sharp = head.logps(rows, targets, self.backend, temperature=0.5)
                sharp = sharp if distinct is None else sharp[distinct.inverse]
        if "token_kl" in reads and ref_rows is not None:
            ref_head = head if self.ref_model is None else output_head(self.ref_model)
            found = head.token_kl(rows, ref_rows, ref_head, targets, self.backend)
            of_each = [found.logps, found.ref_logps, found.kl]
            logps, ref_logps, kl = of_each if distinct is None else [x[distinct.inverse] for x in of_each]
            return TokenNumbers(logps, ref_logps, kl, sharp)
        logps, stacked = counted_logps(head, rows, ref_rows, layout, distinct, self.skip_common, self.backend)
        return TokenNumbers(logps, ref_logps if ref_rows is None else stacked, None, sharp)

    def _own_reference(self, batch: Mapping[str, Any], layout: SentenceLayout, distinct: Distinct | None) -> Tensor:
        """(N,) log-probabilities under a reference with weights of its own."""
        model: Any = self.ref_model

        def read(rows: Tensor) -> Tensor:
            return counted_logps(output_head(model), rows, None, layout, distinct, False, self.backend)[0]

        def run() -> Tensor:
            return inside(head_module(model), read, self._reference_rows({}, batch, layout, distinct))

        with torch.no_grad():
            return inside(self.ref_wrapped or model, run, inner=model)

    def _inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A model's own: a reference may have another attention implementation, window or way to count positions."""
        inputs, tree = batch["model_inputs"], batch.get("tree")
        return inputs if tree is None else tree_inputs(model, inputs, tree, self.route)

    def _vision(self, batch: Mapping[str, Any]) -> VisionFeatures | None:
        """What remembers image features; nothing where a tower trains and parts would share its graph."""
        return None if self.vision is None or ("parts" in batch and self.vision.trains) else self.vision

    def _reference_rows(
        self, inputs: Mapping[str, Any], batch: Mapping[str, Any], layout: SentenceLayout, distinct: Distinct | None
    ) -> Tensor:
        model: Any = self.policy if self.ref_model is None else self.ref_model
        if self.ref_model is not None and "parts" not in batch:
            inputs = self._inputs(self.ref_model, batch)
        with inference(model), model.disable_adapter() if self.ref_model is None else nullcontext():
            return self._rows(model, inputs, batch, layout, distinct)

    def _rows(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        batch: Mapping[str, Any],
        layout: SentenceLayout,
        distinct: Distinct | None,
    ) -> Tensor:
        """`counted_rows` of a model; a batch in parts is run part by part, and again in the backward.

        What is held between is the counted hidden states, so that the most a step needs is set by one part.
        """
        if "parts" not in batch:
            return counted_rows(trunk_hidden(model, inputs), layout, distinct)

        vision = self._vision(batch)

        def run(part: Mapping[str, Any]) -> Tensor:
            with nullcontext() if vision is None else vision.again():
                return trunk_hidden(model, self._inputs(model, part)).flatten(0, 1)[part["index"]]

        again = torch.is_grad_enabled()
        found = [checkpoint(run, part, use_reentrant=False) if again else run(part) for part in batch["parts"]]
        return torch.cat(found)[batch["part_order"]]


def counted_rows(hidden: Tensor, layout: SentenceLayout, distinct: Distinct | None = None) -> Tensor:
    """(R, T, H) -> (N, H), or (U, H) with each prediction once: the hidden states that predict the counted tokens."""
    if distinct is None:
        return gather_hidden(hidden, layout)
    return hidden.flatten(0, 1)[layout.hidden_index[distinct.first]]


def counted_targets(layout: SentenceLayout, distinct: Distinct | None) -> Tensor:
    """The targets of `counted_rows`: (N,) or (U,)."""
    return layout.targets if distinct is None else layout.targets[distinct.first]


def counted_logps(
    head: HeadParams,
    rows: Tensor,
    ref_rows: Tensor | None,
    layout: SentenceLayout,
    distinct: Distinct | None = None,
    skip_common: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probabilities from `counted_rows`, and those of a reference with the same head in the same pass.

    skip_common: without gradients for predictions that count in both responses of a pair.
    """

    def compute(part: slice) -> tuple[Tensor, Tensor | None]:
        if ref_rows is None:
            return head.logps(rows[part], targets[part], backend), None
        return head.logps_pair(rows[part], ref_rows[part], targets[part], backend)

    targets = counted_targets(layout, distinct)
    if distinct is None:
        return compute(slice(None))
    if not (skip_common and distinct.in_pair):
        logps, ref_logps = compute(slice(None))
    else:
        with torch.no_grad():
            logps, ref_logps = compute(slice(distinct.in_pair))
        others, ref_others = compute(slice(distinct.in_pair, None))
        logps = torch.cat([logps, others])
        ref_logps = None if ref_logps is None or ref_others is None else torch.cat([ref_logps, ref_others])
    return logps[distinct.inverse], None if ref_logps is None else ref_logps[distinct.inverse]


def tree_inputs(model: nn.Module, model_inputs: Mapping[str, Any], tree: TokenTree, route: str) -> dict[str, Any]:
    """Model inputs with positions and attention for a tree; a plain one's are left as they are.

    route: how attention is told who sees whom, see `aspo.shared_prefix.attention.routes_to_try`.
    """
    if tree.is_plain:
        return dict(model_inputs)
    outer = base_model(model)
    positions = tree_positions(outer, model_inputs, tree)
    blocks = bidirectional_blocks(outer, model_inputs, tree)
    device = model_inputs["input_ids"].device
    attention = tree_attention_inputs(outer, tree, device, route, blocks)
    return {**model_inputs, "position_ids": positions.to(device), **attention}


def tree_positions(model: Any, model_inputs: Mapping[str, Any], tree: TokenTree) -> Tensor:
    """(R, T) positions, or (3, R, T) where the model has multimodal ones; every branch goes on from its prefix's end.

    The multimodal positions of the prefixes are the model's own (`get_rope_index`); branches are text.
    """
    trunk = model.base_model
    if not hasattr(trunk, "get_rope_index"):
        return tree.positions + (model.config.model_type in ONE_BASED)
    width = max(item.prefix for item in tree.items)
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    prefixes = {
        name: torch.stack(
            [
                nn.functional.pad(value[item.row, item.start : item.start + item.prefix], (0, width - item.prefix))
                for item in tree.items
            ]
        )
        for name, value in model_inputs.items()
        if name in per_token
    }
    grids = {name: value for name, value in model_inputs.items() if name.endswith("_grid_thw")}
    of_prefixes, _ = trunk.get_rope_index(**prefixes, **grids)
    positions = of_prefixes.new_zeros(3, *tree.shape)
    for index, branch, row, columns in tree.segments():
        of_prefix = of_prefixes[:, index, : tree.items[index].prefix]
        if branch == 0:
            positions[:, row, columns] = of_prefix
        else:
            length = columns.stop - columns.start
            positions[:, row, columns] = of_prefix.max() + 1 + torch.arange(length, device=positions.device)
    return positions


def bidirectional_blocks(model: Any, model_inputs: Mapping[str, Any], tree: TokenTree) -> Tensor | None:
    """(R, T) ids of blocks whose tokens all see each other, -1 = causal; None where the model has no such blocks.

    Gemma-3: the tokens of one image. PaliGemma: the whole prompt.
    """
    kind, types = model.config.model_type, model_inputs.get("token_type_ids")
    if types is None or kind not in ("gemma3", "paligemma"):
        return None
    if kind == "paligemma":
        in_prompt = (types == 0) & (model_inputs["attention_mask"] == 1)
        return torch.where(in_prompt, tree.item_ids.to(types.device), -1)
    image = types == 1
    starts = image & ~nn.functional.pad(image, (1, 0))[:, :-1]
    return torch.where(image, starts.flatten().cumsum(0).view_as(types) - 1, -1)


def parts_of(batch: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The grids of a batch: its parts, or the batch itself."""
    return batch.get("parts", [batch])


def objective_inputs(
    batch: Mapping[str, Any],
    numbers: TokenNumbers,
    backend: str,
    reads: Collection[str] = (),
    pair_tokens: float | None = None,
) -> objectives.Inputs:
    """What an objective reads: the forward's numbers and the batch's own columns.

    reads: `Objective.reads`. Rows may be without token scores, a whole batch of them too: none says anything then.
    """
    columns: dict[str, Any] = {name: batch.get(name) for name in COLUMNS}
    if "token_scores" in reads and columns["token_scores"] is None:
        columns["token_scores"] = torch.zeros_like(numbers.logps)
    return objectives.Inputs(
        layout=batch["layout"], backend=backend, pair_tokens=pair_tokens, **columns, **numbers._asdict()
    )


def mean_pair_tokens(batches: Sequence[Mapping[str, Any]], accelerator: Any) -> float:
    """The mean of |y_c| + |y_r| over the pairs of some batches, on all processes (a collective call)."""
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in batches:  # none: this process has none
        layout = batch["layout"]  # on the device already: one wait for it, at the end
        total[0] += torch.where(layout.role < 2, layout.response_token_offsets.diff(), 0).sum().to(total.device)
        total[1] += layout.num_items
    total = accelerator.reduce(total, "sum")
    return float(total[0] / total[1])


def batch_to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A collated batch's model inputs and layout on a device; the rest as it is."""
    if "parts" in batch:
        raise ValueError("this batch is in parts: make it with forward_tokens=None")
    inputs = {name: value.to(device) for name, value in batch["model_inputs"].items()}
    return {**batch, "model_inputs": inputs, "layout": batch["layout"].to(device)}
