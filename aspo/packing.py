"""Batches by tokens: rows packed into a token budget, or grouped by length, the same ones on every machine.

A row of the data is one or more readings (a prompt with its images, and the responses behind it), with a `Length` each.
A batch is a grid of tokens: one row that holds everything (padding-free), or a row for each reading (where responses
share their prefix) or for each response.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from aspo.even_batches import EvenStream, even, with_placeholders
from aspo.folder import row_name
from aspo.lengths import Length, reading_widths, row_lengths
from aspo.streams import endless

PADDED_WINDOW = 1024  # rows that are sorted by length together: larger ones pad hardly less, and mix rows less

# ---- what a row costs ----


def row_grid(lengths: Sequence[Length], shared: bool) -> tuple[int, int]:
    """(rows, width) of the padded grid that a row of the data makes alone."""
    widths = reading_widths(lengths, shared)
    return len(widths), max(widths)


def row_tokens(lengths: Sequence[Length], shared: bool) -> int:
    """Tokens of a row of the data without padding."""
    return sum(reading_widths(lengths, shared))


# ---- packing ----


def pack(
    costs: Sequence[int], budget: int, seed: int | None = None, name: Callable[[int], str] = "row {}".format
) -> list[list[int]]:
    """Row numbers in batches whose costs sum to at most `budget`; every row is in exactly one batch.

    Best fit: rows come in an order drawn from `seed`, and each goes into the batch that it fills most. It packs as
    densely as rows sorted by cost would, without putting rows of one length together. seed None: consecutive rows, in
    order. Only arithmetic and `random.Random.random` decide, so that the batches are the same on every machine.

    Raises ValueError naming (by `name`) a row that alone exceeds the budget.
    """
    _check_budget(costs, budget, name)
    if seed is None:
        return _consecutive(range(len(costs)), [(cost, 1) for cost in costs], budget)
    smallest = min(costs, default=0)
    batches: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, batch), ascending; batches that can take no row left out
    for row in shuffled(len(costs), f"{seed} rows"):
        place = bisect_left(rooms, (costs[row], -1))
        if place < len(rooms):
            room, batch = rooms.pop(place)
            batches[batch].append(row)
        else:
            room, batch = budget, len(batches)
            batches.append([row])
        if room - costs[row] >= smallest:
            insort(rooms, (room - costs[row], batch))
    return batches


def pack_padded(
    grids: Sequence[tuple[int, int]],
    budget: int,
    seed: int | None = None,
    name: Callable[[int], str] = "row {}".format,
) -> list[list[int]]:
    """As `pack`, for batches that are padded: (sum of rows) x (largest width) is at most `budget`.

    Rows are drawn in a random order, sorted by width within windows of PADDED_WINDOW rows, and cut there, so that rows
    of like widths share a batch.
    """
    _check_budget([rows * width for rows, width in grids], budget, name)
    if seed is None:
        return _consecutive(range(len(grids)), grids, budget)
    order = shuffled(len(grids), f"{seed} rows")
    batches = []
    for start in range(0, len(order), PADDED_WINDOW):
        window = sorted(order[start : start + PADDED_WINDOW], key=lambda row: -grids[row][1])
        batches += _consecutive(window, grids, budget)
    return batches


def shuffled(n: int, seed: str) -> list[int]:
    """0..n-1 in an order drawn from `seed`, by what Python promises to keep (`shuffle` it may change)."""
    draw = random.Random(seed).random
    keys = [draw() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


def _consecutive(order: Sequence[int], grids: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """The rows in order, cut where one more would make the grid larger than `budget`."""
    batches: list[list[int]] = []
    height = width = 0
    for row in order:
        height, width = height + grids[row][0], max(width, grids[row][1])
        if batches and height * width <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
            height, width = grids[row]
    return batches


def _check_budget(costs: Sequence[int], budget: int, name: Callable[[int], str]) -> None:
    if budget < 1:
        raise ValueError(f"token_budget is {budget}; it must be positive")
    too_long = [row for row, cost in enumerate(costs) if cost > budget]
    if too_long:
        more = f" (and {len(too_long) - 1} more rows do too)" if len(too_long) > 1 else ""
        raise ValueError(
            f"{name(too_long[0])} alone takes {costs[too_long[0]]} tokens of a token_budget of {budget}{more}: raise "
            f"token_budget to {max(costs)}, lower max_length (it cuts responses), or drop such rows"
        )


# ---- the order of batches and rows, epoch by epoch ----


class ShuffledBatches(Sampler[list[int]]):
    """A DataLoader's batch_sampler over fixed batches.

    Which rows share a batch is fixed for the run: Trainer takes the number of batches for the same in every epoch. The
    order of the batches, and so which of them share an optimiser step, is drawn anew from (seed, epoch), whatever ran
    before: a resumed run takes the batches that it would have taken. seed None: in order, always.
    """

    batch_size = None  # read by accelerate: batches of any size
    drop_last = False

    def __init__(self, batches: Sequence[list[int]], seed: int | None = None) -> None:
        self.batches, self.seed, self.epoch = batches, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer and accelerate call it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        if self.seed is None:
            return iter(self.batches)
        return (self.batches[n] for n in shuffled(len(self.batches), f"{self.seed} epoch {self.epoch}"))


class LengthGroups(LengthGroupedSampler):
    """transformers' sampler of rows of like lengths, drawn from (seed, epoch), so that a resumed run draws the same."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls it before each epoch."""
        self.generator.manual_seed(self.seed + epoch)


