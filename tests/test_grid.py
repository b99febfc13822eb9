"""The collator's grids: shared, packed and plain batches hold the same responses, read with the same images."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import itertools

import pytest
import torch
from tiny import IMAGE_TOKENS, tiny_image, tiny_processor, tiny_rows, tiny_tokenizer

from aspo.data import Collator, load_rows, validate_rows, write_rows
from aspo.shared_prefix.tree import Item, TokenTree

PROCESSOR = tiny_processor()
MODES = list(itertools.product((False, True), repeat=2))


def pixels_of(image):
    """(3, height, width), as the processor makes it."""
    return PROCESSOR.image_processor([image], return_tensors="pt")["pixel_values"][0]


def contexts(batch):
    """For each counted token in the layout's order: (the token ids that its prediction sees, the token)."""
    tree, layout = batch["tree"], batch["layout"]
    ids = batch["model_inputs"]["input_ids"].flatten().tolist()
    item, branch = tree.item_ids.flatten().tolist(), tree.branch_ids.flatten().tolist()
    position = tree.positions.flatten().tolist()
    seen = []
    for index, target in zip(layout.hidden_index.tolist(), layout.targets.tolist(), strict=True):
        visible = [
            (position[k], ids[k])
            for k in range(len(ids))
            if item[k] == item[index] and branch[k] in (0, branch[index]) and position[k] <= position[index]
        ]
        assert [place for place, _ in sorted(visible)] == list(range(len(visible)))  # no gap, nothing twice
        seen.append(([token for _, token in sorted(visible)], target))
    return seen


@pytest.mark.parametrize(("shared", "packed"), MODES)
def test_every_mode_reads_the_same_tokens(shared, packed):
    rows = tiny_rows(4)
    plain = Collator(PROCESSOR, max_length=50)(rows)
    batch = Collator(PROCESSOR, max_length=50, shared_prefix=shared, padding_free=packed)(rows)
    assert contexts(batch) == contexts(plain)
    for name in ("sentence_offsets", "response_offsets", "group", "role", "perplexity_mask"):
        assert torch.equal(getattr(batch["layout"], name), getattr(plain["layout"], name))
    assert torch.equal(batch["similarity"], plain["similarity"])
    tokens = batch["model_inputs"]["attention_mask"].sum()
    assert tokens == batch["tree"].num_tokens and batch["tree"].is_plain == (not shared and not packed)
    images = batch["model_inputs"]["pixel_values"]
    assert len(images) == (4 if shared else 8)
    assert (batch["model_inputs"]["input_ids"] == PROCESSOR.image_token_id).sum() == IMAGE_TOKENS * len(images)
    assert batch["tree"].num_unshared_tokens == plain["tree"].num_tokens
    assert not packed or tokens == batch["model_inputs"]["input_ids"].numel()


def test_the_common_start_is_part_of_the_prefix():
    """ "The star is red." against "The star is blue. ...": the prompt, " The star is" and what the tokenizer shares."""
    (row,) = tiny_rows(1)
    row |= {"chosen": "The star is red.", "rejected": "The star is blue.", "chosen_sentences": None}
    batch = Collator(PROCESSOR, shared_prefix=True)([{**row, "chosen_similarity": None}])
    plain = Collator(PROCESSOR)([{**row, "chosen_similarity": None}])
    (item,), distinct, layout = batch["tree"].items, batch["distinct"], batch["layout"]
    chosen, rejected = layout.targets.split(layout.response_token_offsets.diff().tolist())
    common = next(n for n, (a, b) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=False)) if a != b)
    prompt = int(plain["layout"].hidden_index[0]) + 1
    assert common >= 3 and item == Item(0, 0, prompt + common, (len(chosen) - common, len(rejected) - common))
    assert distinct.in_pair == common and distinct.first.tolist()[:common] == list(range(common))
    assert len(distinct.first) == layout.num_tokens - common
    assert torch.equal(layout.targets[distinct.first][distinct.inverse], layout.targets)
    assert torch.equal(layout.hidden_index[distinct.first][distinct.inverse], layout.hidden_index)


def test_responses_without_a_common_start_are_all_distinct():
    (row,) = tiny_rows(1)
    row |= {
        "chosen": "It is red.",
        "rejected": "The star is blue.",
        "chosen_sentences": None,
        "chosen_similarity": None,
    }
    assert Collator(PROCESSOR, shared_prefix=True)([row])["distinct"] is None


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_that_would_save_little_is_left_plain(packed):
    rows = tiny_rows(3)
    shared = Collator(PROCESSOR, shared_prefix=True, padding_free=packed)(rows)["tree"]
    saving = shared.num_unshared_tokens / shared.num_tokens
    batches = [
        Collator(PROCESSOR, shared_prefix=True, min_saving=saving + change, padding_free=packed)(rows)
        for change in (-0.01, 0.01)
    ]
    plain = Collator(PROCESSOR, padding_free=packed)(rows)
    assert 1.3 < saving < 2 and batches[0]["tree"] == shared and batches[1]["tree"] == plain["tree"]
    for name, value in plain["model_inputs"].items():
        assert torch.equal(batches[1]["model_inputs"][name], value)
    assert contexts(batches[1]) == contexts(plain) == contexts(batches[0])


