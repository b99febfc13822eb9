"""A run's output folder: held by one run at a time, and with room for what the run will write."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import nn

from aspo.shards import Processes

LOCK_FILE = ".lock"
PATIENCE_SECONDS = 10.0  # in which the data loaders of a killed run, which hold its lock too, are gone
MIB = 2**20


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if absent. All processes call this together.

    The lock is the system's, on a file of the folder: it ends with the process, however that ends. A file system that
    knows no locks keeps nobody out. Raises ValueError in all processes where another run has the folder, or where they
    do not all see what the first one wrote into it; OSError where it cannot be written.
    """
    processes = Processes.current()
    handle = processes.once("", lambda: _lock(Path(folder)))
    try:
        processes.same(str(folder), lambda: _holder(Path(folder)))
        yield
    finally:
        if processes.main:
            os.close(handle)


def _lock(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            holder = _holder(folder)
            os.close(handle)
            raise ValueError(
                f"{folder} is in use by another run ({holder}): wait for it, or choose another --output_dir"
            ) from None
        except OSError:  # a file system without locks
            break
    with suppress(OSError):  # a full disk is told of by what the run itself writes
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        os.fsync(handle)  # the other machines' processes look for it
    return handle


def _holder(folder: Path) -> str:
    """Who holds a folder, as its lock file says."""
    path = folder / LOCK_FILE
    return (path.read_text(encoding="utf-8").strip() or "another process") if path.is_file() else f"no {LOCK_FILE}"


def check_room(folder: str | Path, model: nn.Module, optimizer: str) -> None:
    """Raise ValueError where one checkpoint of a model will surely not fit: its weights, and AdamW's two moments.

    A lower bound, cheap to know before the first step; parameters that are in shards already count as nothing.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    is_adapter = hasattr(model, "peft_config")
    weights = sum(p.nbytes for p in (trained if is_adapter else model.parameters()))
    needed = weights + (2 * sum(p.nbytes for p in trained) if optimizer in ("adamw_torch", "adamw_torch_fused") else 0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{folder} has {free / MIB:.1f} MiB free, and one checkpoint takes at least {needed / MIB:.1f} MiB: make "
            "room, or choose another --output_dir"
        )
