"""A cut sequence beside what else may be spread, on meshes of 2 x 2 gloo processes: the head's rows, FSDP2's storage.

Against one process with the whole batch, in fp64 (vocabulary) and fp32 (FSDP). And the example, as users start it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import Policy
from ranks import Ranks
from test_sequence_parallel import EXACT, HIDDEN, VOCABULARY, Case, noise
from torch import Tensor

from aspo_kernels import SentenceLayout, SequenceShard, gather_head, linear_logps_pair, objectives, sentence_dpo_loss
from aspo_kernels.vocabulary import VocabularyShard

# torch.distributed.fsdp and .tensor take seconds to import: only in the processes, which have them already.

PIECES = {"even": (range(8), range(8, 16)), "uneven": (range(13), range(13, 16)), "none": (range(16), range(0))}
BATCHES, ROWS, LENGTH = 2, 4, 10


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    processes = Ranks(4)
    yield processes
    processes.close()


def mesh_of(*names: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


# --- the head's rows ---


def rows_of_the_head(head: Tensor, mesh: Any) -> tuple[Any, Tensor, VocabularyShard]:
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = distribute_tensor(head, mesh, [Shard(0)]).detach().requires_grad_()
    return whole, *VocabularyShard.of(whole)


def loss_on_a_mesh(split: str, objective: str) -> Any:
    """The loss, d hidden of own columns, and d head of own rows, summed over the processes that have them."""
    mesh, case = mesh_of("sequence", "vocabulary"), Case.usual()
    columns = torch.tensor(PIECES[split][mesh.get_local_rank("sequence")], dtype=torch.int64)
    shard = case.shard(columns, group=mesh.get_group("sequence"))
    head, rows, vocabulary = rows_of_the_head(case.head, mesh["vocabulary"])
    hidden = case.hidden[:, columns].clone().requires_grad_()
    loss = loss_of(case, hidden, case.ref_hidden[:, columns], rows, objective, shard, vocabulary)
    loss.backward()
    d_head = head.grad.to_local().clone()
    torch.distributed.all_reduce(d_head, group=mesh.get_group("sequence"))
    return loss.detach(), hidden.grad, d_head, columns, (vocabulary.start, vocabulary.stop)


def loss_of(
    case: Case, hidden: Tensor, ref_hidden: Tensor, head: Tensor, objective: str,
    shard: SequenceShard | None, vocabulary: VocabularyShard | None,
) -> Tensor:  # fmt: skip
    if objective == "aspo":
        return sentence_dpo_loss(
            hidden, head, case.layout, ref_hidden=ref_hidden, similarity=case.similarity, sequence=shard,
            vocabulary=vocabulary, validate=True,
        ).loss  # fmt: skip
    if shard is None:
        hidden, ref_hidden = (x.flatten(0, 1)[case.layout.hidden_index] for x in (hidden, ref_hidden))
        both = linear_logps_pair(hidden, ref_hidden, head, case.layout.targets)
    else:
        with shard.together(layout=case.layout):
            hidden, ref_hidden = shard.local_rows(hidden), shard.local_rows(ref_hidden)
            both = linear_logps_pair(
                hidden, ref_hidden, head, shard.local(case.layout.targets), vocabulary=vocabulary, memory_budget=0
            )
        both = shard.whole(*both)
    return objectives.get(objective)(objectives.Inputs(case.layout, *both)).losses.mean()


@pytest.mark.parametrize("objective", ["aspo", "dpo", "ipo", "simpo"])
def test_sequence_by_vocabulary(four, objective):
    case = Case.usual()
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    expected = loss_of(case, hidden, case.ref_hidden, head, objective, None, None)
    expected.backward()
    for split in PIECES:
        results = four.run(loss_on_a_mesh, split, objective)
        for loss, d_hidden, d_head, columns, (start, stop) in results:
            assert torch.equal(loss, results[0][0]), "the same bits in all four"
            torch.testing.assert_close(loss, expected.detach(), **EXACT)
            torch.testing.assert_close(d_hidden, hidden.grad[:, columns], **EXACT)
            torch.testing.assert_close(d_head, head.grad[start:stop], **EXACT)


# --- heads stored by FSDP2 ---


def batch_of(index: int) -> tuple[Tensor, SentenceLayout, Tensor, Tensor]:
    """Inputs (R, T, 5), the layout, cached reference log-probabilities and similarities of one of the batches."""
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(index))
    labels[:, : 2 + index] = -100
    layout = SentenceLayout.from_labels(labels, (torch.arange(LENGTH) >= 6).long().expand_as(labels))
    ref_logps = noise(layout.num_tokens, seed=index, dtype=torch.float32) - 3
    similarity = noise(layout.chosen_sentences.numel(), seed=index + 10, dtype=torch.float32)
    return noise(ROWS, LENGTH, 5, seed=index + 20, dtype=torch.float32), layout, ref_logps, similarity


def train_one_step(storage: str, frozen: bool) -> Any:
    """Each row of the mesh has a batch, each column a part of every sequence."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of("data", "sequence")
    # As accelerate does, cut over data and sequence; or HSDP: copied over the first, cut over the second.
    stored = mesh["data", "sequence"]._flatten("data_sequence") if storage == "flat" else mesh
    policy = Policy(HIDDEN, VOCABULARY, bias=False)
    policy.head.requires_grad_(not frozen)
    fully_shard(policy.head, mesh=stored)
    fully_shard(policy, mesh=stored)
    x, layout, ref_logps, similarity = batch_of(mesh.get_local_rank("data"))
    columns = torch.arange(LENGTH)[: LENGTH - 3] if mesh.get_local_rank("sequence") == 0 else torch.arange(LENGTH)[-3:]
    shard = SequenceShard.of_columns(
        layout.hidden_index, (ROWS, LENGTH), columns, mesh.get_group("sequence"), grad="mean"
    )
    hidden = policy(x[:, columns])
    head = policy.head.weight if frozen else gather_head(policy.head.weight)
    out = sentence_dpo_loss(hidden, head, layout, ref_logps=ref_logps, similarity=similarity, sequence=shard)
    out.loss.backward()
    return out.loss.detach(), {k: p.grad.full_tensor() for k, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("storage", "frozen"), list(product(["flat", "hybrid"], [True, False])))
