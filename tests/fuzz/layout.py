"""aspo_kernels/layout.py: labels and sentence ids, bare tensors, capacities."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from aspo_kernels import SentenceLayout
from aspo_kernels.layout import IGNORE_INDEX

from .guard import refusal

INTEGERS = ("int64", "int64", "int64", "int32", "int16", "uint8")
DTYPES = (*INTEGERS, "bool", "float32", "complex64")
EXTREME = st.sampled_from((-1, -100, -101, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)))
SMALL = st.integers(0, 6)
LABEL = st.sampled_from((-100, -100, 0, 1, 2, 7)) | SMALL
NUMBER = st.one_of(SMALL, SMALL, SMALL, EXTREME)
ROWS = st.integers(0, 5).flatmap(
    lambda width: st.lists(
        st.lists(st.one_of(LABEL, LABEL, LABEL, EXTREME), min_size=width, max_size=width), max_size=6
    )
)


@st.composite
def _labelled(draw: st.DrawFn) -> dict[str, Any]:
    """Labels with ids that are right, but for some that are changed."""
    labels = draw(ROWS)
    ids = []
    for row in labels:
        at, made = 0, []
        for label in row:
            made.append(at if label != IGNORE_INDEX else draw(NUMBER))
            at += label != IGNORE_INDEX and draw(st.booleans())
        ids.append(made)
    for row in ids:
        if row and draw(st.integers(0, 9)) == 0:
            row[draw(st.integers(0, len(row) - 1))] = draw(NUMBER)
    several = draw(st.booleans())
    vector = (
        st.lists(NUMBER, min_size=len(labels), max_size=len(labels))
        if draw(st.booleans())
        else st.lists(NUMBER, max_size=6)
    )
    return {
        "kind": "labels",
        "labels": labels,
        "ids": ids,
        "dtypes": draw(st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)).map(list))
        if draw(st.booleans())
        else ["int64", "int64"],
        "eos": draw(st.none() | NUMBER),
        "group": draw(vector) if several else None,
        "role": draw(vector) if several else None,
        "capacity": draw(st.lists(st.integers(-1, 40), min_size=3, max_size=3)),
    }


VECTOR = st.lists(NUMBER, max_size=8)
ORDERED = st.lists(SMALL, max_size=8).map(lambda steps: [sum(steps[:n]) for n in range(len(steps) + 1)])
FIELDS = st.fixed_dictionaries(
    {
        "kind": st.just("fields"),
        "targets": VECTOR,
        "hidden_index": VECTOR,
        "sentence_offsets": ORDERED | VECTOR,
        "response_offsets": ORDERED | VECTOR,
        "group": VECTOR,
        "role": VECTOR,
        "mask": st.none() | st.lists(st.booleans(), max_size=8),
        "dtype": st.sampled_from(("int64",) * 6 + DTYPES),
        "capacity": st.lists(st.integers(-1, 40), min_size=3, max_size=3),
    }
)


@st.composite
def _fitting(draw: st.DrawFn) -> dict[str, Any]:
    """Fields whose lengths fit together, some entries wrong."""
    lengths = draw(st.lists(st.lists(st.integers(1, 3), max_size=3), max_size=4))
    sentences = [n for response in lengths for n in response]
    tokens = sum(sentences)
    made = {
        "targets": [draw(SMALL) for _ in range(tokens)],
        "hidden_index": [draw(SMALL) for _ in range(tokens)],
        "sentence_offsets": [sum(sentences[:n]) for n in range(len(sentences) + 1)],
        "response_offsets": [sum(map(len, lengths[:n])) for n in range(len(lengths) + 1)],
        "group": [draw(st.integers(0, 2)) for _ in lengths],
        "role": [draw(st.integers(0, 2)) for _ in lengths],
    }
    for name, values in made.items():
        if values and draw(st.integers(0, 9)) == 0:
            values[draw(st.integers(0, len(values) - 1))] = draw(NUMBER)
            if name == "role" and draw(st.booleans()):
                values.append(draw(NUMBER))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    capacity = draw(st.lists(st.integers(-1, 40), min_size=3, max_size=3))
    return {"kind": "fields", **made, "mask": mask, "dtype": "int64", "capacity": capacity}


INPUTS = _labelled() | _fitting() | FIELDS


def check(value: Any) -> None:
    """A layout that agrees with itself, or a ValueError."""
    layout = None
    with refusal():
        layout = _from_labels(value) if value["kind"] == "labels" else _from_fields(value)
    if layout is None:
        return
    _check(layout)
    with refusal():
        names = ("tokens", "sentences", "chosen_sentences")
        wider = layout.padded_to(**dict(zip(names, value["capacity"], strict=True)))
        wider.validate()
        assert wider.used_sizes() == layout.used_sizes()
        assert torch.equal(wider.targets[: layout.num_tokens], layout.targets)
        wider.padded_to(
            tokens=wider.num_tokens, sentences=wider.num_sentences + 1, chosen_sentences=wider.chosen_sentences.numel()
        )
    with refusal():
        static = layout.padded_to(tokens=40, sentences=41, chosen_sentences=40)
        static.copy_(layout.padded_to(tokens=40, sentences=41, chosen_sentences=40))


def _tensor(values: Any, dtype: str) -> Tensor:
    """What torch cannot hold in a type is left in int64: making the tensor is the caller's part."""
    try:
        return torch.tensor(values, dtype=getattr(torch, dtype))
    except (RuntimeError, TypeError, OverflowError):
        return torch.tensor(values, dtype=torch.int64)


