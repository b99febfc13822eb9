"""Which images of a pool become a row's negatives: MISP-DPO's score and greedy diverse choice (arXiv 2509.25717).

    s_i  = error_i / max_j error_j + ||z_i||_1 / max_j ||z_j||_1            over the row's candidates
    next = argmax_i [ s_i + beta_div * min_{j picked} (1 - cos(c_i, c_j)) ]    min over nothing picked = 0
    q    = softmax(s / temperature)                                          over the row's candidates

z_i = E(d_i) and error_i = ||d_i - dhat_i||^2 come from `sae`. Ours: c_i = z_i - mean z of the deviations that the
autoencoder was trained on (uncentred sigmoid codes all look alike: each is near rho), beta_div 1, and q, which the
paper's estimator divides by but which a greedy choice does not have; temperature 1.

Axes: B rows, C candidates of a row, N picks, J latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aspo.negatives.sae import BilinearSae

LOW_RANGE = 0.05  # a median diversity term that varies less than this does not tell candidates apart
TINY = 1e-12  # an error or a norm below this divides nothing


class Selection(NamedTuple):
    """The picks of B rows, in the order in which they were picked."""

    picks: Tensor  # (B, N) int64, places among the row's candidates
    log_q: Tensor  # (B, N) fp32, log of the density at the picks
    diversity_range: Tensor  # (B,) fp32: greatest minus least 1 - cos to the first pick among the others; NaN if N is 1


def scores(error: Tensor, codes: Tensor, allowed: Tensor) -> Tensor:
    """s, (B, C) in [0, 2]; -inf where a candidate is not allowed.

    error: (B, C). codes: (B, C, J). allowed: (B, C) bool, at least one of each row.
    """
    terms = []
    for value in (error.clamp_min(0), codes.sum(-1)):
        value = value.masked_fill(~allowed, 0)
        terms.append(value / value.amax(1, keepdim=True).clamp_min(TINY))
    return (terms[0] + terms[1]).masked_fill(~allowed, -torch.inf)


def greedy_diverse(score: Tensor, centred: Tensor, count: int, beta_div: float = 1.0) -> tuple[Tensor, Tensor]:
    """Pick `count` distinct candidates of each row; returns picks (B, count) and the diversity term's range (B,).

    Of equal candidates the first is picked. score: (B, C), -inf = never. centred: (B, C, J).

    Raises:
        ValueError: a row has fewer than `count` candidates, or a score is NaN.
    """
    if score.isnan().any():
        raise ValueError("a score is NaN: the autoencoder or the features are not finite")
    open_ = score > -torch.inf
    if (short := open_.sum(1) < count).any():
        row = int(short.nonzero()[0])
        raise ValueError(f"row {row} has {int(open_[row].sum())} candidates; {count} were asked")
    unit = torch.nn.functional.normalize(centred, dim=-1)
    nearest = torch.zeros_like(score)  # min over the picked of 1 - cos
    spread = score.new_full((len(score),), torch.nan)
    picks: list[Tensor] = []
    for n in range(count):
        gain = (score + beta_div * nearest).masked_fill(~open_, -torch.inf)
        # argmax may return any of equal values; the least place of the greatest value is the same on every machine
        pick = (gain == gain.amax(1, keepdim=True)).to(torch.int8).argmax(1)
        picks.append(pick)
        open_ = open_.scatter(1, pick.unsqueeze(1), False)
        picked = unit.gather(1, pick.view(-1, 1, 1).expand(-1, 1, unit.shape[-1]))
        distance = 1 - (unit * picked).sum(-1)
        if n == 0 and count > 1:
            spread = distance.masked_fill(~open_, -torch.inf).amax(1) - distance.masked_fill(~open_, torch.inf).amin(1)
        nearest = distance if n == 0 else torch.minimum(nearest, distance)
    return torch.stack(picks, 1), spread


def log_density(score: Tensor, temperature: float = 1.0) -> Tensor:
    """log q, (B, C): log softmax(s / temperature); -inf where not allowed."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    return torch.log_softmax(score / temperature, dim=1)


@torch.no_grad()
def select(
    sae: BilinearSae,
    dv: Tensor,
    text: Tensor,
    allowed: Tensor,
    count: int,
    *,
    beta_div: float = 1.0,
    temperature: float = 1.0,
) -> Selection:
    """Score and pick for B rows at once.

    Args:
        dv: (B, C, d_v), the right image's features minus each candidate's.
        text: (B, d_t), the prompts' features.
        allowed: (B, C) bool, False for candidates that may not be picked (the image itself, near duplicates).
        count: N.
    """
    prompts = text.unsqueeze(1)
    codes = sae.codes(dv, prompts)
    score = scores(sae.error(dv, prompts, codes), codes, allowed)
    picks, spread = greedy_diverse(score, codes - sae.code_mean, count, beta_div)
    return Selection(picks, log_density(score, temperature).gather(1, picks), spread)
