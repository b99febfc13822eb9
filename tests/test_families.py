"""Every real model family: our log-probabilities are the model's own, nothing leaks, the right modules are trained."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import gc
import math
import re
from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, family, unequal_rows
from peft import LoraConfig, get_peft_model
from tiny import tiny_image
from torch import nn

from aspo.config import AspoConfig
from aspo.data import Collator, encode_prompt, encode_response
from aspo.model import check_head, generate, load_model, output_head, response_logps, trunk_hidden
from aspo.policy import lora_targets, vision_tower
from aspo.trainer import AspoTrainer
from aspo_kernels import gather_hidden

EXACT = {"rtol": 1e-5, "atol": 2e-5}  # fp32; log-probabilities are about -6, and reach -10
every_family = pytest.mark.parametrize("name", FAMILIES)
QUICK = ("LLaVA-1.5", "InstructBLIP", "Qwen2.5-VL")
every_way = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", autouse=True)
def frozen_modules() -> Iterator[None]:
    """Trainer collects garbage after a run, which takes longer than the run with all imported modules in sight."""
    gc.freeze()
    yield
    gc.unfreeze()


def rows_of(name):
    """All kinds of rows that a family can have in one batch: image sizes differ, no image, several images."""
    rows = unequal_rows(4)
    if FAMILIES[name].text_rows:
        del rows[1]["images"]
    if FAMILIES[name].several_images:
        rows[3]["images"] = [tiny_image("blue"), tiny_image("green").resize((70, 40))]
    return rows


def own_logps(model, processor, row, column):
    """(tokens,) log-probabilities of a response: the row alone, without padding, from the model's full logits."""
    images = row.get("images", [])
    prompt = encode_prompt(processor, row["prompt"], images)
    answer, _ = encode_response(processor, prompt, row[column])
    options = {"add_special_tokens": prompt.add_special_tokens, "padding": True, "return_tensors": "pt"}
    options |= {"images": [images]} if images else {}
    inputs = dict(processor(text=[prompt.text], **options))
    inputs.pop("labels", None)
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    types = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": int("Pali" in type(processor).__name__)}
    for key, value in types.items():
        if key in inputs:
            more = torch.full((1, len(answer)), value, dtype=inputs[key].dtype)
            inputs[key] = torch.cat([inputs[key], more], 1)
    with torch.no_grad():
        logits = model(**inputs).logits[0, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


def all_own_logps(model, processor, rows):
    """(N,) in the layout's order."""
    return torch.cat([own_logps(model, processor, row, column) for column in ("chosen", "rejected") for row in rows])


def our_logps(model, batch, model_inputs=None):
    """(N,) log-probabilities of a collated batch."""
    with torch.no_grad():
        hidden = gather_hidden(trunk_hidden(model, model_inputs or batch["model_inputs"]), batch["layout"])
        return output_head(model).logps(hidden, batch["layout"].targets)


@every_family
def test_log_probabilities_are_the_models_own(name):
    model, processor = family(name)
    rows = rows_of(name)
    expected = all_own_logps(model, processor, rows)
    (batch,) = response_logps(model, processor, rows)
    torch.testing.assert_close(batch.logps, expected, **EXACT)
    assert expected.std() > 0.5  # nats: a wrong distribution would show


@every_family
def test_each_image_matters(name):
    model, processor = family(name)
    rows = rows_of(name)
    (batch,) = response_logps(model, processor, rows)
    offsets = batch.layout.response_token_offsets
    for r, row in enumerate(rows):
        for i, image in enumerate(row.get("images", [])):
            images = list(row["images"])
            images[i] = tiny_image("yellow", (0, 10, 30, 20)).resize(image.size)
            (other,) = response_logps(model, processor, [*rows[:r], {**row, "images": images}, *rows[r + 1 :]])
            moved = (other.logps - batch.logps).abs()
            own = torch.zeros(len(moved), dtype=torch.bool)
            for response in (r, r + len(rows)):
                own[offsets[response] : offsets[response + 1]] = True
            assert moved[own].max() > 1e-2 and moved[~own].max() < 2e-5


@every_family
def test_no_token_sees_its_own_future(name):
    model, processor = family(name)
    batch = Collator(processor)(rows_of(name))
    layout, inputs = batch["layout"], dict(batch["model_inputs"])
    lengths = inputs["attention_mask"].sum(1)
    ids = inputs["input_ids"].clone()
    for r, length in enumerate(lengths):
        ids[r, length - 3 : length] = ids[r, length - 3 : length] % 7 + 300
    before, after = our_logps(model, batch), our_logps(model, batch, {**inputs, "input_ids": ids})
    column, row = layout.hidden_index % ids.shape[1], layout.hidden_index // ids.shape[1]
    earlier = column < lengths[row] - 3
    moved = (after - before).abs()
    assert moved[earlier].max() < 2e-5 and moved[~earlier].max() > 0.1 and earlier.sum() > 100


@every_family
def test_head_and_generation(name):
    model, processor = family(name)
    rows = rows_of(name)
    assert check_head(model, Collator(processor)(rows)["model_inputs"]) < 1e-5
    alone = [generate(model, processor, [row], max_new_tokens=6)[0] for row in rows]
    assert generate(model, processor, rows, max_new_tokens=6) == alone
    assert len(set(alone)) > 1


@every_family
def test_any_attention_through_the_auto_classes(name, tmp_path):
    model, processor = family(name)
    rows = rows_of(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = []
    implementations = ("eager", "sdpa") if model.get_decoder()._supports_sdpa else ("eager",)  # Gemma-2 has no SDPA
    for attention in implementations:
        loaded, own_processor = load_model(tmp_path, device="cpu", attn_implementation=attention)
        assert type(loaded) is type(model) and type(own_processor) is type(processor)
        assert loaded.config.get_text_config()._attn_implementation == attention
        (batch,) = response_logps(loaded, own_processor, rows)
        found.append(batch.logps)
    expected = all_own_logps(model, processor, rows)
    for logps in found:
        torch.testing.assert_close(logps, expected, **EXACT)


@every_family
def test_the_right_modules(name):
    model, _ = family(name)
    tower = vision_tower(model)
    names = {module: path for path, module in model.named_modules()}
    assert re.search(r"(vision|visual)[a-z_]*$", names[tower]) and len(list(tower.parameters())) > 10
    head = model.get_output_embeddings()
    adapted = [path for path in names.values() if re.fullmatch(lora_targets(model), path)]
    of_text = [path for path, module in model.named_modules() if re.search(r"(language|text)_model\.", path)
               and isinstance(module, nn.Linear) and module is not head]  # fmt: skip
    assert sorted(adapted) == sorted(of_text) and len(adapted) == 2 * 7  # q k v o, gate up down


def trained(name, folder, lora=None, **options):
    """The model after two steps, and its weights before, by name."""
    model, processor = family(name)
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    if lora is not None:
        model = get_peft_model(model, lora(model))
    config = AspoConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", report_to=[], max_steps=2,
        logging_steps=1, learning_rate=1e-3, per_device_train_batch_size=4, max_length=None, **options,
    )  # fmt: skip
    trainer = AspoTrainer(model, config, rows_of(name), processing_class=processor)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[1] < losses[0] - 1e-3
    return trainer.model, before


def check_adapted(policy, before):
    """Only the adapters have changed, all of them."""
    adapters = {path: p for path, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in path for path in adapters)
    assert all(p.abs().max() > 0 for path, p in adapters.items() if "lora_B" in path)
    base = {path.replace("base_layer.", ""): p for path, p in policy.get_base_model().named_parameters()}
    assert all(torch.equal(base[path], value) for path, value in before.items())


@every_family
def test_lora_trains(name, tmp_path):
    check_adapted(*trained(name, tmp_path))


@pytest.mark.parametrize("name", every_way)
def test_gradient_checkpointing_trains(name, tmp_path):
    check_adapted(*trained(name, tmp_path, gradient_checkpointing=True))


@pytest.mark.parametrize("name", every_way)
def test_dora_trains(name, tmp_path):
    dora = trained(name, tmp_path, lora=lambda m: LoraConfig(target_modules=lora_targets(m), use_dora=True))
    check_adapted(*dora)
    assert any("lora_magnitude_vector" in path for path, p in dora[0].named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", every_way)
def test_full_fine_tuning_trains(name, tmp_path):
    policy, before = trained(name, tmp_path, use_lora=False)
    frozen = {id(p) for p in vision_tower(policy).parameters()}
    of_text = {id(p) for p in policy.get_decoder().parameters()}
    changed = {id(p) for path, p in policy.named_parameters() if not torch.equal(p, before[path])}
    assert not changed & frozen and changed > of_text  # and the projector
