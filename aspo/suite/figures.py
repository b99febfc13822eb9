"""The figures of the benchmarks (docs/suite.md defines each); they stand among those of `aspo.evaluation.metrics`."""

from __future__ import annotations

import numpy as np

from aspo.evaluation.figures import Figure, Sums, divide, ratio

AMBER_KINDS = ("existence", "attribute", "relation", "all")
MMHAL_TYPES = (
    *("attribute", "adversarial", "comparison", "counting"),
    *("relation", "environment", "holistic", "other"),
)


def _amber_f1(kind: str) -> tuple[tuple[str, ...], str]:
    return (f"amber_{kind}_no_hit", f"amber_{kind}_said_no", f"amber_{kind}_truth_no"), f"amber_{kind}"


def _f1(s: Sums, name: str) -> np.ndarray:
    """F1 of "no": 2 hits / (answers "no" + questions whose truth is "no")."""
    return divide(2 * s[f"{name}_no_hit"], s[f"{name}_said_no"] + s[f"{name}_truth_no"])


def _amber_questions(kind: str) -> list[Figure]:
    needs, name = _amber_f1(kind)
    return [
        ratio(f"{name}_accuracy", f"accuracy, {kind}", f"{name}_right", f"{name}_asked", "higher"),
        ratio(f"{name}_precision", f'precision of "no", {kind}', f"{name}_no_hit", f"{name}_said_no", "higher"),
        ratio(f"{name}_recall", f'recall of "no", {kind}', f"{name}_no_hit", f"{name}_truth_no", "higher"),
        Figure(f"{name}_f1", f'F1 of "no", {kind}', needs, lambda s, name=name: _f1(s, name), "higher"),  # type: ignore[misc]
        ratio(f"{name}_unanswered", f"neither yes nor no, {kind}", f"{name}_unanswered", f"{name}_asked", "lower"),
    ]


def _amber_score(s: Sums) -> np.ndarray:
    return (1 - divide(s["amber_absent"], s["amber_named"]) + _f1(s, "amber_all")) / 2


SUITE_GROUPS: dict[str, tuple[Figure, ...]] = {
    "AMBER": (
        ratio("amber_chair", "CHAIR: objects absent / named", "amber_absent", "amber_named", "lower"),
        ratio("amber_cover", "Cover: true objects named", "amber_covered", "amber_true", "higher"),
        ratio("amber_hal", "Hal: answers with an absent object", "amber_hallucinated", "amber_answers", "lower"),
        ratio("amber_cog", "Cog: objects people expect, named", "amber_expected_named", "amber_expected", "lower"),
        *(figure for kind in AMBER_KINDS for figure in _amber_questions(kind)),
        Figure(
            "amber_score",
            "AMBER score: (1 - CHAIR + F1) / 2",
            ("amber_absent", "amber_named", *_amber_f1("all")[0]),
            _amber_score,
            "higher",
        ),
    ),
    "SHR, judged": (
        ratio(
            "shr_judged", "SHR: hallucinated / sentences with a verdict", "shr_false", "shr_judged_sentences", "lower"
        ),
        ratio("shr_words", "the same, by words", "shr_false_words", "shr_judged_words", "lower"),
        ratio("shr_cannot_judge", "sentences that cannot be judged", "shr_cannot", "shr_judged_sentences"),
        ratio("shr_sentences", "sentences per answer", "shr_all_sentences", "shr_answers", percent=False),
    ),
    "MMHal-Bench, judged": (
        ratio("mmhal_score", "score, 0 to 6", "mmhal_rating", "mmhal_rated", "higher", percent=False),
        ratio("mmhal_hallucination", "answers rated below 3", "mmhal_hallucinated", "mmhal_rated", "lower"),
        *(
            ratio(f"mmhal_{kind}", f"score, {kind}", f"mmhal_{kind}_rating", f"mmhal_{kind}_rated", "higher", False)
            for kind in MMHAL_TYPES
        ),
    ),
    "HallusionBench": (
        ratio("hallusion_aacc", "aAcc: questions", "hallusion_right", "hallusion_asked", "higher"),
        ratio("hallusion_qacc", "qAcc: questions on all their figures", "hallusion_q_right", "hallusion_q", "higher"),
        ratio("hallusion_facc", "fAcc: figures with all their questions", "hallusion_f_right", "hallusion_f", "higher"),
        ratio("hallusion_easy", "questions on original figures", "hallusion_easy_right", "hallusion_easy", "higher"),
        ratio("hallusion_hard", "questions on all edited figures", "hallusion_hard_right", "hallusion_hard", "higher"),
        ratio("hallusion_uncertain", "uncertain answers", "hallusion_unclear", "hallusion_asked"),
    ),
    "MMVP": (
        ratio("mmvp_pair_accuracy", "pair accuracy", "mmvp_pairs_right", "mmvp_pairs", "higher"),
        ratio("mmvp_accuracy", "accuracy", "mmvp_right", "mmvp_asked", "higher"),
        ratio("mmvp_unanswered", "neither option", "mmvp_unanswered", "mmvp_asked", "lower"),
    ),
    "Judge": (ratio("judge_unparsed", "judge's verdicts that could not be read", "judge_unread", "judge_asked"),),
    "Through another harness": (
        ratio("harness_score", "score, mean per item", "harness_points", "harness_items", "higher"),
    ),
}
