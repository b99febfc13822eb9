"""`--ray`: the shards of an offline job mapped over a Ray cluster by Ray Data.

Every actor loads what the work needs once, and writes each shard that it is given into the folder, which all machines
must see under the same path. Ray starts, places and restarts the actors; what the shards are does not depend on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from aspo.lazy import Lazy

MISSING = '--ray needs the package ray, which is not installed: pip install "aspo-kernels[ray]", or leave --ray out'
Work = Callable[[int, Callable[[int], None]], None]  # (number of a shard, progress in rows)


def spread(
    items: Sequence[int],
    load: Callable[[], Work],
    address: str,
    workers: int | None,
    progress: Callable[[int], None],
) -> None:
    """Do every item's work on the cluster at `address` ("local": one on this machine, for this command alone).

    load: gives the work in an actor, and must be something that cloudpickle can send. progress: called with 1 for each
    item that is done. Raises ValueError where the cluster lacks what was asked for, and with what an actor raised.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ValueError(MISSING) from error
    begun = not ray.is_initialized()
    if begun:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    try:
        has = ray.cluster_resources()
        gpus = int(has.get("GPU", 0))
        most = gpus or int(has.get("CPU", 1))
        if workers is not None and workers > most:
            raise ValueError(f"--ray-workers is {workers}, but the cluster has {most} {'GPUs' if gpus else 'CPUs'}")
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = 0
        rows = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
        done = rows.map_batches(
            _Actor,
            fn_constructor_args=(load, os.getcwd()),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(len(items), workers or most)),
            num_gpus=1 if gpus else None,
        )
        for row in done.iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            progress(1)
    except ray.exceptions.RayError as error:  # an actor or a machine died, and Ray gave up
        raise ConnectionError(f"Ray: {error}; what is done is kept: run the same command again") from error
    finally:
        if begun:
            ray.shutdown()


class _Actor:
    """One process of the cluster. Errors come back as texts: Ray would wrap them in pages of its own."""

    def __init__(self, load: Callable[[], Work], folder: str) -> None:
        os.chdir(folder)  # where paths of the command line start
        self.load = Lazy(load)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        errors = []
        for item in batch["item"].tolist():
            try:
                self.load()(item, lambda _: None)
                errors.append("")
            except Exception as error:
                errors.append(str(error) or type(error).__name__)
        return {"item": batch["item"], "error": errors}
