"""`aspo rewards`: how right each token of the responses is, kept in the data set as `<column>_token_scores`.

    fisao   object words scored by a CLIP model (the model's own vision encoder where it is one) and calibrated on the
            model's answers to rows set apart: `verifier`, `calibrate`, docs/fisao.md
    tldr    object words scored by a head on the model's hidden states, trained on perturbed captions: `tldr`,
            docs/tldr.md
    changes 1 where chosen and rejected differ, for objectives of corrected segments: `changes`

All write [start, end, r] spans over characters of the response; a token that overlaps none has r = 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aspo import shards
from aspo.folder import image_entries, read_lines
from aspo.lazy import Lazy
from aspo.model import load_model
from aspo.rewards.analysis import run_analysis
from aspo.rewards.calibrate import (
    ANSWERS_FILE,
    CALIBRATION_FILE,
    Answered,
    answer_rows,
    calibration_of,
    load_verifier,
    summary,
    write_calibration,
)
from aspo.rewards.changes import score_changes
from aspo.rewards.tldr import run_tldr
from aspo.rewards.token_scores import (
    Spans,
    begin,
    check_apart,
    load_preferences,
    readings,
    scored_summary,
    write_scored,
)
from aspo.rewards.verifier import BARE_WORD, WORLD_TEMPLATE, Calibration, Verifier, compare_towers
from aspo.validate import response_text

Row = Mapping[str, Any]

DESCRIPTION = """\
Score the tokens of preference rows, for objectives that weigh tokens (fisao, weighted_dpo, ddpo) and for `aspo online`.

  aspo rewards --method fisao --model world --scorer world --objects world \\
               --calibrate world:calibration --data runs/pairs --out runs/rewarded
  aspo rewards --method tldr --model world --objects world --train world:calibration --data runs/pairs --out runs/tldr

fisao: the model answers the calibration rows, whose truth (`objects` or `scene`) tells right from hallucinated object
words; their mean similarities to the images are the baselines of the rewards. Without --data it stops there. tldr: a
head on the model's hidden states learns to tell true captions' tokens from swapped ones. changes: 1 on the words that
differ between chosen and rejected, for answers that a person corrected; no model is needed. --analyse compares
token-level with sentence-level scores instead. Run the same command again to go on after a stop."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `aspo rewards`."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--method", required=True, choices=("fisao", "tldr", "changes"), help="what scores the tokens")
    add("--model", help="folder or hub name of the model, or an adapter's; world = the embedded one (`aspo run` gives "
        "--model and --seed to every method; changes needs neither)")  # fmt: skip
    add("--data", help="preference rows to score: a folder, .jsonl, .json or .parquet")
    add("--out", required=True, type=Path, help="folder to write: the rows, and what the scores were made with")
    add("--objects", help="object vocabulary: a file of lines `name, synonym, synonym`; rows = names in the rows' "
        "`objects`; world, world:shapes, world:colours")  # fmt: skip
    fisao = parser.add_argument_group("fisao")
    fisao.add_argument(
        "--scorer", help="CLIP as in `aspo score`; best the one that the model's vision tower comes from"
    )
    fisao.add_argument("--calibrate", help="rows with `objects` or `scene`, neither trained on nor evaluated")
    fisao.add_argument("--calibrate-limit", type=int, help="only the first of them (default: all)")
    fisao.add_argument("--template", help=f"what the text tower reads of a word (default: {BARE_WORD}, the bare word; "
                       f'"{WORLD_TEMPLATE}" with --scorer world)')  # fmt: skip
    fisao.add_argument("--margin", type=float, help="cosine beyond the baselines that r needs (default: 0)")
    fisao.add_argument("--temperature", type=float, help="of the answers, 0 = greedy (default: 1)")
    fisao.add_argument("--analyse", action="store_true", help="token- against sentence-level scores, as JSON and PNG")
    fisao.add_argument("--after", help="--analyse: a second model or adapter, e.g. the trained one")
    tldr = parser.add_argument_group("tldr")
    tldr.add_argument("--train", help="rows with true captions: `caption`, else `chosen`; or `scene`")
    tldr.add_argument("--train-limit", type=int, help="only the first of them (default: all)")
    tldr.add_argument("--epochs", type=int, help="passes over the captions, each perturbed anew (default: 20)")
    tldr.add_argument("--learning-rate", type=float, help="of AdamW, constant (default: 0.001)")
    add("--max-new-tokens", type=int, help="fisao, tldr: longest answer of the model (default: 256)")
    add("--seed", type=int, default=0, help="of sampling, of perturbations and of the head's start (default: 0)")
    add("--batch-size", type=int, default=16, help="rows at a time (default: 16)")
    add("--limit", type=int, help="only the first rows of --data (default: all)")
    add("--image-root", help="where relative image paths start (default: the folder of the rows)")
    add("--dtype", help="fisao, tldr: float32, bfloat16, float16 or auto (default: float32)")
    add("--device", help="fisao, tldr: torch device (default: the accelerator if there is one, else cpu)")
    shards.add_arguments(parser)


