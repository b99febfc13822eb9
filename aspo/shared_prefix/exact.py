"""Whether shared and packed batches are exact for a model: measured on its first rows, not assumed.

Axes: R rows and T columns of the grid, N counted tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aspo.config import AspoConfig
from aspo.data import Collator, Row
from aspo.model import head_module, inference, output_head, trunk_hidden
from aspo.processes import inside, of_all
from aspo.shared_prefix.attention import routes_to_try, set_text_attention, with_route
from aspo.shared_prefix.forward import batch_to, counted_logps, counted_rows, tree_inputs
from aspo_kernels import SentenceLayout

logger = logging.getLogger(__name__)

MIN_SAVING = 1.05  # with `auto`: plain rows' tokens over shared ones below which a batch is not worth sharing
NOISE_FACTOR = 4  # a shared forward may differ from a plain one by this many times what one more pad token changes
# Rounding steps of the largest log-probability that count as noise where a pad token changes nothing, as on a CPU.
# SmolLM2-135M (30 layers): at most 3.2 steps in fp32, 1.1 in bf16; on average 1/16 and 1/45 of that.
ROUNDINGS = {torch.float32: 4, torch.float64: 4}
MEAN_SHARE = 20


def settle_sharing(
    model: nn.Module,
    collator: Collator,
    rows: Sequence[Row],
    args: AspoConfig,
    autocast: torch.dtype | None = None,
) -> str:
    """Set a collator's shared_prefix and padding_free as `args` say and the model can; returns the attention's route.

    `shared_prefix: auto` falls back to plain rows, saying why, and leaves batches plain where sharing saves nearly
    nothing. Raises ValueError where something that was asked for is not exact for the model. All processes call this
    together and settle the same: unlike accelerators may measure unlike things.
    """
    collator.padding_free = args.padding_free
    budget = getattr(args, "token_budget", None)  # of shared tokens, and must be kept; TRL's configuration has none
    collator.min_saving = MIN_SAVING if args.shared_prefix == "auto" and budget is None else 1.0
    if args.shared_prefix == "off" and not args.padding_free:
        if args.prefix_attention != "auto":
            raise ValueError(
                f"prefix_attention is {args.prefix_attention!r}, but shared_prefix and padding_free are off: drop it"
            )
        return "mask"
    first, *others = of_all(
        lambda: routes_to_try(model, args.prefix_attention, dtype=autocast, longest=args.max_length)
    )
    routes = [route for route in first if all(route in other for other in others)]  # any model can take "mask"
    own = with_route(model, routes[0])
    reasons: list[str] = []
    for shared in [True] * (args.shared_prefix != "off") + [False] * (args.shared_prefix != "on"):
        collator.shared_prefix = shared
        if not shared and not args.padding_free:
            set_text_attention(model, own)
            logger.warning("shared_prefix: off, because %s", "; ".join(reasons))
            return "mask"
        for route in routes:
            with_route(model, route)
            with torch.autocast(next(model.parameters()).device.type, autocast, enabled=autocast is not None):
                reason = reason_of_any(check_tree(model, collator, rows, route, autocast))
            if reason is None:
                if not shared and args.shared_prefix == "auto":
                    logger.warning("shared_prefix: off, because %s", "; ".join(reasons))
                return route
            reasons.append(f"{'shared' if shared else 'packed'} rows by {route} attention: {reason}")
    option = "shared_prefix on" if args.shared_prefix == "on" else "padding_free"
    raise ValueError(f"{option} is not exact for this model; turn it off. {'; '.join(reasons)}")


def reason_of_any(reason: str | None) -> str | None:
    """This process's reason, or that of the first one that has any, so that all share or none. A collective call."""
    reasons = of_all(lambda: reason)
    found = [f"{why} (in process {rank})" for rank, why in enumerate(reasons) if why is not None]
    return reason if len(found) in (0, len(reasons)) else found[0]


