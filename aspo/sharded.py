"""Models in shards (FSDP2, DeepSpeed), and what only images use in a model that several processes train.

A process whose batch has no image does not run the vision tower. Whatever the processes do together there (gathering
its weights, summing its gradients) would wait for it for ever: so the tower stays whole, and its gradient is never
absent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from aspo.model import base_model
from aspo.policy import vision_tower
from aspo.processes import of_all, summed_tensor
from aspo_kernels import objectives


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process holds a part of the model only, so that a forward needs all of them, and a wrapped model."""
    return accelerator.distributed_type == DistributedType.FSDP or is_deepspeed(accelerator)


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains; with use_cpu accelerate does not say so in its distributed_type."""
    return getattr(accelerator.state, "deepspeed_plugin", None) is not None


def check_sharding(
    accelerator: Accelerator, model: nn.Module, ref_model: nn.Module | None, objective: objectives.Objective, args: Any
) -> None:
    """Prepare FSDP2's wrapping (`keep_vision_whole`). Raises ValueError for what a sharded model cannot do."""
    if not is_sharded(accelerator):
        return
    if accelerator.distributed_type == DistributedType.FSDP:
        keep_vision_whole(accelerator, model)
    if "token_kl" in objective.reads and ref_model is not None:
        raise ValueError(
            f"{objective.name} reads policy and reference at once, and a sharded model's reference is gathered apart: "
            "train LoRA, whose reference is the model without its adapter"
        )
    if args.shared_prefix == "auto" and (
        args.token_budget is not None or args.train_sampling_strategy == "group_by_length"
    ):
        raise ValueError(
            "shared_prefix='auto' is settled once a sharded model is wrapped, and batches are cut by tokens before: "
            "set shared_prefix to on or off"
        )
    if args.load_in_4bit:
        raise ValueError("load_in_4bit keeps weights that cannot be sharded: use DDP, or turn it off")


def keep_vision_whole(accelerator: Accelerator, model: nn.Module) -> None:
    """Let FSDP2 cut the language model's layers only, before it wraps the model.

    A vision tower in shards is gathered when it runs. A process whose batch has no image would not run it, and the
    others would wait for ever; so it stays in one piece, gathered with the embeddings as the step begins.

    Raises ValueError for FSDP1, and where the vision tower's layers were asked to be cut.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP of version 1 is not supported: set fsdp_version to 2 (configs/accelerate/fsdp2.yaml)")
    outer = base_model(model)
    layers = {type(layer).__name__ for layer in _layers(outer.get_decoder())}
    names = plugin.transformer_cls_names_to_wrap
    if not names:
        plugin.transformer_cls_names_to_wrap = sorted(layers)
        return
    tower = vision_tower(model)
    of_tower = set() if tower is None else {type(module).__name__ for module in tower.modules()}
    if inside_tower := sorted((set(names) & of_tower) - layers):
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(inside_tower)}, layers of the vision tower: where a "
            f"batch has no image, processes would wait for ever. Leave them out; {', '.join(sorted(layers))} is enough"
        )


def _layers(decoder: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a decoder: the entries of its longest list of modules."""
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    yield from max(lists, key=len, default=nn.ModuleList())


def check_images_alike(accelerator: Accelerator, model: nn.Module, has_images: bool) -> None:
    """Under DeepSpeed: raise ValueError in all processes where some of their batches have images and some have none.

    ZeRO-3 gathers its shards module by module in the order of a forward, and a vision tower that is left out of one
    process's forward cannot be kept whole as FSDP's is. ZeRO-2 sums gradients in the order in which they come, which is
    another one where the projector's has nothing to wait for: sums of different tensors, without a word. Adapters of
    the language model have no such gradient. A collective call, in these cases alone.
    """
    at_risk = in_zero3(model) or (is_deepspeed(accelerator) and image_parameters(model))
    if not at_risk or vision_tower(model) is None:
        return
    with_images = int(summed_tensor(torch.tensor(int(has_images)), accelerator))
    if with_images not in (0, accelerator.num_processes):
        raise ValueError(
            f"{with_images} of {accelerator.num_processes} processes have a batch with images, the others have none: "
            "DeepSpeed would wait for ever (ZeRO-3), or add up the gradients of different weights (ZeRO-2, full "
            "fine-tuning). Use FSDP2 (configs/accelerate/fsdp2.yaml) or DDP, which take such batches, or rows that all "
            "have images or all have none"
        )


