"""The loss head against its peers on this machine: checked against fp64, then timed in interleaved rounds.

python -m benchmarks.head                      N 2048, H 1024, V 32,000 on the CPU, writes benchmarks/results/head.csv
python -m benchmarks.head --smoke              tiny sizes, writes nothing: for CI
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from aspo_kernels import reference
from benchmarks import memory
from benchmarks.cases import Case, machine
from benchmarks.contenders import Contender, load

RESULTS = Path(__file__).parent / "results" / "head.csv"
FIELDS = ("contender", "dtype", "logits", "head", "tokens", "hidden", "vocabulary", "median_ms", "eager_over_this",
          "gemm_over_this", "extra_mib", "margin_error_nats", "hidden_grad_error", "head_grad_error")  # fmt: skip


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bare_gemms(hidden: Tensor, head: Tensor) -> Callable[[], None]:
    """The head's products alone, in the inputs' dtype, a slice of the vocabulary at a time: 2u, or 3u if trainable."""
    x, w, trainable = hidden.detach(), head.detach(), head.requires_grad

    def run() -> None:
        for part in range(0, w.shape[0], 2000):
            z = x @ w[part : part + 2000].T
            z @ w[part : part + 2000]
            if trainable:
                z.T @ x

    return run


def accuracy(contender: Contender, case: Case, truth: tuple[Tensor, list[Tensor]]) -> dict[str, float | None]:
    """Error of a pair's margin (chosen half minus rejected half), in nats, and relative errors of the gradients."""
    hidden, head, targets, upstream = case.inputs()
    logps, grads = truth
    half = case.tokens // 2
    names = ["hidden_grad_error", "head_grad_error"]
    result: dict[str, float | None] = dict.fromkeys(["margin_error_nats", *names])
    if contender.per_token is None:
        return result
    with torch.no_grad():
        got = contender.per_token(hidden.detach(), head.detach(), targets).double()
    result["margin_error_nats"] = abs(float((got - logps)[:half].sum() - (got - logps)[half:].sum()))
    for name, grad, true_grad in zip(names, contender.step(hidden, head, targets, upstream), grads, strict=False):
        result[name] = float((grad.double() - true_grad).norm() / true_grad.norm())
    return result


def truth_of(case: Case) -> tuple[Tensor, list[Tensor]]:
    """fp64 log-probabilities and gradients from full logits, 256 tokens at a time."""
    hidden, head, targets, upstream = case.inputs()
    wide = head.detach().double().requires_grad_(case.trainable_head)
    logps, rows = [], []
    for x, y, g in zip(hidden.detach().split(256), targets.split(256), upstream.split(256), strict=True):
        x = x.double().requires_grad_()
        out = reference.linear_logps(x, wide, y)
        out.backward(g.double())
        logps.append(out.detach())
        rows.append(x.grad)
    return torch.cat(logps), [torch.cat(rows)] + ([wide.grad] if case.trainable_head else [])


def compare(case: Case, rounds: int, with_memory: bool) -> list[dict[str, object]]:
    """One row per contender: accuracy, then medians over interleaved rounds, then memory in fresh processes."""
    contenders, missing = load(case.trainable_head)
    for name, reason in missing.items():
        print(f"  cannot run here: {name}: {reason}")
    truth = truth_of(case)
    errors = {c.name: accuracy(c, case, truth) for c in contenders}
    del truth
    inputs = case.inputs()
    runs = {c.name: (lambda c=c: c.step(*inputs)) for c in contenders} | {"bare GEMMs": bare_gemms(*inputs[:2])}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs:
        runs[name]()
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name in runs:
        same = {"dtype": case.dtype, "logits": case.logits, "head": "trainable" if case.trainable_head else "frozen"}
        size = {k: asdict(case)[k] for k in ("tokens", "hidden", "vocabulary")}
        measured = {
            "median_ms": round(1e3 * median[name], 1),
            "eager_over_this": round(median["eager PyTorch"] / median[name], 2),
            "gemm_over_this": round(median["bare GEMMs"] / median[name], 2),
        }
        if with_memory and name in errors and case.logits == "random":
            measured["extra_mib"] = memory.measure(name, case)
        digits = {k: v if v is None else float(f"{v:.2g}") for k, v in errors.get(name, {}).items()}
        rows.append({"contender": name, **same, **size, **measured, **digits})
        print(f"  {name:58s} {measured['median_ms']:9.1f} ms   {measured['eager_over_this']:5.2f}x eager   "
              f"{measured.get('extra_mib', float('nan')):7.1f} MiB   {digits}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one round, no file")
    args = parser.parse_args()
    size = (64, 32, 501) if args.smoke else (args.tokens, args.hidden, args.vocabulary)
    header = machine()
    print(", ".join(f"{k}: {v}" for k, v in header.items()))
    rows: list[dict[str, object]] = []
    for case in cases(*size):
        print(case)
        rows += compare(case, 1 if args.smoke else args.rounds, with_memory=not args.smoke)
    if not args.smoke:
        write(args.out, header, rows)


def cases(tokens: int, hidden: int, vocabulary: int) -> list[Case]:
    """Frozen and trainable head, bf16 and fp32, random and peaked logits."""
    return [
        Case(tokens, hidden, vocabulary, dtype, logits, trainable)
        for trainable in (False, True)
        for dtype in ("bf16", "fp32")
        for logits in ("random", "peaked")
    ]


def write(out: Path, header: dict[str, str], rows: list[dict[str, object]]) -> None:
    """The rows as CSV under comment lines that say what they were measured on."""
    out.parent.mkdir(exist_ok=True)
    with out.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
