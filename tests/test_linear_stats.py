"""linear_stats, torch and Triton, against the fp64 oracle: values, ties and every gradient; and what it must not do.

How accuracy is judged: `accuracy`. Chunks are of 16 tokens, slices of 64 entries, so that every mask matters.
"""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import check_against_eager
from problems import EPILOGUES, Problem, check_missing_targets, leave_targets_unchecked
from torch import Tensor

from aspo_kernels import reference, tiles
from aspo_kernels.linear_stats import LinearStats, linear_stats

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("small_tiles")

BACKENDS = ["torch", "triton"]
# fp64 has no kernels, and the interpreter's bf16 products are wrong
CASES = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    ("torch", torch.float16),
    ("triton", torch.float32),
    ("triton", torch.float16),
    pytest.param("triton", torch.bfloat16, marks=pytest.mark.gpu),
]
NEEDS = {"frozen": (True, False, False), "head": (False, True, False), "trainable": (True, True, True)}
MIX = (0.7, -1.3, 0.4)  # of log-probability, entropy and log-sum-exp


def pick(output: str, stats: tuple[Tensor | None, ...]) -> Tensor:
    """One output, or a mix whose three upstream gradients all differ."""
    if output == "mix":
        return sum(c * stats[k] for k, c in enumerate(MIX))  # type: ignore[misc, return-value, operator]
    return stats[LinearStats._fields.index(output)]  # type: ignore[return-value]


def eager_stats(hidden, head, targets, bias=None, **epilogue):
    """From logits in the operands' dtype, with fp32 statistics."""
    z = reference.logits(hidden, head, bias, **epilogue)
    z = z.to(tiles.statistics_dtype(z.dtype))
    log_p = z.log_softmax(-1)
    return reference.token_logps(z, targets), -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1)


def check(problem: Problem, output: str, backend: str = "torch", **kwargs):
    functions = (linear_stats, reference.linear_stats, eager_stats)
    ours, oracle, eager = ((lambda *a, f=f, **k: pick(output, f(*a, **k))) for f in functions)
    return check_against_eager(problem, ours, oracle, eager, options={"backend": backend}, **kwargs)


# --- the oracle itself ---


def test_the_oracle_on_a_coin():
    """p = (3/4, 1/4): by hand."""
    hidden = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    head = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)
    logps, entropy, lse, top1 = reference.linear_stats(hidden, head, torch.tensor([0, 0]))
    both = math.log(4) - 0.75 * math.log(3)
    assert logps.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    assert entropy.tolist() == pytest.approx([both, both])
    assert lse.tolist() == pytest.approx([math.log(4), math.log(4 / 3)])
    assert top1.tolist() == [True, False]


