"""`aspo demo`: the whole road on the embedded world, by the commands that a real project runs.

pairs -> score -> train DPO and ASPO -> evaluate base, DPO and ASPO on test scenes -> report. Both trainings have the
same pairs in the same order, the same LoRA start and the same settings; what differs is the objective. Those settings
were chosen on validation scenes (docs/evaluation.md); test scenes are opened here alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from aspo import cli
from aspo.evaluation.metrics import BY_NAME, HEADLINE, Figure
from aspo.evaluation.statistics import Comparison, Estimate, compare, markdown
from aspo.page import fairness, judge_difference
from aspo.report import differences, read_evaluation
from aspo.world.gates import NOISE_STEP, TEMPERATURE

SYSTEMS = ("base", "DPO", "ASPO")
TABLE = (
    *HEADLINE,
    "shr",
    "false_claims_consistent",
    "false_claims_violating",
    "false_claims_held_out",
    "minimal_pair_accuracy_prior",
    "yes_no_accuracy_all",
    "yes_no_f1_all",
    "yes_ratio_all",
    "chair_i",
    "unparseable",
    "duplicate",
    "eos",
)
TRAINING = {  # the same for both; how they were chosen: docs/evaluation.md
    "beta": "0.1",
    "learning_rate": "3e-4",
    "per_device_train_batch_size": "16",
    "lr_scheduler_type": "cosine",
    "warmup_steps": "5",
    "lora_r": "16",
    "lora_alpha": "32",
}


@dataclass(frozen=True)
class Size:
    """How much of everything: `pairs` prompts to make pairs from, `steps` of training, `scenes` to evaluate on."""

    pairs: int
    steps: int
    scenes: int
    questions: int = 2  # for each scene and split
    minimal_pairs: int = 3  # for each scene


FULL = Size(pairs=1500, steps=90, scenes=1000)
QUICK = Size(pairs=48, steps=3, scenes=16)


def commands(out: Path, size: Size, seed: int) -> dict[str, list[str]]:
    """Stage -> the arguments of its `aspo` command, in the order in which they run."""
    pairs, scored, evals = out / "pairs", out / "scored", out / "evals"
    made = {
        "pairs": ["pairs", "--model", "world", "--data", "world:train", "--limit", size.pairs, "--out", pairs,
                  "--temperature", TEMPERATURE, "--noise-step", NOISE_STEP, "--max-new-tokens", 64,
                  "--batch-size", 100, "--seed", seed],
        "score": ["score", "--data", pairs, "--scorer", "world", "--out", scored, "--batch-size", 100],
    }  # fmt: skip
    for name in SYSTEMS[1:]:
        flags = [part for key, value in TRAINING.items() for part in (f"--{key}", value)]
        made[f"train {name}"] = [
            "train", "--model_name_or_path", "world", "--train_data", scored, "--output_dir", out / name,
            "--loss_type", name.lower(), "--max_steps", size.steps, "--seed", seed, "--logging_steps", 1,
            "--save_steps", max(1, size.steps // 2), "--report_to", "none", *flags,
        ]  # fmt: skip
    for name in SYSTEMS:
        adapter = [] if name == "base" else ["--adapter", out / name]
        made[f"eval {name}"] = [
            "eval", "--model", "world", *adapter, "--data", "world:test", "--limit", size.scenes,
            "--questions", size.questions, "--minimal-pairs", size.minimal_pairs, "--max-new-tokens", 64,
            "--batch-size", 100, "--seed", seed, "--out", evals / f"{name}.json",
        ]  # fmt: skip
    made["report"] = [
        "report", "--runs", *(out / name for name in SYSTEMS[1:]), "--evals", *(evals / f"{n}.json" for n in SYSTEMS),
        "--data", scored, "--model", "world", "--title", "ASPO and DPO on the embedded world",
        "--seed", seed, "--out", out / "report.html",
    ]  # fmt: skip
    return {stage: [str(argument) for argument in arguments] for stage, arguments in made.items()}


DESCRIPTION = f"""\
Align the embedded vision-language model by DPO and by ASPO, and measure what became of its hallucinations.

Runs `aspo pairs`, `score`, `train` (twice), `eval` (three times) and `report` in turn and shows each command. Prints
one table of figures on held-out test scenes, with 95 % paired bootstrap intervals. Takes minutes on two CPU cores; run
it again to go on after an interruption. --quick runs everything in a very small size: it shows that the parts fit
together, its figures mean nothing. Full size: {FULL.pairs} prompts, {FULL.steps} steps, {FULL.scenes} scenes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `aspo demo`."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder for everything it makes (default: runs/demo)")
    add("--pairs", type=int, help="prompts to make pairs from; those with two identical answers are dropped")
    add("--steps", type=int, help="training steps of DPO and of ASPO")
    add("--scenes", type=int, help="test scenes to evaluate on")
    add("--threads", type=int, default=1, help="torch threads (default: 1, as fast as more for so small a model)")
    add("--seed", type=int, default=0, help="of sampling, noise, LoRA start, order and bootstrap (default: 0)")
    add("--quick", action="store_true", help="a smoke run of well under a minute")


