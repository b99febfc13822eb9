"""Running a job: its shards over the processes, then its files out of the shards."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aspo.atomic import write_atomic
from aspo.progress import progress_bar
from aspo.shards.assembly import SHARDS_FOLDER, assemble, is_done
from aspo.shards.engine import Engine
from aspo.shards.files import Damaged, Parts, check_images, read_shard, rows_digest, shard_key, write_shard
from aspo.shards.over_ray import Work
from aspo.shards.processes import Processes

Row = Mapping[str, Any]
Make = Callable[[Sequence[Row], int], Parts]

# That all processes see it shows that they have one folder; it goes when the files are put together.
BEGUN_FILE = "begun"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Work over rows, batch by batch, whose lines go into the files of a folder.

    name: of its shards' folder. settings: what decides the lines besides the rows, as JSON. load: called once in each
    process that has something to make; gives `make`, which gets a batch and the place of its first row in the data, and
    must give the same lines whatever it was called with before. begin: called once, when the first has loaded, before
    anything is written. added: files that keep the lines they have, by their "key". replaces: the files may be there
    already, whoever wrote them.
    """

    folder: Path
    name: str
    rows: Sequence[Row]
    settings: Mapping[str, Any]
    load: Callable[[], Make]
    batch_size: int
    title: str = "working"
    begin: Callable[[], None] = lambda: None
    added: Sequence[str] = ()
    replaces: bool = False

    @property
    def shards(self) -> Path:
        """Where its shards are."""
        return self.folder / SHARDS_FOLDER / self.name

    def path(self, key: str) -> Path:
        """Of a shard."""
        return self.shards / f"{key}.jsonl"

    def write(self, start: int, end: int, key: str, make: Make, progress: Callable[[int], None]) -> None:
        """Make a shard, batch by batch, and write it. progress: called with numbers of rows.

        Raises ValueError where its rows, images or settings are not those that the key, which another process may have
        worked out, was made of.
        """
        parts: dict[str, list[str]] = {}
        for at in range(start, end, self.batch_size):
            batch = [dict(self.rows[i]) for i in range(at, min(at + self.batch_size, end))]
            for file, lines in make(batch, at).items():
                parts.setdefault(file, []).extend(lines)
            progress(len(batch))
        if shard_key(_rows(self, (start, end)), start, self.settings, self.folder) != key:
            raise ValueError(
                f"rows {start} to {end - 1} of the data, their images or the settings are not what they were when the "
                f"job in {self.folder} began, or are others on this machine: every machine must read the same data and "
                "models, which must not change meanwhile; run the same command again"
            )
        write_shard(self.path(key), key, parts)


def run_job(job: Job, engine: Engine) -> int:
    """Make what is missing of a job's shards, and the folder's files of all of them; returns how many were made.

    All processes call this together and come back together. Shards are cut by their size alone, so that their lines are
    the same for any number of processes. Raises ValueError where the folder holds rows that would be lost, or where the
    processes have different rows or settings.
    """
    processes = engine.processes
    if processes.size > 1:
        digests = processes.gather(rows_digest(job.rows, job.settings))
        if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise ValueError(
                f"process {others[0]} has other rows or settings than process 0: every machine must read the same data "
                "and models, with the same options"
            )
    size = max(1, engine.shard_rows // job.batch_size) * job.batch_size
    cuts = [(start, min(start + size, len(job.rows))) for start in range(0, len(job.rows), size)]
    keys = processes.share(len(cuts), lambda i: shard_key(_rows(job, cuts[i]), cuts[i][0], job.settings, job.folder))
    if processes.once("", lambda: is_done(job, keys)):  # one look for all: who leaves alone keeps the others waiting
        return 0
    there = processes.share(len(cuts), lambda i: _is_there(job, keys[i], cuts[i]))
    missing = [i for i, found in enumerate(there) if not found]
    _spread(job, engine, cuts, keys, missing)
    processes.gather(None)
    processes.once("it puts the shards together", lambda: assemble(job, keys))
    return len(missing)


def _spread(job: Job, engine: Engine, cuts: Sequence[tuple[int, int]], keys: Sequence[str], missing: list[int]) -> None:
    processes = engine.processes

    def work_of(make: Make) -> Work:
        return lambda i, progress: job.write(*cuts[i], keys[i], make, progress)

    bar = progress_bar()
    bar.disable = not processes.main
    own = missing if engine.ray else missing[processes.rank :: processes.size]
    of = "" if processes.size == 1 else f", process 0 of {processes.size}"
    with bar:
        if engine.ray:
            processes.once("", job.begin)
            task = bar.add_task(f"{job.title}, shards", total=len(missing))
            engine.spread(missing, lambda: work_of(job.load()), lambda n: bar.advance(task, n))
            return
        work = work_of(job.load()) if own else None
        processes.once("", job.begin)
        _check_folder(job, processes)
        rows = sum(cuts[i][1] - cuts[i][0] for i in own)
        before = sum(end - start for start, end in cuts) - rows if processes.size == 1 else 0
        task = bar.add_task(job.title + of, total=before + rows, completed=before)
        if work is not None:
            engine.spread(missing, lambda: work, lambda n: bar.advance(task, n))


def _check_folder(job: Job, processes: Processes) -> None:
    """Raises ValueError, before there is work to lose, where the processes would not write into one folder."""
    if processes.size > 1:
        path = job.shards / BEGUN_FILE
        processes.once("", lambda: write_atomic(path, [secrets.token_hex(4).encode()]))
        processes.same(str(job.shards), lambda: path.read_text() if path.exists() else "nothing")


def _rows(job: Job, cut: tuple[int, int]) -> list[Row]:
    return [job.rows[i] for i in range(*cut)]


def _is_there(job: Job, key: str, cut: tuple[int, int]) -> bool:
    """Whether a shard is there and whole. One that is damaged is deleted, with a line that says so."""
    path = job.path(key)
    try:
        check_images(read_shard(path, key), _rows(job, cut), job.folder)
    except FileNotFoundError:
        return False
    except Damaged as error:
        logger.warning("%s: its rows are made again", error)
        path.unlink()
        return False
    return True
