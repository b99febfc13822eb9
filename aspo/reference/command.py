"""`aspo reference`: the reference's log-probabilities, computed ahead of training and kept (`aspo.reference.fill`)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from peft import PeftModel

from aspo.config import AspoConfig
from aspo.data import load_rows, validate_rows
from aspo.model import load_model, parse_dtype
from aspo.policy import MERGE
from aspo.reference.fill import Checked, Filled, check, fill, model_logps
from aspo.reference.logp_cache import SHARDS, ReferenceCache
from aspo.reference.settings import reference_settings
from aspo.scores import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aspo reference`."""
    parser.description = (
        "Compute the reference's log-probabilities of preference rows, token by token, and keep them for training:\n"
        "the reference is then never run again. Run the same command again to go on after a stop, or to add rows."
    )
    parser.epilog = (
        "examples:\n"
        "  aspo reference --model llava-hf/llava-1.5-7b-hf --data runs/scored --out runs/reference\n"
        "  accelerate launch -m aspo reference --model MODEL --data runs/scored --out runs/reference\n"
        "  aspo train --precompute_ref_log_probs --reference_cache runs/reference ...   with the same options"
    )
    parser.add_argument("--model", required=True, help="the start model of the training: folder or hub name, or world")
    parser.add_argument("--data", required=True, help="preference rows: folder, .jsonl, .json or .parquet")
    parser.add_argument("--out", required=True, help="folder of the cache, made if absent")
    parser.add_argument(
        "--max_length",
        type=int,
        default=AspoConfig.max_length,
        help="most tokens of a row, as in training (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", help="weights' type (default: bfloat16 on an accelerator, else float32, as in LoRA training)"
    )
    parser.add_argument("--attn_implementation", help="attention of transformers: sdpa, eager, flash_attention_2")
    parser.add_argument("--load_in_4bit", action="store_true", help="where training has --load_in_4bit (QLoRA)")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="mixed precision, where training has --bf16")
    precision.add_argument("--fp16", action="store_true", help="mixed precision, where training has --fp16")
    parser.add_argument("--batch_size", type=int, default=8, help="rows at a time (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first rows (default: all)")
    parser.add_argument("--image-root", help="where relative image paths start (default: the folder of --data)")


def run(args: argparse.Namespace) -> int:
    """Run `aspo reference`."""
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}; it must be at least 1")
    parse_dtype(args.dtype)
    rows = load_rows(args.data, limit=args.limit, image_root=args.image_root)
    validate_rows(rows)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    dtype = args.dtype or ("float32" if state.device.type == "cpu" else "bfloat16")
    options = {"attn_implementation": args.attn_implementation, "load_in_4bit": args.load_in_4bit}
    model, processor = load_model(args.model, dtype, device=state.device, **options)
    if isinstance(model, PeftModel):
        raise ValueError(f"{args.model} is an adapter, from which no training starts: {MERGE}")
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    settings = reference_settings(model, processor, max_length=args.max_length, autocast=autocast)
    cache = ReferenceCache.create(args.out, settings)
    logps_fn = model_logps(model, processor, autocast=autocast, batch_size=args.batch_size, max_length=args.max_length)
    checked = check(cache, rows, logps_fn)
    state.wait_for_everyone()  # no process writes before all have read
    start = time.perf_counter()
    bar = progress_bar()
    bar.disable = not state.is_main_process
    with bar:
        task = bar.add_task("reference", total=len(range(state.process_index, len(rows), state.num_processes)))
        done = fill(
            cache,
            rows,
            logps_fn,
            rank=state.process_index,
            world=state.num_processes,
            progress=lambda n: bar.advance(task, n),
        )
    everyone = gather_object([done])
    if state.is_main_process:
        cache.reload()
        print(_summary(cache, everyone, checked, time.perf_counter() - start))
    state.destroy_process_group()
    return 0


def _summary(cache: ReferenceCache, everyone: Sequence[Filled], checked: Checked, seconds: float) -> str:
    """What was computed, how fast, and what is there."""
    rows, computed, tokens = (sum(column) for column in zip(*everyone, strict=True))
    files = [path.stat().st_size for path in cache.folder.glob(SHARDS)]
    lines = [
        f"{rows} rows: {computed} computed, {rows - computed} were there"
        + (f": {tokens} response tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s" if computed else ""),
        f"{cache.folder}: {len(cache)} rows, {cache.num_tokens} tokens, {sum(files) / 2**20:.2f} MiB on disk in "
        f"{len(files)} shards",
    ]
    if checked.rows:
        lines.append(
            f"{checked.rows} rows that were there, computed again, differ by at most {checked.largest:.1e} nats"
        )
    return "\n".join(lines)
