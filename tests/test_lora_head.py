"""LoRA on the head: exact log-probabilities and gradients of x, A, B, W and bias, against the merged head in fp64."""

from __future__ import annotations

import pytest
import torch
from strategies import lean_layout

from aspo_kernels import linear_logps, reference, sentence_dpo_loss

N, V, H, R, SCALING = 20, 100, 12, 3, 0.7
NEEDS = {
    "frozen head": {"x": True, "a": True},
    "A and B": {"x": True, "a": True, "b": True},
    "B alone": {"b": True},
    "all": {"x": True, "w": True, "bias": True, "a": True, "b": True},
}
SHAPES = {"x": (N, H), "w": (V, H), "bias": (V,), "a": (R, H), "b": (V, R)}


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()
    }


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, small_tiles: None) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["stored", "recompute"])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("epilogue", [{}, {"softcap": 4.0, "logit_scale": 0.5, "temperature": 1.5}], ids=["", "cap"])
def test_matches_the_merged_head(needs, budget, epilogue, backend, device):
    g = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.arange(N) * 5 % V
    truth = {k: v.requires_grad_(NEEDS[needs].get(k, False)) for k, v in tensors(torch.float64).items()}
    merged = truth["w"] + SCALING * truth["b"] @ truth["a"]
    expected = reference.linear_logps(truth["x"], merged, targets, truth["bias"], **epilogue)
    expected.backward(g)

    ours = {k: v.to(device).requires_grad_(NEEDS[needs].get(k, False)) for k, v in tensors(torch.float64).items()}
    ours = {k: v.detach().float().requires_grad_(v.requires_grad) for k, v in ours.items()}
    logps = linear_logps(
        ours["x"], ours["w"], targets.to(device), bias=ours["bias"], lora=(ours["a"], ours["b"], SCALING),
        backend=backend, memory_budget=budget, **epilogue,
    )  # fmt: skip
    logps.backward(g.to(logps))
    torch.testing.assert_close(logps.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for name in SHAPES:
        assert (ours[name].grad is None) == (not NEEDS[needs].get(name, False)), name
        if ours[name].grad is not None:
            error = (ours[name].grad.cpu().double() - truth[name].grad).norm() / truth[name].grad.norm()
            assert error < 2e-6, (name, float(error))


def test_the_reference_keeps_the_head_without_lora(backend, device):
    """The policy's head has a LoRA, the reference's is the plain one: not stacked, and each with its own head."""
    layout = lean_layout([[3, 1], [2, 4, 1], [5], [2, 2]], vocabulary=V)
    t = {k: v.float() for k, v in tensors(torch.float64).items()}
    hidden, ref_hidden = (torch.randn(layout.num_tokens, H) for _ in range(2))
    out = sentence_dpo_loss(
        hidden.to(device), t["w"].to(device), layout.to(device), ref_hidden=ref_hidden.to(device),
        lora=(t["a"].to(device), t["b"].to(device), SCALING), backend=backend,
    )  # fmt: skip
    merged = t["w"] + SCALING * t["b"] @ t["a"]
    policy = reference.linear_logps(hidden.double(), merged.double(), layout.targets)
    ref = reference.linear_logps(ref_hidden.double(), t["w"].double(), layout.targets)
    expected = reference.aspo_loss(policy, ref, layout)
    torch.testing.assert_close(out.margins.cpu().double(), expected["margins"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            (torch.ones(R, H + 1), torch.ones(V, R), 1.0),
            r"lora must be \(A \(r, 12\), B \(100, r\), scaling\).*\(3, 13\)",
        ),
        ((torch.ones(R, H), torch.ones(V, R + 1), 1.0), r"\(3, 12\) and \(100, 4\)"),
        ((torch.ones(R, H), torch.ones(V, R), float("nan")), "lora's scaling is nan"),
        ((torch.ones(R, H), torch.ones(V, R)), r"lora must be \(A, B, scaling\), got 2 entries"),
        ((torch.ones(R, H, dtype=torch.bfloat16), torch.ones(V, R), 1.0), "lora's A is torch.bfloat16"),
    ],
)
def test_errors(lora, message):
    t = {k: v.float() for k, v in tensors(torch.float64).items()}
    with pytest.raises(ValueError, match=message):
        linear_logps(t["x"], t["w"], torch.zeros(N, dtype=torch.int64), lora=lora)
