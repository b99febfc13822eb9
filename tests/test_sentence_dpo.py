"""sentence_dpo_loss from hidden states to the loss, end to end against the oracle, and all its errors."""

from __future__ import annotations

import dataclasses
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Ragged, make_ragged, ragged_batches
from torch import Tensor

from aspo_kernels import (
    SentenceLayout,
    gather_hidden,
    linear_logps,
    reference,
    sentence_dpo_loss,
    sentence_dpo_loss_from_logits,
)

WIDTH = 6
LENGTHS = [[2, 1, 3], [1, 4], [3, 3], [5]]  # two pairs


@dataclasses.dataclass
class Case:
    """One batch with everything a call needs; hidden states are (R, T, H)."""

    layout: SentenceLayout
    hidden: Tensor
    ref_hidden: Tensor
    head: Tensor
    ref_head: Tensor
    bias: Tensor
    similarity: Tensor


def case_of(batch: Ragged, dtype: torch.dtype = torch.float64) -> Case:
    generator = batch.generator()
    hidden, ref_hidden = (batch.hidden(WIDTH, generator, dtype) for _ in range(2))
    shape = (batch.vocabulary, WIDTH)
    head, ref_head = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    bias = torch.randn(batch.vocabulary, generator=generator, dtype=torch.float64).to(dtype)
    return Case(batch.layout(), hidden, ref_hidden, head, ref_head, bias, batch.similarity(generator))


@pytest.fixture
def case() -> Case:
    return case_of(make_ragged(LENGTHS, 9, 4))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def oracle(case: Case, hidden: Tensor, head: Tensor, bias: Tensor, epilogue: dict, options: dict) -> dict[str, Tensor]:
    """The whole method in the oracle's plain torch."""
    index, targets = case.layout.hidden_index, case.layout.targets
    logps = reference.linear_logps(hidden.flatten(0, 1)[index], head, targets, bias, **epilogue)
    ref_rows = case.ref_hidden.flatten(0, 1)[index]
    ref_logps = reference.linear_logps(ref_rows, case.ref_head, targets, case.bias, **epilogue)
    out = reference.aspo_loss(logps, ref_logps, case.layout, case.similarity, **options)
    h = torch.stack(reference.response_sums(logps - ref_logps, case.layout))
    beta = options["beta"]
    rewards = {
        "chosen_rewards": beta * h[case.layout.with_role(0)],
        "rejected_rewards": beta * h[case.layout.with_role(1)],
    }
    return {**out, **rewards, "loss": out["losses"].mean(), "logps": logps}


