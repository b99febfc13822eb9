"""Which tile and which candidate of the Triton head is fastest: `python -m benchmarks.gpu --tune`."""

from __future__ import annotations

import re
import statistics
import time
from itertools import product

import torch

from aspo_kernels import tiles
from benchmarks.cases import HEADS, Case, Inputs
from benchmarks.contenders import gpu_tile, ours
from benchmarks.timing import Clock, interleaved

TOKENS = (512, 1024, 2048, 4096, 8192)
MIB = (8, 16, 32, 64, 128)  # of fp32 logits


def sweep(clock: Clock, deadline: float, only: re.Pattern[str]) -> str:
    """The best tile for each head, token count and schedule, in ms beside the present one, as a table."""
    lines = ["head | N | schedule | best: candidate, tokens, MiB | ms | present tile, tile | present tile, fused"]
    for tokens, (name, size), schedule in product((8192, 2048), HEADS.items(), ("frozen", "recompute")):
        label = f"{name} | {tokens} | {schedule}"
        if time.perf_counter() > deadline:
            lines.append(f"{label} | no time left")
        elif only.search(label):
            lines.append(f"{label} | {_best(Case(tokens, *size), schedule, clock)}")
            print(lines[-1], flush=True)
            torch.cuda.empty_cache()
    return "\n".join(lines)


def _best(case: Case, schedule: str, clock: Clock) -> str:
    inputs = case.inputs("cuda").with_head(schedule != "frozen")
    budget = None if schedule == "frozen" else 0
    present = tiles.gpu_tile(case.hidden)
    grid = [(c, n, mib) for c in ("tile", "fused") for n in TOKENS for mib in MIB if n < 2 * case.tokens]
    sizes = {
        (c, n, mib): present._replace(tokens=n, bytes=mib * 2**20)
        for c, n, mib in grid
        if 512 <= 2**20 * mib // (4 * n) <= present.width
    }
    sizes |= {(c, 0, 0): present for c in ("tile", "fused")}
    found = {key: _ms(inputs, key[0], size, budget, clock) for key, size in sizes.items()}
    best = min((key for key in found if key[1]), key=lambda key: found[key])
    now = " | ".join(f"{found[c, 0, 0]:.3f}" for c in ("tile", "fused"))
    return f"{best[0]}, {best[1]}, {best[2]} | {found[best]:.3f} | {now}"


def _ms(inputs: Inputs, candidate: str, size: tiles.TileSize, budget: int | None, clock: Clock) -> float:
    """Median of 5; infinite where it cannot run."""
    contender = ours("", "", budget, "triton", candidate)
    with gpu_tile(size):
        try:
            times = interleaved({"": lambda: contender.step(inputs)}, clock, 5)
        except Exception as error:  # out of memory, or a tile that the kernels or their compiler refuse
            torch.cuda.synchronize()  # raises if the error has broken the device
            print(f"  {candidate} {size}: {str(error).splitlines()[0][:100]}", flush=True)
            return float("inf")
    return statistics.median(times[""])
