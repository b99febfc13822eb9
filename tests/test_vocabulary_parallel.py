"""A head spread over 2 and 3 gloo processes: each schedule against the fp64 oracle, and what goes over the wire.

How accuracy is judged: `problems`. The processes: `ranks`.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import EPILOGUES, SCHEDULES, Problem, check_gradients, check_logps, leave_targets_unchecked
from ranks import Ranks
from torch import Tensor

from aspo_kernels import SentenceLayout, linear_logps, linear_logps_pair, sentence_dpo_loss, tiles
from aspo_kernels.vocabulary import VocabularyShard

# 40 tokens are three chunks of 16 (the last of 8); 150 rows are up to three slices of 64 in one process.
SMALL_TILES = tiles.TileSize(tokens=16, bytes=1, width=64, gradient_tokens=16)
CUTS = {
    2: {"even": (0, 75, 150), "one row first": (0, 1, 150), "one row last": (0, 149, 150)},
    3: {"even": (0, 50, 100, 150), "uneven": (0, 100, 101, 150), "one row each but one": (0, 1, 149, 150)},
}


# --- in the processes ---

_groups: dict[tuple[int, ...] | None, Any] = {None: None}


def shard_of(cuts: tuple[int, ...], members: tuple[int, ...] | None = None) -> VocabularyShard | None:
    """This process's shard of a group of `members` (None: all); None in a process that is no member."""
    if members not in _groups:
        _groups[members] = dist.new_group(members)
    group = _groups[members]
    rank = dist.get_rank(group)
    return None if rank < 0 else VocabularyShard(cuts[rank], cuts[rank + 1], cuts[-1], group)