def _from_labels(value: Any) -> SentenceLayout:
    width = len(value["labels"][0]) if value["labels"] else 0
    labels, ids = (
        _tensor(value[name], dtype).reshape(len(value["labels"]), width)
        for name, dtype in zip(("labels", "ids"), value["dtypes"], strict=True)
    )
    group, role = (
        None if value[name] is None else torch.tensor(value[name], dtype=torch.int64) for name in ("group", "role")
    )
    layout = SentenceLayout.from_labels(labels, ids, value["eos"], group=group, role=role)
    counted = [token for row in labels.tolist() for token in row if token != IGNORE_INDEX]
    assert layout.targets.tolist() == counted
    assert layout.hidden_index.tolist() == [
        n for n, token in enumerate(labels.flatten().tolist()) if token != IGNORE_INDEX
    ]
    return layout


def _from_fields(value: Any) -> SentenceLayout:
    names = ("targets", "hidden_index", "sentence_offsets", "response_offsets", "group", "role")
    made = {name: _tensor(value[name], value["dtype"]) for name in names}
    mask = None if value["mask"] is None else torch.tensor(value["mask"], dtype=torch.bool)
    return SentenceLayout(**made, perplexity_mask=mask)


def _check(layout: SentenceLayout) -> None:
    """Everything derived, computed again in plain Python."""
    sentences, responses = layout.sentence_offsets.tolist(), layout.response_offsets.tolist()
    group, role = layout.group.tolist(), layout.role.tolist()
    assert sentences[0] == responses[0] == 0
    assert sentences == sorted(set(sentences)), "an empty sentence"
    assert responses == sorted(responses)
    assert sentences[-1] == layout.num_tokens and responses[-1] == layout.num_sentences
    assert min([0, *layout.targets.tolist(), *layout.hidden_index.tolist()]) >= 0
    assert layout.hidden_rows == max([-1, *layout.hidden_index.tolist()]) + 1
    assert sorted(g for g, r in zip(group, role, strict=True) if r == 0) == list(range(layout.num_items))
    spans = list(pairwise(responses))
    assert layout.empty_responses == tuple((group[n], role[n]) for n, (a, b) in enumerate(spans) if a == b)
    chosen = {group[n]: list(range(a, b)) for n, (a, b) in enumerate(spans) if role[n] == 0}
    starts, listed = layout.chosen_starts.tolist(), layout.chosen_sentences.tolist()
    assert len(listed) == sum(map(len, chosen.values()))
    for item, own in chosen.items():
        assert listed[starts[item] : starts[item] + len(own)] == own
    for number in range(len(layout.role_responses) + 1):
        with refusal("role"):
            rows = layout.with_role(number).tolist()
            assert [group[n] for n in rows] == list(range(layout.num_items))
            assert all(role[n] == number for n in rows)
