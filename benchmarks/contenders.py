"""Who is compared: each contender computes per-token log-probabilities of the same hidden states, head and targets.

A contender is `function(hidden, head, targets) -> (N,)`, differentiable. Liger's DPO loss has no per-token output; it
gets the same tokens as one pair and is marked as such.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import aspo_kernels
from aspo import torchvision_cpu

PerToken = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """name: as printed. per_token: the log-probabilities. loss: instead of it, a whole loss (no per-token output)."""

    name: str
    per_token: PerToken | None = None
    loss: PerToken | None = None

    def step(self, hidden: Tensor, head: Tensor, targets: Tensor, upstream: Tensor) -> list[Tensor]:
        """Forward and backward; returns the gradients of whatever requires one."""
        inputs = [t for t in (hidden, head) if t.requires_grad]
        if self.per_token is not None:
            logps = self.per_token(hidden, head, targets)
            return list(torch.autograd.grad(logps, inputs, upstream.to(logps.dtype)))
        assert self.loss is not None
        return list(torch.autograd.grad(self.loss(hidden, head, targets), inputs))


def eager(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Plain PyTorch: full logits, fp32 log_softmax."""
    return (hidden @ head.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def ours(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """aspo_kernels.linear_logps."""
    return aspo_kernels.linear_logps(hidden, head, targets)


def ours_recompute(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """aspo_kernels.linear_logps with no memory for stored exponentials."""
    return aspo_kernels.linear_logps(hidden, head, targets, memory_budget=0)


def _trl() -> Contender:
    torchvision_cpu.install()  # before transformers is imported
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def per_token(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, head, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )[0]

    return Contender("TRL ChunkedLogProbFunction", per_token)


def _torch_linear_cross_entropy() -> Contender:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")

    def per_token(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return -F.linear_cross_entropy(hidden, head, targets, reduction="none", options=options)

    return Contender("torch linear_cross_entropy", per_token)


def _liger() -> Contender:
    torchvision_cpu.install()
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    function = LigerFusedLinearDPOLoss(compiled=False, use_ref_model=False)

    def loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        pair = (2, hidden.shape[0] // 2)
        return function(head, hidden.view(*pair, -1), targets.view(*pair))[0]

    return Contender("Liger FusedLinearDPOLoss (one pair, no per-token output)", loss=loss)


def load(trainable_head: bool = False) -> tuple[list[Contender], dict[str, str]]:
    """All contenders that can run here, and for each that cannot the reason."""
    found = [Contender("eager PyTorch", eager), Contender("aspo_kernels", ours)]
    if trainable_head:
        found.append(Contender("aspo_kernels, recompute", ours_recompute))
    missing = {}
    for make in (_trl, _torch_linear_cross_entropy, _liger):
        try:
            found.append(make())
        except (ImportError, RuntimeError) as error:
            missing[make.__name__.strip("_")] = str(error).splitlines()[0]
    return found, missing