NEEDS = {
    "fisao": ("model", "scorer", "objects", "calibrate"),
    "tldr": ("model", "train", "objects", "data"),
    "changes": ("data",),
}
_FISAO, _TLDR = ("fisao",), ("tldr",)
READ_BY = {  # option -> the methods that read it; every method reads or may be given the others
    **dict.fromkeys(("scorer", "calibrate", "calibrate_limit", "template", "margin", "temperature"), _FISAO),
    **dict.fromkeys(("analyse", "after"), _FISAO),
    **dict.fromkeys(("train", "train_limit", "epochs", "learning_rate"), _TLDR),
    **dict.fromkeys(("objects", "max_new_tokens", "dtype", "device"), (*_FISAO, *_TLDR)),
}
DEFAULTS: dict[str, Any] = {  # of options that are None where they are not given, so that a useless one can be refused
    "margin": 0.0,
    "temperature": 1.0,
    "max_new_tokens": 256,
    "epochs": 20,
    "learning_rate": 1e-3,
    "dtype": "float32",
}
LEAST = {"batch_size": 1, "max_new_tokens": 1, "epochs": 1, "temperature": 0, "margin": 0}


def settle_options(args: argparse.Namespace) -> None:
    """Fill in the defaults. Raises ValueError for an option that is missing, out of range, or would be ignored."""
    flags = {name: "--" + name.replace("_", "-") for name in vars(args)}
    for name in NEEDS[args.method]:
        if getattr(args, name) is None:
            raise ValueError(f"{flags[name]} is missing: --method {args.method} needs it")
    for name, methods in READ_BY.items():
        value = getattr(args, name)  # 0 is an option that was given, False a switch that was not
        if args.method not in methods and value is not None and value is not False:
            only = ", ".join(methods)
            raise ValueError(f"{flags[name]} is not read by --method {args.method}, only by {only}: drop it")
    if args.method == "fisao" and args.after is not None and not args.analyse:
        raise ValueError("--after is the second model of --analyse: give that too, or drop it")
    if args.analyse:
        for name, why in (("data", "looks at answers to the --calibrate rows"), ("margin", "makes no rewards")):
            if getattr(args, name) is not None:
                raise ValueError(f"--analyse {why}: drop {flags[name]}")
    if args.data is None and args.limit is not None:
        raise ValueError("--limit is the number of rows of --data: give that too, or drop it")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in LEAST.items():
        if not getattr(args, name) >= least:
            raise ValueError(f"{flags[name]} is {getattr(args, name)}; it must be at least {least}")
    if not 0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate is {args.learning_rate}; it must be positive")


def run(args: argparse.Namespace) -> int:
    """Run `aspo rewards`."""
    settle_options(args)
    if args.method == "changes":
        return run_changes(args)
    if args.method == "tldr":
        return run_tldr(args)
    return run_analysis(args) if args.analyse else run_fisao(args)


