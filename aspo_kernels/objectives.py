"""Objectives: small functions from per-token log-probabilities and a layout to one loss per item.

An objective is plain differentiable torch on a few thousand numbers; the expensive part, the log-probabilities, is the
same for all of them. Register your own:

    @objectives.register("my_dpo")
    def my_dpo(x: Inputs, beta: float = 0.1) -> Result:
        chosen, rejected = x.pair(x.response_logratios)
        return Result(-F.logsigmoid(beta * (chosen - rejected)), x.reward_stats(beta))

h(y) = sum_t (logp_t - ref_logp_t) is a response's log-ratio, beta * h(y) its implicit reward.
Axes: N counted tokens, S sentences, R responses, B items.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aspo_kernels.layout import SentenceLayout
from aspo_kernels.segments import segment_sum, spread_over


def _once(function: Callable[[Any], Tensor]) -> Any:
    """A property of Inputs that is computed once (functools.cached_property takes a lock: no torch.compile)."""

    def get(self: Inputs) -> Tensor:
        if function.__name__ not in self._known:
            self._known[function.__name__] = function(self)
        return self._known[function.__name__]

    return property(get, doc=function.__doc__)


# Optional input -> what it is and where it comes from, for the error where it is missing.
OPTIONAL = {
    "ref_logps": "reference log-probabilities: pass ref_hidden or ref_logps",
    "rejected_similarity": "similarities of the rejected sentences (`aspo score --rejected`)",
    "sentence_weights": "sentence weights: give the rows chosen_sentence_weights",
    "token_scores": "token scores: give the rows chosen_token_scores and rejected_token_scores (`aspo rewards`)",
    "token_kl": "the divergence at each token, and so a live reference: turn precompute_ref_log_probs off",
    "sharp_logps": "log-probabilities at temperature 1/2",
    "negative_log_q": "the negatives' log-densities: give the rows negative_log_q (`aspo negatives`)",
    "desirable": "rows of one response with a label",
    "pair_tokens": "the mean length of a pair",
}


@dataclass(frozen=True)
class Inputs:
    """What an objective may look at.

    layout: the tokens' grouping. logps: (N,) policy log-probabilities, differentiable. ref_logps: (N,) the
    reference's, or None. similarity: (S_chosen,) raw cosine of each chosen sentence with the image, or None.
    backend: "auto", "torch" or "triton", for the reductions and for ASPO's fused kernel.

    What only some objectives read (`Objective.reads`), or None; all without gradient but token_kl:
    rejected_similarity: (S,) cosines, read at the rejected responses' sentences.
    sentence_weights: (S,) weights of sentences that come with the data instead of being computed.
    token_scores: (N,) a number for each token; what it means is the objective's (a reward, a corrected segment, ...).
    token_kl: (N,) KL(reference || policy) over the whole vocabulary (`linear_token_kl`), differentiable.
    sharp_logps: (N,) the policy's log-probabilities at temperature 1/2: log sum_v p_v^2 = 2 logp - sharp_logp.
    negative_log_q: (R,) log-density with which a negative image was drawn, read at responses of roles 2 and up.
    desirable: (B,) bool, of items that are single responses: whether it is a good one.
    pair_tokens: mean of |y_c| + |y_r| over the whole batch of an optimiser step, on all processes.
    """

    layout: SentenceLayout
    logps: Tensor
    ref_logps: Tensor | None = None
    similarity: Tensor | None = None
    backend: str = "auto"
    rejected_similarity: Tensor | None = None
    sentence_weights: Tensor | None = None
    token_scores: Tensor | None = None
    token_kl: Tensor | None = None
    sharp_logps: Tensor | None = None
    negative_log_q: Tensor | None = None
    desirable: Tensor | None = None
    pair_tokens: float | None = None
    _known: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)  # see _once

    def __post_init__(self) -> None:
        layout = self.layout
        sizes = {
            **dict.fromkeys(("logps", "ref_logps", "token_scores", "token_kl", "sharp_logps"), layout.num_tokens),
            "similarity": layout.chosen_sentences.numel(),
            **dict.fromkeys(("rejected_similarity", "sentence_weights"), layout.num_sentences),
            "negative_log_q": layout.num_responses,
            "desirable": layout.num_items,
        }
        for name, size in sizes.items():
            value = getattr(self, name)
            if value is None:
                continue
            kind = "bool" if name == "desirable" else "floating point"
            fits = value.dtype == torch.bool if kind == "bool" else value.is_floating_point()
            if value.shape != (size,) or not fits:
                raise ValueError(f"{name} must be {kind} ({size},), got {value.dtype} {tuple(value.shape)}")
            if value.device != self.logps.device:
                raise ValueError(f"{name} is on {value.device} but logps on {self.logps.device}")
        if self.layout.targets.device != self.logps.device:
            raise ValueError(
                f"the layout is on {self.layout.targets.device} but logps on {self.logps.device}: use layout.to(device)"
            )
        self.layout.require_nonempty()
        if self.logps.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_finite()  # elsewhere looking would wait for the device

    def _check_finite(self) -> None:
        tokens, sentences, chosen = self.layout.used_sizes()
        for name, used, fix in (
            ("similarity", chosen, "score that sentence again"),
            ("rejected_similarity", sentences, "score that sentence again"),
            ("ref_logps", tokens, "compute the reference's log-probabilities again"),
            ("sentence_weights", sentences, "give that sentence a weight"),
            ("token_scores", tokens, "score that token again"),
            ("negative_log_q", None, "draw that negative image again"),
        ):
            value = getattr(self, name)
            bad = () if value is None else torch.nonzero(~torch.isfinite(value[:used])).flatten().tolist()
            if value is not None and bad:
                raise ValueError(f"{name}[{bad[0]}] is {float(value[bad[0]])}; {fix}")

    def need(self, name: str) -> Tensor:
        """The field of that name; ValueError where this batch has none."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this objective needs {OPTIONAL[name]}")
        return value

    def sum_by(self, values: Tensor, offsets: Tensor) -> Tensor:
        """`segments.segment_sum` on this batch's backend."""
        return segment_sum(values, offsets, self.backend)

    @_once
    def token_logratios(self) -> Tensor:
        """(N,) logp - ref_logp, subtracted per token before anything is summed: sums of each would round first."""
        return self.logps - self.need("ref_logps").detach()

    @_once
    def sentence_logratios(self) -> Tensor:
        """(S,) h(s)."""
        return self.sum_by(self.token_logratios, self.layout.sentence_offsets)

    @_once
    def response_logratios(self) -> Tensor:
        """(R,) h(y)."""
        return self.sum_by(self.token_logratios, self.layout.response_token_offsets)

    @_once
    def response_logps(self) -> Tensor:
        """(R,) log pi(y)."""
        return self.sum_by(self.logps, self.layout.response_token_offsets)

    @_once
    def lengths(self) -> Tensor:
        """(R,) counted tokens of each response, in logps' dtype."""
        return self.layout.response_token_offsets.diff().to(self.logps.dtype)

    def pair(self, per_response: Tensor) -> tuple[Tensor, Tensor]:
        """(R,) -> the chosen's and the rejected's values, (B,) each."""
        return per_response[self.layout.with_role(0)], per_response[self.layout.with_role(1)]

    def negatives(self, per_response: Tensor, missing: float) -> Tensor:
        """(R,) -> (B, Q): the values of each item's responses of roles 2 and up, `missing` where it has fewer."""
        layout, roles = self.layout, len(self.layout.role_responses)
        table = torch.full((layout.num_items, roles), layout.num_responses, device=layout.group.device)
        table[layout.group, layout.role] = torch.arange(layout.num_responses, device=layout.group.device)
        return torch.cat([per_response, per_response.new_full((1,), missing)])[table[:, 2:]]

    def spread(self, per_response: Tensor) -> Tensor:
        """(R,) -> (N,): each response's value at its tokens."""
        return spread_over(per_response, self.layout.response_token_offsets, self.layout.num_tokens, self.backend)

    def reward_stats(self, beta: float, margins: Tensor | None = None) -> dict[str, Tensor]:
        """Detached `chosen_rewards`, `rejected_rewards` (beta * h) and `margins`, (B,) each."""
        chosen, rejected = (beta * h for h in self.pair(self.response_logratios.detach()))
        margins = chosen - rejected if margins is None else margins.detach()
        return {"chosen_rewards": chosen, "rejected_rewards": rejected, "margins": margins}


