"""The tables of docs/scaling.md: three models on 8, 64 and 512 GPUs, one million pairs.

python -m aspo.scaling.tables            print them
python -m aspo.scaling.tables --write    write them into docs/scaling.md, between its markers
"""

from __future__ import annotations

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from aspo.config import AspoConfig
from aspo.scaling.architectures import ARCHITECTURES, IMAGE_TOKENS
from aspo.scaling.hardware import GPUS, Cluster
from aspo.scaling.job import Plan, computing, make_plan, step_work
from aspo.scaling.report import GB, GIB, lift
from aspo.step_memory import Memory, Step, meta_model

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
PAIRS, TEXT, RESPONSE, A_GPU = 1_000_000, 64, 256, 2
GPU, SIZES = "h100", (8, 64, 512)
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def settings(lora: bool) -> AspoConfig:
    """As `aspo train` keeps weights on a GPU: bfloat16 with LoRA, else fp32."""
    return AspoConfig(output_dir="unused", use_cpu=True, use_lora=lora, dtype="bfloat16" if lora else "float32")


def step(checkpointing: bool, cached: bool = False) -> Step:
    """The step that all tables are about."""
    return Step(A_GPU, TEXT + IMAGE_TOKENS, RESPONSE, True, cached, torch.bfloat16, checkpointing)


@functools.cache
def work(model: str, lora: bool, checkpointing: bool) -> Memory:
    """What one GPU runs, weights in the dtype that is computed in."""
    config, pixels = ARCHITECTURES[model]
    args = computing(settings(lora), step(checkpointing), "fsdp2")
    return step_work(config(), args, step(checkpointing), (1, pixels))


@functools.cache
def policy(model: str, lora: bool) -> Any:
    """Without weights. Cached: adapters on 80 layers take a second to make, and there are dozens of plans."""
    return meta_model(ARCHITECTURES[model][0](), settings(lora))


@functools.cache
def plan(
    model: str, lora: bool, gpus: int, strategy: str, checkpointing: bool, shards: int | None = None, gpu: str = GPU
) -> Plan:
    """One plan; cached, for the tables ask for the same ones."""
    config, pixels = ARCHITECTURES[model]
    return make_plan(
        config(), settings(lora), step(checkpointing), Cluster(GPUS[gpu], gpus), strategy, PAIRS, shards=shards,
        images=(1, pixels), image_tokens=IMAGE_TOKENS, work=work(model, lora, checkpointing), model=policy(model, lora),
    )  # fmt: skip


def best(model: str, lora: bool, gpus: int) -> Plan:
    """The plan that fits and takes the least time, nothing of the network hidden; the smallest where none fits.

    DDP with LoRA, FSDP2; activations kept or checkpointed.
    """
    ways = ["fsdp2", *(["ddp"] if lora else [])]
    plans = [plan(model, lora, gpus, name, checkpointed) for name in ways for checkpointed in (False, True)]
    fitting = [p for p in plans if p.fits]
    if not fitting:
        return min(plans, key=lambda p: p.held)
    return min(fitting, key=lambda p: p.step_seconds()[1])


def cases() -> list[tuple[str, bool, int, Plan]]:
    """Model, LoRA, GPUs, plan."""
    return [(m, lora, n, best(m, lora, n)) for lora in (True, False) for m in ARCHITECTURES for n in SIZES]


def how(p: Plan) -> str:
    """Strategy and checkpointing."""
    return ("DDP" if p.strategy == "ddp" else "FSDP2") + (", checkpointing" if p.step.checkpointing else "")


def gib(p: Plan, *names: str, over: bool | None = None) -> float:
    """GiB of some parts; over: those in shards, those that are not."""
    some = [x for x in p.parts if (not names or x.name in names) and (over is None or (x.over > 1) == over)]
    return sum(x.bytes for x in some) / GIB


STATE = ("weights", "reference", "gradients", "optimiser")


def memory_table() -> Table:
    """GiB of one GPU."""
    header = ("model", "trains", "GPUs", "how", "whole in each", "in shards", "gathered for a while",
              "activations and head", "activations kept / checkpointed", "together", "fits in 80 GB")  # fmt: skip
    rows = []
    for model, lora, gpus, p in cases():
        kept, again = (work(model, lora, c) for c in (False, True))
        rows.append((
            model, "LoRA" if lora else "all", str(gpus), how(p), f"{gib(p, *STATE, over=False):,.1f}",
            f"{gib(p, *STATE, over=True):,.1f}", f"{gib(p, 'gathered and reduced'):,.1f}",
            f"{gib(p) - gib(p, *STATE) - gib(p, 'gathered and reduced'):,.1f}",
            f"{kept.running / GIB:,.1f} / {again.running / GIB:,.1f}", f"{p.held / GIB:,.1f}",
            "yes" if p.fits else "no",
        ))  # fmt: skip
    return header, rows


def time_table() -> Table:
    """A step and a job of PAIRS pairs."""
    header = ("model", "trains", "GPUs", "how", "pairs a step", "sent in the node, GB", "to other nodes, GB",
              "compute, s", "network, s", "step, s", "1000 pairs an hour", "hours",
              "of them loading, saving", "GPU-hours", "in the way; next")  # fmt: skip
    rows = []
    for model, lora, gpus, p in cases():
        head = (model, "LoRA" if lora else "all", str(gpus), how(p))
        if not p.fits:
            rows.append((*head, *[""] * 10, "memory: does not fit"))
            continue
        seconds, (fast, slow) = p.seconds(), p.step_seconds()
        (first, most), (second, after) = p.in_the_way[:2]
        network = max(seconds["network in the node"], seconds["network across nodes"])
        rows.append((
            *head, f"{p.batch:,}", f"{sum(t.sent - t.across for t in p.sends) / GB:,.2f}",
            f"{sum(t.across for t in p.sends) / GB:,.2f}", f"{seconds['compute']:.2f}", f"{network:.2f}",
            f"{fast:.2f} to {slow:.2f}", f"{3.6 * p.batch / slow:,.0f} to {3.6 * p.batch / fast:,.0f}",
            f"{p.hours[0]:.1f} to {p.hours[1]:.1f}", f"{p.around_hours:.2f}",
            f"{p.hours[0] * gpus:,.0f} to {p.hours[1] * gpus:,.0f}",
            f"{first}; {second} ({after / most:.0%})",
        ))  # fmt: skip
    return header, rows


