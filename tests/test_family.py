"""What holds for every registered objective: order, micro-batches, padding, step 0, rows of text, bad options."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from items import at_the_reference, batch, gradients, inputs, leaves

from aspo_kernels import objectives
from aspo_kernels.objectives import Inputs

LN2 = math.log(2)
# Every objective with its defaults, and options that take another way through it.
WAYS = [
    ("acpo", {}),
    ("acpo", {"target": "pair", "delta": 0.3}),
    ("aspo", {}),
    ("aspo", {"weights": "given", "normalizer": "token"}),
    ("aspo", {"rejected_side": "aligned"}),
    ("aspo", {"rejected_side": "misaligned", "normalizer": "reward"}),
    ("chip", {}),
    ("chip", {"segment_weight": 4.0, "tdpo_alpha": 1.0}),
    ("ddpo", {}),
    ("dpo", {}),
    *[("f_dpo", {"f_divergence": name}) for name in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")],
    ("fisao", {}),
    ("hinge", {}),
    ("ipo", {}),
    ("kto", {}),
    ("mdpo", {}),
    *[("misp", {"importance": name}) for name in ("none", "self", "printed")],
    ("orpo", {}),
    ("povid", {}),
    ("sft", {}),
    ("simpo", {}),
    ("tdpo", {}),
    ("tdpo", {"variant": 1}),
    ("weighted_dpo", {}),
    ("wpo", {}),
]
every_way = pytest.mark.parametrize(("name", "options"), WAYS, ids=lambda v: v if isinstance(v, str) else str(v or ""))


DOCS = Path(__file__).parent.parent / "docs" / "objectives.md"


def losses_of(name: str, options: dict, x: Inputs) -> torch.Tensor:
    return objectives.get(name)(x, **options).losses


def test_no_objective_is_left_out():
    """Those that other test files or the README register at run time aside, all of ours are in WAYS."""
    ours = {n for n in objectives.names() if objectives.get(n).function.__module__.startswith("aspo_kernels.")}
    assert ours == {name for name, _ in WAYS}


@pytest.mark.parametrize("name", sorted({name for name, _ in WAYS}))
def test_the_docs_have_every_objective_with_its_options(name):
    """docs/objectives.md: a row of the table and a section, which ends with the options as the code has them."""
    text = DOCS.read_text()
    assert f"[`{name}`](#{name})" in text
    section = re.search(rf"^## {name}\n(.*?)(?=^## )", text, re.M | re.S).group(1)
    listed = section.partition("- Options: ")[2]
    given = dict(re.findall(r"`(\w+)=([^`]+)`", listed))
    expected = objectives.options(name)
    assert given == {key: str(v) if not isinstance(v, str) else f'"{v}"' for key, v in expected.items()}
    assert expected or "- No options." in section


@every_way
def test_order_and_micro_batches_change_nothing(name, options):
    """Which includes ACPO's a and ASPO's w."""
    items = batch()
    whole = inputs(items)
    losses = losses_of(name, options, whole)
    all_gradients = gradients(losses, items)
    assert losses.shape == (4,) and all(torch.isfinite(g).all() for g in all_gradients)
    assert sum(bool(g.abs().sum() > 0) for g in all_gradients) >= 4
    sizes = [4] if name == "kto" else [1, 2, 1]  # kto's z is the mean over a forward pass
    for part in torch.tensor([2, 0, 3, 1]).split(sizes):
        some = [items[i] for i in part]
        x = inputs(some, pair_tokens=whole.pair_tokens, desirable=whole.desirable[part])
        got = losses_of(name, options, x)
        torch.testing.assert_close(got, losses[part], rtol=1e-12, atol=1e-14)
        for ours, expected in zip(gradients(got, some), gradients(losses[part], some), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


@every_way
def test_fixed_capacity_changes_nothing(name, options):
    """Behind a padded layout's end lies what no loss may read; it gets gradient 0, never NaN."""
    items = batch()
    plain = inputs(items)
    capacity = {"tokens": plain.layout.num_tokens + 5, "sentences": plain.layout.num_sentences + 3}
    layout = plain.layout.padded_to(**capacity, chosen_sentences=plain.layout.chosen_sentences.numel() + 2)

    def padded(value, size):
        return None if value is None else torch.cat([value, value.new_full((size - value.numel(),), -3.7)])

    n, s, c = layout.num_tokens, layout.num_sentences, layout.chosen_sentences.numel()
    tail = torch.full((5,), -3.7, dtype=torch.float64, requires_grad=True)
    kl_tail = torch.full((5,), -3.7, dtype=torch.float64, requires_grad=True)
    x = replace(
        plain, layout=layout, logps=torch.cat([plain.logps, tail]), token_kl=torch.cat([plain.token_kl, kl_tail]),
        **{name: padded(getattr(plain, name), n) for name in ("ref_logps", "token_scores", "sharp_logps")},
        **{name: padded(getattr(plain, name), s) for name in ("rejected_similarity", "sentence_weights")},
        similarity=padded(plain.similarity, c),
    )  # fmt: skip
    got, expected = losses_of(name, options, x), losses_of(name, options, plain)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for ours, theirs in zip(gradients(got, items), gradients(expected, items), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for beyond in torch.autograd.grad(got.sum(), [tail, kl_tail], materialize_grads=True):
        assert torch.equal(beyond, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted({name for name, _ in WAYS}))
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    whole = inputs(batch())
    read = {f.name: getattr(whole, f.name) for f in fields(whole) if f.init}

    def losses(logps: torch.Tensor, token_kl: torch.Tensor) -> torch.Tensor:
        return objectives.get(name).function(Inputs(**{**read, "logps": logps, "token_kl": token_kl})).losses

    leaf, kl = whole.logps.detach().requires_grad_(), whole.token_kl.detach()
    results = [run(leaf, kl) for run in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(r.sum(), leaf)[0] for r in results))


