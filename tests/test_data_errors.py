"""What rows, images and tokenizers cannot be: each is refused by a message that names it and what to do."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import pytest
from PIL import Image
from tiny import CHAT_TEMPLATE, tiny_image, tiny_llava, tiny_processor, tiny_rows, tiny_tokenizer
from transformers import ByT5Tokenizer

from aspo.data import Collator, generation_inputs, load_images, load_rows, validate_rows
from aspo.model import load_model
from aspo.report import weigh

TEXT_ROW = {"id": "a", "prompt": "Hello.", "chosen": "It is red.", "rejected": "It is blue."}


# ---- tokenizers and templates ----


def test_a_tokenizer_without_an_end_of_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"row 'a': .* has no EOS token: set tokenizer\.eos_token"):
        Collator(tokenizer)([TEXT_ROW])


def test_prompts_of_a_batch_begin_alike():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="some prompts of this batch begin with the BOS text and some do not"):
        generation_inputs(tokenizer, [{"prompt": "<bos>Hello."}, {"prompt": "Hello."}])


def test_a_tokenizer_without_offsets():
    with pytest.raises(ValueError, match="ByT5Tokenizer is no fast tokenizer: sentences need character offsets"):
        Collator(ByT5Tokenizer())


def test_a_template_that_leaves_images_out_of_answers():
    processor = tiny_processor()
    processor.chat_template = CHAT_TEMPLATE.replace("part['type'] == 'image'", "part['type'] == 'image' and loop.first")
    row = {"id": "a", "prompt": "<image>Hello.", "chosen": "It is <image> red.", "rejected": "It is blue."}
    with pytest.raises(ValueError, match="the chat template writes no image into an assistant's message"):
        Collator(processor)([{**row, "images": [tiny_image(), tiny_image()]}])


# ---- rows ----


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "half \ud83d"},
        {"prompt": [{"role": "user", "content": "half \ud83d"}]},
        {"prompt": "Hello.", "note": {"of": "half \ud83d"}},
    ],
)
def test_half_a_character_is_named(row):
    with pytest.raises(ValueError, match=r"row 0, column '(prompt|note)': it holds half a character .*'.ud83d'"):
        load_rows([row], kind="prompt")


def test_a_column_nested_too_deeply_is_named():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match="row 0, column 'note': it is nested too deeply"):
        load_rows([{"prompt": "Hello.", "note": nested}], kind="prompt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_similarity": "high"}, "column 'chosen_similarity': it is 'high'; it must be a list"),
        ({"chosen_token_scores": 3}, "column 'chosen_token_scores': it is 3; it must be a list"),
        ({"chosen_token_scores": [[0, 3]]}, r"entry 0 is \[0, 3\]; it must be \[start, end, score\]"),
        ({"chosen_token_scores": [[3, 3, 1.0]]}, "entry 0 covers characters 3 to 3 of a text of"),
        ({"sample_weight": 10**400}, "column 'sample_weight': it is 1000.*; it must be a finite number"),
        ({"unfinished": "yes"}, "column 'unfinished': it is 'yes'; it must be true or false"),
    ],
)
def test_columns_of_another_kind(change, message):
    (row,) = tiny_rows(1)
    with pytest.raises(ValueError, match=message):
        validate_rows([{**row, **change}])


# ---- images ----


def test_images_that_are_not_read():
    with pytest.raises(ValueError, match="an image's 'bytes' are str; they must be bytes"):
        load_rows([{"prompt": "Hello.", "image": {"bytes": "iVBORw0", "path": None}}], kind="prompt")
    with pytest.raises(ValueError, match="its pixels have more than 16 bits: save it with 8"):
        load_images({"image": Image.new("I", (4, 4), 70_000)})
    with pytest.raises(ValueError, match="its pixels are floating-point numbers"):
        load_images({"image": Image.new("F", (4, 4), 0.5)})
    assert load_images({"image": Image.new("I", (4, 4), 65_535)})[0].getpixel((0, 0)) == (255, 255, 255)


# ---- the report ----


def test_the_report_weighs_no_sentence_without_a_token(tmp_path):
    """Training joins such sentences; a page that shows each with its weight cannot."""
    model, processor = load_model(tiny_llava(tmp_path / "llava"))
    row = {**TEXT_ROW, "images": [tiny_image()], "chosen_sentences": [[0, 1], [1, 2], [2, 10]]}
    with pytest.raises(ValueError, match="row 'a': 2 of its 3 chosen sentences have tokens of their own; join the"):
        list(weigh(model, processor, [row]))
