"""Metric functions and bootstrap intervals against numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspo.evaluation.metrics import (
    BY_NAME,
    FIGURES,
    JudgedClaim,
    ObjectVocabulary,
    answer_counts,
    chair_counts,
    claim_counts,
    minimal_pair_counts,
    summarise,
    yes_no,
    yes_no_counts,
)
from aspo.evaluation.statistics import compare


def _claim(sentence, verdict, fact, **more):
    return JudgedClaim(sentence=sentence, verdict=verdict, fact=fact, **more)


def test_claim_figures_by_hand():
    # Sentences: 0 true; 1 a true and a false claim; 2 repeats 0; 3 cannot be parsed; 4 repeats the false claim of 1.
    claims = [
        _claim(0, "true", "circle red", strata=("violating",), named="circle"),
        _claim(1, "true", "square blue", strata=("consistent",), named="square"),
        _claim(1, "false", "star green", strata=("violating",), named="star", named_present=False),
        _claim(2, "true", "circle red", strata=("violating",), named="circle"),
        _claim(3, "unparseable", None),
        _claim(4, "false", "star green", strata=("violating",), named="star", named_present=False),
    ]
    sentences = [
        "The circle is red.",
        "A blue square, a green star.",
        "the circle is  red",
        "Hm.",
        "The star is green.",
    ]
    first = claim_counts(
        claims, sentences, stateable={"circle red", "square blue", *"abcdef"}, objects_true=4
    ) | answer_counts("...", tokens=30, ended=True)
    # A second answer: one sentence, true.
    second = claim_counts([_claim(0, "true", "x", named="x")], ["X."], {"x", "y"}, 2) | answer_counts(
        "X.", tokens=2, ended=False
    )
    figures = summarise([first, second])
    expected = {
        "hallucinated_sentences": 2 / 5,  # sentences 1 and 4 of 0, 1, 2, 4 and the second answer's
        "hallucinated_sentences_per_item": (2 / 4 + 0) / 2,
        "shr": 2 / 6,
        "false_claims_per_item": 2 / 2,
        "coverage": (2 + 1) / (8 + 2),
        "claim_precision": 3 / 4,  # distinct: circle red, square blue, x | star green
        "claim_f1": 2 * 0.75 * 0.3 / 1.05,
        "false_claims_violating": 2 / 4,
        "false_claims_consistent": 0.0,
        "false_claims_held_out": None,
        "chair_i": 2 / 6,
        "chair_s": 1 / 2,
        "object_coverage": 3 / 6,
        "tokens": 16.0,
        "sentences_per_answer": 3.0,
        "unparseable": 1 / 6,
        "duplicate": 1 / 6,
        "empty": 0.0,
        "eos": 1 / 2,
    }
    assert figures == {name: value if value is None else pytest.approx(value) for name, value in expected.items()}


def test_silence_is_not_rewarded():
    silent = claim_counts([], [], stateable=set(range(6)), objects_true=3) | answer_counts("  ", tokens=1, ended=True)
    figures = summarise([silent])
    assert figures["hallucinated_sentences"] is None and figures["hallucinated_sentences_per_item"] is None
    assert (figures["coverage"], figures["empty"], figures["object_coverage"]) == (0.0, 1.0, 0.0)


def test_a_true_claim_nobody_asked_for_is_no_coverage():
    counts = claim_counts([_claim(0, "true", "circle large"), _claim(1, "true", "a")], ["A.", "B."], {"a", "b"}, 1)
    figures = summarise([counts])
    assert (figures["coverage"], figures["claim_precision"]) == (0.5, 1.0)


def test_unparseable_is_never_right():
    counts = claim_counts([_claim(0, "unparseable", None)], ["Blub."], stateable=set(range(6)), objects_true=3)
    assert counts["true_facts"] == counts["checkable_sentences"] == counts["false_sentences"] == 0
    assert summarise([counts])["unparseable"] == 1.0


def test_yes_no_by_hand():
    answers = [
        ("random", "yes", "Yes."),
        ("random", "no", "yes, there is"),
        ("random", "no", " No"),
        ("random", "yes", "Perhaps."),
        ("popular", "yes", "no"),
    ]
    figures = summarise([yes_no_counts(answers)])
    assert figures["yes_no_accuracy_random"] == 2 / 4
    assert figures["yes_no_f1_random"] == pytest.approx(
        2 / (2 + 1 + 1)
    )  # hit 1, false yes 1, missed 1 (the unanswered)
    assert figures["yes_ratio_random"] == 2 / 4
    assert figures["yes_no_unanswered_random"] == 1 / 4
    assert figures["yes_no_accuracy_popular"] == 0.0
    assert figures["yes_no_accuracy_all"] == pytest.approx(2 / 5)
    assert "yes_no_accuracy_adversarial" not in figures and "coverage" not in figures


@pytest.mark.parametrize(
    ("text", "said"), [("Yes", "yes"), ("no way, yes", "no"), ("nothing, eyes", None), ("", None), ("It is: NO!", "no")]
)
def test_yes_no_words(text, said):
    assert yes_no(text) == said


def test_yes_no_rejects_other_truths():
    with pytest.raises(ValueError, match="'maybe'"):
        yes_no_counts([("random", "maybe", "yes")])


def test_minimal_pairs_tie_is_not_right():
    figures = summarise([minimal_pair_counts([0.5, -0.1, 0.0, 2.0], [True, True, False, False])])
    assert (figures["minimal_pair_accuracy"], figures["minimal_pair_accuracy_prior"]) == (0.5, 0.5)


def test_chair_by_hand():
    vocabulary = ObjectVocabulary(["# a comment", "", "person, man, woman", "hot dog", "dog, puppy", "bus"])
    assert vocabulary.mentions("A Man with two puppies eats a hot  dog; no doghouse, three buses.") == [
        "person",
        "dog",
        "hot dog",
        "bus",
    ]
    counts = chair_counts("A woman and a man walk dogs by a bus.", ["Person", "puppy", "hot dog"], vocabulary)
    figures = summarise([counts])
    assert figures["chair_i"] == 1 / 4  # four mentions, the bus is absent
    assert figures["chair_s"] == 1.0
    assert figures["object_coverage"] == pytest.approx(2 / 3)


def test_vocabulary_errors():
    with pytest.raises(ValueError, match=r"line 2: 'man'.*'person'"):
        ObjectVocabulary(["person, man", "husband, man"])
    with pytest.raises(ValueError, match="empty"):
        ObjectVocabulary(["# nothing"])
    with pytest.raises(ValueError, match="'zebra'"):
        chair_counts("text", ["zebra"], ObjectVocabulary(["dog"]))


def test_every_figure_has_a_name_of_its_own():
    assert len(BY_NAME) == len(FIGURES)
    assert all(figure.better in ("lower", "higher", "") for figure in FIGURES)


def _items(false, checkable, clusters=None):
    return [
        {"id": str(k), "cluster": None if clusters is None else str(clusters[k]), "counts": c}
        for k, c in enumerate(
            {"false_sentences": int(f), "checkable_sentences": int(n)} for f, n in zip(false, checkable, strict=True)
        )
    ]


RATE = "hallucinated_sentences"


def test_micro_rate_and_difference():
    a, b = _items([1, 0, 3], [2, 2, 6]), _items([0, 0, 2], [2, 4, 4])
    comparison = compare({"a": a, "b": b}, [("b", "a")], resamples=200)
    assert comparison.systems["a"][RATE].value == pytest.approx(4 / 10)
    assert comparison.differences["b", "a"][RATE].value == pytest.approx(2 / 10 - 4 / 10)
    assert comparison.items == comparison.clusters == 3


def test_interval_matches_the_delta_method():
    """1,500 items of unequal size: the interval's half-width is 1.96 standard errors of a ratio of sums."""
    rng = np.random.default_rng(1)
    checkable = rng.integers(1, 7, 1500)
    false = rng.binomial(checkable, rng.beta(2, 3, 1500))
    estimate = compare({"a": _items(false, checkable)}, resamples=4000).systems["a"][RATE]
    residual = false - estimate.value * checkable
    error = math.sqrt((residual**2).sum()) / checkable.sum()
    assert (estimate.high - estimate.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (estimate.high + estimate.low) / 2 == pytest.approx(estimate.value, abs=0.2 * error)


def test_pairing_narrows_the_difference():
    """Two systems that differ by one sentence on one item: a paired interval is far narrower than either's own."""
    rng = np.random.default_rng(2)
    checkable = np.full(400, 5)
    false = rng.binomial(5, 0.4, 400)
    other = false.copy()
    other[np.flatnonzero(false < 5)[0]] += 1
    comparison = compare({"a": _items(false, checkable), "b": _items(other, checkable)}, [("b", "a")])
    own, difference = comparison.systems["a"][RATE], comparison.differences["b", "a"][RATE]
    assert difference.high - difference.low < 0.1 * (own.high - own.low)
    assert difference.value == pytest.approx(1 / 2000)
    assert not difference.excludes_zero


def test_clusters_are_resampled_together():
    """100 clusters of ten equal items carry the information of 100 items."""
    rng = np.random.default_rng(3)
    false = np.repeat(rng.integers(0, 2, 100), 10)
    ones = np.ones(1000)
    free = compare({"a": _items(false, ones)}).systems["a"][RATE]
    clustered = compare({"a": _items(false, ones, np.repeat(np.arange(100), 10))}).systems["a"][RATE]
    assert (clustered.high - clustered.low) / (free.high - free.low) == pytest.approx(math.sqrt(10), rel=0.15)


def test_a_cluster_may_be_called_0():
    items = [{**item, "cluster": k // 2} for k, item in enumerate(_items([0, 1, 1, 0], [1, 1, 1, 1]))]
    assert compare({"a": items}, resamples=100).clusters == 2


def test_the_order_of_items_does_not_matter_between_systems():
    a, b = _items([1, 0, 3, 2], [2, 2, 6, 3]), _items([0, 0, 2, 2], [2, 4, 4, 3])
    one = compare({"a": a, "b": b}, [("a", "b")]).differences["a", "b"][RATE]
    other = compare({"a": a, "b": b[::-1]}, [("a", "b")]).differences["a", "b"][RATE]
    assert one == other


def test_undefined_figures_are_nan():
    estimate = compare({"a": _items([0, 0], [0, 0])}).systems["a"][RATE]
    assert math.isnan(estimate.value) and math.isnan(estimate.low) and not estimate.excludes_zero


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(4, 9)), min_size=1, max_size=30), st.integers(0, 5))
def test_interval_brackets_and_is_reproducible(rows, seed):
    items = _items(*zip(*rows, strict=True))
    first = compare({"a": items, "same": items}, [("a", "same")], resamples=100, seed=seed)
    again = compare({"a": items}, resamples=100, seed=seed)
    estimate = first.systems["a"][RATE]
    assert estimate == again.systems["a"][RATE]
    rates = [f / n for f, n in rows]
    assert min(rates) - 1e-12 <= estimate.low <= estimate.high <= max(rates) + 1e-12
    difference = first.differences["a", "same"][RATE]
    assert difference.value == difference.low == difference.high == 0


def test_errors_name_the_problem():
    items = _items([1, 0], [2, 2])
    with pytest.raises(ValueError, match=r"a has 2 items, b 1, and 1 are in one only \(such as '1'\)"):
        compare({"a": items, "b": items[:1]})
    with pytest.raises(ValueError, match="distinct ids"):
        compare({"a": items + items})
    with pytest.raises(ValueError, match="'c'"):
        compare({"a": items}, [("a", "c")])
    with pytest.raises(ValueError, match="resamples 3"):
        compare({"a": items}, resamples=3)
    with pytest.raises(ValueError, match="no evaluation"):
        compare({})
