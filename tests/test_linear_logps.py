"""linear_logps: every schedule against the fp64 oracle, forward and all gradients, and what it must not do.

How accuracy is judged: `problems`.
"""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import EPILOGUES, SCHEDULES, Problem, check, check_missing_targets, leave_targets_unchecked
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from aspo_kernels import linear_logps, reference, tiles
from aspo_kernels.head import head_grads, head_logps, scaled_rows

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 tokens and slices of 64 vocabulary entries, the least there is."""
    monkeypatch.setattr(tiles, "CPU_TILE", tiles.TileSize(tokens=16, bytes=1, width=64, gradient_tokens=16))


# --- accuracy ---


@pytest.mark.usefixtures("small_tiles", "poison")
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_matches_the_oracle(schedule, dtype, epilogue):
    # 37 tokens are three chunks of 16 (the last of 5), 150 entries three slices of 64 (the last of 22)
    check(Problem(37, 150, 24, dtype), schedule, **EPILOGUES[epilogue])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 1), (3, 1, 5), (2, 65, 3), (7, 63, 17), (1, 300, 33)])
def test_odd_sizes(schedule, sizes, small_tiles):
    check(Problem(*sizes, torch.float32, bias=False), schedule)
    check(Problem(*sizes, torch.float64), schedule, softcap=2.0)


def test_v_1_is_certain():
    hidden = torch.randn(3, 4, requires_grad=True)
    head = torch.randn(1, 4, requires_grad=True)
    logps = linear_logps(hidden, head, torch.zeros(3, dtype=torch.long))
    assert logps.tolist() == [0, 0, 0]
    logps.sum().backward()
    assert hidden.grad.abs().max() == 0
    assert head.grad.abs().max() == 0


@given(
    st.integers(0, 40), st.integers(1, 200), st.integers(1, 9), st.integers(0, 999), st.sampled_from(sorted(SCHEDULES))
)
def test_any_size_and_schedule_in_fp64(n, v, h, seed, schedule):
    problem = Problem(n, v, h, torch.float64, seed)
    needs, budget = SCHEDULES[schedule]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_TILE", tiles.TileSize(16, 1, 64, 16))
        logps, gradients = problem.run(linear_logps, needs=needs, memory_budget=budget, softcap=4.0)
    expected_logps, expected = problem.oracle(softcap=4.0)
    torch.testing.assert_close(logps, expected_logps, rtol=1e-12, atol=1e-12)
    for got, want, need in zip(gradients, expected, needs, strict=True):
        if need:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
def test_upstream_of_any_size(schedule, dtype, size, small_tiles):
    problem = Problem(20, 130, 16, dtype)
    problem.upstream = problem.upstream * size
    check(problem, schedule)


@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_upstream_with_zeros_and_tiny_entries(schedule, small_tiles):
    """g = 0 rows give exactly nothing; g = 1e-12 rows their own small part, beside rows of g = 1."""
    problem = Problem(20, 130, 16, torch.float32)
    problem.upstream[::3] = 0
    problem.upstream[1::3] = 1e-12
    needs, budget = SCHEDULES[schedule]
    _, (d_hidden, *_) = problem.run(linear_logps, needs=needs, memory_budget=budget)
    check(problem, schedule)
    assert d_hidden[::3].abs().max() == 0
    expected = problem.oracle()[1][0]
    torch.testing.assert_close(d_hidden[1::3], expected[1::3], rtol=1e-4, atol=1e-18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
@pytest.mark.parametrize("peak", [10.0, 20.0])
def test_peaked_rows(dtype, schedule, peak, small_tiles):
    """A trained model's rows: most targets near certain, -logp from about 1e-4 down to 1e-12."""
    problem = Problem(40, 150, 32, dtype, spread=1.0, bias=False)
    rows = problem.head[problem.targets].double()
    problem.hidden = (rows / rows.norm(dim=1, keepdim=True) ** 2 * peak).to(dtype)
    check(problem, schedule)
    # the digits of small -logp are kept, which fp32 logits cannot do: relative, not absolute
    logps = problem.run(linear_logps)[0]
    torch.testing.assert_close(logps, problem.oracle()[0], rtol=2e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
@pytest.mark.parametrize("where", ["first slice", "last slice", "own slice"])
@pytest.mark.parametrize("nll", [30.0, 60.0, 90.0, 130.0, 200.0])
def test_very_unlikely_targets(dtype, schedule, where, nll, small_tiles):
    """exp(nll) leaves fp32's range at 88: such rows raise their shift. They lie among ordinary rows."""
    problem = Problem(40, 150, 32, dtype, spread=1.0, bias=False)
    rival = {"first slice": 3, "last slice": 149, "own slice": 70}[where]
    towards_rival = problem.normal(32).sign() / 32**0.5
    problem.targets[::4] = 66
    problem.head[rival] = (problem.head[rival] + nll / 8 * towards_rival).to(dtype)
    problem.hidden[::4] = (problem.hidden[::4] + (8 + problem.normal(10, 1)) * towards_rival).to(dtype)
    lowest = problem.oracle()[0].min()
    assert lowest < -nll, "the problem is what it says"
    # Where p(rival) = 1 eager's bf16 operands are exact by luck; E, its product and G each round once here. In fp32 a
    # logit of size nll rounds by nll eps, and so does E where a product of another shape forms it again.
    floor = 4e-3 if dtype == torch.bfloat16 else nll * torch.finfo(tiles.statistics_dtype(dtype)).eps
    check(problem, schedule, floor)
    check(problem, schedule, floor, softcap=500.0)


@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_the_shift_is_raised_more_than_once(schedule, small_tiles):
    """Logits that climb by 100 from slice to slice, up to 400 over the target's."""
    problem = Problem(6, 320, 8, torch.float32, bias=False)
    problem.hidden[:, 0] = 4.0
    problem.head[:, 0] = torch.arange(320).div(64, rounding_mode="floor") * 25.0
    problem.targets[:] = torch.tensor([0, 63, 64, 130, 256, 319])
    assert problem.oracle()[0].min() < -395
    check(problem, schedule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_logits_of_ten_thousand(dtype, schedule, small_tiles):
    """z from -1e4 to 1e4: exp overflows without a shift, and fp32 logits are good to 1e-3 only."""
    problem = Problem(24, 150, 16, dtype, bias=False)
    problem.hidden = problem.hidden * 50
    problem.head = problem.head * 50
    logits = reference.logits(problem.hidden.double(), problem.head.double())
    assert logits.abs().max() > 1e4
    problem.targets = logits.topk(2).indices[:, 1]
    floor = 1e4 * torch.finfo(torch.float32).eps  # fp32 logits of this size are good to one unit, 1e-3; so is p
    check(problem, schedule, floor)
    check(problem, schedule, floor, softcap=30.0)


@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_ties(schedule, small_tiles):
    """All logits equal, twins of the target included: every probability is 1 / V."""
    problem = Problem(5, 130, 8, torch.float32, bias=False)
    problem.head[:] = problem.head[0]
    check(problem, schedule)
    logps, (d_hidden, *_) = problem.run(linear_logps)
    torch.testing.assert_close(logps, torch.full_like(logps, -torch.tensor(130.0).log().item()), rtol=1e-6, atol=0)
    assert d_hidden.abs().max() < 1e-5


@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_targets_at_the_edges_of_slices(schedule, small_tiles):
    problem = Problem(8, 129, 8, torch.float64)
    problem.targets = torch.tensor([0, 63, 64, 65, 127, 128, 0, 128])
    check(problem, schedule)


@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_operands(schedule, dtype, small_tiles):
    """Views with strides, a transposed head, an expanded and a strided g give what their copies give, to rounding."""
    problem = Problem(18, 140, 12, dtype)
    needs, budget = SCHEDULES[schedule]
    views = (
        problem.hidden.repeat_interleave(2, 0)[::2].t().contiguous().t(),
        torch.stack((problem.head, problem.head), -1)[..., 1],
        problem.bias.repeat_interleave(3)[::3],
    )
    copies = (problem.hidden.clone(), problem.head.clone(), problem.bias.clone())
    assert not any(v.is_contiguous() for v in views)
    results = []
    for operands in (views, copies):
        leaves = [t.detach().requires_grad_(need) for t, need in zip(operands, needs, strict=True)]
        logps = linear_logps(leaves[0], leaves[1], problem.targets, bias=leaves[2], memory_budget=budget)
        expanded = torch.ones((), dtype=logps.dtype).expand(18)
        strided = problem.upstream.repeat_interleave(2).to(logps.dtype)[::2]
        wanted = [t for t in leaves if t.requires_grad]
        first = torch.autograd.grad(logps, wanted, expanded, retain_graph=True)
        results.append([logps.detach(), *first, *torch.autograd.grad(logps, wanted, strided)])
    for from_views, from_copies in zip(*results, strict=True):
        torch.testing.assert_close(from_views, from_copies, rtol=1e-6, atol=1e-6)
    logps, _ = problem.run(linear_logps, needs=needs, memory_budget=budget)
    torch.testing.assert_close(results[0][0].double(), logps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_fp16_gradients_survive_loss_scaling(schedule, backend, small_tiles, device):
    """Near-certain fp16 rows have gradients below fp16's range until the loss scale multiplies them, as it must."""
    problem = Problem(150, 150, 32, torch.float16, spread=1.0, bias=False)
    rows = problem.head[problem.targets].double()
    sizes = 24 + 3 * problem.normal(150, 1)
    problem.hidden = (rows / rows.norm(dim=1, keepdim=True) ** 2 * sizes).to(torch.float16)
    problem.upstream = problem.upstream.sign() * 2.0**14
    needs, budget = SCHEDULES[schedule]
    options = {"needs": needs, "memory_budget": budget, "backend": backend}
    if backend == "triton":
        pytest.importorskip("triton")
        options["device"] = device
    d_hidden, d_head, _ = problem.run(linear_logps, **options)[1]
    expected = problem.oracle()[1]
    assert (expected[0].norm(dim=1) / 2.0**14 < 2.0**-18).sum() > 10, "rows that fp16 loses without the loss scale"
    for got, want in zip((d_hidden, d_head), expected[:2], strict=True):
        if got is None:
            continue
        rows = want.norm(dim=1) > 32 * 2.0**-14  # the result is in fp16's normal range
        error = (got - want)[rows].norm(dim=1) / want[rows].norm(dim=1)
        assert error.max() < 4 * 2.0**-11, "each row, to fp16's precision"


# --- what it must not do ---


@pytest.mark.parametrize("budget", [None, 0, 1 << 40])
def test_no_tokens_give_a_connected_zero(budget):
    hidden, head, bias = torch.empty(0, 4), torch.randn(6, 4), torch.randn(6)
    leaves = [t.requires_grad_() for t in (hidden, head, bias)]
    logps = linear_logps(hidden, head, torch.empty(0, dtype=torch.long), bias=bias, memory_budget=budget)
    assert logps.shape == (0,)
    logps.sum().backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()
    for needs in ((True, False), (False, True)):
        hidden, head = (t.detach().requires_grad_(need) for t, need in zip((hidden, head), needs, strict=True))
        linear_logps(hidden, head, torch.empty(0, dtype=torch.long), memory_budget=budget).sum().backward()
        assert (hidden.grad is not None, head.grad is not None) == needs


def call(schedule: str, dtype: torch.dtype = torch.float32, n: int = 20, v: int = 140, h: int = 8):
    needs, budget = SCHEDULES[schedule]
    problem = Problem(n, v, h, dtype)
    leaves = [
        t.clone().requires_grad_(need)
        for t, need in zip((problem.hidden, problem.head, problem.bias), needs, strict=True)
    ]
    logps = linear_logps(leaves[0], leaves[1], problem.targets, bias=leaves[2], memory_budget=budget)
    return logps, leaves, problem


@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_a_retained_graph_gives_the_same_gradients_again(schedule):
    logps, leaves, problem = call(schedule)
    wanted, g = [t for t in leaves if t.requires_grad], problem.upstream.float()
    first = torch.autograd.grad(logps, wanted, g, retain_graph=True)
    torch.autograd.grad(logps, wanted, 3 * g, retain_graph=True)
    again = torch.autograd.grad(logps, wanted, g)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_double_backward_is_refused(schedule):
    """Also where the upstream gradient is a constant: the second derivative in hidden would silently be missing."""
    logps, leaves, _ = call(schedule)
    with pytest.raises(RuntimeError, match="linear_logps is differentiable once"):
        torch.autograd.grad(logps.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logps is differentiable once"):
        torch.autograd.grad((logps**2).sum(), leaves[:1], create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_operands_are_never_written(schedule, dtype):
    logps, leaves, problem = call(schedule, dtype)
    g = problem.upstream.float()
    before = g.clone()
    if logps.requires_grad:
        logps.backward(g)
    assert torch.equal(g, before)
    for leaf, original in zip(leaves, (problem.hidden, problem.head, problem.bias), strict=True):
        assert torch.equal(leaf, original)
        assert leaf._version == 0


@pytest.mark.usefixtures("poison", "small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_two_runs_agree_bit_for_bit(schedule, dtype):
    results = []
    for _ in range(2):
        logps, leaves, problem = call(schedule, dtype)
        wanted = [t for t in leaves if t.requires_grad]
        results.append([logps.detach(), *torch.autograd.grad(logps, wanted, problem.upstream.float())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def saved_shapes(logps: Tensor) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in logps.grad_fn.saved_tensors if t is not None]


def test_what_each_schedule_keeps():
    n, v, h = 20, 140, 8
    assert saved_shapes(call("frozen")[0]) == [(n, h)]  # G alone: neither the head nor the hidden states
    assert (n, v) in saved_shapes(call("stored")[0])
    assert (v, h) not in saved_shapes(call("stored")[0])
    kept = saved_shapes(call("recompute")[0])
    assert (v, h) in kept
    assert (n, v) not in kept
    assert call("none")[0].grad_fn is None


def test_memory_budget_decides_what_is_kept():
    """In bytes: exactly N V entries of the operands' dtype fit; the default is 4 V H, an fp32 gradient of the head."""
    for dtype, entry in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 4)):
        problem = Problem(10, 50, 8, dtype, bias=False)
        head = problem.head.clone().requires_grad_()
        for budget, stored in ((500 * entry, True), (500 * entry - 1, False)):
            logps = linear_logps(problem.hidden, head, problem.targets, memory_budget=budget)
            assert ((10, 50) in saved_shapes(logps)) == stored
    for n, stored in ((8, True), (9, False)):  # 4 N V <= 4 V H
        problem = Problem(n, 50, 8, torch.float32, bias=False)
        logps = linear_logps(problem.hidden, problem.head.requires_grad_(), problem.targets)
        assert ((n, 50) in saved_shapes(logps)) == stored


# The bodies of our custom ops, for the mode below to look into: it would see each op as one.
BODIES = {op._opoverload: op._init_fn for op in (head_logps, scaled_rows, head_grads)}


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor made (views of older storage do not count)."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.seen = {t.untyped_storage().data_ptr() for t in known}
        self.keep: list[Tensor] = []  # so that no address is used twice
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in BODIES:
            with self:
                return BODIES[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.seen:
                self.seen.add(t.untyped_storage().data_ptr())
                self.keep.append(t)
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_logits_exist_only_in_the_stored_schedule(schedule, dtype, small_tiles):
    n, v, h = 50, 1000, 12
    needs, budget = SCHEDULES[schedule]
    problem = Problem(n, v, h, dtype, bias=False)
    hidden, head = problem.hidden.requires_grad_(needs[0]), problem.head.requires_grad_(needs[1])
    g = problem.upstream.float()
    with Largest(hidden, head, g) as largest:
        logps = linear_logps(hidden, head, problem.targets, memory_budget=budget)
        if logps.requires_grad:
            logps.backward(g)
    tile, slice_of_head = 16 * 64, 64 * h
    if schedule == "stored":
        assert largest.numel == n * v
    elif schedule == "recompute":
        assert largest.numel == v * h  # the gradient of the head itself
    else:
        assert largest.numel == max(tile, slice_of_head, n * h if schedule == "frozen" else 0)


def test_no_grad_does_no_work_for_gradients(small_tiles):
    """Parameters require gradients in an evaluation too: under no_grad the forward is the plain one all the same."""
    problem = Problem(50, 1000, 12, torch.float32, bias=False)
    hidden, head = problem.hidden.requires_grad_(), problem.head.requires_grad_()
    with torch.no_grad(), Largest(hidden, head) as largest:
        logps = linear_logps(hidden, head, problem.targets, memory_budget=1 << 40)
    assert not logps.requires_grad
    assert largest.numel == 16 * 64


def test_autocast_casts_the_operands_once():
    problem = Problem(20, 140, 8, torch.float32)
    narrow = Problem(20, 140, 8, torch.bfloat16)
    for name in ("hidden", "head", "bias"):
        setattr(narrow, name, getattr(problem, name).bfloat16())
    for schedule in ("frozen", "stored", "recompute"):
        needs, budget = SCHEDULES[schedule]
        with torch.autocast("cpu", torch.bfloat16):
            got = problem.run(linear_logps, needs=needs, memory_budget=budget)  # its backward is under autocast too
        expected = narrow.run(linear_logps, needs=needs, memory_budget=budget)
        assert torch.equal(got[0], expected[0])
        for a, b in zip(got[1], expected[1], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_autocast_does_not_narrow_the_backward():
    """Outside: fp32 operands. A backward pass that is started under autocast computes in fp32 all the same."""
    for schedule in ("frozen", "stored", "recompute"):
        results = []
        for enabled in (False, True):
            logps, leaves, problem = call(schedule)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logps.backward(problem.upstream.float())
            results.append([t.grad for t in leaves if t.requires_grad])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), schedule


def test_mixed_dtypes_are_fine_under_autocast():
    problem = Problem(6, 20, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_logps(problem.hidden.bfloat16(), problem.head, problem.targets, bias=problem.bias)
        same = linear_logps(problem.hidden, problem.head, problem.targets, bias=problem.bias)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, same)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    problem = Problem(20, 140, 8, torch.float32)

    def through_a_checkpoint(hidden, head, targets, bias):
        return checkpoint(
            lambda *a: linear_logps(a[0], a[1], targets, bias=a[2]), hidden, head, bias, use_reentrant=use_reentrant
        )

    plain, with_checkpoint = problem.run(linear_logps), problem.run(through_a_checkpoint)
    assert torch.equal(plain[0], with_checkpoint[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], with_checkpoint[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_disturb_each_other(dtype):
    problems = [Problem(40, 300, 16, dtype, seed) for seed in range(4)]
    alone = [p.run(linear_logps) for p in problems]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            logps, gradients = problems[index].run(linear_logps)
            same = zip((logps, *gradients), (alone[index][0], *alone[index][1]), strict=True)
            if not all(torch.equal(a, b) for a, b in same):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def precision_flags() -> tuple[str, ...]:
    flags = torch.backends.mkldnn
    return torch.get_float32_matmul_precision(), flags.fp32_precision, flags.matmul.fp32_precision  # type: ignore[attr-defined]


def test_the_process_wide_precision_is_put_back():
    before = precision_flags()
    problem = Problem(20, 140, 8, torch.bfloat16)
    problem.run(linear_logps)
    assert precision_flags() == before
    with pytest.raises(RuntimeError):  # shapes that do not fit: an exception from inside the product
        tiles.products(torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bfloat16))
    assert precision_flags() == before
    product = torch.full((4, 64), 1 + 2**-12)
    assert (product @ product.T)[0, 0] == 64 * (1 + 2**-12) ** 2, "fp32 products are still fp32"


# --- errors ---


def arguments(**changes):
    base = {"hidden": torch.randn(3, 4), "head": torch.randn(6, 4), "targets": torch.tensor([0, 5, 2])}
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.randn(1, 3, 4)}, r"hidden must be \(N, H\) and its head \(V, H\).*\(1, 3, 4\) and \(6, 4\)"),
        ({"head": torch.randn(6, 5)}, r"got \(3, 4\) and \(6, 5\)"),
        ({"head": torch.randn(0, 4)}, r"with V > 0"),
        ({"hidden": torch.ones(3, 4, dtype=torch.long)}, "hidden is torch.int64; use float32"),
        ({"head": torch.randn(6, 4).bfloat16()}, "hidden is torch.float32 but its head torch.bfloat16"),
        ({"bias": torch.randn(5)}, r"bias must be \(6,\) for this head, got \(5,\)"),
        ({"bias": torch.randn(6).double()}, "hidden is torch.float32 but its bias torch.float64"),
        ({"head": torch.randn(6, 4, device="meta")}, "hidden is on cpu but its head on meta"),
        ({"targets": torch.tensor([0, 5])}, r"targets must be \(3,\) int64, got \(2,\)"),
        (
            {"targets": torch.tensor([0, 5, 2], dtype=torch.int32)},
            r"targets must be \(3,\) int64, got \(3,\) torch.int32",
        ),
        ({"targets": torch.zeros(3, dtype=torch.long, device="meta")}, "targets are on meta but"),
        ({"targets": torch.tensor([0, 6, 2])}, r"targets\[1\] is 6, outside the vocabulary \[0, 6\)"),
        ({"targets": torch.tensor([0, 1, -100])}, r"targets\[2\] is -100.*leave uncounted positions"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"softcap": -1.0}, "softcap is -1.0; it must be positive"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0; it must be finite and not 0"),
        ({"logit_scale": float("inf")}, "logit_scale is inf"),
        ({"memory_budget": -1}, "memory_budget is -1 bytes"),
        ({"backend": "cuda"}, "backend is 'cuda'; choose one of auto, torch"),
        (
            {"hidden": torch.full((3, 4), float("nan"))},
            r"log-probability of token 0 \(target 0\) is nan.*3 such tokens",
        ),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        linear_logps(**arguments(**changes))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_target_that_nobody_looked_at_is_never_another_token(schedule, monkeypatch, small_tiles):
    """-100 in an index is row V - 100."""
    leave_targets_unchecked(monkeypatch, "linear_logps")
    needs, budget = SCHEDULES[schedule]
    check_missing_targets(Problem(20, 150, 12, torch.float32), linear_logps, needs, memory_budget=budget)


def test_a_masked_target_is_an_error_but_a_masked_rival_is_none():
    bias = torch.zeros(6)
    bias[5] = float("-inf")
    with pytest.raises(ValueError, match=r"token 1 \(target 5\) is -inf"):
        linear_logps(**arguments(bias=bias))
    operands = arguments(bias=bias, targets=torch.tensor([0, 1, 2]))
    hidden = operands["hidden"].requires_grad_()
    logps = linear_logps(**operands)
    logps.sum().backward()
    kept = torch.arange(5)
    expected = reference.linear_logps(hidden.detach().double(), operands["head"][kept].double(), operands["targets"])
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_backend_gives_the_same_value(dtype):
    problem = Problem(12, 50, 8, dtype)
    ours, oracle = problem.run(linear_logps), problem.run(linear_logps, backend="reference")
    torch.testing.assert_close(ours[0], oracle[0], rtol=1e-5, atol=1e-5)
    assert linear_logps(problem.hidden, problem.head, problem.targets, backend="reference").dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
