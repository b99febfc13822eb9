"""token_logps and its gathered form: values, gradients and errors against the fp64 oracle."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from aspo_kernels import reference, token_logps
from aspo_kernels.token_logps import gathered_token_logps

# the package's attribute of this name is the function, so that the module has to be asked for
token_logps_module = importlib.import_module("aspo_kernels.token_logps")


def make(n: int, v: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + v)
    logits = (torch.randn(n, v, generator=generator, dtype=torch.float64) * spread).to(dtype)
    targets = torch.randint(0, v, (n,), generator=generator)
    return logits, targets, torch.randn(n, generator=generator, dtype=torch.float64)


def gradient(function, logits: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    logps = function(leaf)
    logps.backward(g.to(logps.dtype))
    return logps.detach(), leaf.grad


@pytest.fixture(params=[False, True], ids=["one chunk", "a row a chunk"])
def chunked(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(token_logps_module, "ROW_CHUNK_BYTES", 1)


@pytest.mark.usefixtures("chunked", "poison")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("spread", [3.0, 300.0])
def test_matches_the_oracle(dtype, temperature, spread):
    """The operands are exact in fp64, so only fp32 sums (values) and the logits' dtype (gradients) may round."""
    logits, targets, g = make(23, 41, dtype, spread)
    logps, d_logits = gradient(lambda z: token_logps(z, targets, temperature=temperature), logits, g)
    expected, d_expected = gradient(lambda z: reference.token_logps(z / temperature, targets), logits.double(), g)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    largest = logits.double().abs().max() / temperature
    torch.testing.assert_close(logps.double(), expected, rtol=4 * eps, atol=float(4 * eps * largest))
    assert d_logits.dtype == dtype
    # p inherits the rounding of z - lse, relative; then one rounding to the logits' dtype
    rounding = torch.finfo(dtype).eps + 8 * eps * float(largest)
    tiny = torch.finfo(dtype).tiny
    torch.testing.assert_close(d_logits.double(), d_expected, rtol=rounding, atol=rounding * 1e-2 + tiny)


@pytest.mark.usefixtures("chunked", "poison")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gathered_rows_with_duplicates(dtype):
    logits, _, _ = make(9, 17, dtype)
    rows = torch.tensor([8, 0, 3, 3, 5, 3])
    targets = torch.tensor([1, 16, 0, 4, 4, 0])
    g = make(6, 1, dtype)[2]
    logps, d_logits = gradient(lambda z: gathered_token_logps(z, rows, targets, 1.3), logits, g)
    expected, d_expected = gradient(lambda z: reference.token_logps(z[rows] / 1.3, targets), logits.double(), g)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_logits.double(), d_expected, rtol=2 * eps, atol=2 * eps)
    assert not d_logits[[1, 2, 4, 6, 7]].any()


def test_extremes():
    logits = torch.tensor([[0.0, 200.0, 0.0], [1e4, -1e4, 0.0], [5.0, 5.0, 5.0], [float("-inf"), 0.0, 0.0]])
    targets = torch.tensor([0, 0, 2, 1])
    logps, d_logits = gradient(lambda z: token_logps(z, targets), logits, torch.ones(4))
    torch.testing.assert_close(logps, torch.tensor([-200.0, 0.0, -torch.tensor(3.0).log(), -torch.tensor(2.0).log()]))
    torch.testing.assert_close(d_logits[0], torch.tensor([1.0, -1.0, 0.0]))
    torch.testing.assert_close(d_logits[3], torch.tensor([0.0, 0.5, -0.5]))
    assert torch.isfinite(d_logits).all()


def test_logits_are_not_written_and_a_graph_can_be_used_twice():
    logits, targets, g = make(7, 11, torch.float32)
    before = logits.clone()
    leaf = logits.requires_grad_()
    logps = token_logps(leaf, targets)
    first, again = (torch.autograd.grad(logps, leaf, g.float(), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(logits, before)
    assert logits._version == 0
    with pytest.raises(RuntimeError, match="token_logps is differentiable once"):
        torch.autograd.grad(logps.sum(), leaf, create_graph=True)


def test_non_contiguous_logits_and_upstream():
    logits, targets, g = make(7, 11, torch.float32)
    plain = gradient(lambda z: token_logps(z, targets), logits, g)
    leaf = logits.t().contiguous().t().detach().requires_grad_()
    assert not leaf.is_contiguous()
    logps = token_logps(leaf, targets)
    logps.backward(g.float().repeat_interleave(2)[::2])
    torch.testing.assert_close(logps, plain[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad, plain[1], rtol=1e-6, atol=1e-6)


def test_no_rows_give_a_connected_zero():
    logits = torch.empty(0, 5, requires_grad=True)
    token_logps(logits, torch.empty(0, dtype=torch.long)).sum().backward()
    assert logits.grad.shape == (0, 5)
    full = torch.randn(3, 5, requires_grad=True)
    gathered_token_logps(full, torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)).sum().backward()
    assert not full.grad.any()


def test_no_grad():
    logits, targets, _ = make(3, 5, torch.float32)
    with torch.no_grad():
        assert not token_logps(logits.requires_grad_(), targets).requires_grad


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.zeros(2, 3, 4), torch.tensor([0, 1]), {}, r"logits must be floating point \(N, V\).*\(2, 3, 4\)"),
        (torch.zeros(2, 3).long(), torch.tensor([0, 1]), {}, "got torch.int64"),
        (torch.zeros(0, 0), torch.empty(0).long(), {}, "with V > 0"),
        (torch.zeros(2, 3), torch.tensor([0]), {}, r"targets must be \(2,\) int64"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}, r"targets\[1\] is 3, outside the vocabulary \[0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0, -100]), {}, "leave uncounted positions"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"temperature": 0}, "temperature is 0; it must be positive"),
        (torch.full((2, 3), float("nan")), torch.tensor([0, 1]), {}, r"log-probability of token 0 .* is nan"),
    ],
)
def test_errors(logits, targets, options, message):
    with pytest.raises(ValueError, match=message):
        token_logps(logits, targets, **options)
