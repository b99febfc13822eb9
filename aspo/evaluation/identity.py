"""What answers depend on besides rows and options, as a hash: by it kept ones are known to be the model's own."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from aspo.model import base_model
from aspo.reference.settings import processor_settings

# Of an adapter's configuration what changes no answer: where its base lay, who wrote it, and whether it may train.
IGNORED_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "peft_version"}


def model_identity(model: torch.nn.Module, processor: Any) -> str:
    """A hash of the model's weights, its configuration and its adapters' (a LoRA's scale is no weight), the tokens
    that end an answer, and all that makes inputs out of rows: tokenizer, chat template, image processor.

    It is the same wherever the model lies.
    """
    ends = getattr(getattr(base_model(model), "generation_config", None), "eos_token_id", None)
    adapters = {
        name: {key: value for key, value in config.to_dict().items() if key not in IGNORED_ADAPTER}
        for name, config in (getattr(model, "peft_config", None) or {}).items()
    }
    parts = [fingerprint(model), processor_settings(model, processor), ends, adapters]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of all weights and buffers, adapters included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A set in an order that is the same in every process; what else JSON has no form for, as text."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
