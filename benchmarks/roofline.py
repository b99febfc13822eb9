"""What limits one kernel on a GPU: ceilings of devices, and the time that a kernel's FLOPs and bytes take at them.

Arithmetic only. What is assumed, and not measured, is marked so. `benchmarks.model` puts kernels together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CTA_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9))  # output tile of a GEMM, its rate (assumed)


@dataclass(frozen=True)
class Device:
    """Ceilings. tflops, tb_s: a large GEMM and a large copy; l2_tb_s and launch_us are assumed, not measured."""

    name: str
    bf16_tflops: float
    fp32_tflops: float
    tb_s: float
    l2_mib: int
    sms: int = 132
    l2_tb_s: float = 5.5
    launch_us: float = 1.5

    def tflops(self, dtype: str) -> float:
        return self.bf16_tflops if dtype == "bf16" else self.fp32_tflops


# bf16 rate of an 8192^3 product on random data and copy bandwidth as measured on one of each; fp32 is the datasheet's.
DEVICES = {"H100": Device("H100", 798, 67, 3.0, 50), "H200": Device("H200", 788, 67, 4.3, 60)}


@dataclass(frozen=True)
class Stage:
    """One kind of kernel of a schedule, summed over its launches."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0  # through device memory
    l2_bytes: float = 0.0  # through L2 only
    launches: int = 1
    fill: float = 1.0  # share of the GEMM rate that the output's tiles can reach

    def ms(self, device: Device, dtype: str) -> float:
        arithmetic = self.flops / (self.fill * device.tflops(dtype) * 1e12)
        moved = max(self.bytes / (device.tb_s * 1e12), self.l2_bytes / (device.l2_tb_s * 1e12))
        return 1e3 * max(arithmetic, moved) + 1e-3 * self.launches * device.launch_us


def fill(rows: int, columns: int, sms: int) -> float:
    """Share of the rate of a very large GEMM that a (rows, columns) output can reach: whole waves of its tiles.

    The 8192^3 product that the rate was measured with fills 97 % of its waves itself.
    """
    shares = []
    for m, n, rate in CTA_TILES:
        tiles = math.ceil(rows / m) * math.ceil(columns / n)
        useful = rows * columns / (m * n)
        shares.append(rate * useful / (math.ceil(tiles / sms) * sms))
    return min(1.0, max(shares) / 0.97)
