"""Counts in, figures out: every figure of `aspo eval` as a function of sums of per-item counts.

An *item* (one image) is reduced to a flat dict of counts. A figure is computed from the **sums** of those counts over
items, so that a micro rate is one division and a bootstrap resamples its numerator and denominator together.
docs/evaluation.md defines each figure. Nothing here knows a model, an image or a file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aspo.evaluation.figures import Figure, Sums, divide, ratio
from aspo.rewards.object_words import ObjectVocabulary
from aspo.suite.figures import SUITE_GROUPS

Counts = dict[str, float]

YES_NO_SPLITS = ("random", "popular", "adversarial")
STRATA = {
    "consistent": "usual colour",
    "violating": "unusual colour",
    "held_out": "held-out pair",
}


def _claim_f1(s: Sums) -> np.ndarray:
    precision, recall = divide(s["true_facts"], s["distinct_claims"]), divide(s["covered_facts"], s["stateable"])
    return divide(2 * precision * recall, precision + recall)


def _yes_no(split: str) -> list[Figure]:
    asked, right, yes = f"{split}_asked", f"{split}_right", f"{split}_said_yes"
    hit, false_yes, missed = f"{split}_yes_hit", f"{split}_yes_false", f"{split}_yes_missed"

    def f1(s: Sums) -> np.ndarray:
        return divide(2 * s[hit], 2 * s[hit] + s[false_yes] + s[missed])

    return [
        ratio(f"yes_no_accuracy_{split}", f"yes/no accuracy, {split}", right, asked, "higher"),
        Figure(f"yes_no_f1_{split}", f"yes/no F1, {split}", (hit, false_yes, missed), f1, "higher"),
        ratio(f"yes_ratio_{split}", f"yes-ratio, {split}", yes, asked),
        ratio(f"yes_no_unanswered_{split}", f"neither yes nor no, {split}", f"{split}_unanswered", asked, "lower"),
    ]


GROUPS: dict[str, tuple[Figure, ...]] = {
    "Claims": (
        ratio("hallucinated_sentences", "hallucinated sentences", "false_sentences", "checkable_sentences", "lower"),
        ratio("hallucinated_sentences_per_item", "the same, mean per item", "item_rate", "items_with_rate", "lower"),
        ratio("shr", "false / all sentences (SHR-like)", "false_sentences", "sentences", "lower"),
        ratio("false_claims_per_item", "false claims per item", "false_claims", "judged_items", "lower", percent=False),
        ratio("coverage", "coverage (claim recall)", "covered_facts", "stateable", "higher"),
        ratio("claim_precision", "claim precision", "true_facts", "distinct_claims", "higher"),
        Figure(
            "claim_f1", "claim F1", ("true_facts", "distinct_claims", "covered_facts", "stateable"), _claim_f1, "higher"
        ),
    ),
    "False claims by the true colour": tuple(
        ratio(f"false_claims_{name}", f"false claims, {label}", f"false_{name}", f"claims_{name}", "lower")
        for name, label in STRATA.items()
    ),
    "Minimal pairs, teacher-forced": (
        ratio("minimal_pair_accuracy", "minimal-pair accuracy", "pairs_right", "pairs", "higher"),
        ratio(
            "minimal_pair_accuracy_prior",
            "minimal pairs against the prior",
            "prior_pairs_right",
            "prior_pairs",
            "higher",
        ),
    ),
    "Objects named": (
        ratio("chair_i", "CHAIR_i: absent / named", "objects_absent", "objects_named", "lower"),
        ratio("chair_s", "CHAIR_s: answers with an absent one", "answers_with_absent", "object_answers", "lower"),
        ratio("object_coverage", "object coverage", "objects_found", "objects_true", "higher"),
    ),
    "Yes/no questions": tuple(figure for split in (*YES_NO_SPLITS, "all") for figure in _yes_no(split)),
    "Form": (
        ratio("tokens", "tokens per answer", "tokens", "answers", percent=False),
        ratio("sentences_per_answer", "sentences per answer", "sentences", "sentence_answers", percent=False),
        ratio("unparseable", "unparseable sentences", "unparseable_sentences", "sentences", "lower"),
        ratio("duplicate", "duplicate sentences", "duplicate_sentences", "sentences", "lower"),
        ratio("empty", "empty answers", "empty_answers", "answers", "lower"),
        ratio("eos", "answers that end by themselves", "eos_answers", "answers", "higher"),
    ),
    **SUITE_GROUPS,
}
FIGURES = tuple(figure for group in GROUPS.values() for figure in group)
HEADLINE = (
    "hallucinated_sentences",
    "false_claims_per_item",
    "coverage",
    "claim_f1",
    "minimal_pair_accuracy",
    "tokens",
)
BY_NAME = {figure.name: figure for figure in FIGURES}


def available(counted: Iterable[str]) -> list[Figure]:
    """The figures whose counts are all among `counted`."""
    counted = set(counted)
    return [figure for figure in FIGURES if counted.issuperset(figure.needs)]


def summarise(items: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Figures over items' counts; a figure nobody counted is left out, one with an empty denominator is None."""
    sums: dict[str, np.ndarray] = {}
    for counts in items:
        for name, value in counts.items():
            sums[name] = sums.get(name, np.zeros(())) + value
    values = {figure.name: float(figure.compute(sums)) for figure in available(sums)}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


@dataclass(frozen=True)
class JudgedClaim:
    """One claim of an answer. `sentence` is the sentence's number; claims of one `fact` key say the same thing."""

    sentence: int
    verdict: str  # "true", "false" or "unparseable"
    fact: object = None  # hashable, compared for equality only
    strata: tuple[str, ...] = ()  # of STRATA
    named: object = None  # the object named, if the claim names one (hashable)
    named_present: bool = True


