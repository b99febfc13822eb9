"""The flags of `aspo eval --suite`, and what it writes."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aspo.evaluation.statistics import compare, markdown
from aspo.folder import append_line, read_lines
from aspo.model import load_model
from aspo.resume import nan_to_null, write_json
from aspo.scores import progress_bar
from aspo.suite import harness
from aspo.suite.amber import AMBER, AMBER_D, AMBER_G
from aspo.suite.benchmark import Benchmark, Item, Source
from aspo.suite.chair import CHAIR
from aspo.suite.hallusion import HALLUSION
from aspo.suite.judge import Judge
from aspo.suite.mmhal import MMHAL
from aspo.suite.mmvp import MMVP
from aspo.suite.pope import POPE
from aspo.suite.run import Kept, Options, run_benchmark, select
from aspo.suite.shr import SHR

OWN = {b.name: b for b in (POPE, CHAIR, AMBER, AMBER_G, AMBER_D, SHR, MMHAL, HALLUSION, MMVP)}
KEY = "OPENAI_API_KEY"
FLAGS = ("suite_data", "suite_images", "append", "judge", "judge_model", "judge_workers", "harness")
NOT_OURS = (
    "data",
    "image_root",
    "objects",
    "questions",
    "minimal_pairs",
)  # flags of `aspo eval` that a suite does not read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `aspo eval` has for benchmarks."""
    add = parser.add_argument_group("benchmarks (docs/suite.md)").add_argument
    add("--suite", metavar="NAME", help=f"{', '.join(OWN)}; through another harness: {', '.join(harness.EXTERNAL)}")
    add("--suite-data", type=Path, metavar="DIR", help="where the benchmark's files were downloaded to")
    add("--suite-images", type=Path, metavar="DIR", help="its images, where they do not lie in --suite-data")
    add("--append", metavar="TEXT", help="text behind every prompt, such as ' Answer with yes or no.'")
    add("--judge", metavar="URL", help=f"an OpenAI-compatible endpoint, http://host:port/v1; {KEY} has its key")
    add("--judge-model", metavar="NAME", help="the judge's name there")
    add("--judge-workers", type=int, metavar="N", help="requests to the judge at a time (default: 8)")
    add("--harness", choices=tuple(harness.HARNESSES), help="which other harness runs it (default: the one installed)")


def refuse_strays(args: argparse.Namespace) -> None:
    """ValueError for flags that the run would not read: a benchmark's without --suite, others with it."""
    wrong = NOT_OURS if args.suite is not None else FLAGS
    for name in wrong:
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} is not read with --suite: drop one of them" if args.suite else f"{flag} goes with --suite NAME"
            )


def run(args: argparse.Namespace) -> int:
    """`aspo eval --suite`; returns 0."""
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a file, for example {args.out / (args.suite + '.json')}")
    if harness.known(args.suite):
        return _through_harness(args)
    if args.suite not in OWN:
        known = (*OWN, *harness.EXTERNAL)
        near = difflib.get_close_matches(args.suite, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"neither we nor lmms-eval nor VLMEvalKit are known to have the benchmark {args.suite!r}{hint} "
            f"(known: {', '.join(known)})"
        )
    if args.harness is not None:
        raise ValueError(f"--harness is not read with --suite {args.suite}, which is scored here: drop it")
    return _score_here(args, OWN[args.suite])


def _judge(args: argparse.Namespace) -> Judge | None:
    if (args.judge is None) != (args.judge_model is None):
        raise ValueError("--judge URL and --judge-model NAME go together")
    return None if args.judge is None else Judge(args.judge, args.judge_model, os.environ.get(KEY))


