"""The oracle itself: numbers worked out by hand, and gradcheck. Everything else is judged against it."""

from __future__ import annotations

import math

import pytest
import torch
from strategies import lean_layout
from torch import tensor
from torch.autograd import gradcheck

from aspo_kernels import SentenceLayout, reference

LN2, LN3 = math.log(2), math.log(3)


def close(got, expected, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        torch.as_tensor(got, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


def test_token_logps_by_hand():
    # logits (0, ln 2, ln 3): exponentials 1, 2, 3, sum 6, so probabilities 1/6, 1/3, 1/2
    logits = tensor([[0.0, LN2, LN3]] * 3, dtype=torch.float64)
    close(reference.token_logps(logits, tensor([0, 1, 2])), [-math.log(6), -math.log(3), -math.log(2)])


def test_logits_by_hand():
    # x = (1, 2), W = ((1, 0), (0, 1), (1, -1)): x W^T = (1, 2, -1); bias (0, 1, 0) gives (1, 3, -1);
    # times logit_scale 2: (2, 6, -2); capped at 4: 4 tanh(z / 4); over temperature 2: 2 tanh(z / 4)
    hidden, head = tensor([[1.0, 2.0]]).double(), tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]).double()
    bias = tensor([0.0, 1.0, 0.0]).double()
    close(reference.logits(hidden, head), [[1, 2, -1]])
    close(reference.logits(hidden, head, bias, logit_scale=2.0), [[2, 6, -2]])
    capped = [[2 * math.tanh(0.5), 2 * math.tanh(1.5), 2 * math.tanh(-0.5)]]
    close(reference.logits(hidden, head, bias, logit_scale=2.0, softcap=4.0, temperature=2.0), capped)


def test_linear_logps_by_hand():
    # x = 1 (H = 1), W = (0, ln 2, ln 3)^T: the logits of the first test; temperature 1/2 squares the exponentials:
    # 1, 4, 9, sum 14
    head = tensor([[0.0], [LN2], [LN3]]).double()
    one = torch.ones(1, 1, dtype=torch.float64)
    close(reference.linear_logps(one, head, tensor([1])), [-LN3], 1e-7)  # the head was rounded to fp32 first
    close(reference.linear_logps(one, head, tensor([1]), temperature=0.5), [math.log(4 / 14)], 1e-7)


