"""aspo.model: hidden states and head give the model's own log-probabilities; generation is batch-independent."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_image, tiny_llava, tiny_rows
from torch import nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GraniteConfig,
)
from transformers.models.granite.modeling_granite import GraniteForCausalLM

from aspo import generation
from aspo.data import Collator
from aspo.generation import generate, generate_answers
from aspo.model import (
    check_head,
    load_model,
    output_head,
    resolve_device,
    response_logps,
    trunk_hidden,
)

TEXT = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_llava(tmp_path_factory.mktemp("model") / "llava")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


def own_logps(model, batch):
    """(N,) from the model's own logits: the slow way, with nothing of aspo in it."""
    logits = model(**batch["model_inputs"]).logits.float().flatten(0, 1)
    layout = batch["layout"]
    return logits[layout.hidden_index].log_softmax(-1).gather(-1, layout.targets[:, None])[:, 0]


def test_hidden_states_and_head_are_the_models_log_probabilities(loaded):
    model, processor = loaded
    batch = Collator(processor)(tiny_rows(3))
    expected = own_logps(model, batch)

    def forbidden(*_):
        raise AssertionError("logits were built")

    handle = model.lm_head.register_forward_pre_hook(forbidden)
    hidden = trunk_hidden(model, batch["model_inputs"])
    handle.remove()
    assert hidden.shape == (*batch["model_inputs"]["input_ids"].shape, 32)
    layout = batch["layout"]
    logps = output_head(model).logps(hidden.flatten(0, 1)[layout.hidden_index], layout.targets)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


def test_the_image_reaches_the_hidden_states(loaded):
    model, processor = loaded
    rows = tiny_rows(1)
    (first,) = response_logps(model, processor, rows)
    (other,) = response_logps(model, processor, [{**rows[0], "images": [tiny_image("blue")]}])
    assert (first.logps - other.logps).abs().max() > 1e-4


def text_model(kind):
    torch.manual_seed(0)
    if kind == "cohere":  # multiplies its logits
        return Cohere2ForCausalLM(Cohere2Config(**TEXT, logit_scale=0.25))
    if kind == "granite":  # divides them
        return GraniteForCausalLM(
            GraniteConfig(**{k: v for k, v in TEXT.items() if k != "head_dim"}, logits_scaling=4.0)
        )
    return Gemma2ForCausalLM(Gemma2Config(**TEXT, final_logit_softcapping=0.05))  # low, so that it bites


