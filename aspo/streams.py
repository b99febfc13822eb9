"""Rows that come as a stream (an IterableDataset), whose number Trainer does not know."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset


class Passes(IterableDataset):
    """The batches of a stream's loader, pass after pass without end: to Trainer one epoch.

    Trainer counts the steps of a stream without a length over the whole run. Where a pass ended, it would leave the
    gradient of an incomplete accumulation window to the next step, and it would go on after an interruption as if the
    first pass had gone on. Ends where a pass has no batch.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for number in itertools.count():
            self.loader.set_epoch(number)
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                return


def endless(loader: DataLoader) -> DataLoader:
    """A loader of the batches of a stream's loader, over all its passes."""
    return DataLoader(Passes(loader), batch_size=None, collate_fn=lambda batch: batch)