class Wire:
    """Records name and size of each collective of torch.distributed that is called."""

    def __enter__(self) -> list[tuple[str, int]]:
        self.seen: list[tuple[str, int]] = []
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(tiles, "CPU_TILE", SMALL_TILES)
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce", "reduce_scatter"):
            self.patch.setattr(dist, name, self.recorded(name, getattr(dist, name)))
        return self.seen

    def recorded(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = next(arg for arg in args if isinstance(arg, Tensor))
            self.seen.append((name, sent.numel()))
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def run_shard(
    problem: Problem, cuts: tuple[int, ...], schedule: str, members: Any = None, backend: str = "torch", **options: Any
) -> Any:
    """(log-probabilities, gradients, what went over the wire) of this process's part of a problem."""
    shard = shard_of(cuts, members)
    if shard is None:
        return None
    problem.head = problem.head[shard.start : shard.stop]
    problem.bias = None if problem.bias is None else problem.bias[shard.start : shard.stop]
    needs, budget = SCHEDULES[schedule]
    needs = (*needs[:2], needs[2] and problem.bias is not None)
    with Wire() as seen:
        logps, gradients = problem.run(
            linear_logps, needs=needs, memory_budget=budget, vocabulary=shard, backend=backend, **options
        )
    return logps, gradients, seen


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    """What a ValueError says."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# --- in the test's own process ---


def portable(problem: Problem) -> Problem:
    problem = copy.copy(problem)
    del problem.generator  # which cannot be sent
    return problem


def check_shards(
    ranks: Ranks, problem: Problem, cuts: tuple[int, ...], schedule: str, floor: float = 0.0, members: Any = None,
    backend: str = "torch", **epilogue: Any,
) -> None:  # fmt: skip
    """The same bits in every process, within the limits of one process; d_hidden whole, the head's by rows."""
    results = ranks.run(run_shard, portable(problem), cuts, schedule, members, backend, **epilogue)
    results = [result for result in results if result is not None]
    logps, (d_hidden, *_), _ = results[0]
    for other_logps, (other_d_hidden, *_), _ in results[1:]:
        assert torch.equal(logps, other_logps)
        assert (d_hidden is None and other_d_hidden is None) or torch.equal(d_hidden, other_d_hidden)
    d_head, d_bias = (
        None if parts[0] is None else torch.cat(parts)
        for parts in ([gradients[k] for _, gradients, _ in results] for k in (1, 2))
    )
    needs = SCHEDULES[schedule][0]
    assert [g is not None for g in (d_hidden, d_head, d_bias)] == [*needs[:2], needs[2] and problem.bias is not None]
    check_logps(problem, logps, **epilogue)
    check_gradients(problem, [d_hidden, d_head, d_bias], floor, **epilogue)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_matches_the_oracle(ranks, schedule, dtype):
    for k, cuts in enumerate(CUTS[ranks.size].values()):
        check_shards(ranks, Problem(40, 150, 24, dtype, seed=k), cuts, schedule)


@pytest.mark.parametrize("epilogue", [name for name in EPILOGUES if name != "plain"])
@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_epilogues(ranks, schedule, epilogue):
    for cuts in CUTS[ranks.size].values():
        check_shards(ranks, Problem(40, 150, 24, torch.float32), cuts, schedule, **EPILOGUES[epilogue])


@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_odd_sizes(ranks, schedule):
    generator = torch.Generator().manual_seed(0)
    for seed in range(6):
        n, h = (int(torch.randint(1, top, (), generator=generator)) for top in (40, 9))
        v = int(torch.randint(ranks.size, 200, (), generator=generator))
        inner = torch.randperm(v - 1, generator=generator)[: ranks.size - 1] + 1
        cuts = (0, *sorted(inner.tolist()), v)
        check_shards(ranks, Problem(n, v, h, torch.float64, seed), cuts, schedule, softcap=4.0)


def with_a_rival(n: int, dtype: torch.dtype, nll: float, target: int, rival: int) -> Problem:
    """Every fourth target is very unlikely, because of one other row."""
    problem = Problem(n, 150, 32, dtype, spread=1.0, bias=False)
    towards_rival = problem.normal(32).sign() / 32**0.5
    problem.targets[::4] = target
    problem.head[rival] = (problem.head[rival] + nll / 8 * towards_rival).to(dtype)
    sizes = 8 + problem.normal(n, 1)[::4]
    problem.hidden[::4] = (problem.hidden[::4] + sizes * towards_rival).to(dtype)
    assert problem.oracle()[0].min() < -nll, "the problem is what it says"
    return problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
@pytest.mark.parametrize("nll", [60.0, 90.0, 200.0])
def test_a_rival_in_another_process(ranks, schedule, nll, dtype):
    """Only the process that holds the rival raises c."""
    floor = 4e-3 if dtype == torch.bfloat16 else nll * torch.finfo(torch.float32).eps  # as in test_linear_logps
    for target, rival in ((2, 140), (140, 2)):
        problem = with_a_rival(40, dtype, nll, target, rival)
        check_shards(ranks, problem, CUTS[ranks.size]["even"], schedule, floor)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the processes have their tensors on the CPU: for the interpreter"
)
@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_the_triton_kernels(ranks, schedule):
    """Shifts raised inside a kernel by one process, and then by another kernel in the others."""
    cuts = CUTS[ranks.size]["even"]
    check_shards(ranks, Problem(20, 150, 24, torch.float32), cuts, schedule, backend="triton", softcap=5.0)
    check_shards(ranks, with_a_rival(9, torch.float32, 90.0, 2, 140), cuts, schedule, backend="triton")


