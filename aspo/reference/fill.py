"""Filling a cache of the reference's log-probabilities (`aspo.reference.logp_cache`), and trusting one.

Rows are computed and written in shards (`fill`), and before a cache is trusted a sample of it is computed again
(`check`). What it depends on besides the rows: `aspo.reference.settings`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn

from aspo.data import Collator
from aspo.folder import row_name
from aspo.model import response_logps
from aspo.progress import progress_bar
from aspo.prompts import named
from aspo.reference.logp_cache import ReferenceCache, check_logps, split_by_row
from aspo.reference.settings import reference_settings

SHARD_ROWS = 256  # what a kill loses at most, in each process
CHECKED_ROWS = 4
# Nats that a log-probability, and the mean over a sample, may differ when computed again with other batches, kernels or
# library versions.
TOLERANCES = {torch.float32: (1e-3, 1e-4), torch.float16: (0.1, 0.01), torch.bfloat16: (0.5, 0.05)}

Row = Mapping[str, Any]
LogpsFn = Callable[[Sequence[Row]], Iterable[Sequence[Tensor]]]  # rows -> for each, (tokens,) of each response, by role


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


def settings_for(model: nn.Module, collator: Collator, autocast: torch.dtype | None) -> dict[str, Any]:
    """What log-probabilities of a collator's batches depend on besides the rows; the main process's in all."""
    settings = reference_settings(
        model, collator.processor, max_length=collator.max_length, autocast=autocast, responses=collator.responses
    )
    return broadcast_object_list([settings])[0]


def cached_reference(
    folder: str,
    model: nn.Module,
    collator: Collator,
    datasets: Sequence[Sequence[Row]],
    autocast: torch.dtype | None = None,
    batch_size: int = 8,
    settings: Mapping[str, Any] | None = None,
    as_it_was: bool = True,
) -> ReferenceCache:
    """A cache in `folder` with the log-probabilities of all rows: a sample checked, what it lacked computed.

    model: the reference; of a LoRA model its adapter is off. collator: whose responses and max_length count. Several
    processes share the work. settings: those of a model that is in shards by now, from when it was whole; such a model
    computes nothing, as the processes would wait for each other at other batches. as_it_was: False where the
    model was trained since `settings` were taken, which alone say then that the cache is its own: none is checked.
    Raises ValueError for rows that come as a stream, a cache of other settings, one that fails `check`, and one that
    lacks rows where it must be whole.
    """
    state = PartialState()
    whole = settings is None
    settings = settings or settings_for(model, collator, autocast)
    cache = ReferenceCache.create(folder, settings)
    options = {"max_length": collator.max_length, "splitter": collator.splitter, "responses": collator.responses}
    logps_fn = model_logps(model, collator.processor, autocast=autocast, batch_size=batch_size, **options)
    for rows in datasets:
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise ValueError(
                f"{type(rows).__name__} is a stream, but precompute_ref_log_probs needs every row before training: "
                "load the rows (aspo.data.load_rows), or turn it off"
            )
        if as_it_was:
            check(cache, rows, logps_fn)
        state.wait_for_everyone()  # no process writes before all have read
        if not whole:
            if missing := cache.missing(rows):
                raise ValueError(
                    f"the reference cache {folder} lacks {len(missing)} of {len(rows)} rows, and a sharded model does "
                    "not fill it: run `aspo reference` first (on all processes, each with the whole model), and give "
                    "its folder as reference_cache"
                )
            continue
        bar = progress_bar()
        bar.disable = not state.is_main_process
        with bar:
            task = bar.add_task("reference", total=len(range(state.process_index, len(rows), state.num_processes)))
            advance = functools.partial(bar.advance, task)
            fill(cache, rows, logps_fn, rank=state.process_index, world=state.num_processes, progress=advance)
        state.wait_for_everyone()
        if state.num_processes > 1:
            cache.reload()
    return cache
