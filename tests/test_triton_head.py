"""The Triton kernels of linear_logps, both candidates, against fp64: interpreted on a CPU, compiled on a GPU.

Sizes are odd and small, so that every mask matters and the interpreter stays quick: chunks of 16 tokens, slices of 64.
"""

from __future__ import annotations

import pytest
import torch
from problems import EPILOGUES, SCHEDULES, Problem, check, check_missing_targets, leave_targets_unchecked

from aspo_kernels import linear_logps, reference

pytest.importorskip("triton")
from aspo_kernels import triton_fused, triton_head

# The interpreter's bf16 products are wrong; a GPU's are not.
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.fixture(params=["tile", "fused"])
def candidate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> str:
    """Both ways to make the exponentials of a tile, on small tiles."""
    monkeypatch.setattr(triton_head, "CANDIDATE", request.param)
    if not torch.cuda.is_available():  # several blocks a tile, at a size that the interpreter can run
        monkeypatch.setattr(triton_fused, "fused_blocks", lambda dtype, softcap: triton_fused.Blocks(16, 32, 16, 1, 1))
    return request.param


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_matches_the_oracle(schedule, dtype, device):
    check(Problem(18, 100, 24, dtype), schedule, backend="triton", device=device)


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_epilogues(schedule, epilogue, device):
    check(Problem(9, 70, 17, torch.float32), schedule, backend="triton", device=device, **EPILOGUES[epilogue])


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 3), (17, 65, 1), (33, 64, 31), (2, 129, 70)], ids=str)
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_odd_sizes(schedule, sizes, device):
    check(Problem(*sizes, torch.float32, bias=False), schedule, backend="triton", device=device)


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_a_last_chunk_of_one_token(schedule, dtype, device):
    """Its sum of products is (1, H), which torch.addmm could take for a bias; on a GPU each dtype has its own GEMM."""
    check(
        Problem(17, 129, 64, dtype, bias=False), schedule, 6e-3 if dtype != torch.float32 else 0.0,
        backend="triton", device=device,
    )  # fmt: skip


def test_no_tokens(device):
    hidden = torch.empty(0, 3, device=device, requires_grad=True)
    logps = linear_logps(hidden, torch.ones(5, 3, device=device), torch.empty(0, dtype=torch.int64, device=device))
    logps.sum().backward()
    assert logps.shape == (0,) and hidden.grad.shape == (0, 3)


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nll", [20.0, 200.0])
@pytest.mark.parametrize("rival", [0, 149], ids=["first slice", "last"])
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_very_unlikely_targets(schedule, rival, nll, dtype, device):
    """A rival `nll` above the target, in any slice, raises the shift of its row, and of no other."""
    problem = Problem(7, 150, 32, dtype, spread=1.0, bias=False)
    problem.targets[:] = 75
    raised = torch.arange(0, 7, 3)
    direction = problem.head[rival].double() - problem.head[75].double()
    row = problem.hidden[raised].double()
    missing = nll - row @ direction
    problem.hidden[raised] = (row + missing[:, None] * direction / direction.square().sum()).to(dtype)
    # Where p(rival) = 1 eager's 16-bit operands are exact by luck; E, its product and G each round once here.
    check(problem, schedule, 6e-3 if dtype != torch.float32 else 1e-5, backend="triton", device=device)


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_the_shift_is_raised_more_than_once(schedule, device):
    """Logits that climb by 40 from slice to slice, targets everywhere."""
    n, v = 6, 300
    problem = Problem(n, v, 4, torch.float32, bias=False)
    problem.hidden[:] = torch.tensor([1.0, 0.0, 0.1, 0.0])
    problem.head[:, 0] = torch.arange(v) * (40 / 64)
    problem.targets[:] = torch.linspace(0, v - 1, n).long()
    check(problem, schedule, 1e-5, backend="triton", device=device)


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_logits_of_ten_thousand_and_ties(schedule, dtype, device):
    problem = Problem(9, 130, 8, dtype, bias=False)
    problem.hidden.zero_()
    problem.hidden[:, 0] = 100.0
    problem.head[:, 0] = 0.0
    problem.head[3, 0], problem.head[90, 0], problem.head[5, 0] = 100.0, 100.0, -100.0  # +1e4 twice, -1e4
    problem.targets[:8] = torch.tensor([3, 90, 5, 3, 90, 5, 129, 0])
    check(problem, schedule, 6e-3 if dtype != torch.float32 else 1e-5, backend="triton", device=device)