def claim_counts(
    claims: Sequence[JudgedClaim], sentences: Sequence[str], stateable: Collection[object], objects_true: int
) -> Counts:
    """Counts of one judged answer.

    Args:
        claims: what the judge found. A sentence is checkable if it has a claim that is true or false, hallucinated if
            it has a false one, unparseable if it has no checkable claim at all.
        sentences: the answer's sentences, stripped and not empty, for the length and the duplicates.
        stateable: the distinct true facts that an answer is expected to state (keys as `JudgedClaim.fact`); a true
            claim outside of them counts for precision but not for coverage.
        objects_true: number of objects of the scene.
    """
    known = [claim for claim in claims if claim.verdict in ("true", "false")]
    false = [claim for claim in known if claim.verdict == "false"]
    checkable = {claim.sentence for claim in known}
    false_sentences = {claim.sentence for claim in false}
    true_facts = {claim.fact for claim in known if claim.verdict == "true"}
    named = [claim for claim in known if claim.named is not None]
    absent = [claim for claim in named if not claim.named_present]
    counts: Counts = {
        "judged_items": 1,
        "sentences": len(sentences),
        "sentence_answers": 1,
        "checkable_sentences": len(checkable),
        "false_sentences": len(false_sentences),
        "item_rate": len(false_sentences) / len(checkable) if checkable else 0.0,
        "items_with_rate": int(bool(checkable)),
        "false_claims": len(false),
        "true_facts": len(true_facts),
        "distinct_claims": len(true_facts) + len({claim.fact for claim in false}),
        "covered_facts": len(true_facts.intersection(stateable)),
        "stateable": len(stateable),
        "unparseable_sentences": len(sentences) - len(checkable),
        "duplicate_sentences": len(sentences) - len({_normal(sentence) for sentence in sentences}),
    }
    for stratum in STRATA:
        inside = [claim for claim in known if stratum in claim.strata]
        counts[f"claims_{stratum}"] = len(inside)
        counts[f"false_{stratum}"] = sum(claim.verdict == "false" for claim in inside)
    present = {claim.named for claim in named if claim.named_present}
    return counts | _object_counts(len(named), len(absent), len(present), objects_true)


def _normal(sentence: str) -> str:
    return re.sub(r"\W+", " ", sentence.casefold()).strip()


def _object_counts(named: int, absent: int, found: int, true: int) -> Counts:
    return {
        "objects_named": named,
        "objects_absent": absent,
        "object_answers": 1,
        "answers_with_absent": int(absent > 0),
        "objects_found": found,
        "objects_true": true,
    }


def answer_counts(text: str, tokens: int, ended: bool | None) -> Counts:
    """Counts of any generated answer: `tokens` without padding, `ended` by an end-of-text token (None: unknown)."""
    counts: Counts = {"answers": 1, "tokens": tokens, "empty_answers": int(not text.strip())}
    return counts if ended is None else counts | {"eos_answers": int(ended)}


def yes_no(text: str) -> str | None:
    """ "yes" or "no", whichever word comes first in an answer; None if neither does (never right)."""
    found = re.search(r"\b(yes|no)\b", text.casefold())
    return found.group(1) if found else None


def yes_no_counts(answers: Sequence[tuple[str, str, str]]) -> Counts:
    """Counts of yes/no questions, each given as (split, truth, generated text); the split "all" holds every question.

    Raises ValueError for a truth that is neither "yes" nor "no", and for another split than POPE's three and "all".
    """
    counts: Counts = {}
    for split, truth, text in answers:
        if split not in (*YES_NO_SPLITS, "all"):
            raise ValueError(f"split {split!r} of a yes/no question; it must be one of {', '.join(YES_NO_SPLITS)}, all")
        if truth not in ("yes", "no"):
            raise ValueError(f'the answer of a yes/no question is {truth!r}; it must be "yes" or "no"')
        said = yes_no(text)
        for name in {split, "all"}:
            marks = {
                "asked": True,
                "right": said == truth,
                "said_yes": said == "yes",
                "yes_hit": said == truth == "yes",
                "yes_false": said == "yes" != truth,
                "yes_missed": truth == "yes" != said,
                "unanswered": said is None,
            }
            for mark, holds in marks.items():
                counts[f"{name}_{mark}"] = counts.get(f"{name}_{mark}", 0) + int(holds)
    return counts


def minimal_pair_counts(margins: Sequence[float], against_prior: Sequence[bool]) -> Counts:
    """Counts of minimal pairs: `margins` = log p(true sentence) - log p(false one), a tie is not right;
    `against_prior` marks the pairs whose false sentence states what the language prior expects."""
    prior = [margin for margin, flag in zip(margins, against_prior, strict=True) if flag]
    return {
        "pairs": len(margins),
        "pairs_right": sum(margin > 0 for margin in margins),
        "prior_pairs": len(prior),
        "prior_pairs_right": sum(margin > 0 for margin in prior),
    }


def chair_counts(text: str, objects: Iterable[str], vocabulary: ObjectVocabulary) -> Counts:
    """CHAIR counts of one answer; every mention counts in CHAIR_i, coverage counts each true object once."""
    true = {vocabulary.name(word) for word in objects}
    mentions = vocabulary.mentions(text)
    absent = [name for name in mentions if name not in true]
    return _object_counts(len(mentions), len(absent), len(true.intersection(mentions)), len(true))
