"""The check of the compiled kernels: that the committed table holds, and that the check can fail.

Everything runs in processes of their own: here Triton's kernels may be interpreted, and then nothing compiles.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        torch.torch_version.TorchVersion(torch.__version__) < "2.13",
        reason="torch 2.11 cannot trace addmm with an fp32 result on tensors without data",
    ),
]

# Sizes: 4096 is a multiple of 16 and 4099 is not. One warp of 32 cannot hold 128 x 128 sums in 255 registers a thread,
# nor one of 64 lanes 256 x 128 sums in 512 with their operands; wgmma and tcgen05 need at least 64 rows.
TOYS = """
import dataclasses, functools, json, sys
from benchmarks.machine_code import compile_cases, differences, uncovered, write_table
import pathlib, torch, triton, triton.language as tl

@triton.jit
def helper(x):
    return tl.exp(x)

@triton.jit
def elementwise(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, helper(tl.load(x_ptr + offs * stride, mask=offs < n)), mask=offs < n)

@triton.jit
def product(x_ptr, w_ptr, z_ptr, K, stride, M: tl.constexpr, N: tl.constexpr):
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 64)
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, K, 64):
        x = tl.load(x_ptr + offs_m[:, None] * stride + (k + offs_k)[None, :])
        acc = tl.dot(x, tl.load(w_ptr + offs_n[None, :] * stride + (k + offs_k)[:, None]), acc)
    tl.store(z_ptr + offs_m[:, None] * N + offs_n[None, :], acc)

@triton.jit
def broken(x_ptr):
    tl.store(x_ptr, tl.arange(0, 3))

@triton.jit
def forgotten(x_ptr):
    tl.store(x_ptr, 0.0)

def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="cuda")

def launch_elementwise(stride=1):
    x = empty(4096 * stride)[::stride]
    elementwise[(4,)](x, empty(4096), x.stride(0), 4096, BLOCK=1024)

def launch_product(rows=128, columns=128, dtype=torch.bfloat16, **options):
    x, w = empty(rows, 4096, dtype=dtype), empty(columns, 4096, dtype=dtype)
    product[(1,)](x, w, empty(rows, columns), 4096, x.stride(0), rows, columns, **options)

def of(cases, *targets):
    rows, faults, names = compile_cases(cases, *targets)
    return {"rows": [dataclasses.asdict(row) for row in rows], "faults": faults}, rows, names

good, rows, names = of({
    "contiguous": launch_elementwise,
    "strided": lambda: launch_elementwise(3),
    "product": launch_product,
    "again": launch_product,
})
table = pathlib.Path(sys.argv[1])
write_table(rows, table)
other = dataclasses.replace(rows[0], registers=rows[0].registers + 1)
out = {
    "good": good,
    "same": differences(rows, table),
    "missing row": differences([*rows, dataclasses.replace(rows[0], case="new")], table),
    "old row": differences(rows[1:], table),
    "other registers": differences([other, *rows[1:]], table),
    "no table": differences(rows[:1], table.with_name("none.csv")),
}
table.write_text(table.read_text().replace("# triton: ", "# triton: 0."))
out["other compiler"] = differences([other, *rows[1:]], table)
out["other compiler, old row"] = differences(rows[1:], table)
out["odd address"] = of({"odd": lambda: elementwise[(4,)](empty(4099)[1:], empty(4099), 1, 4099, 1024)}, ["gfx942"])[0]
out["spills"] = [of({"spills": functools.partial(launch_product, rows, num_warps=1)}, [target])[0]
                 for rows, target in ((128, "sm_80"), (256, "gfx942"))]
out["16 rows"] = of({"16 rows": lambda: launch_product(16, dtype=torch.float16)}, ["sm_80", "sm_90", "sm_100"])[0]
out["fp32"] = of({"fp32": lambda: launch_product(16, dtype=torch.float32)}, ["sm_90"])[0]
out["shared"] = of({"shared": lambda: launch_product(256, num_stages=6, num_warps=8)}, ["sm_80"])[0]
out["broken"] = of({"broken": lambda: broken[(1,)](empty(4)), "idle": lambda: None}, ["sm_90"])[0]
out["uncovered"] = uncovered([sys.modules["__main__"]], names | {"__main__.broken"})
try:
    of({"looks": lambda: int(empty(3).argmax())}, ["sm_90"])
except Exception as error:
    out["looks"] = [type(error).__name__, *error.__notes__]