def test_fsdp_trains_as_one_process_does(four, storage, frozen):
    policy = Policy(HIDDEN, VOCABULARY, bias=False)
    policy.head.requires_grad_(not frozen)
    losses = []
    for index in range(BATCHES):
        x, layout, ref_logps, similarity = batch_of(index)
        out = sentence_dpo_loss(policy(x), policy.head.weight, layout, ref_logps=ref_logps, similarity=similarity)
        losses.append(out.loss)
    (sum(losses) / BATCHES).backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    for rank, (loss, got) in enumerate(four.run(train_one_step, storage, frozen)):
        torch.testing.assert_close(loss, losses[rank // 2].detach(), rtol=1e-5, atol=1e-6)
        assert got.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(got[name], gradient, rtol=2e-5, atol=1e-6)


# --- the docs and the example ---


def run_docs(code: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("init_process_group", "destroy_process_group"):
            patch.setattr(torch.distributed, name, lambda *_: None)
        exec(code, {"__name__": "__main__"})


def test_the_docs_run(four):
    """The sections of this page that are about the loss, one after the other in four processes."""
    text = (Path(__file__).parents[1] / "docs" / "parallel.md").read_text()
    sections = re.findall(r"^(## [^\n]+\n.*?)(?=^## |\Z)", text, flags=re.S | re.M)
    names = ("Long sequences", "A head spread over processes", "Both, on a mesh", "A head that FSDP2 stores")
    told = [section for section in sections if section.startswith(tuple(f"## {name}\n" for name in names))]
    blocks = [block for section in told for block in re.findall(r"```python\n(.*?)```", section, flags=re.S)]
    assert len(told) == 4 and len(blocks) == 5
    four.run(run_docs, "\n".join(blocks))


def test_the_example():
    example = Path(__file__).parents[1] / "examples" / "sequence_parallel.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(example)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "cut over 2 processes" in done.stdout
    assert "the weights moved by up to" in done.stdout
