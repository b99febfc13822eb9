"""Processes of the tests: forked from one that has imported torch and aspo, told where to meet, and ended."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any

import psutil

# One list for all: a test process has one fork server, which imports what is named before the first fork and no more.
PRELOAD = ["aspo", "torch.distributed.tensor", "aspo.train", "aspo.reference.command", "pytest"]


def context() -> Any:
    """multiprocessing, by a fork server that has imported PRELOAD: that takes seconds, a fork milliseconds."""
    forking = get_context("forkserver")
    forking.set_forkserver_preload(PRELOAD)
    return forking


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher on this machine sets for a process."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}


class Port:
    """A port where processes can meet, which the system gives to nobody else until it is closed.

    Bound and not listened on, with SO_REUSEADDR: torch's store and launchers set that too, and so may listen there.
    """

    def __init__(self) -> None:
        self._bound = socket.socket()
        self._bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._bound.bind(("", 0))
        self.number = int(self._bound.getsockname()[1])

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bound.close()


@contextlib.contextmanager
def ended(*launchers: subprocess.Popen[Any]) -> Iterator[None]:
    """On leaving, launchers that still run are killed, and what they started: it is in sessions of its own."""
    try:
        yield
    finally:
        for launcher in (launcher for launcher in launchers if launcher.poll() is None):
            workers = psutil.Process(launcher.pid).children(recursive=True)
            launcher.kill()  # first, or it would start others in their place
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
            launcher.wait()
