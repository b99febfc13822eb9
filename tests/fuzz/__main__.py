"""`python -m tests.fuzz --minutes 10 splitter`: feed a target until the time is over, and report what it broke on.

Inputs come from hypothesis; with `--engine atheris` (an optional package) libFuzzer steers hypothesis's choices by
the code that they reach. What fails is kept under tests/fuzz_corpus, the shortest input of each kind, and replayed by
tests/test_fuzz.py.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import hypothesis

import aspo  # noqa: F401  its torchvision hook
from tests.fuzz import guard

TARGETS = ("splitter", "rows", "layout", "config")
ROUND = 200  # examples drawn with one seed


class Watch:
    """Counts executions and keeps the shortest input of each kind of failure."""

    def __init__(self, check: Callable[[Any], None], deadline: float) -> None:
        self.check, self.deadline = check, deadline
        self.executions, self.findings = 0, {}  # type: int, dict[str, guard.Finding]

    def __call__(self, value: Any) -> None:
        if time.monotonic() > self.deadline:
            return
        self.executions += 1
        found = guard.run(self.check, value)
        if found is None:
            return
        known = self.findings.get(found.signature)
        if known is None:
            print(f"finding: {found.signature}\n{found.trace}\ninput: {guard.as_text(value)[:600]}", flush=True)
        if known is None or len(guard.as_text(value)) < len(guard.as_text(known.value)):
            self.findings[found.signature] = found


def fuzz(target: str, minutes: float, engine: str, seed: int) -> Watch:
    """Feed a target for some minutes."""
    module = _instrumented(target) if engine == "atheris" else importlib.import_module(f"tests.fuzz.{target}")
    watch = Watch(module.check, time.monotonic() + 60 * minutes)

    @hypothesis.settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(module.INPUTS)
    def feed(value: Any) -> None:
        watch(value)

    if engine == "atheris":
        _steered(feed.hypothesis.fuzz_one_input, watch, target, seed)
    numbers = random.Random(seed)
    while time.monotonic() < watch.deadline:
        hypothesis.seed(numbers.getrandbits(64))(feed)()
    return watch


def _instrumented(target: str) -> Any:
    """The target's module, imported so that libFuzzer sees which of our code an input reaches."""
    import atheris

    with atheris.instrument_imports(include=["aspo", "aspo_kernels", "sentencesplit"]):
        return importlib.import_module(f"tests.fuzz.{target}")


def _steered(feed: Callable[[bytes], Any], watch: Watch, target: str, seed: int) -> None:
    """libFuzzer never returns: it ends the process, and the report is printed by what it calls last."""
    import atheris

    def one(data: bytes) -> None:
        if time.monotonic() > watch.deadline:
            report(watch, target)
            shutil.rmtree(start, ignore_errors=True)
            os._exit(1 if watch.findings else 0)
        feed(data)

    start = Path(tempfile.mkdtemp(prefix="fuzz-start-"))  # long enough for hypothesis to draw whole inputs from
    for n in range(50):
        (start / str(n)).write_bytes(random.Random(n).randbytes(2048))
    flags = ["-max_len=8192", "-len_control=0", "-rss_limit_mb=0", "-timeout=600", "-verbosity=0"]
    atheris.Setup([sys.argv[0], str(start), f"-seed={seed + 1}", *flags], one)
    atheris.Fuzz()


def report(watch: Watch, target: str) -> None:
    """One line, and the findings into the corpus."""
    print(f"{target}: {watch.executions:,} executions, {len(watch.findings)} findings", flush=True)
    for found in watch.findings.values():
        print(f"  {found.signature}: {guard.keep(target, found)}", flush=True)


def main() -> int:
    """Exit status 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--engine", choices=("hypothesis", "atheris"), default="hypothesis")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: the time")
    args = parser.parse_args()
    print(f"{args.target}: {args.minutes:g} minutes of {args.engine}, seed {args.seed}", flush=True)
    watch = fuzz(args.target, args.minutes, args.engine, args.seed)
    report(watch, args.target)
    return 1 if watch.findings else 0


if __name__ == "__main__":
    sys.exit(main())
