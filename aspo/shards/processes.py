"""The processes of an offline job, as `accelerate launch`, torchrun or SLURM (through torchrun) started them."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from aspo.processes import lost_peer

T = TypeVar("T")
WAIT_MINUTES = 1440
"""How long one process waits for another. One that dies closes its connections, which the others see at once: this ends
the wait for one that hangs, or whose machine is gone, and must be longer than the longest work of one process."""
SAME_SECONDS = 90  # in which a network file system shows what another machine has written
_groups: dict[float, Any] = {}  # minutes -> a gloo group of all processes: their words are few, and no accelerator's


@dataclass(frozen=True)
class Processes:
    """rank: of this process, of `size`. device: its own. group: of torch.distributed; None where it is alone."""

    rank: int
    size: int
    device: torch.device
    group: Any = None

    @classmethod
    def current(cls, wait_minutes: float = WAIT_MINUTES) -> Processes:
        """Those that run now; all of them must call this together."""
        if not 0 < wait_minutes < float("inf"):
            raise ValueError(f"--wait-minutes is {wait_minutes}; it must be above 0")
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
        if state.num_processes == 1:
            return cls(0, 1, state.device)
        if wait_minutes not in _groups:
            _groups[wait_minutes] = dist.new_group(backend="gloo", timeout=timedelta(minutes=wait_minutes))
        return cls(state.process_index, state.num_processes, state.device, _groups[wait_minutes])

    @property
    def main(self) -> bool:
        """Whether this is the process that puts things together and speaks."""
        return self.rank == 0

    def device_for(self, asked: str | None) -> str | torch.device | None:
        """The device of a --device: one of several processes takes its own where only a kind, or nothing, is named."""
        return self.device if self.size > 1 and asked in (None, self.device.type) else asked

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank. None goes on before all are here.

        Raises ConnectionError where one has died, or hangs.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:  # gloo's, of a closed connection or of the time being over
            raise ConnectionError(lost_peer(error) or str(error)) from error
        return values

    def share(self, count: int, function: Callable[[int], T]) -> list[T]:
        """[function(0), ..., function(count - 1)] in every process; each works out every size-th of them."""
        own = [function(i) for i in range(self.rank, count, self.size)]
        by_rank = self.gather(own)
        return [by_rank[i % self.size][i // self.size] for i in range(count)]

    def once(self, what: str, function: Callable[[], T]) -> T:
        """What the first process's call of a function gives, in every process; the others wait, and say for what.

        An error is raised in all of them. what: for that line; "" for what takes no time.
        """
        if self.size == 1:
            return function()
        result, error = None, None
        if self.main:
            try:
                result = function()
            except Exception as caught:
                error = caught
        elif what:
            print(f"process {self.rank} of {self.size} waits for process 0: {what}", file=sys.stderr, flush=True)
        told = (result, _plain(error)) if self.main else None
        outcome: Sequence[Any] = self.gather(told)
        if error is not None:
            raise error
        if outcome[0][1] is not None:
            raise outcome[0][1]
        return outcome[0][0]

    def same(self, what: str, look: Callable[[], T], words: Callable[[T], str] = str) -> T:
        """What a look at a file or folder gives, which must be the same, in `words`, for every process.

        Each looks again for SAME_SECONDS. Raises ValueError in all of them where they still see different things,
        naming who sees what; bad input and files that all see raise what `look` does.
        """
        if self.size == 1:
            return look()
        for again in range(SAME_SECONDS, -1, -1):  # counted, not timed: all must look as often
            value, error = None, None
            try:
                value = look()
                saw = words(value)
            except (ValueError, OSError) as caught:
                error, saw = caught, f"{type(caught).__name__}: {caught}"
            by_rank = self.gather((socket.gethostname(), saw))
            if len({seen for _, seen in by_rank}) == 1:
                if error is not None:
                    raise error
                return value  # type: ignore[return-value]
            if self.main and again == SAME_SECONDS:
                print(f"waiting until all processes see the same in {what}", file=sys.stderr, flush=True)
            time.sleep(min(again, 1))
        who = {one: [str(rank) for rank, other in enumerate(by_rank) if other == one] for one in by_rank}
        views = [f"process {', '.join(ranks)} on {host} sees {seen}" for (host, seen), ranks in who.items()]
        raise ValueError(
            f"the processes see different things in {what}: {'; '.join(views)}. All machines must see one folder under "
            "this path: put it on a file system that they share"
        )


def _plain(error: Exception | None) -> Exception | None:
    """An error that can be sent: bad input and files keep their class, which decides how a command ends."""
    if error is None or type(error) in (ValueError, FileNotFoundError):
        return error
    return OSError(str(error)) if isinstance(error, OSError) else RuntimeError(f"{type(error).__name__}: {error}")
