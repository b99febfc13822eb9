"""The collator: what the model reads, which token belongs to which sentence, truncation, templates, errors."""

import logging
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE, IMAGE_TOKENS, PROMPT, tiny_image, tiny_llava, tiny_processor, tiny_rows, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers
from tokenizers import decoders as hf_decoders
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

import aspo.data
import aspo.images
from aspo.data import Collator, encode_prompt, encode_response, generation_inputs, load_rows

PROCESSOR = tiny_processor()
TOKENIZER = PROCESSOR.tokenizer
EOS = TOKENIZER.eos_token_id


def decoded_targets(batch):
    """The counted tokens of each response, as text."""
    layout = batch["layout"]
    offsets = layout.response_token_offsets.tolist()
    return [TOKENIZER.decode(layout.targets[a:b]) for a, b in pairwise(offsets)]


def decoded_sentences(batch):
    layout = batch["layout"]
    offsets = layout.sentence_offsets.tolist()
    return [TOKENIZER.decode(layout.targets[a:b]).strip() for a, b in pairwise(offsets)]


def test_batch_of_pairs():
    rows = tiny_rows(3)
    batch = Collator(PROCESSOR)(rows)
    inputs, layout = batch["model_inputs"], batch["layout"]
    width = inputs["input_ids"].shape[1]
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "input_ids": (6, width),
        "attention_mask": (6, width),
        "pixel_values": (6, 3, 30, 30),
    }
    assert decoded_targets(batch) == [row[c] + "<eos>" for c in ("chosen", "rejected") for row in rows]
    for r in range(6):
        length = int(inputs["attention_mask"][r].sum())
        text = TOKENIZER.decode(inputs["input_ids"][r, :length])
        row = rows[r % 3]
        prompt = f"<bos>USER: {'<image>' * IMAGE_TOKENS}{PROMPT}\nASSISTANT: "
        assert text == prompt + (row["chosen"] if r < 3 else row["rejected"]) + "<eos>"
        assert inputs["attention_mask"][r].tolist() == [1] * length + [0] * (width - length)  # padded on the right
        assert (inputs["input_ids"][r, length:] == TOKENIZER.pad_token_id).all()
    # hidden[r, t] predicts the next input token
    r, t = layout.hidden_index // width, layout.hidden_index % width
    assert torch.equal(inputs["input_ids"][r, t + 1], layout.targets)
    assert torch.equal(inputs["pixel_values"][:3], inputs["pixel_values"][3:])
    assert layout.role.tolist() == [0, 0, 0, 1, 1, 1] and layout.group.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch["similarity"].tolist() == pytest.approx([x for row in rows for x in row["chosen_similarity"]])
    assert batch["sample_weight"] is None
    assert batch["ids"] == ["row-0", "row-1", "row-2"]


def test_sentences_own_their_tokens_and_eos_is_in_the_last():
    rows = tiny_rows(2)
    expected = []
    for column in ("chosen", "rejected"):
        for row in rows:
            cuts = [s + "." for s in row[column].removesuffix(".").split(". ")]
            expected += [*cuts[:-1], cuts[-1] + "<eos>"]
    batch = Collator(PROCESSOR)(rows)
    assert decoded_sentences(batch) == expected
    mask = batch["layout"].perplexity_mask
    assert torch.equal(~mask, batch["layout"].targets == EOS)


def test_rows_of_every_form_give_the_same_batch():
    rows = tiny_rows(2)
    reference = Collator(PROCESSOR)(rows)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    forms = [
        load_rows(rows).to_list(),
        [{**row, "prompt": "<image>\n" + PROMPT} for row in rows],
        [{**row, "prompt": messages} for row in rows],
        [{**row, "prompt": [{"role": "user", "content": PROMPT}]} for row in rows],
        [{**row, "chosen": [{"role": "assistant", "content": row["chosen"]}]} for row in rows],
        [{**row, "image": row["images"][0], "images": None} for row in rows],
    ]
    for form in forms:
        batch = Collator(PROCESSOR)(form)
        assert all(torch.equal(batch["model_inputs"][n], v) for n, v in reference["model_inputs"].items())
        assert torch.equal(batch["layout"].sentence_offsets, reference["layout"].sentence_offsets)


