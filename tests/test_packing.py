"""Batches by tokens: every row once, within the budget, the same everywhere; and a real Trainer that runs on them."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from callbacks import StopAt
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainingArguments

from aspo.lengths import row_lengths
from aspo.packing import (
    PADDED_WINDOW,
    LengthGroups,
    ShuffledBatches,
    TokenBatches,
    pack,
    pack_padded,
    row_grid,
    row_tokens,
    shuffled,
)

seeds = st.none() | st.integers(-3, 2**40)
budgets = st.integers(10, 60)
costs = st.lists(st.integers(1, 10), max_size=80)
grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), max_size=80)

# ---- what a row costs ----


def test_costs_by_hand():
    plain = [(10, (3, 5))]
    assert (row_tokens(plain, shared=True), row_tokens(plain, shared=False)) == (18, 28)
    assert (row_grid(plain, shared=True), row_grid(plain, shared=False)) == ((1, 18), (2, 15))
    negative_image = [(10, (3, 5)), (9, (3,))]  # the chosen response is read again behind another image
    assert (row_tokens(negative_image, shared=True), row_tokens(negative_image, shared=False)) == (30, 40)
    assert (row_grid(negative_image, shared=True), row_grid(negative_image, shared=False)) == ((2, 18), (3, 15))


# ---- packing ----


@given(costs, budgets, seeds)
def test_packed_batches_hold_every_row_once_and_keep_the_budget(costs, budget, seed):
    batches = pack(costs, budget, seed)
    assert sorted(row for batch in batches for row in batch) == list(range(len(costs)))
    assert all(batch and sum(costs[row] for row in batch) <= budget for batch in batches)
    assert batches == pack(costs, budget, seed)


@given(costs, budgets, st.integers(0, 99))
def test_no_batch_is_opened_where_its_first_row_fits_into_an_earlier_one(costs, budget, seed):
    batches = pack(costs, budget, seed)
    for n, batch in enumerate(batches):
        assert all(sum(costs[row] for row in earlier) + costs[batch[0]] > budget for earlier in batches[:n])


@given(grids, budgets, seeds)
def test_padded_batches_hold_every_row_once_and_keep_the_budget(grids, budget, seed):
    batches = pack_padded(grids, budget, seed)
    assert sorted(row for batch in batches for row in batch) == list(range(len(grids)))
    for batch in batches:
        assert sum(grids[row][0] for row in batch) * max(grids[row][1] for row in batch) <= budget
    assert batches == pack_padded(grids, budget, seed)


@given(costs, budgets)
def test_without_a_seed_rows_stay_in_order_and_batches_are_as_long_as_they_can_be(costs, budget):
    batches = pack(costs, budget)
    assert [row for batch in batches for row in batch] == list(range(len(costs)))
    for batch, following in pairwise(batches):
        assert sum(costs[row] for row in [*batch, following[0]]) > budget


def test_batches_are_the_same_on_every_machine():
    """As they were when this was written: whatever the process's hash seed, and whatever a later Python shuffles."""
    costs = [5, 9, 2, 7, 4, 4, 8, 1, 6, 3]
    assert pack(costs, 15, 7) == [[5, 9, 6], [0, 1, 7], [2, 8, 4], [3]]
    assert pack_padded([(2, cost) for cost in costs], 40, 7) == [[1, 6], [3, 8], [0, 5, 4, 9], [2, 7]]
    assert shuffled(8, "0 epoch 1") == [0, 4, 2, 3, 1, 7, 6, 5]


def test_other_seeds_pack_otherwise():
    costs = [random.Random(0).randint(1, 50) for _ in range(40)]
    assert pack(costs, 100, 0) != pack(costs, 100, 1)
    assert shuffled(40, "0 rows") != shuffled(40, "1 rows") != list(range(40))


def image_rows(n):
    """Prompts with 600 image tokens, a quarter without, and log-normal responses (median 120 tokens)."""
    draw = random.Random(0)
    prompts = [600 * (draw.random() < 0.75) + draw.randint(10, 200) for _ in range(n)]
    return [[(p, tuple(int(draw.lognormvariate(4.8, 0.6)) + 1 for _ in range(2)))] for p in prompts]


