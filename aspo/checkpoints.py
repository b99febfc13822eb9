"""Checkpoints on the disk: which ones are whole, how one is written so that a kill never costs the one before it.

Trainer writes a checkpoint's files in place, trainer_state.json last: that file says that the others are there. So it
is taken away before a folder is written again, and written once all else is on the disk; older checkpoints go when it
is on the disk too, the one with the fewest steps first (Trainer would go by the clock).
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from transformers import Trainer

from aspo.atomic import sync
from aspo.processes import lost_peer
from aspo.shards import Processes

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"
# What a checkpoint must hold, one of each, as it is written with and without sharding. A folder of torch's distributed
# checkpoints gets its `.metadata` last.
WEIGHTS = (
    *("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata", "latest"),
)
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata", "latest")  # "latest": DeepSpeed's last file
ZIPS = (
    *("scheduler.pt", "rng_state*.pth", "optimizer.pt", "optimizer.bin", "pytorch_model_fsdp.bin"),
    *("global_step*/*.pt", "training_args.bin"),
)
RNG = re.compile(r"rng_state_(\d+)\.pth")
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
MIB = 2**20

# ---- which ones are whole ----


def is_complete(checkpoint: str | Path) -> bool:
    """Whether training can go on from a checkpoint: all its files are there and none is cut short.

    trainer_state.json is written last; a zip (torch.save) ends with its directory, and a safetensors file's header
    says how long the file must be, so that a file cut short by a kill or a full disk is seen without reading it all.
    """
    folder = Path(checkpoint)
    match = CHECKPOINT.fullmatch(folder.name)
    try:
        read = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
        step = read[STATE]["global_step"]
        if match and step != int(match.group(1)):
            return False
        for weights in folder.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
        shards = set(read.get("model.safetensors.index.json", {"weight_map": {}})["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False
    has_all = all(any((folder / name).is_file() for name in names) for names in (WEIGHTS, OPTIMIZER))
    if not has_all or not all((folder / shard).is_file() for shard in shards):
        return False
    states = [path.name for path in folder.glob("rng_state*.pth")]
    ranks = sorted(int(match.group(1)) for match in map(RNG.fullmatch, states) if match)
    if not states or ranks != list(range(len(ranks))):
        return False
    return (folder / "scheduler.pt").is_file() and all(
        _is_whole_zip(path) for pattern in ZIPS for path in folder.glob(pattern)
    )


def _is_whole_zip(path: Path) -> bool:
    with path.open("rb") as file:  # its directory is at the end, and lost space on a disk reads as zeros
        return file.read(4) == b"PK\x03\x04" and zipfile.is_zipfile(file)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, by their steps."""
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=steps_of)


def steps_of(checkpoint: Path) -> int:
    """The steps in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def _name(checkpoint: Path | None) -> str:
    return "no complete checkpoint" if checkpoint is None else checkpoint.name


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the most steps in `output_dir`, or None."""
    return next((path for path in reversed(checkpoints(output_dir)) if is_complete(path)), None)


# ---- writing one ----


@contextmanager
def written(folder: Path, is_main: bool) -> Iterator[None]:
    """Around the writing of a checkpoint, or of the final model, into a folder, by all processes.

    Raises OSError in one line where the disk has no room or fails; what was written of a checkpoint is then deleted.
    """
    is_checkpoint = CHECKPOINT.fullmatch(folder.name) is not None
    if is_main:
        (folder / STATE).unlink(missing_ok=True)  # the folder's files, if any, are no checkpoint from here on
    try:
        yield
    except Exception as error:
        if (why := _disk_trouble(error)) is None:
            raise
        free = shutil.disk_usage(folder.parent).free / MIB
        if is_checkpoint and is_main:
            shutil.rmtree(folder, ignore_errors=True)
        before = last_checkpoint(folder.parent if is_checkpoint else folder)
        raise OSError(
            f"{folder} could not be written ({why}; {free:.1f} MiB are free there): "
            + (f"{before} is kept. " if before else "")
            + "Make room and run the same command again"
        ) from error
    if is_main and is_checkpoint:
        sync(folder)


def _disk_trouble(error: Exception) -> str | None:
    """In words, where an error is a disk's: safetensors, tokenizers and torch tell it in messages of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror if error.errno in DISK else None
    text = str(error)
    if found := next((words for words in map(os.strerror, sorted(DISK)) if words in text), None):
        return found
    of_torch = any(words in text for words in ("PytorchStreamWriter", "file write failed", "unexpected pos"))
    return "a file could not be written to its end" if of_torch else None


def rotate(output_dir: str | Path, newest: Path, limit: int | None, best: str | None = None) -> None:
    """Delete checkpoints with fewer steps than `newest`, which is whole, until `limit` are left with it; the damaged
    ones first. limit: None or 0 = all are kept. best: one that is kept whatever its steps."""
    if not limit:
        return
    older = [path for path in checkpoints(output_dir) if steps_of(path) < steps_of(newest)]
    kept = [path for path in older if best is not None and path.resolve() == Path(best).resolve()]
    older = [path for path in older if path not in kept]
    older.sort(key=lambda path: (is_complete(path), steps_of(path)))
    for path in older[: max(0, len(older) + len(kept) + 1 - limit)]:
        (path / STATE).unlink(missing_ok=True)  # first: half a folder must not count
        shutil.rmtree(path, ignore_errors=True)


# ---- reading one ----


@contextmanager
def being_read(checkpoint: str) -> Iterator[None]:
    """Around the reading of a checkpoint's files. Raises ValueError in one line where one of them is damaged."""
    try:
        yield
    except (RuntimeError, EOFError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or lost_peer(error):
            raise
        raise ValueError(
            f"{checkpoint} cannot be read ({_first_line(error)}): if it is damaged, delete it, and the same command "
            "goes on from the one before"
        ) from error


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# ---- inside Trainer ----


@contextmanager
def _not_in_shards(accelerator: Accelerator) -> Iterator[None]:
    """Trainer writes no model at all where FSDP's checkpoints are in shards."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    kind = getattr(plugin, "state_dict_type", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        if plugin is not None:
            plugin.state_dict_type = kind


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoints are whole once they count, and stay until a newer one is."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # Trainer deletes by the clock, unsynced
        try:
            with written(folder, self.args.should_save):
                super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate(folder.parent, folder, limit, self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        sync(Path(output_dir))  # what this process wrote is in it
        self.accelerator.wait_for_everyone()  # before trainer_state.json, which says that all is there

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with being_read(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with being_read(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, but what is no checkpoint is never in shards. A full disk is told in one line."""
        if _internal_call:
            super().save_model(output_dir, True)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        with written(folder, self.args.should_save), _not_in_shards(self.accelerator):
            super().save_model(output_dir)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, or nothing behind the run's last step: from a checkpoint of it that is not at the end of an epoch
        Trainer would go one step beyond. What ends a run (the best model is loaded) then still comes."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, which with a save_total_limit of 1 leaves the best checkpoint alone: not of a run that was stopped
        before its end, which goes on from the last one."""
        limit = self.args.save_total_limit
        if self.state.global_step < self.state.max_steps:
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's train; True goes on from the last *complete* checkpoint of output_dir, if all processes see it."""
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            found = Processes.current().same(folder, lambda: last_checkpoint(folder), _name)
            if found is None:
                raise ValueError(f"{self.args.output_dir} has no complete checkpoint to go on from")
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)
