"""The loss head against its peers on this machine: checked against fp64, then timed in interleaved rounds.

python -m benchmarks.head                      N 2048, H 1024, V 32,000 on the CPU, writes benchmarks/results/head.csv
python -m benchmarks.head --smoke              tiny sizes, writes nothing: for CI
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from benchmarks import memory, oracle, results
from benchmarks.cases import Case, machine
from benchmarks.contenders import Contender, load
from benchmarks.oracle import Answer, Sample
from benchmarks.timing import Clock, interleaved

RESULTS = results.FOLDER / "head.csv"
FIELDS = ("contender", "dtype", "logits", "head", "tokens", "hidden", "vocabulary", "median_ms", "eager_over_this",
          "gemm_over_this", "extra_mib", "margin_error_nats", "hidden_grad_error", "head_grad_error")  # fmt: skip


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


def accuracy(contender: Contender, case: Case, truth: Answer) -> dict[str, float | None]:
    """Error of a pair's margin (chosen half minus rejected half), in nats, and relative errors of the gradients."""
    names = ("margin_error_nats", "hidden_grad_error", "head_grad_error")
    result: dict[str, float | None] = dict.fromkeys(names)
    if contender.per_token is None:
        return result
    inputs = case.inputs()
    found = oracle.errors(Answer(contender.logps(inputs), *contender.step(inputs)), truth)
    return result | {name: found[name] for name in names if name in found}


def truth_of(case: Case) -> Answer:
    """fp64 log-probabilities and gradients from full logits, a chunk of tokens at a time."""
    inputs = case.inputs()
    return oracle.answer(inputs, Sample.of(inputs))


def compare(case: Case, rounds: int, with_memory: bool) -> list[dict[str, object]]:
    """One row per contender: accuracy, then medians over interleaved rounds, then memory in fresh processes."""
    contenders, _ = load(case.trainable_head)
    truth = truth_of(case)
    errors = {c.name: accuracy(c, case, truth) for c in contenders}
    del truth
    inputs = case.inputs()
    runs = {c.name: (lambda c=c: c.step(inputs)) for c in contenders} | {"bare GEMMs": bare_gemms(*inputs[:2])}
    times = interleaved(runs, Clock("cpu"), rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name in runs:
        same = {"dtype": case.dtype, "logits": case.logits, "head": "trainable" if case.trainable_head else "frozen"}
        size = {k: asdict(case)[k] for k in ("tokens", "hidden", "vocabulary")}
        measured = {
            "median_ms": round(median[name], 1),
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
    for name, reason in load()[1].items():
        print(f"cannot run here: {name}: {reason}")
    rows: list[dict[str, object]] = []
    for case in cases(*size):
        print(case)
        rows += compare(case, 1 if args.smoke else args.rounds, with_memory=not args.smoke)
    if not args.smoke:
        results.write(args.out, header, rows, FIELDS)
        print(f"wrote {args.out}")


def cases(tokens: int, hidden: int, vocabulary: int) -> list[Case]:
    """Frozen and trainable head, bf16 and fp32, random and peaked logits."""
    return [
        Case(tokens, hidden, vocabulary, dtype, logits, trainable)
        for trainable in (False, True)
        for dtype in ("bf16", "fp32")
        for logits in ("random", "peaked")
    ]


if __name__ == "__main__":
    main()
