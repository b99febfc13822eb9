"""What is trained and what it is compared with: LoRA or full fine-tuning, the frozen reference, dropout."""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_liger_kernel_available

from aspo import trust
from aspo.config import AspoConfig
from aspo.model import base_model, load_model

MERGE = (
    "merge it into its base first: "
    "peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)"
)


@dataclass(frozen=True)
class LoraOptions:
    """What `add_lora` reads, for trainers that have no AspoConfig."""

    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: list[str] | None = None
    lora_dropout: float = field(default=0.0, init=False)
    use_dora: bool = field(default=False, init=False)


def policy_and_reference(
    model: nn.Module, args: AspoConfig, ref_model: nn.Module | None, needs_reference: bool
) -> tuple[nn.Module, nn.Module | None]:
    """The model to train, and the reference (None = the policy with its adapter off, or not needed).

    In full fine-tuning what is frozen stays frozen, unless all of it is (of the vision tower: with freeze_vision off).
    """
    if isinstance(model, PeftModel):
        if not args.use_lora or not isinstance(model.base_model, LoraModel):
            kind = type(model.base_model).__name__
            raise ValueError(
                f"the model has an adapter ({kind}), and use_lora is {args.use_lora}: to train it, {MERGE}"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(f"the start model is an adapter that is trained already; to start from it, {MERGE}")
        if needs_reference and ref_model is None:
            _check_base_is_kept(model)
        return model, ref_model
    if args.use_lora:
        return add_lora(model, args), ref_model
    if needs_reference and ref_model is None:
        ref_model = _copy(model, args)
    _let_train(model)  # merge_and_unload, for one, leaves all of it frozen
    if isinstance(vision := vision_tower(model), nn.Module):
        if args.freeze_vision:
            vision.requires_grad_(False)
        else:
            _let_train(vision)
    return model, ref_model


def _let_train(module: nn.Module) -> None:
    if not any(p.requires_grad for p in module.parameters()):
        module.requires_grad_(True)


def _check_base_is_kept(model: PeftModel) -> None:
    """ValueError where weights train that are still there, as trained, with the adapter off: the reference's own."""
    of_adapter = ("lora_", "modules_to_save", "trainable_tokens")
    base = [n for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in of_adapter)]
    if base:
        raise ValueError(
            f"{len(base)} weights of the adapter's base model train too, {base[0]} for one (LoraConfig's bias?), and "
            'the reference is that base: give LoraConfig bias="none", or pass ref_model, or set '
            "precompute_ref_log_probs"
        )


def _copy(model: Any, args: AspoConfig) -> nn.Module:
    """The model once more; loaded again where ZeRO-3 has it in shards already, which cannot be copied."""
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        return copy.deepcopy(model)
    if args.model_name_or_path is None:
        raise ValueError(
            "ZeRO-3 loads a model in shards, which cannot be copied: pass ref_model, or model_name_or_path"
        )
    options: dict[str, Any] = {"attn_implementation": args.attn_implementation}
    return load_model(args.model_name_or_path, args.weights_dtype(), **options)[0]


def merge_adapter(base: str, adapter: str | Path, folder: Path, dtype: str | None = "auto") -> Path:
    """Write a model with an adapter merged into its weights, and its processor, to `folder`: whole or not at all.

    A folder that is there is replaced. The merge is done on the CPU.
    """
    loaded: Any
    loaded, processor = load_model(str(adapter), dtype, base=base, device="cpu")
    partial = folder.with_name(folder.name + ".part")
    loaded.merge_and_unload().save_pretrained(partial)
    processor.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    return partial.rename(folder)


def vision_tower(model: Any) -> nn.Module | None:
    """The image encoder of a vision-language model, or None."""
    outer = base_model(model)
    encoder = outer.get_encoder(modality="image")
    return None if encoder is outer or encoder is outer.base_model else encoder


def add_lora(model: Any, args: AspoConfig | LoraOptions) -> PeftModel:
    """`model` with fresh LoRA layers, which start as no change at all."""
    config = LoraConfig(
        r=args.lora_r or 0,
        lora_alpha=args.lora_alpha or 0,
        lora_dropout=args.lora_dropout or 0.0,
        use_dora=bool(args.use_dora),
        target_modules=lora_targets(model, args.lora_target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft asks transformers by a name that newer versions call deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def lora_targets(model: Any, names: Sequence[str] | None = None) -> str:
    """A regular expression over module names: the linear layers of the language model, all or those named.

    The vision tower has layers of the same names (q_proj, ...), and stays out; a single name that is a regular
    expression itself is returned as it is.
    """
    if names and len(names) == 1 and re.search(r"[.*+?|()\[\]\\^$]", names[0]):
        return names[0]
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = {name.rpartition(".")[2] for name, m in decoder.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    missing = sorted(set(names or ()) - linear)
    if missing:
        raise ValueError(
            f"lora_target_modules: {missing[0]!r} is no linear layer of the language model; it has "
            f"{', '.join(sorted(linear))} (the output head cannot be adapted)"
        )
    return rf"{re.escape(prefix)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(names or linear)))})"


def check_attention(model: nn.Module) -> None:
    """Raise for flash-attention on models whose image or prompt tokens see each other both ways: it drops that."""
    config: Any = base_model(model).config
    own = str(config.get_text_config()._attn_implementation)
    if config.model_type in ("gemma3", "paligemma") and own.startswith("flash"):
        raise ValueError(
            f"attn_implementation={own!r} leaves out the image mask of {config.model_type}, and would train another "
            "model (PaliGemma's responses would see their own future): use sdpa or eager"
        )


def check_liger(model: nn.Module, device: torch.device) -> None:
    """Raise where Liger's kernels would be left out without a word: no such package, model type or device.

    device: where the model is trained, which it is not moved to yet.
    """
    outer: Any = base_model(model)
    if not is_liger_kernel_available():
        raise ValueError("use_liger_kernel is on, but liger-kernel is not installed: pip install liger-kernel")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if outer.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"Liger has no kernels for models of type {outer.config.model_type!r}: turn use_liger_kernel off"
        )
    if device.type == "cpu":
        raise ValueError("use_liger_kernel is on, but Liger's kernels need a GPU and the model is trained on the CPU")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: of Dropout modules, and the numbers that attention layers keep."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def load_weights(model: Any, folder: str) -> None:
    """Read a checkpoint's weights into `model`, all of them.

    Through `from_pretrained`, which knows the names under which a model is saved. Trainer compares the bare names: of a
    LLaVA none match, and it would go on from the start weights with no more than a warning. The shapes are the
    model's own: where config.json is gone, a LLaVA's default of 7B parameters would be made.
    """
    saved = trust.model(type(model), folder, config=copy.deepcopy(model.config), dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
