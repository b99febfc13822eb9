"""The benchmarks' own arithmetic: the model of the time by hand-worked numbers, what it claims and refuses."""

import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aspo_kernels import reference
from benchmarks import gpu, model, oracle, plots, readme, results, sanitize, suite
from benchmarks.cases import HEADS, Case
from benchmarks.contenders import Contender, load
from benchmarks.model import Plan
from benchmarks.oracle import Sample
from benchmarks.roofline import DEVICES, Device, Stage, fill
from benchmarks.suite import Work
from benchmarks.timing import Clock

H200 = Device("H200", bf16_tflops=790, fp32_tflops=67, tb_s=4.3, l2_mib=60)
CASE = Case(8192, 4096, 151_936)  # 1u = 2 * 8192 * 4096 * 151,936 = 1.0196e13 FLOP = 12.9 ms at 790 TFLOP/s


@pytest.mark.parametrize(
    ("schedule", "passes", "floor_ms"),
    [("frozen", 3, 38.7), ("TRL frozen", 4, 51.6), ("stored", 4, 51.6), ("recompute", 5, 64.5)],
)
def test_floor_with_a_live_reference(schedule: str, passes: int, floor_ms: float) -> None:
    predicted = model.predict(schedule, CASE, H200, reference=True)
    assert predicted.passes == passes
    assert predicted.flops == passes * 10_196_252_360_704
    assert predicted.flops_ms == pytest.approx(floor_ms, abs=0.06)
    assert predicted.predicted_ms > predicted.flops_ms


def test_bytes_of_a_frozen_head_by_hand() -> None:
    # 2 chunks of 1024 tokens by 4 slices of 4096 entries: 8 tiles, whose 16 MiB of fp32 logits stay in L2
    case, plan = Case(2048, 2048, 16_384), Plan("tile", 1024, 4096)
    z, epilogue, gradient, rows, scaled = model.stages("frozen", case, DEVICES["H200"], plan)
    mib = 2**20
    assert (z.bytes, z.l2_bytes, z.launches) == (2 * 64 * mib + 8 * mib, 128 * mib, 8)  # W twice, x; 8 tiles
    assert (epilogue.bytes, epilogue.l2_bytes) == (0, 192 * mib)  # reads 128 MiB of logits, writes 64 of E
    assert (
        gradient.bytes == 2 * 64 * mib + 4 * 2 * 16 * mib
    )  # W twice; the accumulators, 16 MiB, there and back 4 times
    assert rows.bytes == (16 + 8) * mib and scaled.bytes == 2 * 8 * mib
    spilled = model.stages("frozen", case, DEVICES["H200"], Plan("tile", 2048, 8192))
    assert (spilled[1].bytes, spilled[1].l2_bytes) == (192 * mib, 0)


def test_a_stage_takes_its_largest_term() -> None:
    device = Device("x", bf16_tflops=100, fp32_tflops=50, tb_s=1, l2_mib=50, l2_tb_s=4, launch_us=2)
    assert Stage("a", flops=1e14).ms(device, "bf16") == pytest.approx(1000.002)
    assert Stage("a", flops=1e14, fill=0.5).ms(device, "fp32") == pytest.approx(4000.002)
    assert Stage("b", 1e10, bytes=1e9).ms(device, "bf16") == pytest.approx(1.002)
    assert Stage("c", l2_bytes=8e9, launches=3).ms(device, "bf16") == pytest.approx(2.006)


def test_fill_counts_whole_waves() -> None:
    assert fill(1024, 4096, 132) == pytest.approx(128 / 132 / 0.97)  # one wave of 128 tiles of 128 x 256
    assert fill(1024, 1536, 132) == pytest.approx(0.9 * 96 / 132 / 0.97)  # 48 such tiles; 96 of 128 x 128
    assert fill(8192, 8192, 132) == pytest.approx(1.0, abs=1e-3)  # 2048 tiles in 16 waves


def test_stored_exponentials_are_reported_apart() -> None:
    plan = Plan("tile", 1024, 4096)
    frozen, stored = (model.extra_bytes(s, CASE, H200, plan) for s in ("frozen", "stored"))
    assert stored - frozen >= 2 * 8192 * 151_936
    assert model.extra_bytes("eager frozen", CASE, H200) / frozen > 20