@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_a_rival_of_ten_thousand(ranks, schedule):
    problem = Problem(20, 150, 16, torch.float32, bias=False)
    problem.hidden[:, 0] = 100.0
    problem.head[140, 0] = 100.0
    problem.targets[:] = torch.arange(20)
    problem.targets[3] = 140
    assert problem.oracle()[0].min() < -9e3
    check_shards(ranks, problem, CUTS[ranks.size]["even"], schedule, 1e4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_every_process_raises_its_own_shift(ranks, schedule):
    """Logits that climb by 60 from process to process; the shares of two rivals beside each other are comparable."""
    problem = Problem(20, 150, 8, torch.float32, bias=False)
    cuts = CUTS[ranks.size]["even"]
    problem.hidden[:, 0] = 4.0
    for k, (start, stop) in enumerate(pairwise(cuts)):
        problem.head[start:stop, 0] = 15.0 * k
        problem.head[stop - 1, 0] = 15.0 * (k + 1)  # so that the next process's are no higher
    assert problem.oracle()[0].min() < -60 * (ranks.size - 1)
    check_shards(ranks, problem, cuts, schedule)


@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_near_certain_targets_keep_their_digits(ranks, schedule):
    """-logp down to 1e-8, with all logits far below 0: the owner's z_y is the shift of all, though 0 is larger."""
    problem = Problem(40, 150, 32, torch.float32, spread=1.0)
    rows = problem.head[problem.targets].double()
    problem.hidden = (rows / rows.norm(dim=1, keepdim=True) ** 2 * 20).float()
    problem.bias = torch.full((150,), -200.0)
    expected = problem.oracle()[0]
    assert -1e-5 < expected.max() < 0
    for cuts in CUTS[ranks.size].values():
        check_shards(ranks, problem, cuts, schedule)
        logps = ranks.run(run_shard, portable(problem), cuts, schedule)[0][0]
        torch.testing.assert_close(logps, expected, rtol=2e-4, atol=0)


def test_a_target_in_each_row(ranks):
    """Each shard's first and last row among them."""
    for cuts in CUTS[ranks.size].values():
        problem = Problem(150, 150, 8, torch.float64)
        problem.targets = torch.arange(150)
        check_shards(ranks, problem, cuts, "stored")


def test_a_group_smaller_than_the_world(ranks):
    members = (0, ranks.size - 1) if ranks.size > 2 else (1,)
    cuts = (0, 60, 150) if ranks.size > 2 else (0, 150)
    for schedule in ("none", "frozen", "stored", "recompute"):
        check_shards(ranks, Problem(40, 150, 24, torch.float32), cuts, schedule, members=members)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_tokens(ranks, schedule):
    problem = Problem(0, 150, 8, torch.float32)
    for logps, gradients, seen in ranks.run(run_shard, portable(problem), CUTS[ranks.size]["even"], schedule):
        assert logps.shape == (0,)
        assert all(g is None or g.abs().sum() == 0 for g in gradients)
        assert [g is not None for g in gradients] == list(SCHEDULES[schedule][0])
        assert not seen


# --- what goes over the wire ---


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_small_collectives_a_chunk_and_one_for_the_hidden_states(ranks, schedule):
    n, h = 40, 24
    results = ranks.run(run_shard, portable(Problem(n, 150, h, torch.bfloat16)), CUTS[ranks.size]["even"], schedule)
    gather = [("all_gather", 2 * tokens) for tokens in (16, 16, 8)]
    share = [("all_reduce", tokens) for tokens in (16, 16, 8)]
    if SCHEDULES[schedule][0][0]:
        # The sum of a chunk's G starts behind the next chunk's targets, so that it has that chunk's time.
        total = [("all_reduce", tokens * h) for tokens in (16, 16, 8)]
        expected = [share[0], gather[0], share[1], total[0], gather[1], share[2], total[1], gather[2], total[2]]
    else:
        expected = [share[0], gather[0], share[1], gather[1], share[2], gather[2]]
    assert all(seen == expected for *_, seen in results)


# --- beside the plain call ---


def run_lora(problem: Problem, a: Tensor, b: Tensor, cuts: tuple[int, ...] | None, dtype: Any, **options: Any) -> Any:
    """Log-probabilities and the gradients of hidden, head, A and B."""
    shard = None if cuts is None else shard_of(cuts)
    rows = slice(None) if shard is None else slice(shard.start, shard.stop)
    operands = (problem.hidden, problem.head[rows], a, b[rows])
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in operands]
    with Wire():
        logps = linear_logps(
            *leaves[:2], problem.targets, lora=(leaves[2], leaves[3], 0.7), vocabulary=shard, **options
        )
        logps.backward(problem.upstream.to(logps))
    return [logps.detach().double(), *(t.grad.double() for t in leaves)]


@pytest.mark.parametrize("budget", [0, 1 << 40])
def test_lora_on_the_head(ranks, budget):
    problem = Problem(40, 150, 24, torch.float32, bias=False)
    a, b = problem.normal(3, 24).float(), problem.normal(150, 3).float()
    expected = run_lora(problem, a, b, None, torch.float64, backend="reference", softcap=9.0)
    for cuts in CUTS[ranks.size].values():
        results = ranks.run(
            run_lora, portable(problem), a, b, cuts, torch.float32, backend="torch", memory_budget=budget, softcap=9.0
        )
        for whole in (0, 1, 3):  # logps, hidden, A
            assert all(torch.equal(results[0][whole], result[whole]) for result in results)
        got = [torch.cat([r[k] for r in results]) if k in (2, 4) else results[0][k] for k in range(5)]
        for ours, exact in zip(got, expected, strict=True):
            assert (ours - exact).norm() <= 2e-6 * exact.norm()


