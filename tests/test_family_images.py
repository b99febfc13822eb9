"""MISP-DPO, mDPO and POVID: what must hold for each, against its equation written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from items import Item, answer, at_the_reference, batch, gradients, inputs, item

from aspo_kernels import objectives

LN2 = math.log(2)


def misp(items, **options):
    return objectives.get("misp")(inputs(items), **options)


def exponents(i: Item, beta: float) -> torch.Tensor:
    """a_i = beta (h(y_p | m_n^i) - h(y_p | m_p)), (N,)."""
    return torch.stack([beta * (i[role].h - i[0].h) for role in sorted(i)[2:]])


def text_loss(i: Item, beta: float) -> torch.Tensor:
    return -F.logsigmoid(beta * (i[0].h - i[1].h))


def assert_same(losses: torch.Tensor, expected: torch.Tensor, items: list[Item], **tolerance: float) -> None:
    """Values, and the gradient of every log-probability."""
    torch.testing.assert_close(losses, expected, **tolerance)
    for ours, theirs in zip(gradients(losses, items), gradients(expected, items), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


# --- MISP-DPO ---


@pytest.mark.parametrize("importance", ["none", "self", "printed"])
@pytest.mark.parametrize("count", range(1, 17))
def test_misp_first_step_is_log_of_1_plus_n(importance, count):
    items = at_the_reference([item([2, 1], [3], count, seed) for seed in range(3)])
    for text_weight in (0.0, 1.0, 0.5):
        losses = misp(items, importance=importance, text_weight=text_weight).losses
        expected = torch.full((3,), math.log(1 + count) + text_weight * LN2, dtype=torch.float64)
        torch.testing.assert_close(losses, expected, rtol=1e-14, atol=0)


def test_misp_first_step_of_items_with_different_numbers_of_negatives():
    """Three, none, one and two in one batch; without any there is text alone."""
    for importance in ("none", "self"):
        result = misp(at_the_reference(batch()), importance=importance)
        image = torch.tensor([math.log(4), 0.0, math.log(2), math.log(3)], dtype=torch.float64)
        torch.testing.assert_close(result.stats["image_losses"], image, rtol=1e-14, atol=0)
        torch.testing.assert_close(result.losses, image + LN2, rtol=1e-14, atol=0)


def test_misp_by_the_equation():
    items = batch()
    result = misp(items, beta=0.3, text_weight=0.7, image_weight=0.4)
    image = [F.softplus(torch.logsumexp(exponents(i, 0.3), 0)) if len(i) > 2 else torch.zeros(()) for i in items]
    expected = torch.stack([0.4 * part + 0.7 * text_loss(i, 0.3) for part, i in zip(image, items, strict=True)])
    assert_same(result.losses, expected, items)


def test_misp_is_plackett_luce_with_the_right_image_first():
    """-log of e^{r_p} / (e^{r_p} + sum_i e^{r_i}), r = beta h; one negative is DPO between the images."""
    items = [item([3], [2], n, seed=n) for n in (1, 4)]
    losses = misp(items, beta=0.6, text_weight=0.0).losses
    rewards = [torch.stack([0.6 * i[role].h for role in sorted(i) if role != 1]) for i in items]
    assert_same(losses, torch.stack([-r.log_softmax(0)[0] for r in rewards]), items)
    one = items[:1]
    dpo = objectives.get("dpo")(inputs([{0: one[0][0], 1: one[0][2]}]), beta=0.6).losses
    torch.testing.assert_close(misp(one, beta=0.6, text_weight=0.0).losses, dpo)


def test_misp_gradient_is_lemma_4_1():
    """beta sigmoid(logsumexp a) sum_i p_i (grad logp(y_p | m_n^i) - grad logp(y_p | m_p)), p = softmax(a)."""
    items = [item([2, 2], [1], 3, seed=5)]
    (i,) = items
    a = exponents(i, 0.5).detach()
    scale, p = 0.5 * torch.sigmoid(a.logsumexp(0)), a.softmax(0)
    grads = gradients(misp(items, text_weight=0.0).losses, items)[::2]  # of the log-probabilities: one a response
    torch.testing.assert_close(grads[0], (-scale).expand(4))  # sum_i p_i = 1
    assert not grads[1].any()
    for n, grad in enumerate(grads[2:]):
        torch.testing.assert_close(grad, (scale * p[n]).expand(4))


def with_density(i: Item, *q: float) -> Item:
    """The negatives' densities."""
    return {role: a if role < 2 else replace(a, log_q=math.log(q[role - 2])) for role, a in i.items()}


def test_misp_self_normalised_weights():
    """a_i + l_i, l_i = -log q_i - logsumexp_j(-log q_j) + log N: the gradient's weights are softmax(a - log q)."""
    q = torch.tensor([0.5, 0.02, 0.2], dtype=torch.float64)
    items = [with_density(item([2], [3], 3, seed=1), *q.tolist())]
    a = exponents(items[0], 0.5)
    l_i = -q.log() - (1 / q).sum().log() + math.log(3)
    losses = misp(items, importance="self", text_weight=0.0).losses
    assert_same(losses, F.softplus((a + l_i).logsumexp(0))[None], items)
    grads = torch.stack([g[0] for g in gradients(losses, items)[4::2]])
    torch.testing.assert_close(grads / grads.sum(), (a.detach() - q.log()).softmax(0))