def with_even_parts(batch: Mapping[str, Any], accelerator: Accelerator, model: nn.Module) -> Mapping[str, Any]:
    """A batch in as many parts as that process's which has the most: the added ones are run, and count for nothing.

    Each part's forward gathers the shards of a sharded model, and a process with fewer parts would not take part. A
    collective call. Raises ValueError in all processes where ZeRO-3 would have to run parts.
    """
    most = max(of_all(lambda: len(batch.get("parts", [batch]))))
    if most > 1 and in_zero3(model):
        raise ValueError(
            f"forward_tokens cuts a batch into {most} parts, and ZeRO-3 needs one order of layers in all processes, "
            "which unlike parts do not keep: use FSDP2 (configs/accelerate/fsdp2.yaml) or DDP, or turn forward_tokens "
            "off and lower per_device_train_batch_size"
        )
    if most == len(batch.get("parts", [batch])):
        return batch
    layout, distinct = batch["layout"], batch.get("distinct")
    wanted = layout.hidden_index if distinct is None else layout.hidden_index[distinct.first.to(layout.targets.device)]
    whole = {"model_inputs": batch["model_inputs"], "tree": batch["tree"], "index": wanted}
    parts = list(batch.get("parts", [whole]))
    order = batch.get("part_order", torch.arange(len(wanted), device=wanted.device))
    smallest = min(parts, key=lambda part: part["tree"].shape[0] * part["tree"].shape[1])
    added = {**smallest, "index": smallest["index"][:0]}
    return {**batch, "parts": parts + [added] * (most - len(parts)), "part_order": order}


def in_zero3(model: nn.Module) -> bool:
    """Whether ZeRO-3 has the model's parameters in shards."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def image_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What only images use: the parameters of the vision tower and projector that train."""
    outer = base_model(model)
    if vision_tower(model) is None:
        return []
    of_text = [outer.get_decoder(), outer.get_input_embeddings(), outer.get_output_embeddings()]
    used = {id(p) for module in of_text if module is not None for p in module.parameters()}
    return [p for p in outer.parameters() if id(p) not in used and p.requires_grad]


def with_image_gradients(value: Tensor, model: nn.Module) -> Tensor:
    """A batch's value with a gradient of zero added for what images use: without an image there would be none at all,
    nor for the tower's layers behind the one that is read.

    Gradients are summed over processes tensor by tensor, and a process that has none for one would not take part.
    """
    in_group = dist.is_available() and dist.is_initialized()
    wanted = in_group and torch.is_grad_enabled() and not in_zero3(model)  # see `check_images_alike`
    parameters = image_parameters(model) if wanted else []
    return value + 0.0 * sum(p.sum() for p in parameters) if parameters else value


def prepare_reference(accelerator: Accelerator, ref_model: nn.Module) -> nn.Module:
    """A frozen reference of its own, sharded as the policy is where that is sharded; on the device in any case."""
    if accelerator.distributed_type == DistributedType.FSDP:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, ref_model)
    if is_deepspeed(accelerator):
        return _deepspeed_reference(accelerator, ref_model)
    return ref_model.to(accelerator.device)


def _deepspeed_reference(accelerator: Accelerator, ref_model: nn.Module) -> nn.Module:
    """An engine without an optimiser: ZeRO-3 keeps the weights in shards, the stages below keep them whole."""
    import deepspeed

    config = copy.deepcopy(accelerator.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    if config["zero_optimization"]["stage"] != 3:
        config["zero_optimization"]["stage"] = 0
    engine, *_ = deepspeed.initialize(model=ref_model, config=config)
    engine.eval()  # which returns nothing
    return engine
