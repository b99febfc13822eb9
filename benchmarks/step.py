"""Whole training steps against TRL's DPOTrainer, on the CPU: the same model, rows, adapter and optimiser, in one run.

python -m benchmarks.step                      the LLaVA-shaped toy, writes benchmarks/results/step.csv
python -m benchmarks.step --smoke              tiny sizes, writes nothing: for CI

A step is what a trainer does with a collated batch: its `training_step` (the forward of policy and reference, the
loss, the backward), clipping, the optimiser. "With data" also counts the collation: tokens, and pixels from images
that are decoded already.
"""

from __future__ import annotations

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import copy
import gc
import itertools
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig

from aspo.config import AspoConfig
from aspo.policy import lora_targets
from aspo.trainer import AspoTrainer
from benchmarks import results, step_cases
from benchmarks.cases import machine
from benchmarks.memory import _status_kib
from benchmarks.step_cases import Rows, Shape, fresh
from benchmarks.timing import Clock, interleaved

RESULTS = results.FOLDER / "step.csv"
PAIRS, RESPONSE, BATCHES = 2, 128, 3  # pairs of a batch, tokens of a response, batches that take turns
SHORT = 4  # tokens of a response that only warms up
CHECKED_STEPS = 3
MAX_LOSS_ERROR = 1e-4  # over CHECKED_STEPS, in fp32; an untrained loss is ln 2
ON_CPU = {"use_cpu": True, "bf16": False}
LORA = {"r": 16, "lora_alpha": 32}
FIELDS = ("contender", "step_ms", "fastest_ms", "slowest_ms", "data_ms", "trl_over_this", "trl_over_this_with_data",
          "off_over_this", "step_mib", "peak_mib", "trl_mib_over_this", "loss_error", "losses")  # fmt: skip
Row = dict[str, object]


class Contender(NamedTuple):
    """A trainer and its options. off: the contender that differs from it in nothing but the shared prefix."""

    name: str
    ours: bool
    options: dict[str, Any]
    off: str | None = None


TRL, TRL_FASTEST = "TRL", "TRL, no gradient checkpointing"
PLAIN, SHARED = "aspo, nothing shared", "aspo, shared prefix"
CACHED_PLAIN = "aspo, one look at an image, reference cached"
CONTENDERS = (
    Contender(TRL, False, {}),  # its defaults
    Contender(TRL_FASTEST, False, {"gradient_checkpointing": False}),
    Contender(PLAIN, True, {"shared_prefix": "off", "vision_cache": "none"}),
    Contender(SHARED, True, {"shared_prefix": "on", "vision_cache": "none"}, PLAIN),
    Contender(f"{SHARED}, one look at an image", True, {"shared_prefix": "on", "vision_cache": "step"}),
    Contender(CACHED_PLAIN, True,
              {"shared_prefix": "off", "vision_cache": "step", "precompute_ref_log_probs": True}),
    Contender(f"{SHARED}, one look at an image, reference cached", True,
              {"shared_prefix": "on", "vision_cache": "step", "precompute_ref_log_probs": True}, CACHED_PLAIN),
    Contender(f"{SHARED}, image features and reference cached", True,
              {"shared_prefix": "on", "vision_cache": "disk", "precompute_ref_log_probs": True}),
)  # fmt: skip


class Stepper:
    """A trainer, driven one step at a time as its own loop would."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer._inner_training_loop = lambda **_: None  # else `train` as it is: checkpointing, Liger's layers, ...
        trainer.train()
        trainer.create_optimizer_and_scheduler(num_training_steps=10_000)
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = 1

    def collate(self, rows: Sequence[dict[str, Any]]) -> Any:
        """Rows -> a batch."""
        return self.trainer.data_collator(fresh(rows))

    def step(self, batch: Any) -> float:
        """One optimiser step on a batch; its loss."""
        trainer = self.trainer
        (batch,), pairs = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        loss = trainer.training_step(trainer.model_wrapped, batch, pairs)
        trainer.accelerator.clip_grad_norm_(trainer.model_wrapped.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model_wrapped.zero_grad()
        trainer.state.global_step += 1
        return float(loss)


def stepper(contender: Contender, model: Any, processor: Any, rows: list[dict[str, Any]], **options: Any) -> Stepper:
    """The contender's trainer, which takes the model over; options: of both trainers, e.g. use_cpu."""
    usual = {
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": PAIRS, "seed": 0,
        "beta": 0.1, "max_length": None, "report_to": "none", "disable_tqdm": True, "output_dir": tempfile.mkdtemp(),
    }  # fmt: skip
    options = usual | contender.options | options
    if contender.ours:
        ours = {"loss_type": ["dpo"], "lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"]}
        args = AspoConfig(**ours | options)
        return Stepper(AspoTrainer(model, args, train_dataset=rows, processing_class=processor))
    from datasets import Dataset  # here, so that ours run where TRL is not installed
    from trl import DPOConfig, DPOTrainer

    lora = LoraConfig(**LORA, target_modules=lora_targets(model), task_type="CAUSAL_LM")
    data = Dataset.from_list(fresh(rows))
    theirs = DPOConfig(**options)
    return Stepper(DPOTrainer(model, args=theirs, train_dataset=data, processing_class=processor, peft_config=lora))


