"""`aspo rewards --analyse`: are token-level scores better witnesses than sentence-level ones?

For one model, or for two (before and after training): how the similarities of right and wrong object words, and of
right and wrong sentences, are distributed, with the AUC of each; and how an answer's scores go with BLEU and ROUGE
against a true reference (FiSAO reports that sentence scores hardly do). Every AUC, correlation and difference has a
95 % interval (`aspo.rewards.intervals`). The figures go to analysis.json, the distributions to analysis.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aspo import shards
from aspo.lazy import Lazy
from aspo.model import load_model
from aspo.resume import write_json
from aspo.rewards.calibrate import Answered, Panel, answer_rows, histogram, load_verifier
from aspo.rewards.intervals import Judged, Statistic, auc_of, correlation_of, interval, resampled
from aspo.rewards.token_scores import begin
from aspo.rewards.verifier import Verifier, compare_towers
from aspo.scores import score_rows
from aspo.sentences import split_sentences
from aspo.validate import response_text

Row = Mapping[str, Any]


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation, as both metrics count them."""
    return "".join(c if c.isalnum() or c in "'-" else " " for c in text.casefold()).split()


def bleu(candidate: str, references: Sequence[str], order: int = 4) -> float:
    """Sentence BLEU in [0, 1]: brevity penalty times the geometric mean of n-gram precisions, n = 1..order.

    Clipped counts, the closest reference's length, and one added to both counts for n > 1 (Lin and Och, ORANGE,
    smoothing 2: else one missing 4-gram makes an answer's score 0). An empty candidate has 0.
    """
    said, known = words_of(candidate), [words_of(reference) for reference in references]
    if not said:
        return 0.0
    logs = []
    for n in range(1, order + 1):
        own = _ngrams(said, n)
        best: Counter[tuple[str, ...]] = Counter()
        for reference in known:
            best |= _ngrams(reference, n)
        hits, total = sum((own & best).values()), sum(own.values())
        if n == 1 and hits == 0:
            return 0.0
        logs.append(math.log((hits + (n > 1)) / (total + (n > 1))))
    closest = min((abs(len(reference) - len(said)), len(reference)) for reference in known)[1]
    return min(1.0, math.exp(1 - closest / len(said))) * math.exp(statistics.fmean(logs))


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """ROUGE-L in [0, 1]: F1 of the longest common subsequence of words, the best over the references."""
    said = words_of(candidate)
    best = 0.0
    for reference in map(words_of, references):
        row = [0] * (len(reference) + 1)
        for word in said:
            above = row
            row = [0]
            for j, other in enumerate(reference):
                row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        common = row[-1]
        best = max(best, 2 * common / (len(said) + len(reference)) if common else 0.0)
    return best


def references_of(row: Row) -> list[str]:
    """True texts about a row's image: `references`, `caption`, `chosen`, or the description of its `scene`."""
    if row.get("references"):
        return list(row["references"])
    for column in ("caption", "chosen"):
        if row.get(column) is not None:
            return [response_text(row[column])]
    if row.get("scene") is None:
        return []
    from aspo.world.language import describe
    from aspo.world.scenes import Scene

    return [describe(Scene.from_json(row["scene"]))]


def sentence_truth(text: str, span: tuple[int, int], row: Row, words: Sequence[Any]) -> bool | None:
    """Whether a sentence is right: by its claim in a `scene`, else no object word in it is wrong; None = not checkable.

    words: of the answer, as `aspo.rewards.calibrate` keeps them.
    """
    if row.get("scene") is not None:
        from aspo.world.language import judge
        from aspo.world.scenes import Scene

        claims = [c for c in judge(text[slice(*span)], Scene.from_json(row["scene"])) if c.checkable]
        return all(c.verdict == "true" for c in claims) if claims else None
    inside = [word[4] for word in words if span[0] <= word[0] < span[1] and word[4] is not None]
    return all(inside) if inside else None


@dataclass(frozen=True)
class Findings:
    """What one model's answers say: `figures` for analysis.json, `panels` for analysis.png.

    drawn: name -> (1 + R,) values of each figure that has an interval. Answers of two models to the same rows are
    resampled alike, so that the difference of two such arrays has the paired interval.
    """

    figures: dict[str, Any]
    panels: list[Panel]
    drawn: dict[str, np.ndarray]


@dataclass(frozen=True)
class Scored:
    """The scores of one answer, the `number`-th: means over its words and its sentences, BLEU and ROUGE-L."""

    number: int
    words: float
    sentences: float
    bleu: float
    rouge_l: float


