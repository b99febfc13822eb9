"""Everything behind the head as Triton kernels: against loops in fp64, the oracle, and plain torch."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Ragged, lean_layout, make_ragged, ragged_batches
from torch import Tensor

from aspo_kernels import SentenceLayout, objectives, reference
from aspo_kernels.aspo import _aspo_forward
from aspo_kernels.objectives import Inputs
from aspo_kernels.segments import segment_max, segment_min, segment_minmax, segment_sum, spread_over

BACKENDS = ["torch", "triton"]
NORMALIZERS = ["sentence", "token", "none", "reward"]
NAMES = ["aspo", "dpo", "ipo", "hinge", "simpo", "sft"]
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}  # an fp32 result of fp64 arithmetic
CLOSE_TO_FP32 = {"rtol": 1e-3, "atol": 1e-4}  # plain torch rounds to fp32 before the quotients of small ranges
LAYOUT = make_ragged([[2, 1, 3], [1, 4], [3, 3], [5]], 11, 5).layout()  # every response ends with EOS
OFFSETS = torch.tensor([0, 1, 2, 2, 9, 37, 38])  # one token, none, and two entries behind the last segment
ENTRIES = 40


def make(layout: SentenceLayout, seed: int = 0, device: str = "cpu", similarity: bool = True) -> Inputs:
    """fp32 inputs for the Triton kernels."""
    generator = torch.Generator().manual_seed(seed)
    logps = -4 * torch.rand(layout.num_tokens, generator=generator)
    ref_logps = logps + torch.randn(layout.num_tokens, generator=generator)
    scores = torch.rand(layout.chosen_sentences.numel(), generator=generator).to(device) if similarity else None
    return Inputs(layout.to(device), logps.to(device).requires_grad_(), ref_logps.to(device), scores, "triton")


def on_cpu(x: Inputs, backend: str = "torch", dtype: torch.dtype = torch.float64) -> Inputs:
    tensors = (x.logps.detach(), x.ref_logps, x.similarity)
    logps, ref_logps, scores = (None if t is None else t.cpu().to(dtype) for t in tensors)
    return Inputs(x.layout.to("cpu"), logps.requires_grad_(), ref_logps, scores, backend)


def run(x: Inputs, name: str = "aspo", **options) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses, the gradient of their sum (with unequal factors), and the stats, on the CPU in fp64."""
    result = objectives.get(name)(x, **options)
    factors = torch.arange(1, result.losses.numel() + 1, device=result.losses.device)
    (gradient,) = torch.autograd.grad((result.losses * factors).sum(), x.logps)
    assert gradient.dtype == x.logps.dtype
    stats = {k: v.cpu().double() for k, v in result.stats.items()}
    return result.losses.detach().cpu().double(), gradient.cpu().double(), stats


def oracle(x: Inputs, **options) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    exact = on_cpu(x)
    expected = reference.aspo_loss(exact.logps, exact.ref_logps, exact.layout, exact.similarity, **options)
    factors = torch.arange(1, expected["losses"].numel() + 1)
    (gradient,) = torch.autograd.grad((expected["losses"] * factors).sum(), exact.logps)
    return expected["losses"].detach(), gradient, {k: v.detach() for k, v in expected.items()}


def operator_arguments(x: Inputs, complete: bool) -> tuple:
    layout = x.layout
    where = (layout.sentence_offsets, layout.response_offsets, layout.with_role(0), layout.with_role(1))
    return (
        x.logps, x.ref_logps, x.similarity, layout.perplexity_mask, *where, layout.chosen_starts,
        layout.chosen_sentences.numel(), 0.1, 0.5, "sentence", "policy", "ppl", complete, True,
    )  # fmt: skip


