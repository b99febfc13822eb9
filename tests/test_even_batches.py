"""Batches for several processes: every row once an epoch, as many batches for each, nobody left without one."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)

from collections import Counter

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from aspo.even_batches import PLACEHOLDER, EvenBatches, EvenStream, RowsAndPlaceholders, dealt, even, with_placeholders
from aspo.packing import ShuffledBatches


@given(rows=st.integers(1, 60), size=st.integers(1, 9), processes=st.integers(1, 7), drop_last=st.booleans())
def test_every_row_once_and_as_many_batches_for_each(rows, size, processes, drop_last):
    inner = BatchSampler(SequentialSampler(range(rows)), size, drop_last)
    batches = EvenBatches(inner, processes, rows, drop_last)
    found = list(batches)
    assert len(found) == len(batches) and len(found) % processes == 0 and all(found)
    counted = [row for batch in found for row in batch if row < rows]
    assert counted == sorted(set(counted))
    if drop_last:
        assert len(counted) == len(found) * size and rows - len(counted) < size * processes
    else:
        assert counted == list(range(rows))
        placeholders = sum(row >= rows for batch in found for row in batch)
        assert placeholders == 0 or rows % (size * processes) < processes  # only where rows run out
        assert all(len(batch) == 1 for batch in found if batch[0] >= rows)


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5), st.integers(5, 12))
def test_dealt_batches_are_parts_of_the_ones_there_were(group, processes):
    found = dealt(group, processes, 100)
    assert len(found) == processes
    assert [row for batch in found for row in batch if row < 100] == [row for batch in group for row in batch]
    assert all(any(set(batch) <= set(whole) for whole in group) for batch in found if batch[0] < 100)  # a budget holds


class Rows(list):
    """Rows that give several at once, as a datasets.Dataset does."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [list, Rows])
def test_placeholders_are_copies_that_say_so(kind):
    rows = RowsAndPlaceholders(kind([{"id": "a"}, {"id": "b"}]))
    assert len(rows) == 2 and rows[1] == {"id": "b"}
    assert rows.__getitems__([0, 1]) == [{"id": "a"}, {"id": "b"}]
    assert rows.__getitems__([3]) == [{"id": "b", PLACEHOLDER: True}] and rows[2] == {"id": "a", PLACEHOLDER: True}
    own = kind([{"id": "a"}])
    assert with_placeholders(own, 1) is own


def loaders(processes, sampler, drop_last=False):
    """What each process's loader gives, as accelerate prepares it and `even` deals it out."""
    rows = [{"n": n} for n in range(23)]
    made = []
    for index in range(processes):
        batches = sampler(rows)
        options = {
            "batch_sampler": batches,
            "collate_fn": lambda found: [row["n"] for row in found if PLACEHOLDER not in row],
        }
        loader = DataLoader(with_placeholders(rows, processes), **options)
        common = {"num_processes": processes, "process_index": index, "put_on_device": False, "even_batches": False}
        made.append(even(prepare_data_loader(loader, **common, use_seedable_sampler=True, data_seed=5), drop_last))
    return made


def plain(rows):
    return BatchSampler(SeedableRandomSampler(rows, data_seed=5), 4, False)


def packed(rows):
    return ShuffledBatches([[n, n + 1] for n in range(0, 22, 2)] + [[22]], seed=3)


@pytest.mark.parametrize("sampler", [plain, packed])
@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_one_epochs_order_and_a_resumed_one_goes_on_in_it(sampler, processes):
    (alone,) = loaders(1, sampler)
    for epoch in (0, 1, 4):
        alone.set_epoch(epoch)
        order = list(alone)
        several = loaders(processes, sampler)
        for loader in several:
            loader.set_epoch(epoch)
        columns = [list(loader) for loader in several]
        assert len({len(column) for column in columns}) == 1
        rounds = list(zip(*columns, strict=True))
        whole = len(order) // processes
        assert [list(batch) for found in rounds[:whole] for batch in found] == order[: whole * processes]
        left = [row for batch in order[whole * processes :] for row in batch]
        assert [row for found in rounds[whole:] for batch in found for row in batch] == left
        assert Counter(row for found in rounds for batch in found for row in batch) == Counter(range(23))
        again = loaders(processes, sampler)
        for loader, column in zip(again, columns, strict=True):
            rest = skip_first_batches(loader, 2)
            rest.set_epoch(epoch)
            rest.batch_sampler.batch_sampler.set_epoch(epoch)  # what Trainer does
            assert list(rest) == column[2:]


def test_one_process_keeps_its_loader():
    loader = DataLoader([1, 2, 3], batch_size=2)
    batches = loader.batch_sampler
    assert even(loader, False) is loader and loader.batch_sampler is batches


class Stream(IterableDataset):
    """Rows one by one."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter([{"n": n} for n in range(self.count)])


@given(rows=st.integers(1, 60), size=st.integers(1, 5), processes=st.integers(2, 5), drop_last=st.booleans())
def test_a_streams_rows_are_dealt_out_too(rows, size, processes, drop_last):
    columns = []
    for index in range(processes):
        part = EvenStream(Stream(rows), processes, index, size, drop_last)
        columns.append(
            list(DataLoader(part, size, collate_fn=lambda found: [r["n"] for r in found if PLACEHOLDER not in r]))
        )
    assert len({len(column) for column in columns}) == 1
    found = [row for batches in zip(*columns, strict=True) for batch in batches for row in batch]
    assert found == list(range(len(found)))
    assert len(found) == rows - rows % (size * processes) * drop_last


def test_a_stream_is_not_wrapped():
    stream = Stream(3)
    assert with_placeholders(stream, 4) is stream
