"""`python tests/fault_sweep.py` (`make nightly`): every kill point, every damaged file, every fill of a disk.

The tests take samples of these. Here a run is killed before and within each file of a checkpoint, in each step, and at
random moments from outside; each file of a checkpoint is damaged in each way; the disk has room for each part of a
checkpoint. After each the same command runs again, and must end with the weights (offline: the bytes) of a run that
nothing disturbed. A line a group is printed; exit status 1 where one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)

import pytest
from faults import STEPS, Command, Place, assert_same, kept
from injected import AtStep, AtWrite, Fill, die, small_disk

from aspo.resume import write_json

Case = tuple[str, Callable[[], None]]  # a name, and what fails with an error
DROPOUT = ("--lora_dropout", 0.2, "--disable_dropout", "false")
LAYOUTS: dict[str, tuple[int, tuple[Any, ...], dict[str, str]]] = {
    "LoRA": (1, (), {}),
    "full fine-tuning": (1, ("--no_use_lora",), {}),
    "LoRA with dropout, 2 processes": (2, DROPOUT, {}),
    "FSDP2, sharded, 2 processes": (
        2,
        ("--plugins", Path(__file__).parent / "fsdp_on_cpu.py"),
        {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        },
    ),
}


class Sweep:
    """A place, and runs of one layout in it."""

    def __init__(self, place: Place, layout: str) -> None:
        self.place, self.layout = place, layout
        self.size, self.more, self.environment = LAYOUTS[layout]
        self.folder = place.folder / layout.replace(" ", "-").replace(",", "")
        self.numbers = itertools.count()
        self.whole = self.folder / "whole"
        self.ends(self.whole)

    def argv(self, output: Path, *more: Any) -> list[Any]:
        return self.place.training(output, *self.more, *more, size=self.size)

    def start(self, output: Path, fault: Any = None, *more: Any) -> Command:
        return Command(self.argv(output, *more), self.folder / "p", self.size, fault, **self.environment)

    def ends(self, output: Path, *more: Any) -> None:
        statuses, texts = self.start(output, None, *more).wait()
        assert statuses == [0] * self.size, texts

    def out(self) -> Path:
        return self.folder / f"out-{next(self.numbers)}"

    def goes_on(self, output: Path, *more: Any) -> None:
        self.ends(output, *more)
        assert_same(self.whole, output)
        shutil.rmtree(output)

    # ---- groups of cases ----

    def kills_in_a_checkpoint(self) -> Iterator[Case]:
        """Before each file of the second checkpoint, and when half of it is there."""
        listed = self.folder / "files"
        self.start(self.out(), AtWrite("checkpoint-8", list_to=listed)).wait()
        for line in dict.fromkeys(listed.read_text().splitlines()):
            name, has_half = line.split()
            for half in (False, True) if has_half == "1" else (False,):
                yield f"{name}{', half' * half}", lambda name=name, half=half: self.killed_in(name, half)  # type: ignore[misc]

    def killed_in(self, name: str, half: bool) -> None:
        output, only_one = self.out(), ("--save_total_limit", 1)
        statuses, _ = self.start(output, AtWrite("checkpoint-8", name, half), *only_one).wait()
        assert statuses[0] == -9 and kept(output) == ["checkpoint-4"], (statuses, kept(output))
        self.goes_on(output, *only_one)

    def kills_in_steps(self) -> Iterator[Case]:
        """One process (each in turn) in each step."""
        for step in range(1, STEPS + 1):
            yield f"step {step}", lambda step=step: self.killed_at(step)  # type: ignore[misc]

    def killed_at(self, step: int) -> None:
        output = self.out()
        statuses, _ = self.start(output, AtStep(step, (step % self.size,), die)).wait()
        assert statuses[step % self.size] == -9
        self.goes_on(output)

    def kills_at_any_moment(self, count: int) -> Iterator[Case]:
        """All processes from outside, once or twice, at moments drawn over the length of a run."""
        start = time.monotonic()
        self.ends(self.out())
        seconds = time.monotonic() - start
        draw = random.Random(0)
        for n in range(count):
            moments = [draw.uniform(0, seconds) for _ in range(1 + n % 2)]
            yield f"after {moments}", lambda moments=moments: self.killed_after(moments)  # type: ignore[misc]

    def killed_after(self, moments: list[float]) -> None:
        output = self.out()
        for seconds in moments:
            command = self.start(output)
            time.sleep(seconds)
            command.kill()
            command.wait()
        self.goes_on(output)

    def damaged_files(self) -> Iterator[Case]:
        """Each file of the last checkpoint: gone, empty, half of it, all but its last byte, its beginning zeros."""
        files = sorted(p.relative_to(self.whole) for p in (self.whole / "checkpoint-8").rglob("*") if p.is_file())
        for file, how in itertools.product(files, ("gone", "empty", "half", "a byte less", "zeros")):
            yield f"{file} {how}", lambda file=file, how=how: self.damaged(file, how)  # type: ignore[misc]

    def damaged(self, file: Path, how: str) -> None:
        output = self.out()
        shutil.copytree(self.whole, output)
        for path in output.glob("*.safetensors"):
            path.unlink()
        write_json(output / "run.json", {**json.loads((output / "run.json").read_text()), "finished": None})
        path, content = output / file, (output / file).read_bytes()
        path.unlink()
        damages = {"empty": b"", "half": content[: len(content) // 2], "a byte less": content[:-1]}
        damages["zeros"] = bytes(min(64, len(content))) + content[64:]
        if how in damages:
            path.write_bytes(damages[how])
        statuses, texts = self.start(output).wait()
        if statuses != [0] * self.size:  # named, and deleted as the line says
            assert all("cannot be read" in text and "Traceback" not in text for text in texts), texts
            shutil.rmtree(output / "checkpoint-8")
            self.ends(output)
        assert_same(self.whole, output)
        shutil.rmtree(output)

    def full_disks(self) -> Iterator[Case]:
        """Room for so many KiB from the last step on."""
        for leave_kib in range(0, 800, 40):
            yield f"{leave_kib} KiB", lambda leave_kib=leave_kib: self.full(leave_kib)  # type: ignore[misc]

    def full(self, leave_kib: int) -> None:
        with small_disk(self.folder / f"disk-{leave_kib}", 16) as disk:
            statuses, texts = self.start(disk / "out", AtStep(STEPS, (0,), Fill(disk, leave_kib))).wait()
            assert set(statuses) <= {0, 2} and not any("Traceback" in text for text in texts), texts
            if statuses[0]:
                assert "No space left" in texts[0] or "could not be written" in texts[0], texts
                assert kept(disk / "out")[0] == "checkpoint-4"
            (disk / "full").unlink()
            self.ends(disk / "out")
            assert_same(self.whole, disk / "out")


def offline(place: Place, argv: list[Any], count: int) -> Iterator[Case]:
    """An offline job on two processes, killed from outside at moments drawn over its length; then one goes on."""

    def bytes_of(out: Path) -> dict[str, bytes]:
        return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.jsonl"))}

    whole, numbers = place.folder / f"whole-{argv[0]}", itertools.count()
    start = time.monotonic()
    place.ends([*argv, "--out", whole], 2)
    seconds = time.monotonic() - start

    def killed(moment: float) -> None:
        out = place.folder / f"{argv[0]}-{next(numbers)}"
        command = Command([*argv, "--out", out], place.folder / "p", 2)
        time.sleep(moment)
        command.kill()
        command.wait()
        place.ends([*argv, "--out", out])
        assert bytes_of(out) == bytes_of(whole)

    draw = random.Random(1)
    for _ in range(count):
        moment = draw.uniform(0, seconds)
        yield f"after {moment}", lambda moment=moment: killed(moment)  # type: ignore[misc]


def run_group(title: str, cases: Iterator[Case]) -> int:
    """Run all; print a line, and the failures. Returns how many failed."""
    start, failed, number = time.monotonic(), [], 0
    for name, case in cases:
        number += 1
        try:
            case()
        except pytest.skip.Exception as skipped:
            print(f"{title}: skipped ({skipped})", flush=True)
            return 0
        except Exception as error:
            failed.append(f"  {name}: {type(error).__name__}: {str(error)[:2000]}")
    seconds = time.monotonic() - start
    print(f"{title}: {number} times, {number - len(failed)} ended as undisturbed ({seconds:.0f} s)", flush=True)
    print(*failed, sep="\n", end="\n" * bool(failed), flush=True)
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=24, help="kills at random moments, for each layout")
    parser.add_argument("--only", default="", help="groups whose title has this, e.g. 'FSDP2' or 'damaged'")
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        place = Place(Path(folder) / "sweep")
        for layout in LAYOUTS:
            groups = {
                "killed in a checkpoint": Sweep.kills_in_a_checkpoint,
                "killed in a step": Sweep.kills_in_steps,
                "killed at any moment": functools.partial(Sweep.kills_at_any_moment, count=args.moments),
                "a damaged file": Sweep.damaged_files,
                "a full disk": Sweep.full_disks,
            }
            chosen = {f"{layout}: {name}": cases for name, cases in groups.items() if args.only in f"{layout}: {name}"}
            sweep = Sweep(place, layout) if chosen else None
            failed += sum(run_group(title, cases(sweep)) for title, cases in chosen.items())
        jobs = (
            ["rewards", "--method", "changes", "--batch-size", 2],
            ["score", "--scorer", "world", "--batch-size", 2],
        )
        for argv in jobs:
            title = f"aspo {argv[0]}, 2 processes: killed at any moment, 1 goes on"
            if args.only in title:
                cases = offline(place, [*argv, "--shard-rows", 2, "--data", place.rows], args.moments)
                failed += run_group(title, cases)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
