"""Preference items with everything that an objective may read, response by response, for the tests of the family.

Each response keeps its own tensors (`Answer`), the log-probabilities as leaves: any choice and order of the items can
be made into `Inputs`, and the gradients compared where they arrive. Import with `from items import ...`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aspo_kernels import SentenceLayout
from aspo_kernels.objectives import Inputs


@dataclass(frozen=True)
class Answer:
    """One response. Per token (n,): logps and kl (leaves), ref_logps, scores, sharp. Per sentence: similarity, weights.
    log_q is its image's density. l, h and a length as in the equations, computed here in plain torch."""

    sentences: tuple[int, ...]
    logps: Tensor
    ref_logps: Tensor
    kl: Tensor
    scores: Tensor
    sharp: Tensor
    similarity: Tensor
    weights: Tensor
    log_q: float

    @property
    def l(self) -> Tensor:  # noqa: E743  the equations' own letter
        return self.logps - self.ref_logps

    @property
    def h(self) -> Tensor:
        return self.l.sum()

    def __len__(self) -> int:
        return self.logps.numel()


Item = dict[int, Answer]  # role -> response


def answer(
    sentences: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float64, **given: object
) -> Answer:
    """Random numbers in plausible ranges, but for those given."""

    def rand(n: int, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)).to(dtype)

    n, s = sum(sentences), len(sentences)
    made = {
        "logps": rand(n, -5, 0),
        "ref_logps": rand(n, -5, 0),
        "kl": rand(n, 0, 1),
        "scores": rand(n, -1.5, 1.5),
        "sharp": rand(n, -3, 0),
        "similarity": rand(s, 0, 0.4),
        "weights": rand(s, 0, 1),
        "log_q": float(rand(1, -6, -0.5)),
        **given,
    }
    made["logps"], made["kl"] = (made[name].detach().clone().requires_grad_() for name in ("logps", "kl"))
    return Answer(tuple(sentences), **made)  # type: ignore[arg-type]


def item(
    chosen: Sequence[int], rejected: Sequence[int], negatives: int, seed: int, dtype: torch.dtype = torch.float64
) -> Item:
    """A pair, and the chosen response under `negatives` other images."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [chosen, rejected, *[chosen] * negatives]
    return {role: answer(sentences, generator, dtype) for role, sentences in enumerate(lengths)}


def batch(dtype: torch.dtype = torch.float64) -> list[Item]:
    """Four items: three, no, one and two negatives; one to three sentences."""
    shapes = [([2, 1, 3], [4, 2], 3), ([1, 1], [3], 0), ([4], [1, 2, 2], 1), ([1, 2], [1], 2)]
    return [item(*shape, seed, dtype) for seed, shape in enumerate(shapes)]


def at_the_reference(items: Sequence[Item]) -> list[Item]:
    """The same items at step 0: policy = reference."""
    return [
        {r: replace(a, ref_logps=a.logps.detach(), kl=torch.zeros_like(a.kl).requires_grad_()) for r, a in i.items()}
        for i in items
    ]


def inputs(items: Sequence[Item], **fields: object) -> Inputs:
    """What an objective reads of these items, in the collator's order: by role, then by item. fields override."""
    placed = [(role, group) for role in range(max(map(max, items)) + 1 if items else 0) for group in range(len(items))]
    placed = [(role, group) for role, group in placed if role in items[group]]
    answers = [items[group][role] for role, group in placed]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(a, name) for a in answers])

    sentences = [n for a in answers for n in a.sentences]
    tokens = sum(sentences)
    layout = SentenceLayout(
        targets=torch.arange(tokens),
        hidden_index=torch.arange(tokens),
        sentence_offsets=torch.tensor([0, *sentences]).cumsum(0),
        response_offsets=torch.tensor([0, *(len(a.sentences) for a in answers)]).cumsum(0),
        group=torch.tensor([group for _, group in placed]),
        role=torch.tensor([role for role, _ in placed]),
    )
    logps = joined("logps")
    read = {
        "ref_logps": joined("ref_logps"),
        "similarity": torch.cat([i[0].similarity for i in items]),
        "rejected_similarity": joined("similarity"),
        "sentence_weights": joined("weights"),
        "token_scores": joined("scores"),
        "token_kl": joined("kl"),
        "sharp_logps": joined("sharp"),
        "negative_log_q": torch.tensor([a.log_q for a in answers], dtype=logps.dtype),
        "desirable": torch.tensor([n % 2 == 0 for n in range(len(items))]),
        "pair_tokens": sum(len(i[0]) + len(i[1]) for i in items) / len(items),
        **fields,
    }
    return Inputs(layout, logps, **read)  # type: ignore[arg-type]


def leaves(items: Sequence[Item]) -> list[Tensor]:
    """Every tensor that may get a gradient, item by item."""
    return [t for i in items for a in i.values() for t in (a.logps, a.kl)]


def gradients(losses: Tensor, items: Sequence[Item]) -> list[Tensor]:
    """d sum(losses) / d each of `leaves`, zeros where there is none."""
    return list(torch.autograd.grad(losses.sum(), leaves(items), materialize_grads=True, retain_graph=True))