def run_fisao(args: argparse.Namespace) -> int:
    """Calibrate, then score --data if it is given."""
    engine = shards.Engine.of(args)
    device = engine.processes.device_for(args.device)
    rows = load_preferences(args) if args.data else None
    calibration_rows, verifier = load_verifier(args, device)
    if rows is not None:
        check_apart(calibration_rows, rows, "--calibrate")
        check_scorable(verifier, rows)
    names = ("method", "model", "scorer", "objects", "template", "calibrate", "calibrate_limit", "temperature",
             "max_new_tokens", "margin", "seed", "batch_size", "dtype", "image_root")  # fmt: skip
    settings = {**{name: getattr(args, name) for name in names}, "data": args.data}
    begin(args.out, settings, engine.processes, free=("data",))
    calibration = settled_calibration(args, calibration_rows, verifier, engine)
    if rows is None:
        return 0

    def score(batch: Sequence[Row]) -> list[Mapping[str, Spans]]:
        return reward_words(verifier, calibration, batch)

    write_scored(rows, lambda: score, args.out, args.batch_size, {"calibration": calibration.to_json()}, engine)
    if engine.processes.main:
        print(scored_summary(args.out))
    return 0


def check_scorable(verifier: Verifier, rows: Sequence[Row]) -> None:
    """ValueError, before the calibration is answered, for a response with words that could not be scored."""
    for row in rows:
        for read, columns in readings(row):
            if len(image_entries(read)) > 1:
                for column in columns:
                    verifier.words(read, response_text(read[column]))


def reward_words(verifier: Verifier, calibration: Calibration, rows: Sequence[Row]) -> list[Mapping[str, Spans]]:
    """The rewards of the object words of each row's responses, by the images that each is read with."""
    reads = [(n, read, columns) for n, row in enumerate(rows) for read, columns in readings(row)]
    texts = [[response_text(read[column]) for column in columns] for _, read, columns in reads]
    spans: list[dict[str, Spans]] = [{} for _ in rows]
    for (n, _, columns), scored in zip(reads, verifier.scores([read for _, read, _ in reads], texts), strict=True):
        spans[n] |= {column: calibration.spans(words) for column, words in zip(columns, scored, strict=True)}
    return [*spans]


def run_changes(args: argparse.Namespace) -> int:
    """Mark the words in which the responses of --data differ."""
    engine = shards.Engine.of(args)
    rows = load_preferences(args)
    begin(args.out, {name: getattr(args, name) for name in ("method", "data", "image_root")}, engine.processes)
    write_scored(rows, lambda: score_changes, args.out, args.batch_size, {"method": args.method}, engine)
    if engine.processes.main:
        print(scored_summary(args.out))
    return 0


def settled_calibration(
    args: argparse.Namespace, rows: Sequence[Row], verifier: Verifier, engine: shards.Engine
) -> Calibration:
    """The calibration in --out, or a new one; what it found is printed."""
    path, device = args.out / CALIBRATION_FILE, engine.processes.device_for(args.device)
    if engine.processes.once("", path.exists):
        calibration = Calibration.load(path)
        now = (verifier.scorer.identity, tuple(verifier.vocabulary.lines))
        if (calibration.identity, calibration.vocabulary) != now:
            raise ValueError(
                f"{path} was made with other weights of the scorer or another vocabulary; use another --out"
            )
        answers: list[Answered] = list(read_lines(args.out / ANSWERS_FILE))
    else:
        load = Lazy(load_model, args.model, args.dtype, device=device)
        answers = answer_rows(
            load,
            rows,
            verifier,
            args.out / ANSWERS_FILE,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            title="calibrating",
            engine=engine,
        )

        def conclude() -> None:
            towers = compare_towers(load()[0], verifier.scorer)
            made = calibration_of(answers, verifier, args.margin, args.scorer, towers)
            write_calibration(args.out, made, answers)

        engine.processes.once("it calibrates", conclude)
        calibration = Calibration.load(path)
    if engine.processes.main:
        print(summary(calibration, answers))
    return calibration
