"""How results that have no check in `problems` are judged: against fp64, by the error that eager PyTorch makes.

Values: within 2x of the error of the same formula from fp32 logits. Gradients: norm-wise within 1.5x of the error of
eager autograd in the operands' own dtype. Both or a few units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from problems import UNITS, Problem
from torch import Tensor

from aspo_kernels import tiles


def check_against_eager(
    problem: Problem,
    ours: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    needs: tuple[bool, bool, bool] = (True, True, True),
    absolute: float = 0.0,
    device: str = "cpu",
    options: dict | None = None,
    **epilogue,
) -> tuple[Tensor, list[Tensor | None]]:
    """One output (N,) and its gradients in hidden, head and bias, under the problem's upstream gradient.

    eager: as oracle, with fp32 statistics of logits in the operands' dtype. options: of ours alone. absolute: an
    error of a gradient's norm that is allowed anyway.
    """
    needs = (*needs[:2], needs[2] and problem.bias is not None)
    wide = tiles.statistics_dtype(problem.hidden.dtype)
    got, gradients = problem.run(ours, needs=needs, device=device, **(options or {}), **epilogue)
    expected, expected_gradients = problem.run(oracle, torch.float64, **epilogue)
    naive, (_, naive_gradients) = problem.run(eager, wide, **epilogue)[0], problem.run(eager, **epilogue)
    check_values(got, expected, naive, wide)
    assert [g is not None for g in gradients] == list(needs)
    check_gradients(gradients, expected_gradients, naive_gradients, wide, absolute)
    return got, gradients


def check_values(got: Tensor, expected: Tensor, naive: Tensor, wide: torch.dtype) -> None:
    unit = UNITS[wide] * torch.finfo(wide).eps * (1 + expected.abs().max())
    error, allowed = (got - expected).abs().max(), 2 * (naive - expected).abs().max() + unit
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def check_gradients(
    got: Sequence[Tensor | None], expected: Sequence[Tensor | None], naive: Sequence[Tensor | None],
    wide: torch.dtype, absolute: float = 0.0,
) -> None:  # fmt: skip
    unit = 4 * UNITS[wide] * torch.finfo(wide).eps
    for name, g, e, n in zip(("hidden", "head", "bias"), got, expected, naive, strict=True):
        if g is None:
            continue
        assert torch.isfinite(g).all(), name
        error, allowed = (g - e).norm(), 1.5 * (n - e).norm() + unit * e.norm() + absolute
        assert error <= allowed, f"{name}: error {error:.2e} of {e.norm():.2e}, allowed {allowed:.2e}"
