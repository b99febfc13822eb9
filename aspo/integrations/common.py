"""What the plug-ins share: running our forward inside a wrapped model, and a batch's loss.

Axes: B pairs, N counted tokens, S sentences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aspo.meters import Meters, record
from aspo.model import base_model, output_head, trunk_hidden
from aspo.objective_options import probe
from aspo_kernels import SentenceLayout, gather_hidden, objectives

OPTIONAL_READS = {"sentence_weights", "rejected_similarity", "pair_tokens"}  # needed for some options alone, if at all
NOT_THE_TRUNKS = ("labels", "use_cache", "return_dict", "logits_to_keep")  # arguments that a trunk has no use for


@contextmanager
def forward_runs(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, a call of the model, however it is wrapped (PEFT, DDP, autocast), returns `function(**its arguments)`."""
    inner = base_model(model)
    own = vars(inner).get("forward")

    @functools.wraps(inner.forward)  # PEFT and ms-swift look at the signature
    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    inner.forward = forward
    try:
        yield
    finally:
        del inner.forward
        if own is not None:
            inner.forward = own


def labelled_logps(
    model: Any, unwrapped: Any, inputs: Mapping[str, Any], layout: SentenceLayout, backend: str
) -> Tensor:
    """(N,) log-probabilities of the layout's tokens, without logits. `model` is called, so that its wrappers act."""

    def run(**kwargs: Any) -> Tensor:
        hidden = trunk_hidden(unwrapped, {k: v for k, v in kwargs.items() if k not in NOT_THE_TRUNKS})
        return output_head(unwrapped).logps(gather_hidden(hidden, layout), layout.targets, backend)

    with forward_runs(unwrapped, run):
        return model(**inputs)


# ---- the objective ----


@dataclass(frozen=True)
class Settings:
    """The objective that a plug-in trains, its options without beta (the framework's), and the kernels' backend."""

    objective: objectives.Objective
    options: Mapping[str, Any]
    backend: str = "auto"

    @classmethod
    def make(
        cls, objective: str | Mapping[str, float] = "aspo", kernel_backend: str = "auto", **options: Any
    ) -> Settings:
        """objective: a name, or names with their weights. Raises ValueError for an option that it does not take."""
        if "beta" in options:
            raise ValueError(f"beta={options['beta']!r}: set the framework's own beta, which is the one that is used")
        members: Any = objective
        made = objectives.get(members) if isinstance(objective, str) else objectives.weighted_sum(members)
        made.check_options(options)
        if unread := sorted(made.reads - OPTIONAL_READS):
            raise ValueError(f"{made.name} reads {unread[0]}, which this plug-in does not make: use AspoTrainer")
        if made.reads_negatives:
            raise ValueError(f"{made.name} reads negative images, which this plug-in does not make: use AspoTrainer")
        taken = {**made.options, **options}
        for name, ours, theirs in (("weights", "given", "computed"), ("rejected_side", None, "whole")):
            if name in taken and taken[name] != theirs and ours in (None, taken[name]):
                raise ValueError(
                    f"{name}={taken[name]!r} reads columns which this plug-in does not pass on: use AspoTrainer"
                )
        if "pair_tokens" in made.reads and options.get("target") != "pair":
            raise ValueError("this plug-in sees one micro-batch, not the whole step or data: give target='pair'")
        made(probe(), **options)  # refuses bad values
        return cls(made, options, kernel_backend)

    @property
    def needs_similarity(self) -> bool:
        """Whether rows without similarities would change what is trained."""
        return "alpha" in self.objective.options and self.options.get("alpha", self.objective.options["alpha"]) > 0

    def loss(
        self,
        layout: SentenceLayout,
        logps: Tensor,
        ref_logps: Tensor | None,
        similarity: Tensor | None,
        sample_weight: Tensor | None,
        beta: float,
    ) -> tuple[Tensor, dict[str, float]]:
        """The mean over pairs of sample_weight * loss, and the batch's metrics by TRL's names."""
        if similarity is None and self.needs_similarity:
            raise ValueError("the rows have no similarities: run `aspo score` on them, or set alpha=0 (ASPO-P)")
        given = objectives.Inputs(layout, logps, ref_logps, similarity, self.backend)
        options = {"beta": beta, **self.options} if "beta" in self.objective.options else self.options
        result = self.objective(given, **options)
        meters = Meters()
        record(meters, given, result)
        losses = result.losses if sample_weight is None else result.losses * sample_weight.to(result.losses)
        return losses.mean(), meters.drain()


def refuse(options: Any, ignored: Mapping[str, tuple[Any, str]]) -> None:
    """ValueError for an option that our loss would ignore. ignored: its harmless value (None is one too), and why."""
    for name, (harmless, why) in ignored.items():
        value = getattr(options, name, harmless)
        if value is not None and value != harmless:
            raise ValueError(f"{name}={value!r} would be ignored: {why}")