def test_the_oracle_is_differentiated_right():
    problem = Problem(3, 5, 4, torch.float64)
    leaves = [t.requires_grad_() for t in (problem.hidden, problem.head, problem.bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: reference.linear_stats(x, w, problem.targets, b, softcap=2.0)[:3], leaves
    )


# --- accuracy ---


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("output", "needs"),
    [(o, "trainable") for o in ("logps", "entropy", "lse", "mix")] + [("mix", n) for n in NEEDS][:-1],
)
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_matches_the_oracle(backend, dtype, output, needs, device):
    device = device if backend == "triton" else "cpu"
    check(Problem(17, 150, 24, dtype), output, backend, needs=NEEDS[needs], device=device)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_epilogues(backend, epilogue, device):
    device = device if backend == "triton" else "cpu"
    check(Problem(9, 70, 17, torch.float32), "mix", backend, device=device, **EPILOGUES[epilogue])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 3), (17, 65, 1), (2, 129, 70), (35, 65, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend, sizes, device):
    # 35 tokens are two groups in the backward, of 32 and 3
    device = device if backend == "triton" else "cpu"
    check(Problem(*sizes, torch.float32, bias=False), "mix", backend, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_near_deterministic_rows_keep_their_digits(backend, dtype, device):
    """-logp from 1e-3 to 1e-12: entropy and log-probability are right to their own size, and so is their gradient."""
    lead = torch.tensor([7.0, 14.0, 20.0, 28.0], dtype=torch.float64, requires_grad=True)
    rivals = 69 * torch.exp(-lead)  # fp64's own log_softmax would lose the digits
    logps = -torch.log1p(rivals)
    entropy = -logps + lead * rivals / (1 + rivals)
    (expected,) = torch.autograd.grad(entropy.sum(), lead)
    head = torch.zeros(70, 1)
    head[66] = 1.0
    place = "cpu" if backend == "torch" else device
    hidden = lead.detach()[:, None].to(place, dtype).requires_grad_()
    stats = linear_stats(hidden, head.to(place, dtype), torch.full((4,), 66, device=place), backend=backend)
    (gradient,) = torch.autograd.grad(stats.entropy.sum() * 2.0**12, hidden)
    torch.testing.assert_close(stats.logps.cpu().double(), logps, rtol=4e-6, atol=0)
    torch.testing.assert_close(stats.entropy.cpu().double(), entropy, rtol=4e-6, atol=0)
    rtol, kept = (1e-5, 4) if dtype == torch.float32 else (2e-3, 2)  # the others are below fp16's range
    torch.testing.assert_close(gradient[:kept, 0].cpu().double(), 2.0**12 * expected[:kept], rtol=rtol, atol=0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("nll", [25.0, 60.0, 200.0])
@pytest.mark.parametrize("rival", [0, 70, 149], ids=["first slice", "target's slice", "last slice"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rival_that_takes_all(backend, rival, nll, device):
    """The target is `nll` below another token: the entropy is near 0, and right to one rounding of 1.

    fp64 itself loses these gradients below 1e-16.
    """
    problem = Problem(3, 150, 16, torch.float32, spread=0.5, bias=False)
    problem.targets[:] = 75
    problem.hidden[:, 0] = torch.linspace(0.9, 1.1, 3)
    problem.head[:, 0] = 0
    problem.head[rival, 0] = nll
    device = device if backend == "triton" else "cpu"
    entropy, _ = check(problem, "entropy", backend, device=device, absolute=1e-6)
    expected = problem.run(lambda *a, **k: reference.linear_stats(*a, **k)[1], torch.float64)[0]
    assert expected.max() < 0.1
    torch.testing.assert_close(entropy, expected, rtol=1e-5, atol=2e-7)
    check(problem, "mix", backend, device=device, absolute=1e-6)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shift_is_raised_in_every_slice(backend, device):
    problem = Problem(12, 300, 4, torch.float32, bias=False)
    problem.hidden[:] = torch.tensor([1.0, 0.0, 0.1, 0.0])
    problem.head[:, 0] = torch.arange(300) * (2 / 64)
    problem.targets[:] = torch.linspace(0, 299, 12).long()
    check(problem, "mix", backend, device=device if backend == "triton" else "cpu")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_ten_thousand(backend, dtype, device):
    """+1e4 twice, -1e4 once, the rest 0: a pair of halves, whose entropy is log 2."""
    place = device if backend == "triton" else "cpu"
    hidden, head = torch.zeros(5, 8, dtype=dtype, device=place), torch.zeros(130, 8, dtype=dtype, device=place)
    hidden[:, 0], head[3, 0], head[90, 0], head[5, 0] = 100.0, 100.0, 100.0, -100.0
    targets = torch.tensor([3, 90, 5, 129, 0], device=place)
    leaf = hidden.clone().requires_grad_()
    stats = linear_stats(leaf, head, targets, backend=backend)
    assert stats.logps.tolist() == pytest.approx([-math.log(2)] * 2 + [-2e4 - math.log(2)] + [-1e4 - math.log(2)] * 2)
    assert stats.entropy.tolist() == pytest.approx([math.log(2)] * 5)
    assert stats.lse.tolist() == pytest.approx([1e4 + math.log(2)] * 5)
    assert stats.top1.tolist() == [True, True, False, False, False]
    stats.entropy.sum().backward()
    assert leaf.grad.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_top1_and_ties(backend, device):
    place = device if backend == "triton" else "cpu"
    problem = Problem(37, 150, 24, torch.float32, bias=False)
    problem.head[140] = problem.head[10]  # twins in different slices
    best = reference.logits(problem.hidden, problem.head).argmax(1)
    problem.targets[:20] = best[:20]
    operands = (problem.hidden.to(place), problem.head.to(place), problem.targets.to(place))
    got = linear_stats(*operands, backend=backend).top1.cpu()
    assert got[:20].all()
    assert torch.equal(got, reference.linear_stats(problem.hidden, problem.head, problem.targets)[3])
    same = problem.head[:1].expand(150, 24).to(place)
    assert linear_stats(operands[0], same, operands[2], backend=backend).top1.all()
    assert linear_stats(operands[0], same[:1], torch.zeros_like(operands[2]), backend=backend).top1.all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rivals(backend, device):
    """A bias of -inf takes a token out, also a whole slice of them: no NaN in any output or gradient."""
    place = device if backend == "triton" else "cpu"
    problem = Problem(9, 150, 8, torch.float32)
    masked = torch.zeros(150, dtype=torch.bool)
    masked[64:128], masked[3] = True, True
    problem.targets[:] = torch.tensor([0, 1, 2, 4, 63, 128, 129, 140, 149])
    kept = torch.nonzero(~masked).flatten()
    short = Problem(9, 150, 8, torch.float32)
    short.head, short.bias = problem.head[kept], problem.bias[kept]
    short.targets = torch.searchsorted(kept, problem.targets)
    problem.bias[masked] = float("-inf")

    def mixed(function, **options):
        return lambda *a, **k: pick("mix", function(*a, **k, **options))

    got, (dx, dw, db) = problem.run(mixed(linear_stats, backend=backend), device=place)
    expected, (ex, ew, eb) = short.run(mixed(reference.linear_stats), torch.float64)
    for a, b in ((got, expected), (dx, ex), (dw[kept], ew), (db[kept], eb)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not dw[masked].any() and not db[masked].any()


# --- what it must and must not do ---


def test_only_what_is_asked_for():
    hidden, head, targets = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([0, 5, 2])
    full = linear_stats(hidden, head, targets)
    assert [t.dtype for t in full] == [torch.float32] * 3 + [torch.bool]
    part = linear_stats(hidden, head, targets, outputs=("lse",))
    assert part.entropy is None and part.top1 is None
    assert torch.equal(part.lse, full.lse) and torch.equal(part.logps, full.logps)
    for wrong in (("entropy", "top5"), "lse"):
        with pytest.raises(ValueError, match="give a tuple of entropy, lse, top1"):
            linear_stats(hidden, head, targets, outputs=wrong)
    with pytest.raises(ValueError, match=r"targets\[1\] is 6, outside the vocabulary"):
        linear_stats(hidden, head, torch.tensor([0, 6, 2]))
    with pytest.raises(ValueError, match=r"log-probability of token 0 .* is nan"):
        linear_stats(hidden * float("nan"), head, targets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_a_connected_zero(backend, device):
    place = device if backend == "triton" else "cpu"
    leaves = [torch.randn(*s, device=place, requires_grad=True) for s in ((0, 4), (6, 4), (6,))]
    none = torch.empty(0, dtype=torch.int64, device=place)
    stats = linear_stats(leaves[0], leaves[1], none, bias=leaves[2], backend=backend)
    (stats.logps.sum() + stats.entropy.sum()).backward()
    for leaf in leaves:
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_operands(backend, device):
    place = device if backend == "triton" else "cpu"
    views = (
        torch.randn(20, 34, device=place)[:, ::2],
        torch.randn(17, 90, device=place).T,
        torch.randn(270, device=place)[::3],
        torch.randint(90, (40,), device=place)[::2],
    )
    results = []
    for operands in (views, tuple(t.contiguous() for t in views)):
        *leaves, targets = (t.detach().requires_grad_(t.is_floating_point()) for t in operands)
        stats = linear_stats(leaves[0], leaves[1], targets, bias=leaves[2], backend=backend)
        g = torch.ones((), device=place).expand(20)
        results.append([*stats[:3], *torch.autograd.grad(stats[:3], leaves, [g, g, g])])
    for strided, plain in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, device):
    problem = Problem(19, 150, 24, torch.float32)
    place = device if backend == "triton" else "cpu"
    runs = [
        problem.run(lambda *a, **k: pick("mix", linear_stats(*a, **k)), backend=backend, device=place) for _ in "ab"
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", ["logps", "entropy", "lse"])
def test_a_target_that_nobody_looked_at_is_never_another_token(output, backend, monkeypatch, device):
    """-100 in an index is row V - 100."""
    leave_targets_unchecked(monkeypatch, "linear_stats")

    def one_output(*operands, **options):
        return pick(output, linear_stats(*operands, backend=backend, **options))

    check_missing_targets(Problem(20, 150, 12, torch.float32), one_output, NEEDS["trainable"], device=device)


def test_double_backward_is_refused():
    hidden = torch.randn(3, 4, requires_grad=True)
    stats = linear_stats(hidden, torch.randn(6, 4), torch.tensor([0, 5, 2]))
    with pytest.raises(RuntimeError, match="linear_stats is differentiable once"):
        torch.autograd.grad(stats.entropy.sum(), hidden, create_graph=True)


def test_nothing_large_is_kept():
    n, v, h = 20, 140, 8
    hidden, head = torch.randn(n, h, requires_grad=True), torch.randn(v, h)
    stats = linear_stats(hidden, head, torch.randint(v, (n,)))
    saved = [t for t in stats.entropy.grad_fn.saved_tensors if t is not None]
    own = [t for t in saved if t.data_ptr() not in (hidden.data_ptr(), head.data_ptr())]
    assert sum(t.numel() for t in own) <= 5 * n


def test_autocast_casts_the_operands_once():
    problem, narrow = Problem(20, 140, 8, torch.float32), Problem(20, 140, 8, torch.bfloat16)

    def function(*a, **k):
        return pick("mix", linear_stats(*a, **k))

    with torch.autocast("cpu", torch.bfloat16):
        got = problem.run(function)
    expected = narrow.run(function)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_and_recompiles_once_for_n(backend, device):
    import torch._dynamo.testing

    place = device if backend == "triton" else "cpu"
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(hidden, head, targets):
        stats = linear_stats(hidden, head, targets, outputs=("entropy",), backend=backend)
        return (stats.logps - 0.1 * stats.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    head = torch.randn(70, 8, device=place)
    for n in (2, 3, 9):
        hidden, targets = torch.randn(n, 8, device=place), torch.randint(70, (n,), device=place)
        leaves = [hidden.clone().requires_grad_() for _ in range(2)]
        for function, leaf in zip((loss, compiled), leaves, strict=True):
            function(leaf, head, targets).backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_backend_gives_the_same(dtype):
    problem = Problem(12, 50, 8, dtype)
    function = lambda *a, **k: pick("mix", linear_stats(*a, **k))  # noqa: E731
    ours, oracle = problem.run(function), problem.run(function, backend="reference")
    torch.testing.assert_close(ours[0], oracle[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(ours[1], oracle[1], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
