"""`aspo plan`: what a training step will need, and what fits, before any weight is loaded (`aspo.step_memory`); what a
whole job on many GPUs will hold, send, take and cost (`aspo.scaling`)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import AutoProcessor

from aspo import trust
from aspo.cli import did_you_mean
from aspo.config import AspoConfig
from aspo.lengths import PromptLength
from aspo.model import base_model, check_model, model_config, parse_dtype, resolve_model
from aspo.scaling.architectures import ARCHITECTURES, IMAGE_TOKENS
from aspo.scaling.hardware import GPUS, Cluster, named_gpu
from aspo.scaling.job import make_plan
from aspo.scaling.report import report
from aspo.scaling.sharding import STRATEGIES, check_shards
from aspo.step_memory import Memory, Step, meta_model, predict

MIB = 2**20
MARGIN = 0.9  # of a device's memory that a suggestion fills: allocators round up and leave holes
DESCRIPTION = """Say what a training step will need, without loading weights.

  aspo plan --model llava-hf/llava-1.5-7b-hf --response-tokens 512 --dtype bfloat16 --memory 80
  aspo plan --model world --response-tokens 30 --images 1
  aspo plan --model llava-1.5-7b --response-tokens 256 --gpus 64 --gpu h100 --strategy fsdp2 --pairs 1000000 --bf16

Prints the predicted peak memory and its parts, the tokens that sharing the prompt saves, and the largest batch and
token budget that fit into --memory. With --gpus: what each GPU holds and sends, how long a step and the whole job take,
what it costs, and what is in the way. Those times follow from published figures of the GPU and the stated shares of
them; they are no measurement (docs/scaling.md)."""
T = TypeVar("T")
DEFAULT_SIZE = 336  # pixels of an image, of a tower that reads images at their own size
SMALLEST = {"response_tokens": 1, "prompt_tokens": 1, "per_device_train_batch_size": 1, "image_size": 1, "images": 0}
FIGURES = {
    "memory": "GB", "tflops": "TFLOP/s in bf16, dense", "hbm": "TB/s of its memory",
    "nvlink": "GB/s to GPUs of its node, one direction", "network": "Gbit/s to other nodes, one direction",
}  # fmt: skip
CLUSTER = {f.name: f.default for f in dataclasses.fields(Cluster) if f.default is not dataclasses.MISSING}
# Options that --gpus is for: None where they are not given, then this.
JOB = {
    **{"pairs": None, "gpu": "h100", "strategy": "ddp", "dp_shard_size": None, "num_train_epochs": 1.0, "price": None},
    **{f"gpu_{name}": None for name in FIGURES},
    **CLUSTER,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aspo plan`."""
    parser.description = DESCRIPTION
    named = ", ".join(ARCHITECTURES)
    parser.add_argument("--model", help=f"folder or hub name of the start model; 'world' = embedded; no hub: {named}")
    parser.add_argument("--response-tokens", type=int, help="tokens of a response")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="text tokens of a prompt (64)")
    parser.add_argument("--images", type=int, default=1, help="images of a prompt (1)")
    parser.add_argument("--image-size", type=int, help="pixels of an image's side (the vision tower's own, else 336)")
    parser.add_argument("--per_device_train_batch_size", type=int, default=2, help="pairs in a batch of one device (2)")
    parser.add_argument(
        "--dtype",
        help="weights' type (default: float32; with --gpus and LoRA bfloat16, as aspo train has them on a GPU)",
    )
    parser.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")
    parser.add_argument("--no_use_lora", action="store_true", help="full fine-tuning (with a frozen vision tower)")
    parser.add_argument("--lora_r", type=int, help="rank of the adapters (16)")
    parser.add_argument("--activation_checkpointing", action="store_true", help="form layers again in the backward")
    parser.add_argument("--precompute_ref_log_probs", action="store_true", help="no reference is run or held")
    parser.add_argument("--no_shared_prefix", action="store_true", help="prompt and image for each response")
    parser.add_argument("--memory", type=float, help="GiB of the device, to say what fits")
    _add_job_arguments(parser)