@pytest.mark.parametrize(("budget", "least"), [(8192, 0.96), (16384, 0.98)])
def test_packed_batches_are_nearly_full(budget, least):
    costs = [row_tokens(row, shared=True) for row in image_rows(4000)]
    batches = pack(costs, budget, 0)
    assert sum(costs) / (len(batches) * budget) > least
    assert sum(costs) / (len(pack(costs, budget)) * budget) < sum(costs) / (len(batches) * budget)


def test_padded_batches_hold_rows_of_like_widths():
    grids = [row_grid(row, shared=False) for row in image_rows(2 * PADDED_WINDOW)]
    tokens = sum(height * width for height, width in grids)

    def padding(batches):
        heights = [sum(grids[row][0] for row in batch) for batch in batches]
        widths = [max(grids[row][1] for row in batch) for batch in batches]
        return 1 - tokens / sum(h * w for h, w in zip(heights, widths, strict=True))

    assert padding(pack_padded(grids, 16384, 0)) < 0.06 < 0.25 < padding(pack_padded(grids, 16384))


@pytest.mark.parametrize("pack_rows", [pack, lambda costs, *more: pack_padded([(1, c) for c in costs], *more)])
def test_a_row_that_exceeds_the_budget_is_named(pack_rows):
    with pytest.raises(ValueError, match=r"row 1 alone takes 30 tokens of a token_budget of 20 \(and 1 more rows do"):
        pack_rows([3, 30, 4, 40], 20, 0)
    with pytest.raises(ValueError, match="cat alone takes 21 tokens of a token_budget of 20: raise token_budget to 21"):
        pack_rows([3, 21], 20, None, ["dog", "cat"].__getitem__)
    with pytest.raises(ValueError, match="token_budget is 0"):
        pack_rows([], 0)


# ---- the order, epoch by epoch ----


def test_the_order_of_batches_is_drawn_anew_each_epoch_and_again_the_same():
    batches = pack([1] * 60, 3, 0)
    sampler = ShuffledBatches(batches, 5)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == 20
        assert sorted(epochs[-1]) == sorted(batches)
    assert epochs[0] != epochs[1] != epochs[2] != batches
    resumed = ShuffledBatches(pack([1] * 60, 3, 0), 5)
    resumed.set_epoch(2)
    assert list(resumed) == epochs[2]
    assert list(ShuffledBatches(batches)) == batches


def test_processes_take_turns():
    sampler = ShuffledBatches(pack([1] * 40, 4, 0), 0)
    taken = [list(BatchSamplerShard(sampler, num_processes=2, process_index=n)) for n in range(2)]
    assert [len(batches) for batches in taken] == [5, 5]
    assert sorted(row for batches in taken for batch in batches for row in batch) == list(range(40))


def test_length_groups_are_of_like_lengths_and_drawn_again_the_same():
    lengths = [random.Random(0).randint(1, 1000) for _ in range(400)]
    draw = LengthGroups(8, lengths, 3)
    first = list(draw)
    draw.set_epoch(1)
    second = list(draw)
    again = LengthGroups(8, lengths, 3)
    assert list(again) == first != second and sorted(first) == sorted(second) == list(range(400))
    spread = [max(group) - min(group) for group in ([lengths[i] for i in first[k : k + 8]] for k in range(0, 400, 8))]
    assert sum(spread) / len(spread) < 250  # of rows at random: about 780


# ---- lengths ----


class Rows:
    """A collator of rows {"id", "tokens"} that keeps what it was called with."""

    shared_prefix, padding_free = True, True

    def __init__(self):
        self.called = []

    def reading_lengths(self, row):
        return ((row["tokens"] - 2, (1, 1)),)

    def __call__(self, rows):
        return {"ids": torch.tensor([row["id"] for row in rows])}


@pytest.mark.parametrize("workers", [0, 2])
def test_lengths_come_in_the_rows_order_and_leave_random_numbers_alone(workers):
    rows = Dataset.from_list(make_rows(21))
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    found = row_lengths(rows, Rows(), num_workers=workers)
    assert found == [((row["tokens"] - 2, (1, 1)),) for row in rows]
    assert torch.rand(1) == expected


def test_what_has_no_lengths_is_refused():
    with pytest.raises(ValueError, match="IterableDataset is a stream"):
        row_lengths(Dataset.from_list(make_rows(3)).to_iterable_dataset(), Rows())
    with pytest.raises(ValueError, match="function has no method `reading_lengths`"):
        row_lengths(make_rows(3), make_rows)


# ---- inside Trainer ----


def make_rows(n):
    draw = random.Random(1)
    return [{"id": i, "tokens": draw.randint(5, 40)} for i in range(n)]


