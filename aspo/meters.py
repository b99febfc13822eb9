"""What a trainer logs: means over a logging window by pairs and by sentences, and a short line for the terminal.

Axes: B pairs, S sentences, R responses.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from aspo.processes import summed
from aspo_kernels import objectives
from aspo_kernels.aspo import sentence_nll
from aspo_kernels.segments import segment_sum

# An objective's statistic -> the name it is logged under (TRL's where TRL has one).
NAMES = {
    "chosen_rewards": "rewards/chosen",
    "rejected_rewards": "rewards/rejected",
    "sentence_weights": "sentences/weight",
    "sentence_logratios": "sentences/logratio",
    "reward_fallback_share": "sentences/reward_fallback_share",
    "nll": "nll",
    "kl": "kl",
    "acpo_scale": "acpo/scale",
    "acpo_target": "acpo/target",
}
FALLING_WINDOWS = 3  # logging windows in a row with both rewards negative and falling before the warning
WITH_DEVIATION = ("sentences/weight", "sentences/similarity", "sentences/nll")  # logged as _mean and _std


class Meters:
    """Running sums by name; nothing waits for the device until `drain`."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor | int]] = {}

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Count each entry of `values` (any shape) once; with `where`, bool of that shape, those that it names."""
        values = values.detach().float()
        count: Tensor | int = values.numel()
        if where is not None:
            values, count = torch.where(where, values, 0.0), where.sum()
        total, square = values.sum(), values.square().sum()
        if name in self._sums:
            before = self._sums[name]
            total, square, count = total + before[0], square + before[1], count + before[2]
        self._sums[name] = total, square, count

    def drain(self) -> dict[str, float]:
        """The means (and population standard deviations) since the last call, over all processes; starts anew."""
        means: dict[str, float] = {}
        sums = {name: [float(x) for x in values] for name, values in self._sums.items()}
        for name, (total, square, count) in summed(sums).items():
            if not count:  # no item of that kind in the window
                continue
            mean = total / count
            if name in WITH_DEVIATION:
                means[f"{name}_mean"] = mean
                means[f"{name}_std"] = math.sqrt(max(square / count - mean**2, 0.0))
            else:
                means[name] = mean
        if "sentences/nll_mean" in means:
            means["sentences/perplexity"] = math.exp(min(means["sentences/nll_mean"], 700.0))
        self._sums.clear()
        return means


class FallingRewards:
    """Warns once both rewards have been negative and falling for FALLING_WINDOWS logging windows."""

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None
        self._windows = 0

    def look(self, logs: Mapping[str, float]) -> None:
        """At a window's means; those without rewards say nothing."""
        if not {"rewards/chosen", "rewards/rejected"} <= logs.keys():
            return
        now = logs["rewards/chosen"], logs["rewards/rejected"]
        before, self._before = self._before, now
        falling = before is not None and all(n < min(b, 0.0) for n, b in zip(now, before, strict=True))
        self._windows = self._windows + 1 if falling else 0
        if self._windows == FALLING_WINDOWS:
            warnings.warn(
                f"both rewards are negative and falling (chosen {now[0]:+.3f}, rejected {now[1]:+.3f}): the model "
                "makes its chosen answers less likely too. Lower learning_rate, raise beta, or add sft to loss_type.",
                stacklevel=3,
            )


@torch.no_grad()
def record(meters: Meters, inputs: objectives.Inputs, result: objectives.Result) -> None:
    """Add a batch: TRL's metrics, those of chosen sentences, and whatever else the objective reports."""
    layout = inputs.layout
    logps = segment_sum(inputs.logps.detach(), layout.response_token_offsets)
    stats = dict(result.stats)
    good = inputs.desirable
    of_pair = inputs.pair(logps) if good is None else (inputs.pair(logps)[0],) * 2
    # Single responses: what is good and what is not stands where chosen and rejected do.
    sides = {"chosen": good, "rejected": None if good is None else ~good}
    rewards = None if good is None else stats.pop("rewards", None)
    for (side, where), values in zip(sides.items(), of_pair, strict=True):
        meters.add(f"logps/{side}", values, where)
        if rewards is not None:
            meters.add(f"rewards/{side}", rewards, where)
    if "chosen_rewards" in stats and "rejected_rewards" in stats:
        gap = stats["chosen_rewards"] - stats["rejected_rewards"]
        meters.add("rewards/accuracies", (gap > 0).float())
        meters.add("rewards/margins", gap)
        margins = stats.pop("margins", gap)  # of the objective; ASPO's are of weighted sentences
        if "sentence_weights" in stats:
            meters.add("sentences/weighted_margins", margins)
    for name, value in stats.items():
        loss_name = name.removesuffix("_losses")
        meters.add(NAMES.get(name, f"losses/{loss_name}" if loss_name != name else f"stats/{name}"), value)
    sentences = layout.chosen_sentences
    meters.add("sentences/nll", sentence_nll(inputs.logps.detach(), layout)[sentences])
    meters.add("sentences/per_response", layout.response_offsets.diff()[layout.with_role(0)])
    if inputs.similarity is not None:
        meters.add("sentences/similarity", inputs.similarity)


def log_line(step: int, logs: Mapping[str, Any]) -> str:
    """One short line of a log entry; everything is in log_history.json."""
    prefix = "eval_" if "eval_loss" in logs else ""
    parts = [f"step {step}" + (" evaluation" if prefix else "")]
    for name, key, form in (
        ("loss", "loss", ".4f"),
        ("rewards", "rewards/chosen", "+.3f"),
        ("/", "rewards/rejected", "+.3f"),
        ("accuracy", "rewards/accuracies", ".2f"),
        ("weight", "sentences/weight_mean", ".2f"),
        ("lr", "learning_rate", ".1e"),
    ):
        if prefix + key in logs:
            parts.append(f"{name} {logs[prefix + key]:{form}}")
    return "  ".join(parts).replace("  / ", " / ")


class Progress(ProgressCallback):
    """Trainer's progress bar, with `log_line` instead of the whole entry."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if self.training_bar is not None and logs and ("loss" in logs or "eval_loss" in logs):
            self.training_bar.write(log_line(state.global_step, logs))

    def close(self) -> None:
        """Take the bars away where training ended with an error, so that its message comes last."""
        for bar in (self.training_bar, self.prediction_bar):
            if bar is not None:
                bar.leave = False
                bar.close()
