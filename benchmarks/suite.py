"""One group of the GPU suite: inputs that several kinds of work share; every contender checked, then timed."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from benchmarks import model, oracle, results
from benchmarks.cases import Case, Inputs
from benchmarks.contenders import Contender, load
from benchmarks.memory import device_extra_mib
from benchmarks.oracle import Answer, Sample
from benchmarks.roofline import Device
from benchmarks.timing import Clock, interleaved

SAMPLED = 512  # tokens and vocabulary entries whose gradients are compared
PATIENCE_SECONDS = 90.0  # a peer whose checks have taken longer (it compiles or tunes itself) is not run any more
SLICE = 16_384  # vocabulary entries of a bare product
BARE = {"frozen": ("z", "dX"), "stored": ("z", "dX", "dW"), "recompute": ("z", "dX", "z", "dW")}

FIELDS = ("model", "tokens", "hidden", "vocabulary", "dtype", "logits", "head", "work", "contender", "status",
          "median_ms", "fastest_ms", "slowest_ms", "rounds", "floor_ms", "over_floor", "over_fp32_out_floor",
          "predicted_ms", "over_predicted", "eager_over_this", "over_best_of_ours", "extra_mib", "predicted_extra_mib",
          "logps_error_nats", "margin_error_nats", "hidden_grad_error", "head_grad_error", "identical",
          "check")  # fmt: skip
Row = dict[str, object]


@dataclass(frozen=True)
class Work:
    """One kind of work on a group's inputs: policy forward and backward, with or without a live reference."""

    trainable: bool = False
    reference: bool = False

    def __str__(self) -> str:
        return f"{'trainable' if self.trainable else 'frozen'} {'policy+reference' if self.reference else 'policy'}"


@dataclass(frozen=True)
class Group:
    """model: whose head it is. works: what is done with the inputs. timed: False = checked only."""

    model: str
    case: Case
    works: tuple[Work, ...]
    timed: bool = True

    def label(self, work: Work) -> str:
        case = self.case
        return f"{self.model} N {case.tokens} {case.dtype} {case.logits} {work}"


@dataclass
class Bench:
    """Where and how: device "cuda" or "cpu", its ceilings for the model (None = no predictions), rounds at most, slack
    of the limits. left_out: the contenders that are not run, and why."""

    device: str
    clock: Clock
    ceilings: Device | None
    rounds: int = 15
    slack: float = 1.0
    left_out: dict[str, str] = field(default_factory=dict)
    check_seconds: dict[str, float] = field(default_factory=dict)  # of each contender so far


def measure(group: Group, bench: Bench, seconds: float) -> Iterator[list[Row]]:
    """For each work a row per contender. seconds: about how long the timing of one work may take."""
    case = replace(group.case, reference=any(work.reference for work in group.works))
    inputs = case.inputs(bench.device)
    sample = Sample.of(inputs, SAMPLED)
    truth = oracle.answer(inputs, sample)
    eager, fp32 = (oracle.errors(oracle.answer(inputs, sample, how), truth) for how in ("eager", "fp32 logits"))
    allowed = oracle.limits(case.tokens, eager, fp32, bench.slack)
    for work in group.works:
        given = inputs.with_head(work.trainable)
        given = given if work.reference else given._replace(ref_hidden=None)
        contenders, _ = load(work.trainable, bench.device, case.dtype)
        checked = {c.name: _checked(c, given, sample, truth, allowed, bench) for c in contenders}
        size = {name: getattr(case, name) for name in ("tokens", "hidden", "vocabulary", "dtype", "logits")}
        same = {"model": group.model, **size, **dict(zip(("head", "work"), str(work).split(), strict=True))}
        alive = [c for c in contenders if checked[c.name]["status"] == "ran"]
        times, failed = _times(alive, given, bench, seconds) if group.timed else ({}, {})
        mine = [statistics.median(times[c.name]) for c in alive if c.ours and c.name in times]
        rows: list[Row] = []
        for c in contenders:
            timed = _figures(c, case, work, times, bench) if c.name in times else {}
            if c.name in failed:
                checked[c.name]["status"] = f"{failed[c.name]} when timed"
                if c.ours and failed[c.name] != "out of memory":
                    checked[c.name]["check"] = "FAILED: when timed"
            if timed and mine:
                timed["over_best_of_ours"] = round(statistics.median(times[c.name]) / min(mine), 3)
            rows.append({**same, "contender": c.name, **checked[c.name], **timed})
        for name in [n for n in times if n not in checked]:
            rows.append({**same, "contender": name, "status": "ran", **_spread(times[name])})
        yield rows


def _checked(
    contender: Contender, inputs: Inputs, sample: Sample, truth: Answer, allowed: dict[str, float], bench: Bench
) -> Row:
    """`check`, or why not."""
    if contender.name in bench.left_out:
        return {"status": f"left out: {bench.left_out[contender.name]}", "check": ""}
    started = time.perf_counter()
    try:
        row = check(contender, inputs, sample, truth, allowed)
    except Exception as error:
        error.add_note(f"{contender.name} has broken the device: go on without it (--without)")
        raise
    took = bench.check_seconds.get(contender.name, 0.0) + time.perf_counter() - started
    bench.check_seconds[contender.name] = took
    if took > PATIENCE_SECONDS and not contender.ours:
        bench.left_out[contender.name] = f"its checks took {took:.0f} s so far"
    return row