@dataclass
class Arguments(TrainingArguments):
    token_budget: int | None = None


class Recorder(TokenBatches):
    """Keeps the rows of every micro-batch and the pairs of its accumulation window."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            self.seen.append((self.state.global_step, inputs["ids"].tolist(), num_items_in_batch))
        else:
            self.evaluated.append(inputs["ids"].tolist())
        loss = (model.weight * (inputs["ids"] + 1.0)).sum() / (num_items_in_batch or 1)
        return (loss, {}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        return sum(len(batch["ids"]) for batch in batch_samples)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        return {"loss": self.weight * ids.sum()}


def trainer(folder, rows, callbacks=(), **options):
    defaults = {
        **{"output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no", "seed": 11},
        **{
            "num_train_epochs": 3,
            "gradient_accumulation_steps": 2,
            "remove_unused_columns": False,
            "disable_tqdm": True,
        },
        **{"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4},
    }
    held = rows[:7] if isinstance(rows, list) else None
    made = Recorder(Model(), Arguments(**{**defaults, **options}), Rows(), rows, held, callbacks=list(callbacks))
    made.model_accepts_loss_kwargs = True  # before loss_is_scaled_for_ga, Trainer asked this
    made.seen, made.evaluated = [], []
    return made


SAMPLING = {
    "packed": {"token_budget": 100},
    "workers": {"token_budget": 100, "dataloader_num_workers": 1},
    "grouped": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_resumed_run_takes_the_batches_of_one_that_never_stopped(tmp_path, sampling):
    """23 rows: an odd number of batches, so that an epoch ends in a smaller window; stops within each epoch."""
    rows, options = make_rows(23), SAMPLING[sampling]
    whole = trainer(tmp_path / "whole", rows, **options)
    whole.train()
    steps = whole.state.max_steps
    per_epoch = steps // 3
    assert whole.state.global_step == steps and per_epoch >= 3
    for stop in {2, per_epoch, per_epoch + 1} if sampling == "packed" else {per_epoch + 1}:
        folder = tmp_path / f"stopped-{stop}"
        stopped = trainer(folder, rows, [StopAt(stop)], **options)
        stopped.train()
        resumed = trainer(folder, rows, **options)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
        assert resumed.seen and stopped.seen + resumed.seen == whole.seen
        assert torch.equal(resumed.model.weight, whole.model.weight)


def test_trainer_runs_each_row_once_an_epoch_and_counts_right(tmp_path):
    rows = make_rows(23)
    packed = trainer(tmp_path, rows, token_budget=100)
    result = packed.train()
    batches = pack([row["tokens"] for row in rows], 100, 11)
    steps = -(-len(batches) // 2)
    assert len(batches) % 2 == 1 and packed.state.max_steps == 3 * steps and packed.state.epoch == 3
    orders = [packed.seen[n * len(batches) : (n + 1) * len(batches)] for n in range(3)]
    for epoch, order in enumerate(orders):
        assert sorted(ids for _, ids, _ in order) == sorted(batches)
        for n, (step, _, pairs) in enumerate(order):
            assert step == epoch * steps + n // 2
            assert pairs == sum(len(ids) for other, ids, _ in order if other == step)
    assert [ids for _, ids, _ in orders[0]] != [ids for _, ids, _ in orders[1]]
    rows_a_second = result.metrics["train_samples_per_second"]
    assert rows_a_second * result.metrics["train_runtime"] == pytest.approx(3 * 23, rel=0.05)
    assert packed.get_total_train_batch_size(packed.args) == round(2 * 23 / len(batches))
    assert trainer(tmp_path, rows).get_total_train_batch_size(packed.args) == 8


def test_sequential_training_and_evaluation_keep_the_rows_order(tmp_path):
    rows = make_rows(23)
    packed = trainer(tmp_path, rows, token_budget=100, train_sampling_strategy="sequential", num_train_epochs=2)
    packed.train()
    assert [i for _, ids, _ in packed.seen for i in ids] == list(range(23)) * 2
    for held, expected in (({}, rows[:7]), ({"eval_dataset": rows[3:20]}, rows[3:20])):
        packed.evaluated.clear()
        metrics = packed.evaluate(**held)
        assert packed.evaluated == [
            [expected[i]["id"] for i in batch] for batch in pack([row["tokens"] for row in expected], 100)
        ]
        assert "eval_loss" in metrics
    assert packed.get_eval_dataloader() is packed.get_eval_dataloader()


def test_grouped_training_evaluates_in_order(tmp_path):
    grouped = trainer(tmp_path, make_rows(23), train_sampling_strategy="group_by_length")
    grouped.evaluate()
    assert grouped.evaluated == [[0, 1, 2, 3], [4, 5, 6]]


def test_padded_rows_are_budgeted_with_their_padding(tmp_path):
    rows = make_rows(23)
    padded = trainer(tmp_path, rows, token_budget=100)
    padded.data_collator.padding_free = False
    loader = padded.get_train_dataloader()
    for batch in loader:
        assert len(batch["ids"]) * max(rows[i]["tokens"] for i in batch["ids"]) <= 100
    assert len(loader) > len(pack([row["tokens"] for row in rows], 100, 11))


def test_the_row_that_exceeds_the_budget_is_named_by_its_id(tmp_path):
    rows = [*make_rows(3), {"id": "giant", "tokens": 400}]
    with pytest.raises(ValueError, match="row 'giant' alone takes 400 tokens of a token_budget of 100"):
        trainer(tmp_path, rows, token_budget=100).train()


# ---- streams ----


class Stream(IterableDataset):
    """Rows without a length, each pass in another order; `readings`: passes that have rows."""

    def __init__(self, count, readings=99):
        self.count, self.readings, self.epoch = count, readings, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter([{"id": i} for i in shuffled(self.count, str(self.epoch))] if self.epoch < self.readings else [])


class Gradients(TrainerCallback):
    """The gradient of each optimiser step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(float(model.weight.grad))


