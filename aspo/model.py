"""Loading a model, its hidden states without logits, its output head, and log-probabilities.

Axes: R rows of a padded batch, T padded length, H hidden size, V vocabulary, N counted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import is_bitsandbytes_available

from aspo import trust
from aspo.data import Collator
from aspo.processes import inside
from aspo_kernels import SentenceLayout, TokenKL, gather_hidden, linear_logps, linear_logps_pair, linear_token_kl

ADAPTER_CONFIG = "adapter_config.json"
NO_HEAD = "has no output head; load it with a ...ForConditionalGeneration or ...ForCausalLM class"
MAX_HEAD_ERROR = 0.02  # of the largest logit: bf16 keeps 8 bits, a forgotten scale or softcap is far above


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device of a name; None = the accelerator that torch finds, else the CPU."""
    if device is None:
        # Asked whether it is there: by itself torch names the one that it was built for.
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch says AssertionError where it was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}; try 'cpu', or leave it out") from error


def resolve_model(name_or_path: str | Path) -> str:
    """ "world" -> the folder of the embedded model; anything else is a path or a hub name and stays as it is."""
    if str(name_or_path) != "world":
        return str(name_or_path)
    from aspo.world import assets_dir

    return str(assets_dir() / "vlm")


def load_model(
    name_or_path: str | Path,
    dtype: str | torch.dtype | None = None,
    *,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    base: str | None = None,
    load_in_4bit: bool = False,
) -> tuple[PreTrainedModel | PeftModel, Any]:
    """Load a model and its processor (a tokenizer where the model reads text only).

    Args:
        name_or_path: "world", a folder, a hub name, or a folder with an adapter (its base is loaded, then the adapter).
        dtype: "float32", "bfloat16", "float16", "auto" (as saved) or a torch dtype; float32 where it is None.
        device: where to put it; None = the accelerator if there is one, else the CPU.
        attn_implementation: passed to `from_pretrained`, e.g. "sdpa" or "eager".
        base: the base model of an adapter, where it is no longer where the adapter says.
        load_in_4bit: linear layers in 4 bits (bitsandbytes' nf4), computing in `dtype`, as QLoRA does.

    Raises ValueError for a dtype that is not one, a folder without a model, an adapter whose base is missing, 4 bits
    without CUDA or bitsandbytes, weights that are pickles, and a model that brings code of its own (`aspo.trust`).
    """
    path = resolve_model(name_or_path)
    check_model(path, base)
    if (Path(path) / ADAPTER_CONFIG).is_file():
        return _load_adapter(path, dtype, device=device, attn_implementation=attn_implementation, base=base)
    target = resolve_device(device)
    config = model_config(path)
    options: dict[str, Any] = {"dtype": parse_dtype(dtype), "attn_implementation": attn_implementation}
    if load_in_4bit:
        options |= {"quantization_config": _four_bits(target, options["dtype"]), "device_map": {"": target}}
    model = trust.model(auto_class(config), path, **options)
    moved: Any = model if load_in_4bit else model.to(target)  # type: ignore[arg-type]
    return moved.eval(), trust.pretrained(AutoProcessor, path)


def check_model(name_or_path: str | Path, base: str | None = None) -> None:
    """ValueError for a place that holds no model, and for a base of no adapter, before anything is read."""
    path = resolve_model(name_or_path)
    if (Path(path) / ADAPTER_CONFIG).is_file():
        if base is not None:
            check_model(base)
        return
    if base is not None:
        raise ValueError(f"base={base!r} was given, but {path} is no adapter: it has no {ADAPTER_CONFIG}")
    if not Path(path).exists() and (Path(path).is_absolute() or path.startswith(("./", "../")) or path.count("/") > 1):
        raise ValueError(f"there is no model folder {path}")  # a hub name has one slash at most
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} holds no model: neither config.json nor {ADAPTER_CONFIG} is in it")


def model_config(name_or_path: str | Path) -> Any:
    """The configuration of a model, which is no adapter. Raises ValueError where there is none."""
    path = resolve_model(name_or_path)
    check_model(path)
    try:
        return trust.pretrained(AutoConfig, path)
    except OSError as error:
        raise ValueError(f"the model {path!r} is no folder here, and the hub does not give it: {error}") from error


