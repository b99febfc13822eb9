"""What makes a run restartable: Ctrl-C after a full step, and the same settings (`aspo.checkpoints` has the files)."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aspo.atomic import write_atomic


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON so that a reader, or a kill, never sees half a file."""
    write_atomic(Path(path), [json.dumps(value, indent=1, default=str).encode() + b"\n"])


def nan_to_null(value: Any, default: Callable[[Any], Any] | None = None) -> Any:
    """A value as JSON has it, with None for NaN and infinities, which it has no form for. default: as json.dumps'."""
    return json.loads(json.dumps(value, default=default), parse_constant=lambda _: None)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: tuple[str, ...]) -> list[str]:
    """Settings that differ, as "name: old -> new", but for names that begin with one of `free`.

    Two spellings of a file's or folder's path do not differ.
    """
    old, new = json.loads(json.dumps(dict(old), default=str)), json.loads(json.dumps(dict(new), default=str))
    names = [name for name in {**old, **new} if not name.startswith(free)]
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if not _same(old.get(name), new.get(name))]


def _same(old: Any, new: Any) -> bool:
    if old == new or not (isinstance(old, str) and isinstance(new, str)):
        return old == new
    try:
        return os.path.samefile(old, new)
    except (OSError, ValueError):  # at least one is no path, or of what is no longer there
        return False


def check_settings(
    path: Path,
    settings: Mapping[str, Any],
    maker: str,
    there: str | None,
    *,
    free: tuple[str, ...] = (),
    later: tuple[str, ...] = (),
    before_all: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings that the run which began a folder noted in `path`, {} without one.

    Args:
        maker: the command, for the message.
        there: what the folder holds already ("rows"), None for nothing: then it may lack settings.
        free: beginnings of names that may differ. later: names that may be given where they were not.
        before_all: what settings were that older files do not name.

    Raises ValueError where settings differ, cannot be read, or are missing though there are results.
    """
    if not path.exists():
        if there is not None:
            raise ValueError(f"{path.parent} already holds {there} that `{maker}` did not make; use another --out")
        return {}
    try:
        noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; use another --out") from error
    before = {**(before_all or {}), **noted}
    before |= {name: settings[name] for name in later if not before.get(name)}
    if changed := differences(before, settings, free):
        raise ValueError(
            f"{path.parent} was begun with other settings ({'; '.join(changed)}): use the same, or another --out"
        )
    return noted


SAME_SIGNAL_SECONDS = 5.0


class Interrupt(TrainerCallback):
    """While entered, the first Ctrl-C or SIGTERM ends training after the step in hand with a checkpoint, a second one
    at once. Of several processes it is enough that one was told; launchers tell each, and SLURM the launcher too, so
    that a second signal within SAME_SIGNAL_SECONDS is the first one again."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False  # of any process, known at the end of a step
        self._told: float | None = None  # when this one was
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    @property
    def told(self) -> bool:
        """Whether this process was told to stop; a loop without a Trainer, whose steps set `requested`, asks this."""
        return self._told is not None

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._told is None:
            self._told = now
        elif now - self._told > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.requested |= self.told  # a signal during the sum counts at the next step
        if args.world_size > 1:
            told = torch.tensor(int(self.requested), device=args.device)
            dist.all_reduce(told)
            self.requested = bool(told)
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control


class SaveHistory(TrainerCallback):
    """Keep log_history.json in the output folder up to date, for the report and for a look at a running job."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and args.output_dir:
            write_json(Path(args.output_dir) / "log_history.json", state.log_history)
