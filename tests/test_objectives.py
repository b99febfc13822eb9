"""The objectives: each against its formula written out with Python floats, and the registry."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from strategies import Ragged, lean_layout, ragged_batches

from aspo_kernels import SentenceLayout, objectives
from aspo_kernels.objectives import Inputs, Result

LENGTHS = [[2, 1, 3], [1, 1], [4, 2], [3]]  # two pairs: chosen of 6 and 2 tokens, rejected of 6 and 3


def inputs(dtype: torch.dtype = torch.float64, lengths=LENGTHS, reference: bool = True) -> Inputs:
    layout = lean_layout(lengths)
    generator = torch.Generator().manual_seed(3)
    logps, ref_logps = (-5 * torch.rand(2, layout.num_tokens, generator=generator, dtype=torch.float64)).to(dtype)
    similarity = torch.rand(layout.chosen_sentences.numel(), generator=generator)
    return Inputs(layout, logps.requires_grad_(), ref_logps if reference else None, similarity)


def sums(x: Inputs) -> list[tuple[float, float, float, float, int, int]]:
    """Per pair: policy and reference log-probabilities of chosen and rejected, and their lengths, added by hand."""
    offsets = x.layout.response_token_offsets.tolist()
    total = [[sum(v[a:b].tolist()) for a, b in pairwise(offsets)] for v in (x.logps, x.ref_logps)]
    lengths = [b - a for a, b in pairwise(offsets)]
    half = len(lengths) // 2
    return [
        (total[0][i], total[1][i], total[0][half + i], total[1][half + i], lengths[i], lengths[half + i])
        for i in range(half)
    ]


def log_sigmoid(m: float) -> float:
    return -math.log1p(math.exp(-m)) if m > 0 else m - math.log1p(math.exp(m))


FORMULAS = {
    ("dpo", ()): lambda c, rc, r, rr, nc, nr: -log_sigmoid(0.1 * (c - rc - r + rr)),
    ("dpo", (("beta", 0.7), ("label_smoothing", 0.2))): lambda c, rc, r, rr, nc, nr: (
        -0.8 * log_sigmoid(0.7 * (c - rc - r + rr)) - 0.2 * log_sigmoid(-0.7 * (c - rc - r + rr))
    ),
    ("ipo", (("beta", 0.3),)): lambda c, rc, r, rr, nc, nr: ((c - rc) / nc - (r - rr) / nr - 1 / 0.6) ** 2,
    ("hinge", (("beta", 0.1),)): lambda c, rc, r, rr, nc, nr: max(0.0, 1 - 0.1 * (c - rc - r + rr)),
    ("hinge", (("beta", 5.0),)): lambda c, rc, r, rr, nc, nr: max(0.0, 1 - 5.0 * (c - rc - r + rr)),
    ("simpo", ()): lambda c, rc, r, rr, nc, nr: -log_sigmoid(2.0 * (c / nc - r / nr) - 1.0),
    ("simpo", (("beta", 1.5), ("gamma", 0.2))): lambda c, rc, r, rr, nc, nr: (
        -log_sigmoid(1.5 * (c / nc - r / nr) - 0.2)
    ),
    ("sft", ()): lambda c, rc, r, rr, nc, nr: -c / nc,
}


@pytest.mark.parametrize(("name", "options"), FORMULAS, ids=str)
def test_formula(name, options):
    x = inputs()
    result = objectives.get(name)(x, **dict(options))
    expected = [FORMULAS[name, options](*pair) for pair in sums(x)]
    torch.testing.assert_close(result.losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert not any(v.requires_grad for v in result.stats.values())
    # the gradient: a central difference in every log-probability
    (gradient,) = torch.autograd.grad(result.losses.sum(), x.logps)
    step = 1e-6
    for token in range(x.layout.num_tokens):
        moved = []
        for sign in (1, -1):
            shifted = x.logps.detach().clone()
            shifted[token] += sign * step
            moved.append(objectives.get(name)(Inputs(x.layout, shifted, x.ref_logps), **dict(options)).losses.sum())
        assert abs((moved[0] - moved[1]) / (2 * step) - gradient[token]) < 1e-7


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "aspo"])
def test_reward_stats(name):
    x = inputs()
    stats = objectives.get(name)(x, beta=0.3).stats
    expected = torch.tensor([[0.3 * (c - rc), 0.3 * (r - rr)] for c, rc, r, rr, *_ in sums(x)], dtype=torch.float64)
    torch.testing.assert_close(stats["chosen_rewards"], expected[:, 0])
    torch.testing.assert_close(stats["rejected_rewards"], expected[:, 1])
    if name != "aspo":
        torch.testing.assert_close(stats["margins"], expected[:, 0] - expected[:, 1])


def test_other_stats():
    x = inputs()
    simpo = objectives.get("simpo")(x).stats
    expected = torch.tensor([[2 * c / nc, 2 * r / nr] for c, _, r, _, nc, nr in sums(x)], dtype=torch.float64)
    torch.testing.assert_close(simpo["chosen_rewards"], expected[:, 0])
    torch.testing.assert_close(simpo["margins"], expected[:, 0] - expected[:, 1])
    sft = objectives.get("sft")(x)
    assert torch.equal(sft.stats["nll"], sft.losses.detach())


@given(ragged_batches())
def test_dpo_is_ln_2_where_policy_is_reference(batch: Ragged):
    layout = batch.layout()
    logps = -torch.rand(layout.num_tokens, generator=batch.generator())
    for name in ("dpo", "aspo"):
        for options in ({}, {"beta": 3.0}):
            losses = objectives.get(name)(Inputs(layout, logps, logps.clone()), **options).losses
            torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=1e-7, atol=0)


def test_the_reference_is_subtracted_before_anything_is_summed():
    """20,000 tokens of about -5 each: differences of sums in fp32 would be off by 1e-2, sums of differences are not."""
    layout = lean_layout([[20_000], [20_000]])
    generator = torch.Generator().manual_seed(0)
    logps = -10 * torch.rand(40_000, generator=generator)
    ref_logps = logps + 1e-3 * torch.randn(40_000, generator=generator)
    x = Inputs(layout, logps, ref_logps)
    exact = (logps - ref_logps).double().view(2, -1).sum(1)
    assert (x.response_logratios.double() - exact).abs().max() < 1e-6
    assert (x.response_logps.double() - logps.double().view(2, -1).sum(1)).abs().max() < 1e-2


def test_without_a_reference():
    x = inputs(reference=False)
    objectives.get("simpo")(x)
    objectives.get("sft")(x)
    for name in ("dpo", "ipo", "hinge", "aspo"):
        with pytest.raises(ValueError, match="needs reference log-probabilities"):
            objectives.get(name)(x)
    with pytest.raises(ValueError, match="perplexity='reference' needs reference log-probabilities"):
        objectives.get("aspo")(x, perplexity="reference")


@pytest.mark.parametrize("name", ["aspo", "dpo", "simpo"])
def test_unknown_backends_are_refused(name):
    x = inputs()
    with pytest.raises(ValueError, match="backend is 'cuda'; choose one of auto, torch, triton"):
        objectives.get(name)(Inputs(x.layout, x.logps, x.ref_logps, backend="cuda"))


def test_sums_are_taken_once():
    x = inputs()
    assert x.response_logratios is x.response_logratios
    assert x.sentence_logratios is not Inputs(x.layout, x.logps, x.ref_logps).sentence_logratios
    assert Inputs.token_logratios.__doc__.startswith("(N,) logp - ref_logp")


def test_several_rejected_responses_are_refused():
    labels, ids = torch.tensor([[1], [2], [3]]), torch.zeros(3, 1).long()
    layout = SentenceLayout.from_labels(labels, ids, group=torch.zeros(3).long(), role=torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="exactly one response of role 1"):
        objectives.get("dpo")(Inputs(layout, torch.zeros(3), torch.zeros(3)))
    assert objectives.get("sft")(Inputs(layout, torch.full((3,), -1.0))).losses.tolist() == [1.0]


@pytest.mark.parametrize(
    "name", ["dpo", "ipo", "simpo", "hinge", "sft", "aspo", "orpo", "f_dpo", "acpo", "misp", "mdpo", "povid"]
)
def test_no_pairs_give_a_connected_zero(name):
    layout = SentenceLayout.from_labels(torch.empty(0, 3).long(), torch.empty(0, 3).long())
    logps = torch.empty(0, requires_grad=True)
    losses = objectives.get(name)(Inputs(layout, logps, torch.empty(0))).losses
    assert losses.shape == (0,)
    losses.sum().backward()
    assert logps.grad.shape == (0,)


# --- the registry ---


def test_names_options_and_references():
    assert {"dpo", "ipo", "simpo", "hinge", "sft", "aspo"} <= set(objectives.names())
    assert objectives.options("dpo") == {"beta": 0.1, "label_smoothing": 0.0}
    assert objectives.options("sft") == {}
    assert objectives.options("aspo") == {
        "beta": 0.1,
        "alpha": 0.5,
        "normalizer": "sentence",
        "perplexity": "policy",
        "perplexity_scale": "ppl",
        "weights": "computed",
        "rejected_side": "whole",
    }
    assert [objectives.needs_reference(n) for n in ("dpo", "ipo", "hinge", "aspo", "simpo", "sft")] == [
        *[True] * 4,
        *[False] * 2,
    ]
    dpo = objectives.get("dpo")
    assert objectives.get(dpo) is dpo


def test_options_returns_a_copy():
    objectives.options("dpo")["beta"] = 99
    assert objectives.options("dpo")["beta"] == 0.1


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match="unknown objective 'dpoo'; choose one of acpo, aspo"):
        objectives.get("dpoo")
    with pytest.raises(ValueError, match=r"name is a string, got \['dpo', 'sft'\]; for several use weighted_sum"):
        objectives.get(["dpo", "sft"])
    with pytest.raises(ValueError, match=r"objective 'dpo' takes no option alpha, gamma; it takes beta=0.1"):
        objectives.get("dpo")(inputs(), gamma=1, alpha=0.5)


def test_register(monkeypatch):
    monkeypatch.setattr(objectives, "_REGISTRY", dict(objectives._REGISTRY))

    @objectives.register("twice_dpo")
    def twice_dpo(x: Inputs, beta: float = 0.1) -> Result:
        chosen, rejected = x.pair(x.response_logratios)
        return Result(-2 * F.logsigmoid(beta * (chosen - rejected)), x.reward_stats(beta))

    x = inputs()
    torch.testing.assert_close(objectives.get("twice_dpo")(x).losses, 2 * objectives.get("dpo")(x).losses)
    assert objectives.options("twice_dpo") == {"beta": 0.1}
    with pytest.raises(ValueError, match="objective 'odd' reads token_kl, which needs a reference"):
        objectives.register("odd", needs_reference=False, reads=["token_kl"])
    with pytest.raises(ValueError, match="named 'twice_dpo' is registered already"):
        objectives.register("twice_dpo")(twice_dpo)
    with pytest.raises(ValueError, match="objective 'bad': option 'beta' needs a default"):
        objectives.register("bad")(lambda x, beta: x)
    assert "bad" not in objectives.names()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", {"label_smoothing": 0.5}, r"label_smoothing is 0.5; it must be in \[0, 0.5\)"),
        ("dpo", {"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ("dpo", {"label_smoothing": math.nan}, "label_smoothing is nan"),
        ("dpo", {"beta": 0.0}, "beta is 0.0; it must be positive and finite"),
        ("ipo", {"beta": -1.0}, "beta is -1.0"),
        ("hinge", {"beta": math.inf}, "beta is inf"),
        ("simpo", {"beta": math.nan}, "beta is nan"),
        ("simpo", {"gamma": math.nan}, "gamma is nan; it must be finite"),
        ("aspo", {"beta": -0.1}, "beta is -0.1"),
        ("aspo", {"alpha": 1.5}, r"alpha is 1.5; it must be in \[0, 1\]"),
        ("aspo", {"alpha": math.nan}, "alpha is nan"),
        ("aspo", {"normalizer": "words"}, "normalizer is 'words'; choose one of sentence, token, none, reward"),
        ("aspo", {"perplexity": "both"}, "perplexity is 'both'; choose one of policy, reference"),
        ("aspo", {"perplexity_scale": "log"}, "perplexity_scale is 'log'; choose one of ppl, nll"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        objectives.get(name)(inputs(), **options)


def test_weighted_sum():
    x = inputs()
    both = objectives.weighted_sum({"dpo": 1.0, "sft": 0.1, "ipo": 2.0})
    result = both(x, beta=0.4, label_smoothing=0.1)
    dpo = objectives.get("dpo")(x, beta=0.4, label_smoothing=0.1)  # beta goes to dpo and ipo, label_smoothing to dpo
    sft, ipo = objectives.get("sft")(x), objectives.get("ipo")(x, beta=0.4)
    torch.testing.assert_close(result.losses, dpo.losses + 0.1 * sft.losses + 2 * ipo.losses)
    assert result.losses.requires_grad
    assert torch.equal(result.stats["dpo_losses"], dpo.losses.detach())
    assert torch.equal(result.stats["sft_losses"], sft.losses.detach())
    assert torch.equal(result.stats["nll"], sft.losses.detach())
    assert torch.equal(result.stats["margins"], dpo.stats["margins"])  # the first member's
    mixed = objectives.weighted_sum({"simpo": 1.0, "dpo": 1.0})(x).stats  # both report rewards, of different kinds
    assert torch.equal(mixed["chosen_rewards"], objectives.get("simpo")(x).stats["chosen_rewards"])
    assert both.options == {"beta": 0.1, "label_smoothing": 0.0}
    assert both.needs_reference
    assert both.name == "1 dpo + 0.1 sft + 2 ipo"


def test_weighted_sums_nest_and_know_their_needs():
    x = inputs(reference=False)
    inner = objectives.weighted_sum({"simpo": 1.0, "sft": 1.0})
    assert not inner.needs_reference
    outer = objectives.weighted_sum({inner: 0.5, "sft": 2.0})
    expected = 0.5 * objectives.get("simpo")(x, gamma=0.3).losses + 2.5 * objectives.get("sft")(x).losses
    torch.testing.assert_close(outer(x, gamma=0.3).losses, expected)


def test_weighted_sum_errors():
    with pytest.raises(ValueError, match="needs at least one objective"):
        objectives.weighted_sum({})
    with pytest.raises(ValueError, match="unknown objective 'nope'"):
        objectives.weighted_sum({"nope": 1.0})
    with pytest.raises(ValueError, match="the weight of 'dpo' is nan"):
        objectives.weighted_sum({"dpo": math.nan})
    with pytest.raises(ValueError, match="takes no option alpha"):
        objectives.weighted_sum({"dpo": 1.0, "sft": 1.0})(inputs(), alpha=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logps": torch.zeros(16)}, r"logps must be floating point \(17,\), got torch.float32 \(16,\)"),
        ({"logps": torch.zeros(17).long()}, "logps must be floating point"),
        ({"ref_logps": torch.zeros(17, 1)}, r"ref_logps must be floating point \(17,\)"),
        ({"similarity": torch.zeros(4)}, r"similarity must be floating point \(5,\), got torch.float32 \(4,\)"),
        ({"similarity": torch.tensor([0, 1, math.nan, 0, 0])}, r"similarity\[2\] is nan; score that sentence again"),
        ({"ref_logps": torch.zeros(17).fill_(-math.inf)}, r"ref_logps\[0\] is -inf; compute the reference's"),
        ({"ref_logps": torch.zeros(17, device="meta")}, "ref_logps is on meta but logps on cpu"),
        (
            {"layout": lean_layout(LENGTHS).to("meta")},
            r"the layout is on meta but logps on cpu: use layout.to\(device\)",
        ),
        ({"layout": lean_layout([[2, 1, 3], [1, 1], [9], []])}, "pair 1: its rejected response has no counted token"),
    ],
)
def test_input_errors(changes, message):
    x = inputs()
    with pytest.raises(ValueError, match=message):
        Inputs(
            **{"layout": x.layout, "logps": x.logps, "ref_logps": x.ref_logps, "similarity": x.similarity, **changes}
        )