def run_both(problem: Problem, ref_hidden: Tensor, cuts: tuple[int, ...]) -> Any:
    shard = shard_of(cuts)
    assert shard is not None
    hidden = problem.hidden.requires_grad_()
    head, bias = problem.head[shard.start : shard.stop], problem.bias[shard.start : shard.stop]
    with Wire() as seen:
        logps, ref_logps = linear_logps_pair(
            hidden, ref_hidden, head, problem.targets, bias=bias, vocabulary=shard, backend="torch"
        )
        logps.backward(problem.upstream.to(logps))
    return logps.detach().double(), ref_logps.double(), hidden.grad.double(), seen


def test_policy_and_reference_in_one_pass(ranks):
    problem = Problem(20, 150, 24, torch.float32)
    reference = copy.copy(problem)
    reference.hidden = problem.normal(20, 24).float()
    for cuts in CUTS[ranks.size].values():
        results = ranks.run(run_both, portable(problem), reference.hidden, cuts)
        logps, ref_logps, d_hidden, seen = results[0]
        check_logps(problem, logps)
        check_logps(reference, ref_logps)
        check_gradients(problem, [d_hidden, None, None])
        assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0][:3], r[:3], strict=True))
        assert len(seen) == 2 * 3, "two chunks of at most 16 tokens of both, and no collectives of the reference's own"


def run_loss(cuts: tuple[int, ...] | None, with_lora: bool) -> list[Tensor]:
    """The loss of one pair of 20 tokens, and the gradients of hidden, head, and A and B of a LoRA."""
    problem = Problem(20, 150, 24, torch.float32, bias=False)
    ref_hidden, a, b = (problem.normal(*shape).float() for shape in ((2, 10, 24), (3, 24), (150, 3)))
    shard = None if cuts is None else shard_of(cuts)
    rows = slice(None) if shard is None else slice(shard.start, shard.stop)
    layout = SentenceLayout.from_labels(problem.targets.view(2, 10), torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3, 3]] * 2))
    leaves = [t.clone().requires_grad_() for t in (problem.hidden.view(2, 10, 24), problem.head[rows], a, b[rows])]
    lora = (leaves[2], leaves[3], 0.3) if with_lora else None
    with Wire():
        out = sentence_dpo_loss(
            *leaves[:2], layout, ref_hidden=ref_hidden, lora=lora, vocabulary=shard, backend="torch", softcap=9.0
        )
        out.loss.backward()
    return [out.loss.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_loss_from_end_to_end(ranks, with_lora):
    expected = run_loss(None, with_lora)
    for cuts in CUTS[ranks.size].values():
        results = ranks.run(run_loss, cuts, with_lora)
        got = [torch.cat([r[k] for r in results]) if k in (2, 4) else results[0][k] for k in range(len(expected))]
        for ours, plain in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)
        assert all(torch.equal(results[0][k], r[k]) for r in results for k in (0, 1))


def run_compiled(problem: Problem, cuts: tuple[int, ...]) -> bool:
    shard = shard_of(cuts)
    assert shard is not None

    def logps_and_gradients(function: Any) -> list[Tensor]:
        hidden = problem.hidden.clone().requires_grad_()
        head = problem.head[shard.start : shard.stop].clone().requires_grad_()
        logps = function(hidden, head)
        logps.backward(problem.upstream.to(logps))
        return [logps.detach(), hidden.grad, head.grad]

    def call(hidden: Tensor, head: Tensor) -> Tensor:
        return linear_logps(2 * hidden, head, problem.targets, vocabulary=shard) / 2

    plain, compiled = (logps_and_gradients(f) for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")))
    return all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))


def test_compiles_as_one_graph(ranks):
    if ranks.size > 2:
        pytest.skip("takes seconds, and 2 processes say as much")
    problem = Problem(20, 150, 8, torch.float32, bias=False)
    assert all(ranks.run(run_compiled, portable(problem), CUTS[ranks.size]["even"]))


# --- errors: the same in every process, none of which is left waiting ---


def run_wrong(changes: dict[str, Any], cuts: tuple[int, ...], rows: dict[int, int], shards: dict[int, Any]) -> str:
    """rows, shards: by rank, another number of rows of the head or another shard than there should be."""
    rank = dist.get_rank()
    shard = VocabularyShard(*shards[rank], cuts[-1]) if rank in shards else shard_of(cuts)
    assert shard is not None
    problem = Problem(3, cuts[-1], 4, torch.float32)
    arguments = {"hidden": problem.hidden, "head": problem.head, "targets": problem.targets, **changes}
    stop = shard.start + rows[rank] if rank in rows else shard.stop
    arguments["head"] = arguments["head"][shard.start : stop]
    message = error_of(linear_logps, vocabulary=shard, **arguments)
    dist.barrier()  # and the group is still in step
    return message


