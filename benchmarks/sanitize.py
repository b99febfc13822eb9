"""The Triton head under compute-sanitizer: memcheck for bad addresses, racecheck for races in shared memory.

`python -m benchmarks.gpu --sanitize` starts one process for each tool; `python -m benchmarks.sanitize` is that process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from itertools import product

import torch

from benchmarks.cases import Case
from benchmarks.contenders import every_way_of_ours

TOOLS = ("memcheck", "racecheck")
SECONDS = 240  # for each tool
SIZES = ((1, 16, 17), (37, 72, 701), (130, 264, 1031))  # N, H, V: one token, odd ones, more than a block of each


def run() -> int:
    """Each tool over `small_shapes`; the exit status, 0 if all are clean."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
        return 1
    status = 0
    # Without torch's caching allocator each tensor is an allocation, so that an address past its end is noticed.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.sanitize"]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        ) as process:  # fmt: skip
            watch = threading.Timer(SECONDS, os.killpg, (process.pid, signal.SIGKILL))
            watch.start()
            lines = process.communicate()[0].strip().splitlines()
            watch.cancel()
        slow = f" (stopped after {SECONDS} s)" if process.returncode == -signal.SIGKILL else ""
        print(f"{name}: exit status {process.returncode}{slow}", *lines[-12:], sep="\n  ", flush=True)
        status = status or abs(process.returncode)
    return status


def small_shapes() -> None:
    """Forward, backward and a reference's forward of every schedule and candidate at odd sizes, bf16 and fp32."""
    for (tokens, hidden, vocabulary), dtype, trainable in product(SIZES, ("bf16", "fp32"), (False, True)):
        inputs = Case(tokens, hidden, vocabulary, dtype, trainable_head=trainable, reference=True).inputs("cuda")
        for contender in every_way_of_ours("cuda", dtype, trainable)[0]:
            if "triton" in contender.name:
                contender.step(inputs)
                torch.cuda.synchronize()
                print(f"N {tokens} H {hidden} V {vocabulary} {dtype} {contender.name}", flush=True)


if __name__ == "__main__":
    small_shapes()