def test_several_responses_share_one_prefix():
    rows = [{**row, "third": "There is one star only."} for row in tiny_rows(2)]
    columns = ("chosen", "rejected", "third")
    batch = Collator(PROCESSOR, responses=columns, shared_prefix=True)(rows)
    assert [len(item.branches) for item in batch["tree"].items] == [3, 3]
    assert contexts(batch) == contexts(Collator(PROCESSOR, responses=columns)(rows))
    assert batch["layout"].role.tolist() == [0, 0, 1, 1, 2, 2]


# ---- which images a response is read with ----


@pytest.mark.parametrize(("shared", "packed"), MODES)
def test_rejected_images_and_negative_images(shared, packed):
    rows = tiny_rows(3)
    rows[0]["rejected_images"] = [tiny_image("yellow")]
    rows[2]["negative_images"] = [tiny_image("green"), tiny_image("blue", (2, 2, 9, 9))]
    batch = Collator(PROCESSOR, shared_prefix=shared, padding_free=packed)(rows)
    layout, tree = batch["layout"], batch["tree"]
    assert layout.role.tolist() == [0, 0, 0, 1, 1, 1, 2, 3] and layout.group.tolist() == [0, 1, 2, 0, 1, 2, 2, 2]
    item_of = tree.item_ids.flatten()[layout.hidden_index[layout.response_token_offsets[:-1]]].tolist()
    read_with = dict(zip(zip(layout.role.tolist(), layout.group.tolist(), strict=True), item_of, strict=True))
    expected = {
        **{(0, g): rows[g]["images"] for g in range(3)},
        **{(1, 0): rows[0]["rejected_images"], (1, 1): rows[1]["images"], (1, 2): rows[2]["images"]},
        **{(2 + n, 2): [image] for n, image in enumerate(rows[2]["negative_images"])},
    }
    pixels = batch["model_inputs"]["pixel_values"]  # one image an item
    for answer, (image,) in expected.items():
        assert torch.equal(pixels[read_with[answer]], pixels_of(image))
    assert len(pixels) == len(tree.items) == (6 if shared else 8)
    chosen = layout.targets.split(layout.response_token_offsets.diff().tolist())
    assert torch.equal(chosen[2], chosen[6]) and torch.equal(chosen[2], chosen[7])


def test_extra_images_survive_loading_and_writing(tmp_path):
    rows = tiny_rows(2)
    rows[0] |= {"rejected_images": [tiny_image("yellow")], "negative_images": [tiny_image("green"), tiny_image("blue")]}
    write_rows(tmp_path / "rows", rows)
    loaded = load_rows(tmp_path / "rows")
    validate_rows(loaded)
    before, after = (Collator(PROCESSOR, shared_prefix=True)(list(r)) for r in (rows, loaded))
    pixels = [batch["model_inputs"]["pixel_values"] for batch in (before, after)]
    assert torch.equal(*pixels) and len(pixels[0]) == 5
    assert contexts(before) == contexts(after)
    rows[1]["negative_images"] = [str(tmp_path / "missing.png")]
    with pytest.raises(ValueError, match=r"row 1 .*'negative_images': no image file"):
        validate_rows(load_rows(rows))


ILLUSTRATED = {
    "prompt": "<image>Describe the image.",
    "chosen": "The star is red. <image> It is a small star.",
    "rejected": "The star is blue.",
}


