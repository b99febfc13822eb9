"""token_logps' Triton kernels: digits, blocks, offsets beyond 2^31; on a GPU also bf16, capture, memory.

What every backend must do alike is tested in test_token_logps.
"""

from __future__ import annotations

import pytest
import torch
from problems import leave_targets_unchecked
from torch import Tensor

from aspo_kernels import reference, token_logps
from aspo_kernels.token_logps import gathered_token_logps

triton = pytest.importorskip("triton")
tl = triton.language
from aspo_kernels import triton_logits  # noqa: E402  after conftest has switched the interpreter on


@triton.jit
def _digits_kernel(x_ptr, log1p_ptr, expm1_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    tl.store(log1p_ptr + offs, triton_logits._log1p(-x), mask=offs < N)
    tl.store(expm1_ptr + offs, triton_logits._expm1(x), mask=offs < N)


def test_log1p_and_expm1_keep_their_digits(device):
    x = -torch.logspace(-30, 2.3, 999, device=device)
    x[0] = 0.0
    log1p, expm1 = torch.empty_like(x), torch.empty_like(x)
    _digits_kernel[(1,)](x, log1p, expm1, 999, BLOCK=1024)
    torch.testing.assert_close(log1p.double(), torch.log1p(-x.double()), rtol=5e-7, atol=0.0)
    torch.testing.assert_close(expm1.double(), torch.expm1(x.double()), rtol=5e-7, atol=0.0)


def test_the_kernels_run_when_asked_for_and_unasked_only_on_a_gpu(monkeypatch, device):
    calls = []
    for name in ("forward", "backward"):
        original = getattr(triton_logits, name)
        monkeypatch.setattr(triton_logits, name, lambda *a, f=original, n=name: (calls.append(n), f(*a)))
    logits, targets = torch.randn(3, 5, device=device, requires_grad=True), torch.tensor([0, 4, 2], device=device)
    token_logps(logits, targets).sum().backward()
    assert calls == ([] if device == "cpu" else ["forward", "backward"])
    calls.clear()
    token_logps(logits, targets, backend="triton").sum().backward()
    assert calls == ["forward", "backward"]
    token_logps(logits, targets, backend="torch").sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("vocabulary", [1, 2, 16, 17, 511, 4096, 4097, 151_936])
def test_launch_options(vocabulary):
    options = triton_logits.launch_options(vocabulary)
    block, warps = options["BLOCK_V"], options["num_warps"]
    assert block & (block - 1) == 0
    assert 16 <= block <= triton_logits.MAX_BLOCK_V
    assert block >= min(vocabulary, triton_logits.MAX_BLOCK_V)
    assert 1 <= warps <= 8
    assert warps & (warps - 1) == 0


def run(logits: Tensor, rows: Tensor | None, targets: Tensor, g: Tensor, **options) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    logps = gathered_token_logps(logits, rows, targets, backend="triton", **options)
    return logps.detach(), torch.autograd.grad(logps, logits, g)[0]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("vocabulary", [63, 64, 65, 700])
@pytest.mark.parametrize("order", ["rising", "falling", "largest last"])
def test_any_number_of_blocks(vocabulary, order, monkeypatch, device):
    """A lane's shift is raised at every block (rising), once, or at the very end; the target is in any of them."""
    monkeypatch.setattr(triton_logits, "MAX_BLOCK_V", 64)
    slope = torch.linspace(-150, 150, vocabulary, dtype=torch.float64)
    z = {"rising": slope, "falling": -slope, "largest last": torch.where(slope == 150, 150.0, slope.cos())}[order]
    logits = z.expand(4, -1).float().clone().to(device)
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2, vocabulary - 2], device=device)
    g = torch.tensor([1.0, -2.0, 0.5, 1e-3], device=device)
    logps, d_logits = run(logits, None, targets, g)
    leaf = logits.double().requires_grad_()
    expected = reference.token_logps(leaf, targets)
    expected.backward(g.double())
    torch.testing.assert_close(logps.double(), expected.detach(), rtol=5e-5, atol=1e-12)
    torch.testing.assert_close(d_logits.double(), leaf.grad, rtol=5e-5, atol=1e-12)


@pytest.mark.parametrize("stride", ["row", "group", "column"])
def test_offsets_beyond_an_int32(stride, device):
    """Strides that fit an int32 and products that do not: 4 GiB of address space, hardly touched."""
    far = 2**30 + 8  # twice this is beyond
    shape, strides = {
        "row": ((1, 3, 5), (1, far, 1)),
        "group": ((3, 1, 5), (far, 5, 1)),
        "column": ((1, 3, 3), (1, 40, far)),
    }[stride]
    logits = torch.empty(2 * far + 200, dtype=torch.float16, device=device).as_strided(shape, strides)
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().to(device)
    targets, g = torch.tensor([1, 0, 2], device=device), torch.tensor([1.0, -2.0, 3.0], device=device)
    for rows in (None, torch.tensor([2, 0, 2], device=device)):
        logits.copy_(plain)
        z, plain_z = (logits, plain) if rows is not None else (logits.flatten(0, 1), plain.flatten(0, 1))
        assert z.data_ptr() == logits.data_ptr()
        expected = run(plain_z, rows, targets, g)
        ours = run(z, rows, targets, g, inplace_backward=True)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert ours[1].data_ptr() == logits.data_ptr()
        assert torch.equal(z, expected[1])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("target", [-100, -1, 70, 2**40])
