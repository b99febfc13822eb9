"""Who makes the shards of an offline job: the processes that were started, or the actors of a Ray cluster."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aspo.shards import over_ray
from aspo.shards.processes import WAIT_MINUTES, Processes

SHARD_ROWS = 64


@dataclass(frozen=True)
class Engine:
    """Who makes shards of what size: the processes that were started, or the actors of a Ray cluster."""

    processes: Processes
    shard_rows: int = SHARD_ROWS
    ray: str | None = None
    ray_workers: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Engine:
        """What the options of `add_arguments` say."""
        for name in ("shard_rows", "ray_workers"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if args.ray is None and args.ray_workers is not None:
            raise ValueError("--ray-workers is read with --ray alone: give that too, or drop it")
        minutes = WAIT_MINUTES if args.wait_minutes is None else args.wait_minutes
        processes = Processes.current(minutes)
        if args.ray is not None and processes.size > 1:
            raise ValueError(f"--ray starts its own processes, but {processes.size} were started: start one")
        return cls(processes, args.shard_rows or SHARD_ROWS, args.ray, args.ray_workers)

    def spread(self, items: Sequence[int], load: Callable[[], over_ray.Work], progress: Callable[[int], None]) -> None:
        """Do every item's work, each in one process; comes back when this process's own (Ray: all) are done.

        progress: called with what the work reports; with Ray once an item.
        """
        if self.ray is not None and items:
            over_ray.spread(items, load, self.ray, self.ray_workers, progress)
            return
        if own := items[self.processes.rank :: self.processes.size]:
            work = load()
            for item in own:
                work(item, progress)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `Engine.of`; None where they are not given."""
    group = parser.add_argument_group(
        "many processes",
        "accelerate launch -m aspo ..., or torchrun -m aspo ...: each process makes its share of the shards, in a "
        "folder that all of them see",
    )
    add = group.add_argument
    add("--shard-rows", type=int, help=f"rows of a shard, whole batches: what a kill loses (default: {SHARD_ROWS})")
    add("--wait-minutes", type=float, help=f"for a process that does not answer (default: {WAIT_MINUTES})")
    add(
        "--ray",
        metavar="ADDRESS",
        help="map the shards over this Ray cluster instead; auto, or local = on this machine",
    )
    add("--ray-workers", type=int, help="actors at most (default: the cluster's GPUs, without any its CPUs)")


ARGUMENTS = ("shard_rows", "wait_minutes", "ray", "ray_workers")