def with_entry(index: tuple[int, int], value: float, shape: tuple[int, int]) -> Tensor:
    tensor = Problem(*reversed(shape), 4, torch.float32).head[: shape[0]].clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.tensor([0, 6, 2])}, r"targets[1] is 6, outside the vocabulary [0, 6)"),
        ({"targets": torch.tensor([0, -1, 2])}, r"targets[1] is -1, outside"),
        ({"targets": torch.tensor([0, 1])}, "targets must be (3,) int64"),
        ({"hidden": torch.full((3, 4), float("nan"))}, "log-probability of token 0"),
        ({"hidden": torch.full((3, 4), float("inf"))}, "log-probability of token 0"),
        ({"head": with_entry((5, 0), float("nan"), (6, 4))}, "log-probability of token 0"),
        ({"head": with_entry((5, 0), float("inf"), (6, 4))}, "log-probability of token"),
        ({"head": with_entry((0, 0), float("-inf"), (6, 4))}, "log-probability of token"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"backend": "reference"}, "backend='reference' takes a whole head"),
    ],
)
def test_errors_are_seen_by_all(ranks, changes, message):
    cuts = {2: (0, 1, 6), 3: (0, 1, 3, 6)}[ranks.size]
    messages = ranks.run(run_wrong, changes, cuts, {}, {})
    assert message in messages[0]
    assert all(other == messages[0] for other in messages)


@pytest.mark.parametrize(
    ("rows", "shards", "message"),
    [
        ({1: 2}, {}, "the head has 2 rows but its VocabularyShard is 1.."),
        ({}, {1: (2, 6)}, "do not make up one vocabulary"),
        ({}, {1: (0, 6)}, "do not make up one vocabulary"),
        ({}, {0: (0, 2)}, "do not make up one vocabulary"),
    ],
)
def test_validate_compares_the_shards(ranks, rows, shards, message):
    cuts = {2: (0, 1, 6), 3: (0, 1, 4, 6)}[ranks.size]
    messages = ranks.run(run_wrong, {"validate": True}, cuts, rows, shards)
    assert message in messages[0]
    assert all(other == messages[0] for other in messages)


def run_validated(cuts: tuple[int, ...]) -> bool:
    shard, problem = shard_of(cuts), Problem(3, cuts[-1], 4, torch.float32)
    assert shard is not None
    head = problem.head[shard.start : shard.stop]
    once, again = (linear_logps(problem.hidden, head, problem.targets, vocabulary=shard, validate=v) for v in (0, 1))
    return torch.equal(once, again)


def test_validate_passes_what_is_right(ranks):
    assert all(ranks.run(run_validated, CUTS[ranks.size]["even"]))


def run_missing(cuts: tuple[int, ...], targets: list[int], schedule: str) -> tuple[Tensor, Tensor]:
    problem = Problem(len(targets), cuts[-1], 4, torch.float32, bias=False)
    problem.targets = torch.tensor(targets)
    with pytest.MonkeyPatch.context() as patch:
        leave_targets_unchecked(patch, "linear_logps")
        logps, (d_hidden, *_), _ = run_shard(problem, cuts, schedule)
    return logps, d_hidden


@pytest.mark.parametrize("schedule", ["frozen", "recompute"])
def test_a_target_that_no_process_holds_and_nobody_looked_at_is_nan(ranks, schedule):
    cuts = CUTS[ranks.size]["even"]
    for logps, d_hidden in ranks.run(run_missing, cuts, [-100, 3, 150, 149, -1, 0], schedule):
        nobodys = [True, False, True, False, True, False]
        assert logps.isnan().tolist() == nobodys
        assert d_hidden.isnan().all(1).tolist() == d_hidden.isnan().any(1).tolist() == nobodys


def shard_errors() -> list[str]:
    return [error_of(VocabularyShard, *rows, 10) for rows in ((3, 3), (4, 3), (-1, 3), (3, 11))]


def test_a_shard_must_fit(ranks):
    for messages in ranks.run(shard_errors):
        assert messages == [
            f"a shard of rows {rows} does not fit a vocabulary of 10" for rows in ("3..3", "4..3", "-1..3", "3..11")
        ]


def test_a_shard_needs_a_process_group():
    with pytest.raises(ValueError, match="call init_process_group first"):
        VocabularyShard(0, 3, 6)
