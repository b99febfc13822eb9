"""ACPO's target over processes: each has other pairs, and all have one target and so the scale of one process."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from forked import launched
from ranks import Ranks

from aspo.shared_prefix.forward import mean_pair_tokens
from aspo_kernels import SentenceLayout, objectives

LENGTHS = ((3, 5), (9, 2), (4, 4), (12, 7), (1, 6))  # tokens of chosen and rejected, pair by pair


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(2)
    yield processes
    processes.close()


def batch(pairs: list[tuple[int, int]]) -> dict[str, SentenceLayout]:
    lengths = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    labels = torch.full((len(lengths), max(lengths)), -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = 1
    return {"layout": SentenceLayout.from_labels(labels, torch.zeros_like(labels))}


def scales(pairs: list[tuple[int, int]], pair_tokens: float) -> list[float]:
    """ACPO's a, where a response's log-ratio is -0.3 a token in the chosen and -0.4 in the rejected."""
    layout = batch(pairs)["layout"]
    of_role = torch.tensor([-0.3, -0.4])[layout.role].repeat_interleave(layout.response_token_offsets.diff())
    given = objectives.Inputs(layout, of_role, torch.zeros_like(of_role), pair_tokens=pair_tokens)
    return objectives.get("acpo")(given, beta=1.0, delta=0.1).stats["acpo_scale"].tolist()


def on_this_rank() -> list[float]:
    """The target's tokens and the scales of this process's pairs, which come in two micro-batches."""
    from accelerate import Accelerator

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ |= launched(rank, size, 29_500)  # met already
    mine = list(LENGTHS[:3] if rank == 0 else LENGTHS[3:])
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == size
    tokens = mean_pair_tokens([batch(mine[:1]), batch(mine[1:])], accelerator)
    return [tokens, *scales(mine[:1], tokens), *scales(mine[1:], tokens)]


def test_two_processes_have_the_target_and_the_scales_of_one(ranks):
    mean = sum(map(sum, LENGTHS)) / len(LENGTHS)
    (first, *a), (second, *b) = ranks.run(on_this_rank)
    assert first == second == pytest.approx(mean)
    together = scales(list(LENGTHS), mean)
    assert a + b == pytest.approx(together)
    assert min(together) < 1 and len(set(together)) > 2  # the scale acts here