def test_mixed_batch_of_rows_with_two_one_and_no_images():
    rows = [
        {"id": "two", "prompt": "<image> or <image>?", "images": [tiny_image("red"), tiny_image("blue")]},
        {"id": "none", "prompt": "Hello.", "images": []},
        {"id": "one", "prompt": PROMPT, "images": [tiny_image("green")]},
    ]
    rows = [{**row, "chosen": "It is red.", "rejected": "It is blue."} for row in rows]
    batch = Collator(PROCESSOR)(rows)
    pixels = batch["model_inputs"]["pixel_values"]
    assert pixels.shape[0] == 6
    images = torch.cat(
        [PROCESSOR.image_processor([i], return_tensors="pt")["pixel_values"] for r in rows for i in r["images"]]
    )
    assert torch.equal(pixels, torch.cat([images, images]))
    counts = (batch["model_inputs"]["input_ids"] == PROCESSOR.image_token_id).sum(1).tolist()
    assert counts == [2 * IMAGE_TOKENS, 0, IMAGE_TOKENS] * 2
    assert batch["similarity"] is None
    text_only = Collator(PROCESSOR)([rows[1]])
    assert "pixel_values" not in text_only["model_inputs"]


def test_images_are_decoded_once(monkeypatch):
    rows, seen = tiny_rows(3), []
    monkeypatch.setattr(aspo.images, "_decoded", lambda entry, root: seen.append(entry) or entry)
    Collator(PROCESSOR)(rows)
    assert [id(entry) for entry in seen] == [id(row["images"][0]) for row in rows]


def test_a_text_tokenizer_is_enough_for_text_rows():
    rows = [{"id": "a", "prompt": "Hello.", "chosen": "It is red. It is small.", "rejected": "It is blue."}]
    batch = Collator(tiny_tokenizer())(rows)
    assert set(batch["model_inputs"]) == {"input_ids", "attention_mask"}
    assert TOKENIZER.decode(batch["model_inputs"]["input_ids"][0]) == (
        "USER: Hello.\nASSISTANT: It is red. It is small.<eos>"  # a tokenizer's template writes BOS itself, or has none
    )
    with pytest.raises(ValueError, match=r"row 'a': 1 images.* has no image processor"):
        Collator(tiny_tokenizer())([{**rows[0], "images": [tiny_image()]}])


@pytest.mark.parametrize("cut", range(1, 31))
def test_truncation_cuts_responses_and_similarities_only(cut):
    rows = tiny_rows(3)
    full = Collator(PROCESSOR)(rows)
    prompt = len(
        PROCESSOR(text=encode_prompt(PROCESSOR, PROMPT, rows[0]["images"]).text, images=rows[0]["images"])["input_ids"][
            0
        ]
    )
    batch = Collator(PROCESSOR, max_length=prompt + cut)(rows)
    assert (batch["model_inputs"]["input_ids"] == PROCESSOR.image_token_id).sum(1).tolist() == [IMAGE_TOKENS] * 6
    for whole, part in zip(decoded_targets(full), decoded_targets(batch), strict=True):
        assert whole.startswith(part)
    lengths = batch["layout"].response_token_offsets.diff()
    assert torch.equal(lengths, full["layout"].response_token_offsets.diff().clamp(max=cut))
    sentences = batch["layout"].response_offsets.diff().tolist()
    kept = [x for row, n in zip(rows, sentences, strict=False) for x in row["chosen_similarity"][:n]]
    assert batch["similarity"].tolist() == pytest.approx(kept)


