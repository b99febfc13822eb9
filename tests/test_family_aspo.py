"""ASPO with weights that come with the data, and with weights on the rejected side (ours)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from items import Answer, Item, answer, batch, gradients, inputs

from aspo_kernels import linear_logps, objectives, sentence_dpo_loss
from aspo_kernels.reference import minmax, perplexity_scores

NORMALIZERS = ("sentence", "token", "none", "reward")
every_normalizer = pytest.mark.parametrize("normalizer", NORMALIZERS)
every_side = pytest.mark.parametrize("side", ["whole", "aligned", "misaligned"])


def aspo(items: list[Item], **options):
    return objectives.get("aspo")(inputs(items), **options)


def given(items: list[Item], value: float) -> list[Item]:
    """The items with this weight for every sentence."""
    return [{r: replace(a, weights=torch.full_like(a.weights, value)) for r, a in i.items()} for i in items]


def assert_same(losses: torch.Tensor, expected: torch.Tensor, items: list[Item]) -> None:
    torch.testing.assert_close(losses, expected)
    for ours, theirs in zip(gradients(losses, items), gradients(expected, items), strict=True):
        torch.testing.assert_close(ours, theirs)


def side_of(a: Answer, weights: torch.Tensor, normalizer: str) -> torch.Tensor:
    """(R_c / R_c*) sum_i (1 + w_i) h(s_i), the ratio a constant."""
    h = torch.stack([part.sum() for part in a.l.split(a.sentences)])
    gain, tokens = 1 + weights, torch.tensor(a.sentences, dtype=torch.float64)
    ratio = {
        "none": torch.ones(()),
        "token": tokens.sum() / (gain * tokens).sum(),
        "sentence": len(gain) / gain.sum(),
        "reward": (h.sum() / (gain * h).sum()).detach(),
    }[normalizer]
    if normalizer == "reward":
        ratio = ratio.clamp(0.5, 1.0) if ratio > 0 else len(gain) / gain.sum()
    return ratio * (gain * h).sum()


def computed(a: Answer, alpha: float) -> torch.Tensor:
    nll = [-part.mean().item() for part in a.logps.split(a.sentences)]
    scores = zip(minmax(a.similarity.tolist()), perplexity_scores(nll), strict=True)
    return torch.tensor([alpha * s + (1 - alpha) * p for s, p in scores], dtype=torch.float64)


# --- weights="given" ---


@pytest.mark.parametrize(
    ("normalizer", "weight"),
    [(n, w) for n in ("sentence", "token", "reward") for w in (0.0, 0.3, 1.0, 7.0) if (n, w) != ("reward", 7.0)],
)
@every_side
def test_constant_given_weights_are_dpo(normalizer, weight, side):
    """Whatever the constant is, where it is normalised; misaligned ones are constant too. (`reward` is clamped at 1/2,
    and so is DPO for weights up to 1.)"""
    items = given(batch(), weight)
    losses = aspo(items, weights="given", normalizer=normalizer, rejected_side=side, beta=0.3).losses
    assert_same(losses, objectives.get("dpo")(inputs(items), beta=0.3).losses, items)


def test_constant_given_weights_without_a_normaliser_are_not():
    items = given(batch(), 0.5)
    losses = aspo(items, weights="given", normalizer="none", beta=0.3).losses
    expected = torch.stack([-F.logsigmoid(0.3 * (1.5 * i[0].h - i[1].h)) for i in items])
    assert_same(losses, expected, items)


@every_normalizer
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_given_what_would_be_computed_is_the_same(normalizer, alpha):
    items = batch()
    plain = aspo(items, alpha=alpha, normalizer=normalizer)
    same = [{r: replace(a, weights=computed(a, alpha)) for r, a in i.items()} for i in items]
    got = aspo(same, weights="given", normalizer=normalizer, alpha=0.123)  # alpha is left alone
    assert_same(got.losses, plain.losses, items)
    for key, value in plain.stats.items():
        torch.testing.assert_close(got.stats[key], value)


def test_given_weights_carry_no_gradient():
    items = batch()
    weights = inputs(items).sentence_weights.clone().requires_grad_()
    losses = objectives.get("aspo")(inputs(items, sentence_weights=weights), weights="given").losses
    assert torch.autograd.grad(losses.sum(), weights, allow_unused=True) == (None,)


def test_sentence_dpo_loss_takes_weights():
    """From the hidden states on; they are of the chosen sentences alone, and replace the computed ones."""
    x = inputs([{r: a for r, a in i.items() if r < 2} for i in batch()])
    hidden, ref_hidden = torch.randn(2, x.layout.num_tokens, 8, dtype=torch.float64)
    head = torch.randn(x.layout.num_tokens + 3, 8, dtype=torch.float64)  # the targets are 0, 1, 2, ...
    weights = torch.tensor([0.2, 1.0, 0.0, 0.5, 2.0, 0.7, 0.1, 0.3], dtype=torch.float64)
    assert weights.shape == x.layout.chosen_sentences.shape
    out = sentence_dpo_loss(
        hidden, head, x.layout, ref_hidden=ref_hidden, sentence_weights=weights, beta=0.3, normalizer="token"
    )
    logps, ref_logps = (linear_logps(states, head, x.layout.targets) for states in (hidden, ref_hidden))
    every = torch.zeros(x.layout.num_sentences, dtype=torch.float64)
    every[x.layout.chosen_sentences] = weights
    plain = replace(x, logps=logps, ref_logps=ref_logps, sentence_weights=every)
    expected = objectives.get("aspo")(plain, weights="given", beta=0.3, normalizer="token")
    torch.testing.assert_close(out.loss, expected.losses.mean())
    assert torch.equal(out.sentence_weights, weights)
    torch.testing.assert_close(out.margins, expected.stats["margins"])
    with pytest.raises(ValueError, match=r"sentence_weights must be \(8,\), one for each chosen sentence, got \(5,\)"):
        sentence_dpo_loss(hidden, head, x.layout, ref_hidden=ref_hidden, sentence_weights=weights[:5])
    with pytest.raises(ValueError, match=r"sentence_weights\[2\] is nan"):
        weights[2] = torch.nan
        sentence_dpo_loss(hidden, head, x.layout, ref_hidden=ref_hidden, sentence_weights=weights)


# --- rejected_side ---


@every_normalizer
@every_side
@pytest.mark.parametrize("weights", ["computed", "given"])
def test_rejected_side_by_the_equation(normalizer, side, weights):
    """aligned: 1 + w_i, misaligned: 1 + (1 - w_i), by the rule and the normaliser of the chosen side."""
    items = batch()
    options = {"alpha": 0.3, "normalizer": normalizer, "rejected_side": side, "weights": weights, "beta": 0.4}
    losses = aspo(items, **options).losses
    expected = []
    for i in items:
        w_c, w_r = (computed(i[r], 0.3) if weights == "computed" else i[r].weights for r in (0, 1))
        if side == "misaligned":
            w_r = (1 - w_r) * (len(w_r) > 1)
        rejected = i[1].h if side == "whole" else side_of(i[1], w_r, normalizer)
        expected.append(-F.logsigmoid(0.4 * (side_of(i[0], w_c, normalizer) - rejected)))
    assert_same(losses, torch.stack(expected), items)


@every_normalizer
@every_side
def test_responses_of_one_sentence_stay_dpo(normalizer, side):
    generator = torch.Generator().manual_seed(0)
    items = [{r: answer([n + r], generator) for r in (0, 1)} for n in (1, 2, 5)]
    losses = aspo(items, normalizer=normalizer, rejected_side=side, beta=0.3).losses
    assert_same(losses, objectives.get("dpo")(inputs(items), beta=0.3).losses, items)


@every_side
def test_rewards_are_plain_whatever_is_weighed(side):
    items = batch()
    stats = aspo(items, rejected_side=side, beta=0.3).stats
    for role, name in enumerate(("chosen_rewards", "rejected_rewards")):
        torch.testing.assert_close(stats[name], torch.stack([0.3 * i[role].h.detach() for i in items]))
    assert stats["sentence_weights"].numel() == sum(len(i[0].sentences) for i in items)


def test_perplexity_alone_needs_no_rejected_similarity():
    x = replace(inputs(batch()), rejected_similarity=None)
    without = replace(x, similarity=None)
    for side in ("aligned", "misaligned"):
        zero = objectives.get("aspo")(x, alpha=0.0, rejected_side=side).losses
        assert torch.equal(objectives.get("aspo")(without, alpha=0.7, rejected_side=side).losses, zero)
