"""`aspo pairs`: preference pairs made with the model itself, by one of several methods (`aspo.pairs`).

Rows go through a method batch by batch, in shards (`aspo.shards`). A batch is always the same rows by their place, so
that any number of processes, stopped or not, gives what one gives. rows.jsonl gets what the method makes, done.jsonl a
record of every row of --data.
"""

import argparse
import functools
import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aspo import shards
from aspo.data import load_rows, row_name, validate_rows
from aspo.folder import ROWS_FILE, image_entries, read_lines, row_line
from aspo.model import load_model
from aspo.pairs import MADE, METHODS, Make, Row, seva
from aspo.pairs.noise import NOISE_STEPS, add_noise, image_seeds, noise_schedule
from aspo.pairs.seva import DROPPED, answer_pairs, judge
from aspo.resume import check_settings, write_json

DONE_FILE, SETTINGS_FILE = "done.jsonl", "settings.json"
JOB = "pairs"  # the name of its shards
BOUNDS: dict[str, tuple[float, float | None]] = {  # option -> least and greatest value
    "noise_step": (0, NOISE_STEPS - 1),
    "max_new_tokens": (1, None),
    "batch_size": (1, None),
    "temperature": (0, None),
    "candidates": (2, None),
    "beams": (1, None),
    "max_sentences": (1, None),
    "clip_weight": (0, 1),
    "margin": (0, None),
}
NEGATIVES = ("crop", "noise", "random", "hard", "misp")


def lines_of(make: Make, out: Path) -> shards.Make:
    """A method's batches as lines of rows.jsonl and of done.jsonl."""

    def lines(batch: Sequence[Row], start: int) -> dict[str, list[str]]:
        rows, records = [], []
        for row, made in zip(batch, make(batch, start), strict=True):
            rows += [row_line(out, new) for new in made.rows]
            record = {"id": row["id"], "status": made.status}
            if made.counts:
                record["counts"] = dict(made.counts)
            records.append(json.dumps(record) + "\n")
        return {DONE_FILE: records, ROWS_FILE: rows}

    return lines


def make_pairs(
    model: torch.nn.Module,
    processor: Any,
    rows: Sequence[Row],
    out: Path,
    *,
    batch_size: int = 16,
    seed: int = 0,
    engine: shards.Engine | None = None,
    **options: Any,
) -> None:
    """SeVa's pairs of all rows in `out`; options: as of `answer_pairs`. engine: None = these processes."""
    settings = {**seva.OPTIONS, "seed": seed, "batch_size": batch_size, **options}

    def load() -> shards.Make:
        return lines_of(seva.maker(settings, lambda: (model, processor)), out)

    job = shards.Job(out, JOB, rows, {"method": "seva", **settings}, load, batch_size, title="answering")
    shards.run_job(job, engine or shards.Engine(shards.Processes.current()))


def recorded(out: Path) -> dict[str, str]:
    """id -> status of the rows that are done."""
    return {line["id"]: line["status"] for line in read_lines(out / DONE_FILE)}


