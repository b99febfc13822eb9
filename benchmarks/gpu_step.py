"""Whole training steps of 7B models on a GPU against TRL's DPOTrainer: speed, memory, the longest response that fits.

python -m benchmarks.gpu_step                     LLaVA-1.5-7B and Qwen2.5-VL-7B, random weights in bf16, LoRA, gradient
                                                  checkpointing; writes benchmarks/results/gpu_step.csv
python -m benchmarks.gpu_step --model LLaVA-1.5-7B --minutes 4
python -m benchmarks.gpu_step --smoke             tiny models on the CPU, writes nothing: for CI

Models are made on the device from the configurations in `benchmarks.step_cases`, one trainer at a time. The time that
is left of --minutes after the steps is shared among the searches for the longest response; where it ends one before it
has found a length that does not fit, the result says "at least". The file is written again after every figure, and a
contender that fails has its reason for a status: without the package trl, TRL's own.
"""

from __future__ import annotations

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aspo.data import Collator
from benchmarks import results, step_cases
from benchmarks.cases import machine
from benchmarks.step import CONTENDERS, PAIRS, PLAIN, SHARED, Contender, Row, Stepper, loss_error, quiet, stepper
from benchmarks.step_cases import LLAVA_7B, QWEN_7B, Rows, Shape

RESULTS = results.FOLDER / "gpu_step.csv"
GIB = 2**30
CHECKPOINTED = {"gradient_checkpointing": True}  # as TRL does by default
COMPARED = tuple(
    c._replace(options=c.options | CHECKPOINTED)
    for c in CONTENDERS
    if c is CONTENDERS[0] or c.name in (PLAIN, SHARED) or c.options.get("vision_cache") == "disk"
)
FIELDS = ("model", "contender", "status", "pairs", "response", "step_s", "pairs_per_s", "tokens_per_s", "trl_over_this",
          "peak_gib", "longest_response", "longest_is", "loss_error")  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """response: tokens of each; steps: timed, after two that are not; first: where the longest response is begun."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    response: int = 256
    steps: int = 5
    first: int = 4096

    def trainer(self, contender: Contender, shape: Shape, rows: list[dict[str, Any]]) -> Stepper:
        """The contender's trainer with a model of its own."""
        on = {"bf16": True} if self.device == "cuda" else {"use_cpu": True, "bf16": False}
        model = step_cases.model(shape, self.device, self.dtype)
        return stepper(contender, model, step_cases.processor(shape), rows, learning_rate=1e-4, **on)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait for the device; an error that one of its kernels made is raised here."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(contender: Contender, shape: Shape, bench: Bench) -> tuple[Row, list[float]]:
    """A contender's speed and memory, and the losses of its first two steps."""
    source = Rows(shape, bench.response)
    batches = [source.take(PAIRS) for _ in range(2)]
    one = bench.trainer(contender, shape, batches[0] + batches[1])
    turn = itertools.cycle([one.collate(batch) for batch in batches])
    losses = [one.step(next(turn)) for _ in range(2)]
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    median = statistics.median(bench.seconds(lambda: one.step(next(turn))) for _ in range(bench.steps))
    # The same tokens for everyone, shared or not: each response with its own prompt.
    tokens = int(Collator(step_cases.processor(shape))(batches[0])["model_inputs"]["attention_mask"].sum())
    row: Row = {"pairs": PAIRS, "response": bench.response, "step_s": round(median, 4), "status": "ran"}
    row |= {"pairs_per_s": round(PAIRS / median, 3), "tokens_per_s": round(tokens / median)}
    if bench.device == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 1)
    return row, losses


def longest(contender: Contender, shape: Shape, bench: Bench, seconds: float) -> Row:
    """The longest response, in tokens, with which a step of one pair fits. seconds: with the making of the trainer."""
    end = time.perf_counter() + seconds
    one = bench.trainer(contender, shape, Rows(shape, bench.first).take(1))

    def fits(length: int) -> bool:
        try:
            one.step(one.collate(Rows(shape, length).take(1)))
            return True
        except RuntimeError as error:
            if results.failure(error) != "out of memory":
                raise
            return False
        finally:
            one.trainer.model_wrapped.zero_grad()
            free()

    length, how = search(fits, bench.first, end - time.perf_counter())
    return {"longest_response": length, "longest_is": how}


