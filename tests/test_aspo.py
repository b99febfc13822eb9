"""ASPO's objective: every line that must hold, forward and gradient, in fp64 and fp32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Ragged, lean_layout, ragged_batches
from torch import Tensor

from aspo_kernels import SentenceLayout, objectives, reference
from aspo_kernels.aspo import length_ratio, perplexity_scores, sentence_nll
from aspo_kernels.objectives import Inputs
from aspo_kernels.segments import segment_minmax

DTYPES = [torch.float64, torch.float32]
NORMALIZERS = ["sentence", "token", "none", "reward"]
SCALES = ["ppl", "nll"]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """A few roundings of sums of up to a hundred."""
    return {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}


def make(layout: SentenceLayout, dtype: torch.dtype, seed: int = 0, similarity: bool = True) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    logps = -4 * torch.rand(layout.num_tokens, generator=generator, dtype=torch.float64)
    ref_logps = logps + torch.randn(layout.num_tokens, generator=generator, dtype=torch.float64)
    scores = torch.rand(layout.chosen_sentences.numel(), generator=generator) if similarity else None
    return Inputs(layout, logps.to(dtype).requires_grad_(), ref_logps.to(dtype), scores)


def run(name: str, x: Inputs, **options) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses, the gradient of their sum (with unequal factors) in every log-probability, and the stats."""
    logps = x.logps.detach().clone().requires_grad_()
    result = objectives.get(name)(Inputs(x.layout, logps, x.ref_logps, x.similarity), **options)
    factors = torch.arange(1, result.losses.numel() + 1, dtype=logps.dtype)
    (gradient,) = torch.autograd.grad((result.losses * factors).sum(), logps)
    return result.losses.detach(), gradient, result.stats