def test_truncation_says_so_once(caplog):
    collator = Collator(PROCESSOR, max_length=30)
    with caplog.at_level(logging.WARNING):
        collator(tiny_rows(2))
        collator(tiny_rows(2))
    assert len(caplog.records) == 1 and "row 'row-0': its chosen response is cut" in caplog.text


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"max_length": 22}, "row 'row-1': its prompt alone takes 22 tokens"),
        ({"prompt": "<image><image>"}, {}, "row 'row-1': the prompt marks 2 images but the row has 1"),
        ({"prompt": "", "images": []}, {}, "row 'row-1': the prompt is empty"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
            {},
            "row 'row-1': a message part of type 'video'",
        ),
        ({"images": ["/no/such.png"]}, {}, "row 'row-1': no image file /no/such.png"),
        ({"chosen": ""}, {}, "row 'row-1': column 'chosen': the response is empty"),
        ({"chosen": "It is <image>."}, {}, "row 'row-1': the response holds the image token"),
        ({"chosen_sentences": [[0, 3]]}, {}, "row 'row-1': .*the sentences end at character 3"),
        ({"chosen_similarity": [0.5]}, {}, "row 'row-1': column 'chosen_similarity': 1 values"),
        ({"chosen_similarity": None}, {}, "row 'row-1': no chosen_similarity, but other rows have it"),
    ],
)
def test_errors_name_the_row(change, options, message):
    rows = tiny_rows(2)
    rows[1].update(change)
    if "chosen" in change:
        rows[1].update(chosen_sentences=None, chosen_similarity=None)
        rows[0].update(chosen_similarity=None)
    if "max_length" in options:
        rows[0]["prompt"] = "D"
    with pytest.raises(ValueError, match=message):
        Collator(PROCESSOR, **options)(rows)


def test_bad_options():
    with pytest.raises(ValueError, match="max_length is 0"):
        Collator(PROCESSOR, max_length=0)


def test_one_response_column_makes_rows_of_role_zero():
    batch = Collator(PROCESSOR, responses=("rejected",))(tiny_rows(2))
    assert batch["layout"].role.tolist() == [0, 0]
    assert decoded_targets(batch) == [row["rejected"] + "<eos>" for row in tiny_rows(2)]


def test_sample_weights_default_to_one():
    rows = tiny_rows(3)
    rows[1]["sample_weight"] = 0.25
    assert Collator(PROCESSOR)(rows)["sample_weight"].tolist() == [1.0, 0.25, 1.0]


def test_a_response_that_ends_with_eos_gets_no_second_one():
    rows = [
        {**row, "chosen": row["chosen"] + "<eos>", "chosen_sentences": None, "chosen_similarity": None}
        for row in tiny_rows(1)
    ]
    assert decoded_targets(Collator(PROCESSOR)(rows))[0] == rows[0]["chosen"]


def test_collator_can_be_sent_to_a_worker():
    batch = pickle.loads(pickle.dumps(Collator(PROCESSOR, max_length=64)))(tiny_rows(1))
    assert decoded_targets(batch)[0].endswith("<eos>")


def with_template(template):
    processor = tiny_processor()
    processor.chat_template = template
    return processor


@pytest.mark.parametrize(
    ("template", "prompt_end", "lead", "ids_text"),
    [
        (CHAT_TEMPLATE, "ASSISTANT: ", "", "It is red.<eos>"),
        (CHAT_TEMPLATE.replace("{% if add_generation_prompt %}ASSISTANT: ", "{% if add_generation_prompt %}ASSISTANT:"),
         "ASSISTANT:", " ", " It is red.<eos>"),
        (CHAT_TEMPLATE.replace("{{ eos_token if message['role'] == 'assistant' else '\n' }}", "\n"),
         "ASSISTANT: ", "", "It is red.<eos>"),  # a template without EOS: it is appended
        (CHAT_TEMPLATE.replace("{{ eos_token if message['role'] == 'assistant' else '\n' }}", "<pad>\n"),
         "ASSISTANT: ", "", "It is red.<pad>"),  # another end-of-turn token; the line break behind it is not learnt
    ],
)  # fmt: skip
def test_templates(template, prompt_end, lead, ids_text):
    processor = with_template(template)
    prompt = encode_prompt(processor, PROMPT, [tiny_image()])
    assert prompt.text.endswith(prompt_end) and prompt.lead == lead and prompt.add_special_tokens
    ids, offsets = encode_response(processor, prompt, "It is red.")
    assert processor.tokenizer.decode(ids) == ids_text
    assert len(ids) == len(offsets) and offsets[-1] == (10, 10)