def check(
    steppers: dict[str, Stepper], batches: Sequence[list[dict[str, Any]]], expected: str = TRL
) -> dict[str, list[float]]:
    """The losses of each contender's first steps. Raises ValueError where they are not those of the `expected` one."""
    losses = {
        name: [one.step(one.collate(batches[n % len(batches)])) for n in range(CHECKED_STEPS)]
        for name, one in steppers.items()
    }
    for name, found in losses.items():
        error = loss_error(found, losses[expected])
        if not error <= MAX_LOSS_ERROR:
            raise ValueError(f"{name}: its losses {found} differ from those of {expected}, {losses[expected]}")
    return losses


def loss_error(losses: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference."""
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))


def compare(shape: Shape, response: int, rounds: int, with_memory: bool) -> list[Row]:
    """A row for each contender: losses checked, medians over interleaved rounds, then memory in fresh processes."""
    source = Rows(shape, response)
    batches = [source.take(PAIRS) for _ in range(BATCHES)]
    model, processor = step_cases.model(shape), step_cases.processor(shape)
    every_row = [row for batch in batches for row in batch]
    steppers = {c.name: stepper(c, copy.deepcopy(model), processor, every_row, **ON_CPU) for c in CONTENDERS}
    losses = check(steppers, batches)
    runs: dict[str, Callable[[], object]] = {}
    for name, one in steppers.items():
        runs[f"{name}: data"] = turns(one.collate, batches)
        runs[name] = turns(one.step, [one.collate(batch) for batch in batches])
    times = interleaved(runs, Clock("cpu"), rounds, warm=True)
    mib = {c.name: measure_memory(c.name) for c in CONTENDERS} if with_memory else {}
    rows = []
    for contender in CONTENDERS:
        found = losses[contender.name]
        rows.append(figures(contender, times, mib) | {
            "loss_error": f"{loss_error(found, losses[TRL]):.1e}",
            "losses": " ".join(f"{loss:.5f}" for loss in found),
        })  # fmt: skip
        print("  " + ", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def turns(run: Callable[[Any], object], inputs: Sequence[Any]) -> Callable[[], object]:
    """A run that takes the next of its inputs each time, so that nothing is remembered of the last one."""
    endless = itertools.cycle(inputs)
    return lambda: run(next(endless))


def figures(contender: Contender, times: dict[str, list[float]], mib: dict[str, tuple[float, float]]) -> Row:
    """A contender's row: median ms, ratios to TRL at its fastest and to the same without a shared prefix, memory."""
    median = {name: statistics.median(values) for name, values in times.items()}

    def with_data(name: str) -> float:
        return median[name] + median[f"{name}: data"]

    name = contender.name
    trl = min((TRL, TRL_FASTEST), key=lambda name: median[name])
    row: Row = {
        "contender": name,
        "step_ms": round(median[name], 1),
        "fastest_ms": round(min(times[name]), 1),
        "slowest_ms": round(max(times[name]), 1),
        "data_ms": round(median[f"{name}: data"], 1),
        "trl_over_this": round(median[trl] / median[name], 2),
        "trl_over_this_with_data": round(with_data(trl) / with_data(name), 2),
    }
    if contender.off is not None:
        row["off_over_this"] = round(median[contender.off] / median[name], 2)
    if mib:
        least = min(mib[trl][0] for trl in (TRL, TRL_FASTEST))
        row |= {"step_mib": round(mib[name][0]), "peak_mib": round(mib[name][1]),
                "trl_mib_over_this": round(least / mib[name][0], 2)}  # fmt: skip
    return row


def memory_of(name: str, shape: Shape, response: int) -> tuple[float, float]:
    """MiB of a contender in this process: what two steps need over the loaded trainer, and the process's peak."""
    contender = next(c for c in CONTENDERS if c.name == name)
    rows = Rows(shape, response).take(PAIRS)
    short = Rows(shape, SHORT, seed=1, images=False).take(PAIRS)
    one = stepper(contender, step_cases.model(shape), step_cases.processor(shape), rows + short, **ON_CPU)
    # Load code, start threads and make the optimiser's state on short texts first, so that only the step is counted.
    one.step(one.collate(short))
    batch = one.collate(rows)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident size
    before = _status_kib("VmHWM")
    for _ in range(2):
        one.step(batch)
    peak = _status_kib("VmHWM")
    return (peak - before) / 1024, peak / 1024


def measure_memory(name: str) -> tuple[float, float]:
    """`memory_of` of the toy in a fresh process, whose allocator gives back what is freed: glibc keeps blocks below
    its threshold, hundreds of MiB of them, and how many differs from run to run."""
    command = [sys.executable, "-m", "benchmarks.step", "--memory", name]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    extra, peak = done.stdout.strip().splitlines()[-1].split()
    return float(extra), float(peak)


def quiet() -> None:
    """Without the libraries' warnings about their own names, and without progress bars."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.WARNING)


def header() -> dict[str, str]:
    """What it was measured on, with the versions of the trainers' libraries."""
    return machine() | {name: version(name) for name in ("transformers", "peft", "accelerate")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one round, no file")
    parser.add_argument("--memory", metavar="CONTENDER", help="print two numbers, MiB: a step's and the process's peak")
    args = parser.parse_args()
    quiet()
    if args.memory:
        print(*memory_of(args.memory, step_cases.toy(), RESPONSE))
        return
    about = header()
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    shape = step_cases.toy(side=56, small=True) if args.smoke else step_cases.toy()
    rows = compare(shape, 2 * SHORT if args.smoke else RESPONSE, 1 if args.smoke else args.rounds, not args.smoke)
    if not args.smoke:
        results.write(args.out, about, rows, FIELDS)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
