"""linear_token_kl, torch and Triton, against the fp64 oracle: values and every gradient; and what it must not do.

How accuracy is judged: `accuracy`. Chunks are of 8 tokens, slices of 64 entries, so that every mask matters.
"""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import check_against_eager
from problems import EPILOGUES, Problem, check_missing_targets, leave_targets_unchecked
from torch import Tensor

from aspo_kernels import reference, tiles
from aspo_kernels.linear_token_kl import TokenKL, linear_token_kl

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
NEEDS = {
    "none": (False, False, False),
    "frozen": (True, False, False),
    "head": (False, True, False),
    "bias": (False, False, True),
    "trainable": (True, True, True),
}


class Pair(Problem):
    """A Problem with a reference `distance` from it; `own_head` of another width, else the policy's head."""

    def __init__(self, n, v, h, dtype, seed=0, distance=0.5, own_head=True, **options):
        super().__init__(n, v, h, dtype, seed, **options)
        self.ref_hidden = (self.hidden.double() + distance * self.normal(n, h)).to(dtype)
        self.ref_head = self.ref_bias = None
        if own_head:
            wider = h + 3
            self.ref_hidden = torch.cat([self.ref_hidden, self.normal(n, 3).to(dtype)], 1)
            self.ref_head = (self.normal(v, wider) * 2 / wider**0.5).to(dtype)
            self.ref_bias = None if self.bias is None else (self.bias.double() + self.normal(v)).to(dtype)

    def call(self, function, output: str):
        """One output of a function with linear_token_kl's arguments, as Problem.run wants it."""

        def run(hidden: Tensor, head: Tensor, targets: Tensor, bias: Tensor | None, **options) -> Tensor:
            x, w, b = (t if t is None else t.to(hidden) for t in (self.ref_hidden, self.ref_head, self.ref_bias))
            out = function(hidden, x, head, w, targets, bias=bias, ref_bias=b, **options)
            return out.kl - 0.7 * out.logps if output == "mix" else getattr(out, output)

        return run


def oracle(hidden, ref_hidden, head, ref_head, targets, bias=None, ref_bias=None, **epilogue) -> TokenKL:
    if ref_head is None:
        ref_head, ref_bias = head, bias
    return TokenKL(*reference.linear_token_kl(hidden, ref_hidden, head, ref_head, targets, bias, ref_bias, **epilogue))


def eager(hidden, ref_hidden, head, ref_head, targets, bias=None, ref_bias=None, **epilogue) -> TokenKL:
    """From logits in the operands' dtype, with fp32 statistics."""
    if ref_head is None:
        ref_head, ref_bias = head, bias
    z = reference.logits(hidden, head, bias, **epilogue)
    ref_z = reference.logits(ref_hidden, ref_head, ref_bias, **epilogue).detach()
    wide = tiles.statistics_dtype(z.dtype)
    log_p, ref_log_p = z.to(wide).log_softmax(-1), ref_z.to(wide).log_softmax(-1)
    kl = (ref_log_p.exp() * (ref_log_p - log_p)).sum(-1)
    return TokenKL(kl, reference.token_logps(z.to(wide), targets), reference.token_logps(ref_z.to(wide), targets))


def check(pair: Pair, output: str, backend: str = "torch", **kwargs):
    ours, exact, naive = (pair.call(f, output) for f in (linear_token_kl, oracle, eager))
    return check_against_eager(pair, ours, exact, naive, options={"backend": backend}, **kwargs)


# --- the oracle itself ---


def test_the_oracle_on_two_coins():
    """p_ref = (3/4, 1/4), p = (1/2, 1/2): log 2 - H(3/4), by hand."""
    one = torch.ones(1, 1, dtype=torch.float64)
    head = torch.tensor([[0.0], [0.0]], dtype=torch.float64)
    ref_head = torch.tensor([[math.log(3.0)], [0.0]], dtype=torch.float64)
    kl, logps, ref_logps = reference.linear_token_kl(one, one, head, ref_head, torch.tensor([0]))
    assert kl.item() == pytest.approx(math.log(2) - (math.log(4) - 0.75 * math.log(3)))
    assert (logps.item(), ref_logps.item()) == pytest.approx((math.log(0.5), math.log(0.75)))


