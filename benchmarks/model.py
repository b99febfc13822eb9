"""A model of the time and memory of the loss head's schedules on a GPU: arithmetic only, PREDICTED, never measured.

python -m benchmarks.model                  the predictions for the benchmark's shapes, as Markdown tables
python -m benchmarks.model --device H100 --detail frozen     the kernels of one schedule, with their terms

1u = 2 N H V FLOP is one pass of the head (N tokens, H hidden, V vocabulary). A schedule is a list of `Stage`s that run
one after the other; a stage takes the largest of arithmetic / GEMM rate, bytes / device-memory bandwidth and bytes / L2
bandwidth, plus its launches. What is assumed, and not measured, is marked so. The reasoning: docs/performance.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from aspo_kernels import tiles
from benchmarks.cases import GPU_TOKENS, HEADS, Case
from benchmarks.roofline import DEVICES, Device, Stage, fill

ITEMSIZE = {"bf16": 2, "fp32": 4}
GROUP_TOKENS = 8192  # whose E of one slice exists at a time when the head's gradient is recomputed
WIDEST = 8192  # entries of a slice: the pass holds a token's row of it in one program
FUSED_RATE = 0.8  # of cuBLAS's, for a Triton product with an epilogue (assumed)


@dataclass(frozen=True)
class Prediction:
    """passes u; FLOPs and device-memory bytes; extra memory (less inputs and gradients); times in ms.

    flops_ms = FLOPs / GEMM rate is the floor of the schedule's bare products, bytes_ms = bytes / bandwidth,
    predicted_ms the sum over the stages of what limits each.
    """

    passes: int
    flops: float
    bytes: float
    extra_bytes: float
    flops_ms: float
    bytes_ms: float
    predicted_ms: float

    @property
    def over_floor(self) -> float:
        return self.predicted_ms / max(self.flops_ms, self.bytes_ms)


class Plan(NamedTuple):
    """How ours cuts the work. "tile": cuBLAS product in fp32, then one pass; "fused": one GEMM with an epilogue."""

    candidate: str
    tokens: int  # of a chunk
    entries: int  # vocabulary entries of a slice


def present_plan(candidate: str, case: Case) -> Plan:
    """How the library cuts this case today."""
    size = tiles.gpu_tile(case.hidden)
    chunk = min(case.tokens, size.tokens)
    widths = tiles.vocabulary_slices(case.vocabulary, chunk, size)[0]
    return Plan(candidate, chunk, widths.stop - widths.start)


def best_plan(case: Case, device: Device) -> Plan:
    """The plan with the least predicted time of the frozen schedule, tiles of 4 to 64 MiB in fp32."""
    sides = [512 * 2**k for k in range(6)]
    plans = [Plan(c, n, v) for c in ("tile", "fused") for n in sides for v in sides if v <= WIDEST]
    plans = [plan for plan in plans if plan.tokens < 2 * case.tokens and 2**20 <= plan.tokens * plan.entries <= 2**24]
    return min(plans, key=lambda plan: predict("frozen", case, device, plan).predicted_ms)


def _stays(plan: Plan, case: Case, device: Device) -> bool:
    """Whether a tile (fp32 logits, or E alone where they are never written) fits half of L2: W needs the rest."""
    width = 4 if plan.candidate == "tile" else ITEMSIZE[case.dtype]
    return width * plan.tokens * plan.entries <= device.l2_mib * 2**20 / 2


def _tile_stages(case: Case, device: Device, plan: Plan, passes: str, stored: bool = False) -> list[Stage]:
    """Products and epilogue of every tile and, for passes == "zx" or "zw", its gradient product.

    z = x W^T becomes E by a pass over an fp32 tile or in the product's own epilogue; then E W adds to (n, H), or E^T x
    to (v, H), in fp32, E^T x for GROUP_TOKENS at once. Pessimistic where L2 might help: W's slice and the fp32
    accumulators move through device memory for each product. stored: E goes there too.
    """
    (N, H, V), e = (case.tokens, case.hidden, case.vocabulary), ITEMSIZE[case.dtype]
    n, v = min(plan.tokens, N), min(plan.entries, V)
    chunks, slices = math.ceil(N / n), math.ceil(V / v)
    tiles = chunks * slices
    gradient, spill, fused = passes != "z", not _stays(plan, case, device), plan.candidate == "fused"
    u, head, z, exps = 2.0 * N * H * V, float(chunks) * V * H * e, 4.0 * N * V, float(e) * N * V * gradient
    written, rate = (exps, FUSED_RATE) if fused else (z, 1.0)
    through = head + N * H * e + spill * written + (fused and stored) * exps
    stages = [Stage("z = x W^T", u, through, (not spill) * written, tiles, rate * fill(n, v, device.sms))]
    if not fused:
        stages.append(Stage("epilogue", 0, spill * (z + exps) + stored * exps, (not spill) * (z + exps), tiles))
    if passes == "zx":
        moved = head + 8.0 * N * H * slices + (spill or stored) * exps
        stages.append(Stage("E W", u, moved, exps, tiles, fill(n, H, device.sms)))
    elif passes == "zw":
        groups = math.ceil(N / GROUP_TOKENS)
        moved = float(slices) * N * H * e + 8.0 * V * H * groups + exps
        stages.append(Stage("E^T x", u, moved, 0, groups * slices, fill(v, H, device.sms)))
    return stages


def _rows(case: Case) -> list[Stage]:
    """Write G, then g * G in the backward: read G, write dX."""
    e, rows = ITEMSIZE[case.dtype], case.tokens * case.hidden
    return [Stage("G", 0, (4 + e) * rows, launches=1), Stage("g * G", 0, 2 * e * rows)]


def _eager(case: Case, device: Device, trainable: bool) -> list[Stage]:
    """(x @ W.T).float().log_softmax(-1).gather: each kernel reads its inputs once and writes its outputs once."""
    N, H, V, e = case.tokens, case.hidden, case.vocabulary, ITEMSIZE[case.dtype]
    u, nv, head, rows = 2.0 * N * H * V, float(N) * V, V * H * e, N * H * e
    casts = [Stage("float()", 0, (e + 4) * nv), Stage("its backward", 0, (e + 4) * nv)] if e != 4 else []
    return [
        Stage("z = x W^T", u, head + rows + e * nv, fill=fill(N, V, device.sms)),
        Stage("log_softmax", 0, 8 * nv),
        Stage("gather's backward", 0, 4 * nv),
        Stage("log_softmax's backward", 0, 12 * nv),
        *casts,
        Stage("dX", u, head + rows + e * nv, fill=fill(N, H, device.sms)),
        *([Stage("dW", u, head + rows + e * nv, fill=fill(V, H, device.sms))] if trainable else []),
    ]


def _trl(case: Case, device: Device, trainable: bool) -> list[Stage]:
    """TRL's ChunkedLogProbFunction: tiles of 4096 x 32,768 in the head's dtype, made again in the backward."""
    (N, H, V), e = (case.tokens, case.hidden, case.vocabulary), ITEMSIZE[case.dtype]
    n, v = min(4096, N), min(32_768, V)
    chunks, slices = math.ceil(N / n), math.ceil(V / v)
    u, nv, head, rows = 2.0 * N * H * V, float(N) * V, chunks * V * H * e, N * H * e
    tiles = chunks * slices
    z = Stage("z = x W^T", u, head + rows + e * nv, launches=tiles, fill=fill(n, v, device.sms))
    dx = Stage("dX", u, head + e * nv + 8.0 * N * H * slices, 0, tiles, fill(n, H, device.sms))
    dw = Stage("dW", u, e * nv + 8.0 * V * H * chunks + slices * rows, 0, tiles, fill(v, H, device.sms))
    cast_dw = Stage("cast dW", 0, (4 + e) * V * H)
    return [
        *(z, Stage("fold", 0, e * nv, launches=tiles), z, Stage("fold backward", 0, 2 * e * nv, launches=tiles), dx),
        Stage("cast dX", 0, (4 + e) * N * H),
        *([dw, cast_dw] if trainable else []),
    ]


PEERS = ("eager frozen", "eager trainable", "TRL frozen", "TRL trainable")
SCHEDULES = ("frozen", "forward", "stored", "recompute", *PEERS)


def stages(schedule: str, case: Case, device: Device, plan: Plan | None = None) -> list[Stage]:
    """The kernels of one schedule; `plan` is ours, None = `best_plan`."""
    if schedule.startswith(("eager", "TRL")):
        return (_eager if schedule.startswith("eager") else _trl)(case, device, schedule.endswith("trainable"))
    plan = plan or best_plan(case, device)
    N, H, V, e = case.tokens, case.hidden, case.vocabulary, ITEMSIZE[case.dtype]
    if schedule == "forward":
        return _tile_stages(case, device, plan, "z")
    if schedule == "frozen":
        return [*_tile_stages(case, device, plan, "zx"), *_rows(case)]
    if schedule == "stored":
        whole = Stage("E^T x", 2.0 * N * H * V, float(e) * (N * V + N * H + V * H), fill=fill(V, H, device.sms))
        scaled = Stage("scale, copy dW", 0, 4 * e * V * H)
        return [*_tile_stages(case, device, plan, "zx", stored=True), *_rows(case), whole, scaled]
    if schedule == "recompute":
        return [
            *_tile_stages(case, device, plan, "zx"),
            *_rows(case),
            *_tile_stages(case, device, plan, "zw", stored=True),
            Stage("scale, copy dW", 0, (12 + e) * V * H),
        ]
    raise ValueError(f"schedule is {schedule!r}; choose one of {', '.join(SCHEDULES)}")


def extra_bytes(schedule: str, case: Case, device: Device, plan: Plan | None = None) -> float:
    """Peak memory less inputs and returned gradients, as the suite measures it."""
    N, H, V, e = case.tokens, case.hidden, case.vocabulary, ITEMSIZE[case.dtype]
    rows, trainable = float(e) * N * H, schedule.endswith(("stored", "recompute", "trainable"))
    returned = rows + trainable * e * V * H
    if schedule.startswith("eager"):  # in the backward: log-probabilities, their gradient, the logits', in fp32
        return max(12.0 * N * V - returned, e * N * V)
    if schedule.startswith("TRL"):
        return e * min(4096, N) * 32_768 + 4.0 * N * H + 4.0 * V * H * trainable
    plan = plan or best_plan(case, device)
    n, v = min(plan.tokens, N), min(plan.entries, V)
    tile = (4 if plan.candidate == "tile" else 0) * n * v + e * n * v * (schedule != "forward")
    if schedule == "forward":
        return tile + 12.0 * N
    kept = rows + 12.0 * N + (e * N * V if schedule == "stored" else 0.0)  # G, three numbers a token, E
    forward = kept + tile + (4 + e) * n * H  # an fp32 accumulator and W[y] of a chunk; nothing returned yet
    group = 4.0 * n * v * (plan.candidate == "tile") + e * min(N, GROUP_TOKENS) * v + 4.0 * v * H
    backward = {"frozen": 0.0, "stored": rows, "recompute": rows + group}[schedule]
    return max(forward - returned, kept + backward)


def predict(schedule: str, case: Case, device: Device, plan: Plan | None = None, reference: bool = False) -> Prediction:
    """Time and memory of one schedule, forward and backward; `reference`: and a forward of the reference's tokens."""
    ours = not schedule.startswith(("eager", "TRL"))
    plan = plan or best_plan(case, device) if ours else None
    parts = stages(schedule, case, device, plan)
    if reference and schedule.startswith("eager"):
        parts = parts + [s for s in parts if s.name in ("z = x W^T", "float()", "log_softmax")]
    elif reference:
        parts = parts + (stages("forward", case, device, plan) if ours else parts[:2])
    flops, moved = sum(s.flops for s in parts), sum(s.bytes for s in parts)
    return Prediction(
        passes=round(flops / (2.0 * case.tokens * case.hidden * case.vocabulary)),
        flops=flops,
        bytes=moved,
        extra_bytes=extra_bytes(schedule, case, device, plan),
        flops_ms=1e3 * flops / (device.tflops(case.dtype) * 1e12),
        bytes_ms=1e3 * moved / (device.tb_s * 1e12),
        predicted_ms=sum(s.ms(device, case.dtype) for s in parts),
    )