# dispatch_batches as AspoConfig has it: every process reads its rows.
STREAMED = {
    **{"per_device_train_batch_size": 2, "max_grad_norm": 0.0},
    "accelerator_config": {"dispatch_batches": False},
}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streams_accumulation_goes_on_over_the_end_of_a_pass(tmp_path, workers):
    """10 rows are 5 batches: the third step takes a pass's last batch and the next one's first."""
    gradients = Gradients()
    options = {**STREAMED, "dataloader_num_workers": workers, "max_steps": 7}
    streamed = trainer(tmp_path, Stream(10), [gradients], **options)
    streamed.train()
    rows = [i for epoch in range(3) for i in shuffled(10, str(epoch))][:28]
    assert streamed.seen == [(n // 2, rows[2 * n : 2 * n + 2], 4) for n in range(14)]
    assert gradients.seen == [sum(rows[4 * n : 4 * n + 4]) / 4 + 1 for n in range(7)]
    assert streamed.state.epoch == 1.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_stream_goes_on_where_it_was(tmp_path, accumulation):
    options = {**STREAMED, "gradient_accumulation_steps": accumulation, "max_steps": 12 // accumulation}
    whole = trainer(tmp_path / "whole", Stream(9), **options)
    whole.train()
    for stop in range(2, options["max_steps"], 5 // accumulation):
        folder = tmp_path / f"stopped-{stop}"
        stopped = trainer(folder, Stream(9), [StopAt(stop)], **options)
        stopped.train()
        resumed = trainer(folder, Stream(9), **options)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
        assert resumed.seen and stopped.seen + resumed.seen == whole.seen
        assert torch.equal(resumed.model.weight, whole.model.weight)


def test_a_stream_that_ends_too_early_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="a pass over it gave no batch at step 0 of 3: give rows"):
        trainer(tmp_path, Stream(0), **STREAMED, max_steps=3).train()
    with pytest.raises(ValueError, match="a pass over it gave no batch at step 3 of 4: give rows"):
        trainer(tmp_path, Stream(6, readings=2), **STREAMED, max_steps=4).train()
    enough = trainer(tmp_path, Stream(8, readings=1), **STREAMED, max_steps=2)
    enough.train()
    assert enough.state.global_step == 2


def test_a_stream_of_datasets_is_shuffled_anew_in_each_pass(tmp_path):
    rows = Dataset.from_list([{"id": i} for i in range(8)]).to_iterable_dataset().shuffle(seed=3, buffer_size=8)
    streamed = trainer(tmp_path, rows, **STREAMED, max_steps=4)
    streamed.train()
    first, second = ([i for _, ids, _ in streamed.seen[n : n + 4] for i in ids] for n in (0, 4))
    assert sorted(first) == sorted(second) == list(range(8)) and first != second