def test_the_oracle_is_differentiated_right():
    pair = Pair(3, 5, 4, torch.float64)
    leaves = [t.requires_grad_() for t in (pair.hidden, pair.head, pair.bias)]
    function = pair.call(oracle, "mix")
    assert torch.autograd.gradcheck(lambda x, w, b: function(x, w, pair.targets, b, softcap=2.0), leaves)


# --- accuracy ---


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("output", "needs"), [("kl", "frozen"), ("logps", "frozen"), ("ref_logps", "none")] + [("mix", n) for n in NEEDS]
)
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_matches_the_oracle(backend, dtype, output, needs, device):
    device = device if backend == "triton" else "cpu"
    check(Pair(11, 150, 24, dtype), output, backend, needs=NEEDS[needs], device=device)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("needs", "own_head"), [("frozen", True), ("frozen", False), ("trainable", True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_epilogues(backend, needs, own_head, epilogue, device):
    device = device if backend == "triton" else "cpu"
    pair = Pair(3, 70, 17, torch.float32, own_head=own_head)
    check(pair, "mix", backend, needs=NEEDS[needs], device=device, **EPILOGUES[epilogue])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 3), (9, 65, 1), (2, 129, 70), (35, 65, 3)], ids=str)
@pytest.mark.parametrize("needs", ["frozen", "trainable"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend, needs, sizes, device):
    # 35 tokens are two groups in the backward, of 32 and 3
    device = device if backend == "triton" else "cpu"
    check(Pair(*sizes, torch.float32, bias=False), "mix", backend, needs=NEEDS[needs], device=device)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("needs", ["frozen", "trainable"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_policies_have_no_divergence(backend, needs, device):
    """Exactly 0, and so is its gradient, also where shifts are raised."""
    place = device if backend == "triton" else "cpu"
    pair = Pair(9, 150, 24, torch.float32, distance=0.0, own_head=False, spread=9.0)
    function = pair.call(linear_token_kl, "kl")
    kl, gradients = pair.run(function, needs=NEEDS[needs], backend=backend, device=place)
    assert not kl.any()
    for gradient in gradients:
        assert gradient is None or not gradient.any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("needs", ["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_keeps_its_digits_near_the_reference(dtype, needs):
    """The first steps of a training: one entry in eight of the hidden states is one rounding from the reference's."""
    pair = Pair(19, 150, 24, dtype, distance=0.0, own_head=False, bias=False)
    step = 1e-3 if dtype == torch.float32 else torch.finfo(dtype).eps
    pair.ref_hidden[:, ::8] = (pair.hidden[:, ::8].double() * (1 + step)).to(dtype)
    if needs == "trainable":
        pair.ref_head = pair.head.clone()  # the oracle would differentiate it too
    kl, gradients = pair.run(pair.call(linear_token_kl, "kl"), needs=NEEDS[needs])
    exact, expected = pair.run(pair.call(oracle, "kl"), torch.float64)
    assert 0 < exact.max() < 1e-3
    torch.testing.assert_close(kl, exact, rtol=1e-4, atol=1e-7)
    for got, want in zip(gradients, expected, strict=True):
        if got is not None:
            assert (got - want).norm() < (1e-3 if dtype == torch.float32 else 1e-2) * want.norm()


@pytest.mark.parametrize("output", ["kl", "logps"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_confident_tokens_keeps_its_tail_in_fp16(backend, output, device):
    """1 - p of 1e-3 and 1e-5 over 300 rivals, the reference's twice that: exponentials down to 3e-8."""
    missing = torch.tensor([1e-3, 1e-5], dtype=torch.float64)
    head = torch.zeros(301, 8, dtype=torch.float64)
    head[1:, 1:] = 1 + 0.1 * torch.randn(300, 7, dtype=torch.float64)  # what p W loses is W's mean, not nothing
    head[0, 0] = 1.0
    hidden, ref_hidden = (torch.zeros(2, 8, dtype=torch.float64) for _ in range(2))
    hidden[:, 0], ref_hidden[:, 0] = torch.log(300 / missing), torch.log(150 / missing)
    place = device if backend == "triton" else "cpu"
    operands = [t.to(place, torch.float16) for t in (hidden, ref_hidden, head)]
    targets, gradients = torch.zeros(2, dtype=torch.int64, device=place), []
    for function, options, dtype in (
        (linear_token_kl, {"backend": backend}, torch.float16),
        (oracle, {}, torch.float64),
    ):
        x, ref_x, w = (t.to(dtype) for t in operands)
        x.requires_grad_()
        out = getattr(TokenKL(*function(x, ref_x, w, w, targets, **options)), output)
        gradients.append(torch.autograd.grad(out, x, (1 / missing).to(out))[0].double().cpu())
    got, want = gradients
    assert ((got - want).norm(dim=1) / want.norm(dim=1)).max() < 4 * torch.finfo(torch.float16).eps


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("needs", ["frozen", "trainable"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_near_deterministic_rows_keep_their_digits(backend, needs, device):
    """Both certain of the target, -logp from 1e-3 to 1e-12: the divergence is right to its own size."""
    place = device if backend == "triton" else "cpu"
    lead = torch.tensor([7.0, 14.0, 20.0, 28.0], dtype=torch.float64, requires_grad=True)
    ref_lead = torch.tensor([6.0, 15.0, 21.0, 26.0], dtype=torch.float64)
    rivals, ref_rivals = (
        69 * torch.exp(-lead),
        69 * torch.exp(-ref_lead),
    )  # fp64's own log_softmax would lose the digits
    ref_p = ref_rivals / (1 + ref_rivals)
    expected = ref_p * (lead - ref_lead) + torch.log1p(rivals) - torch.log1p(ref_rivals)
    (expected_grad,) = torch.autograd.grad(expected.sum(), lead)
    head = torch.zeros(70, 1, device=place)
    head[66] = 1.0
    head.requires_grad_(needs == "trainable")
    hidden = lead.detach()[:, None].to(place, torch.float32).requires_grad_()
    operands = (ref_lead[:, None].to(hidden), head, None, torch.full((4,), 66, device=place))
    out = linear_token_kl(hidden, *operands, backend=backend)
    out.kl.sum().backward()
    torch.testing.assert_close(out.kl.cpu().double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad[:, 0].cpu().double(), expected_grad, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("needs", ["frozen", "trainable"])
@pytest.mark.parametrize(("nll", "ref_nll"), [(60.0, 0.0), (0.0, 200.0), (-120.0, 25.0)])
@pytest.mark.parametrize("rival", [0, 149], ids=["first slice", "last slice"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_very_unlikely_targets(backend, rival, nll, ref_nll, needs, device):
    """The shifts of policy and reference are raised apart."""
    pair = Pair(5, 150, 16, torch.float32, own_head=False, spread=0.5, bias=False)
    pair.targets[:] = 75
    pair.head[:, 0] = 0
    pair.head[rival, 0] = 1
    pair.hidden[:, 0], pair.ref_hidden[:, 0] = nll, ref_nll
    assert pair.run(pair.call(oracle, "kl"), torch.float64)[0].min() > 1
    place = device if backend == "triton" else "cpu"
    pair.ref_head = pair.head.clone()
    check(pair, "mix", backend, needs=NEEDS[needs], device=place, absolute=1e-5)  # logits of 200 are good to 1e-5


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("needs", ["frozen", "trainable"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shifts_are_raised_in_every_slice(backend, needs, device):
    """The policy's logits climb from slice to slice, the reference's fall and climb again."""
    pair = Pair(6, 300, 4, torch.float32, bias=False, own_head=False)
    pair.hidden[:] = torch.tensor([1.0, 0.0, 0.1, 0.0])
    pair.ref_hidden[:] = torch.tensor([0.2, 1.0, 0.0, 0.1])
    pair.head[:, 0] = torch.arange(300) * (2 / 64)
    pair.head[:, 1] = torch.arange(300).sub(120).abs() * (3 / 64)
    pair.targets[:] = torch.linspace(0, 299, 6).long()
    pair.ref_head = pair.head.clone()
    check(pair, "mix", backend, needs=NEEDS[needs], device=device if backend == "triton" else "cpu")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_ten_thousand(backend, dtype, device):
    """The policy halves its mass between two logits of 1e4, the reference has all of it on one of them."""
    place = device if backend == "triton" else "cpu"
    hidden, head = torch.zeros(3, 8, dtype=dtype, device=place), torch.zeros(130, 8, dtype=dtype, device=place)
    hidden[:, 0], head[3, 0], head[90, 0], head[5, 0] = 100.0, 100.0, 100.0, -100.0
    ref_head = head.clone()
    ref_head[90, 0] = 0
    leaf = hidden.clone().requires_grad_()
    targets = torch.tensor([3, 90, 5], device=place)
    out = linear_token_kl(leaf, hidden, head, ref_head, targets, backend=backend)
    assert out.kl.tolist() == pytest.approx([math.log(2)] * 3)
    assert out.logps.tolist() == pytest.approx([-math.log(2)] * 2 + [-2e4 - math.log(2)])
    assert out.ref_logps.tolist() == pytest.approx([0, -1e4, -2e4])
    out.kl.sum().backward()
    assert leaf.grad[:, 0].tolist() == pytest.approx([0] * 3, abs=1e-2)  # 100 / 2 + 100 / 2 - 100


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("needs", ["frozen", "trainable"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rivals(backend, needs, device):
    """Tokens that both mask leave no NaN; one that the policy alone masks makes the divergence inf."""
    place = device if backend == "triton" else "cpu"
    pair, short = Pair(9, 150, 8, torch.float32), Pair(9, 150, 8, torch.float32)
    masked = torch.zeros(150, dtype=torch.bool)
    masked[64:128], masked[3] = True, True
    kept = torch.nonzero(~masked).flatten()
    pair.targets[:] = torch.tensor([0, 1, 2, 4, 63, 128, 129, 140, 149])
    for name in ("head", "bias", "ref_head", "ref_bias"):
        setattr(short, name, getattr(short, name)[kept])
    short.targets = torch.searchsorted(kept, pair.targets)
    pair.bias[masked] = pair.ref_bias[masked] = float("-inf")
    needs = NEEDS[needs]
    got, (dx, dw, db) = pair.run(pair.call(linear_token_kl, "mix"), needs=needs, backend=backend, device=place)
    expected, (ex, ew, eb) = short.run(short.call(oracle, "mix"), torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dx, ex, rtol=1e-4, atol=1e-5)
    if dw is not None:
        torch.testing.assert_close(dw[kept], ew, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(db[kept], eb, rtol=1e-4, atol=1e-5)
        assert not dw[masked].any() and not db[masked].any()
    pair.ref_bias[100] = 0
    kl, _ = pair.run(pair.call(linear_token_kl, "kl"), needs=needs, backend=backend, device=place)
    assert torch.isposinf(kl).all()


# --- what it must and must not do ---


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("needs", ["frozen", "trainable"])
def test_the_reference_gets_no_gradient(needs, own_head):
    pair = Pair(7, 70, 8, torch.float32, own_head=own_head)
    hidden, head = pair.hidden.requires_grad_(), pair.head.requires_grad_(needs == "trainable")
    ref = [t if t is None else t.requires_grad_() for t in (pair.ref_hidden, pair.ref_head, pair.ref_bias)]
    out = linear_token_kl(hidden, ref[0], head, ref[1], pair.targets, bias=pair.bias, ref_bias=ref[2])
    assert not out.ref_logps.requires_grad
    (out.kl + out.logps).sum().backward()
    assert all(t is None or t.grad is None for t in ref)
    if needs == "trainable" and not own_head:  # the same head twice: only its policy's part is differentiated
        exact, frozen = head.detach().double().requires_grad_(), head.detach().double()
        wide = (hidden.detach().double(), ref[0].detach().double(), exact, frozen, pair.targets)
        kl, logps, _ = reference.linear_token_kl(*wide, pair.bias.double(), pair.bias.double())
        (kl + logps).sum().backward()
        torch.testing.assert_close(head.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_what_is_kept():
    """Frozen head: G and D, and neither the head nor the hidden states; under no_grad nothing."""
    n, v, h = 20, 140, 8
    hidden, ref_hidden, head = torch.randn(n, h, requires_grad=True), torch.randn(n, h), torch.randn(v, h)
    targets = torch.randint(v, (n,))
    out = linear_token_kl(hidden, ref_hidden, head, None, targets)
    assert [tuple(t.shape) for t in out.kl.grad_fn.saved_tensors] == [(n, h), (n, h)]
    with torch.no_grad():
        assert linear_token_kl(hidden, ref_hidden, head, None, targets).kl.grad_fn is None


def test_tdpo_with_and_without_gradient():
    """The divergence of one response moves the policy, that of the other is a number: g_kl is 0 at its tokens."""
    pair = Pair(12, 70, 8, torch.float32, own_head=False)
    hidden = pair.hidden.requires_grad_()
    out = linear_token_kl(hidden, pair.ref_hidden, pair.head, None, pair.targets, bias=pair.bias)
    (out.kl[:6].detach().sum() - out.kl[6:].sum()).backward()
    assert not hidden.grad[:6].any() and hidden.grad[6:].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_a_connected_zero(backend, device):
    place = device if backend == "triton" else "cpu"
    none = torch.empty(0, dtype=torch.int64, device=place)
    for trainable in (False, True):
        hidden = torch.randn(0, 4, device=place, requires_grad=True)
        head = torch.randn(6, 4, device=place, requires_grad=trainable)
        out = linear_token_kl(hidden, hidden, head, None, none, backend=backend)
        (out.kl.sum() + out.logps.sum()).backward()
        assert hidden.grad.shape == (0, 4) and out.ref_logps.shape == (0,)
        assert not trainable or not head.grad.any()


@pytest.mark.parametrize("needs", ["frozen", "trainable"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_operands(backend, needs, device):
    place = device if backend == "triton" else "cpu"
    views = (
        torch.randn(12, 34, device=place)[:, ::2],
        torch.randn(24, 17, device=place)[::2],
        torch.randn(17, 90, device=place).T,
        torch.randn(90, 40, device=place)[:, 3:20],
        torch.randint(90, (24,), device=place)[::2],
        torch.randn(270, device=place)[::3],
        torch.randn(180, device=place)[::2],
    )
    results = []
    for operands in (views, tuple(t.contiguous() for t in views)):
        x, ref_x, w, ref_w, y, b, ref_b = operands
        leaves = [t.detach().requires_grad_() for t in ((x,) if needs == "frozen" else (x, w, b))]
        x, w, b = leaves if needs == "trainable" else (leaves[0], w, b)
        out = linear_token_kl(x, ref_x, w, ref_w, y, bias=b, ref_bias=ref_b, backend=backend)
        g = torch.ones((), device=place).expand(12)
        results.append([*out, *torch.autograd.grad(out[:2], leaves, [g, g])])
    for strided, plain in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("needs", ["frozen", "trainable"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend, needs, device):
    pair = Pair(9, 150, 24, torch.float32)
    options = {"needs": NEEDS[needs], "backend": backend, "device": device if backend == "triton" else "cpu"}
    first, second = (pair.run(pair.call(linear_token_kl, "mix"), **options) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True) if a is not None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["frozen", "trainable"])
@pytest.mark.parametrize("output", ["kl", "logps"])
def test_a_target_that_nobody_looked_at_is_never_another_token(output, needs, backend, monkeypatch, device):
    """-100 in an index is row V - 100."""
    leave_targets_unchecked(monkeypatch, "linear_token_kl")
    pair = Pair(20, 150, 12, torch.float32)

    def one_output(hidden, head, targets, **options):
        ref = [t if t is None else t.to(hidden) for t in (pair.ref_hidden, pair.ref_head, pair.ref_bias)]
        out = linear_token_kl(hidden, ref[0], head, ref[1], targets, ref_bias=ref[2], backend=backend, **options)
        return getattr(out, output)

    check_missing_targets(pair, one_output, NEEDS[needs], device=device)


@pytest.mark.parametrize("trainable", [False, True])
def test_double_backward_is_refused_and_a_retained_graph_gives_the_same_again(trainable):
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=trainable)
    out = linear_token_kl(hidden, torch.randn(3, 4), head, None, torch.tensor([0, 5, 2]))
    with pytest.raises(RuntimeError, match="linear_token_kl is differentiable once"):
        torch.autograd.grad(out.kl.sum(), hidden, create_graph=True)
    first = torch.autograd.grad(out.kl.sum(), hidden, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(out.kl.sum(), hidden)[0])


@pytest.mark.parametrize("needs", ["frozen", "trainable"])
def test_autocast_casts_the_operands_once(needs):
    wide, narrow = Pair(20, 140, 8, torch.float32), Pair(20, 140, 8, torch.bfloat16)
    for name in ("hidden", "head", "bias", "ref_hidden", "ref_head", "ref_bias"):
        setattr(narrow, name, getattr(wide, name).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        got = wide.run(wide.call(linear_token_kl, "mix"), needs=NEEDS[needs])
    expected = narrow.run(narrow.call(linear_token_kl, "mix"), needs=NEEDS[needs])
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True) if a is not None)


@pytest.mark.parametrize(("backend", "trainable"), [("torch", True), ("triton", False)])
def test_compiles_whole_and_recompiles_once_for_n(backend, trainable, device):
    import torch._dynamo.testing

    place = device if backend == "triton" else "cpu"
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(hidden, ref_hidden, head, targets):
        out = linear_token_kl(hidden, ref_hidden, head, None, targets, backend=backend)
        return (out.logps - out.ref_logps - 0.1 * out.kl).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    head = torch.randn(70, 8, device=place, requires_grad=trainable)
    for n in (2, 3, 9):
        hidden, ref_hidden = torch.randn(n, 8, device=place), torch.randn(n, 8, device=place)
        targets = torch.randint(70, (n,), device=place)
        leaves = [hidden.clone().requires_grad_() for _ in range(2)]
        for function, leaf in zip((loss, compiled), leaves, strict=True):
            function(leaf, ref_hidden, head, targets).backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert counter.frame_count <= 2


def test_the_reference_backend_gives_the_same():
    pair = Pair(12, 50, 8, torch.float32)
    ours, exact = (pair.run(pair.call(linear_token_kl, "mix"), backend=b) for b in ("torch", "reference"))
    for a, b in zip((ours[0], *ours[1]), (exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_head": torch.randn(6, 5)}, r"ref_hidden must be \(N, H\) and its head \(V, H\)"),
        ({"ref_head": torch.randn(7, 4)}, "heads of 6 and 7 rows"),
        ({"ref_hidden": torch.randn(2, 4)}, "got 3 and 2 hidden states"),
        ({"ref_hidden": torch.randn(3, 4).double()}, "ref_hidden is torch.float64 but its head torch.float32"),
        ({"ref_bias": torch.randn(6)}, "ref_bias is the bias of ref_head"),
        ({"targets": torch.tensor([0, 6, 2])}, r"targets\[1\] is 6, outside the vocabulary"),
        ({"ref_hidden": torch.full((3, 4), float("nan"))}, r"log-probability of token 0 \(target 0\) is nan"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_errors(changes, message):
    base = {
        "hidden": torch.randn(3, 4), "ref_hidden": torch.randn(3, 4), "head": torch.randn(6, 4), "ref_head": None,
        "targets": torch.tensor([0, 5, 2]),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_token_kl(**{**base, **changes})
