"""What the reference's log-probabilities depend on besides the row: `reference_settings`, and a hash of all weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from aspo.model import base_model
from aspo.prompts import template_of, tokenizer_of
from aspo.reference.logp_cache import HASHED

PLAIN_ROUTE = "one response a row"
WORDS = 1 << 17  # int64 words of weights in one checksum: 1 MiB, which a CPU's cache holds
SAMPLE = 64  # numbers of a tensor in `weights_sample`
# What does not change log-probabilities, or is a setting of its own.
IGNORED_CONFIG = {"transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
IGNORED_CONFIG |= {"pad_token_id", "bos_token_id", "eos_token_id"}


def reference_settings(
    model: nn.Module,
    processor: Any,
    *,
    max_length: int | None,
    autocast: torch.dtype | None = None,
    route: str = PLAIN_ROUTE,
    responses: Sequence[str] = ("chosen", "rejected"),
) -> dict[str, Any]:
    """Everything but the row that the reference's log-probabilities depend on, by the name that errors call it.

    Args:
        model: the reference; of a LoRA model its base. Whole: before FSDP or ZeRO-3 cut its weights up.
        autocast: the type of mixed precision, where it is on.
        route: how batches are laid out (shared prefix, packing) and attention is told; it changes rounding only.
        responses: the collator's.
    """
    outer = base_model(model)
    return {
        "format": 1,
        "model weights": weights_hash(model),
        **processor_settings(model, processor),
        "dtype": " ".join(sorted({_name(t.dtype) for _, t in _base_tensors(model) if t.is_floating_point()})),
        "autocast": "off" if autocast is None else _name(autocast),
        "attention": _attention(outer.config),
        "route": route,
        "max_length": max_length,
        "responses": list(responses),
    }


def processor_settings(model: nn.Module, processor: Any) -> dict[str, str]:
    """Hashes of what makes a model's inputs out of rows, and of its configuration."""
    tokenizer = tokenizer_of(processor)
    parts = processor.to_dict() if processor is not tokenizer else {}
    return {
        "model configuration": _hashed(_without(base_model(model).config.to_dict(), IGNORED_CONFIG)),
        "image processor": _hashed(parts.pop("image_processor", None)),
        "processor": _hashed(_without(parts, {"processor_class"})),
        "tokenizer": _hashed(_vocabulary(tokenizer)),
        "chat template": _hashed(template_of(processor)),
    }


def weights_sample(model: nn.Module) -> str | None:
    """A hash of some numbers of each of the base model's tensors: another model has others, and a large one is not read
    through. None where the weights are in shards."""
    digest = hashlib.sha256()
    for name, tensor in _base_tensors(model):
        if _is_cut(tensor):
            return None
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLE)].cpu().double()
        digest.update(f"{name} {tuple(tensor.shape)} {some.tolist()}".encode())
    return HASHED + digest.hexdigest()[:32]


def weights_hash(model: nn.Module) -> str:
    """A hash of the base model's state dict: names, types, shapes and every bit of every tensor.

    Computed where the weights are: a tensor's bytes, as int64 words x, become the sums of x_i * m_i modulo 2^64 over
    each MiB, with fixed odd m_i; integers add up to the same in any order and on any device. A change of one word is
    always seen, changes of several go unseen with probability about 2^-64 (unless made for it: this guards against
    mistakes, not against an attacker).
    """
    seed = hashlib.shake_128(b"aspo").digest(8 * WORDS)
    multipliers: dict[torch.device, Tensor] = {}
    digest = hashlib.sha256()
    for name, tensor in _base_tensors(model):
        if _is_cut(tensor):
            raise ValueError(f"the weight {name} is not whole here: hash the weights before they are sharded")
        if tensor.device not in multipliers:
            odd = torch.frombuffer(bytearray(seed), dtype=torch.int64) | 1
            multipliers[tensor.device] = odd.to(tensor.device)
        sums = _checksums(tensor.detach(), multipliers[tensor.device])
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sums.tolist()}".encode())
    return HASHED + digest.hexdigest()[:32]


def _is_cut(tensor: Tensor) -> bool:
    return tensor.is_meta or type(tensor).__name__ == "DTensor" or hasattr(tensor, "ds_id")


def _checksums(tensor: Tensor, multipliers: Tensor) -> Tensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if data.numel() % 8 or data.storage_offset() % 8:
        data = nn.functional.pad(data, (0, -data.numel() % 8)).clone()
    sums = [(chunk * multipliers[: len(chunk)]).sum() for chunk in data.view(torch.int64).split(WORDS)]
    return torch.stack(sums) if sums else data.new_empty(0)


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """State dict of the base model, under the names that it has without an adapter."""
    prefix = model.base_model.prefix if isinstance(model, PeftModel) else None
    for name, tensor in base_model(model).state_dict().items():
        if prefix is not None:
            if prefix in name or ".modules_to_save." in name:
                continue
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if isinstance(tensor, Tensor):
            yield name, tensor


def _attention(config: Any) -> str:
    """The model's attention implementation, and its parts' where they differ: "sdpa, vision_config eager"."""
    own = str(getattr(config, "_attn_implementation", None))
    parts = {name: getattr(getattr(config, name, None), "_attn_implementation", None) for name in config.sub_configs}
    return ", ".join([own, *(f"{name} {part}" for name, part in sorted(parts.items()) if part not in (None, own))])


def _vocabulary(tokenizer: Any) -> dict[str, Any]:
    """A fast tokenizer's whole definition, without the padding that the last call left in it; a slow one's words."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    return {**_without(definition, {"padding", "truncation"}), "ends": [tokenizer.bos_token, tokenizer.eos_token]}


def _without(value: Any, names: Set[str]) -> Any:
    """A nested dict without these keys and without private ones."""
    if not isinstance(value, Mapping):
        return value
    return {k: _without(v, names) for k, v in value.items() if k not in names and not str(k).startswith("_")}


def _hashed(value: Any) -> str:
    return HASHED + hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