@every_way
def test_statistics_are_detached_and_one_for_each_item_token_or_sentence(name, options):
    x = inputs(batch())
    for key, value in objectives.get(name)(x, **options).stats.items():
        assert not value.requires_grad and torch.isfinite(value).all(), key
        assert value.shape in {(), (4,), (x.layout.num_tokens,), x.layout.chosen_sentences.shape}, key


# Where policy = reference (and a response is as likely as any, where there is none): the loss of an item with an image.
AT_THE_REFERENCE = {
    **dict.fromkeys(("acpo", "aspo", "chip", "ddpo", "dpo", "f_dpo", "fisao", "tdpo", "weighted_dpo", "povid"), LN2),
    "hinge": 1.0,
    "ipo": 25.0,  # (1 / (2 * 0.1))^2
    "kto": 0.5,
    "mdpo": 3 * LN2,
}


@every_way
def test_step_0(name, options):
    if name in AT_THE_REFERENCE:
        items = at_the_reference([i for i in batch() if len(i) > 2])
        losses = losses_of(name, options, inputs(items))
        torch.testing.assert_close(losses, torch.full_like(losses, AT_THE_REFERENCE[name]), rtol=1e-12, atol=0)
    else:  # in the tests of their own families
        assert name in ("misp", "orpo", "sft", "simpo", "wpo")


