"""Callbacks of Trainer that several tests use."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopAt(TrainerCallback):
    """Saves and stops after a step, as `aspo.resume.Interrupt` does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
