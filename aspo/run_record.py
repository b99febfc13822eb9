"""run.json: what a training run was started with, and whether the same command may go on with it."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from aspo import trust
from aspo.checkpoints import CHECKPOINT, STATE, being_read, checkpoints, is_complete, last_checkpoint, steps_of
from aspo.config import AspoConfig
from aspo.folder import IMAGE_COLUMNS, image_bytes, image_path, in_memory
from aspo.model import resolve_model
from aspo.reference.settings import processor_settings, weights_sample
from aspo.resume import differences
from aspo.shards import Processes

# Options that may differ between a run and its continuation, by prefix: they change nothing in the weights.
FREE_ON_RESUME = (
    "output_dir",
    "train_data",  # whose rows are compared: "pairs_sha256" and "images_sha256"
    "image_root",
    "resume",
    "log",
    "report_to",
    "run_name",
    "project",
    "trackio",
    "disable_tqdm",
    "save_",
    "eval",
    "do_",
    "per_device_eval",
    "prediction_loss_only",
    "load_best",
    "metric_for_best",
    "greater_is_better",
    "include_",
    "skip_memory",
    "push_to_hub",
    "hub_",
    "dataloader_num",
    "dataloader_pin",
    "dataloader_persistent",
    "dataloader_prefetch",
    "local_rank",
    "ddp_",
    "fsdp",
    "deepspeed",
    "per_device_train",
    "gradient_accumulation",
    "torch_empty_cache",
)

IMAGE_END = 4096  # bytes at either end of an image's file by which a run knows it again


def record_path(config: AspoConfig) -> Path:
    """Where a run's record is."""
    return Path(str(config.output_dir)) / "run.json"


def run_record(config: AspoConfig, rows: Any) -> dict[str, Any]:
    """What run.json says of a run: its settings, its data, and what it ran on."""
    packages = ("aspo-kernels", "torch", "transformers", "peft", "accelerate", "datasets")
    return {
        "config": config.to_dict(),
        "model": resolve_model(config.model_name_or_path or ""),
        "dtype": config.weights_dtype(),
        "objective": config.objective().name,
        "objective_options": config.objective_options(),
        "pairs": len(rows),
        "pairs_sha256": fingerprint(rows),
        "images_sha256": images_fingerprint(rows),
        "step": pairs_per_step(config.to_dict(), config.world_size),
        "processes": config.world_size,
        "device": str(config.device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "started": now(),
        "finished": None,
    }


def pairs_per_step(config: Mapping[str, Any], processes: int) -> str:
    """What an optimiser step takes of the data's order: it must stay for a run to go on, however it is divided."""
    batches = config["gradient_accumulation_steps"] * processes
    if config.get("token_budget") is not None:
        return f"{batches} batches of {config['token_budget']} tokens"
    pairs = f"{batches * config['per_device_train_batch_size']} pairs"
    if config.get("dataloader_drop_last"):  # how many an epoch drops hangs on the round
        return f"{pairs}, {processes * config['per_device_train_batch_size']} at once"
    return pairs


def fingerprint(rows: Any) -> str:
    """A hash of everything in preference rows but their images."""
    digest = hashlib.sha256()
    for name in sorted(set(rows.column_names) - {"image", *IMAGE_COLUMNS}):
        if name != "scene":
            digest.update(json.dumps([name, list(rows[name])], default=str).encode())
    return digest.hexdigest()


def images_fingerprint(rows: Any) -> str:
    """A hash of the images in preference rows: of files their names, sizes and ends, of others their bytes.

    Files are not read through, which takes minutes for a large set: in folders that `aspo` made a name is a hash of the
    content, and encoders write a checksum, or bits that all before them have shifted, at a file's end. Folders and
    times are left out, for rows may be moved or copied before a run goes on.
    """
    digest = hashlib.sha256()
    columns = [name for name in IMAGE_COLUMNS if name in rows.column_names]
    for row in rows.select_columns(columns) if columns else ():
        digest.update(json.dumps([[name, [_image_name(entry) for entry in row[name]]] for name in columns]).encode())
    return digest.hexdigest()


def _image_name(entry: Any) -> list[Any]:
    if in_memory(entry):
        return [hashlib.sha256(image_bytes(entry)).hexdigest()]
    path = image_path(entry, None)
    with path.open("rb") as file:
        ends = file.read(IMAGE_END)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - IMAGE_END))
        ends += file.read()
    return [path.name, size, hashlib.sha256(ends).hexdigest()]


def now() -> str:
    """The time, for the record."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read_record(path: Path) -> dict[str, Any] | None:
    """An earlier run's record, or None."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"config", "finished", "started"} <= record.keys():
        raise ValueError(f"{path} is no record of `aspo train`: choose another --output_dir")
    return record