@pytest.mark.parametrize("bad", [[0], [2], [4], [0, 1]], ids=str)
@pytest.mark.parametrize("rows", [None, [0, 1, 1, 3, 4]], ids=["a row each", "rows shared"])
def test_a_target_that_does_not_exist_makes_its_row_nan_and_touches_nothing_else(
    rows, bad, target, inplace, device, monkeypatch
):
    """The rows before and after, and what lies around the logits in memory: two rows' length on either side."""
    leave_targets_unchecked(monkeypatch, "token_logps")
    memory = torch.randn(9, 70, device=device, generator=torch.Generator(device).manual_seed(0))
    memory_before, logits = memory.clone(), memory[2:7]
    index = None if rows is None else torch.tensor(rows, device=device)
    targets, g = torch.tensor([0, 69, 5, 7, 30], device=device), torch.linspace(-1, 2, 5, device=device)
    expected = run(logits, index, targets, g)
    targets[bad] = target
    logps, d_logits = run(logits, index, targets, g, inplace_backward=inplace)
    token = torch.isin(torch.arange(5), torch.tensor(bad))
    row = torch.isin(torch.arange(5), torch.tensor([n if rows is None else rows[n] for n in bad]))
    assert torch.equal(logps.isnan().cpu(), token)
    assert torch.equal(d_logits.isnan().all(1).cpu(), row)
    assert torch.equal(logps[~token], expected[0][~token])
    assert torch.equal(d_logits[~row], expected[1][~row])
    around = [0, 1, 7, 8] if inplace else slice(None)
    assert torch.equal(memory[around], memory_before[around])


# --- on a GPU ---


def gpu_problem(n: int, v: int, dtype: torch.dtype, spread: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(n + v)
    logits = (torch.randn(n, v, device="cuda", generator=generator) * spread).to(dtype)
    targets = torch.randint(0, v, (n,), device="cuda", generator=generator)
    return logits, targets, torch.randn(n, device="cuda", generator=generator)


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "v"), [(1, 1), (37, 700), (65, 32_000), (19, 50_257), (16, 152_064)])
@pytest.mark.parametrize("spread", [4.0, 100.0])
def test_compiled_kernels_match_the_oracle(n, v, dtype, inplace, spread):
    logits, targets, g = gpu_problem(n, v, dtype, spread)
    leaf = logits.double().requires_grad_()
    expected = reference.token_logps(leaf / 0.7, targets)
    expected.backward(g.double())
    logps, d_logits = run(logits, None, targets, g, temperature=0.7, inplace_backward=inplace)
    rounding = 1.2e-7 * (8 + 2 * spread * 10)
    torch.testing.assert_close(logps.double(), expected.detach(), rtol=rounding, atol=1e-12)
    smallest = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(
        d_logits.double(), leaf.grad, rtol=torch.finfo(dtype).eps + rounding, atol=max(1e-12, smallest)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["transposed", "padded"])
def test_compiled_kernels_respect_strides_and_rows(layout, inplace):
    logits, targets, g = gpu_problem(60, 5000, torch.bfloat16)
    rows = torch.randint(0, 40, (60,), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    z = logits.t().contiguous().t() if layout == "transposed" else logits.view(4, 15, 5000)[:, :-1]
    plain = z.clone(memory_format=torch.contiguous_format)
    expected = run(plain, rows, targets, g)
    for ours in (run(z, rows, targets, g, inplace_backward=inplace), run(plain, rows, targets, g)):
        torch.testing.assert_close(ours[0], expected[0], rtol=1e-6, atol=0.0)
        torch.testing.assert_close(ours[1], expected[1], rtol=1e-2, atol=1e-12)
    assert torch.equal(expected[1], run(plain, rows, targets, g)[1]), "bit for bit from run to run"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_waits_for_the_device_and_a_graph_captures_it(backend):
    logits, targets, g = gpu_problem(12, 300, torch.bfloat16)
    rows = torch.arange(12, device="cuda") // 2
    leaf = logits.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        logps = gathered_token_logps(leaf, rows, targets, backend=backend)
        return logps, torch.autograd.grad(logps, leaf, g)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
def test_memory(inplace):
    """Forward next to nothing; backward the gradient, or in place next to nothing."""
    logits, targets, g = gpu_problem(512, 32_000, torch.bfloat16)
    z = logits.requires_grad_() * 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logps = token_logps(z, targets, inplace_backward=inplace, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 2**20
    torch.autograd.grad(logps, z, g)
    size = logits.numel() * logits.element_size()
    assert torch.cuda.max_memory_allocated() - before < 2**20 + (0 if inplace else size)


@pytest.mark.gpu
def test_more_than_two_to_the_31_entries():
    n, v = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < 3 * n * v * 2:
        pytest.skip(f"needs {3 * n * v * 2 >> 30} GiB of free GPU memory")
    logits = torch.zeros(n, v, device="cuda", dtype=torch.bfloat16)
    last = torch.arange(n - 4, n, device="cuda")
    some, _, g = gpu_problem(4, v, torch.bfloat16)
    logits[last] = some
    targets = torch.arange(n, device="cuda") % v
    leaf = some.double().requires_grad_()
    expected = reference.token_logps(leaf, targets[last])
    expected.backward(g.double())
    upstream = torch.zeros(n, device="cuda").index_copy_(0, last, g)
    logps, d_logits = run(logits, None, targets, upstream, inplace_backward=True)
    torch.testing.assert_close(logps[last].double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_logits[last].double(), leaf.grad, rtol=8e-3, atol=1e-9)
    assert not d_logits[: n - 4].any()