def auto_class(config: Any) -> Any:
    """transformers' class that loads models of a configuration: one that sees, or one that reads text."""
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _four_bits(device: torch.device, dtype: str | torch.dtype) -> BitsAndBytesConfig:
    if device.type != "cuda" or not is_bitsandbytes_available():
        raise ValueError(
            f"load_in_4bit needs a CUDA device and the package bitsandbytes; here are {device} and "
            f"{'bitsandbytes' if is_bitsandbytes_available() else 'no bitsandbytes'}: turn it off"
        )
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def parse_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    """The dtype argument of `from_pretrained` for an option's value."""
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; choose float32, bfloat16, float16 or auto")
    return getattr(torch, dtype)


def _load_adapter(
    path: str, dtype: str | torch.dtype | None, *, base: str | None, **options: Any
) -> tuple[PeftModel, Any]:
    base = base or PeftConfig.from_pretrained(path).base_model_name_or_path
    if base is None or (Path(base).is_absolute() and not Path(base).exists()):
        raise ValueError(
            f"the adapter {path} belongs to {base}, which is not there; load_model(..., base=its new place)"
        )
    trust.refuse_pickles(path, "adapter_model*.safetensors")
    model, processor = load_model(base, dtype, **options)
    model = PeftModel.from_pretrained(model, path).eval()
    has_own = any((Path(path) / name).is_file() for name in ("processor_config.json", "tokenizer_config.json"))
    return model, trust.pretrained(AutoProcessor, path) if has_own else processor


def base_model(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel (its LoRA layers still in place), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trunk_hidden(model: nn.Module, model_inputs: Mapping[str, Any]) -> Tensor:
    """The last hidden states after the final norm, (R, T, H): what the output head reads. No logits are built.

    Runs the model inside the ...ForConditionalGeneration / ...ForCausalLM class, which takes the images too
    (`get_decoder()` of a vision-language model would skip them). A class without such a model (InstructBLIP) is run
    itself, with the logits of the last position, and its decoder's output is taken.
    """
    outer = base_model(model)
    trunk = outer.base_model
    if trunk is not outer:
        return trunk(**model_inputs, use_cache=False, return_dict=True).last_hidden_state
    decoder = outer.get_decoder() if outer.get_output_embeddings() is not None else None
    if decoder is None or decoder is outer:
        raise ValueError(f"{type(outer).__name__} {NO_HEAD}")
    hidden: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda _module, _inputs, output: hidden.append(output[0]))
    try:
        outer(**model_inputs, use_cache=False, return_dict=True, logits_to_keep=1)
    finally:
        handle.remove()
    return hidden[0]


