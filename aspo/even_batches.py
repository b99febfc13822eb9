"""Batches for several processes: as many for each, every row in exactly one of them.

accelerate gives batch n to process n mod P, and fills the last round up with rows from the beginning, which then count
twice. Here the last round's rows are dealt out instead, and a process for which none is left gets a placeholder: a row
that runs through the model, so that every process takes part in every collective call, and counts for nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader, IterableDataset, Sampler

PLACEHOLDER = "placeholder"  # a row's column, and a batch's entry: True = it is run, and counts for nothing


class EvenBatches(Sampler[list[int]]):
    """A batch sampler's batches in rounds of `processes`; the last round made whole.

    Where batches are missing there, its largest ones are halved, and then placeholders are added: row numbers from
    `rows` on, read by `RowsAndPlaceholders`. drop_last: an incomplete round is left out.
    """

    batch_size = None  # read by accelerate: batches of any size
    drop_last = False

    def __init__(self, batches: Any, processes: int, rows: int, drop_last: bool = False) -> None:
        self.batches, self.processes, self.rows, self.leave_out = batches, processes, rows, drop_last

    def set_epoch(self, epoch: int) -> None:
        """Tell whoever draws the order."""
        for sampler in (self.batches, getattr(self.batches, "sampler", None)):
            if (tell := getattr(sampler, "set_epoch", None)) is not None:
                tell(epoch)

    def __len__(self) -> int:
        rounds, rest = divmod(len(self.batches), self.processes)
        return (rounds + (rest > 0 and not self.leave_out)) * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        group: list[list[int]] = []
        for batch in self.batches:
            group.append(list(batch))
            if len(group) == self.processes:
                yield from group
                group = []
        if group and not self.leave_out:
            yield from dealt(group, self.processes, self.rows)


def dealt(group: Sequence[list[int]], processes: int, rows: int) -> list[list[int]]:
    """The batches cut into `processes` ones, each a part of one of them; placeholders where rows run out."""
    batches = list(group)
    while len(batches) < processes:
        largest = max(range(len(batches)), key=lambda n: len(batches[n]))
        half = len(batches[largest]) // 2
        if half == 0:
            return batches + [[rows + n] for n in range(processes - len(batches))]
        batches[largest : largest + 1] = [batches[largest][:-half], batches[largest][-half:]]
    return batches


class RowsAndPlaceholders:
    """The rows of a data set, and behind the last one placeholders: copies of its first rows that say so."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index < len(self.rows):
            return self.rows[index]
        return {**self.rows[(index - len(self.rows)) % len(self.rows)], PLACEHOLDER: True}

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What a DataLoader asks for: a batch at once, where the rows can give one so."""
        if hasattr(self.rows, "__getitems__") and max(indices) < len(self.rows):
            return list(self.rows.__getitems__(list(indices)))
        return [self[index] for index in indices]


class EvenStream(IterableDataset):
    """One process's part of a stream, which every process reads whole: `batch_size` rows of each round, in order.

    The last round's rows are dealt out, and a process for which none is left gets a placeholder.
    """

    def __init__(self, rows: Any, processes: int, index: int, batch_size: int, drop_last: bool) -> None:
        self.rows, self.processes, self.index = rows, processes, index
        self.batch_size, self.leave_out = batch_size, drop_last

    def set_epoch(self, epoch: int) -> None:
        """Tell the stream, where it shuffles."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        first, begin, whole = None, self.index * self.batch_size, self.processes * self.batch_size
        for group in _rounds(self.rows, whole):
            first = group[0] if first is None else first
            if len(group) == whole:
                yield from group[begin : begin + self.batch_size]
            elif not self.leave_out:
                cuts = range(0, len(group), self.batch_size)
                batches = [list(range(n, min(n + self.batch_size, len(group)))) for n in cuts]
                mine = dealt(batches, self.processes, len(group))[self.index]
                yield from (group[n] if n < len(group) else {**first, PLACEHOLDER: True} for n in mine)


def _rounds(rows: Any, size: int) -> Iterator[list[Any]]:
    found = iter(rows)
    while group := list(itertools.islice(found, size)):
        yield group


def with_placeholders(rows: Any, processes: int) -> Any:
    """Rows that a loader of `even` reads; as they are for one process, or a stream."""
    return rows if processes == 1 or rows is None or isinstance(rows, IterableDataset) else RowsAndPlaceholders(rows)


def even(loader: DataLoader, drop_last: bool) -> DataLoader:
    """A loader prepared by accelerate, whose batches are then dealt out evenly; as it is in one process."""
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard):
        return loader
    batches = EvenBatches(shard.batch_sampler, shard.num_processes, len(loader.dataset), drop_last)  # type: ignore[arg-type]
    shard.batch_sampler, shard.batch_size = batches, None
    shard.drop_last = shard.even_batches = False
    shard.set_epoch = batches.set_epoch  # type: ignore[attr-defined]  # Trainer asks for it, behind skipped batches too
    return loader