def is_finished(config: AspoConfig, record: Mapping[str, Any]) -> bool:
    """Whether output_dir holds this very run, finished. Raises ValueError as `earlier_run` does."""
    before, _ = earlier_run(config, record)
    return before is not None and bool(before["finished"]) and not _is_named(config)


def earlier_run(config: AspoConfig, record: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """The record in output_dir, and the checkpoint to go on from; None where there is none. All processes call this.

    Raises ValueError where output_dir holds a run of other settings, where checkpoints would mix with others, and where
    processes see different records or checkpoints.
    """
    return Processes.current().same(str(config.output_dir), lambda: _earlier_run(config, record), _what_is_there)


def _what_is_there(found: tuple[dict[str, Any] | None, str | None]) -> str:
    """In words, which differ where records or checkpoints do."""
    before, checkpoint = found
    run = "no run.json" if before is None else f"a run of {before['started']}" + ", finished" * bool(before["finished"])
    if checkpoint is None:
        return f"{run}, no checkpoint"
    state = hashlib.sha256((Path(checkpoint) / STATE).read_bytes()).hexdigest()
    return f"{run}, {Path(checkpoint).name} (whose {STATE} is {state[:8]})"


def _earlier_run(config: AspoConfig, record: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    folder, before = Path(str(config.output_dir)), _read_record(record_path(config))
    if _is_named(config):
        return before, _named(Path(str(config.resume_from_checkpoint)), folder)
    found = last_checkpoint(folder)
    if before is None or not (found or before["finished"]):  # nothing to go on from, nothing to lose
        if found:
            raise ValueError(f"{folder} holds checkpoints of something else (no run.json); choose another --output_dir")
        return before, None
    keys = ("model", "dtype", "objective", "pairs_sha256", "images_sha256", "step")
    # older runs were of one process, and did not note their images
    before = {"step": pairs_per_step(before["config"], 1), "images_sha256": record["images_sha256"], **before}
    changed = differences(before["config"], record["config"], FREE_ON_RESUME)
    changed += differences({key: before[key] for key in keys}, {key: record[key] for key in keys}, ())
    if changed:
        raise ValueError(
            f"{folder} holds a run of other settings ({'; '.join(changed)}): choose another --output_dir, delete it, "
            "or name the checkpoint to start from with --resume_from_checkpoint. On another number of processes an "
            "optimiser step must take as much: per_device_train_batch_size x gradient_accumulation_steps x processes"
        )
    if found is not None:
        _check_content(found, folder)
    return before, None if found is None else str(found)


def _is_named(config: AspoConfig) -> bool:
    return config.resume_from_checkpoint not in (None, "auto")


def _named(chosen: Path, folder: Path) -> str:
    """The checkpoint that was named, if training can go on from it into this folder."""
    if not is_complete(chosen):
        raise ValueError(f"resume_from_checkpoint: {chosen} is no complete checkpoint")
    later = [path for path in checkpoints(folder) if CHECKPOINT.fullmatch(chosen.name) and is_complete(path)]
    if later and steps_of(later[-1]) > steps_of(chosen):
        raise ValueError(
            f"{folder} holds {later[-1].name}, which is later than {chosen}: leave --resume_from_checkpoint out to go "
            "on from it, or choose another --output_dir"
        )
    _check_content(chosen, folder)
    return str(chosen)


def _check_content(checkpoint: Path, folder: Path) -> None:
    with being_read(str(checkpoint)):
        trust.refuse_code(checkpoint, folder)


def start_settings(model: nn.Module, processor: Any) -> dict[str, str | None]:
    """What a run starts from, as it was read: hashes by the name that `check_start` calls them."""
    return {**processor_settings(model, processor), "model weights": weights_sample(model)}


def check_start(config: AspoConfig, before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raises ValueError where a run would go on with another model or processor than it began with.

    Settings that another version of transformers writes down otherwise are compared within one version.
    """
    if _is_named(config):
        return
    old, new = before.get("start", {}), record["start"]  # older runs did not note it
    one_version = before["versions"]["transformers"] == record["versions"]["transformers"]
    names = [name for name in old if one_version or name in ("tokenizer", "chat template", "model weights")]
    if changed := [name for name in names if None not in (old[name], new[name]) and old[name] != new[name]]:
        raise ValueError(
            f"{config.output_dir} holds a run that began with another model or processor ({', '.join(changed)} "
            f"changed in {config.model_name_or_path}): put the old one back, or choose another --output_dir"
        )