@pytest.mark.parametrize("kind", ["cohere", "granite", "gemma2"])
def test_scaled_and_capped_heads(kind):
    model = text_model(kind).eval()
    ids = torch.arange(3, 15).reshape(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model(**inputs).logits.float().flatten(0, 1)
    plain = trunk_hidden(model, inputs).flatten(0, 1) @ model.get_output_embeddings().weight.T
    assert (plain - expected).abs().max() > 0.01 * expected.abs().max()  # the transform is not trivial here
    targets = torch.arange(12) + 20
    logps = output_head(model).logps(trunk_hidden(model, inputs).flatten(0, 1), targets)
    torch.testing.assert_close(logps, expected.log_softmax(-1)[torch.arange(12), targets], rtol=1e-5, atol=1e-5)
    assert check_head(model, inputs) < 1e-5


def test_check_head_sees_a_transform_it_does_not_know():
    model = text_model("cohere").eval()
    model.config.logit_scale = 1.0  # the model goes on multiplying by 0.25
    ids = torch.arange(3, 9)[None]
    with pytest.raises(ValueError, match="transforms them in a way"):
        check_head(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_an_adapter_on_the_head_is_refused(folder):
    model, _ = load_model(folder)
    adapted = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="output head"):
        output_head(adapted)
    model, _ = load_model(folder)
    saved = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        output_head(saved)


def test_left_padding_changes_no_answer(loaded):
    model, processor = loaded
    rows = tiny_rows(4)
    rows = [{**row, "prompt": "Describe the image." + " And the shape?" * i} for i, row in enumerate(rows)]
    alone = [generate(model, processor, [row], max_new_tokens=12)[0] for row in rows]
    assert generate(model, processor, rows, max_new_tokens=12, batch_size=4) == alone
    assert len(set(alone)) > 1


def test_rows_with_and_without_images_in_one_batch(loaded):
    model, processor = loaded
    rows = tiny_rows(2)
    bare = {"prompt": "What is it?"}
    mixed = generate(model, processor, [rows[0], bare, rows[1]], max_new_tokens=8)
    assert mixed[1] == generate(model, processor, [bare], max_new_tokens=8)[0]
    assert [mixed[0], mixed[2]] == generate(model, processor, rows, max_new_tokens=8)


def test_sampling_is_seeded_and_restartable(loaded):
    model, processor = loaded
    rows, options = tiny_rows(6), {"max_new_tokens": 10, "temperature": 1.0, "batch_size": 2}
    before = torch.random.get_rng_state()
    whole = generate(model, processor, rows, seed=5, **options)
    assert torch.equal(before, torch.random.get_rng_state())
    assert generate(model, processor, rows, seed=5, **options) == whole
    assert generate(model, processor, rows[4:], seed=5 + 4, **options) == whole[4:]
    assert generate(model, processor, rows, seed=99, **options) != whole


def test_random_states_of_all_accelerators_are_kept_without_a_warning(monkeypatch):
    states = {0: torch.tensor([1]), 1: torch.tensor([2])}
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    before = dict(states)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with generation._own_random_numbers():
            states.clear()
    assert states == before


@pytest.mark.parametrize(("row", "message"), [({"prompt": " "}, "is empty"), ({"images": ["no.png"]}, "no.png")])
def test_the_first_row_is_named_too(loaded, row, message):
    row = {**tiny_rows(1)[0], "images": [], "id": "a", **row}
    with pytest.raises((ValueError, OSError), match=f"row 'a': .*{message}"):
        generate(*loaded, [row])
    with pytest.raises((ValueError, OSError), match=f"row 'a': .*{message}"):
        generation.generate_sentences(*loaded, [row], [""])


def test_answers_say_how_they_ended_and_leave_the_mode_alone(loaded):
    model, processor = loaded
    model.train()
    (answer,) = generate_answers(model, processor, tiny_rows(1), max_new_tokens=5)
    assert model.training
    model.eval()
    assert answer.num_tokens <= 5 and answer.finished == (answer.num_tokens < 5)
    bias = torch.zeros(len(processor.tokenizer))
    bias[2] = 1e4  # EOS whatever the hidden state
    model.lm_head.bias = nn.Parameter(bias)
    try:
        (answer,) = generate_answers(model, processor, tiny_rows(1), max_new_tokens=5)
    finally:
        model.lm_head.bias = None
    assert answer == type(answer)("", 1, True)


def test_the_models_own_generation_config_decides_nothing(loaded):
    model, processor = loaded
    rows, options = tiny_rows(2), {"max_new_tokens": 8}
    expected, own = generate(model, processor, rows, **options), model.generation_config
    first = processor.tokenizer(expected[0])["input_ids"]
    model.generation_config = GenerationConfig(suppress_tokens=first, min_new_tokens=8, no_repeat_ngram_size=1)
    theirs = model.generation_config
    try:
        assert generate(model, processor, rows, **options) == expected
        assert model.generation_config is theirs
    finally:
        model.generation_config = own


def test_pixel_transform_sees_the_images(loaded):
    model, processor = loaded
    shapes = []

    def black(pixels):
        shapes.append(tuple(pixels.shape))
        return torch.zeros_like(pixels)

    rows = tiny_rows(3)
    noised = generate(model, processor, rows, max_new_tokens=6, pixel_transform=black)
    assert shapes == [(3, 3, 30, 30)]
    assert len(set(noised)) == 1  # one prompt, and now one image


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"max_new_tokens": 0}, {"batch_size": 0}])
def test_generate_refuses(loaded, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        generate(*loaded, tiny_rows(1), **bad)


def test_response_logps_are_the_models_own(loaded):
    model, processor = loaded
    rows = tiny_rows(5)
    for start, scored in zip((0, 3), response_logps(model, processor, rows, batch_size=3), strict=True):
        assert torch.is_grad_enabled()
        batch = Collator(processor)(rows[start : start + 3])
        torch.testing.assert_close(scored.logps, own_logps(model, batch).detach(), rtol=1e-5, atol=1e-5)
        assert scored.ids == [row["id"] for row in rows[start : start + 3]]
        torch.testing.assert_close(scored.similarity, batch["similarity"])


def test_loading(folder, tmp_path):
    assert load_model(folder, "bfloat16")[0].lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="int4"):
        load_model(folder, "int4")
    with pytest.raises(ValueError, match="holds no model"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="there is no model folder"):
        load_model(tmp_path / "gone")
    with pytest.raises(ValueError, match="device 'tpu9' cannot be used"):
        load_model(folder, device="tpu9")
    with pytest.raises(ValueError, match="is no adapter"):
        load_model(folder, base="elsewhere")


def test_a_torch_built_for_gpus_runs_on_a_machine_without_one(monkeypatch):
    """What pip installs by default; asked without check_available, it names the device that it was built for."""

    def built_for_cuda(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    assert resolve_device() == torch.device("cpu")


def test_loading_an_adapter_and_its_moved_base(folder, tmp_path):
    model, _ = load_model(folder)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded, processor = load_model(tmp_path / "adapter")
    batch = Collator(processor)(tiny_rows(2))
    torch.testing.assert_close(
        trunk_hidden(loaded, batch["model_inputs"]), trunk_hidden(adapted.eval(), batch["model_inputs"])
    )
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(config.replace(str(folder), "/nowhere/model"))
    with pytest.raises(ValueError, match="/nowhere/model"):
        load_model(tmp_path / "adapter")
    assert load_model(tmp_path / "adapter", base=str(folder))[0].peft_config
