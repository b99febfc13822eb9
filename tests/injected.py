"""Faults that tests put into a process: each is called with the process's rank before its command runs."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def die(losses: Any = None) -> None:
    """As the system's out-of-memory killer, or an operator, ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop(losses: Any) -> Any:
    """The process goes on to exist, and answers nobody."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return losses


def kill_children(losses: Any) -> Any:
    """As the system's out-of-memory killer ends the processes that load data."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    return losses


def ask_to_stop(losses: Any) -> Any:
    """As a launcher or a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)
    return losses


def spoil(losses: Any) -> Any:
    """No numbers."""
    return losses * float("nan")


class AtStep:
    """In these ranks, act on the losses within a step (counted from 1). An object: it is sent to other processes."""

    def __init__(self, step: int, ranks: tuple[int, ...], act: Callable[[Any], Any]) -> None:
        self.step, self.ranks, self.act = step, ranks, act

    def __call__(self, rank: int) -> None:
        from aspo.trainer import AspoTrainer

        pair_losses = AspoTrainer.pair_losses

        def faulty(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            given, result = pair_losses(trainer, *args, **kwargs)
            if rank in self.ranks and trainer.model.training and trainer.state.global_step == self.step - 1:
                result = dataclasses.replace(result, losses=self.act(result.losses))
            return given, result

        AspoTrainer.pair_losses = faulty  # type: ignore[method-assign]


class AtWrite:
    """Kills the first process at a file of a folder: before it is begun, or when half of it is there.

    Files are seen as they are written by torch.save, safetensors and open() (of which not half can be had). `list_to`:
    instead of killing, note each file and whether half of it can be had.
    """

    def __init__(self, folder: str, name: str = "", half: bool = False, list_to: Path | None = None) -> None:
        self.folder, self.name, self.half, self.list_to = folder, name, half, list_to

    def __call__(self, rank: int) -> None:
        import safetensors.torch

        save, serialize = torch.save, safetensors.torch.serialize_file

        def saving(value: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, str | Path):  # a stream
                return save(value, file, *args, **kwargs)
            with self.write(Path(file)):
                return save(value, file, *args, **kwargs)

        def serializing(tensors: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
            with self.write(Path(file)):
                return serialize(tensors, file, *args, **kwargs)

        def opening(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(args[0], str) and isinstance(args[1], str) and "w" in args[1]:
                self.begin(Path(args[0]), False)

        if rank == 0:
            torch.save, safetensors.torch.serialize_file = saving, serializing
            sys.addaudithook(opening)

    @contextmanager
    def write(self, path: Path) -> Iterator[None]:
        self.begin(path, True)
        yield
        if self.half and self.is_it(path):
            os.truncate(path, path.stat().st_size // 2)
            die()

    def begin(self, path: Path, has_half: bool) -> None:
        if self.list_to is not None and path.parent.name == self.folder:
            with self.list_to.open("a") as file:
                file.write(f"{path.name} {int(has_half)}\n")
        if not self.half and self.is_it(path):
            die()

    def is_it(self, path: Path) -> bool:
        return path.parent.name == self.folder and path.name == self.name


def at_deletion(rank: int) -> None:
    """Kills a process when one file of a folder that it deletes is gone, and one that nobody would miss."""

    def begin(folder: Any, *_: Any, **__: Any) -> None:
        (Path(folder) / "README.md").unlink()
        die()

    shutil.rmtree = begin  # type: ignore[assignment]


@contextmanager
def small_disk(place: Path, mib: int) -> Iterator[Path]:
    """A file system of so many MiB; skips the test where mounting one is not permitted."""
    import pytest

    place.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", str(place)], capture_output=True
        ).returncode
    ):
        pytest.skip("a file system of a set size cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill_disk(place: Path, leave_kib: int) -> Path:
    """Write a file that leaves so much room; returns it."""
    path = place / "full"
    with path.open("wb", buffering=0) as file:
        room = shutil.disk_usage(place).free - leave_kib * 1024
        try:
            while room > 0:
                room -= file.write(bytes(min(room, 1 << 20)))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return path


@contextmanager
def read_only(place: Path) -> Iterator[None]:
    """While entered, the file system at `place` cannot be written to."""
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)


class Fill:
    """Losses pass; meanwhile somebody fills the disk but for some room."""

    def __init__(self, place: Path, leave_kib: int) -> None:
        self.place, self.leave_kib = place, leave_kib

    def __call__(self, losses: Any) -> Any:
        fill_disk(self.place, self.leave_kib)
        return losses


def at_second_shard(rank: int) -> None:
    """Kills the second process when its second shard is made, and not yet written."""
    from aspo.shards import job

    write, begun = job.write_shard, []

    def writing(*args: Any) -> None:
        begun.append(args)
        if rank == 1 and len(begun) == 2:
            die()
        write(*args)

    job.write_shard = writing