def check_tree(
    model: nn.Module, collator: Collator, rows: Sequence[Row], route: str, autocast: torch.dtype | None = None
) -> str | None:
    """Why a collator's shared or packed batches are not exact for this model; None where they are.

    On `rows`, without gradients and without dropout:
    - log-probabilities agree with plain rows within NOISE_FACTOR times what one more pad token changes there, or what
      rounding does (ROUNDINGS steps of the largest one), and on average within a MEAN_SHARE-th of that;
    - other chosen tokens do not move the rejected response, nor another row.
    """
    collator, plain = copy.copy(collator), copy.copy(collator)
    collator.min_saving = 1.0
    plain.shared_prefix = plain.padding_free = False
    collator.reference = plain.reference = None
    # Nothing cached, and no images of a response's own: with those alone nothing would be shared, and nothing checked.
    left_out = ["negative_images", *(f"{c}_images" for c in collator.responses)]
    left_out += [f"ref_{c}_logps" for c in collator.responses]
    rows = [{name: value for name, value in row.items() if name not in left_out} for row in rows]
    device = next(model.parameters()).device
    with inference(model):
        batch, expected_batch = batch_to(collator(rows), device), batch_to(plain(rows), device)
        if batch["tree"].is_plain:
            return None
        expected = _logps(model, expected_batch, route)
        noise = (_logps(model, _one_more_pad(expected_batch), route) - expected).abs().max()
        try:
            logps = _logps(model, batch, route)
            moved = _logps(model, _other_chosen(batch), route)
        except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError) as error:
            return f"the model cannot run it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    dtype = next(head_module(model).parameters()).dtype if autocast is None else autocast
    rounding = ROUNDINGS.get(dtype, 1) * torch.finfo(dtype).eps * expected.abs().max()
    tolerance = NOISE_FACTOR * torch.maximum(noise, rounding)
    reasons = []
    difference = (logps - expected).abs()
    if not (difference.max() <= tolerance and difference.mean() <= tolerance / MEAN_SHARE):
        reasons.append(
            f"its log-probabilities differ by {float(difference.max()):.2g} nats ({float(difference.mean()):.2g} on "
            f"average) from those of plain rows, where one more pad token makes {float(noise):.2g} (linear-attention "
            "or state-space layers, image attention that sees the prefix's end, or absolute positions do this)"
        )
    leak = (moved - logps).abs()[~_of_first_chosen(batch["layout"])].max()
    if not leak <= tolerance:
        reasons.append(f"other chosen tokens move the log-probabilities of other responses by {float(leak):.2g} nats")
    return "; ".join(reasons) or None


def _logps(model: nn.Module, batch: Mapping[str, Any], route: str) -> Tensor:
    """(N,) log-probabilities of a batch on the model's device."""
    inputs = tree_inputs(model, batch["model_inputs"], batch["tree"], route)
    rows = counted_rows(trunk_hidden(model, inputs), batch["layout"])
    return inside(
        head_module(model), lambda rows: counted_logps(output_head(model), rows, None, batch["layout"])[0], rows
    )


def _one_more_pad(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A plain batch with one more pad token behind every row."""
    inputs, layout = batch["model_inputs"], batch["layout"]
    rows, width = batch["tree"].shape
    grid = {name: nn.functional.pad(x, (0, 1)) for name, x in inputs.items() if x.shape == (rows, width)}
    index = layout.hidden_index + layout.hidden_index // width
    wider = dataclasses.replace(batch["tree"], shape=(rows, width + 1))
    layout = SentenceLayout(
        layout.targets, index, layout.sentence_offsets, layout.response_offsets, layout.group, layout.role
    )
    return {**batch, "model_inputs": {**inputs, **grid}, "tree": wider, "layout": layout}


def _other_chosen(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with other tokens in the first item's first branch."""
    first = batch["tree"].items[0]
    ids = batch["model_inputs"]["input_ids"].clone()
    columns = slice(first.branch_start(0), first.branch_start(0) + first.branches[0])
    ids[first.row, columns] = ids[first.row, columns].roll(1)
    return {**batch, "model_inputs": {**batch["model_inputs"], "input_ids": ids}}


def _of_first_chosen(layout: SentenceLayout) -> Tensor:
    """(N,) bool, the tokens of item 0's chosen response."""
    which = torch.nonzero((layout.role == 0) & (layout.group == 0)).flatten()
    offsets = layout.response_token_offsets
    mask = torch.zeros_like(layout.targets, dtype=torch.bool)
    for response in which.tolist():
        mask[offsets[response] : offsets[response + 1]] = True
    return mask
