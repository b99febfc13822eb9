"""The checks of SentenceLayout, one kind of mistake each; the error names the first wrong entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aspo_kernels.layout import SentenceLayout


def check_integer(**tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name} must hold integers, got {value.dtype}")
        if not value.dtype.is_signed:  # -100 would be another number, 156 in uint8
            raise ValueError(f"{name} must hold integers with a sign, got {value.dtype}")


def check_shapes(layout: SentenceLayout) -> None:
    for name in ("targets", "hidden_index", "sentence_offsets", "response_offsets", "group", "role"):
        value = getattr(layout, name)
        if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype != torch.int64:
            got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} must be a 1-D int64 tensor, got {got}")
        if value.device != layout.targets.device:
            raise ValueError(f"{name} is on {value.device} but targets on {layout.targets.device}")
    for name, other in (("hidden_index", "targets"), ("role", "group")):
        if getattr(layout, name).numel() != getattr(layout, other).numel():
            raise ValueError(
                f"{name} has {getattr(layout, name).numel()} entries but {other} {getattr(layout, other).numel()}"
            )
    if layout.sentence_offsets.numel() < 1 or layout.response_offsets.numel() < 1:
        raise ValueError("sentence_offsets and response_offsets need at least the entry 0")
    if layout.num_responses != layout.group.numel():
        raise ValueError(f"response_offsets describes {layout.num_responses} responses, group {layout.group.numel()}")
    mask = layout.perplexity_mask
    if mask is not None and (mask.shape != layout.targets.shape or mask.dtype != torch.bool):
        raise ValueError(f"perplexity_mask must be bool {tuple(layout.targets.shape)}, got {mask.dtype} {mask.shape}")


def check_offsets(name: str, offsets: Tensor, total: int) -> None:
    backwards = torch.nonzero(offsets.diff() < 0).flatten()
    if backwards.numel():
        at = int(backwards[0]) + 1
        raise ValueError(f"{name}[{at}] = {int(offsets[at])} is less than the entry before it")
    if int(offsets[0]) != 0 or int(offsets[-1]) != total:
        raise ValueError(f"{name} must run from 0 to {total}, got {int(offsets[0])} to {int(offsets[-1])}")


def check_groups(group: Tensor, role: Tensor) -> None:
    if not group.numel():
        return
    responses, at = role.numel(), int(role.argmax())
    if int(role[at]) >= responses:  # nothing may be made as large as a number that is wrong
        raise ValueError(f"role[{at}] is {int(role[at])}, but there are {responses} responses: roles count 0, 1, 2..")
    num_items = min(int(group.max()) + 1, responses + 1)  # of one more than there are responses, one has none
    chosen = torch.bincount(group[(role == 0) & (group < num_items)], minlength=num_items)
    wrong = torch.nonzero(chosen != 1).flatten()
    if wrong.numel():
        item = int(wrong[0])
        raise ValueError(f"item {item} has {int(chosen[item])} chosen responses (role 0); it needs exactly one")


def check_sentence_steps(step: Tensor, first_of_row: Tensor, row: Tensor, column: Tensor, ids: Tensor) -> None:
    """The first id of a row must be 0, and every later one the same as before it or one more."""
    wrong = torch.nonzero(torch.where(first_of_row, step != 0, (step != 0) & (step != 1))).flatten()
    if not wrong.numel():
        return
    n = int(wrong[0])
    where = f"sentence_ids[{int(row[n])}, {int(column[n])}] = {int(ids[n])}"
    if bool(first_of_row[n]):
        raise ValueError(f"{where} is the first counted position of its row; sentence ids start at 0")
    before = int(ids[n - 1])
    kind = "goes backwards" if int(step[n]) < 0 else "leaves a gap"
    raise ValueError(f"{where} {kind} after {before}; ids count 0, 1, 2.. within a row")
