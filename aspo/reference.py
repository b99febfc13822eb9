"""`aspo reference`: the reference's log-probabilities, computed once and kept (`aspo.logp_cache`).

Rows are computed and written in shards (`fill`), and before a cache is trusted a sample of it is computed again
(`check`). What it depends on besides the rows: `aspo.reference_settings`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from peft import PeftModel
from torch import Tensor, nn

from aspo.config import AspoConfig
from aspo.data import Collator, load_rows, validate_rows
from aspo.folder import row_name
from aspo.logp_cache import SHARDS, ReferenceCache, check_logps, split_by_row
from aspo.model import load_model, parse_dtype, response_logps
from aspo.policy import MERGE
from aspo.prompts import named
from aspo.reference_settings import reference_settings
from aspo.scores import progress_bar

SHARD_ROWS = 256  # what a kill loses at most, in each process
CHECKED_ROWS = 4
# Nats that a log-probability, and the mean over a sample, may differ when computed again with other batches, kernels or
# library versions.
TOLERANCES = {torch.float32: (1e-3, 1e-4), torch.float16: (0.1, 0.01), torch.bfloat16: (0.5, 0.05)}

Row = Mapping[str, Any]
LogpsFn = Callable[[Sequence[Row]], Iterable[Sequence[Tensor]]]  # rows -> for each, (tokens,) of each response, by role


# ---- filling and checking ----


def model_logps(
    model: nn.Module,
    processor: Any,
    *,
    autocast: torch.dtype | None = None,
    batch_size: int = 8,
    **collator_options: Any,
) -> LogpsFn:
    """Log-probabilities of a model's own: its adapter, where it has one, is off.

    collator_options: those of `aspo.data.Collator` (max_length, responses, ...).
    """
    collator = Collator(processor, **collator_options)

    def logps_fn(rows: Sequence[Row]) -> Iterator[list[Tensor]]:
        batches = response_logps(model, processor, rows, batch_size=batch_size, collator=collator)
        while True:
            with contextlib.ExitStack() as stack:  # not around the yield: what the caller runs there is its own
                if isinstance(model, PeftModel):
                    stack.enter_context(model.disable_adapter())
                if autocast is not None:
                    stack.enter_context(torch.autocast(next(model.parameters()).device.type, autocast))
                batch = next(batches, None)
            if batch is None:
                return
            yield from split_by_row(batch.logps, batch.layout)

    return logps_fn


class Filled(NamedTuple):
    """Of this process: rows looked at, rows computed, and the tokens of those."""

    rows: int
    computed: int
    tokens: int


def fill(
    cache: ReferenceCache,
    rows: Sequence[Row],
    logps_fn: LogpsFn,
    *,
    rank: int = 0,
    world: int = 1,
    shard_rows: int = SHARD_ROWS,
    progress: Callable[[int], None] | None = None,
) -> Filled:
    """Compute what the cache lacks of rows rank, rank + world, rank + 2 world, ... and write it in shards.

    A shard is written when it is whole: a killed process computes at most its last `shard_rows` rows again. Another
    number of processes may go on. In a shard rows are computed by length, so that batches have little padding. When all
    processes are done, `cache.reload()` has what the others wrote.

    progress: called with numbers of rows as they are done.

    Raises ValueError, naming the row, for log-probabilities that are not finite or above 0.
    """
    cache.remove_damaged()
    waiting: dict[bytes, Row] = {}
    computed = tokens = seen = 0
    for index in range(rank, len(rows), world):
        row = rows[index]
        key = cache.key(row)
        seen += 1
        if cache.has(key) or key in waiting:
            if progress is not None:
                progress(1)
        else:
            waiting[key] = row
        last = index + world >= len(rows)
        if len(waiting) == shard_rows or (last and waiting):
            tokens += _fill_shard(cache, waiting, logps_fn, progress)
            computed += len(waiting)
            waiting = {}
    return Filled(seen, computed, tokens)


def _fill_shard(
    cache: ReferenceCache, rows: Mapping[bytes, Row], logps_fn: LogpsFn, progress: Callable[[int], None] | None
) -> int:
    """Compute and write some rows; returns their tokens."""
    columns = ("prompt", *cache.settings["responses"])
    ordered = sorted(rows, key=lambda key: sum(len(str(rows[key][column])) for column in columns))
    entries: dict[bytes, list[Tensor]] = {}
    for key, values in zip(ordered, logps_fn([rows[key] for key in ordered]), strict=True):
        entries[key] = named(rows[key], check_logps, values)
        if progress is not None:
            progress(1)
    cache.add(entries)
    return sum(len(x) for values in entries.values() for x in values)


class Checked(NamedTuple):
    """Rows computed again, and the largest difference of one of their log-probabilities in nats."""

    rows: int
    largest: float


def check(cache: ReferenceCache, rows: Sequence[Row], logps_fn: LogpsFn, *, sample: int = CHECKED_ROWS) -> Checked:
    """Compute some of the rows that are in the cache again, spread over all, and compare.

    Raises ValueError naming the row, the token and both numbers where one differs by more than TOLERANCES has for the
    lowest precision in use, or all of them on average.
    """
    limit, mean_limit = tolerance(cache.settings)
    chosen: list[Row] = []
    if len(cache):
        for index in sorted(range(len(rows)), key=lambda n: n * 0.6180339887 % 1):  # spread, whatever is missing
            row = rows[index]
            if row in cache:
                chosen.append(row)
            if len(chosen) == sample:
                break
    differences = []
    for row, values in zip(chosen, logps_fn(chosen) if chosen else (), strict=True):
        kept, fresh = cache.get(row), named(row, check_logps, values)
        if len(kept) != len(fresh):
            raise _stale(cache, f"{row_name(row)}: {len(kept)} responses are kept, but it has {len(fresh)}")
        for response, (old, new) in enumerate(zip(kept, fresh, strict=True)):
            what = f"{row_name(row)}, response {response}"
            if len(old) != len(new):
                raise _stale(cache, f"{what}: {len(old)} log-probabilities are kept, but it has {len(new)} tokens")
            difference = (old - new).abs()
            differences.append(difference)
            if difference.max() > limit:
                t = int(difference.argmax())
                raise _stale(
                    cache,
                    f"{what}, token {t}: the log-probability kept is {old[t]:.6f}, computed now it is {new[t]:.6f} "
                    f"(tolerance {limit})",
                )
    mean = float(torch.cat(differences).mean()) if differences else 0.0
    if mean > mean_limit:
        names = ", ".join(row_name(row) for row in chosen)
        raise _stale(cache, f"{names}: the log-probabilities differ by {mean:.6f} on average (tolerance {mean_limit})")
    return Checked(len(chosen), max((float(d.max()) for d in differences), default=0.0))


def tolerance(settings: Mapping[str, Any]) -> tuple[float, float]:
    """TOLERANCES for the lowest precision among a cache's dtypes and its autocast."""
    used = [getattr(torch, name) for name in f"{settings['dtype']} {settings['autocast']}".split() if name != "off"]
    return max(TOLERANCES.get(dtype, TOLERANCES[torch.float32]) for dtype in used)


