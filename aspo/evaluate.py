"""`aspo eval`: hallucination figures of a model on images whose truth is known. docs/evaluation.md defines each figure.

Three kinds of rows, told apart by the truth they bring: `scene` (the embedded world), `question` + `answer` ("yes" or
"no", as POPE has them), `objects` (names of what is there, as CHAIR has them). Each row becomes one item of counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from aspo.evaluation.identity import model_identity
from aspo.evaluation.judges import JUDGES, Item, Options, Row, image_hash, split_and_truth
from aspo.evaluation.metrics import YES_NO_SPLITS, ObjectVocabulary
from aspo.evaluation.statistics import compare, markdown
from aspo.folder import append_line, read_lines
from aspo.model import check_model, load_model
from aspo.resume import nan_to_null
from aspo.rows import load_rows, validate_rows
from aspo.suite import command as suite
from aspo.validate import bad_row, named_column, short_repr
from aspo.world.scenes import Scene


def evaluate(
    model: torch.nn.Module,
    processor: Any,
    rows: Sequence[Row],
    options: Options | None = None,
    *,
    vocabulary: ObjectVocabulary | None = None,
    done: Mapping[str, Item] | None = None,
    save: Callable[[Sequence[Item]], None] = lambda items: None,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Item]:
    """One item per row: {"id", "key", "asked", "counts", ...}, in the rows' order.

    Args:
        rows: evaluation rows (see the module). `id`, each row's own, names an item (its number where it has none);
            rows about the same image share a `cluster`.
        vocabulary: needed for rows with `objects`.
        done: items of an earlier run by key; a batch whose rows all are in it is not computed again.
        save: called with the items of each batch that was computed.
        progress: called with the number of rows after each batch.

    Raises ValueError as `check_truth` does, before anything is generated.
    """
    options = options or Options()
    done = done or {}
    kinds = check_truth(rows, vocabulary)
    identity = model_identity(model, processor)
    items: list[Item] = []
    for start in range(0, len(rows), options.batch_size):
        batch = [dict(rows[i]) for i in range(start, min(start + options.batch_size, len(rows)))]
        contents = [_content(row, vocabulary) for row in batch]
        keys = [_hash(content, identity, asdict(options)) for content in contents]
        if not all(key in done for key in keys):
            results: list[Item] = [{} for _ in batch]
            for kind, judged in JUDGES.items():
                index = [k for k in range(len(batch)) if kinds[start + k] == kind]
                if index:
                    found = judged(model, processor, [batch[k] for k in index], options, start, vocabulary)
                    for k, item in zip(index, found, strict=True):
                        results[k] = {"key": keys[k], **item}
            save(results)
        else:
            results = [done[key] for key in keys]
        # The id is not part of the key: the same question about the same image may stand in two rows.
        items += [
            {**item, "id": _id(start + k, row), "asked": _asked(content, item)}
            for k, (row, content, item) in enumerate(zip(batch, contents, results, strict=True))
        ]
        progress(len(batch))
    return items


def check_truth(rows: Iterable[Row], vocabulary: ObjectVocabulary | None = None) -> list[str]:
    """Each row's kind of truth: "scene", "question" or "objects".

    Raises ValueError, naming the row, for one without truth or with one that cannot be read, for `objects` without a
    vocabulary or that are not in it, and for an id that an earlier row has.
    """
    kinds: list[str] = []
    places: dict[str, int] = {}
    for index, row in enumerate(rows):
        kinds.append(_kind(index, row, vocabulary))
        before = places.setdefault(_id(index, row), index)
        if before != index:
            raise bad_row(
                index, row, "id", f"row {before} has it too; ids must differ (`cluster` is what rows of an image share)"
            )
    return kinds


def _id(index: int, row: Row) -> str:
    return str(index if row.get("id") is None else row["id"])


def _kind(index: int, row: Row, vocabulary: ObjectVocabulary | None) -> str:
    if row.get("scene") is not None:
        named_column("scene", index, row, Scene.from_json, row["scene"])
        return "scene"
    if row.get("question") is not None and row.get("answer") is not None:
        split, truth = split_and_truth(row)
        if split not in (*YES_NO_SPLITS, "all"):
            known = ", ".join(YES_NO_SPLITS)
            raise bad_row(index, row, "split", f"it is {short_repr(row['split'])}; it must be one of {known}, all")
        if truth not in ("yes", "no"):
            raise bad_row(index, row, "answer", f'it is {short_repr(row["answer"])}; it must be "yes" or "no"')
        return "question"
    if row.get("objects") is not None:
        if vocabulary is None:
            raise bad_row(index, row, "objects", "give the object vocabulary, a file with its names (--objects)")
        named_column("objects", index, row, _check_objects, row["objects"], vocabulary)
        return "objects"
    raise ValueError(
        f"row {index} has no truth to judge an answer by: it needs 'scene', 'question' + 'answer' or 'objects'"
    )


def _check_objects(objects: Any, vocabulary: ObjectVocabulary) -> None:
    if not isinstance(objects, list | tuple) or not all(isinstance(name, str) for name in objects):
        raise ValueError(f"it is {short_repr(objects)}; it must be a list of names")
    for name in objects:
        vocabulary.name(name)


def _content(row: Row, vocabulary: ObjectVocabulary | None) -> str:
    """A hash of what a row asks and of its truth, with its images."""
    columns = ("prompt", "scene", "question", "answer", "objects", "split", "cluster")
    truth = {name: row[name] for name in columns if row.get(name) is not None}
    if "objects" in truth and vocabulary is not None:
        truth["vocabulary"] = vocabulary.canonical
    return _hash(truth, image_hash(row))


def _asked(content: str, item: Item) -> str:
    """A hash of what an item was asked, whatever was answered: the same for every system that may be compared on it."""
    questions = [[q["split"], q["question"], q["answer"]] for q in item.get("questions", ())]
    pairs = [[pair["true"], pair["false"]] for pair in item.get("minimal_pairs", ())]
    return _hash(content, questions, pairs)[:16]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


DESCRIPTION = """\
Measure how often a model says what is not there.

  aspo eval --model world --data world:test --out base.json
  aspo eval --model world --adapter runs/aspo --data world:test --out aspo.json
  aspo eval --model llava-hf/llava-1.5-7b-hf --suite pope --suite-data POPE/ --suite-images val2014/ --out pope.json

