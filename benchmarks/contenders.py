"""Who is compared, on the CPU and on GPUs: the same hidden states, head, targets and upstream gradient for all.

A contender computes per-token log-probabilities, differentiable with any upstream gradient; or, where it has no
per-token output, a whole loss of the same tokens, and is marked as such.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import aspo_kernels
from aspo import torchvision_cpu
from aspo_kernels import tiles
from aspo_kernels.checks import check_backend
from aspo_kernels.linear_logps import policy_and_reference_logps
from aspo_kernels.tiles import Epilogue
from benchmarks.cases import DTYPES, Inputs

PerToken = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """name: as printed. per_token: (hidden, head, targets) -> (N,). loss: instead of it, a scalar of the inputs.

    schedule: of `benchmarks.model`, without "frozen" or "trainable" where both are meant; None = not in the model.
    weighted: the loss is sum_t upstream_t logp_t, so that its gradients are those of the others.
    pair: the log-probabilities where the reference's are computed in the same pass; None = one after the other.
    settings: what is in force during forward and backward.
    """

    name: str
    per_token: PerToken | None = None
    loss: Callable[[Inputs], Tensor] | None = None
    schedule: str | None = None
    ours: bool = False
    weighted: bool = False
    pair: Callable[[Inputs], Tensor] | None = None
    settings: Callable[[], AbstractContextManager[None]] = nullcontext

    def step(self, inputs: Inputs) -> list[Tensor]:
        """Forward and backward, and the reference's forward where there is one; returns the required gradients."""
        with self.settings():
            wanted = inputs.differentiable()
            if self.per_token is None:
                assert self.loss is not None
                return list(torch.autograd.grad(self.loss(inputs), wanted))
            if inputs.ref_hidden is not None and self.pair is not None:
                logps = self.pair(inputs)
            else:
                logps = self.per_token(inputs.hidden, inputs.head, inputs.targets)
            if inputs.ref_hidden is not None and self.pair is None:
                with torch.no_grad():
                    self.per_token(inputs.ref_hidden, inputs.head, inputs.targets)
            return list(torch.autograd.grad(logps, wanted, inputs.upstream.to(logps.dtype)))

    def logps(self, inputs: Inputs) -> Tensor | None:
        """The log-probabilities alone, (N,), or None where they do not come out."""
        if self.per_token is None:
            return None
        with torch.no_grad(), self.settings():
            return self.per_token(inputs.hidden.detach(), inputs.head.detach(), inputs.targets)


