"""A MISP-DPO step with 1 to 16 negative images, in one piece and within a forward budget, on the CPU.

python -m benchmarks.negatives            the LLaVA-shaped toy, writes benchmarks/results/negatives.csv
python -m benchmarks.negatives --smoke    tiny sizes, writes nothing: for CI

Each case runs in a process of its own: the losses of two steps, which must be the same with and without the budget, the
second step's time, and what the steps needed over the loaded trainer.
"""

from __future__ import annotations

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import results, step_cases
from benchmarks.memory import _status_kib
from benchmarks.step import MAX_LOSS_ERROR, ON_CPU, RESPONSE, SHORT, Contender, Row, header, quiet, stepper
from benchmarks.step_cases import Rows, Shape

RESULTS = results.FOLDER / "negatives.csv"
NUMBERS = (1, 3, 8, 16)
BUDGET = 1024  # tokens: one pair with its image behind a shared prefix
FIELDS = ("negatives", "forward_tokens", "step_ms", "step_mib", "loss", "over_one_negative_mib")


def rows(shape: Shape, response: int, negatives: int) -> list[Row]:
    """One pair; its negatives are other rows' images."""
    (row,) = Rows(shape, response).take(1)
    others = Rows(shape, SHORT, seed=1).take(negatives)
    return [{**row, "negative_images": [other["images"][0] for other in others]}]


def measure(shape: Shape, response: int, negatives: int, budget: int | None) -> tuple[float, float, list[float]]:
    """ms of the second step, MiB of a step, and the losses of both, in this process."""
    name = f"misp, {negatives} negatives"
    options = {"loss_type": ["misp"], "beta": 0.5, "forward_tokens": budget, "shared_prefix": "on"}
    (row,) = rows(shape, response, negatives)
    short = Rows(shape, SHORT, seed=2, images=False).take(1)
    contender = Contender(name, True, {**options, "per_device_train_batch_size": 1})
    one = stepper(contender, step_cases.model(shape), step_cases.processor(shape), [row, *short], **ON_CPU)
    one.step(one.collate(short))  # code, threads, the optimiser's state
    batch = one.collate([row])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident size
    before = _status_kib("VmHWM")
    losses = [one.step(batch)]
    start = time.perf_counter()
    losses.append(one.step(batch))
    step_ms = 1000 * (time.perf_counter() - start)
    return step_ms, (_status_kib("VmHWM") - before) / 1024, losses


def in_fresh_process(negatives: int, budget: int | None, smoke: bool) -> tuple[float, float, list[float]]:
    """`measure` where the allocator gives back what is freed."""
    command = [sys.executable, "-m", "benchmarks.negatives", "--case", str(negatives), str(budget or 0)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command + ["--smoke"] * smoke, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{negatives} negatives: {done.stderr.strip().splitlines()[-1]}")
    step_ms, mib, *losses = map(float, done.stdout.strip().splitlines()[-1].split())
    return step_ms, mib, losses


def compare(numbers: tuple[int, ...], budget: int, smoke: bool) -> list[Row]:
    """A row for each number of negatives, without and with the budget. Raises ValueError where their losses differ."""
    made: list[Row] = []
    first: dict[int | None, float] = {}
    for number in numbers:
        losses: dict[int | None, list[float]] = {}
        for limit in (None, budget):
            step_ms, mib, losses[limit] = in_fresh_process(number, limit, smoke)
            first.setdefault(limit, mib)
            made.append({
                "negatives": number, "forward_tokens": limit or "", "step_ms": round(step_ms), "step_mib": round(mib),
                "loss": f"{losses[limit][1]:.5f}", "over_one_negative_mib": round(mib / max(first[limit], 1e-9), 2),
            })  # fmt: skip
            print("  " + ", ".join(f"{key} {value}" for key, value in made[-1].items()), flush=True)
        error = max(abs(a - b) for a, b in zip(losses[None], losses[budget], strict=True))
        if not error <= MAX_LOSS_ERROR:
            raise ValueError(f"{number} negatives: the losses with and without the budget differ: {losses}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, no file")
    parser.add_argument("--case", nargs=2, type=int, metavar=("NEGATIVES", "BUDGET"), help="one case; prints numbers")
    args = parser.parse_args()
    quiet()
    shape = step_cases.toy(side=56, small=True) if args.smoke else step_cases.toy()
    if args.case:
        step_ms, mib, losses = measure(shape, 2 * SHORT if args.smoke else RESPONSE, args.case[0], args.case[1] or None)
        print(step_ms, mib, *losses)
        return
    about = header()
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    made = compare((1, 3) if args.smoke else NUMBERS, 64 if args.smoke else BUDGET, args.smoke)
    if not args.smoke:
        results.write(args.out, about, made, FIELDS)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