def test_eager_memory_is_what_was_measured() -> None:
    rows = [
        r for r in results.read(results.FOLDER / "head.csv")[1] if r["contender"] == "eager PyTorch" and r["extra_mib"]
    ]
    assert len(rows) == 4
    for row in rows:
        case = Case(int(row["tokens"]), int(row["hidden"]), int(row["vocabulary"]), row["dtype"])
        predicted = model.extra_bytes(f"eager {row['head']}", case, H200) / 2**20
        assert predicted == pytest.approx(float(row["extra_mib"]), rel=0.03), row


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="'fused'"):
        model.stages("fused", CASE, H200)


def tiny(**options: object) -> Case:
    return Case(14, 12, 37, "fp32", trainable_head=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("logits", ["random", "peaked"])
def test_the_suites_truth_is_the_oracles(logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "CHUNK_ENTRIES", 4 * 37)  # four tokens at a time, the last chunk of two
    inputs = tiny(logits=logits).inputs()
    sample = Sample.of(inputs, 5)
    x, w = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.head))
    logps = reference.linear_logps(x, w, inputs.targets)
    dx, dw = torch.autograd.grad(logps, (x, w), inputs.upstream.double())
    found = oracle.answer(inputs, sample)
    torch.testing.assert_close(found.logps, logps.detach())
    torch.testing.assert_close(found.hidden_grad, dx[sample.tokens])
    torch.testing.assert_close(found.head_grad, dw[sample.entries])
    assert {0, 13} <= set(sample.tokens.tolist()) and {0, 36} <= set(sample.entries.tolist())


def test_the_yardstick_is_eagers_own_rounding() -> None:
    inputs = Case(24, 48, 301, "bf16", trainable_head=True).inputs()
    sample = Sample.of(inputs)
    eager = next(c for c in load(True)[0] if c.name == "eager PyTorch")
    truth, like_eager = oracle.answer(inputs, sample), oracle.answer(inputs, sample, "eager")
    theirs = oracle.errors(oracle.Answer(eager.logps(inputs), *eager.step(inputs)), truth)
    for name, error in oracle.errors(like_eager, truth).items():
        assert error == pytest.approx(theirs[name], rel=0.15), name
    assert oracle.errors(oracle.answer(inputs, sample, "fp32 logits"), truth)["logps_error_nats"] < 2e-6