def search(fits: Callable[[int], bool], first: int, seconds: float) -> tuple[int, str]:
    """The largest length that fits, to an eighth, by doubling and halving; "at least" where the time ended it before.

    A step is not begun if one of 3 times the last one's time would go beyond `seconds`.
    """
    good, bad, length, took = 0, None, first, 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() + 3 * took < end:
        start = time.perf_counter()
        if fits(length):
            good = length
        else:
            bad = length
        took = time.perf_counter() - start
        if bad is not None and bad - good <= max(good // 8, 1):
            return good, "the longest"
        length = 2 * good if bad is None else (good + bad) // 2
    return good, "at least"


def free() -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(shape: Shape, bench: Bench, seconds: float, rows: list[Row], save: Callable[[], None]) -> None:
    """Adds a row for each contender, saving after each figure; all of it in about so many seconds, if the steps leave
    any. What fails has its reason for a status; an error that has broken the device ends it."""
    end = time.perf_counter() + seconds
    mine: list[Row] = [{"model": shape.name, "contender": contender.name} for contender in COMPARED]
    expected: list[float] = []
    for contender, row in zip(COMPARED, mine, strict=True):
        rows.append(row)
        try:
            found, losses = measure(contender, shape, bench)
            expected = expected or losses
            row |= {**found, "loss_error": f"{loss_error(losses, expected):.1e}"}
            if mine[0].get("step_s"):
                row["trl_over_this"] = round(float(str(mine[0]["step_s"])) / float(str(row["step_s"])), 2)
        except Exception as error:  # a missing package, a model that cannot do this, no memory: the others go on
            row["status"] = results.failure(error)
            bench.synchronize()  # raises if the error has broken the device for everybody
        free()
        save()
        print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    ran = [pair for pair in zip(COMPARED, mine, strict=True) if pair[1]["status"] == "ran"]
    searched = [pair for pair in ran if "precompute_ref_log_probs" not in pair[0].options]
    for left, (contender, row) in zip(range(len(searched), 0, -1), searched, strict=True):
        try:
            row |= longest(contender, shape, bench, (end - time.perf_counter()) / left)
        except Exception as error:
            row["longest_is"] = results.failure(error)
            bench.synchronize()
        free()
        save()
        print(f"  {contender.name}: longest response {row['longest_is']} {row.get('longest_response', '')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {shape.name: shape for shape in (LLAVA_7B, QWEN_7B)}
    parser.add_argument("--model", choices=list(shapes), action="append", help="default: both")
    parser.add_argument("--minutes", type=float, default=8, help="about as long as all of it takes")
    parser.add_argument("--response", type=int, default=Bench.response, help="tokens of a response that is timed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU, no file")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke runs tiny models on the CPU")
    quiet()
    chosen = [shapes[name] for name in args.model or shapes]
    rows: list[Row] = []
    if args.smoke:
        for shape in chosen:
            print(shape.name)
            bench = Bench("cpu", torch.float32, response=8, steps=1, first=8)
            compare(step_cases.tiny(shape), bench, seconds=8, rows=rows, save=lambda: None)
        failed = [str(row["contender"]) for row in rows if "failed" in f"{row['status']} {row.get('longest_is')}"]
        sys.exit(f"failed: {'; '.join(failed)}" if failed else 0)
    about = machine("cuda")
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    end = time.perf_counter() + 60 * args.minutes
    for left, shape in zip(range(len(chosen), 0, -1), chosen, strict=True):
        print(shape.name)
        seconds = (end - time.perf_counter()) / left
        bench = Bench(response=args.response)
        compare(shape, bench, seconds, rows, save=lambda: results.write(args.out, about, rows, FIELDS))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
