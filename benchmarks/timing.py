"""Time by device events (or the wall clock on a CPU), in interleaved rounds, and the two ceilings of a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]


HEAD_START_CYCLES = 4_000_000  # about 2 ms: longer than the host takes to launch a step of a hundred kernels


class Clock:
    """Milliseconds of one call. On a GPU, between two events, with the last-level cache overwritten beforehand.

    The host has a head start, as it has in training, where the model's own kernels keep the device busy meanwhile.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            self.other_data = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")

    def ms(self, run: Run) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        for _ in range(2):  # again if the allocator had to ask the driver, which waits for the device
            asked = torch.cuda.memory_stats().get("num_device_alloc")
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START_CYCLES)
            self.other_data.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if torch.cuda.memory_stats().get("num_device_alloc") == asked:
                break
        return start.elapsed_time(end)


def interleaved(
    runs: Mapping[str, Run], clock: Clock, rounds: int, seconds: float = float("inf"), warm: bool = False
) -> dict[str, list[float]]:
    """Times in ms of each run, round after round; at least 3 rounds, then until `seconds` are over. warm: already."""
    for run in () if warm else runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > deadline:
            break
        for name, run in runs.items():
            times[name].append(clock.ms(run))
    return times


def ceilings(device: str, clock: Clock, size: int = 8192) -> dict[str, float]:
    """Rates of a large product (TFLOP/s) and of a large copy (TB/s, bytes read and written) on random data."""
    found = {}
    if clock.cuda:  # an idle device takes a while to its full clock
        a, end = torch.randn(size, size, device=device), time.perf_counter() + 0.5
        while time.perf_counter() < end:
            clock.ms(lambda: a @ a)
        del a
    for name, dtype, n in (("bf16_tflops", torch.bfloat16, size), ("fp32_tflops", torch.float32, size // 2)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = statistics.median(interleaved({name: lambda a=a, b=b: a @ b}, clock, 10)[name])
        found[name] = 2 * n**3 / (product * 1e-3) / 1e12
    source = torch.randn(4 * size, size, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(interleaved({"copy": lambda: target.copy_(source)}, clock, 10)["copy"])
    found["tb_s"] = 2 * source.numel() * source.element_size() / (copy * 1e-3) / 1e12
    return found