def analyse(rows: Sequence[Row], answers: Sequence[Answered], verifier: Verifier, seed: int = 0) -> Findings:
    """The figures of one model's answers, their intervals over resamples of the answers, and the distributions."""
    words = [(n, word[3], word[4]) for n, a in enumerate(answers) for word in a["words"] if word[4] is not None]
    sentences, scored = _sentences(rows, answers, verifier)
    wanted: dict[str, Statistic] = {"token_level": auc_of(words), "sentence_level": auc_of(sentences)}
    of_bleu, of_rouge = [one.bleu for one in scored], [one.rouge_l for one in scored]
    pairs = {
        f"{level} and {metric}": ([one.number for one in scored], scores, values)
        for level, scores in (
            ("sentence scores", [one.sentences for one in scored]),
            ("token scores", [one.words for one in scored]),
        )
        for metric, values in (("BLEU", of_bleu), ("ROUGE-L", of_rouge))
    }
    for name, of_pair in pairs.items():
        wanted[f"{name}, pearson"] = correlation_of(*of_pair)
        wanted[f"{name}, spearman"] = correlation_of(*of_pair, ranks=True)
    drawn = resampled(wanted, len(answers), seed)
    drawn["sentence_level - token_level"] = drawn["sentence_level"] - drawn["token_level"]
    area = {name: interval(drawn[name]) for name in ("token_level", "sentence_level", "sentence_level - token_level")}
    figures = {
        "answers": sum(bool(answer["text"].strip()) for answer in answers),
        "token_level": {**_level(words), "auc": area["token_level"]},
        "sentence_level": {**_level(sentences), "auc": area["sentence_level"]},
        "auc_sentence_level_minus_token_level": area["sentence_level - token_level"],
        "answers_with_reference": len(scored),
        "bleu": statistics.fmean(of_bleu) if scored else None,
        "rouge_l": statistics.fmean(of_rouge) if scored else None,
        "correlation": {
            name: {kind: interval(drawn[f"{name}, {kind}"]) for kind in ("pearson", "spearman")} for name in pairs
        },
    }
    panels = [
        _panel("object words", words, area["token_level"]),
        _panel("sentences", sentences, area["sentence_level"]),
    ]
    return Findings(figures, panels, drawn)


def _sentences(
    rows: Sequence[Row], answers: Sequence[Answered], verifier: Verifier
) -> tuple[list[Judged], list[Scored]]:
    """The checkable sentences of the answers, and the answers that have object words and a reference."""
    said = [n for n, answer in enumerate(answers) if answer["text"].strip()]
    made = [{**{k: rows[n][k] for k in ("id", "prompt", "images")}, "chosen": answers[n]["text"]} for n in said]
    judged: list[Judged] = []
    of_answer: list[Scored] = []
    for n, scored in zip(said, score_rows(made, verifier.scorer, splitter=split_sentences), strict=True):
        row, text, words = rows[n], answers[n]["text"], answers[n]["words"]
        for span, value in zip(scored["chosen_sentences"], scored["chosen_similarity"], strict=True):
            truth = sentence_truth(text, span, row, words)
            if truth is not None:
                judged.append((n, value, truth))
        if words and (references := references_of(row)):
            of_words, of_sentences = (statistics.fmean(x) for x in ([w[3] for w in words], scored["chosen_similarity"]))
            of_answer.append(Scored(n, of_words, of_sentences, bleu(text, references), rouge_l(text, references)))
    return judged, of_answer


def _values(judged: Sequence[Judged], right: bool) -> list[float]:
    return [value for _, value, truth in judged if truth == right]


def _level(judged: Sequence[Judged]) -> dict[str, Any]:
    right, wrong = _values(judged, True), _values(judged, False)
    return {
        "right": len(right),
        "wrong": len(wrong),
        "mean_right": statistics.fmean(right) if right else None,
        "mean_wrong": statistics.fmean(wrong) if wrong else None,
    }


def _panel(title: str, judged: Sequence[Judged], area: Mapping[str, float | None]) -> Panel:
    value, low, high = ("-" if x is None else f"{x:.3f}" for x in (area["value"], area["low"], area["high"]))
    return f"{title}, AUC {value} [{low}, {high}]", {k: _values(judged, k == "right") for k in ("right", "wrong")}, {}


def run_analysis(args: argparse.Namespace) -> int:
    """`aspo rewards --analyse`: what the scores of --model's and of --after's answers to the --calibrate rows say."""
    engine = shards.Engine.of(args)
    device = engine.processes.device_for(args.device)
    rows, verifier = load_verifier(args, device)
    names = ("method", "model", "after", "scorer", "objects", "template", "calibrate", "calibrate_limit", "temperature",
             "max_new_tokens", "seed", "batch_size", "dtype", "analyse")  # fmt: skip
    begin(args.out, {name: getattr(args, name) for name in names}, engine.processes, free=("after",))
    answered: dict[str, tuple[Lazy[Any], list[Answered]]] = {}
    for name, source in {"before": args.model, "after": args.after}.items():
        if source is not None:
            load = Lazy(load_model, source, args.dtype, device=device)
            answers = answer_rows(
                load,
                rows,
                verifier,
                args.out / f"answers_{name}.jsonl",
                batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                seed=args.seed,
                title=f"answering, {name}",
                engine=engine,
            )
            answered[name] = load, answers

    def compare() -> dict[str, Any]:
        result: dict[str, Any] = {"scorer": args.scorer, "template": verifier.template, "rows": args.calibrate}
        panels: list[Panel] = []
        drawn: dict[str, dict[str, np.ndarray]] = {}
        for name, (load, answers) in answered.items():
            found = analyse(rows, answers, verifier, args.seed)
            source = args.model if name == "before" else args.after
            result[name] = {"model": source, "image_tower": compare_towers(load()[0], verifier.scorer), **found.figures}
            panels += [(f"{name}: {title}", series, marks) for title, series, marks in found.panels]
            drawn[name] = found.drawn
        if "after" in drawn:
            before, after = drawn["before"], drawn["after"]
            result["after_minus_before"] = {name: interval(after[name] - before[name]) for name in before}
        write_json(args.out / "analysis.json", result)
        histogram(args.out / "analysis.png", panels)
        return result

    result = engine.processes.once("it compares the scores", compare)
    if engine.processes.main:
        print(json.dumps(result, indent=1))
    return 0