print(json.dumps(out))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}  # the interpreter must not stay on
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env, check=False)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.py").write_text(TOYS)  # Triton reads its kernels' source from a file
    done = run(str(folder / "toys.py"), str(folder / "table.csv"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def test_kernels_are_compiled_as_they_are_launched(toys: dict[str, Any]) -> None:
    rows = toys["good"]["rows"]
    assert toys["good"]["faults"] == []
    # each once: "again" launches what "product" did
    assert [(r["target"], r["case"]) for r in rows] == [
        (target, case) for target in TARGETS for case in ("contiguous", "strided", "product")
    ]
    contiguous, strided, product = (r for r in rows if r["target"] == "sm_90")
    assert contiguous["kernel"].endswith("elementwise")
    assert contiguous["arguments"] == "x_ptr=*fp32:D y_ptr=*fp32:D n=i32:D"
    assert contiguous["constants"] == "stride=1 BLOCK=1024"  # a stride of 1 is a constant to Triton
    assert strided["arguments"] == "x_ptr=*fp32:D y_ptr=*fp32:D stride=i32 n=i32:D"
    assert (product["num_warps"], product["num_stages"]) == (4, 3)
    (odd,) = toys["odd address"]["rows"]
    assert odd["arguments"] == "x_ptr=*fp32:S y_ptr=*fp32:DS n=i32"  # S: AMD's 32-bit offsets


def test_what_is_read_from_the_machine_code(toys: dict[str, Any]) -> None:
    for row in toys["good"]["rows"]:
        assert 8 <= row["registers"] <= 255
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == row["stack_bytes"] == 0
        product = row["case"] == "product"
        assert row["dots"] == ("bf16 128x128x64" if product else "")
        assert (row["matrix_instructions"] > 0) == product
        assert (row["shared_bytes"] >= 2 * (128 + 128) * 64) == product  # one stage of both operands
        assert row["tensor_memory_columns"] == (128 if product and row["target"] == "sm_100" else 0)


def test_a_spill_is_found(toys: dict[str, Any]) -> None:
    for spilling, sums, registers in zip(toys["spills"], (128 * 128 // 32, 256 * 128 // 64), (255, 512), strict=True):
        (row,), (fault,) = spilling["rows"], spilling["faults"]
        assert row["registers"] == registers
        # at the least the sums of a thread that have no register, and the loop reads some of them again
        assert row["spill_store_bytes"] >= 4 * max(sums - registers, 1) <= row["spill_load_bytes"]
        assert all(text in fault for text in ("product", row["target"], f"{row['spill_store_bytes']} bytes stored"))


def test_missing_matrix_instructions_are_found(toys: dict[str, Any]) -> None:
    on_80, on_90, on_100 = toys["16 rows"]["rows"]
    assert on_80["matrix_instructions"] > 0
    assert on_90["matrix_instructions"] == on_100["matrix_instructions"] == 0
    assert [("sm_90" in fault, "no HGMMA" in fault) for fault in toys["16 rows"]["faults"]] == [
        (True, True),
        (False, False),
    ]
    assert toys["fp32"]["rows"][0]["dots"] == "f32 16x128x64"
    assert toys["fp32"]["faults"] == []  # nothing is promised for fp32


def test_too_much_shared_memory_is_found(toys: dict[str, Any]) -> None:
    (fault,) = toys["shared"]["faults"]
    assert "shared memory" in fault and str(toys["shared"]["rows"][0]["shared_bytes"]) in fault


def test_kernels_that_do_not_compile_or_are_not_launched_are_found(toys: dict[str, Any]) -> None:
    broken, idle = toys["broken"]["faults"]
    assert "broken does not compile for sm_90" in broken and "power of 2" in broken
    assert idle == "case idle launches no kernel on sm_90"
    (forgotten,) = toys["uncovered"]  # and not `helper`, which a launched kernel calls
    assert "forgotten" in forgotten


def test_a_launcher_that_looks_at_values_is_found(toys: dict[str, Any]) -> None:
    assert toys["looks"] == ["RuntimeError", "in case looks for sm_90, on tensors without data"]


def test_a_table_out_of_date_is_found(toys: dict[str, Any]) -> None:
    assert toys["same"] == []
    for name, words in (
        ("missing row", "it has no row for"),
        ("old row", "nothing is launched like its row"),
        ("other registers", "registers is"),
        ("no table", "it has no row for"),
        ("other compiler, old row", "nothing is launched like its row"),
    ):
        (line,) = toys[name]
        assert words in line, name
    assert toys["other compiler"] == []  # which may use other registers


def test_the_library_holds_what_the_committed_table_says() -> None:
    done = run("-m", "benchmarks.machine_code", "--check")
    assert done.returncode == 0, done.stderr
