"""Intervals of AUCs and correlations against binomial and normal theory, with whole answers as the unit."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import math
import statistics

import numpy as np
import pytest
import torch
from tiny import tiny_image

from aspo.rewards.analysis import analyse
from aspo.rewards.intervals import auc_of, correlation_of, interval, resampled
from aspo.rewards.object_words import ObjectVocabulary
from aspo.rewards.verifier import Verifier, auc, ranks
from aspo.world.scenes import Scene, Thing

SCENE = Scene((Thing("circle", "red", "small", "top"), Thing("star", "blue", "large", "left")))
HIGH, LOW = 0.5, -0.5  # of a right word; a wrong one has 0


def _answers(copies: int) -> list[tuple[int, float, bool]]:
    """100 answers, each with a right word (70 HIGH, 30 LOW) and a wrong one, `copies` times over.

    A resample with h answers of the 70 has the AUC h / 100, whatever `copies` is: binomial, 100 draws of 0.7.
    """
    words = []
    for n in range(100):
        words += [(n, HIGH if n < 70 else LOW, True), (n, 0.0, False)] * copies
    return words


def _is_binomial(found: dict[str, float | None]) -> None:
    assert found["value"] == pytest.approx(0.7)
    # the quantiles 2.5 % and 97.5 % of a binomial of 100 draws of 0.7 are 61 and 79
    assert found["low"] == pytest.approx(0.61, abs=0.0101) and found["high"] == pytest.approx(0.79, abs=0.0101)


def test_the_interval_of_an_auc_is_the_binomials():
    _is_binomial(interval(resampled({"auc": auc_of(_answers(1))}, 100)["auc"]))


def test_more_of_the_same_in_an_answer_does_not_narrow_the_interval():
    once, often = (resampled({"auc": auc_of(_answers(copies))}, 100)["auc"] for copies in (1, 25))
    np.testing.assert_allclose(once, often)  # words as the unit would give [0.68, 0.72]
    alone = [(n, value, right) for n, (_, value, right) in enumerate(_answers(25))]
    as_words = interval(resampled({"auc": auc_of(alone)}, len(alone))["auc"])
    assert as_words["high"] - as_words["low"] < 0.06


def test_a_difference_is_taken_inside_each_resample():
    words = _answers(1)
    shifted = [(n, value + 0.1, right) for n, value, right in words]
    perfect = [(n, float(right), right) for n, _, right in words]
    drawn = resampled({"words": auc_of(words), "shifted": auc_of(shifted), "perfect": auc_of(perfect)}, 100)
    assert interval(drawn["shifted"] - drawn["words"]) == {"value": 0, "low": 0, "high": 0}
    found = interval(drawn["perfect"] - drawn["words"])
    assert found["value"] == pytest.approx(0.3)
    assert (found["low"], found["high"]) == pytest.approx((0.21, 0.39), abs=0.0101)


def test_the_interval_of_a_correlation_is_fishers():
    generator = np.random.default_rng(5)
    x = generator.normal(size=600)
    y = 0.6 * x + 0.8 * generator.normal(size=600)
    drawn = resampled(
        {
            "pearson": correlation_of(range(600), x, y),
            "spearman": correlation_of(range(600), x, np.exp(y), ranks=True),
            "same order": correlation_of(range(600), x, np.exp(x), ranks=True),
        },
        600,
    )
    pearson, spearman = interval(drawn["pearson"]), interval(drawn["spearman"])
    r = statistics.correlation(x.tolist(), y.tolist())
    by_hand = [math.tanh(math.atanh(r) + sign * 1.96 / math.sqrt(597)) for sign in (-1, 0, 1)]
    assert [pearson["low"], pearson["value"], pearson["high"]] == pytest.approx(by_hand, abs=0.015)
    # Spearman's of normal numbers is 6 / pi * asin(r / 2); its standard error is about sqrt((1 + rho^2 / 2) / (n - 3))
    rho = 6 / math.pi * math.asin(r / 2)
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / 597)
    by_hand = [math.tanh(math.atanh(rho) + sign * half) for sign in (-1, 0, 1)]
    assert [spearman["low"], spearman["value"], spearman["high"]] == pytest.approx(by_hand, abs=0.03)
    assert interval(drawn["same order"]) == pytest.approx({"value": 1, "low": 1, "high": 1})


def test_a_weighted_figure_is_that_of_the_repeated_list():
    generator = np.random.default_rng(1)
    words = [(int(n), float(v), bool(t)) for n, v, t in generator.integers((0, 0, 0), (12, 6, 2), (40, 3))]
    x, y = generator.integers(0, 5, (2, 12)).astype(float)  # with ties
    for copies in (np.ones(12), *generator.multinomial(12, np.full(12, 1 / 12), size=20).astype(float)):
        right, wrong = ([v for n, v, t in words for _ in range(int(copies[n])) if t == kind] for kind in (True, False))
        assert auc_of(words)(copies) == pytest.approx(auc(right, wrong))
        a, b = (np.repeat(side, copies.astype(int)).tolist() for side in (x, y))
        assert correlation_of(range(12), x, y)(copies) == pytest.approx(statistics.correlation(a, b))
        by_rank = statistics.correlation(ranks(a).tolist(), ranks(b).tolist())
        assert correlation_of(range(12), x, y, ranks=True)(copies) == pytest.approx(by_rank)


def test_the_seed_decides_and_what_is_undefined_says_so():
    once, again, other = (resampled({"auc": auc_of(_answers(1))}, 100, seed)["auc"] for seed in (3, 3, 4))
    assert (once == again).all() and (once != other).any()
    nothing = {"value": None, "low": None, "high": None}
    statistics_ = {
        "no wrong word": auc_of([(0, 0.5, True)]),
        "no word": auc_of([]),
        "no answer": correlation_of([], [], []),
        "two answers": correlation_of([0, 1], [1.0, 2.0], [1.0, 2.0]),
        "one value": correlation_of(range(3), [1.0, 2.0, 3.0], [0.1, 0.1, 0.1]),
    }
    assert {name: interval(values) for name, values in resampled(statistics_, 3).items()} == dict.fromkeys(
        statistics_, nothing
    )


class TextScorer:
    """Every image is the x axis; a text's cosine with it is what `cosines` says."""

    identity = "fake"
    cosines = {"The circle is red.": HIGH, "The star is blue.": LOW, "The circle is blue.": 0.0}  # noqa: RUF012

    def image_features(self, images):
        return torch.tensor([[1.0, 0.0]] * len(images))

    def text_features(self, texts):
        return torch.tensor([[self.cosines[t], math.sqrt(1 - self.cosines[t] ** 2)] for t in texts])