def run(args: argparse.Namespace) -> int:
    """`aspo demo`; returns 0, or the status of the command that failed."""
    default = QUICK if args.quick else FULL
    given = {name: getattr(args, name) for name in ("pairs", "steps", "scenes") if getattr(args, name) is not None}
    for name, value in {**given, "threads": args.threads}.items():
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    size = Size(**{**asdict(default), **given})
    args.out.mkdir(parents=True, exist_ok=True)
    _quieten()
    torch.set_num_threads(args.threads)
    stages = commands(args.out, size, args.seed)
    seconds: dict[str, float] = {}
    for number, (stage, arguments) in enumerate(stages.items(), start=1):
        print(f"[{number}/{len(stages)}] $ aspo {shlex.join(arguments)}", flush=True)
        start = time.perf_counter()
        with _output_to(args.out / "demo.log", stage):
            status = cli.main(arguments)
        if status:
            print(
                f"stage {stage!r} ended with status {status}; its output is in {args.out / 'demo.log'}", file=sys.stderr
            )
            return status
        seconds[stage] = time.perf_counter() - start
        print(f"      {seconds[stage]:.1f} s", flush=True)
    comparison = compared(args.out, args.seed)
    _keep(args.out, comparison, size, args.seed, seconds)
    print(f"\n{summary(comparison, args.quick)}\n")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    print(f"{sum(seconds.values()):.0f} s in all, {memory / 1024:.1f} GiB at most. Table: {args.out / 'table.md'}")
    print(f"Report, to open in a browser: {args.out / 'report.html'}")
    return 0


def _quieten() -> None:
    """Libraries' bars and advice between the stages would hide what the demo says; errors stay."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextlib.contextmanager
def _output_to(log: Path, stage: str) -> Iterator[None]:
    """What the stage prints goes to the log; progress and errors, on stderr, stay on the screen."""
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        print(f"== {stage}")
        yield


def compared(out: Path, seed: int) -> Comparison:
    """The three evaluations with paired intervals: differences to base, and ASPO minus DPO."""
    evaluations = {name: read_evaluation(out / "evals" / f"{name}.json") for name in SYSTEMS}
    return compare(evaluations, differences(SYSTEMS), seed=seed)


def summary(comparison: Comparison, quick: bool = False) -> str:
    """The table for a terminal, and what it says in words, whichever way it falls."""
    heading = (
        f"{comparison.items} held-out test scenes; below each figure its {comparison.level:.0%} bootstrap interval"
    )
    if quick:
        heading = "SMOKE RUN: too small to mean anything. " + heading
    lines = [heading, "", *_stacked_table(comparison), "", *fairness(comparison)]
    figure = BY_NAME["hallucinated_sentences"]
    for (a, b), estimates in comparison.differences.items():
        estimate = estimates[figure.name]
        verdict = judge_difference(estimate, figure) or "no difference that these scenes can show"
        value, low, high = (figure.show(v, signed=True) for v in (estimate.value, estimate.low, estimate.high))
        lines.append(f"{a} against {b}: {figure.label} {value} points [{low}, {high}]: {verdict}")
    return "\n".join(lines)


def _stacked_table(comparison: Comparison) -> list[str]:
    """One row per figure, its intervals in the line below."""
    columns: Mapping[str, Mapping[str, Estimate]] = {
        **comparison.systems,
        **{f"{a} \N{MINUS SIGN} {b}": estimates for (a, b), estimates in comparison.differences.items()},
    }
    signed = [name not in comparison.systems for name in columns]
    lines = [f"{'':40}" + "".join(f"{name:>16}" for name in columns)]
    for figure in _shown(comparison):
        estimates = [by[figure.name] for by in columns.values()]
        values = [figure.show(e.value, signed=s) for e, s in zip(estimates, signed, strict=True)]
        intervals = [
            f"[{figure.show(e.low, signed=s)}, {figure.show(e.high, signed=s)}]"
            for e, s in zip(estimates, signed, strict=True)
        ]
        label = figure.label + (" (%)" if figure.percent else "")
        lines.append(f"{label:40}" + "".join(f"{value:>16}" for value in values))
        lines.append(f"{'':40}" + "".join(f"{interval:>16}" for interval in intervals))
    return lines


def _shown(comparison: Comparison) -> list[Figure]:
    return [BY_NAME[name] for name in TABLE if BY_NAME[name] in comparison.figures]


def _keep(out: Path, comparison: Comparison, size: Size, seed: int, seconds: Mapping[str, float]) -> None:
    """table.md and table.json."""
    text = markdown(comparison, [figure.name for figure in _shown(comparison)])
    (out / "table.md").write_text(f"{text}\n\n" + "\n".join(fairness(comparison)) + "\n", encoding="utf-8")

    def plain(estimates: Mapping[str, Estimate]) -> dict[str, Sequence[float | None]]:
        return {n: [None if v != v else v for v in (e.value, e.low, e.high)] for n, e in estimates.items()}

    record: dict[str, Any] = {
        "size": asdict(size),
        "seed": seed,
        "training": TRAINING,
        "scenes": comparison.items,
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "systems": {name: plain(estimates) for name, estimates in comparison.systems.items()},
        "differences": {f"{a} - {b}": plain(estimates) for (a, b), estimates in comparison.differences.items()},
    }
    (out / "table.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
