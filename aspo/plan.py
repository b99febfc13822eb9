"""`aspo plan`: what a training step will need, and what fits, before any weight is loaded (`aspo.step_memory`)."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from transformers import AutoProcessor

from aspo.config import AspoConfig
from aspo.lengths import PromptLength
from aspo.model import base_model, resolve_model
from aspo.step_memory import Memory, Step, meta_model, predict

MIB = 2**20
MARGIN = 0.9  # of a device's memory that a suggestion fills: allocators round up and leave holes
DESCRIPTION = """Say what a training step will need, without loading weights.

  aspo plan --model llava-hf/llava-1.5-7b-hf --response-tokens 512 --pairs 2 --dtype bfloat16 --memory 80
  aspo plan --model world --response-tokens 30 --images 1

Prints the predicted peak memory and its parts, the tokens that sharing the prompt saves, and the largest batch and
token budget that fit into --memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aspo plan`."""
    parser.description = DESCRIPTION
    parser.add_argument("--model", required=True, help="folder or hub name of the start model; 'world' = embedded")
    parser.add_argument("--response-tokens", type=int, required=True, help="tokens of a response")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="text tokens of a prompt (64)")
    parser.add_argument("--images", type=int, default=1, help="images of a prompt (1)")
    parser.add_argument("--image-size", type=int, help="pixels of an image's side (the vision tower's own, else 336)")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in a batch (2)")
    parser.add_argument("--dtype", help="weights' type, as in aspo train")
    parser.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")
    parser.add_argument("--no_use_lora", action="store_true", help="full fine-tuning (with a frozen vision tower)")
    parser.add_argument("--lora_r", type=int, help="rank of the adapters (16)")
    parser.add_argument("--activation_checkpointing", action="store_true", help="form layers again in the backward")
    parser.add_argument("--precompute_ref_log_probs", action="store_true", help="no reference is run or held")
    parser.add_argument("--no_shared_prefix", action="store_true", help="prompt and image for each response")
    parser.add_argument("--memory", type=float, help="GiB of the device, to say what fits")


def run(args: argparse.Namespace) -> int:
    """Run `aspo plan`."""
    for name in ("response_tokens", "prompt_tokens", "pairs", "image_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.images < 0:
        raise ValueError(f"--images is {args.images}; it must be 0 or more")
    if args.memory is not None and args.memory <= 0:
        raise ValueError(f"--memory is {args.memory:g} GiB; it must be positive")
    config = AspoConfig(
        output_dir="unused", use_cpu=True, dtype=args.dtype, use_lora=not args.no_use_lora, lora_r=args.lora_r
    )
    model = meta_model(args.model, config)
    own_size = getattr(getattr(base_model(model).config, "vision_config", None), "image_size", None)
    size = args.image_size or (own_size if isinstance(own_size, int) else 336)
    image_tokens = _image_tokens(args.model, args.images, size)
    step = Step(
        args.pairs,
        args.prompt_tokens + image_tokens,
        args.response_tokens,
        not args.no_shared_prefix,
        args.precompute_ref_log_probs,
        torch.bfloat16 if args.bf16 else None,
        args.activation_checkpointing,
    )
    images = (args.images, size)
    memory = predict(model, step, *images)
    reference = 0 if config.use_lora or step.cached_reference else memory.weights  # a frozen copy
    print(_report(step, memory, reference, image_tokens))
    if args.memory is not None:
        print(_suggestion(model, step, memory, reference, images, args.memory))
    return 0


def _image_tokens(name: str, images: int, size: int) -> int:
    """Tokens that a prompt's images become."""
    if not images:
        return 0
    processor = AutoProcessor.from_pretrained(resolve_model(name))
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"--images is {images}, but {name} reads text only: pass --images 0")
    marks = images  # one token each in the prompt's text, which image_tokens leaves out
    return PromptLength(processor).image_tokens([(size, size)] * images) + marks


def _report(step: Step, memory: Memory, reference: int, image_tokens: int) -> str:
    tree = step.tree()
    plain = tree.num_unshared_tokens
    rows = [
        ("weights", memory.weights),
        ("reference (a frozen copy)", reference),
        ("gradients, optimiser state", memory.trained),
        ("image features", memory.vision),
        ("activations kept", memory.activations),
        ("output head", memory.head),
        ("backward and the rest", memory.backward),
        ("peak", memory.peak + reference),
    ]
    lines = [
        f"{step.pairs} pairs: prompt {step.prompt} tokens ({image_tokens} of images), responses {step.response}",
        f"tokens: {tree.num_tokens:,}; each response with its own prompt: {plain:,}"
        + (f" (sharing saves {1 - tree.num_tokens / plain:.0%})" if step.shared else ""),
        *(f"  {name:28}{size / MIB:10,.1f} MiB" for name, size in rows if size),
    ]
    return "\n".join(lines)


def _suggestion(
    model: Any, step: Step, memory: Memory, reference: int, images: tuple[int, int], gibibytes: float
) -> str:
    """The largest batch and token budget within a device's memory: memory is linear in pairs."""
    more = predict(model, dataclasses.replace(step, pairs=2 * step.pairs), *images)
    each = max((more.peak - memory.peak) / step.pairs, 1)
    room = MARGIN * gibibytes * 2**30 - reference
    pairs = int((room - memory.peak) / each) + step.pairs
    if pairs < 1:
        hint = "turn on --activation_checkpointing, --precompute_ref_log_probs, LoRA or a smaller --dtype"
        return f"not one pair fits into {gibibytes:g} GiB (less {1 - MARGIN:.0%} for the allocator): {hint}"
    tokens = pairs * step.tree().num_tokens // step.pairs
    return (
        f"fits into {gibibytes:g} GiB (less {1 - MARGIN:.0%} for the allocator): "
        f"--per_device_train_batch_size {pairs}, or --padding_free --token_budget {tokens}"
    )