@dataclass(frozen=True)
class HeadParams:
    """logits = cap(logit_scale * (hidden weight^T + bias)), cap(z) = softcap * tanh(z / softcap).  weight: (V, H)."""

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logps(self, hidden: Tensor, targets: Tensor, backend: str = "auto", temperature: float = 1.0) -> Tensor:
        """(N, H), (N,) -> (N,) fp32 log-probabilities of the targets; differentiable."""
        options = {**self._options, "temperature": temperature}
        return linear_logps(hidden.to(self.weight.dtype), self.weight, targets, backend=backend, **options)

    def token_kl(
        self, hidden: Tensor, ref_hidden: Tensor, ref_head: HeadParams, targets: Tensor, backend: str = "auto"
    ) -> TokenKL:
        """KL(reference || policy) at each token, and both log-probabilities: (N,) each. Both heads are of one kind."""
        if (self.logit_scale, self.softcap) != (ref_head.logit_scale, ref_head.softcap):
            raise ValueError("policy and reference scale or cap their logits differently: use a reference of its kind")
        own = ref_head.weight is self.weight
        return linear_token_kl(
            hidden.to(self.weight.dtype),
            ref_hidden.to(ref_head.weight.dtype),
            self.weight,
            None if own else ref_head.weight,
            targets,
            ref_bias=None if own else ref_head.bias,
            backend=backend,
            **self._options,
        )

    def logps_pair(
        self, hidden: Tensor, ref_hidden: Tensor, targets: Tensor, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """The same for a policy, and for a reference before the same head in the same pass: (N,) and (N,)."""
        states = hidden.to(self.weight.dtype), ref_hidden.to(self.weight.dtype)
        return linear_logps_pair(*states, self.weight, targets, backend=backend, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def head_module(model: nn.Module) -> Any:
    """The module that holds the output head; `aspo.processes.inside` it, its weight is whole."""
    return base_model(model).get_output_embeddings()


def output_head(model: nn.Module) -> HeadParams:
    """The output head of a model; `check_head` proves that it is read rightly.

    Raises ValueError where an adapter sits on the head, or the head is no plain linear layer.
    """
    outer, head = base_model(model), head_module(model)
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ValueError(
            f"an adapter ({type(head).__name__}) sits on the output head, which is not supported: leave the head's "
            "name out of target_modules, modules_to_save and trainable_token_indices"
        )
    if head is None:
        raise ValueError(f"{type(outer).__name__} {NO_HEAD}")
    weight = dict(head.named_parameters(recurse=False)).get("weight")
    shape = () if weight is None else getattr(weight, "ds_shape", weight.shape)  # of a part: ZeRO-3's, of the whole
    if len(shape) != 2:
        raise ValueError(f"{type(outer).__name__}: its output head is {type(head).__name__}, not a linear layer")
    text = outer.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)  # Cohere multiplies its logits, Granite divides them
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    return HeadParams(head.weight, getattr(head, "bias", None), scale, getattr(text, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model: nn.Module, model_inputs: Mapping[str, Any], wrapped: nn.Module | None = None) -> float:
    """Compare hidden states + head with the model's own logits at the last position of each row.

    wrapped: how the model is called, where that is not as it is (DDP, FSDP, DeepSpeed).

    Returns the largest difference, relative to the largest logit. Raises ValueError above `MAX_HEAD_ERROR`: the model
    does something between its trunk and its logits that `output_head` does not know, and training would be wrong.
    """
    called = model if wrapped is None else wrapped
    z = inside(called, lambda: _last_logits(model, model_inputs), inner=model)
    own = called(**model_inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    error = float((z - own).abs().max() / own.abs().max().clamp_min(1e-6))
    if not error <= MAX_HEAD_ERROR:
        raise ValueError(
            f"{type(base_model(model)).__name__}: its own logits differ from hidden states times output head by "
            f"{error:.2g} of the largest logit, so it transforms them in a way that is not supported"
        )
    return error


def _last_logits(model: nn.Module, model_inputs: Mapping[str, Any]) -> Tensor:
    def from_rows(rows: Tensor) -> Tensor:
        head = output_head(model)
        z = rows.float() @ head.weight.float().T
        z = head.logit_scale * (z if head.bias is None else z + head.bias.float())
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    return inside(head_module(model), from_rows, trunk_hidden(model, model_inputs)[:, -1])


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No gradients, and evaluation mode (no dropout) inside; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class ScoredBatch:
    """logps: (N,) fp32 on the CPU in the layout's order (chosen rows, then rejected rows); layout, similarity and ids
    as the collator made them."""

    logps: Tensor
    layout: SentenceLayout
    similarity: Tensor | None
    ids: list[str]


def response_logps(
    model: nn.Module,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    collator: Collator | None = None,
    **collator_options: Any,
) -> Iterator[ScoredBatch]:
    """Teacher-forced log-probabilities of both responses of preference rows, batch by batch.

    `collator` makes plain batches; by default a `Collator(processor, **collator_options)` (max_length, splitter, ...).
    For the reference of a LoRA model wrap the loop in `model.disable_adapter()`.
    """
    collator = collator or Collator(processor, **collator_options)
    if collator.makes_trees:
        raise ValueError("response_logps reads plain batches: leave shared_prefix and padding_free off")
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        batch = collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        inputs = {key: value.to(device) for key, value in batch["model_inputs"].items()}
        layout = batch["layout"].to(device)
        with inference(model):  # not around the yield: the caller's gradient mode is its own
            hidden = gather_hidden(trunk_hidden(model, inputs), layout)
            targets = layout.targets
            logps = inside(head_module(model), lambda rows, t=targets: output_head(model).logps(rows, t), hidden).cpu()
        yield ScoredBatch(logps, batch["layout"], batch["similarity"], batch["ids"])
