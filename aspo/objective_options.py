"""The options that our configuration (`AspoConfig`) and TRL's with our loss (`AspoDPOConfig`) have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from aspo_kernels import SentenceLayout, objectives
from aspo_kernels.checks import BACKENDS

OBJECTIVE_OPTIONS = (
    *("beta", "alpha", "normalizer", "perplexity", "perplexity_scale", "weights", "rejected_side"),
    *("label_smoothing", "gamma"),
)


CHOICES = {
    "shared_prefix": ("auto", "on", "off"),
    "prefix_attention": ("auto", "segments", "varlen", "flex", "mask"),
    "vision_cache": ("none", "step", "disk"),
    "kernel_backend": BACKENDS,
}


def probe() -> objectives.Inputs:
    """One pair with a negative image, of one token each, that has everything an objective may read: to try options."""
    ids, role = torch.zeros(3, 1, dtype=torch.long), torch.arange(3)
    layout = SentenceLayout.from_labels(ids, ids, group=torch.zeros_like(role), role=role)
    fields: dict[str, Any] = {name: torch.zeros(3) for name in objectives.OPTIONAL if name != "desirable"}
    fields |= {"desirable": torch.ones(1, dtype=torch.bool), "pair_tokens": None}
    return objectives.Inputs(layout, torch.full((3,), -1.0), similarity=torch.zeros(1), **fields)


@dataclass
class ObjectiveOptions:
    """The options of the objective and of the step that both configurations have; beside a TrainingArguments.

    Those of OBJECTIVE_OPTIONS that are None were not given: the objective's own default holds.
    """

    loss_type: list[str] = field(
        default_factory=lambda: ["aspo"],
        metadata={
            "help": "Objective(s): aspo, dpo, misp, acpo, fisao and the others of docs/objectives.md, or your own."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight for each loss_type. Default: 1 for each."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "Reward scale: reward = beta * log-ratio. Default: mostly 0.1 (simpo: 2)."}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "aspo: share of similarity in a sentence's weight, [0, 1]. Default: 0.5."}
    )
    normalizer: str | None = field(
        default=None, metadata={"help": "aspo: R_c/R_c*, one of sentence, token, none, reward. Default: sentence."}
    )
    perplexity: str | None = field(
        default=None, metadata={"help": "aspo: whose perplexity, policy or reference. Default: policy."}
    )
    perplexity_scale: str | None = field(
        default=None, metadata={"help": "aspo: min-max over ppl or nll. Default: ppl."}
    )
    weights: str | None = field(
        default=None,
        metadata={
            "help": "aspo: sentence weights computed, or given by the rows (chosen_sentence_weights). Default: "
            "computed."
        },
    )
    rejected_side: str | None = field(
        default=None,
        metadata={"help": "aspo: the rejected response whole, or weighed: aligned, misaligned. Default: whole."},
    )
    label_smoothing: float | None = field(
        default=None, metadata={"help": "dpo: share of pairs taken to be swapped, [0, 0.5). Default: 0."}
    )
    gamma: float | None = field(
        default=None,
        metadata={"help": "simpo: target margin (default 1); ddpo: weight of corrected segments (default 5)."},
    )
    objective_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The objective's further options (docs/objectives.md) as JSON: '{\"delta\": 0.005}'."},
    )
    kernel_backend: str = field(
        default="auto", metadata={"help": "Loss kernels: auto, torch, triton, or reference (full logits, to compare)."}
    )
    shared_prefix: str = field(
        default="auto",
        metadata={
            "help": "Compute prompt and image once for the responses of a row: auto (where the first rows show that it "
            "is exact for this model), on, off."
        },
    )
    prefix_attention: str = field(
        default="auto",
        metadata={"help": "How shared and packed rows attend: auto, segments, varlen, flex, mask."},
    )
    vision_cache: str = field(
        default="step",
        metadata={
            "help": "Features of a frozen vision tower: none (computed for each forward), step (once per unique image "
            "and step), disk (once per image; kept in output_dir/vision_cache)."
        },
    )

    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the reference's log-probabilities before training; no reference is run or held then."
        },
    )

    def check_choices(self) -> None:
        """ValueError for an option of CHOICES with another value."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")

    def settle_objective(self) -> None:
        """Fill in the options that the objective takes; ValueError for those that it does not, and for bad values."""
        if not self.loss_type or len(set(self.loss_type)) != len(self.loss_type):
            raise ValueError(f"loss_type is {self.loss_type}; name each objective once")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"{len(self.loss_weights)} loss_weights for {len(self.loss_type)} loss_type; give one weight for each"
            )
        objective = self.objective()
        if self.precompute_ref_log_probs and not objective.needs_reference:
            raise ValueError(f"precompute_ref_log_probs is on, but {objective.name} reads no reference: turn it off")
        if self.precompute_ref_log_probs and "token_kl" in objective.reads:
            raise ValueError(
                f"{objective.name} reads the reference's whole distribution at each token, which no cache of "
                "log-probabilities holds: turn precompute_ref_log_probs off"
            )
        if "desirable" in objective.reads and len(self.loss_type) > 1:
            raise ValueError(
                f"loss_type is {self.loss_type}: kto's rows are single responses, bad ones among them, and its second "
                "response is another row's; objectives of pairs cannot be added to it"
            )
        given = [name for name in OBJECTIVE_OPTIONS if getattr(self, name) is not None]
        if isinstance(self.objective_kwargs, str):
            raise ValueError(f"objective_kwargs is {self.objective_kwargs!r}; write JSON, e.g. '{{\"margin\": 0.5}}'")
        if own := sorted(set(OBJECTIVE_OPTIONS) & set(self.objective_kwargs or ())):
            raise ValueError(f"objective_kwargs holds {own[0]}, which is an option of its own: --{own[0]}")
        objective.check_options([*given, *(self.objective_kwargs or {})])
        for name in set(OBJECTIVE_OPTIONS) & set(objective.options):
            members = [objectives.options(member) for member in self.loss_type]
            defaults = {member[name] for member in members if name in member}
            if getattr(self, name) is None and len(defaults) == 1:  # else each member keeps its own
                setattr(self, name, defaults.pop())
        objective(probe(), **self.objective_options())  # refuses bad values

    def objective(self) -> objectives.Objective:
        """The objective that `loss_type` and `loss_weights` name."""
        if len(self.loss_type) == 1 and self.loss_weights is None:
            return objectives.get(self.loss_type[0])
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return objectives.weighted_sum(dict(zip(self.loss_type, weights, strict=True)))

    def objective_options(self) -> dict[str, Any]:
        """The keyword options to call the objective with."""
        takes = self.objective().options
        options = {n: getattr(self, n) for n in OBJECTIVE_OPTIONS if n in takes and getattr(self, n) is not None}
        assert not isinstance(self.objective_kwargs, str)  # parsed in __post_init__
        return {**options, **(self.objective_kwargs or {})}
