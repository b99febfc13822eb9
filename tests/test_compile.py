"""torch.compile and the dispatcher: whole graphs, one recompile when N first changes, ops that keep their promises.

The backend aot_eager traces forward and backward through the fakes and runs the ops as they are: it shows what these
tests are about without minutes of code generation.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from strategies import Ragged, make_ragged

from aspo_kernels import linear_logps, sentence_dpo_loss, sentence_dpo_loss_from_logits
from aspo_kernels.head import head_grads, head_logps, scaled_rows

V, H = 11, 6


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def counting(function):
    """`function` compiled as one graph, and the counter of its compilations."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["stored", "recompute"])
def test_linear_logps(trainable, budget):
    compiled, counter = counting(lambda x, w, y: linear_logps(x, w, y, memory_budget=budget, softcap=5.0))
    for tokens in (5, 6, 9, 17):
        x, w = torch.randn(tokens, H, requires_grad=True), torch.randn(V, H, requires_grad=trainable)
        y, g = torch.randint(V, (tokens,)), torch.randn(tokens)
        results = []
        for function in (compiled, lambda x, w, y: linear_logps(x, w, y, memory_budget=budget, softcap=5.0)):
            logps = function(x, w, y)
            inputs = (x, w) if trainable else (x,)
            results.append([logps, *torch.autograd.grad(logps, inputs, g)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2, "one graph, and one more when N first changes"


def test_crossing_the_memory_budget_is_another_graph():
    """Which schedule a trainable head takes depends on N: one more graph where N x V stops fitting, and no further."""
    compiled, counter = counting(lambda x, w, y: linear_logps(x, w, y, memory_budget=4 * V * 8))
    for tokens in (5, 6, 8, 9, 17, 7, 20):
        x, w = torch.randn(tokens, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        compiled(x, w, torch.randint(V, (tokens,))).sum().backward()
    assert counter.frame_count == 3


def batch(seed: int, sentences: int) -> Ragged:
    generator = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 6, (sentences,), generator=generator).tolist() for _ in range(4)]
    return make_ragged(lengths, V, seed)


@pytest.mark.parametrize("from_logits", [False, True], ids=["hidden", "logits"])
def test_sentence_dpo_loss(from_logits):
    """The whole loss, with N, S and T changing from batch to batch."""
    head = torch.randn(V, H)

    def step(x, ref_x, layout, similarity):
        if from_logits:
            return sentence_dpo_loss_from_logits(
                x @ head.T, layout, ref_logits=ref_x @ head.T, similarity=similarity
            ).loss
        return sentence_dpo_loss(x, head, layout, ref_hidden=ref_x, similarity=similarity).loss

    compiled, counter = counting(step)
    for seed, sentences in enumerate((3, 4, 5, 7)):
        ragged = batch(seed, sentences)
        generator = ragged.generator()
        x, ref_x = (ragged.hidden(H, generator, torch.float32) for _ in range(2))
        x.requires_grad_()
        inputs = (x, ref_x, ragged.layout(), ragged.similarity(generator))
        got, expected = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])
    assert counter.frame_count <= 2, "one graph, and one more when N first changes"


OPTIONS = (1.0, None, 1.0, "torch")


@pytest.mark.parametrize("keep", ["nothing", "exps", "inputs"])
@pytest.mark.parametrize("reference", [False, True], ids=["policy", "policy and reference"])
def test_the_op_keeps_its_promises(keep, reference):
    """Schema, autograd registration and fake agree with what the op does (torch.library.opcheck)."""
    x = torch.randn(5, H, requires_grad=True)
    w, bias = torch.randn(V, H, requires_grad=keep != "nothing"), torch.randn(V, requires_grad=keep != "nothing")
    ref_x = torch.randn(5, H) if reference else None
    arguments = (x, ref_x, w, bias, None, torch.randint(V, (5,)), *OPTIONS, True, keep, 0, None)
    torch.library.opcheck(head_logps, arguments)


def test_the_backward_ops_keep_their_promises():
    x, w, g, y = torch.randn(5, H), torch.randn(V, H), torch.randn(5), torch.randint(V, (5,))
    torch.library.opcheck(scaled_rows, (x, g, torch.bfloat16))
    _, _, _, statistics, exps = head_logps(x, None, w, None, None, y, *OPTIONS, False, "exps", 0, None)
    needs = (0, True, True, False)  # no LoRA; the head and a bias
    torch.library.opcheck(head_grads, (g, x, statistics, exps, None, None, None, None, *needs, *OPTIONS, 0))
    torch.library.opcheck(head_grads, (g, x, statistics, None, y, w, None, None, *needs, *OPTIONS, 0))


def test_a_captured_loss_inside_autocast():
    """Under autocast the compiled loss casts hidden states and head as the plain one does."""
    x, w = torch.randn(7, H, requires_grad=True), torch.randn(V, H)
    y = torch.randint(V, (7,))
    compiled, _ = counting(lambda x: linear_logps(x, w, y))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = compiled(x), linear_logps(x, w, y)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