def check(contender: Contender, inputs: Inputs, sample: Sample, truth: Answer, allowed: dict[str, float]) -> Row:
    """Run twice: errors against the truth, whether the two runs are bit-identical, memory of the second."""
    try:
        first, (grads, extra) = contender.step(inputs), _with_memory(lambda: contender.step(inputs), inputs)
        identical = all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))
        del first
        rows = [grads[0][sample.tokens], *(g[sample.entries] for g in grads[1:])]
        comparable = contender.per_token is not None or contender.weighted
        found = oracle.errors(Answer(contender.logps(inputs), *rows), truth) if comparable else {}
    except Exception as error:  # a peer that cannot do this case is shown as such; the others go on
        _check_device(inputs)
        return {"status": results.failure(error), "check": "FAILED" if contender.ours else ""}
    verdict = oracle.verdict(found, allowed) if comparable else "no per-token output"
    if contender.ours and not identical:
        verdict = f"two runs differ; {verdict}"
    if contender.ours and verdict != "ok":
        verdict = f"FAILED: {verdict}"
    digits = {name: float(f"{value:.3g}") for name, value in found.items()}
    return {"status": "ran", **extra, **digits, "identical": identical, "check": verdict}


def _check_device(inputs: Inputs) -> None:
    """After an error: raises if it has broken the device for everybody; else gives back what it left."""
    if inputs.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _with_memory(step: Callable[[], list[torch.Tensor]], inputs: Inputs) -> tuple[list[torch.Tensor], Row]:
    if not inputs.hidden.is_cuda:
        return step(), {}
    grads, extra = device_extra_mib(step)
    return grads, {"extra_mib": round(extra, 1)}


def bare_products(inputs: Inputs, wide: bool) -> dict[str, Callable[[], None]]:
    """The head's three products alone, all tokens by SLICE entries at a time: 1u each. wide: with fp32 results.

    dX and dW multiply a slice of real logits in the inputs' dtype, the same one for each slice of W.
    """
    x, w = inputs.hidden.detach(), inputs.head.detach()
    parts = [slice(v, v + SLICE) for v in range(0, w.shape[0], SLICE)]
    e = x @ w[parts[0]].T
    options = {"out_dtype": torch.float32} if wide and x.dtype != torch.float32 else {}

    def z() -> None:
        for part in parts:
            torch.mm(x, w[part].T, **options)

    def dx() -> None:
        for part in parts:
            torch.mm(e[:, : w[part].shape[0]], w[part], **options)

    def dw() -> None:
        for part in parts:
            torch.mm(e[:, : w[part].shape[0]].T, x, **options)

    suffix = ", fp32 out" if wide else ""
    return {f"bare {name}{suffix}": run for name, run in (("z", z), ("dX", dx), ("dW", dw))}


def _times(
    contenders: list[Contender], inputs: Inputs, bench: Bench, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """ms of each contender and of the bare products; and why some contenders, left out of it, have none."""
    failed: dict[str, str] = {}

    def step(contender: Contender) -> None:
        if contender.name in failed:
            return
        try:
            contender.step(inputs)
        except Exception as error:
            _check_device(inputs)
            failed[contender.name] = results.failure(error)

    runs: dict[str, Callable[[], object]] = {c.name: functools.partial(step, c) for c in contenders}
    bare = bare_products(inputs, wide=False)
    if bench.device == "cuda" and inputs.hidden.dtype != torch.float32:
        bare |= bare_products(inputs, wide=True)
    for run in bare.values():
        run()
    times = interleaved(runs | bare, bench.clock, bench.rounds, seconds, warm=True)
    return {name: values for name, values in times.items() if name not in failed}, failed


def _spread(times: list[float]) -> Row:
    median, low, high = (round(f(times), 4) for f in (statistics.median, min, max))
    return {"median_ms": median, "fastest_ms": low, "slowest_ms": high, "rounds": len(times)}


def _figures(contender: Contender, case: Case, work: Work, times: dict[str, list[float]], bench: Bench) -> Row:
    """Time, and its ratios to the bare products, to the model's prediction and to eager."""
    median = {name: statistics.median(values) for name, values in times.items()}
    mine = median[contender.name]
    own = contender.schedule in BARE
    passes = BARE[contender.schedule if own else "stored" if work.trainable else "frozen"]
    passes = (*passes, "z") if work.reference else passes
    floor = sum(median[f"bare {name}"] for name in passes)
    row = _spread(times[contender.name]) | {"floor_ms": round(floor, 4), "over_floor": round(mine / floor, 3)}
    if f"bare {passes[0]}, fp32 out" in median:
        row["over_fp32_out_floor"] = round(mine / sum(median[f"bare {name}, fp32 out"] for name in passes), 3)
    if "eager PyTorch" in median:
        row["eager_over_this"] = round(median["eager PyTorch"] / mine, 3)
    if contender.schedule is not None and bench.ceilings is not None:
        schedule = contender.schedule if own else f"{contender.schedule} {'trainable' if work.trainable else 'frozen'}"
        plan = model.present_plan("fused" if "fused" in contender.name else "tile", case) if own else None
        predicted = model.predict(schedule, case, bench.ceilings, plan, work.reference)
        row |= {
            "predicted_ms": round(predicted.predicted_ms, 4),
            "over_predicted": round(mine / predicted.predicted_ms, 3),
            "predicted_extra_mib": round(predicted.extra_bytes / 2**20, 1),
        }
    return row