@pytest.mark.parametrize(("shared", "packed"), MODES)
def test_a_response_that_holds_an_image(shared, packed):
    other, images = {**tiny_rows(2)[1], "chosen_similarity": None}, [tiny_image("red"), tiny_image("blue")]
    row = {"id": "x", **ILLUSTRATED, "images": images}
    validate_rows([row])
    batch = Collator(PROCESSOR, shared_prefix=shared, padding_free=packed)([row, other])
    layout, image_id = batch["layout"], PROCESSOR.image_token_id
    seen = contexts(batch)
    offsets = layout.response_token_offsets.tolist()
    words = PROCESSOR.tokenizer.decode(layout.targets[: offsets[1]])
    assert image_id not in layout.targets.tolist()
    assert words.replace(" ", "") == "Thestarisred.Itisasmallstar.<eos>"
    assert [context.count(image_id) // IMAGE_TOKENS for context, _ in seen[: offsets[1]]] == sorted(
        context.count(image_id) // IMAGE_TOKENS for context, _ in seen[: offsets[1]]
    )
    assert seen[0][0].count(image_id) == IMAGE_TOKENS and seen[offsets[1] - 1][0].count(image_id) == 2 * IMAGE_TOKENS
    assert all(context.count(image_id) == IMAGE_TOKENS for context, _ in seen[offsets[1] :])
    pixels = batch["model_inputs"]["pixel_values"]
    counts = [sum(torch.equal(own, pixels_of(image)) for own in pixels) for image in images]
    assert counts == [2, 1]
    assert layout.response_offsets.diff().tolist()[0] == 2  # two sentences; the mark belongs to neither's tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "Describe the image."}, "it holds '<image>': remove it, or mark every image"),
        ({"images": [tiny_image()]}, "the prompt marks 1 and the responses 1 of the row's 1 images"),
    ],
)
def test_marks_in_responses_must_be_plain(change, message):
    row = {"id": "x", **ILLUSTRATED, "images": [tiny_image("red"), tiny_image("blue")], **change}
    with pytest.raises(ValueError, match="column 'chosen': .*" + message):
        validate_rows([row])
    with pytest.raises(ValueError, match="row 'x': the response holds the image token"):
        Collator(PROCESSOR)([row])


def test_a_response_with_images_is_not_cut():
    row = {"id": "x", **ILLUSTRATED, "images": [tiny_image("red"), tiny_image("blue")]}
    with pytest.raises(ValueError, match="a response with images is not cut"):
        Collator(PROCESSOR, max_length=44)([row])


# ---- lengths and cached log-probabilities ----


def test_lengths_are_those_of_the_batch():
    collator = Collator(PROCESSOR)
    for row in [*tiny_rows(3), {"id": "x", **ILLUSTRATED, "images": [tiny_image("red"), tiny_image("blue")]}]:
        readings = collator.reading_lengths(row)
        lengths = [prompt + length for prompt, responses in readings for length in responses]
        tree = collator([row])["tree"]
        assert sorted(lengths) == sorted(item.length for item in tree.items)


@pytest.mark.parametrize(("shared", "packed"), MODES)
def test_reference_columns_follow_the_layout(shared, packed):
    rows = tiny_rows(3)
    for g, row in enumerate(rows):
        ((_, counts),) = Collator(PROCESSOR).reading_lengths(row)
        for column, count, sign in zip(("chosen", "rejected"), counts, (1, 2), strict=True):
            row[f"ref_{column}_logps"] = [-sign - g / 10 - n / 1000 for n in range(count)]
    batch = Collator(PROCESSOR, shared_prefix=shared, padding_free=packed)(rows)
    expected = [x for column in ("chosen", "rejected") for row in rows for x in row[f"ref_{column}_logps"]]
    torch.testing.assert_close(batch["ref_logps"], torch.tensor(expected))
    rows[1]["ref_rejected_logps"].append(-1.0)
    with pytest.raises(ValueError, match=r"row 'row-1': \d+ reference log-probabilities for the"):
        Collator(PROCESSOR)(rows)
    del rows[1]["ref_rejected_logps"]
    with pytest.raises(ValueError, match="row 'row-1': it has 'ref_chosen_logps', but no 'ref_rejected_logps'"):
        Collator(PROCESSOR)(rows)
    del rows[1]["ref_chosen_logps"]
    with pytest.raises(ValueError, match="row 'row-1': no reference log-probabilities, but other rows have them"):
        Collator(PROCESSOR)(rows)


def test_rows_with_and_without_images_share_a_pack():
    rows = tiny_rows(3)
    rows[1] = {**rows[1], "images": []}
    batch = Collator(PROCESSOR, shared_prefix=True, padding_free=True)(rows)
    assert contexts(batch) == contexts(Collator(PROCESSOR)(rows)) and len(batch["model_inputs"]["pixel_values"]) == 2
    text = Collator(tiny_tokenizer(), shared_prefix=True)([{**row, "images": []} for row in rows])
    assert "pixel_values" not in text["model_inputs"] and len(text["tree"].items) == 3


# ---- TokenTree ----


def test_a_tree_by_hand():
    tree = TokenTree.place([(3, (2, 1)), (1, (2,))], packed=True)
    assert tree.item_ids.tolist() == [[0] * 6 + [1] * 3]
    assert tree.branch_ids.tolist() == [[0, 0, 0, 1, 1, 2, 0, 1, 1]]
    assert tree.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert (tree.num_tokens, tree.num_unshared_tokens, tree.longest_sequence, tree.is_plain) == (9, 12, 5, False)
    padded = TokenTree.place([(3, (2, 1)), (1, (2,))], packed=False)
    assert padded.item_ids.tolist() == [[0] * 6, [1] * 3 + [-1] * 3] and padded.num_tokens == 9
    assert TokenTree.place([(3, (2,)), (1, (2,))], packed=False).is_plain
