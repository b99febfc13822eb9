"""linear_logps_pair, torch and Triton: each half against the fp64 oracle, and what must not reach the reference.

How accuracy is judged: `problems`. 18 tokens are two chunks of 16 (the last of 2), 70 entries two slices of 64.
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from problems import EPILOGUES, SCHEDULES, Problem, check_gradients, check_logps
from torch import Tensor

from aspo_kernels import linear_logps, linear_logps_pair
from aspo_kernels.tiles import Head

pytestmark = pytest.mark.usefixtures("small_tiles", "poison")
without_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
BACKENDS = ["torch", "reference", pytest.param("triton", marks=without_triton)]


def check_both(problem: Problem, schedule: str, backend: str, device: str, **epilogue) -> None:
    """Log-probabilities of both, the gradients that the policy's should give, and none of the reference's."""
    needs, budget = SCHEDULES[schedule]
    other = copy.copy(problem)
    other.hidden = problem.normal(*problem.hidden.shape).to(problem.hidden.dtype)
    ref_hidden = other.hidden.to(device, copy=True).requires_grad_()
    ref_logps: list[Tensor] = []

    def pair(hidden: Tensor, *rest: Tensor, **options) -> Tensor:
        logps, ref = linear_logps_pair(hidden, ref_hidden, *rest, **options)
        ref_logps.append(ref)
        return logps

    options = {"backend": backend, "memory_budget": budget, **epilogue}
    logps, gradients = problem.run(pair, needs=needs, device=device, **options)
    check_logps(problem, logps, **epilogue)
    check_logps(other, ref_logps[0].double().cpu(), **epilogue)
    assert [g is not None for g in gradients] == list(needs)
    check_gradients(problem, gradients, **epilogue)
    assert ref_hidden.grad is None and not ref_logps[0].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["none", "frozen", "stored", "recompute"])
def test_matches_the_oracle(schedule, backend, device):
    check_both(Problem(18, 70, 24, torch.float32), schedule, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(epilogue, backend, device):
    check_both(Problem(5, 70, 9, torch.float16), "stored", backend, device, **EPILOGUES[epilogue])


def test_the_head_is_read_once_for_both(monkeypatch: pytest.MonkeyPatch):
    problem, seen = Problem(37, 150, 24, torch.float32, bias=False), []
    products = Head.products
    monkeypatch.setattr(Head, "products", lambda head, x, part: seen.append(len(x)) or products(head, x, part))
    linear_logps(problem.hidden, problem.head, problem.targets)
    alone = seen.copy()
    seen.clear()
    linear_logps_pair(problem.hidden, problem.hidden, problem.head, problem.targets)
    assert seen == [2 * tokens for tokens in alone]


def test_no_tokens():
    head = torch.randn(5, 3, requires_grad=True)
    logps, ref_logps = linear_logps_pair(torch.empty(0, 3), torch.empty(0, 3), head, torch.empty(0, dtype=torch.long))
    assert logps.shape == ref_logps.shape == (0,)
    logps.sum().backward()
    assert head.grad.tolist() == torch.zeros(5, 3).tolist()


def test_autocast_casts_both():
    problem = Problem(7, 30, 8, torch.float32)
    operands = (problem.hidden, problem.hidden.bfloat16(), problem.head, problem.targets)
    with torch.autocast("cpu", torch.bfloat16):
        logps, ref_logps = linear_logps_pair(*operands)
    assert logps.dtype == ref_logps.dtype == torch.float32
    assert torch.equal(logps, ref_logps)


def test_one_graph():
    problem = Problem(7, 30, 8, torch.float32)
    operands = (problem.hidden.requires_grad_(), problem.hidden + 1, problem.head, problem.targets)
    compiled = torch.compile(linear_logps_pair, fullgraph=True, backend="aot_eager")(*operands)
    for ours, eager in zip(compiled, linear_logps_pair(*operands), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize(
    ("ref_hidden", "message"),
    [
        (torch.randn(6, 8), r"hidden is \(7, 8\) but ref_hidden \(6, 8\)"),
        (torch.randn(7, 9), r"ref_hidden must be \(N, H\) and its head \(V, H\)"),
        (torch.randn(7, 8).double(), "ref_hidden is torch.float64 but its head torch.float32"),
    ],
)
def test_errors(ref_hidden, message):
    problem = Problem(7, 30, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_logps_pair(problem.hidden, ref_hidden, problem.head, problem.targets)