Rows bring their own truth: `scene` (the embedded world: descriptions judged sentence by sentence, yes/no questions,
minimal pairs), `question` and `answer` (yes or no; `split` random, popular or adversarial), or `objects` with
--objects (CHAIR). --suite reads the files of POPE, CHAIR, AMBER, SHR, MMHal-Bench, HallusionBench or MMVP instead, or
runs another benchmark through lmms-eval or VLMEvalKit (docs/suite.md). docs/evaluation.md defines every figure. The
items are kept in --out, so that `aspo report` can compare systems with paired intervals. Run the same command again to
go on after an interruption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `aspo eval`."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--model", required=True, help='folder or hub name of the model, or "world" for the embedded one')
    add("--adapter", help="folder of a LoRA adapter to put on the model")
    add("--data", help="evaluation rows: a folder, .jsonl, .parquet, or world:test and its other splits")
    add("--image-root", help="where relative image paths start (default: the folder of --data)")
    add("--out", required=True, type=Path, help="file to write: figures, and the items they come from, as JSON")
    add("--objects", type=Path, help="object vocabulary for rows with `objects`: a line is `name, synonym, synonym`")
    add("--limit", type=int, help="evaluate the first LIMIT rows only")
    add("--batch-size", type=int, help="answers generated at a time (default: 16)")
    add("--max-new-tokens", type=int, help="longest answer (default: 256; a benchmark's own with --suite)")
    add("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token; above 0 samples")
    add("--questions", type=int, help="yes/no questions for each scene of the world and split, 0 for none (default: 6)")
    add("--minimal-pairs", type=int, help="minimal pairs for each scene, 0 for none (default: one for each object)")
    add("--seed", type=int, default=0, help="of the world's questions, of sampling and of the intervals (default: 0)")
    add("--dtype", help="weights' type: float32 (default), bfloat16, float16, auto")
    suite.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`aspo eval`; returns 0."""
    suite.refuse_strays(args)
    check_model(args.adapter or args.model, args.model if args.adapter else None)  # before rows are made
    if args.suite is not None:
        return suite.run(args)
    if args.data is None:
        raise ValueError("nothing to evaluate on: give --data ROWS, or --suite NAME --suite-data DIR")
    options = Options(
        max_new_tokens=256 if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        batch_size=16 if args.batch_size is None else args.batch_size,
        questions=args.questions,
        minimal_pairs=args.minimal_pairs,
    )
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a file, for example {args.out / 'eval.json'}")
    partial = args.out.with_name(args.out.name + ".partial.jsonl")
    done = _finished(args.out, partial)
    vocabulary = None
    if args.objects is not None:
        vocabulary = ObjectVocabulary(args.objects.read_text(encoding="utf-8").splitlines())
    rows = load_rows(args.data, kind="prompt", limit=args.limit, image_root=args.image_root)
    validate_rows(rows, kind="prompt")
    check_truth(rows, vocabulary)
    model, processor = (
        load_model(args.adapter, args.dtype, base=args.model) if args.adapter else load_model(args.model, args.dtype)
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"evaluating {args.adapter or args.model}", total=len(rows))
        items = evaluate(
            model,
            processor,
            rows,
            options,
            vocabulary=vocabulary,
            done=done,
            save=lambda items: append_line(partial, "".join(json.dumps(item) + "\n" for item in items)),
            progress=lambda count: bar.advance(task, count),
        )
    comparison = compare({"value": items}, seed=args.seed)
    estimates = comparison.systems["value"]
    result = {
        "model": args.model,
        "adapter": args.adapter,
        "data": args.data,
        "options": asdict(options),
        "summary": {name: estimate.value for name, estimate in estimates.items()},
        "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
    }
    _write(args.out, result, items)
    partial.unlink(missing_ok=True)
    print(markdown(comparison))
    print(f"\n{len(items)} items; 95 % bootstrap intervals; written to {args.out}")
    return 0


def _finished(out: Path, partial: Path) -> dict[str, Item]:
    """Items of an earlier run by key: of its result, or of what it had done when it was stopped."""
    done: dict[str, Item] = {}
    if out.is_file():
        try:
            done = {item["key"]: item for item in json.loads(out.read_text(encoding="utf-8"))["items"]}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{out} exists and is no result of `aspo eval`: name another --out, or delete it"
            ) from None
    return done | {item["key"]: item for item in read_lines(partial)}


def _write(out: Path, result: Mapping[str, Any], items: Sequence[Item]) -> None:
    """The result, one item a line, written whole or not at all; NaN becomes null."""
    head = json.dumps(nan_to_null(result), indent=1)[:-2]
    body = ",\n".join(json.dumps(item) for item in items)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(f'{head},\n "items": [\n{body}\n]}}\n', encoding="utf-8")
    os.replace(temporary, out)
