"""The benchmarks' own arithmetic: the model of the time by hand-worked numbers, what it claims and refuses."""

import csv
from pathlib import Path

import pytest

from benchmarks import model
from benchmarks.cases import Case
from benchmarks.model import DEVICES, Device, Plan

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
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
    assert model.Stage("a", flops=1e14).ms(device, "bf16") == pytest.approx(1000.002)
    assert model.Stage("a", flops=1e14, fill=0.5).ms(device, "fp32") == pytest.approx(4000.002)
    assert model.Stage("b", 1e10, bytes=1e9).ms(device, "bf16") == pytest.approx(1.002)
    assert model.Stage("c", l2_bytes=8e9, launches=3).ms(device, "bf16") == pytest.approx(2.006)


def test_fill_counts_whole_waves() -> None:
    assert model.fill(1024, 4096, 132) == pytest.approx(128 / 132 / 0.97)  # one wave of 128 tiles of 128 x 256
    assert model.fill(1024, 1536, 132) == pytest.approx(0.9 * 96 / 132 / 0.97)  # 48 such tiles; 96 of 128 x 128
    assert model.fill(8192, 8192, 132) == pytest.approx(1.0, abs=1e-3)  # 2048 tiles in 16 waves


def test_stored_exponentials_are_reported_apart() -> None:
    plan = Plan("tile", 1024, 4096)
    frozen, stored = (model.extra_bytes(s, CASE, H200, plan) for s in ("frozen", "stored"))
    assert stored - frozen >= 2 * 8192 * 151_936
    assert model.extra_bytes("eager frozen", CASE, H200) / frozen > 20


def test_eager_memory_is_what_was_measured() -> None:
    lines = [line for line in (RESULTS / "head.csv").read_text().splitlines() if not line.startswith("#")]
    rows = [r for r in csv.DictReader(lines) if r["contender"] == "eager PyTorch" and r["extra_mib"]]
    assert len(rows) == 4
    for row in rows:
        case = Case(int(row["tokens"]), int(row["hidden"]), int(row["vocabulary"]), row["dtype"])
        predicted = model.extra_bytes(f"eager {row['head']}", case, H200) / 2**20
        assert predicted == pytest.approx(float(row["extra_mib"]), rel=0.03), row


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="'fused'"):
        model.stages("fused", CASE, H200)
