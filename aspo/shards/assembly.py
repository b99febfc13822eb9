"""A job's files out of its shards: rows.jsonl and what goes with it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aspo.atomic import write_atomic
from aspo.folder import ROWS_FILE, read_lines, row_name
from aspo.shards.files import read_shard

if TYPE_CHECKING:
    from aspo.shards.job import Job
    from aspo.shards.processes import Processes

SHARDS_FOLDER, ASSEMBLED_FILE = "shards", "assembled.json"
PATIENCE_SECONDS = 90.0  # in which a network file system shows what another machine has written


def is_done(job: Job, keys: Sequence[str]) -> bool:
    """Whether nothing is left to do. Raises ValueError where a new assembly would lose rows, or what others made of
    them."""
    noted = noted_of(job)
    if noted is not None and is_assembled(job, noted, keys):
        return True
    check_replaced(job, noted)
    return False


def noted_of(job: Job) -> dict[str, Any] | None:
    """What `assemble` noted last: keys, ids of the rows, and of each file [hash before, hash now]."""
    try:
        return json.loads((job.shards / ASSEMBLED_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{job.shards / ASSEMBLED_FILE} is no JSON ({error}): delete it and run again") from error


def is_assembled(job: Job, noted: Mapping[str, Any], keys: Sequence[str]) -> bool:
    """Whether the files of these very shards are there. A rows.jsonl that another command changed is left as it is."""
    if noted["keys"] != list(keys):
        return False
    if not job.replaces and _changed_rows(job, noted):
        return True
    own = ((file, now) for file, (_, now) in noted["files"].items() if file not in job.added)
    return all(_hash(job.folder / file) == now for file, now in own)


def check_replaced(job: Job, noted: Mapping[str, Any] | None) -> None:
    """Raises ValueError where a new assembly would lose rows, or what others made of them."""
    if job.replaces or noted is None:
        return
    if lost := set(noted["ids"]) - set(_ids(job)):
        raise ValueError(
            f"{job.folder} holds {len(lost)} rows that would be lost, e.g. {row_name({'id': min(lost)})}: use another "
            "--out, or give them too (--data, --limit)"
        )
    if _changed_rows(job, noted):
        raise ValueError(
            f"{job.folder / ROWS_FILE} was changed since it was made, which new rows would undo: use another --out"
        )


def _changed_rows(job: Job, noted: Mapping[str, Any]) -> bool:
    """Whether rows.jsonl is whole, and another one than was there before and after it was put together."""
    path = job.folder / ROWS_FILE
    if ROWS_FILE not in noted["files"] or _hash(path) in (None, *noted["files"][ROWS_FILE]):
        return False
    with path.open("rb") as file:
        return file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) > -1 and file.read() == b"\n"


def check_older(processes: Processes, folder: Path, name: str, file: str, ids: Sequence[str]) -> bool:
    """Whether an older version, which kept no shards, finished `file` for all rows. ValueError where for some only.

    The first process looks: all call this together, and get or raise the same.
    """
    return processes.once("", lambda: _is_of_older(folder, name, file, ids))


def _is_of_older(folder: Path, name: str, file: str, ids: Sequence[str]) -> bool:
    if (folder / SHARDS_FOLDER / name / ASSEMBLED_FILE).exists() or not (folder / file).exists():
        return False
    if set(ids) <= {line["id"] for line in read_lines(folder / file)}:
        return True
    raise ValueError(
        f"{folder / file} was begun by an older version, which kept no shards, and cannot be gone on with: use another "
        "--out, or delete the folder"
    )


def _ids(job: Job) -> list[str]:
    """Of the rows, without reading the rest of them where they are a data set."""
    rows: Any = job.rows
    return list(rows["id"]) if hasattr(rows, "column_names") else [str(row["id"]) for row in rows]


def _hash(path: Path) -> str | None:
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def assemble(job: Job, keys: Sequence[str]) -> None:
    """The folder's files out of the shards: each is replaced at once, rows.jsonl last; shards of other keys go.

    Raises ValueError where shards are missing.
    """
    _wait_for(job, keys)
    files = sorted({file for key in keys for file in read_shard(job.path(key), key)}, key=lambda f: (f == ROWS_FILE, f))
    before = {file: _hash(job.folder / file) for file in files}
    with ExitStack() as stack:
        ready = {}
        for file in files:
            ready[file] = job.folder / f"{file}.part"
            stack.callback(ready[file].unlink, missing_ok=True)
            write_atomic(ready[file], _lines(job, keys, file))
        after = {file: [before[file], _hash(ready[file])] for file in files}
        note = {"keys": list(keys), "ids": _ids(job), "files": after}
        for gone in set((noted_of(job) or {"files": ()})["files"]) - set(files):
            (job.folder / gone).unlink(missing_ok=True)
        write_atomic(job.shards / ASSEMBLED_FILE, [json.dumps(note).encode() + b"\n"])
        for file in files:
            os.replace(ready[file], job.folder / file)
    kept = {job.path(key).name for key in keys} | {ASSEMBLED_FILE}
    left = [path for file in files for path in job.folder.glob(f"{file}.*part")]
    for path in (*job.shards.iterdir(), *(job.folder / "images").glob("*.partial"), *left):
        if path.name not in kept:  # what a kill left behind, and shards of rows that have changed
            path.unlink()


def _wait_for(job: Job, keys: Sequence[str]) -> None:
    """Until all shards are seen."""
    end = time.monotonic() + PATIENCE_SECONDS
    while missing := [key for key in keys if not job.path(key).exists()]:
        if time.monotonic() > end:
            raise ValueError(
                f"{len(missing)} of {len(keys)} shards are not in {job.shards}: every process must write into the same "
                "folder, on a file system that all machines share; run the same command again to make them"
            )
        time.sleep(1)


def _lines(job: Job, keys: Sequence[str], file: str) -> Iterator[bytes]:
    """A file's lines, shard by shard."""
    seen = set()
    if file in job.added:
        for known in read_lines(job.folder / file):
            seen.add(known["key"])
            yield json.dumps(known).encode() + b"\n"
    for key in keys:
        for line in read_shard(job.path(key), key).get(file, ()):
            if file in job.added:
                name = json.loads(line)["key"]
                if name in seen:
                    continue
                seen.add(name)
            yield line
