"""FiSAO's pair form, DDPO and weighted DPO; TDPO and CHiP, from the hidden states on, against full softmaxes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from items import Item, answer, batch, gradients, inputs

from aspo_kernels import linear_token_kl, objectives
from aspo_kernels.objectives import Inputs


def scored(items: list[Item], *scores: float | list[float] | None) -> list[Item]:
    """The items with these scores for (item 0's chosen, its rejected, item 1's chosen, ...); None leaves the random."""
    made = [dict(i) for i in items]
    for n, given in enumerate(scores):
        if given is not None:
            old = made[n // 2][n % 2]
            made[n // 2][n % 2] = replace(old, scores=torch.zeros_like(old.scores) + _64(given))
    return made


def _64(values: float | list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_same(losses: torch.Tensor, expected: torch.Tensor, items: list[Item], **tolerance: float) -> None:
    """Values, and the gradient of every log-probability."""
    torch.testing.assert_close(losses, expected, **tolerance)
    for ours, theirs in zip(gradients(losses, items), gradients(expected, items), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("name", ["fisao", "weighted_dpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_scores_it_is_exactly_dpo(name, dtype):
    items = [{r: replace(a, scores=torch.zeros_like(a.scores)) for r, a in i.items()} for i in batch(dtype)]
    x = inputs(items)
    options = {"k": 0.7} if name == "fisao" else {"gain": 3.0}
    ours, dpo = objectives.get(name)(x, beta=0.3, **options), objectives.get("dpo")(x, beta=0.3)
    assert_same(ours.losses, dpo.losses, items, rtol=0, atol=0)
    torch.testing.assert_close(ours.stats["margins"], dpo.stats["margins"])


def pair_of(weights: list[torch.Tensor], i: Item, beta: float) -> torch.Tensor:
    """-log sigmoid(beta (sum_t c_t l_t of y_c - that of y_r))."""
    return -F.logsigmoid(beta * ((weights[0] * i[0].l).sum() - (weights[1] * i[1].l).sum()))


@pytest.mark.parametrize("k", [1.0, 0.4, -1.0])
def test_fisao_by_the_equation(k):
    """Scores in [-1.5, 1.5]: the clip holds at both ends."""
    items = batch()
    expected, clipped = [], 0
    for i in items:
        weights = [(1 + sign * k * i[role].scores).clamp(0, 2) for role, sign in ((0, 1), (1, -1))]
        clipped += sum(int(((w == 0) | (w == 2)).sum()) for w in weights)
        weights = [w / w.mean() if w.mean() > 0 else w for w in weights]
        expected.append(pair_of(weights, i, 0.3))
    assert clipped or abs(k) < 0.6
    result = objectives.get("fisao")(inputs(items), beta=0.3, k=k)
    assert_same(result.losses, torch.stack(expected), items)


def test_fisao_weights_by_hand():
    """r 1, -1, 0, 3 on chosen: clip(1 + r) = 2, 0, 1, 2, mean 1.25; on rejected clip(1 - r) = 0, 2, 1, 0, mean 0.75."""
    generator = torch.Generator().manual_seed(0)
    items = scored([{r: answer([4], generator) for r in (0, 1)}], [1, -1, 0, 3], [1, -1, 0, 3])
    weights = objectives.get("fisao")(inputs(items)).stats["token_weights"]
    expected = [*(w / 1.25 for w in (2, 0, 1, 2)), *(w / 0.75 for w in (0, 2, 1, 0))]
    torch.testing.assert_close(weights, _64(expected))


def test_fisao_of_a_response_with_all_weights_0():
    """It says nothing: no gradient, and nothing is divided by 0."""
    items = scored(batch(), -1.0, None, None, 1.0, -5.0, 2.0)
    result = objectives.get("fisao")(inputs(items), beta=0.3)
    assert all(torch.isfinite(g).all() for g in gradients(result.losses, items))
    silent = [items[0][0], items[1][1], items[2][0], items[2][1]]
    grads = torch.autograd.grad(result.losses.sum(), [a.logps for a in silent])
    assert not any(g.any() for g in grads)
    assert result.losses[2].item() == pytest.approx(math.log(2))


def test_ddpo_by_hand():
    """h: (-1 + 5 * -3) / 6 on chosen, (2 - 1 + 5 * 4) / 7 on rejected; m = 0.5 (-16/6 - 3)."""
    generator = torch.Generator().manual_seed(0)
    items = [{0: answer([2], generator), 1: answer([3], generator)}]
    items = scored(items, [0.0, 1.0], [0.0, -2.0, 0.1])
    for role, l_of in ((0, [-1, -3]), (1, [2, -1, 4])):
        items[0][role] = replace(items[0][role], ref_logps=items[0][role].logps.detach() - _64(l_of))
    result = objectives.get("ddpo")(inputs(items))
    m = 0.5 * (-16 / 6 - 21 / 7)
    assert result.losses.item() == pytest.approx(math.log1p(math.exp(-m)))
    chosen, _, rejected, _ = gradients(result.losses, items)
    slope = 0.5 / (1 + math.exp(m))
    torch.testing.assert_close(chosen, -slope * _64([1, 5]) / 6)
    torch.testing.assert_close(rejected, slope * _64([1, 1, 5]) / 7)


def test_ddpo_by_the_equation():
    items = batch()
    expected = []
    for i in items:
        c = [torch.where(i[role].scores > 0, 2.5, 1.0) for role in (0, 1)]
        expected.append(pair_of([w / w.sum() for w in c], i, 0.3))
    assert_same(objectives.get("ddpo")(inputs(items), beta=0.3, gamma=2.5).losses, torch.stack(expected), items)


def test_weighted_dpo_by_the_equation():
    items = batch()
    c = [[(1 + 0.8 * i[role].scores).clamp_min(0) for role in (0, 1)] for i in items]
    assert min(w.min() for pair in c for w in pair) == 0
    expected = torch.stack([pair_of(w, i, 0.3) for w, i in zip(c, items, strict=True)])
    assert_same(objectives.get("weighted_dpo")(inputs(items), beta=0.3, gain=0.8).losses, expected, items)


def test_weighted_dpo_takes_tokens_out():
    """Score -1: as if the token were not there. Score 1: as if it stood there twice."""
    items = scored(batch(), -1.0, [0, 1, 0, 0, 0, -1], *[None] * 6)
    chosen, _, rejected, *_ = gradients(objectives.get("weighted_dpo")(inputs(items)).losses, items)
    assert not chosen.any()
    torch.testing.assert_close(rejected / rejected[0], _64([1, 2, 1, 1, 1, 0]))


# --- TDPO and CHiP: hidden states -> log-probabilities and divergences -> loss ---

WIDTH, VOCABULARY = 8, 40


class Heads:
    """Policy and reference: hidden states of every counted token, and one head each, fp64."""

    def __init__(self, x: Inputs, equal: bool = False) -> None:
        n, generator = x.layout.num_tokens, torch.Generator().manual_seed(1)
        self.hidden, other = torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64)
        self.head, other_head = torch.randn(2, VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
        self.ref_hidden, self.ref_head = (self.hidden.clone(), self.head.clone()) if equal else (other, other_head)
        self.targets = torch.randint(VOCABULARY, (n,), generator=generator)
        self.hidden.requires_grad_()
        self.x = x

    def fused(self) -> Inputs:
        found = linear_token_kl(self.hidden, self.ref_hidden, self.head, self.ref_head, self.targets)
        return replace(self.x, logps=found.logps, ref_logps=found.ref_logps, token_kl=found.kl)

    def naive(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """l_t and KL_t of each response, from whole softmaxes as the papers' code has them."""
        logs = (self.hidden @ self.head.T).log_softmax(-1)
        ref = (self.ref_hidden @ self.ref_head.T).softmax(-1)
        kl = (ref * (ref.log() - logs)).sum(-1)
        at = torch.arange(len(self.targets)), self.targets
        sizes = self.x.lengths.long().tolist()
        return list((logs[at] - ref.log()[at]).split(sizes)), list(kl.split(sizes))

    def assert_same(self, losses: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(losses, expected)
        grads = [torch.autograd.grad(loss.sum(), self.hidden, retain_graph=True)[0] for loss in (losses, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("variant", "alpha"), [(1, 0.5), (2, 0.5), (2, 1.0), (2, 0.0)])
def test_tdpo_by_the_published_formula(variant, alpha):
    heads = Heads(inputs([{r: a for r, a in i.items() if r < 2} for i in batch()]))
    losses = objectives.get("tdpo")(heads.fused(), beta=0.3, tdpo_alpha=alpha, variant=variant).losses
    ratios, kl = heads.naive()
    expected = []
    for c, r in zip(range(4), range(4, 8), strict=True):
        values = ratios[c].sum() - ratios[r].sum()
        if variant == 1:
            values = values + kl[c].sum() - kl[r].sum()
        else:
            values = values + alpha * (kl[c].sum().detach() - kl[r].sum())
        expected.append(-F.logsigmoid(0.3 * values))
    heads.assert_same(losses, torch.stack(expected))


@pytest.mark.parametrize("name", ["tdpo", "chip"])
def test_policy_as_the_reference_gives_ln_2(name):
    """To the last bit: both divergences are exactly 0, and the gradient is finite."""
    heads = Heads(inputs(batch()), equal=True)
    losses = objectives.get(name)(heads.fused()).losses
    assert torch.equal(losses, torch.full_like(losses, math.log(2)))
    (gradient,) = torch.autograd.grad(losses.sum(), heads.hidden)
    assert torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_chip_by_the_released_formula(weight):
    """One log-sigmoid over response, image and token terms; segments of all three readings weighted."""
    items = batch()
    x = inputs(items)
    heads = Heads(x)
    losses = objectives.get("chip")(heads.fused(), beta=0.3, tdpo_alpha=0.2, segment_weight=weight).losses
    ratios, kl = heads.naive()
    scores = list(x.token_scores.split([len(r) for r in ratios]))
    g = [(torch.where(s > 0, weight, 1.0) * r).sum() for s, r in zip(scores, ratios, strict=True)]
    place = {(int(b), int(r)): n for n, (b, r) in enumerate(zip(x.layout.group, x.layout.role, strict=True))}
    expected = []
    for b in range(4):
        c, r = place[b, 0], place[b, 1]
        m = g[c] - g[r] - 0.2 * (kl[r].sum() - kl[c].sum().detach())
        m = m + g[c] - g[place[b, 2]] if (b, 2) in place else m
        expected.append(-F.logsigmoid(0.3 * m))
    heads.assert_same(losses, torch.stack(expected))
