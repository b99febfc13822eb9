"""A cut sequence given wrongly: the same error in every process, none of which is left waiting, or else no number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_sequence_parallel import HIDDEN, VOCABULARY, Case
from test_vocabulary_parallel import error_of
from torch import Tensor

from aspo_kernels import SequenceShard, sentence_dpo_loss


def run_wrong(changes: dict[int, dict[str, Any]]) -> str:
    """The message of sentence_dpo_loss where the processes of `changes` give another argument than they should."""
    case, rank = Case.usual(), dist.get_rank()
    wrong = dict(changes.get(rank, {}))
    tokens = SequenceShard.even(case.layout.num_tokens).tokens
    if "tokens" in wrong:
        tokens = wrong.pop("tokens")(tokens)
    if "targets" in wrong:
        case.layout = replace(case.layout, targets=wrong.pop("targets")(case.layout.targets))
    shard = SequenceShard(tokens, wrong.pop("size", case.layout.num_tokens))
    rows = torch.zeros(tokens.numel(), HIDDEN, dtype=torch.float64) + wrong.pop("value", 1.0)
    arguments = {"hidden": rows, "head": case.head, "similarity": case.similarity, "ref_hidden": rows, **wrong}
    message = error_of(sentence_dpo_loss, layout=case.layout, sequence=shard, **arguments)
    dist.barrier()  # and the group is still in step
    return message


def twice(tokens: Tensor) -> Tensor:
    return torch.cat([tokens, tokens[-1:]])


def another_in_place_of_the_last(tokens: Tensor) -> Tensor:
    return torch.cat([tokens[:-1], tokens[:1] - 1])


def fewer(tokens: Tensor) -> Tensor:
    return tokens[:-1]


def too_far(tokens: Tensor) -> Tensor:
    return tokens + 100


def other_targets(targets: Tensor) -> Tensor:
    return (targets + 1) % VOCABULARY


WRONG = [  # argument of process 1, what it is there, what all say
    ("tokens", twice, "is held by 2 processes of the group (1 such tokens)"),
    ("tokens", fewer, "is held by 0 processes of the group (1 such tokens)"),
    ("tokens", another_in_place_of_the_last, "(2 such tokens): each must be in one SequenceShard"),
    ("tokens", too_far, "process 1: a SequenceShard's tokens reach from"),
    ("size", 7, "process 1: got ("),
    ("targets", other_targets, "layout of process 1 is not that of process 0: with a SequenceShard every"),
    ("similarity", None, "similarity of process 1 is not that of process 0"),
    ("beta", 0.2, "beta of process 1 is not that of process 0"),
    ("beta", -1.0, "process 1: beta is -1.0"),
    ("reduction", "most", "process 1: reduction is 'most'"),
    ("value", float("nan"), "process 1: the log-probability of token 0"),
    ("hidden", torch.ones(3, HIDDEN, dtype=torch.float64), "process 1: hidden must be ("),
    ("hidden", torch.ones(4, 2, HIDDEN, dtype=torch.float64), "process 1: hidden must be ("),
    ("head", torch.ones(2, 2), "process 1: ref_hidden must be (N, H) and its head"),
    ("temperature", 0.0, "process 1: temperature is 0.0"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    WRONG,
    ids=[f"{name} {getattr(v, '__name__', k)}" for k, (name, v, _) in enumerate(WRONG)],
)
def test_errors_are_seen_by_all(ranks, name, value, message):
    messages = ranks.run(run_wrong, {1: {name: value}})
    assert message in messages[0]
    assert all(other == messages[0] for other in messages)


def numbers_that_do_not_fit() -> list[str]:
    rank = dist.get_rank()
    shard = SequenceShard.even(10)
    n = shard.tokens.numel()
    good = torch.zeros(n)
    messages = [
        error_of(shard.whole, torch.zeros(n + (rank == 1))),
        error_of(shard.whole, good, good.double() if rank == 1 else good),
        error_of(shard.whole, good.long() if rank == 1 else good),
        error_of(shard.whole, *[good] * (1 + rank)),
        error_of(shard.whole),
    ]
    with pytest.raises(RuntimeError) as caught, shard.together():
        if rank == 1:
            raise KeyError("no such image")
    messages.append(str(caught.value))
    with shard.together(layout=Case.usual().layout, alpha=0.5, none=None, pair=(1, good[:1])):
        pass
    return messages


def test_numbers_that_do_not_fit(ranks):
    results = ranks.run(numbers_that_do_not_fit)
    assert all(messages == results[0] for messages in results)
    expected = [
        "process 1: whole takes floating point (",
        "process 1: whole takes",
        "process 1: whole takes",
        "values of process 1 is not that of process 0",
        "process 0: whole takes at least one tensor",
        "process 1: 'no such image'",
    ]
    for message, part in zip(results[0], expected, strict=True):
        assert part in message


def unseen() -> Any:
    """Where looking would wait for a device nothing is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceShard, "_looks", lambda *_: False)
        tokens = SequenceShard.even(9).tokens
        tokens = tokens.clamp(max=7) if dist.get_rank() == dist.get_world_size() - 1 else tokens
        return SequenceShard(tokens, 9).whole(tokens.double())[0].tolist()


def test_a_token_held_wrongly_is_never_read_as_a_number(ranks):
    for values in ranks.run(unseen):
        assert values[:7] == [0, 1, 2, 3, 4, 5, 6]
        assert all(value != value for value in values[7:]), "7 is held twice, 8 by nobody"


def constructor_errors() -> list[str]:
    some = torch.arange(3)
    return [
        error_of(SequenceShard, some.float(), 3),
        error_of(SequenceShard, some[None], 3),
        error_of(SequenceShard, some, 3, rows=some),
        error_of(SequenceShard, some, 3, rows=some[:2], grid=(1, 3)),
        error_of(SequenceShard, some, 3, grad="average"),
        error_of(SequenceShard.of_columns, some, (1, 3), some.float()),
        error_of(SequenceShard(some, 3).local, torch.zeros(4)),
        error_of(SequenceShard(some, 3).local_rows, torch.zeros(1, 3, 2)),
        error_of(SequenceShard(some, 3).to("meta").local_rows, torch.zeros(3, 2)),
    ]


def test_what_a_shard_takes(ranks):
    expected = [
        "tokens must be (n,) int64, got torch.float32 (3,)",
        "tokens must be (n,) int64, got torch.int64 (1, 3)",
        "rows and grid go together",
        "rows has 2 entries but tokens 3",
        "grad is 'average'; choose sum or mean",
        "columns must be (T_local,) int64",
        "got (4,) for a SequenceShard of 3 tokens",
        "hidden must be (3, H), this process's part",
        "the SequenceShard is on meta but hidden on cpu",
    ]
    for messages in ranks.run(constructor_errors):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def test_a_shard_needs_a_process_group():
    with pytest.raises(ValueError, match="call init_process_group first"):
        SequenceShard(torch.arange(3), 3)