@pytest.mark.parametrize("copies", [1, 5])
def test_the_analysis_resamples_answers(copies):
    row = {"prompt": "What?", "images": [tiny_image()], "scene": SCENE.to_json()}
    rows = [{"id": str(n), **row} for n in range(101)]
    answers = [{"id": "0", "text": " ", "words": []}]  # an empty answer is drawn too, and changes little
    for n in range(100):
        right, value = ("The circle is red.", HIGH) if n < 70 else ("The star is blue.", LOW)
        words = [[0, 1, "circle", value, True], [0, 1, "circle", 0.0, False], [0, 1, "ring", 9.0, None]] * copies
        answers.append({"id": str(n + 1), "text": " ".join([right, "The circle is blue."] * copies), "words": words})
    found = analyse(rows, answers, Verifier(TextScorer(), ObjectVocabulary(["circle"])))
    figures = found.figures
    assert figures["answers"] == figures["answers_with_reference"] == 100
    for level in ("token_level", "sentence_level"):
        assert figures[level]["right"] == figures[level]["wrong"] == 100 * copies
        _is_binomial(figures[level]["auc"])
    assert figures["auc_sentence_level_minus_token_level"] == {"value": 0, "low": 0, "high": 0}
    assert [title for title, _, _ in found.panels] == [
        f"{name}, AUC 0.700 [{area['low']:.3f}, {area['high']:.3f}]"
        for name, area in (
            ("object words", figures["token_level"]["auc"]),
            ("sentences", figures["sentence_level"]["auc"]),
        )
    ]
