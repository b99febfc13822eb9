"""Checkpoints of loops of our own: adapter, optimiser and what else a loop needs, as safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from aspo.resume import write_json

ADAPTER_FILE, OPTIMIZER_FILE = "adapter_model.safetensors", "optimizer.safetensors"
TENSORS_FILE, STATE_FILE = "tensors.safetensors", "state.json"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the last one last (a checkpoint gets its name when it is complete)."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def save_checkpoint(
    folder: Path,
    number: int,
    policy: PeftModel,
    optimizer: torch.optim.Optimizer,
    state: Any,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `folder`/checkpoint-<number>, whole or not at all, and remove older ones.

    One of that number is replaced when the new one is complete. state: anything JSON can hold.
    """
    target = folder / f"checkpoint-{number}"
    partial = target.with_name(target.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(str(partial))
    kept = optimizer.state_dict()["state"]
    moments = {f"{index}.{name}": value for index, values in kept.items() for name, value in values.items()}
    for name, group in ((OPTIMIZER_FILE, moments), (TENSORS_FILE, dict(tensors or {}))):
        save_file({key: value.detach().cpu().contiguous() for key, value in group.items()}, partial / name)
    write_json(partial / STATE_FILE, state)
    shutil.rmtree(target, ignore_errors=True)  # not before: it may be the only one there is
    partial.rename(target)
    for old in checkpoints(folder)[:-1]:
        shutil.rmtree(old)


def load_checkpoint(
    checkpoint: Path, policy: PeftModel, optimizer: torch.optim.Optimizer
) -> tuple[Any, dict[str, Tensor]]:
    """Put a checkpoint of `save_checkpoint` back, to the same bits; returns its state and its tensors."""
    set_peft_model_state_dict(policy, load_file(checkpoint / ADAPTER_FILE))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(checkpoint / OPTIMIZER_FILE).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")), load_file(checkpoint / TENSORS_FILE)
