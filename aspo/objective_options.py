"""An objective's options among those of a configuration: ours (`AspoConfig`) and TRL's (`AspoDPOConfig`)."""

from __future__ import annotations

from typing import Any

import torch

from aspo_kernels import SentenceLayout, objectives

OBJECTIVE_OPTIONS = ("beta", "alpha", "normalizer", "perplexity", "perplexity_scale", "label_smoothing", "gamma")


class ObjectiveOptions:
    """What a configuration dataclass with these fields, and one field for each of OBJECTIVE_OPTIONS, says of its
    objective. Fields of OBJECTIVE_OPTIONS that are None were not given."""

    loss_type: list[str]
    loss_weights: list[float] | None
    objective_kwargs: dict[str, Any] | str | None
    precompute_ref_log_probs: bool

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
        pair = SentenceLayout.from_labels(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long))
        logps = torch.zeros(2)
        objective(objectives.Inputs(pair, logps, logps, logps[:1]), **self.objective_options())  # refuses bad values

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
