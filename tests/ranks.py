"""Processes that run one function side by side in a gloo group: what the tests of more than one process share.

Forked (`forked`), and kept: a group takes a second to meet, a call milliseconds.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import forked
import torch
import torch.distributed as dist

COLLECTIVE_SECONDS = 30  # after which a process that waits for the others in vain raises
CALL_SECONDS = 60  # after which the parent gives up on a call


class Ranks:
    """`size` processes in one group; `run` calls a function of a test module in all of them."""

    def __init__(self, size: int, seconds: int = CALL_SECONDS):
        self.size, self.seconds = size, seconds
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self.folder: tempfile.TemporaryDirectory[str] | None = None  # where they meet

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What function(*args, **kwargs) returned in each process, by rank. An exception or a hang in one fails it."""
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((function, args, kwargs)))
            answers = []
            for rank, pipe in enumerate(self._pipes):
                if not pipe.poll(self.seconds):
                    raise TimeoutError(f"rank {rank} did not answer within {self.seconds} s")
                answers.append(pickle.loads(pipe.recv_bytes()))
            failures = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text]
            if failures:
                raise RuntimeError("\n".join(failures))
        except BaseException:
            self.close()  # the group may be out of step: the next call starts another
            raise
        return [result for _, result in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        if self.folder is not None:
            self.folder.cleanup()

    def _start(self) -> None:
        context = forked.context()
        self.folder = tempfile.TemporaryDirectory()
        meeting_point = os.path.join(self.folder.name, "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.size, meeting_point, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)


def _work(rank: int, size: int, meeting_point: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{meeting_point}", rank=rank, world_size=size, timeout=timedelta(seconds=COLLECTIVE_SECONDS)
    )
    while True:
        try:
            function, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over
            return
        try:
            answer = (None, function(*args, **kwargs))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send_bytes(pickle.dumps(answer))
