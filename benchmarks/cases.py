"""What is measured: sizes, and inputs with random logits or with peaked ones as a trained model has."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# (hidden size, vocabulary) of the heads that the GPU suite and the model of the time look at, and their token counts.
HEADS = {
    "LLaVA-1.5-7B": (4096, 32_000),
    "Qwen2.5-VL-7B": (3584, 152_064),
    "Gemma-3-4B": (2560, 262_208),
    "Qwen2-VL-2B": (1536, 151_936),
}
GPU_TOKENS = (512, 2048, 8192, 32_768)


class Inputs(NamedTuple):
    """One step's tensors. ref_hidden: the reference's hidden states where its forward is part of the work."""

    hidden: Tensor  # (N, H)
    head: Tensor  # (V, H)
    targets: Tensor  # (N,)
    upstream: Tensor  # (N,) fp32, d loss / d logp
    ref_hidden: Tensor | None = None  # (N, H)

    def with_head(self, trainable: bool) -> Inputs:
        """The same tensors, hidden requiring a gradient and the head only if it is trainable."""
        return self._replace(hidden=self.hidden.detach().requires_grad_(),
                             head=self.head.detach().requires_grad_(trainable))  # fmt: skip

    def differentiable(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.head) if t.requires_grad]


@dataclass(frozen=True)
class Case:
    """tokens N (half of them chosen, half rejected), hidden H, vocabulary V, dtype, frozen or trainable head."""

    tokens: int = 2048
    hidden: int = 1024
    vocabulary: int = 32_000
    dtype: str = "bf16"
    logits: str = "random"  # or "peaked"
    trainable_head: bool = False
    reference: bool = False  # also a forward of the reference, with the same head

    def inputs(self, device: str = "cpu", seed: int = 0) -> Inputs:
        """Fresh tensors, drawn on the device.

        "random": logits of unit variance. "peaked": each hidden state points at its target, so that the median
        target has a probability near 1 and a tenth of the targets are unlikely.
        """
        generator = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[self.dtype]

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        def integers(*size: int) -> Tensor:
            return torch.randint(self.vocabulary, size, generator=generator, device=device)

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, generator=generator, device=device)

        head = normal(self.vocabulary, self.hidden) / self.hidden**0.5
        targets, hidden = integers(self.tokens), normal(self.tokens, self.hidden)
        if self.logits == "peaked":
            hidden += (10 + 15 * uniform(self.tokens, 1)) * head[targets]
            targets = torch.where(uniform(self.tokens) < 0.1, integers(self.tokens), targets)
        elif self.logits != "random":
            raise ValueError(f"logits is {self.logits!r}; choose random or peaked")
        upstream = normal(self.tokens)
        ref_hidden = (hidden + 0.1 * normal(self.tokens, self.hidden)).to(dtype) if self.reference else None
        inputs = Inputs(hidden.to(dtype), head.to(dtype), targets, upstream, ref_hidden)
        return inputs.with_head(self.trainable_head)


def machine(device: str = "cpu") -> dict[str, str]:
    """What a result was measured on: processor, threads, driver, versions, commit."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        with open("/proc/cpuinfo") as lines:
            flags = next(line for line in lines if line.startswith("flags")).split()
        cpu += ", " + ", ".join(f for f in ("avx512_bf16", "amx_bf16") if f in flags)
    except (OSError, StopIteration):
        pass
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    accelerator = {"device": "cpu"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        accelerator = {
            "device": properties.name,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": str(torch.version.cuda),
            "l2_mib": str(properties.L2_cache_size // 2**20),
            "multiprocessors": str(properties.multi_processor_count),
        }
    commit = _output("git", "describe", "--always", "--dirty", "--exclude=*")
    return {"cpu": cpu, "threads": str(torch.get_num_threads()), **accelerator, "commit": commit, **versions}


def _output(*command: str) -> str:
    """The first line that a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (done.stdout.strip().splitlines() or ["unknown"])[0]
