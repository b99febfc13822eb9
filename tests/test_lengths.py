"""Lengths before training: what is counted without decoding an image is what the real processors make."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import random

import pytest
from families import FAMILIES, unequal_rows
from PIL import Image
from tiny import tiny_processor

from aspo.data import Collator, write_rows
from aspo.folder import load_images
from aspo.lengths import PromptLength, image_sizes, row_lengths
from aspo.packing import row_grid, row_tokens
from aspo.prompts import encode_prompt, run_processor
from aspo.rows import load_rows

TEXTS = ("What is it?", "\n\nTwo lines\nbefore the text.", "a " * 30)
MEASURED = {"SmolVLM", "InstructBLIP"}  # families whose processor cannot say how many tokens an image becomes


def blank(size):
    return Image.new("RGB", (size[1], size[0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_as_long_as_the_processor_makes_them(name):
    family = FAMILIES[name]
    _, processor = family.build()
    length, draw = PromptLength(processor), random.Random(0)
    counts = [1, 1, 1, 1] + [0] * family.text_rows + [2, 2, 3] * family.several_images
    for n in counts:
        sizes = [(draw.randint(20, 300), draw.randint(20, 300)) for _ in range(n)]
        images = [blank(size) for size in sizes]
        prompt = encode_prompt(processor, draw.choice(TEXTS), images)
        real = int(run_processor(processor, [prompt], [images], "right")["attention_mask"].sum())
        assert length(prompt, sizes) == real, (n, sizes, prompt.text)
    assert (length._offsets[1] is None) == (name in MEASURED)


def test_a_count_that_is_wrong_for_some_images_is_not_used(monkeypatch):
    processor = tiny_processor()
    told = type(processor)._get_num_multimodal_tokens

    def of_area(self, image_sizes):
        counts = told(self, image_sizes=image_sizes)
        return {"num_image_tokens": [height * width // 1000 for height, width in image_sizes], "right": counts}

    sizes = [(40, 50)]
    assert PromptLength(processor).image_tokens(sizes) == 8  # nine image tokens for one mark
    monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", of_area)
    assert PromptLength(processor).image_tokens(sizes) == 8


def test_real_processing_is_done_once_for_each_combination_of_sizes(monkeypatch):
    processor = tiny_processor()
    monkeypatch.delattr(type(processor), "_get_num_multimodal_tokens")
    length = PromptLength(processor)
    measured = []
    monkeypatch.setattr(length, "_measure", lambda sizes: measured.append(sizes) or 5)
    assert [length.image_tokens(sizes) for sizes in ([(9, 8)], [(9, 8)], [(8, 9)], [(9, 8)])] == [5] * 4
    assert measured == [((9, 8),), ((8, 9),)]


def test_sizes_are_read_without_decoding(tmp_path, monkeypatch):
    pictures = [blank((30, 40)), blank((7, 5))]
    row = {
        "id": "a",
        "prompt": "?",
        "chosen": "x",
        "rejected": "y",
        "images": pictures,
        "negative_images": pictures[:1],
    }
    write_rows(tmp_path, [row])
    (loaded,) = load_rows(tmp_path)
    embedded = {"image": {"bytes": (tmp_path / "images").iterdir().__next__().read_bytes(), "path": None}}
    expected = [(image.height, image.width) for image in load_images(embedded)]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("an image was decoded"))
    assert image_sizes(loaded) == image_sizes(row) == [(30, 40), (7, 5)]
    assert image_sizes(loaded, "negative_images") == [(30, 40)]
    assert image_sizes(embedded) == expected
    assert image_sizes({"prompt": "?"}) == []


@pytest.mark.parametrize("name", ["LLaVA-OneVision", "Qwen2.5-VL", "PaliGemma"])
@pytest.mark.parametrize("shared", [False, True])
def test_batches_keep_the_budget_that_their_rows_were_packed_into(name, shared):
    """Lengths as the collator tells them against the grids that it makes, with every kind of reading."""
    family = FAMILIES[name]
    collator = Collator(family.build()[1], max_length=150, shared_prefix=shared)
    first, *others = unequal_rows(4)
    rows = [first, *others, {**first, "rejected_images": [blank((50, 90))]}]
    rows.append({**first, "negative_images": [blank((90, 50)), blank((40, 40))]})
    rows += [{**first, "images": []}] * family.text_rows
    rows += [{**first, "images": [blank((60, 40)), blank((40, 90))]}] * family.several_images
    for row, lengths in zip(rows, row_lengths(rows, collator), strict=True):
        for collator.padding_free in (False, True):
            tree = collator([row])["tree"]
            told = (1, row_tokens(lengths, shared)) if collator.padding_free else row_grid(lengths, shared)
            if shared:  # the start that a pair's responses have in common is computed once, but told for each
                assert told[0] == tree.shape[0] and told[1] >= tree.shape[1]
                ends = [item.prefix + branch for item in tree.items for branch in item.branches]
                assert ends == [prompt + answer for prompt, answers in lengths for answer in answers]
            else:
                assert told == tree.shape
