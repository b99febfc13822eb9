"""token_logps and its gathered form, every backend against the fp64 oracle: values, gradients, errors, and what it
must not do. Without a GPU the Triton backend is interpreted: no bf16 there (see test_triton_logits for that)."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aspo_kernels import reference, token_logps, torch_logits
from aspo_kernels.token_logps import gathered_token_logps

BACKENDS = ("torch", "triton")
CASES = [("torch", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
CASES += [("triton", dtype) for dtype in (torch.float32, torch.float16)]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(params=[False, True], ids=["at once", "in pieces"])
def pieces(request, monkeypatch) -> None:
    """In pieces: one row a chunk (torch), blocks of 16 entries (triton)."""
    if request.param:
        monkeypatch.setattr(torch_logits, "CPU_CHUNK_BYTES", 1)
        monkeypatch.setattr(torch_logits, "GPU_CHUNK_BYTES", 1)
        if importlib.util.find_spec("triton") is not None:
            monkeypatch.setattr(importlib.import_module("aspo_kernels.triton_logits"), "MAX_BLOCK_V", 16)


def make(n: int, v: int, dtype: torch.dtype, device: str, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, v), targets (n,), upstream gradients (n,) in fp64."""
    generator = torch.Generator().manual_seed(n + v)
    logits = (torch.randn(n, v, generator=generator, dtype=torch.float64) * spread).to(dtype)
    targets = torch.randint(0, v, (n,), generator=generator)
    upstream = torch.randn(n, generator=generator, dtype=torch.float64)
    return logits.to(device), targets.to(device), upstream.to(device)


