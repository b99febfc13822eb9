"""The loss head on a GPU against its peers: ceilings measured, every result checked against fp64, then timed.

python -m benchmarks.gpu                        all cases in 8 minutes; writes benchmarks/results/gpu.csv and gpu.json
python -m benchmarks.gpu --quick                two heads, N 2048 and 8192
python -m benchmarks.gpu --only 'Qwen2.5.*frozen'      cases whose name matches
python -m benchmarks.gpu --without 'Liger|quack'       contenders whose name matches are not run
python -m benchmarks.gpu --check                checks only, random and peaked logits
python -m benchmarks.gpu --tune                 sweep tile sizes and candidates of the Triton head
python -m benchmarks.gpu --sanitize             small odd shapes under compute-sanitizer
python -m benchmarks.gpu --device cpu --smoke   the same code at tiny sizes without a GPU, writes nothing: for CI

What cannot run is listed with its reason; the short table comes last. Exit status 1: a result of ours was wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import results, sanitize, tune
from benchmarks.cases import GPU_TOKENS, HEADS, Case, machine
from benchmarks.contenders import load
from benchmarks.roofline import Device
from benchmarks.suite import FIELDS, Bench, Group, Row, Work, measure
from benchmarks.timing import Clock, ceilings

POLICY = (Work(), Work(trainable=True))
WITH_REFERENCE = Work(reference=True)
Save = Callable[[], None]
LEAST_SECONDS = 5.0  # a case is not begun with less time left


def all_groups() -> list[Group]:
    """The cases, most important first."""
    groups = [
        Group(name, Case(tokens, *HEADS[name]), (*POLICY, WITH_REFERENCE))
        for tokens in sorted(GPU_TOKENS, key=lambda n: (8192, 2048, 32_768, 512).index(n))
        for name in HEADS
    ]
    groups += [Group(name, Case(2048, *HEADS[name], dtype="fp32"), POLICY) for name in ("LLaVA-1.5-7B", "Qwen2-VL-2B")]
    return groups + [Group(name, Case(2048, *HEADS[name], logits="peaked"), POLICY, timed=False) for name in HEADS]


def chosen_groups(args: argparse.Namespace) -> list[Group]:
    """What this run is to do."""
    if args.smoke:
        works = (*POLICY, WITH_REFERENCE)
        groups = [Group("smoke", Case(48, 40, 501, dtype, logits), works) for dtype, logits in
                  (("bf16", "random"), ("fp32", "peaked"))]  # fmt: skip
    else:
        groups = all_groups()
    if args.quick:
        groups = [g for g in groups if g.model in list(HEADS)[:2] and g.case.tokens in (2048, 8192)]
    if args.check:
        groups = [replace(g, timed=False) for g in groups]
    kept = [replace(g, works=tuple(w for w in g.works if re.search(args.only, g.label(w)))) for g in groups]
    return [g for g in kept if g.works]


def run(groups: list[Group], bench: Bench, deadline: float, rows: list[Row], left_out: list[str], save: Save) -> None:
    """Adds to rows what the time allows, to left_out the names of the rest, saving after each kind of work."""
    for at, group in enumerate(groups):
        todo, remaining = list(group.works), deadline - time.perf_counter()
        works_left = sum(len(g.works) for g in groups[at:])
        reason = "no time left"
        try:
            found = measure(group, bench, 0.4 * remaining / works_left)
            while todo and deadline - time.perf_counter() >= LEAST_SECONDS:
                new = next(found)
                todo.pop(0)
                rows += new
                for row in new:
                    print(_line(row), flush=True)
                save()
            del found
        except RuntimeError as error:
            if results.failure(error) != "out of memory":
                raise
            reason = "out of memory beside the contenders"
        left_out += [f"{group.label(work)}: {reason}" for work in todo]
        if bench.device == "cuda":
            torch.cuda.empty_cache()


def _line(row: Row) -> str:
    """One contender of one case."""
    what = " ".join(str(row[k]) for k in ("model", "tokens", "dtype", "logits", "head", "work"))
    if row["status"] != "ran":
        return f"{what}  {row['contender']}: {row['status']}"
    figures = [f"{row['median_ms']:.3f} ms" if "median_ms" in row else "not timed"]
    for field, unit in (("over_floor", "x floor"), ("over_predicted", "x predicted"), ("extra_mib", " MiB")):
        figures += [f"{row[field]}{unit}"] if field in row else []
    return f"{what}  {row['contender']}: {', '.join(figures)}  {row.get('check', '')}"


def summary(rows: list[Row]) -> str:
    """A line per case: the best of ours over the bare products and the prediction, and how much slower each peer is."""
    lines = [
        "case | floor ms | best of ours | ms | over floor | over predicted | MiB: ours, eager | peers' time over ours"
    ]
    cases: dict[str, list[Row]] = {}
    for row in rows:
        key = " ".join(str(row[k]) for k in ("model", "tokens", "dtype", "logits", "head", "work"))
        cases.setdefault(key, []).append(row)
    for key, members in cases.items():  # those that were only checked have no line
        timed = [r for r in members if "median_ms" in r and "over_floor" in r]
        mine = [r for r in timed if str(r["contender"]).startswith("aspo_kernels")]
        if not mine:
            continue
        best = min(mine, key=lambda r: float(str(r["median_ms"])))
        name = str(best["contender"]).removeprefix("aspo_kernels, ")
        eager = next((r for r in timed if r["contender"] == "eager PyTorch"), {})
        memory = f"{best['extra_mib']}, {eager.get('extra_mib', '-')}" if "extra_mib" in best else "-"
        peers = []
        for r in members:
            if "check" in r and not str(r["contender"]).startswith("aspo_kernels"):
                short = " ".join(str(r["contender"]).split()[:2]).rstrip(",")
                ran = "over_best_of_ours" in r
                peers.append(f"{short} {r['over_best_of_ours']}x" if ran else f"{short}: {str(r['status'])[:24]}")
        lines.append(f"{key} | {best['floor_ms']:.2f} | {name} | {best['median_ms']:.2f} | {best['over_floor']} | "
                     f"{best.get('over_predicted', '-')} | {memory} | {'; '.join(peers)}")  # fmt: skip
    return "\n".join(lines)


def measured_device(header: dict[str, str], found: dict[str, float]) -> Device:
    """The model's device with this machine's ceilings in place of the defaults."""
    return Device(header["device"], found["bf16_tflops"], found["fp32_tflops"], found["tb_s"],
                  int(header["l2_mib"]), int(header["multiprocessors"]))  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; what does not fit is listed")
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression on the cases' names")
    parser.add_argument("--without", metavar="PATTERN", help="regular expression on the contenders' names")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder for gpu.csv and gpu.json")
    parser.add_argument("--commit", help="recorded with the results where git cannot say")
    for option in ("quick", "check", "tune", "sanitize", "smoke"):
        parser.add_argument(f"--{option}", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --smoke tries the code at tiny sizes")
    if args.device == "cpu" and not args.smoke:
        parser.error("on a CPU only --smoke; the CPU's own suite is python -m benchmarks.head")
    return args


def main() -> None:
    started = time.perf_counter()
    args = parse()
    sys.stdout.reconfigure(line_buffering=True)  # what is known when a time limit ends the run
    if args.sanitize:
        sys.exit(sanitize.run())
    header, clock = machine(args.device), Clock(args.device)
    header |= {"commit": args.commit} if args.commit else {}
    ceiling = ceilings(args.device, clock, 256 if args.smoke else 8192)
    header |= {name: f"{value:.3g}" for name, value in ceiling.items()}
    print(", ".join(f"{k}: {v}" for k, v in header.items()))
    missing = load(device=args.device)[1]
    for name, reason in missing.items():
        print(f"cannot run here: {name}: {reason}")
    device = measured_device(header, ceiling) if args.device == "cuda" else None
    deadline = started + 60 * args.minutes
    if args.tune:
        print(tune.sweep(clock, deadline, re.compile(args.only)))
        return

    rows: list[Row] = []
    left_out: list[str] = []

    def save() -> None:
        if args.smoke or args.check:
            return
        results.write(args.out / "gpu.csv", header, rows, FIELDS)
        content = {"header": header, "missing": missing, "left_out": left_out, "rows": rows}
        results.write_json(args.out / "gpu.json", content)

    rounds = 3 if args.smoke else 5 if args.quick else 15
    names = {c.name for trainable in (False, True) for c in load(trainable, args.device)[0]}
    unwanted = {n: "--without" for n in sorted(names) if args.without and re.search(args.without, n)}
    bench = Bench(args.device, clock, device, rounds, slack=2.0 if args.smoke else 1.0, left_out=unwanted)
    try:
        run(chosen_groups(args), bench, deadline, rows, left_out, save)
    finally:  # also after an error that has broken the device
        save()
        print(f"\n{summary(rows)}")
        for name in left_out:
            print(f"left out: {name}")
    failed = [row for row in rows if str(row.get("check", "")).startswith("FAILED")]
    for row in failed:
        print(f"WRONG: {_line(row)}")
    print(f"{len(rows)} rows, {len(failed)} wrong, {time.perf_counter() - started:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