def _add_job_arguments(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group("a job on many GPUs")
    job.add_argument("--gpus", type=int, help="how many; the options below are for them")
    job.add_argument("--gpu", help=f"{', '.join(GPUS)} ({JOB['gpu']})")
    job.add_argument("--strategy", help=f"{', '.join(STRATEGIES)} ({JOB['strategy']})")
    job.add_argument(
        "--dp_shard_size", type=int, help="fsdp2: GPUs that divide one copy among them (all); a node's: HSDP"
    )
    job.add_argument("--pairs", type=int, help="pairs of the whole job")
    job.add_argument("--num_train_epochs", type=float, help="passes over the pairs (1)")
    job.add_argument("--price", type=float, help="of a GPU-hour, in your money")
    for name, unit in FIGURES.items():
        job.add_argument(f"--gpu_{name}", type=float, help=f"{unit}, in the place of the maker's figure")
    for name, value in CLUSTER.items():
        job.add_argument(f"--{name}", type=type(value), help=f"assumed ({value})")


def run(args: argparse.Namespace) -> int:
    """Run `aspo plan`."""
    wrong = _problems(args)
    strays = [name for name in JOB if getattr(args, name) is not None]
    for name, value in JOB.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    cluster = None if args.gpus is None else _checked_cluster(args, wrong)
    if cluster is None and strays:
        pairs = "; a batch's pairs are --per_device_train_batch_size" * ("pairs" in strays)
        wrong.append(f"{_flags(strays)} wants --gpus, how many GPUs the job has{pairs}")
    if wrong:
        raise ValueError(wrong[0] if len(wrong) == 1 else " ".join(f"({n}) {w}" for n, w in enumerate(wrong, 1)))
    if cluster is not None:
        return _run_job(args, cluster)
    config = _settings(args, args.dtype)
    model = meta_model(_named(args.model), config)
    own = _own_size(args, base_model(model).config)
    image_tokens = _image_tokens(args, own)
    step = _step(args, image_tokens)
    images = _images(args, own)
    memory = predict(model, step, *images)
    reference = 0 if config.use_lora or step.cached_reference else memory.weights  # a frozen copy
    print(_report(step, memory, reference, image_tokens))
    if args.memory is not None:
        print(_suggestion(model, step, memory, reference, images, args.memory))
    return 0


def _flags(names: list[str]) -> str:
    dashed = ("response_tokens", "prompt_tokens", "image_size")
    return ", ".join("--" + (name.replace("_", "-") if name in dashed else name) for name in names)


def _problems(args: argparse.Namespace) -> list[str]:
    """What is missing or wrong, a job's options left out."""
    wrong = []
    if missing := [name for name in ("model", "response_tokens") if getattr(args, name) is None]:
        wrong.append(f"missing: {_flags(missing)}")
    for name, least in SMALLEST.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            wrong.append(f"{_flags([name])} is {getattr(args, name)}; it must be {least} or more")
    if args.memory is not None and args.memory <= 0:
        wrong.append(f"--memory is {args.memory:g} GiB; it must be positive")
    if args.model not in (None, *ARCHITECTURES):
        _tried(wrong, lambda: check_model(args.model))
    _tried(wrong, lambda: parse_dtype(args.dtype))
    return wrong


def _checked_cluster(args: argparse.Namespace, wrong: list[str]) -> Cluster:
    """The job's cluster. What is missing or wrong in a job's options is added to `wrong`."""
    if args.pairs is None:
        wrong.append("--gpus is given, but not --pairs: how many pairs the job has")
    elif args.pairs < 1:
        wrong.append(f"--pairs is {args.pairs}; a job has at least 1")
    if args.memory is not None:
        wrong.append(f"--memory {args.memory:g} is for one device; a GPU's with --gpus is --gpu_memory, in GB")
    if not args.bf16 and args.dtype != "bfloat16":
        wrong.append("the GPUs' peaks are bfloat16's: plan with --bf16 (mixed precision) or --dtype bfloat16")
    if not args.num_train_epochs > 0:
        wrong.append(f"--num_train_epochs is {args.num_train_epochs:g}; it must be positive")
    figures = {name: getattr(args, f"gpu_{name}") for name in FIGURES}
    gpu = _tried(wrong, lambda: named_gpu(args.gpu, **figures)) or GPUS[JOB["gpu"]]
    own = {name: getattr(args, name) for name in CLUSTER}
    built = _tried(wrong, lambda: Cluster(gpu, args.gpus, **own))
    shards = None if built is None else args.dp_shard_size  # which must fit the cluster
    cluster = built or Cluster(gpu, 1)
    _tried(wrong, lambda: check_shards(args.strategy, cluster, shards))
    return cluster


def _tried(wrong: list[str], function: Callable[[], T]) -> T | None:
    """A call's result; None where it raised a ValueError, whose message is added to `wrong`."""
    try:
        return function()
    except ValueError as error:
        wrong.append(str(error))
        return None


def _run_job(args: argparse.Namespace, cluster: Cluster) -> int:
    config = _named(args.model)
    own = _own_size(args, config)
    image_tokens = _image_tokens(args, own)
    on_gpu = args.dtype or ("float32" if args.no_use_lora else "bfloat16")  # as `aspo train` keeps weights there
    plan = make_plan(
        config, _settings(args, on_gpu), _step(args, image_tokens), cluster, args.strategy, args.pairs,
        shards=args.dp_shard_size, images=_images(args, own), image_tokens=image_tokens,
    )  # fmt: skip
    print(report(plan, args.price))
    return 0


def _settings(args: argparse.Namespace, dtype: str | None) -> AspoConfig:
    return AspoConfig(
        output_dir="unused", use_cpu=True, dtype=dtype, use_lora=not args.no_use_lora, lora_r=args.lora_r,
        precompute_ref_log_probs=args.precompute_ref_log_probs, num_train_epochs=args.num_train_epochs,
    )  # fmt: skip


def _step(args: argparse.Namespace, image_tokens: int) -> Step:
    return Step(
        args.per_device_train_batch_size,
        args.prompt_tokens + image_tokens,
        args.response_tokens,
        not args.no_shared_prefix,
        args.precompute_ref_log_probs,
        torch.bfloat16 if args.bf16 else None,
        args.activation_checkpointing,
    )


def _named(name: str) -> Any:
    """A model's configuration."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name][0]()
    try:
        return model_config(name)
    except ValueError as error:
        near = did_you_mean(name, ARCHITECTURES)
        raise ValueError(f"{error}; known without a hub: {', '.join(ARCHITECTURES)}{near}") from error


def _own_size(args: argparse.Namespace, config: Any) -> int | None:
    """Pixels of the side that the vision tower reads, whatever the image's; None where it reads images at their own."""
    if args.model in ARCHITECTURES:
        return ARCHITECTURES[args.model][1]
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    return size if isinstance(size, int) else None


def _images(args: argparse.Namespace, own: int | None) -> tuple[int, int]:
    """How many each pair has, and the pixels of a side that the tower reads."""
    return args.images, own or args.image_size or DEFAULT_SIZE


def _image_tokens(args: argparse.Namespace, own: int | None) -> int:
    """Tokens that a prompt's images become. Raises ValueError where --image-size would change nothing."""
    if not args.images:
        return 0
    count = _counter(args)
    tokens = count(args.image_size or own or DEFAULT_SIZE)
    if own is not None and args.image_size not in (None, own) and tokens == count(own):
        wrong = f"--image-size is {args.image_size}, but {args.model} is planned with {own} pixels"
        raise ValueError(f"{wrong}, whatever an image's size: leave it out")
    return tokens


def _counter(args: argparse.Namespace) -> Callable[[int], int]:
    """From an image's pixels a side to the tokens of a prompt's images."""
    if args.model in ARCHITECTURES:
        return lambda size: args.images * IMAGE_TOKENS
    processor = trust.pretrained(AutoProcessor, resolve_model(args.model))
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"--images is {args.images}, but {args.model} reads text only: pass --images 0")
    length, marks = PromptLength(processor), args.images  # marks are in the prompt's text: image_tokens leaves them out
    return lambda size: length.image_tokens([(size, size)] * args.images) + marks


def _report(step: Step, memory: Memory, reference: int, image_tokens: int) -> str:
    tree = step.tree()
    plain = tree.num_unshared_tokens
    rows = [
        ("weights", memory.weights),
        ("reference (a frozen copy)", reference),
        ("optimiser state", memory.optimiser),
        ("image features", memory.vision),
        ("activations kept", memory.activations),
        ("output head", memory.head),
        ("gradients, backward, rest", memory.backward),
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