def gradient(function, logits: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The values and the gradient in logits; the function gets a tensor that is no leaf, as a model's logits are."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    logps = function(leaf.view_as(leaf))
    logps.backward(g.to(logps.dtype))
    assert leaf.grad is not None
    return logps.detach(), leaf.grad


def exact(logits: Tensor, targets: Tensor) -> Tensor:
    """reference.token_logps without its own cancellation as p -> 1: minus the log of 1 + the rivals' odds."""
    u = logits - logits.gather(1, targets[:, None])
    odds = u.scatter(1, targets[:, None], -float("inf")).logsumexp(1)
    return -torch.logaddexp(odds, torch.zeros_like(odds))


def check(ours: tuple[Tensor, Tensor], oracle: tuple[Tensor, Tensor], dtype: torch.dtype, largest: float) -> None:
    """Only fp32 rounding of differences of logits (up to 2 * largest), and the gradient's own rounding to its dtype.

    Relative, however near p is to 1: nothing cancels.
    """
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rounding = eps * (8 + 2 * largest)
    torch.testing.assert_close(ours[0].double(), oracle[0].double(), rtol=rounding, atol=1e-37)
    assert ours[1].dtype == dtype
    smallest = torch.finfo(dtype).smallest_normal * (2**-10 if dtype == torch.float16 else 1)  # fp16 has subnormals
    torch.testing.assert_close(
        ours[1].double(), oracle[1].double(), rtol=torch.finfo(dtype).eps + rounding, atol=4 * smallest
    )


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("spread", [3.0, 300.0])
def test_matches_the_oracle(backend, dtype, temperature, spread, device):
    """Spread 300: rows that are certain, and targets hundreds of nats down."""
    logits, targets, g = make(7, 41, dtype, device, spread)
    ours = gradient(lambda z: token_logps(z, targets, temperature=temperature, backend=backend), logits, g)
    oracle = gradient(lambda z: exact(z / temperature, targets), logits.double(), g)
    torch.testing.assert_close(oracle[0], reference.token_logps(logits.double() / temperature, targets))
    check(ours, oracle, dtype, float(logits.abs().max()) / temperature)


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
def test_gathered_rows_with_duplicates(backend, dtype, inplace, device):
    """Rows 3 and 5 predict several tokens, one of them twice; rows 1, 2, 4, 6, 7 none, and hold NaN: padding may."""
    logits, _, _ = make(9, 37, dtype, device)
    rows = torch.tensor([8, 0, 3, 3, 5, 3, 5], device=device)
    targets = torch.tensor([1, 16, 0, 4, 4, 0, 36], device=device)
    unused = [1, 2, 4, 6, 7]
    g = make(7, 1, dtype, device)[2]
    oracle = gradient(lambda z: reference.token_logps(z[rows] / 1.3, targets), logits.double(), g)
    logits[unused] = float("nan")
    ours = gradient(
        lambda z: gathered_token_logps(z, rows, targets, 1.3, inplace_backward=inplace, backend=backend), logits, g
    )
    eps = max(torch.finfo(dtype).eps, 1e-15)
    torch.testing.assert_close(ours[0].double(), oracle[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), oracle[1], rtol=2 * eps, atol=2 * eps)
    assert torch.equal(ours[1][unused], torch.zeros_like(ours[1][unused]))


@pytest.mark.usefixtures("poison")
@given(st.data())
def test_any_rows_and_targets(data):
    """Sums over tokens of one row, repeated targets among them, against the oracle's own gather."""
    m, v = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, m - 1), st.integers(0, v - 1)), max_size=9))
    logits, g = make(m, v, torch.float32, "cpu")[0], make(len(pairs), 1, torch.float32, "cpu")[2]
    rows, targets = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    ours = gradient(lambda z: gathered_token_logps(z, rows, targets), logits, g)
    oracle = gradient(lambda z: reference.token_logps(z[rows], targets), logits.double(), g)
    torch.testing.assert_close(ours[0].double(), oracle[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1].double(), oracle[1], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extremes(backend, dtype, device):
    inf = float("inf")
    logits = torch.tensor(
        [
            [0.0, 200.0, 0.0, 0.0],  # -logp 200, beyond the range of exp
            [1e4, -1e4, 0.0, -inf],  # logits of +-1e4, certain
            [-1e4, 1e4, 0.0, 0.0],  # and the other way round
            [1e4, 1e4, 1e4, 1e4],  # a tie where fp32 logits are spaced by 1e-3
            [-inf, 0.0, 0.0, -inf],  # a masked vocabulary
            [0.0, 88.0, 88.0, 0.0],  # where exp overflows
            [40.0, 0.0, 0.0, 0.0],  # S = 1e-17, gone if it were added to 1
        ],
        dtype=dtype,
        device=device,
    )
    targets = torch.tensor([0, 0, 0, 2, 1, 3, 0], device=device)
    ours = gradient(lambda z: token_logps(z, targets, backend=backend), logits, torch.ones(7, device=device))
    oracle = gradient(lambda z: exact(z, targets), logits.double(), torch.ones(7, device=device))
    assert float(oracle[0][6]) == pytest.approx(-3 * math.exp(-40), rel=1e-12)
    torch.testing.assert_close(ours[0].double(), oracle[0], rtol=1e-5, atol=0.0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours[1].double(), oracle[1], rtol=eps + 3e-5, atol=6e-8 if dtype == torch.float16 else 1e-37
    )


@pytest.mark.parametrize("row", [[3.0], [3.0, -float("inf"), -float("inf")]], ids=str)
def test_a_target_without_rivals(backend, row, device):
    """One row of one entry, and one of which all others are masked."""
    target = torch.tensor([0], device=device)
    logps, d_logits = gradient(
        lambda z: token_logps(z, target, backend=backend), torch.tensor([row], device=device), target + 1
    )
    assert logps.tolist() == [0.0]
    assert d_logits.tolist() == [[0.0] * len(row)]


def test_no_rows_give_a_connected_zero(backend, device):
    none = torch.empty(0, dtype=torch.long, device=device)
    logits = torch.empty(0, 5, requires_grad=True, device=device)
    token_logps(logits, none, backend=backend).sum().backward()
    assert logits.grad.shape == (0, 5)
    for inplace in (False, True):
        full = torch.randn(3, 5, requires_grad=True, device=device)
        gathered_token_logps(full * 1, none, none, inplace_backward=inplace, backend=backend).sum().backward()
        assert torch.equal(full.grad, torch.zeros_like(full))


# --- strides ---

LAYOUTS = {
    "transposed": lambda z: z.t().contiguous().t(),
    "every third column": lambda z: z.repeat_interleave(3, 1)[:, ::3],
    "a slice of wider rows": lambda z: torch.cat([z, z + 9, z], 1)[:, z.shape[1] * 2 :],
    "every second row": lambda z: z.repeat_interleave(2, 0)[::2],
    "one row for all": lambda z: z[:1].expand_as(z),
}


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gathered", [False, True])
def test_strides(backend, layout, gathered, device):
    """Logits, targets and upstream gradients that are not contiguous."""
    logits, targets, g = make(7, 11, torch.float32, device)
    strided = LAYOUTS[layout](logits)
    assert not strided.is_contiguous()
    rows = torch.arange(7, device=device).flip(0) if gathered else None
    targets = targets.repeat_interleave(2)[::2]
    results = []
    for z in (strided.contiguous(), strided):
        leaf = z.detach().requires_grad_()
        logps = gathered_token_logps(leaf, rows, targets, backend=backend)
        results.append((logps, *torch.autograd.grad(logps, leaf, g.float().repeat_interleave(2)[::2])))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize("inplace", [False, True])
def test_padded_logits_are_read_as_they_lie(backend, inplace, device):
    """(R, T, V) without the last position, as a trainer slices them: no copy, the same values and gradients."""
    whole = make(3 * 6, 11, torch.float32, device)[0].view(3, 6, 11)
    rows, targets = torch.tensor([14, 0, 4, 5, 5], device=device), torch.tensor([1, 0, 10, 3, 4], device=device)
    g = make(5, 1, torch.float32, device)[2].float()
    results = []
    for flatten in (True, False):
        leaf = whole.clone().requires_grad_()
        sliced = (leaf * 1)[:, :-1]
        z = sliced.flatten(0, 1) if flatten else sliced
        logps = gathered_token_logps(z, rows, targets, inplace_backward=inplace, backend=backend)
        logps.backward(g)
        results.append((logps.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][1][:, -1].any()


# --- in place ---


@pytest.mark.usefixtures("pieces", "poison")
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every third column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_backward_writes_over_the_logits(backend, dtype, layout, device):
    logits, targets, g = make(7, 41, dtype, device)
    expected = gradient(lambda z: token_logps(z, targets, backend=backend), logits, g)
    leaf = logits.clone().requires_grad_()
    z = LAYOUTS.get(layout, torch.clone)(leaf)
    seen: list[Tensor] = []
    z.register_hook(seen.append)
    logps = token_logps(z, targets, inplace_backward=True, backend=backend)
    assert torch.equal(z.detach(), logits), "intact until the backward"
    logps.backward(g.float())
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-7}
    torch.testing.assert_close(logps.detach(), expected[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(leaf.grad, expected[1], **close)
    assert seen[0].data_ptr() == z.data_ptr()
    torch.testing.assert_close(z.detach(), expected[1], **close)


def test_after_an_inplace_backward_the_graph_is_spent(backend, device):
    logits, targets, _ = make(3, 5, torch.float32, device)
    z = logits.requires_grad_() * 1
    logps = token_logps(z, targets, inplace_backward=True, backend=backend)
    other = (z**2).sum()  # kept the logits too
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=True wrote its gradient over the logits"):
        logps.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_an_inplace_backward_sees_that_the_logits_were_changed(backend, device):
    logits, targets, _ = make(3, 5, torch.float32, device)
    z = logits.requires_grad_() * 1
    logps = token_logps(z, targets, inplace_backward=True, backend=backend)
    z.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@pytest.mark.parametrize("shared", [torch.zeros(1, 5).expand(3, 5), torch.zeros(9).as_strided((3, 5), (2, 1))])
def test_shared_memory_is_not_overwritten(shared):
    with pytest.raises(ValueError, match=r"several entries share memory, shape \(3, 5\) with strides \(\d, 1\): clone"):
        token_logps(shared, torch.tensor([0, 1, 2]), inplace_backward=True)


# --- what it must not do ---


def test_logits_are_not_written_and_a_graph_can_be_used_twice(backend, device):
    logits, targets, g = make(7, 11, torch.float32, device)
    before = logits.clone()
    leaf = logits.requires_grad_()
    logps = token_logps(leaf, targets, backend=backend)
    first, again = (torch.autograd.grad(logps, leaf, g.float(), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(logits, before)
    assert logits._version == 0


def test_double_backward_is_refused(backend, device):
    logits, targets, _ = make(3, 5, torch.float32, device)
    logps = token_logps(logits.requires_grad_(), targets, backend=backend)
    with pytest.raises(RuntimeError, match="token_logps is differentiable once"):
        torch.autograd.grad(logps.sum(), logits, create_graph=True)


def test_the_result_may_be_overwritten(backend, device):
    """Nothing that the backward needs is the caller's."""
    logits, targets, g = make(3, 5, torch.float32, device)
    expected = gradient(lambda z: token_logps(z, targets, backend=backend), logits, g * 2)
    ours = gradient(lambda z: token_logps(z, targets, backend=backend).mul_(2.0), logits, g)
    torch.testing.assert_close(ours[1], expected[1])


@pytest.mark.usefixtures("poison")
def test_two_runs_agree_bit_for_bit(backend, device):
    logits, _, g = make(9, 41, torch.float32, device)
    rows = torch.tensor([8, 0, 3, 3, 5, 3, 3, 3, 8], device=device)
    targets = torch.tensor([0, 1, 2, 3, 2, 2, 40, 3, 0], device=device)
    runs = [gradient(lambda z: gathered_token_logps(z, rows, targets, backend=backend), logits, g) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_grad(backend, device):
    logits, targets, _ = make(3, 5, torch.float32, device)
    with torch.no_grad():
        assert not token_logps(logits.requires_grad_(), targets, backend=backend).requires_grad


def test_autocast_changes_nothing(backend, device):
    logits, targets, g = make(5, 9, torch.float32, device)
    plain = gradient(lambda z: token_logps(z, targets, backend=backend), logits, g)
    with torch.autocast(device, torch.bfloat16):
        ours = gradient(lambda z: token_logps(z, targets, backend=backend), logits, g)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(backend, use_reentrant, inplace, device):
    """The logits are made inside, as where a head is checkpointed together with the loss."""
    logits, targets, g = make(5, 9, torch.float32, device)

    def loss(z: Tensor) -> Tensor:
        return token_logps(z * 1, targets, inplace_backward=inplace, backend=backend)

    plain = gradient(loss, logits, g)
    ours = gradient(lambda z: checkpoint(loss, z, use_reentrant=use_reentrant), logits, g)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_compile_without_breaks_and_with_one_recompile(backend, gathered, inplace, device):
    def function(z: Tensor, targets: Tensor) -> Tensor:
        rows = torch.arange(targets.numel(), device=device) // 2 if gathered else None
        return gathered_token_logps(z * 1, rows, targets, 0.7, inplace_backward=inplace, backend=backend)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in (3, 4, 7, 6):
        logits, targets, g = make(n, 5, torch.float32, device)
        expected = gradient(lambda z, y=targets: function(z, y), logits, g)
        ours = gradient(lambda z, y=targets: compiled(z, y), logits, g)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("strided", [False, True])
def test_the_ops_keep_their_promises(backend, strided, device):
    """Schemas, fakes and autograd registration, by torch's own checker."""
    logits, targets, _ = make(4, 5, torch.float32, device)
    rows = torch.tensor([3, 0, 0, 1], device=device)
    z = (logits.t().contiguous().t() if strided else logits).requires_grad_()
    options = (0.7, backend, False)
    for index in (None, rows):
        torch.library.opcheck(torch.ops.aspo_kernels.token_logps, (z, index, targets, *options))
    padded = logits.detach().view(2, 2, 5).requires_grad_()
    torch.library.opcheck(torch.ops.aspo_kernels.token_logps, (padded, rows, targets, *options))


def test_the_reference_backend(device):
    logits, targets, g = make(5, 9, torch.float32, device)
    rows = torch.tensor([4, 4, 0, 1, 2], device=device)
    for index in (None, rows):
        ours = gradient(lambda z, i=index: gathered_token_logps(z, i, targets, 0.7), logits, g)
        oracle = gradient(lambda z, i=index: gathered_token_logps(z, i, targets, 0.7, backend="reference"), logits, g)
        for a, b in zip(ours, oracle, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.zeros(2, 3, 4), torch.tensor([0, 1]), {}, r"logits must be floating point \(N, V\).*\(2, 3, 4\)"),
        (torch.zeros(2, 3).long(), torch.tensor([0, 1]), {}, "got torch.int64"),
        (torch.zeros(0, 0), torch.empty(0).long(), {}, "with V > 0"),
        (torch.zeros(2, 3), torch.tensor([0]), {}, r"targets must be \(2,\) int64"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long, device="meta"), {}, "targets are on meta"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}, r"targets\[1\] is 3, outside the vocabulary \[0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0, -100]), {}, "leave uncounted positions"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"temperature": 0}, "temperature is 0; it must be positive"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"backend": "cuda"}, "backend is 'cuda'; choose one of auto, torch"),
        (torch.zeros(2, 3).double(), torch.tensor([0, 1]), {"backend": "triton"}, "no float64"),
        (torch.full((2, 3), float("nan")), torch.tensor([0, 1]), {}, r"log-probability of token 0 .* is nan"),
        (torch.tensor([[0.0, -float("inf")]]), torch.tensor([1]), {}, r"is -inf.*or the target is masked"),
    ],
)
def test_errors(logits, targets, options, message):
    with pytest.raises(ValueError, match=message):
        token_logps(logits, targets, **options)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize(("at", "value"), [(1, float("nan")), (0, float("inf")), (0, float("nan")), (1, float("inf"))])
def test_a_logit_that_is_not_a_number_shows(backend, at, value, device):
    """In the target's place or a rival's, in any block: as NaN, and on the CPU as an error."""
    logits = torch.zeros(1, 40, device=device)
    logits[0, at] = value
    for target in (torch.tensor([0], device=device), torch.tensor([39], device=device)):
        if device == "cpu":
            with pytest.raises(ValueError, match=r"log-probability of token 0 .* is nan"):
                token_logps(logits, target, backend=backend)
        else:
            assert token_logps(logits, target, backend=backend).isnan().all()
