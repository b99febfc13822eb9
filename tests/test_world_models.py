"""The shipped models: both CLIP forms agree, plain transformers loads them, and they still pass their gates."""

import json
from itertools import islice

import pytest
import torch

from aspo.world import assets_dir, load_clip, load_clip_hf, load_vlm
from aspo.world.clip import cosines
from aspo.world.data import rows
from aspo.world.gates import LIMITS, failures, measure, prompt_ids
from aspo.world.language import DESCRIBE, describe, judge
from aspo.world.pixels import pixels
from aspo.world.scenes import IMAGE_TOKENS, Scene, scenes

SCENES = list(islice(scenes("validation"), 150))


@pytest.fixture(scope="module")
def vlm():
    return load_vlm()


@pytest.fixture(scope="module")
def clip():
    return load_clip()


def test_assets_are_small_and_safetensors_only():
    files = [path for path in assets_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}


def test_both_clip_forms_give_the_same_cosines(clip):
    model, preprocess, tokenizer = clip
    converted, processor = load_clip_hf()
    batch = rows("validation", 8)
    images = [row["images"][0] for row in batch]
    texts = ["The circle is red.", "The star is at the top left.", describe(SCENES[0]), "Something else: 5 naïve cats!"]
    with torch.no_grad():
        ours = cosines(
            model.encode_image(torch.stack([preprocess(image) for image in images])),
            model.encode_text(tokenizer(texts)),
        )
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        theirs = converted(**inputs).logits_per_image / converted.logit_scale.exp()
    assert ours.std() > 0.05  # not all alike
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)


def test_the_vlm_reads_the_clip_tower(vlm, clip):
    model, _ = vlm
    converted, _ = load_clip_hf()
    state = converted.vision_model.state_dict()
    for name, value in model.model.vision_tower.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_processors_agree_with_pixels(vlm, clip):
    _, processor = vlm
    _, preprocess, _ = clip
    row = rows("validation", 1)[0]
    expected = pixels([Scene.from_json(row["scene"])])
    torch.testing.assert_close(preprocess(row["images"][0])[None], expected, atol=1e-5, rtol=0)
    got = processor(text="<image>", images=row["images"], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_plain_transformers_loads_and_answers(vlm):
    from transformers import AutoProcessor, LlavaForConditionalGeneration  # after aspo: see aspo/torchvision_cpu.py

    folder = assets_dir() / "vlm"
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    row = rows("validation", 1)[0]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(text=text, images=row["images"], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == prompt_ids(processor, DESCRIBE)
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == IMAGE_TOKENS
    out = model.generate(**inputs, do_sample=False)
    answer = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    claims = judge(answer, Scene.from_json(row["scene"]))
    assert 3 <= len(claims) <= 7 and all(claim.checkable for claim in claims)


def test_tokenizer_has_exact_offsets_and_whole_words(vlm):
    tokenizer = vlm[1].tokenizer
    text = describe(SCENES[0])
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert "".join(text[start:end] for start, end in encoded.offset_mapping) == text
    assert len(encoded.input_ids) == 5 * len(SCENES[0].things)
    assert tokenizer.decode(encoded.input_ids) == text
    assert tokenizer.decode(tokenizer("Ünïcode 漢字 🦊").input_ids) == "Ünïcode 漢字 🦊"
    assert tokenizer.padding_side == "left" and tokenizer.eos_token_id not in encoded.input_ids


def test_chat_template_marks_the_answer_as_generated(vlm):
    tokenizer = vlm[1]
    chat = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "The star is red."}]
    text = tokenizer.apply_chat_template(chat)
    assert text == "<s>USER:\nHello.\nASSISTANT:\nThe star is red.</s>"
    chat[1]["content"] = [{"type": "text", "text": "The star is red."}]
    assert tokenizer.apply_chat_template(chat) == text


def test_committed_gates_pass():
    gates = json.loads((assets_dir() / "gates.json").read_text())
    assert {name: tuple(limits) for name, limits in gates["limits"].items()} == LIMITS
    assert failures(gates["figures"]) == []


@pytest.mark.slow
def test_gates_measured_again_on_other_scenes_and_seeds(vlm, clip):
    """Fewer scenes than the committed figures were measured on: the tolerance is three standard errors or so."""
    model, processor = vlm
    clip_model, _, tokenizer = clip
    committed = json.loads((assets_dir() / "gates.json").read_text())["figures"]
    figures = measure(model, processor, clip_model, tokenizer, SCENES)
    for name in ("chosen_wrong_share", "greedy_wrong_share", "similarity_auc", "wrong_is_prior_share"):
        assert figures[name] == pytest.approx(committed[name], abs=0.06), name
    assert figures["dropped_share"] < 0.5
    assert min(figures[f"probe_{name}"] for name in ("colour", "shape", "size")) > 0.95
