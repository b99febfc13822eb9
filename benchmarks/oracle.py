"""The truth to compare with, in fp64; and what plain torch makes of the same operands, whose error is the yardstick.

Of the gradients only some rows are compared where the sizes are large: whole fp64 gradients would not fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Inputs

CHUNK_ENTRIES = 2**27  # logits held at a time, 1 GiB in fp64


@dataclass(frozen=True)
class Sample:
    """Tokens (n,) whose gradient rows, and vocabulary entries (v,) whose head gradient rows, are compared."""

    tokens: Tensor
    entries: Tensor

    @staticmethod
    def of(inputs: Inputs, most: int | None = None) -> Sample:
        """All of them; or about `most` of each, the first and the last among them, and the sampled tokens' targets."""
        (size, _), vocabulary, device = inputs.hidden.shape, inputs.head.shape[0], inputs.hidden.device
        if most is None:
            return Sample(torch.arange(size, device=device), torch.arange(vocabulary, device=device))
        tokens, entries = (
            torch.linspace(0, n - 1, min(n, most), dtype=torch.float64, device=device).long()
            for n in (size, vocabulary)
        )
        return Sample(tokens.unique(), torch.cat([entries, inputs.targets[tokens]]).unique())


@dataclass(frozen=True)
class Answer:
    """Log-probabilities (N,) and the sampled rows of the gradients; None where there is none."""

    logps: Tensor | None
    hidden_grad: Tensor | None = None  # (n, H)
    head_grad: Tensor | None = None  # (v, H)


def answer(inputs: Inputs, sample: Sample, how: str = "fp64") -> Answer:
    """Log-probabilities, and their gradients against `upstream`, from full logits, a chunk of tokens at a time.

    how: "fp64", the truth; "eager", as `(x @ W.T).float().log_softmax(-1)` and its backward round in the inputs' dtype;
    "fp32 logits", the inputs' products kept in fp32 (log-probabilities only).
    """
    x, w = inputs.hidden.detach(), inputs.head.detach()
    if how == "fp64":
        x, w = x.double(), w.double()
    y, g = inputs.targets, inputs.upstream
    logps = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    d_entries = torch.empty(x.shape[0], sample.entries.numel(), dtype=x.dtype, device=x.device)
    d_rows = []
    step = max(1, CHUNK_ENTRIES // w.shape[0])
    for at in range(0, x.shape[0], step):
        chunk = slice(at, at + step)
        z = _wide_product(x[chunk], w) if how == "fp32 logits" else x[chunk] @ w.T
        z = z.log_softmax(-1) if how == "fp64" else z.float().log_softmax(-1)
        logps[chunk] = z.gather(1, y[chunk, None])[:, 0]
        if how == "fp32 logits":
            continue
        d = z.exp_().neg_()
        d.scatter_add_(1, y[chunk, None], torch.ones_like(d[:, :1]))
        d = d.mul_(g[chunk, None]).to(x.dtype)
        d_entries[chunk] = d[:, sample.entries]
        inside = sample.tokens[(sample.tokens >= at) & (sample.tokens < at + step)] - at
        d_rows.append(d[inside] @ w)
    if how == "fp32 logits":
        return Answer(logps)
    return Answer(logps, torch.cat(d_rows).double(), (d_entries.T @ x).double())


def _wide_product(x: Tensor, w: Tensor) -> Tensor:
    """x @ w.T in fp32, from whatever the operands are."""
    if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return x.float() @ w.float().T


def errors(got: Answer, truth: Answer) -> dict[str, float]:
    """Log-probabilities (root mean square) and a pair's margin (first half - second) in nats; gradients, relative."""
    result = {}
    if got.logps is not None and truth.logps is not None:
        off = got.logps.double() - truth.logps
        half = off.numel() // 2
        result["logps_error_nats"] = float(off.square().mean().sqrt())
        result["margin_error_nats"] = abs(float(off[:half].sum() - off[half:].sum()))
    for name in ("hidden_grad", "head_grad"):
        mine, true = getattr(got, name), getattr(truth, name)
        if mine is not None and true is not None:
            result[f"{name}_error"] = float((mine.double() - true).norm() / true.norm())
    return result


def limits(tokens: int, eager: dict[str, float], fp32_logits: dict[str, float], slack: float = 1.0) -> dict[str, float]:
    """What ours may be off by: twice fp32 logits' error, 1.5 times eager's, 1e-3 nats at 2,000 tokens a side.

    slack: for sizes so small that a ratio of two errors says little.
    """
    return {
        "logps_error_nats": slack * max(2 * fp32_logits["logps_error_nats"], 1e-6),
        "margin_error_nats": slack * 1e-3 * max(1.0, tokens / 4000),
        **{name: slack * 1.5 * eager[name] for name in ("hidden_grad_error", "head_grad_error") if name in eager},
    }


def verdict(found: dict[str, float], allowed: dict[str, float]) -> str:
    """ "ok", or what is over its limit (NaN always is)."""
    over = [
        f"{name} {value:.2g} > {allowed[name]:.2g}"
        for name, value in found.items()
        if math.isnan(value) or value > allowed[name]
    ]
    return "; ".join(over) or "ok"