def test_misp_self_is_none_for_one_negative_or_equal_densities():
    one = [with_density(item([2], [3], 1, seed=1), 1e-4), item([1], [1], 0, seed=2)]
    equal = [with_density(item([2], [3], 4, seed=1), *[0.03] * 4), with_density(item([4], [3], 1, seed=3), 0.9)]
    for items in (one, equal):
        assert_same(misp(items, importance="self").losses, misp(items).losses, items, rtol=1e-13, atol=1e-15)


def test_misp_printed_gradient():
    """beta sigmoid(logsumexp a) sum_i (e^{a_i} / q_i) Delta_i, and the loss of `none`."""
    q = [0.5, 0.02, 0.2]
    items = [with_density(item([2], [3], 3, seed=1), *q), item([1], [2], 0, seed=2)]
    a = exponents(items[0], 0.5).detach()
    result = misp(items, importance="printed", text_weight=0.0)
    torch.testing.assert_close(result.losses, misp(items, text_weight=0.0).losses)
    scale = 0.5 * torch.sigmoid(a.logsumexp(0)) * a.exp() / torch.tensor(q, dtype=torch.float64)
    grads = gradients(result.losses, items)[::2]
    torch.testing.assert_close(grads[0], -scale.sum().expand(2))
    for n, grad in enumerate(grads[2:5]):
        torch.testing.assert_close(grad, scale[n].expand(2))
    assert not any(grad.any() for grad in grads[5:])


def test_misp_densities_are_cut_at_1e_6():
    items = [[with_density(item([2], [3], 2, seed=1), q, 0.5)] for q in (1e-30, 1e-6)]
    for importance in ("self", "printed"):
        results = [gradients(misp(i, importance=importance).losses, i) for i in items]
        assert all(torch.equal(*both) for both in zip(*results, strict=True))


@given(st.integers(0, 10_000), st.integers(1, 16), st.floats(0.01, 3.0))
def test_misp_order_of_the_negatives_is_nothing(seed, count, beta):
    first = item([2, 1], [2], count, seed)
    turned = {role: first[role] if role < 2 else first[2 + (role - 1) % count] for role in first}
    for importance in ("none", "self"):
        losses = [misp([i], beta=beta, importance=importance).losses for i in (first, turned)]
        torch.testing.assert_close(*losses)


def test_misp_of_far_apart_images_stays_finite():
    """Thousands of nats between the images, in fp32: e^a overflows, its log-sum does not."""
    for gap in (5e3, -5e3):
        near = item([4], [2], 3, seed=0, dtype=torch.float32)
        far = {r: a if r < 2 else replace(a, ref_logps=a.ref_logps - gap) for r, a in near.items()}
        for importance in ("none", "self"):
            losses = misp([far], importance=importance).losses
            assert torch.isfinite(losses).all() and all(torch.isfinite(g).all() for g in gradients(losses, [far]))


# --- identical images ---


def with_the_same_image(weights: torch.Tensor, dtype: torch.dtype = torch.float64) -> Item:
    """An item whose other image is its own: both readings are the same numbers, of one parameter."""
    generator = torch.Generator().manual_seed(2)
    chosen, rejected = (answer([n], generator, dtype) for n in (weights.numel(), 2))
    chosen = replace(chosen, logps=-weights.square())
    return {0: chosen, 1: rejected, 2: replace(chosen)}


@pytest.mark.parametrize(
    ("name", "options"), [("mdpo", {}), ("povid", {}), *(("misp", {"importance": i}) for i in ("none", "self"))]
)
def test_identical_images_give_ln_2_and_no_gradient(name, options):
    """What is left is the gradient of the other terms: DPO on the text, and mDPO's anchor."""
    weights = torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64, requires_grad=True)
    items = [with_the_same_image(weights)]
    result = objectives.get(name)(inputs(items), beta=0.4, **options)
    torch.testing.assert_close(
        result.stats["image_losses"], torch.tensor([LN2], dtype=torch.float64), rtol=1e-15, atol=0
    )
    others = text_loss(items[0], 0.4) * (0.5 if name == "povid" else 1.0)
    if name == "mdpo":
        others = others - F.logsigmoid(0.4 * items[0][0].h)
    grads = [torch.autograd.grad(loss.sum(), weights, retain_graph=True)[0] for loss in (result.losses, others)]
    torch.testing.assert_close(*grads, rtol=1e-14, atol=1e-16)


# --- mDPO, POVID ---


def test_mdpo_by_the_equation():
    """DPO + DPO between the images + anchor, all with weight 1; the crop is the first negative."""
    items = batch()
    result = objectives.get("mdpo")(inputs(items), beta=0.3, anchor=0.2)
    expected = []
    for i in items:
        image = -F.logsigmoid(0.3 * (i[0].h - i[2].h)) if 2 in i else 0.0
        expected.append(text_loss(i, 0.3) + image - F.logsigmoid(0.3 * i[0].h - 0.2))
    assert_same(result.losses, torch.stack(expected), items)
    parts = [result.stats[f"{name}_losses"] for name in ("text", "image", "anchor")]
    torch.testing.assert_close(sum(parts), result.losses.detach())


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_povid_by_the_equation(weight):
    items = batch()
    losses = objectives.get("povid")(inputs(items), beta=0.3, image_weight=weight).losses
    expected = []
    for i in items:
        image = -F.logsigmoid(0.3 * (i[0].h - i[2].h)) if 2 in i else 0.0
        expected.append((1 - weight) * text_loss(i, 0.3) + weight * image)
    assert_same(losses, torch.stack(expected), items)
