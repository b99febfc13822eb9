"""Heads that come as DTensors: FSDP's, gathered once a call, and tensor parallel ones, used as they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import Policy, Problem, check_gradients, check_logps
from test_vocabulary_parallel import error_of
from torch import Tensor

from aspo_kernels import SentenceLayout, linear_logps, sentence_dpo_loss
from aspo_kernels.vocabulary import VocabularyShard, gather_head

# torch.distributed.fsdp and .tensor take seconds to import: only in the processes, which have them already.

TOKENS, VOCABULARY, HIDDEN = 12, 37, 6  # 37 rows: shards of 19 and 18, of 13, 13 and 11


def mesh_of_all() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(tensor: Tensor, dim: int = 0, requires_grad: bool = False) -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, mesh_of_all(), [Shard(dim)]).detach().requires_grad_(requires_grad)


class Collectives:
    """Counts the collectives of DTensors, by name."""

    def __enter__(self) -> dict[str, int]:
        from torch.distributed.tensor.debug import CommDebugMode

        self.counts: dict[str, int] = {}
        self.mode = CommDebugMode()
        self.mode.__enter__()
        return self.counts

    def __exit__(self, *exception: Any) -> None:
        self.mode.__exit__(*exception)
        self.counts.update({str(op).split(".")[-1]: n for op, n in self.mode.get_comm_counts().items() if n})


# --- FSDP: each process its own tokens ---


def batch_of(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, 5, generator=generator)
    return x, torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)


def train_one_step(frozen: bool) -> Any:
    from torch.distributed.fsdp import fully_shard

    policy = Policy(HIDDEN, VOCABULARY)
    policy.head.requires_grad_(not frozen)
    fully_shard(policy.head)
    fully_shard(policy)
    x, targets = batch_of(dist.get_rank())
    hidden = policy(x)
    head = (policy.head.weight, policy.head.bias)
    with Collectives() as forward:
        if not frozen:
            head = tuple(gather_head(part) for part in head)
        logps = linear_logps(hidden, head[0], targets, bias=head[1])
    with Collectives() as backward:
        (-logps.mean()).backward()
    gradients = {name: p.grad.full_tensor() for name, p in policy.named_parameters() if p.grad is not None}
    return logps.detach(), gradients, forward, backward


def one_process(size: int, frozen: bool) -> tuple[Tensor, dict[str, Tensor]]:
    policy = Policy(HIDDEN, VOCABULARY)
    policy.head.requires_grad_(not frozen)
    x, targets = (torch.cat(parts) for parts in zip(*map(batch_of, range(size)), strict=True))
    logps = linear_logps(policy(x), policy.head.weight, targets, bias=policy.head.bias)
    (-logps.mean()).backward()
    return logps.detach(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [True, False])
def test_fsdp_trains_as_one_process_does(ranks, frozen):
    logps, gradients = one_process(ranks.size, frozen)
    results = ranks.run(train_one_step, frozen)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), logps, rtol=1e-6, atol=1e-6)
    for _, got, forward, backward in results:
        assert got.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)
        # the head's weight and its bias, once each; a frozen head is not needed again
        assert forward == {"all_gather_into_tensor": 2}
        of_the_head = {} if frozen else {"reduce_scatter_tensor": 2}
        assert backward == {"_reduce_scatter_base_": 1, **of_the_head}, "that of the body is FSDP's own"


def gather_and_pull_back(grad: str, size: int) -> Any:
    """The whole, and what a gradient of (rank + 1) everywhere becomes."""
    head = sharded(torch.arange(2.0 * size).view(size, 2), requires_grad=True)
    whole = gather_head(head, grad)
    whole.backward(torch.full((size, 2), dist.get_rank() + 1.0))
    wide = sharded(torch.ones(size, 2), requires_grad=True)
    narrow = gather_head(wide.to(torch.bfloat16))
    narrow.sum().backward()
    assert narrow.dtype == torch.bfloat16
    assert wide.grad.to_local().dtype == torch.float32
    return whole.detach(), head.grad.full_tensor(), head.grad.placements == head.placements


@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_gather_head(ranks, size):
    for grad, share in (("sum", 1), ("mean", ranks.size)):
        for whole, gradient, like_the_head in ranks.run(gather_and_pull_back, grad, size):
            assert whole.tolist() == torch.arange(2.0 * size).view(size, 2).tolist()
            total = sum(range(1, ranks.size + 1)) / share
            assert gradient.tolist() == [[total] * 2] * size
            assert like_the_head


def loss_of_a_frozen_head(dim: int, with_lora: bool) -> Any:
    problem = Problem(TOKENS, VOCABULARY, HIDDEN, torch.float32)
    head, bias = problem.head, problem.bias
    layout = SentenceLayout.from_labels(problem.targets.view(2, 6), torch.tensor([[0, 0, 1, 1, 1, 2]] * 2))
    ref_hidden = problem.normal(2, 6, HIDDEN).float()
    lora = (problem.normal(2, HIDDEN).float(), problem.normal(VOCABULARY, 2).float(), 0.5) if with_lora else None
    options = {"ref_hidden": ref_hidden, "lora": lora}
    losses = []
    for operands in ((head, bias), (sharded(head, dim), sharded(bias))):
        hidden = problem.hidden.view(2, 6, HIDDEN).clone().requires_grad_()
        with Collectives() as counts:
            loss = sentence_dpo_loss(hidden, operands[0], layout, bias=operands[1], **options).loss
            loss.backward()
        losses.append((loss.detach(), hidden.grad))
    return losses, counts  # those of the second


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_one_gather_for_policy_and_reference(ranks, dim, with_lora):
    for (plain, from_shards), counts in ranks.run(loss_of_a_frozen_head, dim, with_lora):
        assert all(torch.equal(a, b) for a, b in zip(plain, from_shards, strict=True))
        assert counts == {"all_gather_into_tensor": 2}, "weight and bias"


def trainable_without_gather_head() -> list[str]:
    problem = Problem(TOKENS, VOCABULARY, HIDDEN, torch.float32)
    whole = {"head": problem.head, "bias": problem.bias}
    messages = []
    for name in whole:
        operands = {**whole, name: sharded(whole[name], requires_grad=True)}
        messages.append(error_of(linear_logps, problem.hidden, targets=problem.targets, **operands))
        with torch.no_grad():  # an evaluation wants no gradient
            linear_logps(problem.hidden, targets=problem.targets, **operands)
    a, b = problem.normal(2, HIDDEN).float(), problem.normal(VOCABULARY, 2).float()
    for lora in ((sharded(a, requires_grad=True), b, 1.0), (a, sharded(b, requires_grad=True), 1.0)):
        messages.append(error_of(linear_logps, problem.hidden, problem.head, problem.targets, lora=lora))
    frozen = (sharded(a), sharded(b), 1.0)
    torch.testing.assert_close(
        linear_logps(problem.hidden, problem.head, problem.targets, lora=frozen),
        linear_logps(problem.hidden, problem.head, problem.targets, lora=(a, b, 1.0)),
    )
    return messages


def test_a_trainable_shard_must_be_gathered_by_its_owner(ranks):
    for messages in ranks.run(trainable_without_gather_head):
        for name, message in zip(("head", "bias", "lora's A", "lora's B"), messages, strict=True):
            assert f"{name} is a DTensor that requires a gradient: pass gather_head({name})" in message


# --- tensor parallel: all processes the same tokens ---


def train_rows(size: int, trainable: bool) -> Any:
    problem = Problem(TOKENS, size, HIDDEN, torch.float32)
    head, bias = (sharded(t, requires_grad=trainable) for t in (problem.head, problem.bias))
    hidden = problem.hidden.requires_grad_()
    rows, shard = VocabularyShard.of(head)
    with Collectives() as counts:
        logps = linear_logps(hidden, rows, problem.targets, bias=bias.to_local(), vocabulary=shard)
        logps.backward(problem.upstream.to(logps))
    gradients = [None if t.grad is None else t.grad.full_tensor().double() for t in (head, bias)]
    return logps.detach().double(), [hidden.grad.double(), *gradients], (shard.start, shard.stop), counts


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("size", [3, 12, 37])
def test_the_rows_of_a_tensor_parallel_head(ranks, size, trainable):
    problem = Problem(TOKENS, size, HIDDEN, torch.float32)
    results = ranks.run(train_rows, size, trainable)
    for logps, gradients, _, counts in results:
        check_logps(problem, logps)
        assert (gradients[1] is not None) == (gradients[2] is not None) == trainable
        check_gradients(problem, gradients)
        assert not counts, "no DTensor's collective: rows are used where they lie"
    bounds = [0, *(stop for *_, (_, stop), _ in results)]
    assert [start for *_, (start, _), _ in results] == bounds[:-1]
    assert bounds[-1] == size


def tensor_parallel_errors() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    head = torch.randn(VOCABULARY, HIDDEN)
    ranks = dist.get_world_size()
    two_dimensions = init_device_mesh("cpu", (1, ranks))
    problem = Problem(TOKENS, VOCABULARY, HIDDEN, torch.float32)
    _, shard = VocabularyShard.of(sharded(head))
    return [
        error_of(VocabularyShard.of, head),
        error_of(VocabularyShard.of, sharded(head, 1)),
        error_of(VocabularyShard.of, distribute_tensor(head, mesh_of_all(), [Replicate()])),
        error_of(VocabularyShard.of, distribute_tensor(head, two_dimensions, [Replicate(), Shard(0)])),
        error_of(VocabularyShard.of, sharded(head[: ranks - 1])),
        error_of(gather_head, head),
        error_of(gather_head, sharded(head), "average"),
        error_of(linear_logps, problem.hidden, sharded(head), problem.targets, vocabulary=shard),
    ]


def test_errors(ranks):
    results = ranks.run(tensor_parallel_errors)
    assert all(messages == results[0] for messages in results), "the same in every process"
    expected = [
        "takes a DTensor, got a Tensor",
        "placed as (Shard(dim=1),) on a mesh of 1 dimensions",
        "placed as (Replicate(),)",
        "on a mesh of 2 dimensions",
        f"{ranks.size - 1} rows in shards of 1 leave the last of {ranks.size} processes none",
        "gather_head takes a DTensor, got a Tensor",
        "grad is 'average'; choose mean or sum",
        "head is a DTensor: with a VocabularyShard pass its rows",
    ]
    for message, part in zip(results[0], expected, strict=True):
        assert part in message
