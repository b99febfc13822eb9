"""The calibration pass of token rewards: a model's own answers to rows whose truth is known, each object word judged.

Answers and words are kept in `calibration.jsonl`, one line an answer; what comes of them is `calibration.json` and a
picture of both distributions.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from aspo import shards
from aspo.folder import read_lines
from aspo.generation import Answer, generate_answers
from aspo.prompts import named
from aspo.resume import write_json
from aspo.rewards.object_words import ObjectVocabulary, ObjectWord, judge_words, load_vocabulary
from aspo.rewards.verifier import (
    BARE_WORD,
    WORLD_TEMPLATE,
    Calibration,
    ScoredWord,
    Verifier,
    calibrate,
    check_answerable,
)
from aspo.rows import load_rows
from aspo.scorers import LazyScorer, load_scorer
from aspo.validate import validate_rows

ANSWERS_FILE, CALIBRATION_FILE, PLOT_FILE = "calibration.jsonl", "calibration.json", "calibration.png"
WEAK_AUC = 0.6  # below, the summary warns: the means differ, but hardly any word can be told from another
Row = Mapping[str, Any]
Answered = dict[str, Any]  # id, text, tokens, finished, words: [[start, end, entry, similarity, right | null], ...]


def load_verifier(args: argparse.Namespace, device: Any) -> tuple[Any, Verifier]:
    """The calibration rows, and the verifier that the options name.

    Raises ValueError for a row whose answers could not be judged or scored: behind them it would cost them all.
    """
    rows = load_rows(args.calibrate, kind="prompt", limit=args.calibrate_limit, image_root=args.image_root)
    validate_rows(rows, "prompt")
    if not {"objects", "scene"} & set(rows.column_names):
        raise ValueError(f"--calibrate {args.calibrate}: the rows have no truth, neither 'objects' nor 'scene'")
    vocabulary = load_vocabulary(args.objects, rows)
    check_answerable(rows, fewest=1 if args.analyse else 0)  # it scores sentences too
    for row in rows:
        named(row, judge_words, "", [], row, vocabulary)
    if args.template is None:
        args.template = WORLD_TEMPLATE if args.scorer == "world" else BARE_WORD
    scorer = LazyScorer(load_scorer, args.scorer, device)
    scorer.check()
    return rows, Verifier(scorer, vocabulary, args.template)


def answer_rows(
    load: Callable[[], tuple[nn.Module, Any]],
    rows: Any,
    verifier: Verifier,
    path: Path,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    title: str = "answering",
    engine: shards.Engine | None = None,
) -> list[Answered]:
    """One line of `path` for each row, in the rows' order: the answer and its object words, scored and judged.

    A batch is always the same rows, so that any number of processes, stopped or not, samples what one samples. load:
    gives model and processor. engine: who answers; all processes call this together. None = these processes.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}

    def lines() -> shards.Make:
        model, processor = load()

        def make(batch: Sequence[Row], start: int) -> dict[str, list[str]]:
            answers = generate_answers(model, processor, batch, seed=seed + start, batch_size=len(batch), **options)
            scored = verifier.scores(batch, [[answer.text] for answer in answers])
            made = [_answered(row, a, words[0], verifier) for row, a, words in zip(batch, answers, scored, strict=True)]
            return {path.name: [json.dumps(line) + "\n" for line in made]}

        return make

    if any(line["id"] != rows[i]["id"] for i, line in enumerate(read_lines(path)) if i < len(rows)):
        raise ValueError(f"{path} holds answers to other rows: use another --out")
    engine = engine or shards.Engine(shards.Processes.current())
    if not shards.check_older(engine.processes, path.parent, path.stem, path.name, [row["id"] for row in rows]):
        decides = {"scorer": verifier.scorer.identity, "vocabulary": verifier.vocabulary.lines, "seed": seed}
        decides |= {"template": verifier.template, **options}
        job = shards.Job(path.parent, path.stem, rows, decides, lines, batch_size, title=title)
        shards.run_job(job, engine)
    return list(read_lines(path))[: len(rows)]


def _answered(row: Row, answer: Answer, words: Sequence[ScoredWord], verifier: Verifier) -> Answered:
    verdicts = _verdicts(answer.text, words, row, verifier.vocabulary)
    return {
        "id": row["id"],
        "text": answer.text,
        "tokens": answer.num_tokens,
        "finished": answer.finished,
        "words": [
            [s.word.start, s.word.end, s.word.entry, s.score, right] for s, right in zip(words, verdicts, strict=True)
        ],
    }