@given(
    batch=ragged_batches(),
    normalizer=st.sampled_from(["sentence", "token", "none", "reward"]),
    perplexity=st.sampled_from(["policy", "reference"]),
    scale=st.sampled_from(["ppl", "nll"]),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    epilogue=st.sampled_from([{}, {"logit_scale": 0.7, "temperature": 1.4}, {"softcap": 3.0}]),
    memory_budget=st.sampled_from([None, 0]),
)
def test_matches_the_oracle_end_to_end(batch, normalizer, perplexity, scale, alpha, epilogue, memory_budget):
    case = case_of(batch)
    options: dict[str, Any] = {
        "beta": 0.3,
        "alpha": alpha,
        "normalizer": normalizer,
        "perplexity": perplexity,
        "perplexity_scale": scale,
    }
    ours, theirs = leaves(case.hidden, case.head, case.bias), leaves(case.hidden, case.head, case.bias)
    out = sentence_dpo_loss(
        ours[0],
        ours[1],
        case.layout,
        ref_hidden=case.ref_hidden,
        ref_head=case.ref_head,
        ref_bias=case.bias,
        similarity=case.similarity,
        bias=ours[2],
        memory_budget=memory_budget,
        **options,
        **epilogue,
    )
    expected = oracle(case, *theirs, epilogue, options)
    for name in (
        "loss",
        "margins",
        "chosen_rewards",
        "rejected_rewards",
        "sentence_weights",
        "sentence_logratios",
        "logps",
    ):
        torch.testing.assert_close(getattr(out, name).detach(), expected[name].detach(), rtol=1e-9, atol=1e-9)
    assert (out.reward_fallback_share is not None) == (normalizer == "reward")
    out.loss.backward()
    expected["loss"].backward()
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_budget", [None, 0])
def test_narrow_dtypes(dtype, memory_budget):
    """Operands are exact in fp64, so that the loss keeps fp32's digits; gradients those of the dtype."""
    case = case_of(make_ragged(LENGTHS, 9, 4), dtype)
    wide = Case(
        case.layout,
        *(t.double() for t in (case.hidden, case.ref_hidden, case.head, case.ref_head, case.bias)),
        case.similarity,
    )
    options = {"beta": 0.1, "alpha": 0.5, "normalizer": "sentence", "perplexity": "policy", "perplexity_scale": "ppl"}
    ours, theirs = leaves(case.hidden, case.head), leaves(wide.hidden, wide.head)
    out = sentence_dpo_loss(
        *ours, case.layout, ref_hidden=case.ref_hidden, ref_head=case.ref_head, ref_bias=case.bias, bias=case.bias,
        similarity=case.similarity, memory_budget=memory_budget,
    )  # fmt: skip
    expected = oracle(wide, *theirs, wide.bias, {}, options)
    assert out.loss.dtype == out.logps.dtype == out.sentence_weights.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), expected["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.sentence_weights.double(), expected["sentence_weights"], rtol=1e-4, atol=1e-5)
    out.loss.backward()
    expected["loss"].backward()
    for got, want in zip(ours, theirs, strict=True):
        assert got.grad.dtype == dtype
        error = (got.grad.double() - want.grad).norm() / want.grad.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


def call(case: Case, hidden: Tensor | None = None, head: Tensor | None = None, **options):
    options = {"ref_hidden": case.ref_hidden, "similarity": case.similarity, **options}
    return sentence_dpo_loss(
        case.hidden if hidden is None else hidden, case.head if head is None else head, case.layout, **options
    )


def same(a, b) -> None:
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_padded_and_gathered_hidden_states_are_the_same(case):
    padded, gathered = leaves(case.hidden)[0], leaves(gather_hidden(case.hidden, case.layout))[0]
    ref_gathered = gather_hidden(case.ref_hidden, case.layout)
    from_padded, from_gathered = call(case, padded), call(case, gathered, ref_hidden=ref_gathered)
    same(from_padded, from_gathered)
    same(from_padded, call(case, padded, ref_hidden=ref_gathered))
    from_padded.loss.backward()
    from_gathered.loss.backward()
    torch.testing.assert_close(gather_hidden(padded.grad, case.layout), gathered.grad)
    counted = torch.zeros(padded.shape[:2], dtype=torch.bool).view(-1).index_fill(0, case.layout.hidden_index, True)
    assert not padded.grad.flatten(0, 1)[~counted].any(), "prompt and padding get exactly no gradient"


def test_uncounted_positions_are_never_read(case):
    """NaN in the prompt or the padding changes nothing and never reaches a gradient."""
    counted = (
        torch.zeros(case.hidden.shape[:2], dtype=torch.bool).view(-1).index_fill(0, case.layout.hidden_index, True)
    )
    holed = case.hidden.clone()
    holed.flatten(0, 1)[~counted] = float("nan")
    leaf = leaves(holed)[0]
    out = call(case, leaf)
    same(out, call(case))
    out.loss.backward()
    assert torch.isfinite(leaf.grad).all()


def test_duplicates_in_hidden_index_sum_their_gradients(case):
    """With a shared prefix one row predicts the first token of both responses."""
    layout, generator = case.layout, torch.Generator().manual_seed(0)
    shared = layout.hidden_index.clone()
    first_of_rejected = int(layout.response_token_offsets[2])
    shared[first_of_rejected] = shared[0]
    fields = {n: getattr(layout, n) for n in ("targets", "sentence_offsets", "response_offsets", "group", "role")}
    layout = SentenceLayout(hidden_index=shared, **fields)
    hidden = leaves(torch.randn(case.hidden.shape, generator=generator, dtype=torch.float64))[0]
    rows = leaves(hidden.flatten(0, 1)[shared])[0]
    ref_logps = torch.full((layout.num_tokens,), -2.0)
    sentence_dpo_loss(hidden, case.head, layout, ref_logps=ref_logps).loss.backward()
    sentence_dpo_loss(rows, case.head, layout, ref_logps=ref_logps).loss.backward()
    at = int(shared[0])
    both = rows.grad[0] + rows.grad[first_of_rejected]
    torch.testing.assert_close(hidden.grad.flatten(0, 1)[at], both)
    assert both.abs().max() > 0


def test_where_the_reference_comes_from(case):
    """ref_hidden with its own head, with the policy's head, or its log-probabilities from a cache: the same numbers."""
    rows = gather_hidden(case.ref_hidden, case.layout)
    own = linear_logps(rows, case.ref_head, case.layout.targets)
    policys = linear_logps(rows, case.head, case.layout.targets)
    with_bias = linear_logps(rows, case.head, case.layout.targets, bias=case.bias)
    same(call(case, ref_head=case.ref_head), call(case, ref_hidden=None, ref_logps=own))
    same(call(case), call(case, ref_hidden=None, ref_logps=policys))
    same(call(case, bias=case.bias), call(case, bias=case.bias, ref_hidden=None, ref_logps=with_bias))
    # a reference head of its own brings its own bias, or none
    without = call(case, bias=case.bias, ref_head=case.ref_head)
    same(without, call(case, bias=case.bias, ref_hidden=None, ref_logps=own))
    cached = call(case, ref_hidden=None, ref_logps=policys.float())  # the cache is fp32
    torch.testing.assert_close(cached.loss, call(case).loss, rtol=1e-5, atol=1e-6)


def test_policy_equal_to_reference_is_ln_2(case):
    for normalizer in ("sentence", "token", "none", "reward"):
        out = call(case, ref_hidden=case.hidden, normalizer=normalizer)
        assert float(out.loss) == pytest.approx(math.log(2), abs=1e-12)
        assert not out.margins.any()
        assert not out.sentence_logratios.any()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_from_logits_is_the_same(case, temperature):
    hidden, logits_leaf = leaves(case.hidden, reference.logits(case.hidden, case.head))
    ref_logits = reference.logits(case.ref_hidden, case.ref_head)
    options = {"similarity": case.similarity, "normalizer": "reward", "temperature": temperature}
    from_hidden = call(case, hidden, ref_head=case.ref_head, **options)
    from_logits = sentence_dpo_loss_from_logits(logits_leaf, case.layout, ref_logits=ref_logits, **options)
    same(from_hidden, from_logits)
    from_hidden.loss.backward()
    from_logits.loss.backward()
    torch.testing.assert_close(logits_leaf.grad @ case.head, hidden.grad)
    ref_logps = reference.token_logps(
        (ref_logits / temperature).flatten(0, 1)[case.layout.hidden_index], case.layout.targets
    )
    same(from_logits, sentence_dpo_loss_from_logits(logits_leaf, case.layout, ref_logps=ref_logps, **options))


def test_from_logits_with_given_weights_in_place(case):
    """The weights that are given are those that are used, and a gradient written over the logits is the same one."""
    weights = torch.tensor([0.0, 0.3, 2.0, 0.7, 1.0], dtype=torch.float64)
    (hidden,) = leaves(case.hidden)
    from_hidden = call(case, hidden, ref_head=case.ref_head, sentence_weights=weights)
    from_hidden.loss.backward()
    ref_logits = reference.logits(case.ref_hidden, case.ref_head)
    for inplace in (False, True):
        (leaf,) = leaves(case.hidden)
        logits = reference.logits(leaf, case.head)
        before = logits.detach().clone()
        from_logits = sentence_dpo_loss_from_logits(
            logits, case.layout, ref_logits=ref_logits, sentence_weights=weights, inplace_backward=inplace,
            validate=True,
        )  # fmt: skip
        same(from_hidden, from_logits)
        assert torch.equal(from_logits.sentence_weights, weights)
        from_logits.loss.backward()
        torch.testing.assert_close(leaf.grad, hidden.grad)
        assert torch.equal(logits.detach(), before) != inplace, "the logits hold the gradient only where asked"


def test_from_logits_validates_where_asked(case):
    """A layout whose contents were broken after it was made."""
    logits = reference.logits(case.hidden, case.head)
    layout = dataclasses.replace(case.layout, padded_shape=None)
    layout.group[0] = 7
    with pytest.raises(ValueError, match="item 0 has 0 chosen responses"):
        sentence_dpo_loss_from_logits(logits, layout, ref_logits=logits, validate=True)


def test_the_reference_backend_is_the_same(case):
    same(call(case), call(case, backend="reference"))


def test_reductions(case):
    per_pair = call(case, reduction="none").loss
    assert per_pair.shape == (2,)
    torch.testing.assert_close(call(case).loss, per_pair.mean())
    torch.testing.assert_close(call(case, reduction="sum").loss, per_pair.sum())
    torch.testing.assert_close(per_pair, -torch.nn.functional.logsigmoid(call(case).margins))


def test_nothing_but_the_loss_carries_a_gradient(case):
    tensors = leaves(case.hidden, case.head, case.bias, case.ref_hidden, case.ref_head, case.bias, case.similarity)
    hidden, head, bias, ref_hidden, ref_head, ref_bias, similarity = tensors
    for normalizer in ("sentence", "reward"):
        out = sentence_dpo_loss(
            hidden, head, case.layout, bias=bias, ref_hidden=ref_hidden, ref_head=ref_head, ref_bias=ref_bias,
            similarity=similarity, normalizer=normalizer,
        )  # fmt: skip
        assert out.loss.requires_grad
        for f in dataclasses.fields(out):
            value = getattr(out, f.name)
            assert f.name == "loss" or value is None or not value.requires_grad, f.name
        out.loss.backward()
    assert all(t.grad is not None for t in (hidden, head, bias))
    assert all(t.grad is None for t in (ref_hidden, ref_head, ref_bias, similarity))
    # the policy's head serves the reference too: its gradient is the policy's alone
    alone, both = leaves(case.head, case.head)
    ref_logps = linear_logps(gather_hidden(case.ref_hidden, case.layout), case.head, case.layout.targets)
    call(case, head=alone, ref_hidden=None, ref_logps=ref_logps).loss.backward()
    call(case, head=both).loss.backward()
    torch.testing.assert_close(alone.grad, both.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalizer", ["sentence", "reward"])
def test_no_pairs_give_a_connected_zero(reduction, normalizer):
    layout = SentenceLayout.from_labels(torch.empty(0, 4).long(), torch.empty(0, 4).long())
    options = {"reduction": reduction, "normalizer": normalizer}
    hidden, head, logits = leaves(torch.empty(0, 4, 6), torch.randn(5, 6), torch.empty(0, 4, 5))
    out = sentence_dpo_loss(hidden, head, layout, ref_hidden=torch.empty(0, 4, 6), similarity=torch.empty(0), **options)
    from_logits = sentence_dpo_loss_from_logits(logits, layout, ref_logps=torch.empty(0), **options)
    for result in (out, from_logits):
        assert result.loss.shape == ((0,) if reduction == "none" else ())
        assert float(result.loss.detach().sum()) == 0
        result.loss.sum().backward()
        assert result.margins.shape == result.sentence_weights.shape == result.logps.shape == (0,)
        assert not result.margins.requires_grad
    assert hidden.grad.shape == hidden.shape
    assert not head.grad.any()
    assert logits.grad.shape == logits.shape


def test_step_in_bf16_autocast(case):
    """fp32 parameters under bf16 autocast, as accelerate runs it."""
    hidden, head = leaves(case.hidden.float(), case.head.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = call(case, hidden, head, ref_hidden=case.ref_hidden.float())
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert hidden.grad.dtype == head.grad.dtype == torch.float32
    narrow_leaves = leaves(case.hidden.bfloat16(), case.head.bfloat16())
    narrow = call(case, *narrow_leaves, ref_hidden=case.ref_hidden.bfloat16())
    assert torch.equal(out.loss, narrow.loss)


def test_the_plain_loop_learns(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "plain_loop.py"))
    losses = [float(line.split("loss ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.05


# --- errors ---

X = -100


def layout_with_empty(row: int) -> SentenceLayout:
    labels = torch.tensor([[1, 2], [3, X], [1, 1], [2, X]])
    labels[row] = X
    return SentenceLayout.from_labels(labels, torch.zeros(4, 2).long())


@pytest.mark.parametrize(("row", "name"), [(0, "pair 0: its chosen"), (3, "pair 1: its rejected")])
def test_empty_responses_name_the_pair(row, name):
    layout = layout_with_empty(row)
    hidden = torch.randn(4, 2, 6)
    with pytest.raises(ValueError, match=name + " response has no counted token; drop the pair"):
        sentence_dpo_loss(hidden, torch.randn(9, 6), layout, ref_hidden=hidden)
    with pytest.raises(ValueError, match=name):
        sentence_dpo_loss_from_logits(torch.randn(4, 2, 9), layout, ref_logits=torch.randn(4, 2, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, "reduction is 'avg'; choose one of mean, sum, none"),
        ({"beta": 0.0}, "beta is 0.0; it must be positive"),
        ({"alpha": -0.1}, r"alpha is -0.1; it must be in \[0, 1\]"),
        ({"normalizer": "x"}, "normalizer is 'x'"),
        ({"perplexity": "x"}, "perplexity is 'x'"),
        ({"perplexity_scale": "x"}, "perplexity_scale is 'x'"),
        ({"backend": "x"}, "backend is 'x'"),
        ({"memory_budget": -5}, "memory_budget is -5"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"ref_hidden": None}, "pass exactly one of ref_hidden or ref_logps"),
        ({"ref_logps": torch.zeros(17)}, "pass exactly one of ref_hidden or ref_logps"),
        ({"ref_hidden": None, "ref_logps": torch.zeros(17), "ref_head": torch.zeros(9, 6)}, "belong to ref_hidden"),
        ({"ref_hidden": None, "ref_logps": torch.zeros(17), "ref_bias": torch.zeros(9)}, "belong to ref_hidden"),
        ({"ref_hidden": None, "ref_logps": torch.zeros(16)}, r"ref_logps must be floating point \(22,\)"),
        ({"ref_hidden": torch.zeros(4, 3, 6)}, r"ref_hidden must be \(R, T, H\)|ref_hidden is \(4, 3, 6\)"),
        ({"similarity": torch.zeros(22)}, r"similarity must be floating point \(5,\)"),
        ({"similarity": torch.full((5,), math.inf)}, r"similarity\[0\] is inf"),
        ({"sentence_weights": torch.zeros(22)}, r"sentence_weights must be \(5,\), one for each chosen sentence"),
        ({"sentence_weights": torch.tensor([1, -0.5, 0, 0, 0])}, "sentence_weights holds -0.5; .* must be 0 or more"),
        ({"bias": torch.zeros(8).double()}, r"bias must be \(9,\)"),
    ],
)
def test_option_errors(case, options, message):
    with pytest.raises(ValueError, match=message):
        call(case, **options)


def test_a_reference_of_another_dtype_is_named(case):
    with pytest.raises(ValueError, match=r"ref_hidden is torch.float32 but its head torch.float64"):
        call(case, ref_hidden=case.ref_hidden.float())


def test_hidden_states_of_another_length_are_refused(case):
    """They would be read at the wrong rows: (R, T + 1) holds enough of them."""
    longer = torch.nn.functional.pad(case.hidden, (0, 0, 0, 1))
    with pytest.raises(ValueError, match=r"hidden is .* but the layout's labels were .* must be the same"):
        call(case, longer)
    with pytest.raises(ValueError, match=r"ref_hidden is .* but the layout's labels were"):
        call(case, ref_hidden=longer)
    with pytest.raises(ValueError, match=r"logits is .* but the layout's labels were"):
        sentence_dpo_loss_from_logits(reference.logits(longer, case.head), case.layout, ref_logps=torch.zeros(22))
    with pytest.raises(ValueError, match=r"hidden must be \(R, T, H\) with at least .* or \(22, H\) already gathered"):
        call(case, case.hidden[:, :2])
    with pytest.raises(ValueError, match="already gathered"):
        call(case, torch.randn(21, 6).double())


def test_devices(case):
    with pytest.raises(ValueError, match=r"the layout is on meta but hidden on cpu: use layout.to\(device\)"):
        sentence_dpo_loss(case.hidden, case.head, case.layout.to("meta"), ref_hidden=case.ref_hidden)
    with pytest.raises(ValueError, match="the layout is on meta but logits on cpu"):
        sentence_dpo_loss_from_logits(
            reference.logits(case.hidden, case.head), case.layout.to("meta"), ref_logps=torch.zeros(22)
        )


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.zeros(22, 9), {}, r"logits must be floating point \(R, T, V\)"),
        (torch.zeros(4, 30, 9).long(), {}, "got torch.int64"),
        (None, {"ref_logits": torch.zeros(4, 1, 9)}, "ref_logits must be"),
        (None, {"ref_logits": None}, "pass exactly one of ref_logits or ref_logps"),
        (None, {"temperature": 0.0}, "temperature is 0.0"),
        (None, {"beta": math.nan}, "beta is nan"),
        (None, {"reduction": ""}, "reduction is ''"),
    ],
)
def test_from_logits_errors(case, logits, options, message):
    good = reference.logits(case.hidden, case.head)
    with pytest.raises(ValueError, match=message):
        sentence_dpo_loss_from_logits(
            good if logits is None else logits, case.layout, **{"ref_logits": good, **options}
        )