def test_template_with_bos_gets_no_second_one():
    processor = with_template("{{ bos_token }}" + CHAT_TEMPLATE)
    batch = Collator(processor)(tiny_rows(1))
    assert (batch["model_inputs"]["input_ids"] == TOKENIZER.bos_token_id).sum(1).tolist() == [1, 1]


def test_without_a_template_the_text_stays_as_it_is():
    processor = with_template(None)
    processor.tokenizer.chat_template = None
    assert encode_prompt(processor, "USER: <image>\nHi ASSISTANT:", [1]).text == "USER: <image>Hi ASSISTANT:"
    assert encode_prompt(processor, "Hi", [1]).text == "<image>Hi"
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(processor, [{"role": "user", "content": "Hi"}], [1])


def test_template_that_drops_responses():
    with pytest.raises(ValueError, match="leaves out the assistant's message"):
        encode_prompt(with_template("{% for m in messages %}x{% endfor %}"), PROMPT, [1])


def sentencepiece_like():
    """A Llama-2-like tokenizer: "▁" is put in front of a text and stands for spaces."""
    tokens = ["<unk>", "<s>", "</s>", "▁", ":", ".", "A", "I", "t", "▁I", "▁It", "▁is", "i", "s", "is", "\n"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "I"), ("▁I", "t"), ("i", "s"), ("▁", "is")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = hf_decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="</s>")


@pytest.mark.parametrize(
    ("asks", "answers", "first", "as_whole"),
    [("A:", "A: ", "▁It", True), ("A:\n", "A:\n", "I", True), ("A: ", "A: ", "▁It", False)],
)
def test_response_tokens_are_those_of_the_whole_text(asks, answers, first, as_whole):
    """No stray "▁" where the response follows a space, none where it follows a line break."""
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '" + answers.replace("\n", "\\n") + "' if m['role'] == 'assistant' else '' }}"
        "{{ m['content'] }}{% endfor %}{{ '" + asks.replace("\n", "\\n") + "' if add_generation_prompt else '' }}"
    )
    prompt = encode_prompt(tokenizer, "It", [])
    ids, offsets = encode_response(tokenizer, prompt, "It is.")
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[0] == first and tokens[-1] == "</s>" and offsets[-2][1] == 6
    if as_whole:  # otherwise a token straddles the boundary: the response is tokenised alone
        whole = tokenizer(prompt.text + prompt.lead + "It is.", add_special_tokens=False)["input_ids"]
        assert whole[-len(ids) + 1 :] == ids[:-1]


def test_a_sentence_without_a_token():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["!B"])
    row = {"id": "x", "prompt": "Hello.", "chosen": "A!B", "rejected": "C.", "chosen_sentences": [[0, 2], [2, 3]]}
    batch = Collator(tokenizer)([row])  # without scores: the two sentences become one
    assert batch["layout"].response_offsets.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"row 'x': column 'chosen_sentences': sentence 1 \('B'\) has no token"):
        Collator(tokenizer)([{**row, "chosen_similarity": [0.1, 0.2]}])


TEXT = st.text(st.sampled_from('aB1 .!?\n"()*…。猫🐶é'), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.integers(1, 40))
def test_every_counted_token_has_one_sentence(responses, room):
    rows = [{"id": str(n), "prompt": "Hello.", "chosen": c, "rejected": r} for n, (c, r) in enumerate(responses)]
    batch = Collator(tiny_tokenizer(), max_length=13 + room)(rows)
    layout = batch["layout"]
    offsets = layout.sentence_offsets
    assert offsets[0] == 0 and offsets[-1] == layout.num_tokens and (offsets.diff() > 0).all()
    assert (layout.response_offsets.diff() > 0).all()
    assert layout.num_responses == 2 * len(rows)