@pytest.mark.usefixtures("candidate", "poison")
def test_digits_as_p_goes_to_one(device):
    """-log p of 1e-3 to 1e-12: log p keeps its relative precision, which log_softmax in fp32 loses."""
    lead = torch.tensor([7.0, 14.0, 20.0, 28.0])
    hidden = torch.stack([lead, torch.zeros(4)], 1).to(device)
    head = torch.zeros(3, 2, device=device)
    head[1, 0] = 1.0
    logps = linear_logps(hidden, head, torch.ones(4, dtype=torch.int64, device=device), backend="triton")
    expected = -torch.log1p(2 * torch.exp(-lead.double()))
    torch.testing.assert_close(logps.cpu().double(), expected, rtol=2e-6, atol=0.0)


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("certainty", ["flat tail", "one rival", "flat tail, soft-cap"])
def test_the_gradient_of_confident_tokens_keeps_its_tail(certainty, dtype, device):
    """G = W[y] - p W with 1 - p of 1e-2 to 1e-7, over 300 rivals (E down to 3e-10) or one 7 to 18 nats below."""
    v, missing = 301, torch.tensor([1e-2, 1e-3, 1e-5, 1e-7], dtype=torch.float64)
    head = torch.zeros(v, 8, dtype=torch.float64)
    head[1:, 1:] = 1 + 0.1 * torch.randn(v - 1, 7, dtype=torch.float64)  # what p W loses is W's mean, not nothing
    head[0, 0] = head[0, 2] = 1.0
    epilogue = {"softcap": 30.0} if certainty.endswith("cap") else {}
    hidden = torch.zeros(4, 8, dtype=torch.float64)
    if certainty == "one rival":
        head[2:, 0] = -60.0  # far below, whatever x_0 is
        hidden[:, 0] = torch.tensor([7.0, 9.0, 14.0, 18.0])
    else:
        hidden[:, 0] = torch.log((v - 1) / missing)
    x, w = hidden.to(device, dtype), head.to(device, dtype)
    targets = torch.zeros(4, dtype=torch.int64, device=device)
    results = []
    for function, operands in ((linear_logps, (x, w)), (reference.linear_logps, (x.double(), w.double()))):
        leaf = operands[0].detach().requires_grad_()
        options = {"backend": "triton"} if function is linear_logps else {}
        out = function(leaf, operands[1], targets, **options, **epilogue)
        # a loss scale that leaves fp16's precision to the gradient's rounding
        scale = (1 / missing if certainty != "one rival" else hidden[:, 0].exp()).to(out)
        results.append(torch.autograd.grad(out, leaf, scale)[0].double().cpu())
    got, expected = results
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < 4 * torch.finfo(dtype).eps + 1e-5


@pytest.mark.usefixtures("candidate", "poison")
def test_digits_of_logits_far_below_the_soft_cap(device):
    """cap(u) is nearly u there; a tanh that is a difference from 1 rounds at the size of the cap, here 3e-5 after T."""
    problem = Problem(9, 70, 8, torch.float32, spread=0.3, bias=False)
    check(problem, "frozen", backend="triton", device=device, softcap=30.0, temperature=0.05)


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_non_contiguous_operands(schedule, device):
    wide, tall = torch.randn(20, 48, device=device), torch.randn(17, 90, device=device)
    layouts = [
        (wide[:, ::2][:, :17], tall.T),  # strided hidden, transposed head
        (wide[::2, 3:20], torch.randn(90, 40, device=device)[:, 5:22]),
    ]
    needs, budget = SCHEDULES[schedule]
    bias = torch.randn(270, device=device)[::3]
    for hidden, head in layouts:
        targets = torch.randint(90, (hidden.shape[0],), device=device)
        results = []
        for x, w, b in ((hidden, head, bias), (hidden.contiguous(), head.contiguous(), bias.contiguous())):
            x, w = x.detach().requires_grad_(needs[0]), w.detach().requires_grad_(needs[1])
            logps = linear_logps(x, w, targets, bias=b, backend="triton", memory_budget=budget)
            logps.sum().backward()
            results.append([logps.detach()] + [t.grad for t in (x, w) if t.grad is not None])
        for strided, plain in zip(*results, strict=True):
            torch.testing.assert_close(strided, plain, rtol=1e-5, atol=2e-5)  # other strides, another order of sums


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("schedule", ["frozen", "stored", "recompute"])
def test_two_runs_give_the_same_bits(schedule, device):
    problem = Problem(18, 100, 24, torch.float32)
    needs, budget = SCHEDULES[schedule]
    options = {"needs": needs, "memory_budget": budget, "backend": "triton", "device": device}
    first, second = (problem.run(linear_logps, **options) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True) if a is not None)


@pytest.mark.usefixtures("candidate", "poison")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_target_that_nobody_looked_at_is_never_another_token(schedule, monkeypatch, device):
    """-100 in an index is row V - 100."""
    leave_targets_unchecked(monkeypatch, "linear_logps")
    needs, budget = SCHEDULES[schedule]
    options = {"memory_budget": budget, "backend": "triton", "device": device}
    check_missing_targets(Problem(20, 150, 12, torch.float32), linear_logps, needs, **options)


@pytest.mark.gpu
def test_more_entries_than_an_int32_counts():
    """Row offsets beyond 2^31 in the head and in kept E."""
    n, v, h = 20_000, 120_000, 64
    hidden = torch.randn(n, h, device="cuda", dtype=torch.bfloat16).requires_grad_()
    head = (torch.randn(v, h, device="cuda") / 8).bfloat16().requires_grad_()
    targets = torch.randint(v, (n,), device="cuda")
    logps = linear_logps(hidden, head, targets, memory_budget=1 << 40)
    logps.sum().backward()
    last = slice(n - 64, n)
    expected = (hidden[last].float() @ head.float().T).log_softmax(-1).gather(-1, targets[last, None])[:, 0]
    torch.testing.assert_close(logps[last], expected, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(head.grad).all() and torch.isfinite(hidden.grad).all()


@pytest.mark.gpu
def test_a_captured_graph_replays_with_other_values():
    problem = Problem(19, 150, 24, torch.float32, bias=False)
    hidden, head = problem.hidden.cuda(), problem.head.cuda()
    targets = problem.targets.cuda()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        x = hidden.detach().requires_grad_()
        logps = linear_logps(x, head, targets)
        return logps, torch.autograd.grad(logps.sum(), x)[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    hidden.copy_(torch.randn_like(hidden))
    targets.copy_(targets.flip(0))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)
