"""Objectives that read the chosen response under other images, or other tokens under its own: MISP-DPO, mDPO, POVID.

h_i is the log-ratio of the response of role 2 + i. Axes: B items, Q negatives of an item at most, R responses.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from aspo_kernels.checks import check_choice, check_finite, check_positive
from aspo_kernels.objectives import Inputs, Result, register

IMPORTANCE = ("none", "self", "printed")
MIN_LOG_Q = math.log(1e-6)  # a density below this would make one negative the whole loss


@register("misp", reads=["negative_log_q"], reads_negatives=True)
def misp(
    x: Inputs, beta: float = 0.5, text_weight: float = 1.0, image_weight: float = 1.0, importance: str = "none"
) -> Result:
    """image_weight softplus(logsumexp_i a_i) - text_weight log sigmoid(beta (h(y_c) - h(y_r))).

    a_i = beta (h_i - h(y_c)).
    Plackett-Luce with the right image first; one negative is image DPO. importance: "none"; "self" adds
    l_i = -log q_i - logsumexp_j(-log q_j) + log Q to a_i, so that the gradient's weights are softmax(a - log q);
    "printed" has the gradient beta sigmoid(logsumexp a) sum_i (e^{a_i} / q_i) grad(h_i - h(y_c)) as the paper prints
    it, for comparison: its scale grows with 1 / q. log q is cut at log 1e-6.  (MISP-DPO, arXiv 2509.25717)
    """
    check_positive("beta", beta)
    for name, value in (("text_weight", text_weight), ("image_weight", image_weight)):
        check_finite(name, value)
    check_choice("importance", importance, IMPORTANCE)
    h = x.response_logratios
    chosen, rejected = x.pair(h)
    there = _present(x)
    given = there.any(1)
    # An item without negatives (text alone) goes along with zeros, since no gradient goes through an empty logsumexp.
    a = torch.where(there, beta * (x.negatives(h, 0.0) - chosen[:, None]), -torch.inf)
    a = torch.where(given[:, None], a, 0.0)
    there = there | ~given[:, None]
    if not a.shape[1]:
        image = torch.zeros_like(chosen)
    elif importance == "none":
        image = F.softplus(a.logsumexp(1))
    else:
        log_q = torch.where(there, x.negatives(x.need("negative_log_q").clamp(MIN_LOG_Q, 0.0), 0.0), torch.inf)
        image = _weighted_image_loss(a, log_q.to(a.dtype), there, importance)
    image = torch.where(given, image, 0.0)
    text = -F.logsigmoid(beta * (chosen - rejected))
    stats = {**x.reward_stats(beta), "image_losses": image.detach(), "text_losses": text.detach()}
    return Result(image_weight * image + text_weight * text, stats)


def _present(x: Inputs) -> Tensor:
    """(B, Q) bool: whether an item has the response of role 2 + i."""
    return x.negatives(torch.ones_like(x.lengths), 0.0) > 0


def image_margin(x: Inputs, per_response: Tensor) -> tuple[Tensor, Tensor]:
    """v(y_c) - v of the response of role 2, (B,), 0 where an item has none; and which have one, (B,) bool."""
    there = _present(x)
    if not there.shape[1]:
        return torch.zeros_like(x.pair(per_response)[0]), there.any(1)
    margin = x.pair(per_response)[0] - x.negatives(per_response, 0.0)[:, 0]
    return torch.where(there[:, 0], margin, 0.0), there[:, 0]


def _weighted_image_loss(a: Tensor, log_q: Tensor, there: Tensor, importance: str) -> Tensor:
    """The image term with importance weights, (B,); a and log_q are (B, Q), -inf and inf where there is no negative."""
    if importance == "self":
        count = there.sum(1, keepdim=True).to(a.dtype)
        l = -log_q - torch.logsumexp(-log_q, 1, keepdim=True) + count.log()  # noqa: E741  methods' own letter
        return F.softplus((a + l).logsumexp(1))
    total = a.logsumexp(1)
    weights = torch.sigmoid(total)[:, None] * torch.exp(a - log_q)  # the paper's gradient, over that of a
    finite = torch.where(there, a, 0.0)
    surrogate = torch.where(there, weights.detach() * (finite - finite.detach()), 0.0).sum(1)
    return F.softplus(total).detach() + surrogate


@register("mdpo", reads_negatives=True)
def mdpo(x: Inputs, beta: float = 0.1, anchor: float = 0.0) -> Result:
    """-log sigmoid(beta (h(y_c) - h(y_r))) - log sigmoid(beta (h(y_c) - h_0)) - log sigmoid(beta h(y_c) - anchor).

    h_0 is the chosen response under a random crop of the image (0.01 to 0.2 of it).  (mDPO, arXiv 2406.11839)
    """
    check_positive("beta", beta)
    check_finite("anchor", anchor)
    chosen, rejected = x.pair(x.response_logratios)
    image, there = image_margin(x, x.response_logratios)
    terms = {
        "text_losses": -F.logsigmoid(beta * (chosen - rejected)),
        "image_losses": torch.where(there, -F.logsigmoid(beta * image), 0.0),
        "anchor_losses": -F.logsigmoid(beta * chosen - anchor),
    }
    losses = torch.stack([*terms.values()]).sum(0)
    return Result(losses, {**x.reward_stats(beta), **{name: value.detach() for name, value in terms.items()}})


@register("povid", reads_negatives=True)
def povid(x: Inputs, beta: float = 0.1, image_weight: float = 0.5) -> Result:
    """-(1 - v) log sigmoid(beta (h(y_c) - h(y_r))) - v log sigmoid(beta (h(y_c) - h_0)), v = image_weight.

    h_0 is of the tokens that the model finds likeliest after each start of y_c when the image is noised, scored under
    the clean one.  (POVID, arXiv 2402.11411; there policy and reference each find their own at every step, here the
    tokens are found once, before training)
    """
    check_positive("beta", beta)
    if not 0.0 <= image_weight <= 1.0:
        raise ValueError(f"image_weight is {image_weight}; it must be in [0, 1]")
    chosen, rejected = x.pair(x.response_logratios)
    text = -F.logsigmoid(beta * (chosen - rejected))
    image_margins, there = image_margin(x, x.response_logratios)
    image = torch.where(there, -F.logsigmoid(beta * image_margins), 0.0)
    stats = {**x.reward_stats(beta), "text_losses": text.detach(), "image_losses": image.detach()}
    return Result((1 - image_weight) * text + image_weight * image, stats)