def test_a_missing_pad_token_becomes_eos():
    processor = tiny_processor()
    processor.tokenizer.pad_token = None
    inputs = generation_inputs(processor, [*tiny_rows(1), {"prompt": "Hi", "images": tiny_rows(1)[0]["images"]}])
    assert inputs["input_ids"][1, 0] == EOS and inputs["attention_mask"][1, 0] == 0
    ids = Collator(processor)(tiny_rows(2))
    assert decoded_targets(ids)[0].count("<eos>") == 1


def test_generation_inputs_are_the_prompts_padded_on_the_left():
    rows = tiny_rows(2)
    rows[1]["prompt"] = "Hi"
    inputs = generation_inputs(PROCESSOR, rows)
    assert inputs["attention_mask"][0].all() and not inputs["attention_mask"][1, 0]
    pairs = Collator(PROCESSOR)(rows)["model_inputs"]["input_ids"]
    for r in range(2):
        prompt = inputs["input_ids"][r][inputs["attention_mask"][r].bool()]
        assert torch.equal(prompt, pairs[r, : len(prompt)])
    assert torch.equal(
        inputs["pixel_values"],
        PROCESSOR.image_processor([r["images"][0] for r in rows], return_tensors="pt")["pixel_values"],
    )


def test_the_model_reads_the_batch_and_padding_changes_nothing(tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava(tmp_path)).eval()
    rows = tiny_rows(3)
    batch = Collator(PROCESSOR)(rows)
    with torch.no_grad():
        logps = model(**batch["model_inputs"]).logits.log_softmax(-1).flatten(0, 1)
        packed = logps[batch["layout"].hidden_index].gather(1, batch["layout"].targets[:, None])
        alone = []
        for row in rows:
            single = Collator(PROCESSOR, responses=("chosen",))([row])
            one = model(**single["model_inputs"]).logits.log_softmax(-1).flatten(0, 1)
            alone.append(one[single["layout"].hidden_index].gather(1, single["layout"].targets[:, None]))
    alone = torch.cat(alone)
    torch.testing.assert_close(packed[: len(alone)], alone, rtol=1e-5, atol=1e-5)


def llava_next_processor():
    return LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": 30},
            crop_size={"height": 30, "width": 30},
            image_grid_pinpoints=[[30, 60], [60, 30], [60, 60]],
        ),
        tiny_tokenizer(),
        patch_size=10,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def qwen_processor():
    special = ("<pad>", "<bos>", "<eos>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(patch_size=5, merge_size=2, size={"shortest_edge": 400, "longest_edge": 3600}),
        tiny_tokenizer(special_tokens=special),
        Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


@pytest.mark.parametrize("make", [llava_next_processor, qwen_processor])
def test_other_processors_keep_all_their_tensors(make):
    """Images of unequal size, which expand to unequal numbers of tokens and patches."""
    processor = make()
    rows = tiny_rows(3)
    rows[1]["images"] = [tiny_image("red").resize((90, 40))]
    rows[2]["images"] = None
    inputs = Collator(processor)(rows)["model_inputs"]
    text = [encode_prompt(processor, row["prompt"], row["images"] or []).text for row in rows]
    own = processor(text=text, images=[rows[0]["images"][0], rows[1]["images"][0]], return_tensors="pt", padding=True)
    assert set(inputs) == set(own)
    assert ("image_sizes" if make is llava_next_processor else "mm_token_type_ids") in inputs
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            assert value.shape == inputs["input_ids"].shape
        else:
            assert torch.equal(value, torch.cat([own[name], own[name]]))
    is_image = inputs["input_ids"] == processor.image_token_id
    expected = (own["input_ids"] == processor.image_token_id).sum(1)
    assert is_image.sum(1).tolist() == expected.tolist() * 2 and expected[1] > expected[0] > expected[2] == 0
    if "mm_token_type_ids" in inputs:
        assert torch.equal(inputs["mm_token_type_ids"], is_image.long())