def _stale(cache: ReferenceCache, what: str) -> ValueError:
    return ValueError(
        f"{what}. The reference cache {cache.folder} (made with {cache.made_with}) is not what this model computes: "
        "delete the folder and run `aspo reference` again, or turn precompute_ref_log_probs off"
    )


def cached_reference(
    folder: str,
    model: nn.Module,
    collator: Collator,
    datasets: Sequence[Sequence[Row]],
    autocast: torch.dtype | None = None,
    batch_size: int = 8,
) -> ReferenceCache:
    """A cache in `folder` with the log-probabilities of all rows: a sample checked, what it lacked computed.

    model: the reference; of a LoRA model its adapter is off. collator: whose responses and max_length count.
    Raises ValueError for rows that come as a stream, a cache of other settings, and one that fails `check`.
    """
    settings = reference_settings(
        model, collator.processor, max_length=collator.max_length, autocast=autocast, responses=collator.responses
    )
    cache = ReferenceCache.create(folder, settings)
    options = {"max_length": collator.max_length, "splitter": collator.splitter, "responses": collator.responses}
    logps_fn = model_logps(model, collator.processor, autocast=autocast, batch_size=batch_size, **options)
    for rows in datasets:
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ValueError(
                f"{type(rows).__name__} is a stream, but precompute_ref_log_probs needs every row before training: "
                "load the rows (aspo.data.load_rows), or turn it off"
            )
        check(cache, rows, logps_fn)
        with progress_bar() as bar:
            task = bar.add_task("reference", total=len(rows))
            fill(cache, rows, logps_fn, progress=functools.partial(bar.advance, task))
    return cache


# ---- the command ----


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
