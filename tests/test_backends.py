"""Which backend takes a tensor, and what `backend="triton"` says where it cannot."""

from __future__ import annotations

import pytest
import torch

from aspo_kernels import checks, linear_logps


@pytest.fixture
def no_interpreter(monkeypatch):
    """As in a program of a user's: triton is there, and nothing asks for its interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(checks, "_HAS_TRITON", True)


@pytest.mark.parametrize(
    ("device", "dtype", "why"),
    [
        ("cpu", torch.float32, r"the tensors are on the CPU \(set TRITON_INTERPRET=1 before the program starts"),
        ("cpu", torch.float64, "its kernels have no float64"),
        ("meta", torch.float32, "it has no meta device"),
    ],
)
def test_triton_says_why_it_cannot_run(no_interpreter, device, dtype, why):
    with pytest.raises(ValueError, match=f"backend='triton' cannot run here: {why}.*; use backend='auto' or 'torch'"):
        checks.check_backend("triton", torch.zeros(1, device=device, dtype=dtype))
    assert checks.check_backend("auto", torch.zeros(1, device=device, dtype=dtype)) == "torch"


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(checks, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        linear_logps(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), backend="triton")
    assert checks.check_backend("auto", torch.zeros(1)) == "torch"


def test_the_interpreter_is_never_chosen_unasked(no_interpreter, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert checks.check_backend("triton", torch.zeros(1)) == "triton"
    assert checks.check_backend("auto", torch.zeros(1)) == "torch"
