"""One input under watch: how long it takes, how much memory it needs, and what it raises."""

from __future__ import annotations

import gc
import hashlib
import json
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent.parent / "fuzz_corpus"
SLOW_S = 10.0  # of processor time: nothing that is drawn is large
HANG_S = 120.0
MAX_GROWTH_MIB = 1024.0
MAX_MESSAGE = 4000  # characters of an error


class Hang(BaseException):
    """Not an Exception, so that nothing in between takes it for its own."""


@dataclass(frozen=True)
class Finding:
    """What went wrong with an input; `signature` is the same for what is likely the same defect."""

    signature: str
    value: Any
    trace: str


def run(check: Callable[[Any], None], value: Any) -> Finding | None:
    """Feed a value to a target's `check`; None where every property holds."""
    before, started = _peak_mib(), time.process_time()
    try:
        with _alarm(HANG_S):
            check(value)
    except (Exception, Hang, SystemExit) as error:
        return Finding(_signature(error), value, traceback.format_exc(limit=-6))
    seconds, grown = time.process_time() - started, _peak_mib() - before
    if seconds > SLOW_S:
        return Finding("slow", value, f"{seconds:.1f} s of processor time")
    if grown > MAX_GROWTH_MIB:
        gc.collect()
        return Finding("memory", value, f"{grown:.0f} MiB more than before")
    return None


@contextmanager
def refusal(*names: str) -> Iterator[None]:
    """A ValueError inside is a fine answer, if it says something, in one readable piece, with one of `names` in it."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if not text.strip() or len(text) > MAX_MESSAGE:
            raise AssertionError(f"an error of {len(text)} characters: {text[:200]!r}") from error
        if names and not any(name in text for name in names):
            raise AssertionError(f"the error names none of {names}: {text[:300]}") from error


def as_text(value: Any) -> str:
    """An input as the corpus keeps it: lone surrogates and NaN included."""
    return json.dumps(value, ensure_ascii=True, indent=1)


def keep(target: str, finding: Finding) -> Path:
    """Put an input into the regression corpus, under a name made of what went wrong and of its content."""
    text = as_text(finding.value)
    kind = "".join(c if c.isalnum() else "-" for c in finding.signature)[:48].strip("-").lower()
    path = CORPUS / target / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def kept(target: str) -> list[Path]:
    """The corpus of a target."""
    return sorted((CORPUS / target).glob("*.json"))


def read(path: Path) -> Any:
    """An input of the corpus."""
    return json.loads(path.read_text(encoding="utf-8"))


def _signature(error: BaseException) -> str:
    """The error's class and the innermost place in our own code."""
    own = [
        f for f in traceback.extract_tb(error.__traceback__) if "/aspo" in f.filename and "/tests/" not in f.filename
    ]
    where = f"{Path(own[-1].filename).stem}.{own[-1].name}" if own else "property"
    return f"{type(error).__name__} {where}" + ("" if own else f" {str(error)[:40]}")


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"still running after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
