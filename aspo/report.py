"""`aspo report`: one self-contained HTML page with curves, figures before and after, and sentences coloured by weight.

The page has no script, asks for nothing outside itself (its Content-Security-Policy forbids it) and escapes every text
that came from data. Weights are ASPO's own with the start model's log-probabilities: those of the first step.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from aspo.evaluation.statistics import compare
from aspo.folder import load_images
from aspo.model import load_model, response_logps
from aspo.page import Item, Sentence, curves_section, figures_section, headline_section, items_section, render
from aspo.rows import load_rows, parse_json, response_text, validate_rows
from aspo.sentences import check_spans, split_sentences
from aspo.world.language import judge
from aspo.world.scenes import Scene
from aspo_kernels import objectives
from aspo_kernels.aspo import sentence_nll

DIFFERENCES_OF_ALL = 3  # with more systems than this only differences to the first are shown

Row = Mapping[str, Any]


def read_history(run: Path) -> list[dict[str, Any]]:
    """The training log of a run folder, from `log_history.json` or the newest `trainer_state.json`.

    Raises ValueError where there is neither.
    """
    checkpoints = sorted(
        run.glob("checkpoint-*/trainer_state.json"), key=lambda p: _number(p.parent.name), reverse=True
    )
    for path in (run / "log_history.json", run / "trainer_state.json", *checkpoints):
        if path.is_file():
            history = parse_json(path.read_bytes(), str(path))
            history = history.get("log_history") if isinstance(history, Mapping) else history
            if not isinstance(history, list) or not all(isinstance(entry, Mapping) for entry in history):
                raise ValueError(f"{path} is no training log: a list of entries")
            return [{key: value for key, value in entry.items() if _is_number(value)} for entry in history]
    raise ValueError(f"{run} holds no training log; --runs takes folders that `aspo train` wrote")


def _number(checkpoint: str) -> int:
    number = checkpoint.rpartition("-")[2]
    return int(number) if number.isdecimal() and len(number) < 20 else -1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and (abs(value) < 1e300 or value != value)


def read_evaluation(path: Path) -> list[dict[str, Any]]:
    """The items of a file that `aspo eval` wrote. Raises ValueError for any other file."""
    read = parse_json(path.read_bytes(), str(path))
    items = read.get("items") if isinstance(read, Mapping) else None
    if not isinstance(items, list) or not all(
        isinstance(item, Mapping) and "id" in item and _counts(item) for item in items
    ):
        raise ValueError(f"{path} is not a file that `aspo eval` wrote: it has no items with ids and counts")
    return items


def _counts(item: Mapping[str, Any]) -> bool:
    counts = item.get("counts")
    return isinstance(counts, Mapping) and all(value is None or _is_number(value) for value in counts.values())


def by_name(paths: Sequence[Path], what: str) -> dict[str, Path]:
    """Name -> path: a folder's name, a file's without its ending. Raises ValueError where two are the same."""
    named: dict[str, Path] = {}
    for path in paths:
        name = path.name if path.is_dir() else path.stem
        if name in named:
            raise ValueError(f"{what}: {named[name]} and {path} would both be called {name!r}; rename one")
        named[name] = path
    return named


def pick(rows: Sequence[Any], count: int) -> list[Any]:
    """`count` rows spread evenly over all of them."""
    step = max(1.0, len(rows) / count) if count else 1.0
    return [rows[int(k * step)] for k in range(min(count, len(rows)))]


def weigh(
    model: torch.nn.Module, processor: Any, rows: Sequence[Row], *, alpha: float = 0.5, perplexity_scale: str = "ppl"
) -> Iterator[Item]:
    """Preference rows with the weight, similarity and perplexity of each chosen sentence, as the model sees them.

    Rows without `chosen_similarity` are weighed by perplexity alone, as training does.
    """
    aspo = objectives.get("aspo")
    for row, batch in zip(rows, response_logps(model, processor, rows, batch_size=1), strict=True):
        inputs = objectives.Inputs(batch.layout, batch.logps, ref_logps=batch.logps, similarity=batch.similarity)
        weights = aspo(inputs, alpha=alpha, perplexity_scale=perplexity_scale).stats["sentence_weights"].tolist()
        perplexities = [
            math.exp(min(nll, 700.0)) for nll in sentence_nll(batch.logps, batch.layout)[: len(weights)].tolist()
        ]
        similarities = [None] * len(weights) if batch.similarity is None else batch.similarity.tolist()
        chosen = list(_sentences(row, "chosen"))
        if len(chosen) != len(weights):
            raise ValueError(
                f"row {row['id']!r}: {len(weights)} of its {len(chosen)} chosen sentences have tokens of their own; "
                "join the others to the sentence before them"
            )
        numbers = zip(weights, similarities, perplexities, strict=True)
        yield Item(
            id=str(row["id"]),
            prompt=_prompt_text(row["prompt"]),
            chosen=[
                replace(s, weight=w, similarity=c, perplexity=p) for s, (w, c, p) in zip(chosen, numbers, strict=True)
            ],
            rejected=list(_sentences(row, "rejected")),
            images=load_images(row),
        )


def _sentences(row: Row, column: str) -> Iterator[Sentence]:
    """The sentences of a response, judged where the row has a scene."""
    text = response_text(row[column])
    spans = row.get(f"{column}_sentences")
    spans = split_sentences(text) if spans is None else check_spans(text, spans)
    claims = judge(text, Scene.from_json(row["scene"])) if row.get("scene") else []
    for start, end in spans:
        inside = [claim for claim in claims if start <= claim.start < end]
        verdicts = [claim.verdict for claim in inside]
        verdict = next((v for v in ("false", "true", "unparseable") if v in verdicts), None)
        notes = [f"it is {claim.true or 'not there'}" for claim in inside if claim.verdict == "false"]
        yield Sentence(text[start:end], verdict=verdict, note="; ".join(notes))


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    parts = [message["content"] for message in prompt]
    return "\n".join(
        part if isinstance(part, str) else " ".join(piece.get("text") or "" for piece in part) for part in parts
    ).strip()


DESCRIPTION = """\
Write one HTML page about finished runs: training curves, figures before and after with paired intervals, and answers
whose sentences are coloured by ASPO's weight. The page stands alone: no scripts, nothing loaded from elsewhere.

  aspo report --runs runs/dpo runs/aspo --evals base.json dpo.json aspo.json --out report.html
  aspo report --data scored/ --model world --out sentences.html