def constant_weights(layout: SentenceLayout, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Similarities that undo the perplexity scores, S' = 1 - PPL': w = 1/2 for every sentence at alpha = 1/2."""
    x = make(layout, dtype, seed)
    scores = perplexity_scores(sentence_nll(x.logps.detach().double(), layout), layout.response_offsets)
    return Inputs(layout, x.logps, x.ref_logps, (1 - scores)[layout.chosen_sentences])


LAYOUT = lean_layout([[2, 1, 3], [1, 4], [3, 3], [5]])


# --- equal to DPO, or not ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("perplexity", ["policy", "reference"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_one_sentence_is_dpo(dtype, normalizer, perplexity, alpha):
    layout = lean_layout([[4], [1], [7], [2, 2], [3], [1, 1, 1]])  # the rejected responses may have several
    x = make(layout, dtype)
    options = {"normalizer": normalizer, "perplexity": perplexity, "alpha": alpha}
    losses, gradient, stats = run("aspo", x, beta=0.3, **options)
    dpo_losses, dpo_gradient, _ = run("dpo", x, beta=0.3)
    assert not stats["sentence_weights"].any()
    torch.testing.assert_close(losses, dpo_losses, **tolerance(dtype))
    torch.testing.assert_close(gradient, dpo_gradient, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalizer", ["sentence", "token", "reward"])
@pytest.mark.parametrize("seed", range(4))
def test_constant_weights_are_dpo(dtype, normalizer, seed):
    x = constant_weights(LAYOUT, dtype, seed)
    losses, gradient, stats = run("aspo", x, normalizer=normalizer)
    dpo_losses, dpo_gradient, _ = run("dpo", x)
    torch.testing.assert_close(stats["sentence_weights"], torch.full((5,), 0.5, dtype=dtype), rtol=1e-5, atol=1e-5)
    if normalizer == "reward":
        assert stats["reward_fallback_share"] == 0
    torch.testing.assert_close(losses, dpo_losses, **tolerance(dtype))
    torch.testing.assert_close(gradient, dpo_gradient, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_none_with_constant_weights_is_not_dpo(dtype):
    x = constant_weights(LAYOUT, dtype)
    losses, gradient, _ = run("aspo", x, normalizer="none")
    dpo_losses, dpo_gradient, _ = run("dpo", x)
    assert (losses - dpo_losses).abs().min() > 1e-3
    chosen = torch.arange(x.layout.num_tokens) < x.layout.response_token_offsets[2]
    assert (gradient - dpo_gradient)[chosen].abs().min() > 1e-3
    # it is DPO with 1.5 times the chosen side
    h_chosen, h_rejected = x.pair(x.response_logratios.detach())
    expected = -torch.nn.functional.logsigmoid(0.1 * (1.5 * h_chosen - h_rejected))
    torch.testing.assert_close(losses, expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_undetached_reward_ratio_is_exactly_dpo(dtype):
    """Why R is detached: h / (sum (1 + w) h) times sum (1 + w) h is h, whatever the weights are."""
    x = make(LAYOUT, dtype, seed=3)
    weights = torch.rand(LAYOUT.num_sentences, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logps = x.logps.detach().clone().requires_grad_()
    fresh = Inputs(LAYOUT, logps, x.ref_logps)
    h = fresh.sentence_logratios
    responses = torch.repeat_interleave(torch.arange(4), LAYOUT.response_offsets.diff())
    plain, weighted = (torch.zeros(4, dtype=dtype).index_add(0, responses, v) for v in (h, (1 + weights.to(dtype)) * h))
    ratio = plain / weighted
    margins = 0.1 * ((ratio * weighted)[:2] - plain[2:])
    losses = -torch.nn.functional.logsigmoid(margins)
    (gradient,) = torch.autograd.grad((losses * torch.tensor([1, 2], dtype=dtype)).sum(), logps)
    dpo_losses, dpo_gradient, _ = run("dpo", x)
    torch.testing.assert_close(losses.detach(), dpo_losses, **tolerance(dtype))
    torch.testing.assert_close(gradient, dpo_gradient, **tolerance(dtype))


# --- gradients ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("scale", SCALES)
def test_gradient_is_the_formula_with_constant_weights(dtype, normalizer, scale):
    """d loss / d logp_t = -sigmoid(-M*) R beta (1 + w_s(t)) on the chosen side, +sigmoid(-M*) beta on the rejected.

    That is all there is: no term from w (which reads logp through the perplexity) and none from R.
    """
    x, beta = make(LAYOUT, dtype, seed=1), 0.3
    options = {"beta": beta, "normalizer": normalizer, "perplexity_scale": scale}
    losses, gradient, stats = run("aspo", x, **options)
    weights, margins = stats["sentence_weights"], stats["margins"]
    assert ((weights > 0.01) & (weights < 0.99)).any()
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(margins), **tolerance(dtype))
    offsets = LAYOUT.sentence_offsets.tolist()
    pair_of_sentence = torch.repeat_interleave(LAYOUT.group, LAYOUT.response_offsets.diff()).tolist()
    logratios = stats["sentence_logratios"].double().tolist()
    for s in range(LAYOUT.num_sentences):
        pair = pair_of_sentence[s]
        push = (pair + 1) * beta * torch.sigmoid(-margins[pair])
        if s < weights.numel():
            same = [k for k in range(weights.numel()) if pair_of_sentence[k] == pair]
            lengths = [offsets[k + 1] - offsets[k] for k in same]
            w = [float(weights[k]) for k in same]
            ratio = reference.length_ratio(w, [logratios[k] for k in same], lengths, normalizer)
            push = -push * ratio * (1 + weights[s])
        expected = push.expand(offsets[s + 1] - offsets[s])
        torch.testing.assert_close(gradient[offsets[s] : offsets[s + 1]], expected, rtol=1e-5, atol=1e-7)


def test_the_rejected_side_sees_the_weights_only_through_the_sigmoid():
    x = make(LAYOUT, torch.float64, seed=2)
    rejected = torch.arange(LAYOUT.num_tokens) >= LAYOUT.response_token_offsets[2]
    pair = torch.repeat_interleave(LAYOUT.group, LAYOUT.response_token_offsets.diff())
    seen = []
    for alpha in (0.0, 0.3, 1.0):
        _, gradient, stats = run("aspo", x, alpha=alpha)
        factor = (torch.arange(1, 3) * torch.sigmoid(-stats["margins"]))[pair]
        torch.testing.assert_close((gradient / factor)[rejected], torch.full((11,), 0.1, dtype=torch.float64))
        seen.append(stats["margins"])
    assert (seen[0] - seen[2]).abs().max() > 1e-3, "the weights did change"


def test_nothing_but_the_losses_carries_a_gradient():
    x = make(LAYOUT, torch.float32)
    similarity = x.similarity.clone().requires_grad_()
    ref_logps = x.ref_logps.clone().requires_grad_()
    for perplexity in ("policy", "reference"):
        for normalizer in NORMALIZERS:
            result = objectives.get("aspo")(
                Inputs(LAYOUT, x.logps, ref_logps, similarity), perplexity=perplexity, normalizer=normalizer
            )
            assert result.losses.requires_grad
            assert not any(v.requires_grad for v in result.stats.values())
            result.losses.sum().backward()
    assert similarity.grad is None
    assert ref_logps.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    batch=ragged_batches(max_pairs=4),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    normalizer=st.sampled_from(NORMALIZERS),
    perplexity=st.sampled_from(["policy", "reference"]),
    scale=st.sampled_from(SCALES),
    with_similarity=st.booleans(),
)
def test_matches_the_oracle(dtype, batch: Ragged, alpha, normalizer, perplexity, scale, with_similarity):
    layout = batch.layout()
    x = make(layout, dtype, batch.seed, with_similarity)
    options = {
        "beta": 0.4,
        "alpha": alpha,
        "normalizer": normalizer,
        "perplexity": perplexity,
        "perplexity_scale": scale,
    }
    losses, gradient, stats = run("aspo", x, **options)
    logps = x.logps.detach().double().requires_grad_()
    expected = reference.aspo_loss(logps, x.ref_logps.double(), layout, x.similarity, **options)
    factors = torch.arange(1, losses.numel() + 1, dtype=torch.float64)
    (expected_gradient,) = torch.autograd.grad((expected["losses"] * factors).sum(), logps)
    # a weight is a quotient of ranges: where one is small the fp32 scores keep fewer digits
    limits = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(losses.double(), expected["losses"].detach(), **limits)
    torch.testing.assert_close(gradient.double(), expected_gradient, **limits)
    for name in ("margins", "sentence_weights", "sentence_logratios"):
        torch.testing.assert_close(stats[name].double(), expected[name].detach(), **limits)


# --- weights ---


def test_min_max_range():
    """Ranges up to 1e-5 say nothing and give 0 for all; just above, 0 and 1."""
    offsets = torch.tensor([0, 3, 6, 7])
    values = torch.tensor([0.25, 0.25 + 0.9e-5, 0.25, 0.25, 0.25 + 1.2e-5, 0.25, 3.0], dtype=torch.float64)
    assert segment_minmax(values, offsets).tolist() == [0, 0, 0, 0, 1, 0, 0]
    scores = perplexity_scores(values, offsets)
    assert scores[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(scores[3:6], torch.tensor([1.0, 0, 1], dtype=torch.float64))
    assert scores[6] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nll", [95.0, 200.0, 1e4])
def test_nll_beyond_exp(dtype, nll):
    """exp(95) is inf in fp32: minmax of -PPL would be NaN. The scores are those of the limit, 1 and 0."""
    layout = lean_layout([[2, 1, 1], [2]])
    logps = torch.tensor([-1.0, -1.0, -nll, -nll - 1, -2.0, -2.0], dtype=dtype)
    x = Inputs(layout, logps, logps + 0.5)
    losses, gradient, stats = run("aspo", x)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()
    # the middle sentence: (e^nll - e^(nll+1)) / (e - e^(nll+1)) = (1 - 1/e) / 1 up to e^-nll
    torch.testing.assert_close(stats["sentence_weights"], torch.tensor([1, 1 - 1 / math.e, 0], dtype=dtype))
    _, _, on_nll_scale = run("aspo", x, perplexity_scale="nll")
    torch.testing.assert_close(on_nll_scale["sentence_weights"], torch.tensor([1, 1 / nll, 0], dtype=dtype))


def test_eos_counts_in_h_but_not_in_the_perplexity():
    eos = 2
    labels = torch.tensor([[5, 6, 7, 8, eos], [5, 6, 7, 8, 9]])
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    logps = torch.tensor([-1.0, -1, -2, -2, -90, -1, -1, -1, -1, -1], dtype=torch.float64)
    ref_logps = logps - torch.tensor([1.0, 2, 3, 4, 5, 0, 0, 0, 0, 0], dtype=torch.float64)
    with_eos, without = (SentenceLayout.from_labels(labels, ids, e) for e in (eos, None))
    _, gradient, stats = run("aspo", Inputs(with_eos, logps, ref_logps), perplexity_scale="nll")
    assert stats["sentence_logratios"].tolist() == [3, 12]  # 3 + 4 + 5, the EOS's 5 included
    assert (gradient[:5] != 0).all()
    torch.testing.assert_close(sentence_nll(logps, with_eos), torch.tensor([1.0, 2, 1], dtype=torch.float64))
    torch.testing.assert_close(sentence_nll(logps, without), torch.tensor([1.0, 94 / 3, 1], dtype=torch.float64))


def test_alpha_and_missing_similarities():
    x = make(LAYOUT, torch.float64, seed=5)
    offsets, chosen = LAYOUT.response_offsets, LAYOUT.chosen_sentences
    by_perplexity = perplexity_scores(sentence_nll(x.logps.detach(), LAYOUT), offsets)[chosen]
    by_similarity = segment_minmax(x.similarity.double(), offsets[:3])
    weights = {alpha: run("aspo", x, alpha=alpha)[2]["sentence_weights"] for alpha in (0.0, 0.25, 1.0)}
    torch.testing.assert_close(weights[1.0], by_similarity, rtol=1e-6, atol=1e-6)  # ASPO-S
    torch.testing.assert_close(weights[0.0], by_perplexity)  # ASPO-P
    torch.testing.assert_close(weights[0.25], 0.25 * by_similarity + 0.75 * by_perplexity, rtol=1e-6, atol=1e-6)
    without = Inputs(LAYOUT, x.logps, x.ref_logps)
    for alpha in (0.0, 0.7, 1.0):  # ASPO-P whatever alpha is
        torch.testing.assert_close(run("aspo", without, alpha=alpha)[2]["sentence_weights"], by_perplexity)


def test_perplexity_of_the_reference():
    x = make(LAYOUT, torch.float64, seed=6)
    _, _, stats = run("aspo", x, perplexity="reference", alpha=0.0)
    expected = perplexity_scores(sentence_nll(x.ref_logps, LAYOUT), LAYOUT.response_offsets)[LAYOUT.chosen_sentences]
    torch.testing.assert_close(stats["sentence_weights"], expected)
    assert not torch.allclose(stats["sentence_weights"], run("aspo", x, alpha=0.0)[2]["sentence_weights"])


@given(ragged_batches(max_pairs=4), st.sampled_from(SCALES), st.floats(0, 1))
def test_weights_and_ratios_keep_their_ranges(batch: Ragged, scale, alpha):
    x = make(batch.layout(), torch.float32, batch.seed)
    for normalizer in NORMALIZERS:
        _, _, stats = run("aspo", x, alpha=alpha, normalizer=normalizer, perplexity_scale=scale)
        weights = stats["sentence_weights"]
        assert (weights >= 0).all()
        assert (weights <= 1 + 1e-6).all()
        every = weights.new_zeros(x.layout.num_sentences).index_put((x.layout.chosen_sentences,), weights)
        ratio = x.pair(length_ratio(x, every, normalizer)[0])[0]
        if normalizer == "none":
            assert (ratio == 1).all()
        else:
            assert (ratio >= 0.5 - 1e-6).all()
            assert (ratio <= 1 + 1e-6).all()


# --- the `reward` normaliser ---


def reward(logratios: list[float], weights_by_similarity: list[float]) -> tuple[Tensor, Tensor]:
    """Margin at beta = 1 of one chosen response with sentences of one token, and the share of fallbacks."""
    k = len(logratios)
    layout = lean_layout([[1] * k, [1]])
    logps = torch.full((k + 1,), -1.0, dtype=torch.float64)
    ref_logps = logps - torch.tensor([*logratios, 0.0], dtype=torch.float64)
    similarity = torch.tensor(weights_by_similarity, dtype=torch.float64)
    stats = run("aspo", Inputs(layout, logps, ref_logps, similarity), beta=1.0, alpha=1.0, normalizer="reward")[2]
    return stats["margins"][0], stats["reward_fallback_share"]


def test_reward_ratio_by_hand():
    # weights (1, 0): sum h = 3, sum (1 + w) h = 2*2 + 1 = 5, R = 3/5, M* = 3/5 * 5 = 3
    margin, share = reward([2.0, 1.0], [0.9, 0.1])
    assert (float(margin), float(share)) == pytest.approx((3, 0))
    # clamped below: (3 - 1.9) / (6 - 1.9) = 0.27 -> 1/2, M* = 4.1 / 2
    assert float(reward([3.0, -1.9], [0.9, 0.1])[0]) == pytest.approx(2.05)
    # clamped above: (-1 + 3) / (-2 + 3) = 2 -> 1, M* = 1
    assert float(reward([-1.0, 3.0], [0.9, 0.1])[0]) == pytest.approx(1)


@pytest.mark.parametrize("logratios", [[0.0, 0.0], [1.0, -2.0], [2.0, -3.0], [1e-8, 1e-8]])
def test_reward_falls_back_to_sentence(logratios):
    """0/0 at step 0, a denominator of 0, a ratio that is not positive: R = K / sum (1 + w) = 2/3, and it is counted."""
    margin, share = reward(logratios, [0.9, 0.1])
    assert share == 1
    assert float(margin) == pytest.approx(2 / 3 * (2 * logratios[0] + logratios[1]))


def test_share_of_fallbacks():
    layout = lean_layout([[1, 1]] * 4 + [[1]] * 4)
    logps = torch.full((12,), -1.0)
    ratios = torch.tensor([1.0, 1, 0, 0, 2, -3, 1, 2, 0, 0, 0, 0])
    stats = run("aspo", Inputs(layout, logps, logps - ratios, torch.tensor([1.0, 0] * 4)), normalizer="reward")[2]
    assert stats["reward_fallback_share"] == 0.5  # pairs 1 and 2; rejected responses are not counted
    assert "reward_fallback_share" not in run("aspo", Inputs(layout, logps, logps - ratios))[2]


# --- order, padding, packing ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=ragged_batches(max_pairs=4), normalizer=st.sampled_from(NORMALIZERS), duplicate=st.booleans())
def test_permuting_pairs_and_padding_change_nothing(dtype, batch: Ragged, normalizer, duplicate):
    """Values that belong to a position move with it; with `duplicate` every sentence of a response is the same."""
    width = batch.labels.shape[1]
    generator = batch.generator()
    grid = -4 * torch.rand(2, *batch.labels.shape, generator=generator, dtype=torch.float64)
    if duplicate:
        grid = grid[..., :1].expand_as(grid)
    scores = batch.similarity(generator)
    if duplicate:
        scores = torch.full_like(scores, 0.3)
    order = torch.randperm(batch.pairs, generator=generator)
    rows = torch.cat([order, order + batch.pairs])
    padding = 3
    moved = Ragged(
        tuple(batch.lengths[r] for r in rows.tolist()),
        torch.nn.functional.pad(batch.labels[rows], (padding, 1), value=-100),
        torch.nn.functional.pad(batch.sentence_ids[rows], (padding, 1), value=5),
        batch.vocabulary,
        batch.seed,
    )
    per_pair = scores.split([len(row) for row in batch.lengths[: batch.pairs]])
    results = []
    for which, values, similarity in (
        (batch, grid, scores),
        (moved, torch.nn.functional.pad(grid[:, rows], (padding, 1)), torch.cat([per_pair[i] for i in order.tolist()])),
    ):
        layout = which.layout()
        logps, ref_logps = values.reshape(2, -1)[:, layout.hidden_index].to(dtype)
        logps = logps.clone().requires_grad_()
        result = objectives.get("aspo")(Inputs(layout, logps, ref_logps, similarity), normalizer=normalizer)
        result.losses.sum().backward()
        on_grid = torch.zeros(which.labels.numel(), dtype=dtype).index_put((layout.hidden_index,), logps.grad)
        results.append((result.losses.detach(), on_grid.view(which.labels.shape), result.stats["margins"]))
    (losses, gradient, margins), (moved_losses, moved_gradient, moved_margins) = results
    torch.testing.assert_close(moved_losses, losses[order], **tolerance(dtype))
    torch.testing.assert_close(moved_margins, margins[order], **tolerance(dtype))
    torch.testing.assert_close(moved_gradient[:, padding : padding + width], gradient[rows], **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_pairs_do_not_see_each_other(dtype, normalizer):
    """A batch of three is three batches of one."""
    lengths = [[2, 1, 3], [1, 4], [2, 2], [3, 3], [5], [1, 1]]
    layout = lean_layout(lengths)
    x = make(layout, dtype, seed=9)
    losses = run("aspo", x, normalizer=normalizer)[0]
    tokens = layout.response_token_offsets.tolist()
    sentences = layout.response_offsets.tolist()
    for pair in range(3):
        alone = lean_layout([lengths[pair], lengths[pair + 3]])
        mine = torch.cat([torch.arange(tokens[r], tokens[r + 1]) for r in (pair, pair + 3)])
        scores = x.similarity[sentences[pair] : sentences[pair + 1]]
        part = Inputs(alone, x.logps.detach()[mine], x.ref_logps[mine], scores)
        torch.testing.assert_close(run("aspo", part, normalizer=normalizer)[0][0], losses[pair], **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_duplicate_sentences_share_their_weight(dtype):
    """The same sentence twice, with its values: equal weights to the last bit, and no NaN where all are the same."""
    layout = lean_layout([[2, 3, 2], [2, 2], [4], [4]])
    logps = torch.tensor([-1.0, -2, -3, -1, -2, -1, -2, *[-1, -2] * 2, *[-1] * 8], dtype=dtype)
    x = Inputs(layout, logps, logps - 0.1, torch.tensor([0.2, 0.7, 0.2, 0.4, 0.4]))
    weights = run("aspo", x, alpha=0.3)[2]["sentence_weights"]
    torch.testing.assert_close(weights[:3], torch.tensor([0.7, 0.3, 0.7], dtype=dtype))
    assert weights[0] == weights[2]
    assert weights[3] == weights[4] == 0
