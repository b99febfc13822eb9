"""Extra memory of one step over its inputs and outputs: a GPU's allocator knows; a CPU's is read off a fresh process.

python -m benchmarks.memory --contender "aspo_kernels" --dtype bf16 --tokens 2048   prints one number, MiB (Linux)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contenders import load

MIB = 2**20


def device_extra_mib(step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], float]:
    """A step's gradients, and the peak of allocated GPU memory during it less what was there before and they take."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = step()
    torch.cuda.synchronize()
    return grads, (torch.cuda.max_memory_allocated() - before - _bytes(grads)) / MIB


def extra_mib(contender_name: str, case: Case) -> float:
    """Peak resident size during forward and backward, less what the inputs and the gradients take, in this process."""
    contenders = {c.name: c for c in load(case.trainable_head)[0]}
    contender = contenders[contender_name]
    # Load code and start threads on a small case first, so that only data is counted.
    small = Case(64, case.hidden, 512, case.dtype, trainable_head=case.trainable_head)
    contender.step(small.inputs())
    inputs = case.inputs()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present resident size
    before = _status_kib("VmHWM")
    grads = contender.step(inputs)
    return (_status_kib("VmHWM") - before) * 1024 / MIB - _bytes(grads) / MIB


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(contender_name: str, case: Case) -> float:
    """`extra_mib` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--contender", contender_name, "--dtype", case.dtype]
    command += ["--tokens", str(case.tokens), "--hidden", str(case.hidden), "--vocabulary", str(case.vocabulary)]
    command += ["--trainable-head"] if case.trainable_head else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender_name}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}; this measurement needs Linux")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contender", default="aspo_kernels")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--trainable-head", action="store_true")
    args = parser.parse_args()
    case = Case(args.tokens, args.hidden, args.vocabulary, args.dtype, trainable_head=args.trainable_head)
    torch.manual_seed(0)
    print(f"{extra_mib(args.contender, case):.1f}")


if __name__ == "__main__":
    main()
