"""Hypothesis strategies for ragged layouts, and the tensors that belong to them.

A drawn `Ragged` batch has B pairs; every response is a list of sentence lengths; uncounted positions (prompt, image,
padding, and holes between tokens) lie anywhere. Import with `from strategies import ...`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from aspo_kernels import SentenceLayout

EOS = 2


@dataclass(frozen=True)
class Ragged:
    """lengths[r][s]: tokens of sentence s of response r; chosen responses first, then the rejected ones."""

    lengths: tuple[tuple[int, ...], ...]
    labels: Tensor  # (R, T)
    sentence_ids: Tensor  # (R, T)
    vocabulary: int
    seed: int

    @property
    def pairs(self) -> int:
        return len(self.lengths) // 2

    def layout(self, eos: bool = True) -> SentenceLayout:
        return SentenceLayout.from_labels(self.labels, self.sentence_ids, EOS if eos else None)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def hidden(self, width: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
        """(R, T, H) random hidden states."""
        return torch.randn(*self.labels.shape, width, generator=generator, dtype=torch.float64).to(dtype)

    def similarity(self, generator: torch.Generator) -> Tensor:
        """(S_chosen,) fp32 cosines; now and then all sentences of a response share one."""
        chosen = self.lengths[: self.pairs]
        scores = [torch.rand(len(row), generator=generator) * 2 - 1 for row in chosen]
        if self.seed % 4 == 0:
            scores = [row[:1].expand(row.numel()) for row in scores]
        return torch.cat(scores)


def make_ragged(lengths: list[list[int]], vocabulary: int, seed: int, holes: bool = True) -> Ragged:
    """Lay the tokens out in padded rows; what an uncounted position's sentence id holds is noise on purpose."""
    rng = random.Random(seed)
    rows: list[list[tuple[int, int]]] = []
    for sentences in lengths:
        row = [(-100, rng.randrange(-9, 9)) for _ in range(rng.randrange(3))]
        for index, length in enumerate(sentences):
            for token in range(length):
                last = index == len(sentences) - 1 and token == length - 1
                row.append((EOS if last and rng.random() < 0.7 else rng.randrange(vocabulary), index))
                row += [(-100, rng.randrange(-9, 9)) for _ in range(rng.randrange(2) if holes else 0)]
        rows.append(row)
    width = max((len(row) for row in rows), default=0) + rng.randrange(3)
    padded = [row + [(-100, 99)] * (width - len(row)) for row in rows]
    grid = torch.tensor(padded, dtype=torch.long).reshape(len(rows), width, 2)
    return Ragged(tuple(map(tuple, lengths)), grid[..., 0], grid[..., 1], vocabulary, seed)


@st.composite
def ragged_batches(
    draw: st.DrawFn, max_pairs: int = 3, max_sentences: int = 4, max_length: int = 4, min_sentences: int = 1
) -> Ragged:
    """Batches of 1..max_pairs pairs; with min_sentences=0 some responses are empty."""
    pairs = draw(st.integers(1, max_pairs))
    sentences = st.lists(st.integers(1, max_length), min_size=min_sentences, max_size=max_sentences)
    lengths = draw(st.lists(sentences, min_size=2 * pairs, max_size=2 * pairs))
    return make_ragged(lengths, draw(st.integers(3, 9)), draw(st.integers(0, 2**16)))


def lean_layout(lengths: list[list[int]], vocabulary: int = 11, seed: int = 0) -> SentenceLayout:
    """A layout without holes or EOS, for tests that make up log-probabilities themselves."""
    return make_ragged(lengths, vocabulary, seed, holes=False).layout(eos=False)
