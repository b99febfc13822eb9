"""Every real model family: log-probabilities are the model's own, in plain, shared and packed rows; nothing leaks."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import re

import pytest
import torch
from families import FAMILIES, family, rows_of, unequal_rows
from families_table import COLUMNS, written
from tiny import tiny_image

from aspo.data import Collator, encode_prompt, encode_response
from aspo.generation import generate
from aspo.model import check_head, load_model, output_head, response_logps, trunk_hidden
from aspo.shared_prefix.attention import routes_to_try, with_route
from aspo.shared_prefix.exact import check_tree
from aspo.shared_prefix.forward import tree_inputs
from aspo_kernels import gather_hidden

EXACT = {"rtol": 1e-5, "atol": 2e-5}  # fp32; log-probabilities are about -6, and reach -10
every_family = pytest.mark.parametrize("name", FAMILIES)


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


def our_logps(model, batch, route="mask", **other_inputs):
    """(N,) log-probabilities of a collated batch, with other model inputs in place of its own."""
    with_route(model, route)
    inputs = tree_inputs(model, {**batch["model_inputs"], **other_inputs}, batch["tree"], route)
    with torch.no_grad():
        hidden = gather_hidden(trunk_hidden(model, inputs), batch["layout"])
        return output_head(model).logps(hidden, batch["layout"].targets)


def of_responses(layout, responses):
    """(N,) bool, the tokens of these responses (numbers in the layout's order)."""
    offsets = layout.response_token_offsets
    mask = torch.zeros(len(layout.targets), dtype=torch.bool)
    for r in responses:
        mask[offsets[r] : offsets[r + 1]] = True
    return mask


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
    for r, row in enumerate(rows):
        for i, image in enumerate(row.get("images", [])):
            images = list(row["images"])
            images[i] = tiny_image("yellow", (0, 10, 30, 20)).resize(image.size)
            (other,) = response_logps(model, processor, [*rows[:r], {**row, "images": images}, *rows[r + 1 :]])
            moved = (other.logps - batch.logps).abs()
            own = of_responses(batch.layout, (r, r + len(rows)))
            assert moved[own].max() > 1e-2 and moved[~own].max() < 2e-5


@every_family
def test_no_token_sees_its_own_future(name):
    model, processor = family(name)
    batch = Collator(processor)(rows_of(name))
    layout, inputs = batch["layout"], batch["model_inputs"]
    lengths = inputs["attention_mask"].sum(1)
    ids = inputs["input_ids"].clone()
    for r, length in enumerate(lengths):
        ids[r, length - 3 : length] = ids[r, length - 3 : length] % 7 + 300
    before, after = our_logps(model, batch), our_logps(model, batch, input_ids=ids)
    column, row = layout.hidden_index % ids.shape[1], layout.hidden_index // ids.shape[1]
    earlier = column < lengths[row] - 3
    moved = (after - before).abs()
    assert moved[earlier].max() < 2e-5 and moved[~earlier].max() > 0.1 and earlier.sum() > 100


SHARED = {
    "shared": {"shared_prefix": True},
    "packed": {"padding_free": True},
    "both": {"shared_prefix": True, "padding_free": True},
}


ROUTES = pytest.mark.parametrize("route", ["mask", "segments"])


def take(route, model):
    """Skip, saying why, where a model cannot take a route (by itself it then takes another)."""
    try:
        routes_to_try(model, route, longest=200)
    except ValueError as error:
        pytest.skip(str(error).partition(f"{route}: ")[2])


@every_family
@ROUTES
@pytest.mark.parametrize("mode", SHARED)
def test_shared_and_packed_rows_are_exact(name, route, mode):
    model, processor = family(name)
    take(route, model)
    rows = rows_of(name)
    collator = Collator(processor, **SHARED[mode])
    batch = collator(rows)
    assert batch["tree"].shape[0] == (len(rows) if mode == "shared" else 1) and not batch["tree"].is_plain
    torch.testing.assert_close(our_logps(model, batch, route), all_own_logps(model, processor, rows), **EXACT)
    assert check_tree(model, collator, rows, route) is None


@every_family
@ROUTES
def test_nothing_leaks(name, route):
    model, processor = family(name)
    take(route, model)
    rows = rows_of(name)
    collator = Collator(processor, **SHARED["both"])
    batch, neighbours = collator(rows), collator([*unequal_rows(6)[4:], rows[2]])
    ids, item = batch["model_inputs"]["input_ids"], batch["tree"].items[2]
    before = our_logps(model, batch, route)
    for branch, response in ((0, 2), (1, 2 + len(rows))):
        columns = slice(item.branch_start(branch), item.branch_start(branch) + item.branches[branch])
        other = ids.clone()
        other[0, columns] = other[0, columns] % 7 + 300
        moved = (our_logps(model, batch, route, input_ids=other) - before).abs()
        own = of_responses(batch["layout"], [response])
        assert moved[own].max() > 0.1 and moved[~own].max() < 2e-5
    own, there = of_responses(batch["layout"], [2, 6]), of_responses(neighbours["layout"], [2, 5])
    torch.testing.assert_close(our_logps(model, neighbours, route)[there], before[own], **EXACT)


@every_family
def test_rows_without_an_image(name):
    _, processor = family(name)
    bare = {**unequal_rows(1)[0], "images": []}
    if FAMILIES[name].text_rows:
        assert "pixel_values" not in Collator(processor)([bare])["model_inputs"]  # and rows_of has one among others
        return
    with pytest.raises(ValueError, match=r"row-0.*image: drop the row") as refusal:
        Collator(processor)([*unequal_rows(2), bare])
    pytest.skip(str(refusal.value).partition(": ")[2])


@every_family
def test_rows_with_several_images(name):
    _, processor = family(name)
    one = unequal_rows(1)[0]
    two = {**one, "images": [tiny_image("red"), *one["images"]]}
    if FAMILIES[name].several_images:
        widths = [Collator(processor)([row])["model_inputs"]["input_ids"].shape[1] for row in (one, two)]
        assert widths[1] != widths[0]  # fewer in LLaVA-OneVision; rows_of has such a row among others
        return
    with pytest.raises(ValueError, match=r"row-0.*image: drop the row") as refusal:
        Collator(processor)([*unequal_rows(2), two])
    pytest.skip(str(refusal.value).partition(": ")[2])


@every_family
def test_head_and_generation(name):
    model, processor = family(name)
    rows = rows_of(name)
    assert check_head(model, Collator(processor)(rows)["model_inputs"]) < 1e-5
    alone = [generate(model, processor, [row], max_new_tokens=6)[0] for row in rows]
    assert generate(model, processor, rows, max_new_tokens=6) == alone
    assert len(set(alone)) > 1


@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loading_with_an_attention(name, attention, tmp_path):
    model, processor = family(name)
    if attention == "sdpa" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        pytest.skip("SDPA has no soft-cap of attention")
    rows = rows_of(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, own_processor = load_model(tmp_path, device="cpu", attn_implementation=attention)
    assert type(loaded) is type(model) and type(own_processor) is type(processor)
    assert loaded.config.get_text_config()._attn_implementation == attention
    (batch,) = response_logps(loaded, own_processor, rows)
    torch.testing.assert_close(batch.logps, all_own_logps(model, own_processor, rows), **EXACT)


def test_the_documented_table_is_whole():
    lines = [line for line in written().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert header == ["Family", *COLUMNS] and [row[0] for row in rows] == list(FAMILIES)
    assert all(re.fullmatch(r"yes|no \(\d+\)", cell) for row in rows for cell in row[1:])