@every_way
@pytest.mark.parametrize("without", ["some", "all"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_rows_of_text_alone(name, options, without):
    """No negative image in some items, or in none: finite numbers, and no NaN on the way of the gradient either."""
    items = batch() if without == "some" else [{r: a for r, a in i.items() if r < 2} for i in batch()]
    with torch.autograd.detect_anomaly(check_nan=True):
        losses = losses_of(name, options, inputs(items))
        assert torch.isfinite(losses).all()
        assert all(torch.isfinite(g).all() for g in gradients(losses, items))


NEEDED = {  # field -> objectives that cannot be without it, with the options that make them read it
    "ref_logps": ["acpo", "aspo", "chip", "ddpo", "dpo", "f_dpo", "fisao", "hinge", "ipo", "kto", "mdpo", "misp",
                  "povid", "tdpo", "weighted_dpo", "wpo"],
    "token_scores": ["ddpo", "fisao", "weighted_dpo", ("chip", {"segment_weight": 2.0})],
    "token_kl": ["tdpo", "chip"],
    "sharp_logps": ["wpo"],
    "negative_log_q": [("misp", {"importance": "self"}), ("misp", {"importance": "printed"})],
    "desirable": ["kto"],
    "sentence_weights": [("aspo", {"weights": "given"})],
    "rejected_similarity": [("aspo", {"rejected_side": "aligned"}), ("aspo", {"rejected_side": "misaligned"})],
}  # fmt: skip


@pytest.mark.parametrize("field", NEEDED)
def test_what_is_needed_is_asked_for_in_words(field):
    x = replace(inputs(batch()), **{field: None})
    for entry in NEEDED[field]:
        name, options = entry if isinstance(entry, tuple) else (entry, {})
        objective = objectives.get(name)
        assert field in objective.reads or field == "ref_logps"
        with pytest.raises(ValueError, match="this objective needs .*" + objectives.OPTIONAL[field][:20]):
            objective(x, **options)
    for name in {name for name, _ in WAYS} - {e[0] if isinstance(e, tuple) else e for e in NEEDED[field]}:
        objectives.get(name)(x)  # reads it at most with other options


@every_way
def test_reads_says_what_is_read(name, options):
    """A trainer computes and passes on only what an objective says that it reads."""
    x = inputs(batch())
    objective = objectives.get(name)
    kept = {"similarity", "pair_tokens", *objective.reads, *(["ref_logps"] if objective.needs_reference else [])}
    optional = (*objectives.OPTIONAL, "similarity", "pair_tokens")
    less = replace(x, **{field: None for field in optional if field not in kept})
    torch.testing.assert_close(losses_of(name, options, less), losses_of(name, options, x), rtol=0, atol=0)
    items = [{r: a for r, a in i.items() if r < 2} for i in batch()]
    changes = not torch.equal(losses_of(name, options, inputs(items)), losses_of(name, options, x))
    assert changes == objective.reads_negatives


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *[(name, {"beta": -0.5}, "beta is -0.5; it must be positive") for name in (
            "acpo", "chip", "ddpo", "f_dpo", "fisao", "kto", "mdpo", "misp", "orpo", "povid", "tdpo", "weighted_dpo",
            "wpo")],
        ("acpo", {"delta": 0.0}, "delta is 0.0"),
        ("acpo", {"target": "global"}, "target is 'global'; choose one of batch, pair, dataset"),
        ("misp", {"importance": "unbiased"}, "importance is 'unbiased'; choose one of none, self, printed"),
        ("misp", {"text_weight": math.inf}, "text_weight is inf"),
        ("misp", {"image_weight": math.nan}, "image_weight is nan"),
        ("mdpo", {"anchor": math.nan}, "anchor is nan"),
        ("povid", {"image_weight": 1.5}, r"image_weight is 1.5; it must be in \[0, 1\]"),
        ("tdpo", {"variant": 3}, "variant is 3; choose one of 1, 2"),
        ("tdpo", {"tdpo_alpha": math.nan}, "tdpo_alpha is nan"),
        ("chip", {"segment_weight": 0.0}, "segment_weight is 0.0"),
        ("f_dpo", {"f_divergence": "kl"}, "f_divergence is 'kl'; choose one of reverse_kl"),
        ("f_dpo", {"f_alpha": math.nan}, "f_alpha is nan"),
        ("ddpo", {"gamma": 0.0}, "gamma is 0.0"),
        ("fisao", {"k": math.inf}, "k is inf"),
        ("weighted_dpo", {"gain": math.nan}, "gain is nan"),
        ("kto", {"desirable_weight": 0.0}, "desirable_weight is 0.0"),
        ("kto", {"undesirable_weight": -1.0}, "undesirable_weight is -1.0"),
        ("aspo", {"weights": "mine"}, "weights is 'mine'; choose one of computed, given"),
        ("aspo", {"rejected_side": "both"}, "rejected_side is 'both'; choose one of whole, aligned, misaligned"),
    ],
)  # fmt: skip
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        losses_of(name, options, inputs(batch()))


def test_a_weighted_sum_reads_what_its_members_read():
    both = objectives.weighted_sum({"misp": 1.0, "fisao": 0.5, "tdpo": 2.0})
    assert both.reads == {"negative_log_q", "token_scores", "token_kl"}
    assert both.reads_negatives and not both.difference_only
    assert not objectives.weighted_sum({"dpo": 1.0, "orpo": 0.5}).reads_negatives
    assert objectives.weighted_sum({"dpo": 1.0, "orpo": 0.5}).reads == frozenset()
    assert objectives.weighted_sum({both: 1.0, "wpo": 1.0}).reads == {*both.reads, "sharp_logps"}
    items = batch()
    x = inputs(items)
    parts = {name: losses_of(name, {"beta": 0.3}, x) for name in ("misp", "fisao", "tdpo")}
    total = both(x, beta=0.3).losses
    torch.testing.assert_close(total, parts["misp"] + 0.5 * parts["fisao"] + 2 * parts["tdpo"])
    assert len(leaves(items)) == len(gradients(total, items))


def test_only_known_fields_can_be_read():
    with pytest.raises(ValueError, match="objective 'odd' reads 'temperature'; Inputs has ref_logps"):
        objectives.register("odd", reads=["temperature"])
    assert "odd" not in objectives.names()