def table(device: Device, names: Iterable[str] = HEADS) -> str:
    """Predicted ms (over the bare products at the GEMM rate) of each schedule, bf16, for the benchmark's shapes."""
    lines = [
        f"PREDICTED, not measured, for one {device.name}: ms forward + backward in bf16 (over the bare products). "
        f"Ceilings {device.bf16_tflops:.0f} TFLOP/s, {device.tb_s} TB/s.",
        "",
        "| head | N | tile | frozen 2u | reference 1u | stored 3u | recompute 4u | frozen 2u at best "
        "| eager 2u / 3u | TRL 3u / 4u | extra GiB: frozen, stored, recompute, eager |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for name in names:
        for tokens in GPU_TOKENS:
            case = Case(tokens, *HEADS[name])
            plan, best = present_plan("tile", case), best_plan(case, device)
            p = {schedule: predict(schedule, case, device, plan) for schedule in SCHEDULES}
            ours = [f"{q.predicted_ms:.2f} ({q.over_floor:.2f}x)" for q in (p[s] for s in SCHEDULES[:4])]
            other = predict("frozen", case, device, best)
            peers = [" / ".join(f"{p[s].predicted_ms:.1f}" for s in PEERS[at : at + 2]) for at in (0, 2)]
            memory = ", ".join(
                f"{p[s].extra_bytes / 2**30:.2f}" for s in ("frozen", "stored", "recompute", "eager frozen")
            )
            cut = f"{plan.tokens} x {plan.entries}"
            best_cut = f"{other.over_floor:.2f}x: {best.candidate} {min(best.tokens, tokens)} x {best.entries}"
            lines.append(f"| {' | '.join([name, f'{tokens:,}', cut, *ours, best_cut, *peers, memory])} |")
    return "\n".join(lines)


def detail(schedule: str, case: Case, device: Device) -> str:
    """The kernels of one schedule with the terms of their times."""
    lines = [f"PREDICTED, {device.name}, {case}, {best_plan(case, device)}"]
    for s in stages(schedule, case, device):
        moved = f"{s.bytes / 1e9:7.2f} GB  {s.l2_bytes / 1e9:6.2f} GB in L2"
        work = f"{s.flops / 1e12:7.2f} TFLOP at {s.fill:.2f}  {moved}  {s.launches:5d} launches"
        lines.append(f"  {s.name:24s} {work}  {s.ms(device, case.dtype):8.3f} ms")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, help="only this one")
    parser.add_argument("--detail", choices=SCHEDULES, help="each kernel of this schedule, N 8192, not the table")
    args = parser.parse_args()
    for device in [DEVICES[args.device]] if args.device else DEVICES.values():
        if args.detail is None:
            print(table(device), end="\n\n")
        else:
            print("\n".join(detail(args.detail, Case(8192, *head), device) for head in HEADS.values()))


if __name__ == "__main__":
    main()
