"""ACPO, f-DPO, WPO, ORPO and KTO: what must hold for each, against its equation written out."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from items import Item, answer, at_the_reference, batch, gradients, inputs

from aspo_kernels import linear_logps, objectives

LN2 = math.log(2)


def pair(h_chosen: float, h_rejected: float, tokens: int = 2) -> Item:
    """A pair of `tokens` tokens each whose log-ratios are these."""
    generator = torch.Generator().manual_seed(0)
    made = (answer([tokens], generator), answer([tokens], generator))
    wanted = (h_chosen, h_rejected)
    return {
        role: replace(a, ref_logps=a.logps.detach() - h / tokens)
        for role, (a, h) in enumerate(zip(made, wanted, strict=True))
    }


# --- ACPO ---


def acpo(items, **options):
    fields = {"pair_tokens": options.pop("pair_tokens")} if "pair_tokens" in options else {}
    return objectives.get("acpo")(inputs(items, **fields), **options)


def test_acpo_by_hand():
    """beta 1, tau = 0.1 * 4 = 0.4: r_c = 1 and r_r = -2 give a = (1 - 0.4) / -2 -> 0; r_c = -1: a = 1.4 / 2 = 0.7."""
    result = acpo([pair(1.0, -2.0), pair(-1.0, -2.0), pair(-3.0, -2.0), pair(1.0, 2.0)], beta=1.0, delta=0.1)
    a, margins = [0.0, 0.7, 1.0, 1.0], [1.0, -1 + 0.7 * 2, -3.0 + 2.0, 1.0 - 2.0]
    torch.testing.assert_close(result.stats["acpo_scale"], torch.tensor(a, dtype=torch.float64))
    torch.testing.assert_close(result.stats["margins"], torch.tensor(margins, dtype=torch.float64))
    torch.testing.assert_close(result.losses, F.softplus(-torch.tensor(margins, dtype=torch.float64)))
    assert result.stats["acpo_target"].tolist() == [pytest.approx(0.4)] * 4


@pytest.mark.parametrize("h", [(-1.0, -2.0), (1.0, -2.0), (-3.0, -2.0), (1.0, 2.0), (0.2, -5.0)])
def test_acpo_scale_is_a_constant_to_the_gradient(h):
    """d loss / d r_r = +a sigmoid(-m), d loss / d r_c = -sigmoid(-m)."""
    items = [pair(*h)]
    beta = 0.7
    result = acpo(items, beta=beta, delta=0.1)
    slope = torch.sigmoid(-result.stats["margins"])
    chosen, _, rejected, _ = gradients(result.losses, items)  # each token has its response's, times dr / dlogp = beta
    torch.testing.assert_close(chosen, -beta * slope.expand(2))
    torch.testing.assert_close(rejected, beta * (result.stats["acpo_scale"] * slope).expand(2))


def test_acpo_with_a_1_is_dpo_to_the_last_bit():
    for seed in range(200):  # fp32, in which beta h_c - beta h_r and beta (h_c - h_r) round apart now and then
        generator = torch.Generator().manual_seed(seed)
        items = [{role: answer([3, 2], generator, torch.float32) for role in (0, 1)} for _ in range(8)]
        result, dpo = acpo(items, delta=0.1, pair_tokens=20.0), objectives.get("dpo")(inputs(items))
        same = torch.nonzero(result.stats["acpo_scale"] == 1).flatten().tolist()
        assert same
        for n in same:
            both = [r.losses[n] for r in (result, dpo)]
            assert torch.equal(*both)
            grads = [gradients(loss, items[n : n + 1]) for loss in both]
            assert all(torch.equal(mine, its) for mine, its in zip(*grads, strict=True))


def test_acpo_step_0_is_dpo():
    items = at_the_reference(batch())
    result = acpo(items, delta=0.5)  # a target above every reward
    torch.testing.assert_close(result.losses, torch.full((4,), LN2, dtype=torch.float64))
    assert result.stats["acpo_scale"].tolist() == [1.0] * 4


@pytest.mark.parametrize("h_rejected", [-1e-7, 0.0, 1e-7, 3.0])
def test_acpo_guard(h_rejected):
    """Where the rejected reward is no divisor (not below -1e-6): a = 1, and nothing is infinite."""
    items = [pair(2.0, h_rejected)]
    result = acpo(items, beta=1.0, delta=10.0, pair_tokens=None)
    assert result.stats["acpo_scale"].tolist() == [1.0]
    assert all(torch.isfinite(g).all() for g in gradients(result.losses, items))


def test_acpo_target():
    """Of the pair, of the batch at hand, or of the whole optimiser step, which is given."""
    items = batch()
    tokens = torch.tensor([len(i[0]) + len(i[1]) for i in items], dtype=torch.float64)
    assert torch.equal(acpo(items, delta=0.1, target="pair").stats["acpo_target"], 0.1 * tokens)
    here = acpo(items, delta=0.1, pair_tokens=None).stats["acpo_target"]
    torch.testing.assert_close(here, 0.1 * tokens.mean().expand(4))
    for target in ("batch", "dataset"):
        given = acpo(items[:1], delta=0.1, pair_tokens=37.0, target=target).stats["acpo_target"]
        torch.testing.assert_close(given, torch.tensor([3.7], dtype=torch.float64))


def test_acpo_scale_does_not_change_with_micro_batches():
    """Given the tokens of the whole step; from its own tokens each half would have another target."""
    items = [pair(-1.0, -2.0, tokens=n) for n in (2, 3, 20, 30)]
    whole = inputs(items)
    expected = objectives.get("acpo")(whole, beta=1.0, delta=0.01).stats["acpo_scale"]
    assert expected.min() > 0 and expected.max() < 1
    halves = [acpo(part, beta=1.0, delta=0.01, pair_tokens=whole.pair_tokens) for part in (items[:2], items[2:])]
    assert torch.equal(torch.cat([half.stats["acpo_scale"] for half in halves]), expected)
    alone = acpo(items[:2], beta=1.0, delta=0.01, pair_tokens=None).stats["acpo_scale"]
    assert not torch.allclose(alone, expected[:2])


def test_acpo_warns_of_a_starving_target():
    items = [pair(-1.0, -2.0)]
    with pytest.warns(UserWarning, match="target delta \\* tokens is above 4 .*Lower delta"):
        acpo(items, pair_tokens=810.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acpo(items, pair_tokens=799.0)


# --- f-DPO ---

DERIVATIVES = {  # f'(u) at u = exp(h)
    "reverse_kl": lambda u: math.log(u),
    "forward_kl": lambda u: 1 - 1 / u,
    "js_divergence": lambda u: math.log(2 * u / (1 + u)),
    "alpha_divergence": lambda u: (u ** (0.3 - 1) - 1) / (0.3 - 1),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_f_dpo_by_hand(name):
    items = batch()
    result = objectives.get("f_dpo")(inputs(items), beta=0.4, f_divergence=name, f_alpha=0.3)
    f = DERIVATIVES[name]
    m = [0.4 * (f(math.exp(i[0].h.item())) - f(math.exp(i[1].h.item()))) for i in items]
    torch.testing.assert_close(result.losses, F.softplus(-torch.tensor(m, dtype=torch.float64)))
    torch.testing.assert_close(result.stats["margins"], torch.tensor(m, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "near"), [({"f_divergence": "reverse_kl"}, 0.0), ({"f_divergence": "alpha_divergence"}, 1e-4)]
)
def test_f_dpo_is_dpo(options, near):
    """The reverse KL, and the alpha-divergence as alpha -> 1 from both sides."""
    items = batch()
    dpo = objectives.get("dpo")(inputs(items)).losses
    for f_alpha in (1.0, 1 + 1e-9, 1 - near, 1 + near):
        losses = objectives.get("f_dpo")(inputs(items), f_alpha=f_alpha, **options).losses
        torch.testing.assert_close(losses, dpo, rtol=100 * near, atol=0)
        for ours, theirs in zip(gradients(losses, items), gradients(dpo, items), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=100 * near, atol=1e-15)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_f_dpo_stays_finite(name):
    """Log-ratios of 1,000 nats either way, in fp32."""
    for h in (1e3, -1e3):
        items = [pair(h, -h)]
        x = inputs(items)
        x = replace(x, logps=x.logps.float(), ref_logps=x.ref_logps.float())
        losses = objectives.get("f_dpo")(x, f_divergence=name).losses
        assert torch.isfinite(losses).all() and all(torch.isfinite(g).all() for g in gradients(losses, items))


# --- WPO ---


def test_wpo_from_the_whole_distribution():
    """sharp_logps from the head at temperature 1/2, against log sum_v p_v^2 of a full softmax, fp64."""
    items = batch()
    x = inputs(items)
    hidden = torch.randn(x.layout.num_tokens, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 8, dtype=torch.float64)
    targets = torch.randint(50, (x.layout.num_tokens,))
    x = replace(
        x,
        logps=linear_logps(hidden, head, targets),
        sharp_logps=linear_logps(hidden.detach(), head, targets, temperature=0.5),
    )
    result = objectives.get("wpo")(x, beta=0.3)

    p = (hidden @ head.T).softmax(-1)
    token = (p[range(len(targets)), targets].log() - p.square().sum(-1).log()).detach()
    ends = x.layout.response_token_offsets.tolist()
    v = [token[a:b].mean().exp() for a, b in pairwise(ends)]
    weights = torch.stack([v[n] * v[4 + n] for n in range(4)])
    logps = p[range(len(targets)), targets].log()
    h = torch.stack([(logps - x.ref_logps)[a:b].sum() for a, b in pairwise(ends)])
    expected = -weights * F.logsigmoid(0.3 * (h[:4] - h[4:8]))
    torch.testing.assert_close(result.losses, expected)
    torch.testing.assert_close(result.stats["on_policy"], weights)
    grads = [torch.autograd.grad(loss.sum(), hidden, retain_graph=True)[0] for loss in (result.losses, expected)]
    torch.testing.assert_close(*grads)


def test_wpo_of_an_even_distribution_is_dpo():
    """Where every token is as likely as the others, each answer is what the policy would give: weight 1."""
    x = inputs(batch())
    even = replace(x, sharp_logps=x.logps.detach())
    result = objectives.get("wpo")(even)
    assert torch.equal(result.stats["on_policy"], torch.ones(4, dtype=torch.float64))
    assert torch.equal(result.losses, objectives.get("dpo")(x).losses)


# --- ORPO ---


def test_orpo_by_hand():
    items = batch()
    result = objectives.get("orpo")(inputs(items), beta=0.3)
    expected, nll = [], []
    for i in items:
        p, q = (math.exp(i[role].logps.mean().item()) for role in (0, 1))
        ratio = math.log(p / (1 - p)) - math.log(q / (1 - q))
        nll.append(-math.log(p))
        expected.append(nll[-1] + 0.3 * math.log1p(math.exp(-ratio)))
    torch.testing.assert_close(result.losses, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(result.stats["nll"], torch.tensor(nll, dtype=torch.float64))


@pytest.mark.parametrize("log_p", [0.0, -1e-30, -1e-9, -1e-7, -0.6931, -0.6932, -50.0, -1e4])
def test_orpo_of_certain_and_hopeless_responses(log_p):
    """fp32 against fp64; log(1 - exp(x)) and its gradient written naively are 0/0 near 0."""
    chosen, rejected = torch.tensor([log_p]), torch.tensor([-1.0])
    results = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(0)
        items = [{r: answer([1], generator, dtype, logps=v.to(dtype)) for r, v in enumerate((chosen, rejected))}]
        losses = objectives.get("orpo")(inputs(items), beta=0.5).losses
        results.append([losses, *gradients(losses, items)[::2]])
    for single, double in zip(*results, strict=True):
        assert torch.isfinite(single).all()
        if log_p == -1e-30:
            continue  # beyond the least log-probability whose odds have a gradient in fp32
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)


# --- KTO ---


def test_kto_by_hand():
    items = batch()
    good = torch.tensor([True, False, False, True])
    result = objectives.get("kto")(
        inputs(items, desirable=good), beta=0.3, desirable_weight=2.0, undesirable_weight=0.5
    )
    z = max(0.0, sum(i[1].h.item() for i in items) / 4)
    expected = [
        (2.0 if good[n] else 0.5) / (1 + math.exp((1 if good[n] else -1) * 0.3 * (i[0].h.item() - z)))
        for n, i in enumerate(items)
    ]
    torch.testing.assert_close(result.losses, torch.tensor(expected, dtype=torch.float64))
    assert float(result.stats["kl"]) == pytest.approx(z)
    others = [g for i in items for g in gradients(result.losses, [i])[2:4]]
    assert not any(g.abs().sum() for g in others)  # z is a constant


@pytest.mark.parametrize("sign", [1, -1])
def test_kto_estimate_is_never_negative(sign):
    items = [pair(0.3, sign * 2.0), pair(-0.2, sign * 1.0)]
    result = objectives.get("kto")(inputs(items))
    assert float(result.stats["kl"]) == pytest.approx(1.5 if sign > 0 else 0.0)