def _verdicts(text: str, words: Sequence[ScoredWord], row: Row, vocabulary: ObjectVocabulary) -> list[bool | None]:
    found: list[ObjectWord] = [scored.word for scored in words]
    return named(row, judge_words, text, found, row, vocabulary)


def judged_scores(answers: Sequence[Answered]) -> tuple[list[float], list[float]]:
    """Similarities of the right and of the hallucinated object words of `answer_rows`' lines."""
    words = [word for answer in answers for word in answer["words"]]
    return [w[3] for w in words if w[4] is True], [w[3] for w in words if w[4] is False]


def calibration_of(
    answers: Sequence[Answered], verifier: Verifier, margin: float, scorer: str, image_tower: dict[str, Any] | None
) -> Calibration:
    """The baselines that the answers give. Raises ValueError as `aspo.rewards.verifier.calibrate` does."""
    found = calibrate(*judged_scores(answers), margin=margin)
    judged = [word[4] for answer in answers for word in answer["words"]]
    counts = {"answers": len(answers), **found.counts, "unjudged": judged.count(None)}
    return replace(
        found,
        counts=counts,
        scorer=scorer,
        identity=verifier.scorer.identity,
        template=verifier.template,
        vocabulary=tuple(verifier.vocabulary.lines),
        image_tower=image_tower,
    )


def summary(calibration: Calibration, answers: Sequence[Answered]) -> str:
    """What the calibration found, in a few lines."""
    counts, tower = calibration.counts, calibration.image_tower or {}
    named_most = Counter(word[2] for answer in answers for word in answer["words"] if word[4] is False).most_common(5)
    lines = [
        f"calibration: {counts['correct']} correct and {counts['hallucinated']} hallucinated object words in "
        f"{counts['answers']} answers ({counts['unjudged']} could not be judged)",
        f"  mu_correct {calibration.mu_correct:.4f}, mu_hallucinated {calibration.mu_hallucinated:.4f}, "
        f"scale {calibration.scale:.4f}, AUC {calibration.auc:.3f}",
        *([f"  an AUC below {WEAK_AUC}: these rewards are mostly noise"] if calibration.auc < WEAK_AUC else []),
        "  hallucinated most: " + ", ".join(f"{name} {count}" for name, count in named_most),
    ]
    if tower.get("own"):
        lines.append(f"  the scorer's image tower is the model's own ({tower['layers']} layers)")
    else:
        why = tower.get("reason") or f"{tower.get('layers')} layers agree"
        lines.append(f"  the scorer's image tower is not the model's own: {why}")
    return "\n".join(lines)


def write_calibration(folder: Path, calibration: Calibration, answers: Sequence[Answered]) -> None:
    """calibration.json and the picture of both distributions."""
    correct, hallucinated = judged_scores(answers)
    marks = {"mu correct": calibration.mu_correct, "mu hallucinated": calibration.mu_hallucinated}
    title = f"object words, AUC {calibration.auc:.3f}"
    histogram(folder / PLOT_FILE, [(title, {"correct": correct, "hallucinated": hallucinated}, marks)])
    write_json(folder / CALIBRATION_FILE, calibration.to_json())


Panel = tuple[str, Mapping[str, Sequence[float]], Mapping[str, float]]  # title, values by name, marked values


def histogram(path: Path, panels: Sequence[Panel]) -> None:
    """A PNG of panels side by side: densities over shared bins, each name's values in a colour of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 3.6), layout="constrained")
    for axes, (title, series, marks) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        drawn = {name: values for name, values in series.items() if len(values)}
        everything = [value for values in drawn.values() for value in values]
        edges = (min(everything), max(everything)) if everything else (0.0, 1.0)
        for colour, (name, values) in zip(
            ("tab:blue", "tab:red", "tab:green", "tab:orange"), drawn.items(), strict=False
        ):
            label = f"{name} ({len(values)})"
            axes.hist(values, bins=40, range=edges, density=True, alpha=0.5, color=colour, label=label)
        for style, (name, value) in zip(("-", "--", ":"), marks.items(), strict=False):
            axes.axvline(value, color="black", linestyle=style, linewidth=1, label=f"{name} {value:.3f}")
        axes.set(title=title, xlabel="cosine with the image", ylabel="density")
        axes.legend(fontsize=8)
    partial = path.with_name(path.name + ".part")
    figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
    partial.replace(path)