def test_bad_values_are_seen(case):
    broken = case.hidden.clone()
    broken.flatten(0, 1)[case.layout.hidden_index[3]] = float("nan")
    with pytest.raises(ValueError, match="log-probability of token 3"):
        call(case, broken)
    with pytest.raises(ValueError, match=r"targets\[.*\] is .*, outside the vocabulary \[0, 2\)"):
        call(case, head=case.head[:2])
    layout = dataclasses.replace(case.layout, padded_shape=None)
    layout.group[0] = 7
    with pytest.raises(ValueError, match="item 0 has 0 chosen responses"):
        sentence_dpo_loss(case.hidden, case.head, layout, ref_hidden=case.hidden, validate=True)


# --- the Triton kernels, from hidden states to the loss ---


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("ref", ["same head", "other head", "cached"])
@pytest.mark.parametrize("normalizer", ["sentence", "reward"])
def test_triton_end_to_end(trainable, ref, normalizer, case, device):
    """Stacked, separate and cached references, then sentences, margin and gradient, against the fp64 oracle."""
    pytest.importorskip("triton")
    options: dict[str, Any] = {
        "beta": 0.3, "alpha": 0.5, "normalizer": normalizer, "perplexity": "policy", "perplexity_scale": "ppl",
    }  # fmt: skip
    if ref == "same head":
        case = dataclasses.replace(case, ref_head=case.head)
    truth = leaves(case.hidden, case.head, case.bias)
    expected = oracle(case, *truth, {}, options)
    expected["loss"].backward()

    wide = {
        f.name: getattr(case, f.name).to(device, torch.float32) for f in dataclasses.fields(case) if f.name != "layout"
    }
    layout = case.layout.to(device)
    hidden, head, bias = wide["hidden"].requires_grad_(), wide["head"], wide["bias"]
    if trainable:
        head.requires_grad_()
    reference_options: dict[str, Any] = {"ref_hidden": wide["ref_hidden"]}
    if ref == "other head":
        reference_options |= {"ref_head": wide["ref_head"], "ref_bias": bias}
    elif ref == "cached":
        rows = wide["ref_hidden"].flatten(0, 1)[layout.hidden_index]
        logps = linear_logps(rows, wide["ref_head"], layout.targets, bias=bias)
        reference_options = {"ref_logps": logps}
    out = sentence_dpo_loss(
        hidden, head, layout, similarity=wide["similarity"], bias=bias, backend="triton", **reference_options, **options
    )
    for name in ("loss", "margins", "chosen_rewards", "rejected_rewards", "sentence_weights", "sentence_logratios"):
        torch.testing.assert_close(
            getattr(out, name).detach().cpu().double(), expected[name].detach(), rtol=2e-5, atol=2e-5, msg=name
        )
    out.loss.backward()
    for got, want in zip((hidden, head)[: 1 + trainable], truth, strict=False):
        torch.testing.assert_close(got.grad.cpu().double(), want.grad, rtol=1e-4, atol=2e-6)


def test_a_stacked_reference_is_the_separate_one(case):
    """With its own copy of the head the reference is computed apart; with the same head, in the policy's pass."""
    stacked = sentence_dpo_loss(case.hidden, case.head, case.layout, ref_hidden=case.ref_hidden)
    apart = sentence_dpo_loss(
        case.hidden, case.head, case.layout, ref_hidden=case.ref_hidden, ref_head=case.head.clone()
    )
    same(stacked, apart)
