"""One call of linear_logps, its truth in fp64 and its limits: what the tests of every backend share.

Accuracy is judged against eager PyTorch on the same operands: log-probabilities within 2x of the error of fp32 logits,
gradients within 1.5x of the error of eager autograd in the operands' own dtype.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aspo_kernels import linear_logps, reference, tiles

# name -> (what needs a gradient among hidden, head, bias; memory_budget in bytes)
SCHEDULES: dict[str, tuple[tuple[bool, bool, bool], int | None]] = {
    "none": ((False, False, False), None),
    "frozen": ((True, False, False), None),
    "stored": ((True, True, True), 1 << 40),
    "recompute": ((True, True, True), 0),
    "head only, stored": ((False, True, False), 1 << 40),
    "head only, recompute": ((False, True, False), 0),
    "bias only, stored": ((False, False, True), 1 << 40),
    "bias only, recompute": ((False, False, True), 0),
}
EPILOGUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale, temperature": {"logit_scale": 0.6, "temperature": 1.7},
    "softcap": {"softcap": 3.0},
    "all": {"logit_scale": -1.3, "temperature": 0.8, "softcap": 5.0},
}

# Units in the last place that any result may be off. The oracle is fp64 itself, so that its own rounding shows there.
UNITS = {torch.float32: 1, torch.float64: 32}


class Problem:
    """Operands of one call; `run` gives log-probabilities and gradients, all in fp64, of any implementation."""

    def __init__(
        self, n: int, v: int, h: int, dtype: torch.dtype, seed: int = 0, spread: float = 2.0, bias: bool = True
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden = self.normal(n, h).to(dtype)
        self.head = (self.normal(v, h) * spread / h**0.5).to(dtype)
        self.bias = self.normal(v).to(dtype) if bias else None
        self.targets = torch.randint(0, v, (n,), generator=self.generator)
        self.upstream = self.normal(n)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def run(self, function, dtype: torch.dtype | None = None, needs=(True, True, True), device="cpu", **kwargs):
        dtype = dtype or self.hidden.dtype
        operands = [
            None if t is None else t.detach().to(device, dtype, copy=True).requires_grad_(need)
            for t, need in zip((self.hidden, self.head, self.bias), needs, strict=True)
        ]
        hidden, head, bias = operands
        logps = function(hidden, head, self.targets.to(device), bias=bias, **kwargs)
        if logps.requires_grad:
            logps.backward(self.upstream.to(logps))
        gradients = [None if t is None or t.grad is None else t.grad.double().cpu() for t in operands]
        return logps.detach().double().cpu(), gradients

    def oracle(self, **kwargs):
        return self.run(reference.linear_logps, torch.float64, **kwargs)


def eager(hidden: Tensor, head: Tensor, targets: Tensor, bias: Tensor | None = None, **epilogue) -> Tensor:
    """What one writes without this library: logits in the operands' dtype, log_softmax in fp32 (fp64 for fp64)."""
    logits = reference.logits(hidden, head, bias, **epilogue)
    return reference.token_logps(logits.to(tiles.statistics_dtype(logits.dtype)), targets)


def check_logps(problem: Problem, got: Tensor, **epilogue) -> None:
    """Within twice the error of fp32 logits from the same operands, or one unit in the last place of the result."""
    expected = problem.oracle(**epilogue)[0]
    wide = tiles.statistics_dtype(problem.hidden.dtype)
    with_fp32_logits = problem.run(eager, wide, **epilogue)[0]
    unit = UNITS[wide] * torch.finfo(wide).eps * (1 + expected.abs().max())
    assert (got - expected).abs().max() <= 2 * (with_fp32_logits - expected).abs().max() + unit


def check_gradients(problem: Problem, got: list[Tensor | None], floor: float = 0.0, **epilogue) -> None:
    """Each gradient's norm-wise error within 1.5x of eager's in the same dtype (or a few units of fp32, fp64)."""
    expected, naive = problem.oracle(**epilogue)[1], problem.run(eager, **epilogue)[1]
    wide = tiles.statistics_dtype(problem.hidden.dtype)
    unit = 4 * UNITS[wide] * torch.finfo(wide).eps
    for name, g, e, n in zip(("hidden", "head", "bias"), got, expected, naive, strict=True):
        if g is None:
            continue
        assert torch.isfinite(g).all(), name
        error, allowed = (g - e).norm(), torch.maximum(1.5 * (n - e).norm() + unit * e.norm(), floor * e.norm())
        assert error <= allowed, f"{name}: error {error / e.norm():.2e}, eager {(n - e).norm() / e.norm():.2e}"


def check(
    problem: Problem, schedule: str, floor: float = 0.0, backend: str = "torch", device: str = "cpu", **epilogue
) -> None:
    """linear_logps under one schedule: the log-probabilities, and the gradients that it should give and no others."""
    needs, budget = SCHEDULES[schedule]
    needs = (*needs[:2], needs[2] and problem.bias is not None)
    options = {"backend": backend, "memory_budget": budget, **epilogue}
    logps, gradients = problem.run(linear_logps, needs=needs, device=device, **options)
    check_logps(problem, logps, **epilogue)
    assert [g is not None for g in gradients] == list(needs)
    check_gradients(problem, gradients, floor, **epilogue)


def leave_targets_unchecked(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """aspo_kernels.<module> does not look at what targets and results hold, as on a GPU."""
    for name in ("check_targets", "check_finite_logps"):
        monkeypatch.setattr(importlib.import_module(f"aspo_kernels.{module}"), name, lambda *_: None)


def check_missing_targets(problem: Problem, function: Any, needs: tuple[bool, bool, bool], **options: Any) -> None:
    """Tokens whose target is -100, unchecked: NaN, and so is every gradient they reach; the others keep their bits."""
    expected, (expected_d_hidden, *_) = problem.run(function, needs=needs, **options)
    bad = torch.zeros(problem.targets.shape, dtype=torch.bool)
    bad[[2, -1]] = True
    problem.targets[bad] = -100
    got, (d_hidden, *of_head) = problem.run(function, needs=needs, **options)
    assert torch.equal(got.isnan(), bad)
    assert torch.equal(got[~bad], expected[~bad])
    if d_hidden is not None:
        assert d_hidden[bad].isnan().all()
        assert torch.equal(d_hidden[~bad], expected_d_hidden[~bad])
    assert all(gradient.isnan().all() for gradient in of_head if gradient is not None)


class Policy(nn.Module):
    """A model that ends in hidden states, and a head beside it, alike in all processes: what sharded heads train."""

    def __init__(self, hidden: int, vocabulary: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, hidden))
        self.head = nn.Linear(hidden, vocabulary, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)
