"""Before and at the first step: which batches the model takes, and that the run begins where it should."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from aspo.columns import PAIRED, UNPAIRED
from aspo.config import AspoConfig
from aspo.data import Collator
from aspo.folder import image_entries
from aspo.policy import MERGE
from aspo.readings import Row
from aspo.shared_prefix.attention import with_route
from aspo.shared_prefix.exact import check_tree, reason_of_any, settle_sharing
from aspo_kernels import SentenceLayout, objectives

ROWS_TO_CHECK, ROWS_TO_LOOK_AT = 2, 64  # on which sharing is tried: one with an image, if there is one among the first
START_TOLERANCE = 0.02  # of the loss where policy = reference; rounding is far below, a wrong reference far above


def every_dataset(train: Any, evaluation: Any) -> list[Any]:
    """The data sets that are there; an evaluation may be several by name."""
    several = list(evaluation.values()) if isinstance(evaluation, Mapping) else [evaluation]
    return [dataset for dataset in (train, *several) if dataset is not None]


def autocast_dtype(accelerator: Any) -> torch.dtype | None:
    """What mixed precision computes in; None where it is off."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(accelerator.mixed_precision))


def first_rows(datasets: Sequence[Any]) -> list[Row]:
    """The rows on which sharing is tried; none where no data set has any."""
    found = next((rows for d in datasets if (rows := list(itertools.islice(d, ROWS_TO_LOOK_AT)))), [])
    # An alternative's log-probabilities hang on the chosen response by design: no leak.
    found = [{k: v for k, v in row.items() if k != "chosen_alternative_ids"} for row in found]
    with_image = next((n for n, row in enumerate(found) if image_entries(row)), 0)
    return [*found[with_image : with_image + 1], *found[:with_image], *found[with_image + 1 :]][:ROWS_TO_CHECK]


# Objective -> the column without which it would be another one.
COLUMNS_OF = {
    **dict.fromkeys(("misp", "mdpo", "chip"), ("negative_images", "`aspo negatives`")),
    "povid": ("chosen_alternative_ids", "`aspo pairs --method povid`"),
    **dict.fromkeys(("fisao", "weighted_dpo", "ddpo"), ("chosen_token_scores", "`aspo rewards`")),
}


ONE_NEGATIVE = {"mdpo", "chip", "povid"}  # objectives that read one reading under another image, and no more


def check_columns(objective_names: Sequence[str], options: Mapping[str, Any], rows: Any) -> None:
    """ValueError where rows lack a column that one of the objectives lives on, or none has a value in it.

    Of a stream the first row is looked at, of a list the first ROWS_TO_LOOK_AT (all, as long as none has a value).
    """
    columns = getattr(rows, "column_names", None)
    if columns is None:
        first = itertools.islice(iter(rows), ROWS_TO_LOOK_AT if hasattr(rows, "__len__") else 1)
        columns = {column for row in first for column in row}
    needed = [(name, *COLUMNS_OF[name]) for name in objective_names if name in COLUMNS_OF]
    if options.get("weights") == "given":
        needed.append(("weights='given'", "chosen_sentence_weights", "a source of your own"))
        if options.get("rejected_side", "whole") != "whole":
            needed.append(("weights='given' on both sides", "rejected_sentence_weights", "a source of your own"))
    if "chip" in objective_names and options.get("segment_weight", 1.0) != 1.0:
        needed.append(("chip's segment_weight", *COLUMNS_OF["fisao"]))
    for name, column, maker in needed:
        if column not in columns:
            raise ValueError(f"{name} reads the column {column!r}, which the rows have not: make it with {maker}")
        if hasattr(rows, "__len__") and not _has_a_value(rows, column):
            raise ValueError(
                f"{name} reads the column {column!r}, which is empty in all {len(rows)} rows: make it with {maker}"
            )


def _has_a_value(rows: Any, column: str) -> bool:
    """Whether any row has something in a column of lists; ends at the first one.

    No scores are a value: an answer may have no word that is scored.
    """
    alone = rows.select_columns([column]) if hasattr(rows, "select_columns") else rows
    may_be_empty = column.endswith("_token_scores")
    return any(row.get(column) is not None and (may_be_empty or len(row[column])) for row in alone)


def check_unpaired(args: AspoConfig, train: Any, evaluation: Any) -> None:
    """ValueError where a forward pass would hold a single response: KTO compares each with one to another prompt."""
    sizes = args.per_device_train_batch_size, args.per_device_eval_batch_size
    datasets = [(train, sizes[0])] if train is not None else []
    datasets += [(rows, sizes[1]) for rows in every_dataset(None, evaluation)]
    if args.world_size > 1:  # the last round's rows are dealt out, one by one in the end
        uneven = [
            rows for rows, size in datasets if not hasattr(rows, "__len__") or len(rows) % (size * args.world_size)
        ]
        if uneven and not args.dataloader_drop_last:
            raise ValueError(
                "kto compares each response with one to another prompt in the same pass, and the last rows are dealt "
                "out over the processes, so that one may be alone: turn dataloader_drop_last on"
            )
    alone = [rows for rows, size in datasets if not hasattr(rows, "__len__") or len(rows) % size == 1]
    fix = None
    if args.precompute_ref_log_probs:
        fix = "precompute_ref_log_probs keeps a row's own responses only: turn it off"
    elif args.token_budget is not None:
        fix = "token_budget may leave one alone: give per_device_train_batch_size instead"
    elif min(sizes) < 2:
        fix = "per_device_train_batch_size and per_device_eval_batch_size must be at least 2"
    elif alone and not args.dataloader_drop_last:
        last = f"the last of {len(alone[0])} rows would" if hasattr(alone[0], "__len__") else "a stream's last row may"
        fix = f"{last} be alone: turn dataloader_drop_last on, or drop a row"
    if fix is not None:
        raise ValueError(f"kto compares each response with one to another prompt in the same pass; {fix}")