def strategy_table() -> Table:
    """One case under every strategy."""
    model, gpus = "llava-1.5-13b", 64
    header = (f"{model}, {gpus} GPUs", "trains", "state in each GPU, GiB", "together, GiB", "sent in the node, GB",
              "to other nodes, GB", "network, s", "compute, s")  # fmt: skip
    ways: list[tuple[str, str, int | None]] = [
        ("DDP", "ddp", None), ("ZeRO-2", "zero2", None), ("ZeRO-3", "zero3", None), ("FSDP2", "fsdp2", None),
        ("FSDP2 in a node (HSDP; `aspo train` refuses it)", "fsdp2", 8),
    ]  # fmt: skip
    rows = []
    for lora in (True, False):
        for name, strategy, shards in ways:
            p = plan(model, lora, gpus, strategy, True, shards)
            seconds = p.seconds()
            rows.append((
                name, "LoRA" if lora else "all", f"{gib(p, *STATE):,.1f}",
                f"{p.held / GIB:,.1f}" + ("" if p.fits else ", too much"),
                f"{sum(t.sent - t.across for t in p.sends) / GB:,.2f}", f"{sum(t.across for t in p.sends) / GB:,.2f}",
                f"{max(seconds['network in the node'], seconds['network across nodes']):.2f}",
                f"{seconds['compute']:.2f}",
            ))  # fmt: skip
    return header, rows


def traffic_table() -> Table:
    """Every collective of one step."""
    p = plan("llava-1.5-13b", False, 64, "fsdp2", True)
    header = (
        "llava-1.5-13b, all, 64 GPUs, FSDP2",
        "whole tensors, GB",
        "a GPU sends in its node, GB",
        "to other nodes, GB",
    )
    digits = "{:,.3f}".format
    rows = [(t.name, digits(t.bytes / GB), digits((t.sent - t.across) / GB), digits(t.across / GB)) for t in p.sends]
    return header, rows


def offline_table() -> Table:
    """Jobs before the training, and what stays on the disk."""
    header = ("model", "`aspo pairs`, GPU-hours", "`aspo score`, GPU-hours", "`aspo reference`, GPU-hours",
              "core-hours, each", "its cache, GB", "checkpoint, LoRA, GB", "checkpoint, all, GB")  # fmt: skip
    rows = []
    for model in ARCHITECTURES:
        jobs = plan(model, True, 8, "fsdp2", True).offline()
        saved = [plan(model, lora, 8, "fsdp2", True).saved / GB for lora in (True, False)]
        rows.append((model, *(f"{job.gpu_hours:,.1f}" for job in jobs), f"{jobs[0].core_hours:,.1f}",
                     f"{jobs[2].bytes / GB:,.1f}", *(f"{x:,.1f}" for x in saved)))  # fmt: skip
    return header, rows


def lifts() -> str:
    """What would lift what is in the way, once for each answer, with the cases that it is for."""
    found: dict[str, dict[str, list[str]]] = {}
    for model, lora, gpus, p in cases():
        what = p.in_the_way[0][0]
        of_answer = found.setdefault(f"**{what}**; {lift(p, what)}", {})
        of_answer.setdefault(f"{model} ({'LoRA' if lora else 'all'})", []).append(str(gpus))
    return "\n".join(
        f"- {answer} For " + ", ".join(f"{who} on {', '.join(on)}" for who, on in of_answer.items()) + "."
        for answer, of_answer in found.items()
    )


def hardware_table() -> Table:
    """The makers' figures."""
    header = ("GPU", "memory, GB", "bf16, TFLOP/s", "memory, TB/s", "NVLink, GB/s", "network, Gbit/s", "from")
    rows = [(name, *(f"{x:g}" if isinstance(x, float | int) else x for x in dataclasses.astuple(gpu)))
            for name, gpu in GPUS.items()]  # fmt: skip
    return header, rows


def markdown(table: Table) -> str:
    """A table; figures to the right."""
    header, rows = table
    right = [all(row[i][:1].isdigit() or not row[i] for row in rows) for i in range(len(header))]
    lines = [header, ["---:" if r else "---" for r in right], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "hardware": lambda: markdown(hardware_table()),
    "memory": lambda: markdown(memory_table()),
    "time": lambda: markdown(time_table()),
    "lifts": lifts,
    "strategies": lambda: markdown(strategy_table()),
    "traffic": lambda: markdown(traffic_table()),
    "offline": lambda: markdown(offline_table()),
}


def filled(page: str) -> str:
    """The page with each section between its markers. Raises ValueError for a marker that is missing."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in page or end not in page:
            raise ValueError(f"the page has no {begin} ... {end}")
        before, _, rest = page.partition(begin)
        page = before + begin + "\n" + make() + "\n" + end + rest.partition(end)[2]
    return page


def main() -> int:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text()))
    else:
        print("\n\n".join(make() for make in SECTIONS.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
