"""SentenceLayout: packed order, offsets, masks and every error, against a plain Python construction."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from strategies import EOS, Ragged, make_ragged, ragged_batches

from aspo_kernels import SentenceLayout

X = -100


def layout_of(labels: list[list[int]], ids: list[list[int]], **kwargs) -> SentenceLayout:
    return SentenceLayout.from_labels(torch.tensor(labels), torch.tensor(ids), **kwargs)


def fields_of(layout: SentenceLayout) -> dict[str, object]:
    names = ("targets", "hidden_index", "sentence_offsets", "response_offsets", "group", "role")
    return {name: getattr(layout, name) for name in names}


def test_from_labels_by_hand():
    layout = layout_of(
        [
            [X, 5, 6, X, 7, 8],  # chosen of pair 0: sentences (5 6) and (7 8), a hole between them
            [4, 4, X, X, X, X],  # chosen of pair 1: one sentence
            [X, X, X, X, 9, 2],  # rejected of pair 0
            [1, X, 3, X, 5, X],  # rejected of pair 1: three sentences of one token
        ],
        [
            [0, 0, 0, 0, 1, 1],
            [0, 0, 7, -3, 0, 0],  # read only where the label counts
            [9, 9, 9, 9, 0, 0],
            [0, 5, 1, 0, 2, 0],
        ],
    )
    assert layout.targets.tolist() == [5, 6, 7, 8, 4, 4, 9, 2, 1, 3, 5]
    assert layout.hidden_index.tolist() == [1, 2, 4, 5, 6, 7, 16, 17, 18, 20, 22]
    assert layout.sentence_offsets.tolist() == [0, 2, 4, 6, 8, 9, 10, 11]
    assert layout.response_offsets.tolist() == [0, 2, 3, 4, 7]
    assert layout.response_token_offsets.tolist() == [0, 4, 6, 8, 11]
    assert layout.group.tolist() == [0, 1, 0, 1]
    assert layout.role.tolist() == [0, 0, 1, 1]
    assert layout.chosen_sentences.tolist() == [0, 1, 2]
    assert layout.chosen_starts.tolist() == [0, 2]
    assert (layout.num_tokens, layout.num_sentences, layout.num_responses, layout.num_items) == (11, 7, 4, 2)
    assert layout.hidden_rows == 23
    assert layout.with_role(0).tolist() == [0, 1]
    assert layout.with_role(1).tolist() == [2, 3]
    assert layout.perplexity_mask is None


def naive(batch: Ragged) -> dict[str, list[int]]:
    """The same layout with nested loops over positions."""
    targets, index, sentence_offsets, response_offsets = [], [], [0], [0]
    width = batch.labels.shape[1]
    for r in range(batch.labels.shape[0]):
        before = None
        for t in range(width):
            label, sentence = int(batch.labels[r, t]), int(batch.sentence_ids[r, t])
            if label == X:
                continue
            if before is not None and sentence != before:
                sentence_offsets.append(len(targets))
            before = sentence
            targets.append(label)
            index.append(r * width + t)
        if before is not None:
            sentence_offsets.append(len(targets))
        response_offsets.append(len(sentence_offsets) - 1)
    pairs = batch.pairs
    return {
        "targets": targets,
        "hidden_index": index,
        "sentence_offsets": sentence_offsets,
        "response_offsets": response_offsets,
        "group": [*range(pairs), *range(pairs)],
        "role": [0] * pairs + [1] * pairs,
    }


@given(ragged_batches(min_sentences=0))
def test_from_labels_matches_nested_loops(batch: Ragged):
    layout = batch.layout()
    assert {name: value.tolist() for name, value in fields_of(layout).items()} == naive(batch)
    # and the lengths that were drawn come back
    tokens = layout.sentence_offsets.diff().split(layout.response_offsets.diff().tolist())
    assert tuple(tuple(row.tolist()) for row in tokens) == batch.lengths
    # hidden_index points at the labels themselves
    assert torch.equal(batch.labels.flatten()[layout.hidden_index], layout.targets)
    # made by hand from its own fields it is the same layout
    again = SentenceLayout(**fields_of(layout), perplexity_mask=layout.perplexity_mask)
    assert torch.equal(again.chosen_sentences, layout.chosen_sentences)
    assert again.empty_responses == layout.empty_responses


@given(ragged_batches())
def test_eos_mask_leaves_out_only_a_final_eos(batch: Ragged):
    layout = batch.layout(eos=True)
    expected = []
    for row in range(layout.num_responses):
        first, last = layout.response_offsets[row], layout.response_offsets[row + 1]
        offsets = layout.sentence_offsets[first : last + 1].tolist()
        mask = [True] * (offsets[-1] - offsets[0])
        if layout.targets[offsets[-1] - 1] == EOS and offsets[-1] - offsets[-2] > 1:
            mask[-1] = False
        expected += mask
    assert layout.perplexity_mask.tolist() == expected


def test_eos_that_is_all_of_its_sentence_stays():
    layout = layout_of([[5, EOS], [EOS, 5]], [[0, 1], [0, 0]], eos_token_id=EOS)
    assert layout.perplexity_mask.tolist() == [True, True, True, True]  # the second row's EOS is not at its end


@pytest.mark.parametrize(
    ("labels", "ids", "message"),
    [
        ([[1, 1, 1], [1, 1, 1]], [[0, 1, 0], [0, 0, 0]], r"sentence_ids\[0, 2\] = 0 goes backwards after 1"),
        ([[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 2]], r"sentence_ids\[1, 2\] = 2 leaves a gap after 0"),
        ([[1, 1], [X, 1]], [[0, 0], [0, 1]], r"sentence_ids\[1, 1\] = 1 is the first counted.*start at 0"),
        ([[1, 1], [1, 1]], [[-1, 0], [0, 0]], r"sentence_ids\[0, 0\] = -1 is the first counted"),
        ([[1, -7], [1, 1]], [[0, 0], [0, 0]], r"targets\[1\] is -7; it must not be negative"),
        ([[1, 1]], [[0, 0]], "labels has 1 rows: chosen and rejected"),
        ([[1, 1]], [[0]], r"labels and sentence_ids must be \(R, T\)"),
        ([1, 1], [0, 0], r"labels and sentence_ids must be \(R, T\)"),
        ([[1.0], [1.0]], [[0], [0]], "labels must hold integers, got torch.float32"),
        ([[1], [1]], [[0.0], [0.0]], "sentence_ids must hold integers, got torch.float32"),
        ([[True], [True]], [[0], [0]], "labels must hold integers, got torch.bool"),
    ],
)
def test_from_labels_errors(labels, ids, message):
    with pytest.raises(ValueError, match=message):
        layout_of(labels, ids)


def test_sentence_ids_may_start_again_in_the_next_row():
    layout = layout_of([[1, 1], [1, 1]], [[0, 1], [0, 1]])
    assert layout.sentence_offsets.tolist() == [0, 1, 2, 3, 4]


def test_group_and_role_go_together():
    with pytest.raises(ValueError, match="pass both or neither"):
        layout_of([[1], [1]], [[0], [0]], group=torch.tensor([0, 0]))


def test_several_rejected_responses():
    layout = layout_of(
        [[1], [2], [3], [4], [5], [6]],
        [[0]] * 6,
        group=torch.tensor([1, 1, 0, 0, 1, 0], dtype=torch.int32),
        role=torch.tensor([1, 0, 2, 0, 2, 1]),
    )
    assert layout.num_items == 2
    assert layout.with_role(0).tolist() == [3, 1]  # in the items' order, not the rows'
    assert layout.with_role(1).tolist() == [5, 0]
    assert layout.with_role(2).tolist() == [2, 4]
    assert layout.chosen_sentences.tolist() == [1, 3]
    assert layout.chosen_starts.tolist() == [1, 0]  # item 0's chosen response is the later row
    with pytest.raises(ValueError, match="not every item has exactly one response of role 3"):
        layout.with_role(3)


def test_two_rejected_responses_of_one_role_are_no_pair():
    layout = layout_of([[1], [2], [3]], [[0]] * 3, group=torch.tensor([0, 0, 0]), role=torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="not every item has exactly one response of role 1"):
        layout.with_role(1)


@pytest.mark.parametrize(
    ("group", "role", "message"),
    [
        ([0, 0], [0, 0], "item 0 has 2 chosen responses"),
        ([0, 1], [0, 1], "item 1 has 0 chosen responses"),
        ([0, 2], [0, 0], "item 1 has 0 chosen responses"),
        ([0, -1], [0, 1], r"group\[1\] is -1"),
        ([0, 0], [0, -1], r"role\[1\] is -1"),
        ([0], [0], "response_offsets describes 2 responses, group 1"),
        ([0, 0], [0], "role has 1 entries but group 2"),
    ],
)
def test_group_and_role_errors(group, role, message):
    with pytest.raises(ValueError, match=message):
        layout_of([[1], [1]], [[0], [0]], group=torch.tensor(group), role=torch.tensor(role))


def test_empty_responses_are_named():
    layout = layout_of([[1], [X], [X], [2]], [[0]] * 4)
    assert layout.empty_responses == ((1, 0), (0, 1))
    with pytest.raises(ValueError, match="pair 1: its chosen response has no counted token"):
        layout.require_nonempty()
    with pytest.raises(ValueError, match=r"pair 0: its rejected response has no counted token.*1 empty"):
        layout_of([[1], [X]], [[0]] * 2).require_nonempty()
    named = layout_of([[1], [1], [X]], [[0]] * 3, group=torch.zeros(3).long(), role=torch.arange(3))
    with pytest.raises(ValueError, match="pair 0: its role-2 response"):
        named.require_nonempty()


def test_nothing_at_all():
    layout = SentenceLayout.from_labels(torch.empty(0, 5, dtype=torch.long), torch.empty(0, 5, dtype=torch.long))
    assert (layout.num_tokens, layout.num_sentences, layout.num_responses, layout.num_items) == (0, 0, 0, 0)
    assert layout.with_role(0).numel() == layout.with_role(1).numel() == 0
    layout.require_nonempty()
    layout.validate()
    # rows without a counted token are responses, only empty ones
    assert layout_of([[X], [X]], [[0], [0]]).empty_responses == ((0, 0), (0, 1))


def good() -> dict[str, torch.Tensor]:
    return fields_of(make_ragged([[2, 1], [3]], 5, 0).layout())  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("targets", torch.zeros(6), "targets must be a 1-D int64 tensor"),
        ("targets", [1, 2], "targets must be a 1-D int64 tensor, got list"),
        ("group", torch.zeros(2, dtype=torch.int32), "group must be a 1-D int64 tensor"),
        ("hidden_index", torch.zeros(5).long(), "hidden_index has 5 entries but targets 6"),
        ("hidden_index", torch.tensor([0, 1, 2, 3, 4, -1]), r"hidden_index\[5\] is -1"),
        ("sentence_offsets", torch.tensor([0, 2, 1, 6]), r"sentence_offsets\[2\] = 1 is less"),
        ("sentence_offsets", torch.tensor([0, 2, 3, 5]), "sentence_offsets must run from 0 to 6, got 0 to 5"),
        ("sentence_offsets", torch.tensor([1, 2, 3, 6]), "sentence_offsets must run from 0 to 6, got 1 to 6"),
        ("sentence_offsets", torch.tensor([0, 2, 2, 6]), "sentence 1 has no token"),
        ("sentence_offsets", torch.tensor([], dtype=torch.long), "need at least the entry 0"),
        ("response_offsets", torch.tensor([0, 2, 4]), "response_offsets must run from 0 to 3, got 0 to 4"),
        ("response_offsets", torch.tensor([0, 3, 2]), r"response_offsets\[2\] = 2 is less"),
        ("response_offsets", torch.tensor([0, 3]), "response_offsets describes 1 responses, group 2"),
        ("perplexity_mask", torch.ones(6), "perplexity_mask must be bool"),
        ("perplexity_mask", torch.ones(5).bool(), "perplexity_mask must be bool"),
        ("perplexity_mask", torch.tensor([1, 1, 0, 1, 1, 1]).bool(), "perplexity_mask leaves no token of sentence 1"),
    ],
)
def test_constructor_errors(name, value, message):
    with pytest.raises(ValueError, match=message):
        SentenceLayout(**{**good(), name: value})


def test_devices_must_agree():
    with pytest.raises(ValueError, match="group is on meta but targets on cpu"):
        SentenceLayout(**{**good(), "group": torch.zeros(2, dtype=torch.long, device="meta")})


def test_validate_finds_what_was_changed_afterwards():
    layout = make_ragged([[2, 1], [3]], 5, 0).layout()
    layout.validate()
    layout.targets[0] = -3
    with pytest.raises(ValueError, match=r"targets\[0\] is -3"):
        layout.validate()


def test_to_moves_every_tensor_and_derives_nothing_again():
    layout = make_ragged([[2, 1], [3], [1], [2, 2]], 5, 1).layout()
    moved = layout.to("meta")
    for f in dataclasses.fields(SentenceLayout):
        before, after = getattr(layout, f.name), getattr(moved, f.name)
        if isinstance(before, torch.Tensor):
            assert after.device.type == "meta"
            assert after.shape == before.shape
        elif f.name != "role_responses":
            assert after == before
    assert all(rows.device.type == "meta" for rows in moved.role_responses)
    assert moved.num_tokens == layout.num_tokens
    assert moved.num_items == layout.num_items
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.targets = layout.targets  # type: ignore[misc]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs an accelerator")
def test_pin_memory():
    layout = make_ragged([[2], [3]], 5, 1).layout()
    assert layout.pin_memory().targets.is_pinned()
    assert torch.equal(layout.pin_memory().targets, layout.targets)


# --- fixed capacity ---

CAPACITY = {"tokens": 40, "sentences": 20, "chosen_sentences": 9}


@given(ragged_batches(max_pairs=2))
def test_padded_to_keeps_the_responses_and_adds_an_empty_tail(batch: Ragged):
    layout = batch.layout()
    padded = layout.padded_to(**CAPACITY)
    padded.validate()
    used = layout.num_tokens, layout.num_sentences, layout.chosen_sentences.numel()
    assert (padded.num_tokens, padded.num_sentences, padded.chosen_sentences.numel()) == (40, 20, 9)
    assert padded.used_sizes() == layout.used_sizes() == used
    for name in ("targets", "hidden_index", "perplexity_mask"):
        assert torch.equal(getattr(padded, name)[: used[0]], getattr(layout, name))
    assert torch.equal(padded.sentence_offsets[: used[1] + 1], layout.sentence_offsets)
    assert torch.equal(padded.chosen_sentences[: used[2]], layout.chosen_sentences)
    for name in ("response_offsets", "response_token_offsets", "group", "role", "chosen_starts"):
        assert torch.equal(getattr(padded, name), getattr(layout, name))
    assert (padded.num_responses, padded.num_items) == (layout.num_responses, layout.num_items)
    assert padded.padded_shape == layout.padded_shape
    # the tail: no token in any sentence, a target and a row that exist, no row more often than it must be
    assert not padded.sentence_offsets[used[1] :].diff().any()
    assert not padded.targets[used[0] :].any()
    assert not padded.perplexity_mask[used[0] :].any()
    assert (padded.chosen_sentences[used[2] :] == 19).all()
    tail = padded.hidden_index[used[0] :]
    assert 0 <= int(tail.min()) <= int(tail.max()) < layout.hidden_rows
    assert torch.bincount(tail).max() == -(-tail.numel() // layout.hidden_rows)
    # larger still, moved, and nothing to pad
    again = padded.padded_to(tokens=41, sentences=22, chosen_sentences=9).to("cpu")
    again.validate()
    assert again.used_sizes() == used
    same = layout.padded_to(tokens=used[0], sentences=used[1], chosen_sentences=used[2])
    assert all(torch.equal(same_value, value) for same_value, value in zip(tensors(same), tensors(layout), strict=True))


def tensors(layout: SentenceLayout) -> list[torch.Tensor]:
    values = [getattr(layout, f.name) for f in dataclasses.fields(layout)]
    return [v for v in values if isinstance(v, torch.Tensor)] + [v for v in layout.role_responses if v is not None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 5}, "tokens is 5 but this layout has 6"),
        ({"sentences": 2}, "sentences is 2 but this layout has 3"),
        ({"chosen_sentences": 1}, "chosen_sentences is 1 but this layout has 2"),
        ({"sentences": 3}, "sentences is 3, all in use.*choose sentences >= 4"),
    ],
)
def test_padded_to_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make_ragged([[2, 1], [3]], 5, 0).layout().padded_to(**{**CAPACITY, **changes})


def test_validate_looks_at_the_tail():
    padded = make_ragged([[2, 1], [3]], 5, 0).layout().padded_to(**CAPACITY)
    padded.sentence_offsets[-1] += 1
    with pytest.raises(ValueError, match="sentence_offsets must run from 0 to 6, got 0 to 7"):
        padded.validate()
    padded.sentence_offsets[3:] = 41
    with pytest.raises(ValueError, match="sentence_offsets must run from 0 to 40, got 0 to 41"):
        padded.validate()


def two_batches() -> list[SentenceLayout]:
    rows = [[[2, 1], [3, 3], [1], [2, 2]], [[4], [1, 1], [2], [5]]]
    return [make_ragged(lengths, 5, 2, holes=False).layout() for lengths in rows]


def test_copy_in_place():
    first, second = (dataclasses.replace(x, padded_shape=(4, 9)) for x in two_batches())
    untouched = [t.clone() for t in tensors(first)]
    static = first.padded_to(**CAPACITY)
    addresses = [t.data_ptr() for t in tensors(static)]
    wanted = second.padded_to(**CAPACITY)
    assert static.copy_(wanted) is static
    assert [t.data_ptr() for t in tensors(static)] == addresses
    assert all(torch.equal(a, b) for a, b in zip(tensors(static), tensors(wanted), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), untouched, strict=True)), "padded_to copies"
    assert not set(addresses) & {t.data_ptr() for t in tensors(first)}
    static.validate()
    assert static.used_sizes() == second.used_sizes()


def test_copy_in_place_errors():
    first, second = (dataclasses.replace(x, padded_shape=(4, 9)) for x in two_batches())
    static = first.padded_to(**CAPACITY)
    with pytest.raises(ValueError, match=r"targets is \(13,\) but \(40,\) in the layout to fill: use padded_to"):
        static.copy_(second)
    unmasked = dataclasses.replace(second, perplexity_mask=None).padded_to(**CAPACITY)
    with pytest.raises(ValueError, match=r"perplexity_mask is absent but \(40,\)"):
        static.copy_(unmasked)
    with pytest.raises(ValueError, match=r"padded_shape \(4, 8\) and 2 items do not fit \(4, 9\)"):
        static.copy_(dataclasses.replace(second, padded_shape=(4, 8)).padded_to(**CAPACITY))
    three = dataclasses.replace(second, role=torch.tensor([0, 0, 1, 2]), group=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match=r"the responses of role 1 is absent but \(2,\)"):
        static.copy_(three.padded_to(**CAPACITY))
    empty = make_ragged([[2, 1], [3, 3], [1], []], 5, 2).layout().padded_to(**CAPACITY)
    with pytest.raises(ValueError, match="pair 1: its rejected response has no counted token"):
        static.copy_(empty)
    # without a padded shape nothing says how many rows the hidden states have
    near = dataclasses.replace(first, padded_shape=None)
    far = dataclasses.replace(second, padded_shape=None, hidden_index=second.hidden_index + 50)
    with pytest.raises(ValueError, match=r"hidden_index reaches row .* but the layout to fill has"):
        near.padded_to(**CAPACITY).copy_(far.padded_to(**CAPACITY))
    far.padded_to(**CAPACITY).copy_(near.padded_to(**CAPACITY))