def check_roles(objective_names: Sequence[str], objective: objectives.Objective, layout: SentenceLayout) -> None:
    """ValueError where a batch has readings beyond chosen and rejected that would be computed and ignored."""
    readings = len(layout.role_responses)
    if readings > 2 and not objective.reads_negatives:
        raise ValueError(
            "the rows have more than two readings (negative_images or chosen_alternative_ids), which objective "
            f"{objective.name!r} does not read: drop the column, or use an objective that does"
        )
    readers = {name for name in objective_names if objectives.get(name).reads_negatives}
    if readings > 3 and readers <= ONE_NEGATIVE:
        raise ValueError(
            f"the rows have up to {readings - 2} negative images, and {', '.join(sorted(readers))} reads one: make "
            "them again with --count 1, or use misp"
        )


def needs_similarity(options: Mapping[str, Any]) -> bool:
    """Whether rows without similarities would change what is trained: ASPO's weights come from them."""
    # Both names are ASPO's: an objective of somebody else may call something of its own alpha.
    return options.get("weights") == "computed" and options.get("alpha", 0) > 0


def response_columns(objective: objectives.Objective) -> tuple[str, ...]:
    """The columns that hold an objective's responses: pairs, or single responses with a label."""
    return UNPAIRED if "desirable" in objective.reads else PAIRED


def length_target(objective: objectives.Objective, options: Mapping[str, Any]) -> str | None:
    """Over what ACPO averages its responses' lengths; None for objectives that do not."""
    return {**objective.options, **options}.get("target") if "pair_tokens" in objective.reads else None


def dataset_pair_tokens(collator: Any, rows: Any) -> float:
    """The mean of |y_c| + |y_r| over a data set, as batches would have them."""
    if not isinstance(collator, Collator) or not hasattr(rows, "__len__") or not len(rows):
        raise ValueError("target='dataset' needs train_dataset as rows with a length, and aspo.data.Collator")
    total = 0
    for n in range(len(rows)):
        row = {name: value for name, value in rows[n].items() if name != "negative_images"}  # roles 0 and 1 alone
        own = [answers for _, answers in collator.reading_lengths(row)]
        total += sum(length for answers in own for length in answers)
    return total / len(rows)


def settle_batches(
    model: nn.Module,
    reference: tuple[nn.Module | None, bool],
    collator: Any,
    datasets: Sequence[Any],
    args: AspoConfig,
    autocast: torch.dtype | None,
) -> str:
    """Set what the collator shares and packs, as far as the first rows show it exact; returns attention's route.

    reference: the model that is run as one, and whether it may be another kind of model and is to be checked too.
    Raises ValueError for options that nothing would read, and where what was asked for is not exact.
    """
    first = first_rows(datasets)
    if not isinstance(collator, Collator) or not first:
        if args.shared_prefix == "on" or args.padding_free or args.prefix_attention != "auto":
            needs = "train_dataset or eval_dataset, to check that it is exact"
            if first:
                needs = f"aspo.data.Collator, not {type(collator).__name__}: leave data_collator out"
            raise ValueError(
                f"shared_prefix={args.shared_prefix!r}, padding_free={args.padding_free} and "
                f"prefix_attention={args.prefix_attention!r} need {needs}"
            )
        return "mask"
    if collator.makes_trees:
        raise ValueError("shared_prefix or padding_free is on in data_collator: set it in args, which decide")
    route = settle_sharing(model, collator, first, args, autocast)
    ref_model, differs = reference
    if ref_model is not None and collator.makes_trees:
        with_route(ref_model, route)
        device = next(ref_model.parameters()).device.type
        with torch.autocast(device, autocast, enabled=autocast is not None):
            reason = reason_of_any(check_tree(ref_model, collator, first, route, autocast)) if differs else None
        if reason is not None:
            raise ValueError(f"ref_model cannot take shared or packed rows: {reason}; set shared_prefix to off")
    return route


def check_start(
    objective: objectives.Objective,
    options: Mapping[str, Any],
    inputs: objectives.Inputs,
    result: objectives.Result,
    must_be_equal: bool,
) -> float:
    """At the true step 0 policy = reference, and so the loss is what it is for equal ones (DPO: ln 2). Returns it.

    Raises ValueError where it is not and `must_be_equal`; warns otherwise.
    """
    logps = inputs.logps.detach()
    kl = None if inputs.token_kl is None else torch.zeros_like(logps)
    equal = replace(inputs, logps=logps, ref_logps=logps, token_kl=kl)
    with torch.no_grad():
        expected = float(objective(equal, **options).losses.mean())
    loss = float(result.losses.detach().mean())
    if abs(loss - expected) <= START_TOLERANCE * max(1.0, abs(expected)):
        return loss
    chosen, rejected = (float(h.mean()) for h in inputs.pair(inputs.response_logratios.detach()))
    message = (
        f"step 0: the loss is {loss:.4f}, but {expected:.4f} if the policy equalled its reference, as at the start "
        f"of a run; log-ratios: chosen {chosen:+.3f}, rejected {rejected:+.3f} nats. "
    )
    if must_be_equal:
        raise ValueError(message + "The model's forward is not deterministic, or the reference is not the start model.")
    warnings.warn(
        message + "Expected with dropout, NEFTune, a ref_model of your own or an adapter that is trained already (to "
        f"start from such an adapter, {MERGE}).",
        stacklevel=2,
    )
    return loss