def _score_here(args: argparse.Namespace, benchmark: Benchmark) -> int:
    judge = _judge(args)
    if judge is not None and benchmark.questions is None:
        raise ValueError(f"{benchmark.title} is scored without a judge: drop --judge")
    if judge is None and benchmark.judge_needed:
        raise ValueError(f"{benchmark.title} needs a judge: --judge http://host:port/v1 --judge-model NAME")
    if args.judge_workers is not None and args.judge_workers < 1:
        raise ValueError(f"--judge-workers is {args.judge_workers}; it must be at least 1")
    if args.suite_data is None:
        raise ValueError(f"give --suite-data DIR: {benchmark.title}'s files, downloaded from {benchmark.home}")
    if not args.suite_data.is_dir():
        raise ValueError(f"--suite-data {args.suite_data} is no folder; download {benchmark.title}: {benchmark.home}")
    batch_size = 16 if args.batch_size is None else args.batch_size
    options = Options(batch_size, args.max_new_tokens, args.temperature, args.seed, args.append or "")
    partial = args.out.with_name(args.out.name + ".partial.jsonl")
    kept = _kept(args.out, partial)
    rows = select(benchmark.load(Source(args.suite_data, args.suite_images)), args.limit)
    model, processor = _load(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar() as bar:
        items = run_benchmark(
            benchmark,
            rows,
            model,
            processor,
            options,
            judge,
            workers=args.judge_workers or 8,
            kept=kept,
            save=lambda line: append_line(partial, json.dumps(line) + "\n"),
            progress=_report_to(bar, benchmark.title),
        )
    head = {
        **{"suite": benchmark.name, "source": benchmark.home, "model": args.model, "adapter": args.adapter},
        **{"data": str(args.suite_data), "options": asdict(options)},
        "judge": None if judge is None else {"url": judge.url, "model": judge.model},
    }
    _finish(args, head, items, partial)
    named = args.out.with_name(f"{args.out.stem}.answers.json")
    write_json(named, benchmark.answers(rows, items))
    print(f"the answers alone, as {benchmark.title}'s own scorer reads them: {named}")
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    if args.adapter:
        return load_model(args.adapter, args.dtype, base=args.model)
    return load_model(args.model, args.dtype)


def _report_to(bar: Any, title: str) -> Callable[[str, int, int], None]:
    tasks: dict[str, Any] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(f"{title}: {stage}", total=total)
        bar.update(tasks[stage], completed=done)

    return progress


def _kept(out: Path, partial: Path) -> Kept:
    """Answers and replies by key: of a finished result, and of what a stopped run had got."""
    kept: Kept = {}
    if out.is_file():
        try:
            result = json.loads(out.read_text(encoding="utf-8"))
            for item in result["items"] if "suite" in result else _foreign(out):
                kept[item["key"]] = {name: item[name] for name in ("text", "tokens", "finished")}
                kept |= {entry["key"]: {"reply": entry["reply"]} for entry in item.get("judge", ())}
        except (json.JSONDecodeError, KeyError, TypeError):
            _foreign(out)
    return kept | {line["key"]: line for line in read_lines(partial)}


def _foreign(out: Path) -> Any:
    raise ValueError(f"{out} exists and is no result of `aspo eval --suite`: name another, or delete it") from None


def _finish(args: argparse.Namespace, head: Mapping[str, Any], items: Sequence[Item], partial: Path | None) -> None:
    """Write the result, figures with intervals and items, and print the figures."""
    comparison = compare({"value": items}, seed=args.seed)
    estimates = comparison.systems["value"]
    result = {
        **head,
        "summary": {name: estimate.value for name, estimate in estimates.items()},
        "intervals": {name: [estimate.low, estimate.high] for name, estimate in estimates.items()},
        "items": list(items),
    }
    write_json(args.out, nan_to_null(result))
    if partial is not None:
        partial.unlink(missing_ok=True)
    print(markdown(comparison))
    asked, unread = (sum(item["counts"].get(name, 0) for item in items) for name in ("judge_asked", "judge_unread"))
    if unread:
        print(f"\n{unread} of the judge's {asked} verdicts could not be read: docs/suite.md says what they count as")
    print(f"\n{len(items)} items; 95 % bootstrap intervals; written to {args.out}")


def _through_harness(args: argparse.Namespace) -> int:
    for flag in ("suite_data", "suite_images", "append", "judge_workers", "max_new_tokens"):
        if getattr(args, flag) is not None:
            raise ValueError(
                f"--{flag.replace('_', '-')} is not read with --suite {args.suite}: another harness runs it"
            )
    if args.temperature:
        raise ValueError(f"--temperature is not read with --suite {args.suite}: another harness runs it")
    started = time.time()
    found = harness.run(
        args.suite,
        args.model,
        args.adapter,
        args.out.with_name(f"{args.out.stem}.{args.suite}"),
        which=args.harness,
        judge=_judge(args),
        batch_size=args.batch_size,
        limit=args.limit,
        dtype=args.dtype,
    )
    head = {
        **{"suite": args.suite, "source": found.harness, "model": args.model, "adapter": args.adapter},
        **{"command": list(found.command), "seconds": round(time.time() - started), "harness_summary": found.summary},
    }
    for name, value in found.summary.items():
        print(f"{found.harness}: {name} = {value}")
    if not found.items:
        write_json(args.out, {**head, "summary": {}, "intervals": {}, "items": []})
        print(f"{found.harness} keeps no score for single items of {args.suite}: no intervals, no pairing; {args.out}")
        return 0
    _finish(args, head, found.items, None)
    return 0