Systems are called by their folders' and files' names; a run and an evaluation of the same name share a colour. The
first of --evals is what the others are compared with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `aspo report`."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--runs", nargs="*", type=Path, default=[], help="folders that `aspo train` wrote")
    add("--evals", nargs="*", type=Path, default=[], help="files that `aspo eval` wrote, the baseline first")
    add("--data", help="preference rows with similarities (`aspo score`), to show how their sentences are weighed")
    add("--image-root", help="where relative image paths of --data start, and where images may lie")
    add("--model", help="the start model, whose perplexity weighs the sentences of --data")
    add("--dtype", help="weights' type: float32 (default), bfloat16, float16, auto")
    add("--alpha", type=float, default=0.5, help="share of similarity in a weight, as in training (default: 0.5)")
    add("--perplexity-scale", default="ppl", help="min-max over ppl (default) or nll, as in training")
    add("--items", type=int, default=12, help="rows of --data to show (default: 12)")
    add("--resamples", type=int, default=2000, help="bootstrap resamples behind the intervals (default: 2000)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add("--title", default="Sentence-level preference optimisation", help="the page's heading")
    add("--out", type=Path, required=True, help="HTML file to write")


def run(args: argparse.Namespace) -> int:
    """`aspo report`; returns 0."""
    if not (args.runs or args.evals or args.data):
        raise ValueError("nothing to report: give --runs, --evals or --data")
    if bool(args.data) != bool(args.model):
        raise ValueError("--data and --model go together: the model's perplexity weighs the data's sentences")
    if args.items < 1:
        raise ValueError(f"--items is {args.items}; it must be at least 1")
    histories = {name: read_history(path) for name, path in by_name(args.runs, "--runs").items()}
    evaluations = {name: read_evaluation(path) for name, path in by_name(args.evals, "--evals").items()}
    styles = {name: k for k, name in enumerate(dict.fromkeys([*(evaluations or ["base"]), *histories]))}
    sections, about = [], []
    if evaluations:
        comparison = compare(evaluations, differences(list(evaluations)), resamples=args.resamples, seed=args.seed)
        sections.append(headline_section(comparison, styles))
        about.append(f"{comparison.items} evaluation items")
    if histories:
        sections.append(curves_section(histories, styles))
    if args.data:
        rows = load_rows(args.data, kind="preference", image_root=args.image_root)
        shown = pick(rows, args.items)
        validate_rows(shown, kind="preference")
        model, processor = load_model(args.model, args.dtype)
        items = list(weigh(model, processor, shown, alpha=args.alpha, perplexity_scale=args.perplexity_scale))
        sections.append(items_section(items))
        about.append(f"{len(items)} of {len(rows)} preference pairs, weighed at step 0 with alpha {args.alpha:g}")
    if evaluations:
        sections.append(figures_section(comparison))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(render(args.title, "; ".join(about), sections), encoding="utf-8", errors="replace")
    print(f"report written to {args.out}")
    return 0


def differences(systems: Sequence[str]) -> list[tuple[str, str]]:
    """Which differences to show: each system minus each earlier one, or minus the first where there are many."""
    pairs = [(later, earlier) for earlier, later in combinations(systems, 2)]
    return pairs if len(systems) <= DIFFERENCES_OF_ALL else [pair for pair in pairs if pair[1] == systems[0]]
