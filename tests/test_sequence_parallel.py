"""Tokens spread over 2, 3 and 2 x 2 gloo processes: loss, statistics and gradients against one process.

fp64, where two ways to the same number differ by 1e-15: what is left at 1e-9 is no rounding. In fp32 a few roundings.
The processes: `ranks`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from items import batch, inputs
from ranks import Ranks
from strategies import ragged_batches
from test_family import WAYS
from test_vocabulary_parallel import Wire
from torch import Tensor

from aspo_kernels import (
    SentenceLayout,
    SequenceShard,
    linear_logps,
    linear_token_kl,
    objectives,
    sentence_dpo_loss,
    token_logps,
)
from aspo_kernels.sequence import _share_tokens

HIDDEN, VOCABULARY = 6, 23
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def owned(owner: list[int]) -> Tensor:
    """The tokens of this process."""
    return torch.nonzero(torch.tensor(owner) == dist.get_rank()).flatten()


# --- every objective ---

FIELDS = inputs(batch())  # four items with 0 to 3 negatives, and everything that any objective reads
TOKENS = FIELDS.layout.num_tokens
RESPONSES = FIELDS.layout.response_token_offsets.tolist()


def splits(size: int) -> dict[str, list[int]]:
    """Which process each token is in."""
    first, last = RESPONSES[1], RESPONSES[2]
    return {
        "even": [token * size // TOKENS for token in range(TOKENS)],
        "one token in the first": [min(token, size - 1) for token in range(TOKENS)],
        "none in the last": [token % (size - 1) for token in range(TOKENS)],
        "in turn, so that every sentence crosses": [token % size for token in range(TOKENS)],
        "a response of its own": [1 if first <= token < last else 0 for token in range(TOKENS)],
        "all in one": [size - 1] * TOKENS,
    }


def losses_of_every_way(owner: list[int] | None, trainable: bool, grad: str = "sum") -> list[Any]:
    """Of each objective the losses, the statistics, d hidden (own rows) and d head; no owner: one process."""
    layout = replace(FIELDS.layout, targets=FIELDS.layout.targets % VOCABULARY)
    tokens = torch.arange(TOKENS) if owner is None else owned(owner)
    shard = None if owner is None else SequenceShard(tokens, TOKENS, grad=grad)
    hidden = noise(TOKENS, HIDDEN, seed=1)[tokens].requires_grad_()
    head = noise(VOCABULARY, HIDDEN, seed=2).requires_grad_(trainable)
    ref_hidden, ref_head = noise(TOKENS, HIDDEN, seed=3)[tokens], noise(VOCABULARY, HIDDEN, seed=4)
    targets = layout.targets if shard is None else shard.local(layout.targets)
    out = linear_token_kl(hidden, ref_hidden, head, ref_head, targets)
    with torch.no_grad():
        sharp = linear_logps(hidden, head, targets, temperature=0.5)
    numbers = (out.logps, out.ref_logps, out.kl, sharp)
    numbers = numbers if shard is None else shard.whole(*numbers)
    assert [x.requires_grad for x in numbers] == [True, False, True, False]
    names = ("logps", "ref_logps", "token_kl", "sharp_logps")
    x = replace(FIELDS, layout=layout, **dict(zip(names, numbers, strict=True)))
    results = []
    for name, options in WAYS:
        result = objectives.get(name)(replace(x), **options)
        operands = (hidden, head) if trainable else (hidden,)
        gradients = torch.autograd.grad(result.losses.mean(), operands, retain_graph=True)
        results.append([result.losses.detach(), result.stats, *gradients])
    return results


def check_ways(ranks: Ranks, owner: list[int], trainable: bool, grad: str = "sum") -> None:
    expected = losses_of_every_way(None, trainable)
    got = ranks.run(losses_of_every_way, owner, trainable, grad)
    factor = ranks.size if grad == "mean" else 1
    order = torch.tensor(owner).argsort(stable=True)  # process after process
    for k, way in enumerate(WAYS):
        losses, stats, d_hidden, *d_head = expected[k]
        assert d_hidden.abs().sum() > 0, way
        for result in got:
            assert torch.equal(result[k][0], got[0][k][0]), way
            torch.testing.assert_close(result[k][0], losses, **EXACT)
            torch.testing.assert_close(result[k][1], stats, **EXACT)
        rows = torch.cat([result[k][2] for result in got])
        torch.testing.assert_close(rows, factor * d_hidden[order], **EXACT)
        if trainable:  # each process has its tokens' share
            torch.testing.assert_close(sum(result[k][3] for result in got), factor * d_head[0], **EXACT)


@pytest.mark.parametrize("split", splits(2))
def test_every_objective_is_that_of_one_process(ranks, split):
    check_ways(ranks, splits(ranks.size)[split], trainable=False)


@pytest.mark.parametrize("grad", ["sum", "mean"])
def test_a_trainable_head_and_what_is_averaged_later(ranks, grad):
    check_ways(ranks, splits(ranks.size)["even"], trainable=True, grad=grad)


# --- sentence_dpo_loss ---


class Case:
    """A padded batch; `run` gives the loss, the statistics and the gradients, of it whole or of some columns of it."""

    def __init__(self, labels: Tensor, sentence_ids: Tensor, dtype: torch.dtype = torch.float64):
        self.layout = SentenceLayout.from_labels(labels, sentence_ids, eos_token_id=2)
        self.hidden, self.ref_hidden = (noise(*labels.shape, HIDDEN, seed=s, dtype=dtype) for s in (5, 6))
        self.head, self.ref_head = (noise(VOCABULARY, HIDDEN, seed=s, dtype=dtype) for s in (7, 8))
        self.lora = (noise(2, HIDDEN, seed=9, dtype=dtype), noise(VOCABULARY, 2, seed=10, dtype=dtype), 0.5)
        self.similarity = noise(self.layout.chosen_sentences.numel(), seed=11, dtype=torch.float32)

    @classmethod
    def usual(cls, dtype: torch.dtype = torch.float64) -> Case:
        """Two pairs of 16 positions: three sentences a row, a prompt of 4 and some padding."""
        labels = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
        labels[:, :4], labels[1, 13:], labels[2, 9:] = -100, -100, -100
        labels[0, 15] = 2
        return cls(labels, torch.tensor([0] * 6 + [1] * 2 + [2] * 8).expand(4, 16), dtype)

    def shard(self, columns: Tensor, **options: Any) -> SequenceShard:
        assert self.layout.padded_shape is not None
        return SequenceShard.of_columns(self.layout.hidden_index, self.layout.padded_shape, columns, **options)

    def run(self, reference: str, columns: Tensor | None = None, sequence: SequenceShard | None = None, **options: Any):
        hidden, ref_hidden = self.hidden.clone(), self.ref_hidden.clone()
        if columns is not None:
            sequence = self.shard(columns) if sequence is None else sequence
            hidden, ref_hidden = widened(hidden)[:, columns], widened(ref_hidden)[:, columns]
        leaves = [t.clone().requires_grad_() for t in (hidden, self.head, *self.lora[:2])]
        extra: dict[str, Any] = {"ref_hidden": ref_hidden}
        if reference == "another head":
            extra["ref_head"] = self.ref_head
        elif reference == "lora":
            extra["lora"] = (*leaves[2:], self.lora[2])
        elif reference == "cached":
            extra = {"ref_logps": noise(self.layout.num_tokens, seed=12, dtype=torch.float32) - 3}
        out = sentence_dpo_loss(
            *leaves[:2], self.layout, similarity=self.similarity, sequence=sequence, **extra, **options
        )
        out.loss.sum().backward()
        stats = {name: value for name, value in vars(out).items() if value is not None}
        return {k: v.detach() for k, v in stats.items()}, [t.grad for t in leaves]


def widened(hidden: Tensor) -> Tensor:
    """With 8 columns more, as where T is brought to a multiple of the processes."""
    return torch.nn.functional.pad(hidden, (0, 0, 0, 8))


def run_columns(case: Case, pieces: list[list[int]], reference: str, **options: Any) -> Any:
    return case.run(reference, torch.tensor(pieces[dist.get_rank()], dtype=torch.int64), **options)


def check_columns(
    ranks: Ranks, case: Case, pieces: list[list[int]], reference: str, exact: Any = EXACT, **options: Any
) -> None:
    stats, (d_hidden, *d_shared) = case.run(reference, **options)
    results = ranks.run(run_columns, case, pieces, reference, **options)
    for got, _ in results:
        assert all(torch.equal(got[name], results[0][0][name]) for name in stats)
        torch.testing.assert_close(got, stats, **exact)
    for piece, (_, gradients) in zip(pieces, results, strict=True):
        torch.testing.assert_close(gradients[0], widened(d_hidden)[:, piece], **exact)
    for k, expected in enumerate(d_shared, 1):
        if expected is not None:
            torch.testing.assert_close(sum(gradients[k] for _, gradients in results), expected, **exact)


def contiguous(size: int, length: int = 16) -> list[list[int]]:
    return [part.tolist() for part in torch.arange(length).tensor_split(size)]


@pytest.mark.parametrize("reference", ["same head", "another head", "lora", "cached"])
def test_the_loss_of_a_cut_sequence(ranks, reference):
    for options in ({}, {"perplexity": "reference", "normalizer": "reward"}, {"reduction": "none", "alpha": 0.2}):
        check_columns(ranks, Case.usual(), contiguous(ranks.size), reference, **options)


def test_in_fp32_to_a_few_roundings(ranks):
    for reference in ("same head", "lora"):
        case = Case.usual(torch.float32)
        check_columns(ranks, case, contiguous(ranks.size), reference, {"rtol": 2e-5, "atol": 1e-6})


def test_columns_in_any_order_and_a_process_without_tokens(ranks):
    prompt, rest = [0, 1, 2, 3], list(range(4, 16))
    check_columns(ranks, Case.usual(), [rest[::-1], prompt, *[[]] * (ranks.size - 2)], "same head")
    check_columns(ranks, Case.usual(), [*[[]] * (ranks.size - 1), [*rest, *prompt]], "another head")


@settings(max_examples=25)
@given(data=st.data())
def test_random_splits(ranks, data):
    """Any batch, any column to any process."""
    ragged = data.draw(ragged_batches())
    case = Case(ragged.labels.where(ragged.labels < 0, ragged.labels % VOCABULARY), ragged.sentence_ids)
    length = ragged.labels.shape[1]
    owner = data.draw(st.lists(st.integers(0, ranks.size - 1), min_size=length, max_size=length))
    order = data.draw(st.permutations(range(length)))
    pieces = [[column for column in order if owner[column] == rank] for rank in range(ranks.size)]
    options = {
        "perplexity": data.draw(st.sampled_from(["policy", "reference"])),
        "normalizer": data.draw(st.sampled_from(["sentence", "token", "none"])),
    }
    check_columns(ranks, case, pieces, data.draw(st.sampled_from(["same head", "another head"])), **options)


def bits_and_wire() -> Any:
    case = Case.usual(torch.float32)
    sequence = SequenceShard.even(case.layout.num_tokens)
    rows, ref_rows = (sequence.local(x.flatten(0, 1)[case.layout.hidden_index]) for x in (case.hidden, case.ref_hidden))
    hidden = rows.requires_grad_()
    with Wire() as seen:
        out = sentence_dpo_loss(
            hidden, case.head, case.layout, ref_hidden=ref_rows, similarity=case.similarity, sequence=sequence
        )
        out.loss.backward()
    _, ref_logps = sequence.whole(
        torch.zeros(sequence.tokens.numel()), linear_logps(ref_rows, case.head, sequence.local(case.layout.targets))
    )
    x = objectives.Inputs(case.layout, out.logps, ref_logps, case.similarity)
    again = objectives.get("aspo")(x)
    return torch.equal(again.losses.mean(), out.loss) and torch.equal(again.stats["margins"], out.margins), seen


def test_one_reduction_and_then_what_one_process_does(ranks):
    """To the bit: from the same log-probabilities nothing else is done. And the backward sends nothing."""
    tokens = Case.usual().layout.num_tokens
    for same_bits, seen in ranks.run(bits_and_wire):
        assert same_bits
        assert seen == [("all_reduce", 3 * tokens)], "policy, reference, and who holds the token"


def empty_batches() -> None:
    for rows in (0, 2):  # no pair at all, and a pair of which this process may have nothing
        case = Case(torch.full((rows, 8), 3), torch.zeros(rows, 8, dtype=torch.long))
        columns = torch.arange(8) if dist.get_rank() == 0 else torch.arange(0)
        stats, gradients = case.run("same head", columns)
        assert stats["logps"].numel() == 8 * rows
        assert gradients[0].shape == (rows, columns.numel(), HIDDEN)
        assert bool(gradients[0].abs().sum() > 0) == bool(rows and columns.numel())


def test_no_pairs(ranks):
    ranks.run(empty_batches)


def with_a_shared_prefix(distinct: bool) -> Any:
    """Rows 0 and 1 of two responses that share columns 0..3 of one row: their first two tokens are one prediction."""
    targets = torch.tensor([3, 4, 5, 6, 7, 3, 4, 8, 9])
    hidden_index = torch.tensor([3, 4, 5, 6, 7, 3, 4, 8, 9])
    layout = SentenceLayout(
        targets, hidden_index, torch.tensor([0, 2, 5, 9]), torch.tensor([0, 2, 3]), torch.tensor([0, 0]),
        torch.tensor([0, 1]), padded_shape=(1, 12),
    )  # fmt: skip
    first, inverse = torch.tensor([0, 1, 2, 3, 4, 7, 8]), torch.tensor([0, 1, 2, 3, 4, 0, 1, 5, 6])
    if not distinct:
        first, inverse = torch.arange(9), torch.arange(9)
    head, grid = noise(VOCABULARY, HIDDEN, seed=1), noise(1, 12, HIDDEN, seed=2)
    ref_logps = noise(9, seed=3)

    def loss(logps: Tensor) -> Tensor:
        return objectives.get("dpo")(objectives.Inputs(layout, logps[inverse], ref_logps)).losses.sum()

    whole = grid.clone().requires_grad_()
    expected = loss(linear_logps(whole.flatten(0, 1)[hidden_index[first]], head, targets[first]))
    expected.backward()
    columns = torch.arange(12)[dist.get_rank() :: dist.get_world_size()]
    shard = SequenceShard.of_columns(hidden_index[first], (1, 12), columns)
    mine = grid[:, columns].clone().requires_grad_()
    (logps,) = shard.whole(linear_logps(shard.local_rows(mine), head, shard.local(targets[first])))
    got = loss(logps)
    got.backward()
    torch.testing.assert_close(got, expected, **EXACT)
    torch.testing.assert_close(mine.grad, whole.grad[:, columns], **EXACT)
    logits = (mine.detach() @ head.T).flatten(0, 1)
    (from_logits,) = shard.whole(token_logps(logits[shard.rows], shard.local(targets[first])))
    torch.testing.assert_close(from_logits, logps.detach(), **EXACT)


@pytest.mark.parametrize("distinct", [False, True])
def test_a_shared_prefix_and_logits(ranks, distinct):
    ranks.run(with_a_shared_prefix, distinct)


def run_compiled() -> None:
    case = Case.usual()
    columns = torch.tensor(contiguous(dist.get_world_size())[dist.get_rank()])
    shard = case.shard(columns, grad="mean")
    ref_hidden = case.ref_hidden[:, columns]

    def loss(hidden: Tensor) -> Tensor:
        return sentence_dpo_loss(
            2 * hidden, case.head, case.layout, ref_hidden=ref_hidden, similarity=case.similarity, sequence=shard
        ).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden = case.hidden[:, columns].clone().requires_grad_()
        out = function(hidden)
        out.backward()
        results.append((out.detach(), hidden.grad))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def run_opcheck() -> None:
    """Schema, fake, autograd registration and tracing of the operator, as torch tests them."""
    shard = SequenceShard.even(7)
    values = noise(2, shard.tokens.numel(), seed=dist.get_rank()).requires_grad_()
    torch.library.opcheck(_share_tokens, (values, shard.tokens, 7, True, shard.group_name))


def test_compiles_as_one_graph(ranks):
    if ranks.size > 2:
        pytest.skip("takes seconds, and 2 processes say as much")
    ranks.run(run_compiled)
    ranks.run(run_opcheck)


def columns_of_context_parallel() -> list[int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    columns = torch.arange(24)[None].clone()
    with context_parallel(init_device_mesh("cpu", (dist.get_world_size(),)), buffers=[columns], buffer_seq_dims=[1]):
        return columns[0].tolist()


def test_what_torchs_context_parallel_leaves_on_a_process(ranks):
    """A slice of arange(T) says which columns: head and tail of the sequence, for balance."""
    pieces = ranks.run(columns_of_context_parallel)
    assert sorted(column for piece in pieces for column in piece) == list(range(24))
    assert 0 in pieces[0] and 23 in pieces[0]
    check_columns(ranks, Case.usual(), pieces, "same head")  # the columns behind 15 are padding
