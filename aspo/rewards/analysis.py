"""`aspo rewards --analyse`: are token-level scores better witnesses than sentence-level ones?

For one model, or for two (before and after training): how the similarities of right and wrong object words, and of
right and wrong sentences, are distributed, with the AUC of each; and how an answer's scores go with BLEU and ROUGE
against a true reference (FiSAO reports that sentence scores hardly do). The figures go to analysis.json, the
distributions to analysis.png.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from aspo import shards
from aspo.lazy import Lazy
from aspo.model import load_model
from aspo.resume import write_json
from aspo.rewards.calibrate import Answered, Panel, answer_rows, histogram, judged_scores, load_verifier
from aspo.rewards.token_scores import begin
from aspo.rewards.verifier import Verifier, auc, compare_towers, ranks
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


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """Pearson's and Spearman's correlation; None where one side does not vary."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return {"pearson": None, "spearman": None}
    of_ranks = statistics.correlation(ranks(x).tolist(), ranks(y).tolist())
    return {"pearson": statistics.correlation(x, y), "spearman": of_ranks}


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


def analyse(rows: Sequence[Row], answers: Sequence[Answered], verifier: Verifier) -> tuple[dict[str, Any], list[Panel]]:
    """The figures of one model's answers, and the panels that show their distributions."""
    right_words, wrong_words = judged_scores(answers)
    said = [(row, answer) for row, answer in zip(rows, answers, strict=True) if answer["text"].strip()]
    made = [{**{k: row[k] for k in ("id", "prompt", "images")}, "chosen": answer["text"]} for row, answer in said]
    right: list[float] = []
    wrong: list[float] = []
    per_answer: list[tuple[float, float, float, float]] = []  # word score, sentence score, BLEU, ROUGE-L
    for (row, answer), scored in zip(said, score_rows(made, verifier.scorer, splitter=split_sentences), strict=True):
        for span, value in zip(scored["chosen_sentences"], scored["chosen_similarity"], strict=True):
            truth = sentence_truth(answer["text"], span, row, answer["words"])
            if truth is not None:
                (right if truth else wrong).append(value)
        references, words = references_of(row), [word[3] for word in answer["words"]]
        if references and words:
            sentences = statistics.fmean(scored["chosen_similarity"])
            text = answer["text"]
            per_answer.append((statistics.fmean(words), sentences, bleu(text, references), rouge_l(text, references)))
    by_word, by_sentence, of_bleu, of_rouge = zip(*per_answer, strict=True) if per_answer else ((),) * 4
    figures = {
        "answers": len(said),
        "token_level": _level(right_words, wrong_words),
        "sentence_level": _level(right, wrong),
        "answers_with_reference": len(per_answer),
        "bleu": statistics.fmean(of_bleu) if per_answer else None,
        "rouge_l": statistics.fmean(of_rouge) if per_answer else None,
        "correlation": {
            f"{level} and {metric}": correlation(scores, values)
            for level, scores in (("sentence scores", by_sentence), ("token scores", by_word))
            for metric, values in (("BLEU", of_bleu), ("ROUGE-L", of_rouge))
        },
    }
    panels: list[Panel] = [
        (f"object words, AUC {auc(right_words, wrong_words):.3f}", {"right": right_words, "wrong": wrong_words}, {}),
        (f"sentences, AUC {auc(right, wrong):.3f}", {"right": right, "wrong": wrong}, {}),
    ]
    return figures, panels


def _level(right: Sequence[float], wrong: Sequence[float]) -> dict[str, Any]:
    area = auc(right, wrong)
    return {
        "right": len(right),
        "wrong": len(wrong),
        "mean_right": statistics.fmean(right) if right else None,
        "mean_wrong": statistics.fmean(wrong) if wrong else None,
        "auc": None if math.isnan(area) else area,
    }


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
        for name, (load, answers) in answered.items():
            figures, drawn = analyse(rows, answers, verifier)
            source = args.model if name == "before" else args.after
            result[name] = {"model": source, "image_tower": compare_towers(load()[0], verifier.scorer), **figures}
            panels += [(f"{name}: {title}", series, marks) for title, series, marks in drawn]
        write_json(args.out / "analysis.json", result)
        histogram(args.out / "analysis.png", panels)
        return result

    result = engine.processes.once("it compares the scores", compare)
    if engine.processes.main:
        print(json.dumps(result, indent=1))
    return 0