# ---- inside Trainer ----


class TokenBatches(Trainer):
    """A Trainer that cuts batches by the rows' tokens; its collator is an `aspo.data.Collator` or alike.

    args.token_budget: batches of as many rows as fit into that many tokens (`pack`, `pack_padded`), in evaluation
    consecutive ones; instead of per_device_train_batch_size and per_device_eval_batch_size. None: those.
    args.train_sampling_strategy: "random" and "sequential" as in Trainer, "group_by_length" by the rows' tokens.
    """

    args: Any  # TrainingArguments with token_budget
    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._eval_loaders: dict[int, tuple[Any, DataLoader]] = {}  # with the rows, so that no other gets their id
        self._rows_per_batch: float | None = None
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's, or with args.token_budget one of batches of that many tokens."""
        if self.args.token_budget is None or self.train_dataset is None:
            loader = super().get_train_dataloader()
            if not isinstance(self.train_dataset, IterableDataset) or has_length(loader):
                return loader
            return endless(loader)
        in_order = self.args.train_sampling_strategy == "sequential"
        batches = self._token_batches(self.train_dataset, None if in_order else self._data_seed)
        self._rows_per_batch = sum(map(len, batches.batches)) / max(len(batches), 1)
        return self._loader(self.train_dataset, batches)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """Trainer's. Raises ValueError where a stream has ended before its last step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, IterableDataset) and len(batches) < num_batches:
            raise ValueError(
                f"train_dataset is a stream, and a pass over it gave no batch at step {self.state.global_step} of "
                f"{self.state.max_steps}: give rows (with dataloader_drop_last a full batch for each process), a "
                "stream that can be read more than once, or fewer max_steps"
            )
        return batches, items

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Trainer's, or with args.token_budget one of batches of that many tokens, the rows in order."""
        datasets: Any = self.eval_dataset
        rows = datasets[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        rows = datasets if rows is None else rows
        if self.args.token_budget is None or rows is None:
            return super().get_eval_dataloader(eval_dataset)
        if id(rows) not in self._eval_loaders:
            self._eval_loaders[id(rows)] = rows, self._loader(rows, self._token_batches(rows, None))
        return self._eval_loaders[id(rows)][1]

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The same as for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Rows of an optimiser step, with args.token_budget their mean: for throughput, not for the loss."""
        total = super().get_total_train_batch_size(args)
        if self._rows_per_batch is None:
            return total
        return max(1, round(total / self._train_batch_size * self._rows_per_batch))

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any) -> DataLoader:
        processes, drop_last = self.accelerator.num_processes, self.args.dataloader_drop_last
        if processes > 1 and isinstance(dataset, IterableDataset):
            if self.args.dataloader_num_workers:
                raise ValueError("dataloader_num_workers on several processes would read a stream again: set it to 0")
            stream = EvenStream(dataset, processes, self.accelerator.process_index, batch_size, drop_last)
            loader = DataLoader(stream, batch_size, collate_fn=self.data_collator)
            loader.set_epoch = stream.set_epoch  # type: ignore[attr-defined]  # Trainer asks the loader
            return loader
        rows = with_placeholders(dataset, processes)
        return even(super()._get_dataloader(rows, description, batch_size, *args, **kwargs), drop_last)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(rows)
        grids = [row_grid(row, self._shared) for row in self._lengths(rows)]
        tokens = [height * width for height, width in grids]
        pairs = self._train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return LengthGroups(pairs, tokens, self._data_seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset)  # Trainer would group by a column of lengths, which rows do not have

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @property
    def _shared(self) -> bool:
        return bool(getattr(self.data_collator, "shared_prefix", False))

    def _lengths(self, rows: Any) -> list[tuple[Length, ...]]:
        return row_lengths(rows, self.data_collator, self.args.dataloader_num_workers)

    def _token_batches(self, rows: Any, seed: int | None) -> ShuffledBatches:
        lengths, budget = self._lengths(rows), self.args.token_budget

        def name(row: int) -> str:
            return row_name(rows[row])

        if getattr(self.data_collator, "padding_free", False):
            costs = [row_tokens(row, self._shared) for row in lengths]
            return ShuffledBatches(pack(costs, budget, seed, name), seed)
        grids = [row_grid(row, self._shared) for row in lengths]
        return ShuffledBatches(pack_padded(grids, budget, seed, name), seed)

    def _loader(self, rows: Any, batches: ShuffledBatches) -> DataLoader:
        args = self.args
        loader = DataLoader(
            with_placeholders(rows, self.accelerator.num_processes),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )
        return even(self.accelerator.prepare(loader), drop_last=False)