def wrong(kind: str) -> Contender:
    """Ours, spoilt."""

    def per_token(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if kind == "crash":
            raise RuntimeError("no such kernel\nand more")
        z = hidden @ head.T
        if kind == "gradient":
            z = z.detach() + 1.01 * (z - z.detach())
        if kind == "nan":
            z = z * float("nan")
        logps = z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return logps * (1 + 1e-4 * torch.rand(()) if kind == "random" else 1.0)

    return Contender(kind, per_token, ours=True)


@pytest.mark.parametrize(
    ("kind", "says"),
    [("right", "ok"), ("gradient", "FAILED: hidden_grad_error"), ("random", "FAILED: two runs differ"),
     ("nan", "FAILED: two runs differ; logps_error_nats nan"), ("crash", "FAILED")],
)  # fmt: skip
def test_a_wrong_result_of_ours_fails_the_suite(kind: str, says: str) -> None:
    inputs = tiny().inputs()
    sample = Sample.of(inputs)
    truth = oracle.answer(inputs, sample)
    plain, fp32 = (oracle.errors(oracle.answer(inputs, sample, how), truth) for how in ("eager", "fp32 logits"))
    row = suite.check(wrong(kind), inputs, sample, truth, oracle.limits(14, plain, fp32, slack=2.0))
    assert str(row["check"]).startswith(says), row
    assert row["status"] == ("failed: RuntimeError: no such kernel" if kind == "crash" else "ran")


def test_one_group_end_to_end_and_what_the_time_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    group = suite.Group("tiny", replace(tiny(), tokens=6), (Work(trainable=True), Work(reference=True)))
    bench = suite.Bench("cpu", Clock("cpu"), DEVICES["H100"], rounds=3, slack=2.0)
    saved: list[int] = []
    rows: list[suite.Row] = []
    left_out: list[str] = []
    gpu.run([group], bench, time.perf_counter() + 300, rows, left_out, lambda: saved.append(len(rows)))
    assert left_out == [] and len(saved) == 2 and saved[-1] == len(rows)
    mine = [r for r in rows if r["contender"] == "aspo_kernels, torch, recompute"]
    assert len(mine) == 1 and mine[0]["check"] == "ok" and mine[0]["identical"] is True
    bare = {
        r["contender"]: r["median_ms"]
        for r in rows
        if str(r["contender"]).startswith("bare") and r["head"] == "trainable"
    }
    expected = 2 * bare["bare z"] + bare["bare dX"] + bare["bare dW"]
    assert mine[0]["floor_ms"] == pytest.approx(expected, abs=3e-4)
    assert mine[0]["over_floor"] == pytest.approx(mine[0]["median_ms"] / expected, rel=2e-2)
    live = [r for r in rows if r["work"] == "policy+reference"]
    bare, mine = (
        {r["contender"]: r["median_ms"] for r in live},
        [r for r in live if r["contender"] == "aspo_kernels, torch"],
    )
    assert mine[0]["floor_ms"] == pytest.approx(2 * bare["bare z"] + bare["bare dX"], abs=3e-4)
    table = gpu.summary(rows).splitlines()
    assert len(table) == 3 and table[1].startswith("tiny 6 fp32 random trainable policy |")
    rows.clear()
    gpu.run([group], bench, time.perf_counter() + 1, rows, left_out, lambda: None)
    assert rows == [] and left_out[1:] == ["tiny N 6 fp32 random frozen policy+reference: no time left"]


SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
SHORT_TOO = RuntimeError("Triton Error [CUDA]: out of memory")  # what loading a kernel says
UNLAUNCHED = RuntimeError("no such launch\nand more")


def failing_at(call: int, error: Exception = SHORT, ours: bool = False) -> Contender:
    """Eager PyTorch, until it meets an error."""
    calls = itertools.count(1)

    def per_token(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if next(calls) >= call:
            raise error
        return (hidden @ head.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    return Contender(f"{error} at {call}", per_token, ours=ours)


def test_one_contender_that_fails_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    last = failing_at(999)
    contenders = [failing_at(2), failing_at(5), failing_at(2, SHORT_TOO), failing_at(5, SHORT_TOO, ours=True)]
    contenders += [
        failing_at(5, UNLAUNCHED),
        failing_at(6, UNLAUNCHED, ours=True),
        wrong("right"),
        wrong("crash"),
        last,
    ]
    monkeypatch.setattr(suite, "load", lambda *_: (contenders, {}))
    bench = suite.Bench("cpu", Clock("cpu"), None, rounds=3, slack=2.0, left_out={last.name: "--without"})
    (rows,) = suite.measure(suite.Group("tiny", replace(tiny(), tokens=6), (Work(),)), bench, 60)
    assert [(r["status"], r["check"]) for r in rows[:9]] == [
        ("out of memory", ""),
        ("out of memory when timed", "ok"),
        ("out of memory", ""),
        ("out of memory when timed", "ok"),
        ("failed: RuntimeError: no such launch when timed", "ok"),
        ("failed: RuntimeError: no such launch when timed", "FAILED: when timed"),
        ("ran", "ok"),
        ("failed: RuntimeError: no such kernel", "FAILED"),
        ("left out: --without", ""),
    ]
    assert [r["contender"] for r in rows if "median_ms" in r] == ["right", "bare z", "bare dX", "bare dW"]


def test_a_slow_peer_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(suite, "load", lambda *_: ([wrong("right"), failing_at(999)], {}))
    bench = suite.Bench("cpu", Clock("cpu"), None, rounds=3, slack=2.0)
    first, second = suite.measure(suite.Group("tiny", replace(tiny(), tokens=6), (Work(), Work())), bench, 60)
    assert [r["status"] for r in first[:2]] == ["ran", "ran"]
    assert [r["status"] for r in second[:2]] == ["ran", "left out: its checks took 0 s so far"]


def test_cases_that_are_only_checked_have_no_line_in_the_summary() -> None:
    same = {"model": "m", "tokens": 2, "dtype": "bf16", "head": "frozen", "work": "policy", "check": "ok"}
    figures = {"median_ms": 1.0, "over_floor": 1.5, "floor_ms": 0.7, "over_best_of_ours": 1.0}
    rows = [
        same | {"logits": logits, "contender": name, "status": "ran", **(figures if logits == "random" else {})}
        for logits in ("random", "peaked")
        for name in ("aspo_kernels, torch", "eager PyTorch")
    ]
    (line,) = gpu.summary(rows).splitlines()[1:]
    assert line.startswith("m 2 bf16 random frozen policy |") and line.count("eager") == 1


def test_the_cases_are_the_ones_promised() -> None:
    groups = gpu.all_groups()
    bf16 = {(g.model, g.case.tokens) for g in groups if g.case.dtype == "bf16" and g.timed}
    assert bf16 == set(itertools.product(HEADS, (512, 2048, 8192, 32_768)))
    assert any(g.case.dtype == "fp32" for g in groups) and any(g.case.logits == "peaked" for g in groups)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "x: y"}, {"b": "z"}]
    results.write(tmp_path / "new" / "x.csv", {"cpu": "a: b"}, rows, ("a", "b"))
    header, back = results.read(tmp_path / "new" / "x.csv")
    assert header == {"cpu": "a: b"} and back == [{"a": "1", "b": "x: y"}, {"a": "", "b": "z"}]


def test_sanitizer_without_the_tool_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert sanitize.run() == 1
    assert "not on the PATH" in capsys.readouterr().out


def test_a_plot_knows_the_figures_it_was_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "gpu.csv", tmp_path / "docs" / "head-gpu.svg"
    monkeypatch.setattr(plots, "PLOTS", {target: source})
    monkeypatch.setattr(plots, "DOCS", tmp_path / "docs")
    assert plots.stale() == []  # no results, no plot
    cases = itertools.product(
        ("LLaVA-1.5-7B", "Gemma-3-4B"), ("frozen", "trainable"), ("eager PyTorch", "aspo_kernels, triton, tile")
    )
    same = {"tokens": 8192, "dtype": "bf16", "logits": "random", "work": "policy", "over_floor": 1.5, "extra_mib": 99}
    rows = [same | {"model": m, "head": h, "contender": c} for m, h, c in cases]
    header = {"device": "a GPU", "torch": "2", "commit": "abc"}
    results.write(source, header, rows, suite.FIELDS)
    assert plots.stale() == ["docs/head-gpu.svg was not drawn from gpu.csv"]
    plots.draw(source, target)
    assert plots.stale() == [] and "<svg" in target.read_text()
    first = target.read_text()
    plots.draw(source, target)
    assert target.read_text() == first
    rows[0]["over_floor"] = 1.6
    results.write(source, header, rows, suite.FIELDS)
    assert plots.stale() != []


def test_the_readmes_gpu_table(tmp_path: Path) -> None:
    same = {"model": "Gemma-3-4B", "tokens": 2048, "dtype": "bf16", "head": "frozen", "work": "policy", "floor_ms": 6.9}
    figures = {
        "eager PyTorch": {"median_ms": 14.5, "over_floor": 2.1, "extra_mib": 6134},
        "aspo_kernels, triton, tile": {"median_ms": 9.5, "over_floor": 1.38, "over_predicted": 1.05, "extra_mib": 60},
        "aspo_kernels, triton, fused": {"median_ms": 9.0, "over_floor": 1.3, "over_predicted": 1.0, "extra_mib": 50},
        "TRL ChunkedLogProbFunction": {"median_ms": 12.6, "over_floor": 1.83, "extra_mib": 290},
        "quack": {"status": "failed: no such device"},
    }
    rows = [same | {"contender": name, **found} for name, found in figures.items()]
    header = {"device": "a GPU", "bf16_tflops": "798", "tb_s": "3", "torch": "2", "driver": "5", "commit": "abc"}
    results.write(tmp_path / "gpu.csv", header, rows, suite.FIELDS)
    assert readme.gpu_table(tmp_path / "gpu.csv").splitlines()[-1] == (
        "| Gemma-3-4B | 2,048 | frozen, bf16, policy | 6.9 | 9.0 (1.3x, 1.0x) | 14.5 "
        "| 12.6 (TRL ChunkedLogProbFunction) | 50, 6134 |"
    )