def assert_same(got, expected, **tolerance) -> None:
    """Losses, gradients, and every statistic that `got` and `expected` have both."""
    for a, b in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for name in got[2].keys() & expected[2].keys():
        torch.testing.assert_close(got[2][name], expected[2][name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --- segments ---


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_against_loops(device, backend, dtype):
    values = torch.randn(2, ENTRIES, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:, -2:] = math.nan  # belongs to no segment
    parts = [values[0, a:b].double() for a, b in pairwise(OFFSETS.tolist())]
    strided = values.T.contiguous().to(device)[:, 0].requires_grad_()
    assert not strided.is_contiguous()
    offsets = OFFSETS.to(device)
    for function, reduce, empty in (
        (segment_sum, torch.sum, 0.0),
        (segment_min, torch.amin, math.inf),
        (segment_max, torch.amax, -math.inf),
    ):
        expected = torch.stack([reduce(p) if p.numel() else torch.tensor(empty, dtype=torch.float64) for p in parts])
        got = function(strided, offsets, backend)
        assert got.dtype == dtype
        torch.testing.assert_close(got.cpu(), expected.to(dtype))
        assert got.requires_grad == (function is segment_sum)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_and_spread_are_each_others_gradient(device, backend):
    offsets, lengths = OFFSETS.to(device), OFFSETS.diff()
    values = torch.randn(ENTRIES).to(device).requires_grad_()
    upstream = torch.randn(lengths.numel(), 2).to(device)[:, 0]
    (gradient,) = torch.autograd.grad(segment_sum(values, offsets, backend), values, upstream)
    spread = torch.cat([torch.repeat_interleave(upstream.cpu(), lengths), torch.zeros(2)])
    assert torch.equal(gradient.cpu(), spread)

    per_segment = torch.randn(lengths.numel()).to(device).requires_grad_()
    got = spread_over(per_segment, offsets, ENTRIES, backend)
    assert torch.equal(got.detach()[:-2].cpu(), torch.repeat_interleave(per_segment.detach().cpu(), lengths))
    assert not got[-2:].any()
    upstream = torch.randn(ENTRIES).to(device)
    (gradient,) = torch.autograd.grad(got, per_segment, upstream)
    assert torch.equal(gradient, segment_sum(upstream, offsets, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_without_entries_or_segments(device, backend):
    nothing, one, none = torch.empty(0, device=device), torch.tensor([0]), torch.tensor([0, 0, 0])
    one, none = one.to(device), none.to(device)
    for function, empty in ((segment_sum, 0.0), (segment_min, math.inf), (segment_max, -math.inf)):
        assert function(nothing, one, backend).shape == (0,)
        assert function(nothing, none, backend).tolist() == [empty, empty]
        assert function(torch.ones(3, device=device), one, backend).shape == (0,)
    assert spread_over(nothing, one, 3, backend).tolist() == [0, 0, 0]
    assert spread_over(nothing, one, 0, backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_segment(device, backend):
    values = torch.tensor([1.0, math.nan, 0.5, 2.0, 3.0], device=device)
    offsets = torch.tensor([0, 3, 5], device=device)
    for function, last in ((segment_sum, 5.0), (segment_min, 2.0), (segment_max, 3.0)):
        got = function(values, offsets, backend)
        assert math.isnan(got[0])
        assert got[1] == last


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_100_000_tokens(device, backend):
    """In fp32, one after the other, a sum of 100,000 numbers of about -100 is off by hundreds."""
    values = -200 * torch.rand(100_001, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 100_000, 100_001])
    exact = torch.stack([values[:-1].double().sum(), values[-1].double()])
    got = segment_sum(values.to(device), offsets.to(device), backend).cpu()
    assert torch.equal(got, exact.float())
    low = segment_min(values.to(device), offsets.to(device), backend)
    assert low[0] == values[:-1].min()


@pytest.mark.parametrize("backend", BACKENDS)
def test_minmax_ranges(device, backend):
    offsets = torch.tensor([0, 3, 6, 7], device=device)
    values = torch.tensor([0.0, 0.9e-5, 0.0, 0.0, 1.2e-5, 0.6e-5, 3.0], device=device)
    expected = torch.tensor([0, 0, 0, 0, 1, 0.5, 0])
    torch.testing.assert_close(segment_minmax(values, offsets, backend=backend).cpu(), expected)


# --- ASPO in one launch ---


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=ragged_batches(max_pairs=3, max_sentences=5),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    normalizer=st.sampled_from(NORMALIZERS),
    perplexity=st.sampled_from(["policy", "reference"]),
    scale=st.sampled_from(["ppl", "nll"]),
    with_similarity=st.booleans(),
    eos=st.booleans(),
)
def test_matches_the_oracle(device, batch: Ragged, alpha, normalizer, perplexity, scale, with_similarity, eos):
    x = make(batch.layout(eos), batch.seed, device, with_similarity)
    options = {
        "beta": 0.4,
        "alpha": alpha,
        "normalizer": normalizer,
        "perplexity": perplexity,
        "perplexity_scale": scale,
    }
    got = run(x, **options)
    assert_same(got, oracle(x, **options), **TOLERANCE)
    assert_same(got, run(on_cpu(x), **options), **TOLERANCE)  # rewards and fallbacks too
    assert_same(got, run(on_cpu(x, dtype=torch.float32), **options), **CLOSE_TO_FP32)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_every_entry_is_written(device, normalizer):
    x = make(LAYOUT, 1, device)
    assert_same(run(x, normalizer=normalizer), oracle(x, normalizer=normalizer), **TOLERANCE)


@pytest.mark.parametrize("scale", ["ppl", "nll"])
def test_sentences_of_one_token(device, scale):
    for lengths in ([[1] * 9, [1], [1], [1] * 3], [[1], [1]], [[3], [2, 2]]):
        x = make(lean_layout(lengths), 2, device)
        assert_same(run(x, perplexity_scale=scale), oracle(x, perplexity_scale=scale), **TOLERANCE)


@pytest.mark.parametrize("nll", [95.0, 200.0, 1e4])
def test_unlikely_tokens(device, nll):
    layout = lean_layout([[2, 1, 1], [2], [2, 2], [1]])
    logps = torch.tensor([-1.0, -1, -nll, -nll - 1, -2, -2, -nll, -nll, -1e-9, 0, -nll]).to(device)
    ref_logps = logps + torch.linspace(-1, 1, 11).to(device)
    ref_logps[9] = -nll  # a margin as large as they come: its loss is tiny, or 20 to 1000
    for perplexity in ("policy", "reference"):
        x = Inputs(layout.to(device), logps.clone().requires_grad_(), ref_logps, None, "triton")
        got = run(x, perplexity=perplexity)
        assert_same(got, oracle(x, perplexity=perplexity), rtol=1e-5, atol=1e-30)
        assert all(torch.isfinite(v).all() for v in (*got[:2], *got[2].values()))


@pytest.mark.parametrize("margin", [0.0, 1e-6, 5.0, 20.0, 80.0, -80.0, -1e4])
def test_small_and_large_losses_keep_their_digits(device, margin):
    layout = lean_layout([[1], [1]])
    logps, ref_logps = torch.tensor([margin / 2, -margin / 2]), torch.zeros(2)
    x = Inputs(layout.to(device), logps.to(device).requires_grad_(), ref_logps.to(device), None, "triton")
    got, expected = run(x, beta=1.0), run(on_cpu(x), beta=1.0)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=0)


def test_ties_and_ranges_that_say_nothing(device):
    """Similarities within 1e-5, equal nlls: weight 0; just above: 0 to 1."""
    layout = lean_layout([[1, 1, 1], [1, 1, 1], [1], [1]]).to(device)
    scores = torch.tensor([0.0, 0.9e-5, 0.0, 0.0, 1.2e-5, 0.6e-5], device=device)
    logps = torch.full((8,), -2.0, device=device, requires_grad=True)
    x = Inputs(layout, logps, logps.detach() - 1, scores, "triton")
    assert_same(run(x, alpha=1.0), oracle(x, alpha=1.0), **TOLERANCE)
    weights = run(x, alpha=1.0)[2]["sentence_weights"]
    torch.testing.assert_close(weights.float(), torch.tensor([0, 0, 0, 0, 1, 0.5]))
    for step, expected in ((0.9e-5, 0.0), (1.2e-5, 1.0)):
        logps = torch.zeros(8, device=device)
        logps[0] = -step
        x = Inputs(layout, logps.requires_grad_(), torch.zeros(8, device=device), None, "triton")
        for scale in ("ppl", "nll"):
            weights = run(x, perplexity_scale=scale)[2]["sentence_weights"]
            torch.testing.assert_close(weights.float(), torch.tensor([0, expected, expected, 0, 0, 0]))


@pytest.mark.parametrize("logratios", [[0.0, 0.0], [1.0, -2.0], [2.0, -3.0], [1e-8, 1e-8], [2.0, 1.0], [3.0, -1.9]])
def test_the_reward_normaliser_and_its_fallback(device, logratios):
    layout = lean_layout([[1, 1], [1]]).to(device)
    logps = torch.full((3,), -1.0, device=device, requires_grad=True)
    ref_logps = logps.detach() - torch.tensor([*logratios, 0.0], device=device)
    x = Inputs(layout, logps, ref_logps, torch.tensor([0.9, 0.1], device=device), "triton")
    options = {"normalizer": "reward", "alpha": 1.0}
    got, expected = run(x, **options), run(on_cpu(x), **options)
    assert got[2]["reward_fallback_share"] == expected[2]["reward_fallback_share"]
    assert_same(got, expected, **TOLERANCE)
    assert "reward_fallback_share" not in run(x)[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_similarities_of_any_dtype(device, dtype):
    x = make(LAYOUT, 3, device)
    scores = x.similarity.to(dtype)
    x = Inputs(x.layout, x.logps, x.ref_logps, scores.repeat_interleave(2)[::2], "triton")
    assert_same(run(x, alpha=0.7), oracle(x, alpha=0.7), **TOLERANCE)


@pytest.mark.gpu
def test_bf16_similarities_and_log_probabilities():
    x = make(LAYOUT, 3, "cuda")
    values = [v.detach().bfloat16() for v in (x.logps, x.ref_logps, x.similarity)]
    x = Inputs(x.layout, values[0].requires_grad_(), *values[1:], "triton")
    assert_same(run(x), oracle(x), rtol=1e-2, atol=1e-2)


def test_fp16_log_probabilities_that_are_strided(device):
    x = make(LAYOUT, 4, device)
    logps = torch.stack([x.logps.detach().half()] * 2, 1)[:, 0].requires_grad_()
    ref_logps = torch.stack([x.ref_logps.half()] * 2, 1)[:, 0]
    x = Inputs(x.layout, logps, ref_logps, x.similarity, "triton")
    assert_same(run(x), oracle(x), rtol=1e-3, atol=1e-4)  # the gradient is fp16, as the log-probabilities are


def test_a_layout_of_strided_tensors(device):
    names = ("targets", "hidden_index", "sentence_offsets", "response_offsets", "group", "role", "perplexity_mask")
    strided = SentenceLayout(*(torch.stack([getattr(LAYOUT, name)] * 2, 1)[:, 0] for name in names))
    plain, x = make(LAYOUT, 5, device), make(strided, 5, device)
    assert not strided.sentence_offsets.is_contiguous()
    assert_same(run(x), run(plain), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("lengths", [[[1] * 100_000, [1]], [[99_990, *[1] * 10], [50_000, 50_000]]])
def test_100_000_tokens(device, lengths):
    """Sums of 100,000 log-ratios, in one sentence or 100,000: fp32 sums would miss the margin by 1e-2 and more."""
    sizes = torch.tensor([n for row in lengths for n in row])
    sentences = torch.tensor([len(row) for row in lengths])
    total = int(sizes.sum())
    generator = torch.Generator().manual_seed(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    mask = torch.rand(total, generator=generator) < 0.9
    mask[offsets[:-1]] = True
    layout = SentenceLayout(
        targets=torch.zeros(total, dtype=torch.long),
        hidden_index=torch.zeros(total, dtype=torch.long),
        sentence_offsets=offsets,
        response_offsets=torch.cat([torch.zeros(1, dtype=torch.long), sentences.cumsum(0)]),
        group=torch.tensor([0, 0]),
        role=torch.tensor([0, 1]),
        perplexity_mask=mask,
    )
    logps = -200 * torch.rand(total, generator=generator)
    ref_logps = logps + 1e-2 * torch.randn(total, generator=generator)
    scores = torch.rand(len(lengths[0]), generator=generator)
    x = Inputs(layout.to(device), logps.to(device).requires_grad_(), ref_logps.to(device), scores.to(device), "triton")
    got, exact = run(x, perplexity_scale="nll"), run(on_cpu(x), perplexity_scale="nll")
    assert (got[2]["margins"] - exact[2]["margins"]).abs().max() < 1e-5
    assert_same(got, exact, **TOLERANCE)


def test_gradients_follow_the_upstream_of_their_pair(device):
    x = make(LAYOUT, 5, device)
    losses = objectives.get("aspo")(x).losses
    parts = [torch.autograd.grad(losses[i], x.logps, retain_graph=True)[0] for i in range(2)]
    upstream = torch.tensor([3.0, 9.0, -2.0, 9.0], device=device)[::2]  # strided
    for _ in range(2):  # the graph is kept: nothing saved was written to
        (got,) = torch.autograd.grad(losses, x.logps, upstream, retain_graph=True)
        torch.testing.assert_close(got, 3 * parts[0] - 2 * parts[1])
    (mean,) = torch.autograd.grad(losses.mean(), x.logps, retain_graph=True)  # expanded: stride 0
    torch.testing.assert_close(mean, 0.5 * parts[0] + 0.5 * parts[1])
    pair = torch.repeat_interleave(x.layout.group, x.layout.response_token_offsets.diff())
    assert not parts[0][pair == 1].any()
    assert not parts[1][pair == 0].any()
    with pytest.raises(RuntimeError, match="aspo is differentiable once"):
        torch.autograd.grad(losses.sum(), x.logps, create_graph=True)


def test_only_the_losses_carry_a_gradient(device):
    x = make(LAYOUT, 6, device)
    scores, ref_logps = x.similarity.clone().requires_grad_(), x.ref_logps.clone().requires_grad_()
    result = objectives.get("aspo")(Inputs(x.layout, x.logps, ref_logps, scores, "triton"), normalizer="reward")
    assert result.losses.requires_grad
    assert not any(v.requires_grad for v in result.stats.values())
    result.losses.sum().backward()
    assert x.logps.grad is not None
    assert scores.grad is None
    assert ref_logps.grad is None
    with torch.no_grad():
        quiet = objectives.get("aspo")(x, normalizer="reward")
    assert torch.equal(quiet.losses, result.losses)
    assert not quiet.losses.requires_grad


@pytest.mark.usefixtures("poison")
def test_responses_of_no_pair_are_left_alone(device):
    """A third response of role 2, which ASPO does not read: gradient 0, whatever lies there."""
    labels, ids = torch.zeros(6, 4).long(), torch.tensor([[0, 0, 1, 1]] * 6)
    layout = SentenceLayout.from_labels(
        labels, ids, group=torch.tensor([1, 1, 0, 0, 1, 0]), role=torch.tensor([1, 0, 2, 0, 2, 1])
    )
    assert layout.chosen_starts.tolist() == [2, 0]
    x = make(layout, 7, device)
    got = run(x)
    assert_same(got, oracle(x), **TOLERANCE)
    g = _aspo_forward(*operator_arguments(x, complete=False))[3].cpu()
    for tokens in (slice(8, 12), slice(16, 20)):
        assert not got[1][tokens].any()
        assert not g[tokens].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_no_pairs_give_a_connected_zero(device, name, backend):
    layout = SentenceLayout.from_labels(torch.empty(0, 3).long(), torch.empty(0, 3).long())
    padded = layout.padded_to(tokens=5, sentences=3, chosen_sentences=2)
    for each in (layout, padded):
        logps = torch.full((each.num_tokens,), math.nan, device=device, requires_grad=True)
        x = Inputs(each.to(device), logps, logps.detach(), None, backend)
        result = objectives.get(name)(x)
        assert result.losses.shape == (0,)
        result.losses.sum().backward()
        assert logps.grad.tolist() == [0] * each.num_tokens


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", NAMES)
def test_two_runs_agree_bit_for_bit(device, name):
    results = [run(make(LAYOUT, 8, device), name) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    assert all(torch.equal(v, results[1][2][k]) for k, v in results[0][2].items())


def test_fp64_is_refused_and_auto_leaves_it_to_torch(device):
    x = make(LAYOUT, 0, device)
    wide = (x.layout, x.logps.detach().double(), x.ref_logps.double(), x.similarity)
    with pytest.raises(ValueError, match="no float64"):
        objectives.get("aspo")(Inputs(*wide, backend="triton"))
    assert objectives.get("aspo")(Inputs(*wide)).losses.dtype == torch.float64


# --- fixed capacity ---


def padded_inputs(x: Inputs, layout: SentenceLayout, backend: str) -> Inputs:
    """x with its tail full of NaN."""
    values = [x.logps.detach(), x.ref_logps, x.similarity]
    sizes = [layout.num_tokens, layout.num_tokens, layout.chosen_sentences.numel()]
    logps, ref_logps, scores = (
        torch.cat([v, v.new_full((n - v.numel(),), math.nan)]) for v, n in zip(values, sizes, strict=True)
    )
    return Inputs(layout.to(logps.device), logps.requires_grad_(), ref_logps, scores, backend)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("capacity", [(40, 20, 9), (25, 12, 5), (22, 9, 6), (22, 8, 5)])
def test_a_tail_changes_nothing(device, name, backend, capacity):
    x = make(LAYOUT, 9, device)
    x = Inputs(x.layout, x.logps, x.ref_logps, x.similarity, backend)
    tokens, sentences, chosen = capacity
    layout = LAYOUT.padded_to(tokens=tokens, sentences=sentences, chosen_sentences=chosen)
    assert LAYOUT.used_sizes() == layout.used_sizes() == (22, 8, 5)
    options = {"normalizer": "reward"} if name == "aspo" else {}
    losses, gradient, stats = run(x, name, **options)
    padded_losses, padded_gradient, padded_stats = run(padded_inputs(x, layout, backend), name, **options)
    assert torch.equal(padded_losses, losses)
    assert torch.equal(padded_gradient[:22], gradient)
    assert padded_gradient[22:].tolist() == [0] * (tokens - 22)
    for key, value in stats.items():
        assert torch.equal(padded_stats[key][: value.numel()] if value.dim() else padded_stats[key], value), key
        assert not padded_stats[key].flatten()[value.numel() :].any(), key


CAPACITY = {"tokens": 32, "sentences": 12, "chosen_sentences": 7}


def batches() -> list[Ragged]:
    """Two batches of two pairs that fit CAPACITY, in rows of one length."""
    rows = [
        make_ragged(lengths, 11, 1, holes=False) for lengths in ([[2, 1, 3], [1, 4], [3, 3], [5]], [[7, 1], *[[4]] * 3])
    ]
    width = max(batch.labels.shape[1] for batch in rows)
    pad = torch.nn.functional.pad
    return [
        Ragged(b.lengths, *(pad(v, (0, width - v.shape[1]), value=-100) for v in (b.labels, b.sentence_ids)), 11, 1)
        for b in rows
    ]


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["eager", "graph"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_static_buffers_take_another_batch(device, name, backend, graph):
    """As a captured CUDA graph is used: fill the buffers with another batch, replay. Eager shows the filling alone."""
    layouts = [batch.layout().padded_to(**CAPACITY) for batch in batches()]
    problems = [make(batch.layout(), seed, device) for seed, batch in enumerate(batches())]
    filled = [padded_inputs(x, layout, backend) for x, layout in zip(problems, layouts, strict=True)]
    options = {"normalizer": "reward"} if name == "aspo" else {}

    def step(x: Inputs) -> tuple[Tensor, ...]:
        result = objectives.get(name)(Inputs(x.layout, x.logps, x.ref_logps, x.similarity, backend), **options)
        (gradient,) = torch.autograd.grad(result.losses.sum(), x.logps)
        return result.losses.detach(), gradient, *result.stats.values()

    expected = [step(x) for x in filled]
    assert not torch.equal(expected[0][0], expected[1][0])
    static = padded_inputs(problems[0], batches()[0].layout().padded_to(**CAPACITY), backend)
    replay, outputs = (capture if graph else repeat)(lambda: step(static))
    for which in (1, 0, 1):
        static.layout.copy_(layouts[which])
        with torch.no_grad():
            for name_of in ("logps", "ref_logps", "similarity"):
                getattr(static, name_of).copy_(getattr(filled[which], name_of))
        replay()
        for got, wanted in zip(outputs, expected[which], strict=True):
            assert torch.equal(got, wanted)


def repeat(step):
    """A function that runs `step` again, and the list of what it gave last."""
    outputs: list[Tensor] = []

    def replay() -> None:
        outputs[:] = step()

    return replay, outputs


def capture(step):
    """A function that replays the captured `step`, and the tensors that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph.replay, outputs


# --- torch.compile ---


def growing(name: str, backend: str, compiled, device: str) -> None:
    """Call a compiled objective with batches that grow, and compare with eager."""
    for n in (3, 4, 6, 9):
        layout = make_ragged([[2, 1, *[1] * n], [1, n], [n, 3], [5]], 11, 0).layout()
        x = make(layout, n, device)
        arguments = (x.layout, x.logps, x.ref_logps, x.similarity, name, backend)
        (loss, stats), (expected, expected_stats) = compiled(*arguments), objective(*arguments)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(stats, expected_stats)
        gradients = [torch.autograd.grad(v, x.logps)[0] for v in (loss, expected)]
        torch.testing.assert_close(*gradients)


def objective(layout, logps, ref_logps, similarity, name, backend):
    result = objectives.get(name)(Inputs(layout, logps, ref_logps, similarity, backend))
    return result.losses.mean(), result.stats


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "torch") for name in NAMES), ("aspo", "triton"), ("dpo", "triton")]
)
def test_compiles_whole_and_again_only_once(device, name, backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    growing(name, backend, torch.compile(objective, fullgraph=True, backend=counter), device)
    assert counter.frame_count == 2, "once, and once more when the sizes first changed"


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_inductor(name):
    torch._dynamo.reset()
    growing(name, "auto", torch.compile(objective, fullgraph=True), "cuda")


def test_the_operators_pass_opcheck(device):
    x = make(LAYOUT, 0, device)
    torch.library.opcheck(_aspo_forward, operator_arguments(x, complete=True))
    values, offsets = torch.randn(ENTRIES, device=device, requires_grad=True), OFFSETS.to(device)
    for use_triton in (False, True):
        ops = torch.ops.aspo_kernels
        torch.library.opcheck(ops.segment_sum.default, (values, offsets, use_triton))
        torch.library.opcheck(ops.segment_extremum.default, (values.detach(), offsets, True, use_triton))
        torch.library.opcheck(ops.spread_over.default, (values[:6], offsets, ENTRIES, use_triton))