def eager(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Plain PyTorch: full logits, fp32 log_softmax."""
    return (hidden @ head.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def ours(
    name: str, schedule: str, budget: int | None = None, backend: str = "auto", candidate: str | None = None
) -> Contender:
    """aspo_kernels.linear_logps with one backend, memory budget and, for Triton, way of making a tile."""

    def per_token(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return aspo_kernels.linear_logps(hidden, head, targets, backend=backend, memory_budget=budget)

    def pair(inputs: Inputs) -> Tensor:  # as sentence_dpo_loss does
        return policy_and_reference_logps(
            inputs.hidden, inputs.ref_hidden, inputs.head, inputs.targets, None, Epilogue(), None, None, backend,
            budget, False,
        )[0]  # fmt: skip

    settings = functools.partial(triton_candidate, candidate) if candidate else nullcontext
    return Contender(name, per_token, schedule=schedule, ours=True, pair=pair, settings=settings)


@contextmanager
def triton_candidate(name: str) -> Iterator[None]:
    """Both ways of making a tile on a GPU, "tile" and "fused", are compiled in; one switch chooses."""
    module = importlib.import_module("aspo_kernels.triton_head")
    before, module.CANDIDATE = module.CANDIDATE, name
    try:
        yield
    finally:
        module.CANDIDATE = before


@contextmanager
def gpu_tile(size: tiles.TileSize) -> Iterator[None]:
    """How the head is cut on a GPU, for sweeps."""
    before, tiles.GPU_TILES = tiles.GPU_TILES, ((0, size),)
    try:
        yield
    finally:
        tiles.GPU_TILES = before


def _no_triton(device: str, dtype: str) -> dict[str, str]:
    """Why the Triton kernels do not run on this device: {} or {"aspo_kernels, triton": reason}."""
    reason = None
    if device == "cpu" and dtype == "bf16":
        reason = "Triton's interpreter has no bf16 products"
    try:
        answers = check_backend("triton", torch.empty(0, dtype=DTYPES[dtype], device=device))
        reason = reason if answers == "triton" else f"backend='triton' is answered by {answers!r} here"
    except ValueError as error:
        reason = str(error)
    return {} if reason is None else {"aspo_kernels, triton": reason}


def every_way_of_ours(device: str, dtype: str, trainable: bool) -> tuple[list[Contender], dict[str, str]]:
    """Each backend, each candidate, each schedule that runs on this device; and why Triton does not."""
    schedules = {"stored": 2**62, "recompute": 0} if trainable else {"frozen": None}
    missing = _no_triton(device, dtype)
    ways = [("triton", c) for c in ("tile", "fused") if not missing] + [("torch", None)]
    return [
        ours(", ".join(filter(None, ("aspo_kernels", backend, way, schedule if trainable else ""))), schedule, budget,
             backend, way)
        for backend, way in ways
        for schedule, budget in schedules.items()
    ], missing  # fmt: skip


def _compiled(device: str) -> list[Contender]:
    if device == "cpu":
        raise ImportError("timed on GPUs only: on a CPU its compilation takes longer than all else together")
    import torch._dynamo

    # One function, many shapes: past the default limit of 8 it would run uncompiled without a word.
    torch._dynamo.config.recompile_limit = 64
    return [Contender("torch.compile'd eager", torch.compile(eager))]


def _trl(device: str) -> list[Contender]:
    torchvision_cpu.install()  # before transformers is imported
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def per_token(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, head, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )[0]

    return [Contender("TRL ChunkedLogProbFunction", per_token, schedule="TRL")]


def _torch_linear_cross_entropy(device: str) -> list[Contender]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")

    def per_token(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return -F.linear_cross_entropy(hidden, head, targets, reduction="none", options=options)

    return [Contender("torch linear_cross_entropy", per_token)]


def _liger_dpo(device: str) -> list[Contender]:
    torchvision_cpu.install()
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    compiled = device != "cpu"
    function = {ref: LigerFusedLinearDPOLoss(compiled=compiled, use_ref_model=ref) for ref in (False, True)}

    def loss(inputs: Inputs) -> Tensor:
        pair = (2, inputs.hidden.shape[0] // 2)
        rows = [inputs.head, inputs.hidden.view(*pair, -1), inputs.targets.view(*pair)]
        if inputs.ref_hidden is None:
            return function[False](*rows)[0]
        return function[True](*rows, ref_input=inputs.ref_hidden.view(*pair, -1), ref_weight=inputs.head.detach())[0]

    return [Contender("Liger FusedLinearDPOLoss (one pair, no per-token output)", loss=loss)]


def _liger_cross_entropy(device: str) -> list[Contender]:
    if device == "cpu":
        raise ImportError("its kernels need a GPU")
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return [
        Contender(
            "Liger fused_linear_cross_entropy, reduction none",
            lambda x, w, y: -liger_fused_linear_cross_entropy(x, w, y, reduction="none"),
        ),
        Contender(
            "Liger FusedLinearScaledCrossEntropy",
            lambda x, w, y: -LigerFusedLinearScaledCrossEntropyFunction.apply(x, w, y),
        ),
    ]


def _cut_cross_entropy(device: str) -> list[Contender]:
    from cut_cross_entropy import linear_cross_entropy

    if device == "cpu":
        raise ImportError("its kernels need a GPU")
    return [
        Contender(
            f"cut-cross-entropy{name}",
            lambda x, w, y, options=options: -linear_cross_entropy(x, w, y, reduction="none", **options),
        )
        for name, options in (("", {}), (", no gradient filter", {"filter_eps": None}))
    ]


def _quack(device: str) -> list[Contender]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

    if device == "cpu":
        raise ImportError("its kernels need a GPU")
    # Newer versions weigh tokens, with weights known before the forward; 0.6 sums them.
    weighted = "token_weights" in inspect.signature(chunked_linear_cross_entropy).parameters

    def loss(inputs: Inputs) -> Tensor:
        options = {"token_weights": -inputs.upstream} if weighted else {}
        loss = chunked_linear_cross_entropy(inputs.hidden, inputs.head, inputs.targets, reduction="sum", **options)
        if inputs.ref_hidden is not None:
            with torch.no_grad():
                chunked_linear_cross_entropy(inputs.ref_hidden, inputs.head, inputs.targets, reduction="sum")
        return loss

    def per_token(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy_func(hidden, head, None, targets, reduction="none")

    how = "weights known beforehand" if weighted else "a sum, no per-token output"
    return [
        Contender("quack linear_cross_entropy, full logits", per_token),
        Contender(f"quack chunked_linear_cross_entropy ({how})", loss=loss, weighted=weighted),
    ]


PEERS = {
    "torch.compile": _compiled,
    "trl": _trl,
    "torch linear_cross_entropy": _torch_linear_cross_entropy,
    "liger dpo": _liger_dpo,
    "liger cross entropy": _liger_cross_entropy,
    "cut-cross-entropy": _cut_cross_entropy,
    "quack": _quack,
}


@functools.cache
def _peers(device: str) -> tuple[list[Contender], dict[str, str]]:
    found, missing = [], {}
    for name, make in PEERS.items():
        try:
            found += make(device)
        except Exception as error:  # whatever a package's import dies of here, it is that peer's row and nothing else
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def load(
    trainable_head: bool = False, device: str | None = None, dtype: str = "bf16"
) -> tuple[list[Contender], dict[str, str]]:
    """All contenders that can run here, and for each that cannot the reason.

    device None: the CPU, and ours as a user gets it, `backend="auto"`; else every backend and candidate of ours.
    """
    if device is None:
        mine, missing = [ours("aspo_kernels", "stored" if trainable_head else "frozen")], {}
        if trainable_head:
            mine.append(ours("aspo_kernels, recompute", "recompute", budget=0))
    else:
        mine, missing = every_way_of_ours(device, dtype, trainable_head)
    peers, missing_peers = _peers(device or "cpu")
    return [Contender("eager PyTorch", eager, schedule="eager"), *mine, *peers], missing | missing_peers
