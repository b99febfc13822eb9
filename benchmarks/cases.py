"""Inputs: random logits, and peaked ones as a trained model has."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Case:
    """tokens N (half of them chosen, half rejected), hidden H, vocabulary V, dtype, frozen or trainable head."""

    tokens: int = 2048
    hidden: int = 1024
    vocabulary: int = 32_000
    dtype: str = "bf16"
    logits: str = "random"  # or "peaked"
    trainable_head: bool = False

    def inputs(self, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden (N, H), head (V, H), targets (N,), upstream gradient (N,).

        "random": logits of unit variance. "peaked": each hidden state points at its target, so that the median
        target has a probability near 1 and a tenth of the targets are unlikely.
        """
        generator = torch.Generator().manual_seed(seed)
        head = torch.randn(self.vocabulary, self.hidden, generator=generator) / self.hidden**0.5
        targets = torch.randint(self.vocabulary, (self.tokens,), generator=generator)
        hidden = torch.randn(self.tokens, self.hidden, generator=generator)
        if self.logits == "peaked":
            strength = 10 + 15 * torch.rand(self.tokens, 1, generator=generator)
            hidden += strength * head[targets]
            surprises = torch.rand(self.tokens, generator=generator) < 0.1
            targets[surprises] = torch.randint(self.vocabulary, (int(surprises.sum()),), generator=generator)
        elif self.logits != "random":
            raise ValueError(f"logits is {self.logits!r}; choose random or peaked")
        upstream = torch.randn(self.tokens, generator=generator)
        dtype = DTYPES[self.dtype]
        hidden, head = hidden.to(device, dtype), head.to(device, dtype)
        hidden.requires_grad_()
        head.requires_grad_(self.trainable_head)
        return hidden, head, targets.to(device), upstream.to(device)


def machine() -> dict[str, str]:
    """What a result was measured on: processor, threads, versions, commit."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        with open("/proc/cpuinfo") as lines:
            flags = next(line for line in lines if line.startswith("flags")).split()
        cpu += ", " + ", ".join(f for f in ("avx512_bf16", "amx_bf16") if f in flags)
    except (OSError, StopIteration):
        pass
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("trl", "liger_kernel"):
        try:
            from importlib.metadata import version

            versions[package] = version(package.replace("_", "-"))
        except ImportError:
            versions[package] = "not installed"
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit.stdout.strip() or "unknown",
        **versions,
    }
