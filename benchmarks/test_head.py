"""The loss head under pytest-benchmark: `pytest benchmarks --benchmark-group-by=param:case`; `make smoke` only checks.

Small enough to repeat; the committed figures come from `python -m benchmarks.head`, which interleaves its rounds.
"""

from __future__ import annotations

import pytest

from benchmarks.cases import Case
from benchmarks.contenders import load
from benchmarks.head import accuracy, truth_of
from benchmarks.oracle import Answer

CASES = [
    Case(512, 512, 8_000, dtype, logits, trainable)
    for dtype in ("bf16", "fp32")
    for logits in ("random", "peaked")
    for trainable in (False, True)
]
CONTENDERS, MISSING = load(trainable_head=True)
assert {"aspo_kernels", "aspo_kernels, recompute"} <= {c.name for c in CONTENDERS}, "ours are known by their names"


@pytest.fixture(
    scope="module", params=CASES, ids=lambda c: f"{c.dtype}-{c.logits}-{'trainable' if c.trainable_head else 'frozen'}"
)
def case(request: pytest.FixtureRequest) -> tuple[Case, Answer]:
    return request.param, truth_of(request.param)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_step(benchmark, case, contender):
    case, truth = case
    if contender.name == "aspo_kernels, recompute" and not case.trainable_head:
        pytest.skip("a frozen head has nothing to recompute")
    errors = accuracy(contender, case, truth)
    if contender.name.startswith("aspo_kernels"):  # the peers' errors are reported, ours are required
        assert errors["margin_error_nats"] < 1e-3
        grads = [errors["hidden_grad_error"]] + ([errors["head_grad_error"]] if case.trainable_head else [])
        assert max(grads) < (4e-3 if case.dtype == "bf16" else 2e-6)
    benchmark.extra_info |= errors
    benchmark(contender.step, case.inputs())