def summary(
    status: Mapping[str, str],
    out: Path,
    dropped: Mapping[str, str] = seva.DROPPED,
    nouns: tuple[str, str] = seva.NOUNS,
) -> str:
    """How many rows were made of how many, how many gave none and why, and what else the method counted."""
    reasons = Counter(status.values())
    counts: Counter[str] = Counter()
    for line in read_lines(out / DONE_FILE):
        counts.update(line.get("counts", {}))
    made = sum(1 for _ in read_lines(out / ROWS_FILE))
    lines = [f"{made} {nouns[0]} of {len(status)} {nouns[1]}, in {out}"]
    lines += [f"  dropped {reasons[key]}: {text}" for key, text in dropped.items() if reasons[key]]
    return "\n".join([*lines, *(f"  {count} {words}" for words, count in counts.items())])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aspo pairs`."""
    methods = "\n".join(f"  {name:10}{about}" for name, (_, about) in METHODS.items())
    parser.description = (
        "Make preference pairs with a model, from prompts with images (some methods: from pairs). --method:\n\n"
        f"{methods}\n\n"
        "Prompts that give no pair are counted with the reason. Writes a folder for `aspo score` and `aspo train`.\n"
        "Run the same command again to go on after a stop. docs/pairs.md tells what each method does."
    )
    parser.epilog = (
        "examples:\n"
        "  aspo pairs --model llava-hf/llava-1.5-7b-hf --data llava_instruct_150k.json --image-root coco/train2017 \\\n"
        "             --limit 20000 --dtype bfloat16 --out pairs\n"
        "  aspo pairs --model world --data world:train --limit 500 --out runs/pairs\n"
        "  aspo pairs --method csr --model world --scorer world --data world:train --limit 100 --out runs/csr"
    )
    add = parser.add_argument
    add("--method", default="seva", choices=METHODS, metavar="NAME", help="see above (default: seva)")
    add("--model", help="folder or hub name of the model; world = the embedded one")
    add("--data", required=True, help="rows: folder, .jsonl, .json (LLaVA's rows too), .parquet or world:<split>")
    add("--out", required=True, help="folder to write")
    add("--limit", type=int, help="only the first rows (default: all)")
    add("--image-root", help="where relative image paths start (default: the folder of --data)")
    own = parser.add_argument_group(
        "options of methods",
        "one that the method does not read is refused, "
        "but for --model and --seed, which `aspo run` gives to every method",
    )
    add = own.add_argument
    add("--noise-step", type=int, help="diffusion step, 0 to 999 (default: 500)")
    add(
        "--max-new-tokens",
        type=int,
        help="tokens at most: of an answer (default: 256); csr, sentinel: of a sentence (64)",
    )
    add("--temperature", type=float, help="0 = greedy (default), else sampling; csr, sentinel: above 0 (default: 1)")
    add("--seed", type=int, help="of the noise and the sampling (default: 0)")
    add("--batch-size", type=int, help="prompts, and sequences, at a time (default: 16)")
    add("--scorer", help="csr, sentinel, hard, misp (the others' figures): CLIP as for `aspo score`, or world")
    add("--count", type=int, help="crop, noise, random, hard, misp: negative images of a row, 1 to 16 (default: 3)")
    add("--pool", help="random, hard, misp: rows or a folder of images to pick from (default: those of --data)")
    add("--candidates", type=int, help="csr, sentinel: next sentences sampled behind each beginning (default: 5)")
    add("--max-sentences", type=int, help="csr, sentinel: sentences of an answer at most (default: 16)")
    add("--beams", type=int, help="csr: how many of the best, and of the worst, beginnings go on (default: 2)")
    add("--clip-weight", type=float, help="csr: similarity's share in a sentence's score, 0 to 1 (default: 0.9)")
    add("--judge", help="sentinel: similarity (default), or truth (the world's scenes)")
    add("--margin", type=float, help="sentinel: least difference of the two sentences' cosines (default: 0.02)")
    add("--language", help="csr, sentinel: language code of the sentence splitter (default: en)")
    add("--engine", help="csr, sentinel: what generates, transformers (default), or vllm where it is installed")
    add("--dtype", help="float32, bfloat16, float16 or auto (default: float32)")
    add("--device", help="torch device (default: the accelerator if there is one, else cpu)")
    shards.add_arguments(parser)


COMMON = ("method", "model", "data", "out", "limit", "image_root", "seed", *shards.ARGUMENTS)
"""Options that any method is given: by `aspo run`, or because they do not change what is made."""


def method_options(args: argparse.Namespace, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options: as given, else their defaults. Raises ValueError for one that it would ignore."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in given:
        if name not in defaults and name not in COMMON:
            raise ValueError(f"{_flag(name)} is not read by --method {args.method}: drop it")
    options = {name: given.get(name, default) for name, default in defaults.items()}
    if "model" in options and options["model"] is None:
        raise ValueError(f"--method {args.method} needs --model")
    for name, value in options.items():
        low, high = BOUNDS.get(name, (None, None))
        if value is not None and low is not None and not (low <= value and (high is None or value <= high)):
            least = f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
            raise ValueError(f"{_flag(name)} is {value}; it must be {least}")
    return options


def run(args: argparse.Namespace) -> int:
    """Run `aspo pairs`."""
    method = importlib.import_module(f"aspo.pairs.{METHODS[args.method][0]}")
    options = method_options(args, method.OPTIONS)
    if args.method in NEGATIVES:
        return method.run(args)
    engine = shards.Engine.of(args)
    rows = load_rows(args.data, kind="prompt", limit=args.limit, image_root=args.image_root)
    validate_rows(rows, "prompt")
    _check_ids(rows)
    method.check(rows, options)
    if args.method not in ("seva", "unpaired") and not any(image_entries(row) for row in rows):
        raise ValueError(f"none of the {len(rows)} rows of {args.data} has an image; --method {args.method} needs them")
    out = Path(args.out)
    settings = _check_settings(args, options, out)
    if "device" in options:
        options["device"] = engine.processes.device_for(options["device"])

    def load() -> shards.Make:
        made_by = method.maker(
            options, lambda: load_model(options["model"], options["dtype"], device=options["device"])
        )
        return lines_of(made_by, out)

    older = DONE_FILE if (out / DONE_FILE).exists() else ROWS_FILE
    if not shards.check_older(engine.processes, out, JOB, older, rows["id"]):
        decides = {"method": args.method} | {name: value for name, value in options.items() if name != "device"}
        size = options.get("batch_size", 1)
        begin = functools.partial(write_json, out / SETTINGS_FILE, settings)
        shards.run_job(shards.Job(out, JOB, rows, decides, load, size, title="answering", begin=begin), engine)
    status = recorded(out)
    if engine.processes.main:
        print(summary(status, out, method.DROPPED, method.NOUNS))
    if MADE not in status.values():
        raise ValueError(f"no pair was made of {len(status)} {method.NOUNS[1]}; the list above says why")
    return 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_ids(rows: Any) -> None:
    twice = [name for name, count in Counter(rows["id"]).items() if count > 1]
    if twice:
        raise ValueError(f"{row_name({'id': twice[0]})} is there more than once; ids must differ to go on after a stop")


def _check_settings(args: argparse.Namespace, options: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The settings that make the pairs what they are; a run that goes on must have the same."""
    given = {"model": options.get("model"), "data": args.data, "image_root": args.image_root}
    settings = given | {name: value for name, value in options.items() if name != "device"}
    if args.method != "seva":  # whose settings were written before there were others
        settings = {"method": args.method, **settings}
    if any((out / name).exists() for name in (ROWS_FILE, DONE_FILE, shards.SHARDS_FOLDER)):
        seva_too = {"method": "seva", **settings}
        check_settings(out / SETTINGS_FILE, seva_too, "aspo pairs", "rows", before_all={"method": "seva"})
    return settings


__all__ = [
    "DROPPED",
    "MADE",
    "add_noise",
    "answer_pairs",
    "image_seeds",
    "judge",
    "make_pairs",
    "noise_schedule",
    "recorded",
]
