"""GPUs by their makers' figures, and a cluster of them: how long bytes and operations take at stated efficiencies.

Nothing here was measured by us. A peak is what the maker publishes (dense, bf16); what of it is reached is an
assumption that the user may set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

GB, GBIT, TERA = 1e9, 1e9 / 8, 1e12
MARGIN = 0.9  # of a device's memory that may be planned: allocators round up and leave holes, NCCL has buffers


@dataclass(frozen=True)
class Gpu:
    """memory: GB (10^9 bytes). tflops: bf16, dense. hbm: TB/s. nvlink, network: of one GPU in one direction, GB/s
    between GPUs of a node and Gbit/s between nodes."""

    memory: float
    tflops: float
    hbm: float
    nvlink: float
    network: float
    source: str


# Memory, bf16 and bandwidths: the maker's data sheet of the part, half of a sum over both directions. Network: one
# adapter a GPU of the named system.
GPUS = {
    "a100": Gpu(80, 312, 2.0, 300, 200, "NVIDIA A100 80GB SXM data sheet; DGX A100: 8 ConnectX-6"),
    "h100": Gpu(80, 989, 3.35, 450, 400, "NVIDIA H100 SXM data sheet; DGX H100: 8 ConnectX-7"),
    "h200": Gpu(141, 989, 4.8, 450, 400, "NVIDIA H200 SXM data sheet; DGX H200: 8 ConnectX-7"),
    "b200": Gpu(180, 2250, 8.0, 900, 400, "NVIDIA DGX B200 and HGX B200 data sheets: 8 ConnectX-7"),
    "mi300x": Gpu(192, 1307, 5.3, 448, 400, "AMD MI300X data sheet, 7 links; a 400 Gbit/s adapter a GPU is assumed"),
}


@dataclass(frozen=True)
class Cluster:
    """`gpus` alike, `gpus_per_node` to a node, and the shares of their peaks that are reached.

    Our assumptions, all for the user to set: 0.4 of the arithmetic (The Llama 3 Herd of Models, arXiv 2407.21783,
    reports 0.38 to 0.43 on H100s for pre-training of 405B; a small batch, LoRA's thin products and ours may reach
    less), 0.8 of the bandwidths, 8 CPU cores a GPU that make batches, 2 GB/s of storage a node.
    Raises ValueError for nodes that are not whole and for figures that are not positive.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int = 8
    compute_efficiency: float = 0.4
    network_efficiency: float = 0.8
    memory_efficiency: float = 0.8
    cores_per_gpu: int = 8
    storage: float = 2.0  # GB/s a node

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "cores_per_gpu", "storage"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("compute_efficiency", "network_efficiency", "memory_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the peak, above 0 and at most 1")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}: name a multiple, or set gpus_per_node"
            )

    @property
    def per_node(self) -> int:
        """GPUs of a node that take part."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def nodes(self) -> int:
        """Nodes that take part."""
        return self.gpus // self.per_node

    @property
    def room(self) -> float:
        """Bytes of a GPU that a plan may fill."""
        return MARGIN * self.gpu.memory * GB

    def compute_seconds(self, flops: float) -> float:
        """Of one GPU."""
        return flops / (self.gpu.tflops * TERA * self.compute_efficiency)

    def memory_seconds(self, nbytes: float) -> float:
        """Bytes through one GPU's memory."""
        return nbytes / (self.gpu.hbm * TERA * self.memory_efficiency)

    def inside_seconds(self, nbytes: float) -> float:
        """Bytes that one GPU sends to others of its node."""
        return nbytes / (self.gpu.nvlink * GB * self.network_efficiency)

    def across_seconds(self, nbytes: float) -> float:
        """Bytes that one GPU sends to other nodes."""
        return nbytes / (self.gpu.network * GBIT * self.network_efficiency)


def named_gpu(name: str, **figures: float | None) -> Gpu:
    """A row of GPUS, with figures of the user's own in the place of its.

    Raises ValueError for a name that is not there and a figure that is not positive.
    """
    if name not in GPUS:
        raise ValueError(f"gpu is {name!r}; choose one of {', '.join(GPUS)}, and set what differs (--gpu_memory, ...)")
    own: dict[str, Any] = {key: value for key, value in figures.items() if value is not None}
    for key, value in own.items():
        if value <= 0:
            raise ValueError(f"gpu_{key} is {value:g}; it must be positive")
    return replace(GPUS[name], **own | ({"source": "set by hand"} if own else {}))
