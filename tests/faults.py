"""What the fault tests share: real commands in processes of their own, faults put into them, and a table.

A command is `aspo.cli.main(argv)` in a process that is forked from one that has imported it (importing takes seconds, a
fork milliseconds); several processes meet as torchrun's do. A fault is a function that runs in each of them first.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import torch
from safetensors.torch import load_file

KILLED = -signal.SIGKILL
SECONDS = 300  # after which a command counts as hanging
Fault = Callable[[int], None]  # called with the process's rank before its command


# ---- what happens, for docs/reliability.md ----


def fault(what: str, *, sees: str, kept: str, goes_on: str) -> Callable[[Any], Any]:
    """Mark a test with its line of the table. sees: the line on stderr, <...> for what varies; `said` checks it."""

    def mark(test: Any) -> Any:
        test.story = {"fault": what, "sees": sees, "kept": kept, "goes on": goes_on}
        return test

    return mark


def said(test: Any, stderr: str) -> None:
    """The command's last line is what the test's `sees` has, and there is no traceback."""
    pattern = re.sub(r"<[^<>]*>", ".*?", re.escape(test.story["sees"]).replace(r"\ ", " "))
    lines = [line for line in re.split(r"[\r\n]", stderr) if line.strip()]
    assert "Traceback" not in stderr, stderr
    assert lines and re.fullmatch(pattern, lines[-1].strip()), f"not its last line {test.story['sees']!r}: {stderr}"


# ---- commands ----


class Command:
    """`aspo` with these arguments in `size` processes, which run already."""

    def __init__(self, argv: list[Any], folder: Path, size: int = 1, fault: Fault | None = None, **environment: str):
        context = forked.context()
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.iterdir()))
        self.printed = [folder / f"{number}-{rank}.txt" for rank in range(size)]
        for path in self.printed:  # a process may be killed before it has opened its own
            path.touch()
        self.port = forked.Port()
        self.processes: list[Any] = []
        atexit.register(self.kill)  # a test that failed may have left one; multiprocessing would wait for it for ever
        for rank in range(size):
            own = forked.launched(rank, size, self.port.number) if size > 1 else {}
            args = ([str(a) for a in argv], self.printed[rank], {**own, **environment}, fault, rank)
            process = context.Process(target=_run, args=args)
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = SECONDS) -> tuple[list[int | None], list[str]]:
        """(exit status of each process, what each printed), when all have ended."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        self.kill()
        self.port.close()
        assert not hanging, [path.read_text() for path in self.printed]
        return [process.exitcode for process in self.processes], [path.read_text() for path in self.printed]

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """A signal to all that still run."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signum)

    def until(self, there: Callable[[], Any]) -> None:
        """Wait until something is there, which the running command makes."""
        end = time.monotonic() + SECONDS
        while not there():
            alive = any(process.is_alive() for process in self.processes)
            assert alive and time.monotonic() < end, [path.read_text() for path in self.printed]
            time.sleep(0.01)


def _run(argv: list[str], printed: Path, environment: dict[str, str], fault: Fault | None, rank: int) -> None:
    """One process: what a launcher sets, then the fault, then the command."""
    from aspo import cli

    os.environ |= {"OMP_NUM_THREADS": "1", **environment}
    torch.set_num_threads(1)
    os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # figures; what is told of a fault must be on stderr
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    if fault is not None:
        fault(rank)
    status = cli.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(argv: list[Any], folder: Path, size: int = 1, fault: Fault | None = None, **environment: str) -> Any:
    """`Command(...).wait()`; of one process its status and text alone."""
    statuses, texts = Command(argv, folder, size, fault, **environment).wait()
    return (statuses, texts) if size > 1 else (statuses[0], texts[0])


# ---- training runs ----

STEPS, SAVE_EVERY, PAIRS = 8, 4, 6  # PAIRS of an optimiser step, however many processes share it


class Place:
    """A model, rows, and runs over them that nothing disturbed, each made once."""

    def __init__(self, folder: Path) -> None:
        from tiny import tiny_llava, tiny_rows

        from aspo.data import write_rows

        self.folder, self.model, self.rows = folder, folder / "model", folder / "rows"
        tiny_llava(self.model)
        write_rows(self.rows, tiny_rows(16))
        self._whole: dict[Any, Path] = {}

    def training(self, output: Path, *more: Any, size: int = 1) -> list[Any]:
        """16 pairs: 3 steps an epoch, the last one of 4 pairs; checkpoints at steps 4 and 8."""
        return [
            *("train", "--model_name_or_path", self.model, "--train_data", self.rows, "--output_dir", output),
            *("--per_device_train_batch_size", PAIRS // size, "--max_steps", STEPS, "--learning_rate", 1e-3),
            *("--save_steps", SAVE_EVERY, "--logging_steps", 1, "--use_cpu", "--report_to", "none"),
            *("--disable_tqdm", "true", *more),
        ]

    def whole(self, size: int = 1, *more: Any) -> Path:
        """The output of an undisturbed run."""
        if (size, more) not in self._whole:
            output = self._whole[size, more] = self.folder / f"whole-{len(self._whole)}"
            self.ends(self.training(output, *more, size=size), size)
        return self._whole[size, more]

    def ends(self, argv: list[Any], size: int = 1, **environment: str) -> str:
        """Run to the end; what the first process says."""
        statuses, texts = Command(argv, self.folder / "printed", size, **environment).wait()
        assert statuses == [0] * size, texts
        return texts[0]

    def goes_on(self, argv: list[Any], size: int = 1, like: Path | None = None, within: float = 0.0) -> str:
        """The same command again ends with the weights of the undisturbed run (of as many processes)."""
        text = self.ends(argv, size)
        assert_same(like or self.whole(size), Path(argv[argv.index("--output_dir") + 1]), within)
        return text


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (output / name).is_file():
            return load_file(output / name)
    raise AssertionError(f"{output} holds no final weights")


def assert_same(one: Path, other: Path, within: float = 0.0) -> None:
    """Two runs ended with the same weights: bit for bit, or within what other sums round."""
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) if not within else (a[name] - b[name]).abs().max() <= within, name


def kept(output: Path) -> list[str]:
    """The complete checkpoints of a run, by name."""
    from aspo.checkpoints import checkpoints, is_complete

    return [path.name for path in checkpoints(output) if is_complete(path)]


def losses(output: Path) -> list[float]:
    """Of every step that is logged."""
    return [entry["loss"] for entry in json.loads((output / "log_history.json").read_text()) if "loss" in entry]