@dataclass(frozen=True)
class Result:
    """losses: (B,), differentiable. stats: detached tensors for logging, (B,), (S_chosen,) or scalar."""

    losses: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)  # compared and hashed as the object it is: a key of weighted_sum
class Objective:
    """A named objective; call it with Inputs and its options."""

    name: str
    function: Callable[..., Result]
    needs_reference: bool
    options: Mapping[str, Any]  # its keyword options with their defaults
    difference_only: bool = False  # it reads h(y_c) - h(y_r) alone: a common start of both has no gradient
    reads_negatives: bool = False  # it reads responses of roles 2 and up
    reads: frozenset[str] = frozenset()  # optional fields of Inputs that it may read

    def __call__(self, inputs: Inputs, **options: Any) -> Result:
        self.check_options(options)
        return self.function(inputs, **options)

    def check_options(self, options: Iterable[str]) -> None:
        """Raise ValueError for an option that this objective does not take."""
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            takes = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
            raise ValueError(f"objective {self.name!r} takes no option {', '.join(unknown)}; it takes {takes}")


_REGISTRY: dict[str, Objective] = {}


def register(
    name: str,
    *,
    needs_reference: bool = True,
    difference_only: bool = False,
    reads_negatives: bool = False,
    reads: Iterable[str] = (),
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorator: make `function(inputs, **options) -> Result` available as `get(name)`.

    difference_only: its losses depend on a pair's h(y_c) - h(y_r) and on nothing else, so that the gradients of tokens
    with which both responses begin cancel, and a trainer need not compute them. reads_negatives: it reads responses of
    roles 2 and up; a trainer refuses rows that have them with objectives which do not. reads: the optional fields of
    Inputs that it may read (`Inputs.need`); what is costly among them (token_kl, sharp_logps) is computed only then.
    """
    reads = frozenset(reads)
    if "token_kl" in reads and not needs_reference:
        raise ValueError(f"objective {name!r} reads token_kl, which needs a reference: leave needs_reference on")
    if unknown := sorted(reads - OPTIONAL.keys()):
        raise ValueError(f"objective {name!r} reads {unknown[0]!r}; Inputs has {', '.join(OPTIONAL)}")

    def add(function: Callable[..., Result]) -> Callable[..., Result]:
        if name in _REGISTRY:
            raise ValueError(f"an objective named {name!r} is registered already; choose another name")
        parameters = list(inspect.signature(function).parameters.values())[1:]
        without = [p.name for p in parameters if p.default is p.empty]
        if without:
            raise ValueError(f"objective {name!r}: option {without[0]!r} needs a default value")
        takes = {p.name: p.default for p in parameters}
        _REGISTRY[name] = Objective(name, function, needs_reference, takes, difference_only, reads_negatives, reads)
        return function

    return add


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)


def get(name: str | Objective) -> Objective:
    """The objective registered under `name` (an Objective is returned as it is)."""
    if isinstance(name, Objective):
        return name
    if not isinstance(name, str):
        raise ValueError(
            f"an objective's name is a string, got {name!r}; for several use weighted_sum({{name: weight}})"
        )
    if name not in _REGISTRY:
        raise ValueError(f"unknown objective {name!r}; choose one of {', '.join(names())}")
    return _REGISTRY[name]


def options(objective: str | Objective) -> dict[str, Any]:
    """The keyword options of an objective with their defaults."""
    return dict(get(objective).options)


def needs_reference(objective: str | Objective) -> bool:
    """Whether an objective reads reference log-probabilities."""
    return get(objective).needs_reference


def weighted_sum(weights: Mapping[str | Objective, float]) -> Objective:
    """sum_k weight_k * objective_k as one objective, e.g. {"dpo": 1.0, "sft": 0.1} (MPO and its kind).

    An option goes to every member that takes it. Each member's losses are in the stats as `<name>_losses`; where two
    members report a statistic of the same name, the first one's is kept.
    """
    members = [(get(name), float(weight)) for name, weight in weights.items()]
    if not members:
        raise ValueError("weighted_sum needs at least one objective")
    for member, weight in members:
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {member.name!r} is {weight}; it must be finite")
    takes = {k: v for member, _ in reversed(members) for k, v in member.options.items()}

    def total(inputs: Inputs, **given: Any) -> Result:
        losses = inputs.lengths.new_zeros(inputs.layout.num_items)
        stats: dict[str, Tensor] = {}
        for member, weight in members:
            result = member(inputs, **{k: v for k, v in given.items() if k in member.options})
            losses = losses + weight * result.losses
            stats = {**result.stats, **stats, f"{member.name}_losses": result.losses.detach()}
        return Result(losses, stats)

    name = " + ".join(f"{weight:g} {member.name}" for member, weight in members)
    return Objective(
        name,
        total,
        any(member.needs_reference for member, _ in members),
        takes,
        all(member.difference_only for member, _ in members),
        any(member.reads_negatives for member, _ in members),
        frozenset().union(*(member.reads for member, _ in members)),
    )