def test_linear_logps_gradient_by_hand():
    # d logp_y / d x = W[y] - sum_v p_v W[v]. Logits (0, ln 2, ln 3), p = (1/6, 1/3, 1/2), W = (0, ln 2, ln 3), x = 1:
    # at y = 2 that is ln 3 - (ln 2 / 3 + ln 3 / 2) = ln 3 / 2 - ln 2 / 3, and d / d W = (1[y] - p) x, which is
    # (-1/6, -1/3, 1/2)
    head = tensor([[0.0], [LN2], [LN3]], dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    reference.linear_logps(hidden, head, tensor([2])).sum().backward()
    close(hidden.grad, [[LN3 / 2 - LN2 / 3]])
    close(head.grad, [[-1 / 6], [-1 / 3], [1 / 2]])


def test_sums_by_hand():
    layout = lean_layout([[2, 1], [3]])
    values = torch.arange(1.0, 7.0)
    close(reference.sentence_sums(values, layout), [1 + 2, 3, 4 + 5 + 6])
    close(reference.response_sums(values, layout), [6, 15])


def test_minmax_by_hand():
    close(reference.minmax([1.0, 3.0, 2.0]), [0, 1, 0.5])
    close(reference.minmax([7.0]), [0])
    close(reference.minmax([0.2, 0.2 + 0.9e-5]), [0, 0])  # a spread of 1e-5 or less says nothing
    close(reference.minmax([0.0, 1.1e-5]), [0, 1])


def test_perplexity_scores_by_hand():
    # nll ln 2, ln 3, ln 4 are perplexities 2, 3, 4; minmax of -2, -3, -4 is 1, 1/2, 0
    nlls = [LN2, LN3, math.log(4)]
    close(reference.perplexity_scores(nlls), [1, 0.5, 0])
    # on the nll scale the middle one is (ln 4 - ln 3) / (ln 4 - ln 2)
    close(reference.perplexity_scores(nlls, "nll"), [1, math.log(4 / 3) / LN2, 0])
    close(reference.perplexity_scores([1.0, 1.0 + 1e-6]), [0, 0])
    # exp(800) overflows even fp64; the expm1 form does not: 1, (e^-400 - 1) / (e^-800 - 1) = 1, 0
    close(reference.perplexity_scores([0.0, 400.0, 800.0]), [1, 1, 0])


def test_perplexity_scores_are_minmax_of_minus_perplexity():
    nlls = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(5).tolist()
    direct = reference.minmax([-math.exp(nll) for nll in nlls])
    close(reference.perplexity_scores(nlls), direct, 1e-10)


def test_aspo_weights_by_hand():
    nlls, similarity = [LN2, LN3, math.log(4)], [0.3, 0.1, 0.2]  # PPL' = 1, 1/2, 0 and S' = 1, 0, 1/2
    close(reference.aspo_weights(similarity, nlls, alpha=0.5), [1, 0.25, 0.25])
    close(reference.aspo_weights(similarity, nlls, alpha=1.0), [1, 0, 0.5])  # ASPO-S
    close(reference.aspo_weights(similarity, nlls, alpha=0.0), [1, 0.5, 0])  # ASPO-P
    close(reference.aspo_weights(similarity, nlls, alpha=0.25), [1, 0.375, 0.125])
    close(reference.aspo_weights(None, nlls, alpha=1.0), [1, 0.5, 0])  # ASPO-P whatever alpha is


def test_length_ratio_by_hand():
    weights, ratios, lengths = [1.0, 0.0, 0.5], [2.0, 1.0, 4.0], [4, 2, 2]
    close(reference.length_ratio(weights, ratios, lengths, "none"), 1)
    close(reference.length_ratio(weights, ratios, lengths, "sentence"), 3 / 4.5)  # K / (2 + 1 + 1.5)
    close(reference.length_ratio(weights, ratios, lengths, "token"), 8 / 13)  # 8 / (2*4 + 1*2 + 1.5*2)
    close(reference.length_ratio(weights, ratios, lengths, "reward"), 7 / 11)  # 7 / (2*2 + 1*1 + 1.5*4)
    # clamped to [1/2, 1]: (-1 + 3) / (2*-1 + 3) = 2 -> 1, and (3 - 1.9) / (2*3 - 1.9) = 1.1 / 4.1 -> 1/2
    close(reference.length_ratio([1.0, 0.0], [-1.0, 3.0], [1, 1], "reward"), 1)
    close(reference.length_ratio([1.0, 0.0], [3.0, -1.9], [1, 1], "reward"), 0.5)
    # falls back to `sentence`, 2 / 3: a denominator of 0 (step 0), and a ratio that is not positive, (2 - 3) / (4 - 3)
    close(reference.length_ratio([1.0, 0.0], [0.0, 0.0], [1, 1], "reward"), 2 / 3)
    close(reference.length_ratio([1.0, 0.0], [2.0, -3.0], [1, 1], "reward"), 2 / 3)
    with pytest.raises(ValueError, match="normalizer 'words'"):
        reference.length_ratio(weights, ratios, lengths, "words")


def hand_made() -> tuple[SentenceLayout, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pair: chosen sentences of 2, 1 and 1 tokens, a rejected response of 2 tokens in one sentence."""
    layout = lean_layout([[2, 1, 1], [2]])
    logps = -tensor([LN2, LN2, LN3, math.log(4), 1.0, 2.0], dtype=torch.float64)
    ref_logps = logps - tensor([1.0, 2.0, 1.0, 4.0, 0.5, 0.25], dtype=torch.float64)
    return layout, logps, ref_logps, tensor([0.3, 0.1, 0.2])


def test_aspo_loss_by_hand():
    layout, logps, ref_logps, similarity = hand_made()
    # mean nll of the chosen sentences: ln 2, ln 3, ln 4, so w = (1, 1/4, 1/4) as above;
    # h = (3, 1, 4), h(y_r) = 3/4; R = 3 / (2 + 5/4 + 5/4) = 2/3
    # sum (1 + w) h = 6 + 5/4 + 5 = 49/4; M* = 0.1 (2/3 * 49/4 - 3/4) = 0.1 * (49/6 - 3/4) = 0.1 * 89/12
    out = reference.aspo_loss(logps, ref_logps, layout, similarity, beta=0.1, alpha=0.5)
    close(out["sentence_weights"], [1, 0.25, 0.25], 1e-6)  # the similarities are fp32
    close(out["sentence_logratios"], [3, 1, 4])
    close(out["margins"], [89 / 120], 1e-6)
    close(out["losses"], [math.log1p(math.exp(-89 / 120))], 1e-6)
    # token: |s| = (2, 1, 1), R = 4 / (4 + 5/4 + 5/4) = 8/13
    token = reference.aspo_loss(logps, ref_logps, layout, similarity, normalizer="token")
    close(token["margins"], [0.1 * (8 / 13 * 49 / 4 - 0.75)], 1e-6)
    # reward: R = 8 / (49/4) = 32/49, which makes the chosen side plain again
    reward = reference.aspo_loss(logps, ref_logps, layout, similarity, normalizer="reward")
    close(reward["margins"], [0.1 * (8 - 0.75)], 1e-6)
    none = reference.aspo_loss(logps, ref_logps, layout, similarity, normalizer="none")
    close(none["margins"], [0.1 * (49 / 4 - 0.75)], 1e-6)


def test_aspo_loss_reads_the_reference_perplexity_and_the_mask():
    layout, logps, ref_logps, _ = hand_made()
    # the reference's mean nll: (ln 2 + 1 + ln 2 + 2) / 2 = 2.193, ln 3 + 1 = 2.099, ln 4 + 4 = 5.386
    nlls = [LN2 + 1.5, LN3 + 1, math.log(4) + 4]
    out = reference.aspo_loss(logps, ref_logps, layout, None, perplexity="reference", perplexity_scale="nll")
    close(out["sentence_weights"], [(nlls[2] - nlls[0]) / (nlls[2] - nlls[1]), 1, 0])
    # without the first sentence's second token its nll is ln 2 + 1, and h is what it was
    mask = torch.ones(6, dtype=torch.bool)
    mask[1] = False
    masked = SentenceLayout(
        layout.targets,
        layout.hidden_index,
        layout.sentence_offsets,
        layout.response_offsets,
        layout.group,
        layout.role,
        mask,
    )
    out = reference.aspo_loss(logps, ref_logps, masked, None, perplexity="reference", perplexity_scale="nll")
    close(out["sentence_weights"], [1, (nlls[2] - nlls[1]) / (nlls[2] - LN2 - 1), 0])
    close(out["sentence_logratios"], [3, 1, 4])


def test_dpo_loss_by_hand():
    layout, logps, ref_logps, _ = hand_made()
    m = 0.1 * (8 - 0.75)
    close(reference.dpo_loss(logps, ref_logps, layout), [math.log1p(math.exp(-m))])
    smoothed = 0.9 * math.log1p(math.exp(-m)) + 0.1 * math.log1p(math.exp(m))
    close(reference.dpo_loss(logps, ref_logps, layout, label_smoothing=0.1), [smoothed])


@pytest.mark.parametrize("epilogue", [{}, {"logit_scale": 0.7, "temperature": 1.3}, {"softcap": 2.0}])
def test_linear_logps_gradcheck(epilogue):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3), (5, 3), (5,))
    hidden, head, bias = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    targets = tensor([0, 4, 2, 2])
    assert gradcheck(lambda x, w, b: reference.linear_logps(x, w, targets, b, **epilogue), (hidden, head, bias))


@pytest.mark.parametrize("normalizer", ["sentence", "token", "none"])
def test_aspo_loss_gradcheck_with_the_reference_perplexity(normalizer):
    """Weights from the reference are constants, so that the numerical gradient sees no more than the stated one."""
    layout = lean_layout([[2, 1, 3], [1, 1], [2, 2], [3]])
    generator = torch.Generator().manual_seed(1)
    logps, ref_logps = -torch.rand(2, layout.num_tokens, generator=generator, dtype=torch.float64) * 4
    similarity = torch.rand(5, generator=generator)

    def losses(values):
        return reference.aspo_loss(
            values, ref_logps, layout, similarity, beta=0.5, normalizer=normalizer, perplexity="reference"
        )["losses"]

    assert gradcheck(losses, logps.requires_grad_())
    assert gradcheck(lambda values: reference.dpo_loss(values, ref_logps, layout, 0.5, 0.2), logps)
