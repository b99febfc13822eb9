"""What the plug-ins share: sentences found again in labelled tokens, the forward inside a wrapped model, refusals."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_image, tiny_llava, tiny_processor, tiny_rows, tiny_tokenizer

from aspo.data import Collator
from aspo.integrations.common import Settings, forward_runs, labelled_logps, refuse
from aspo.integrations.labelled import Scored, ScoredRows, labelled_layout, token_offsets
from aspo.model import load_model
from aspo_kernels.layout import IGNORE_INDEX


def labelled(batch):
    """What another trainer would have made of a plain batch of ours: labels that stand where their tokens are."""
    labels = torch.full(batch["layout"].padded_shape, IGNORE_INDEX)
    labels.view(-1)[batch["layout"].hidden_index + 1] = batch["layout"].targets
    return labels


def scored(rows):
    return [Scored([tuple(s) for s in row["chosen_sentences"]], row["chosen_similarity"]) for row in rows]


# ---- sentences of labelled tokens ----


@pytest.mark.parametrize("given", [True, False])
def test_the_layout_of_labels_is_the_collators(given):
    processor, rows = tiny_processor(), tiny_rows(3)
    if not given:
        rows = [{k: row[k] for k in ("prompt", "images", "chosen", "rejected")} for row in rows]
    batch = Collator(processor)(rows)
    layout, similarity = labelled_layout(labelled(batch), processor.tokenizer, scored(rows) if given else [None] * 3)
    for name in ("targets", "hidden_index", "sentence_offsets", "response_offsets", "group", "role", "perplexity_mask"):
        assert torch.equal(getattr(layout, name), getattr(batch["layout"], name)), name
    assert (similarity is None) == (batch["similarity"] is None)
    assert similarity is None or torch.equal(similarity, batch["similarity"])


def test_offsets_of_tokens_that_the_text_alone_would_not_give():
    tokenizer = tiny_tokenizer()
    ids = [i for letter in "The café is red." for i in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    text, offsets = token_offsets(tokenizer, [*ids, tokenizer.eos_token_id])
    assert text == "The café is red." and tokenizer(text, add_special_tokens=False)["input_ids"] != ids
    assert offsets[0] == (0, 1) and offsets[-2:] == [(15, 16), (16, 16)]
    assert all(a <= b <= c for (a, b), (c, _) in pairwise(offsets))


def test_outer_whitespace_does_not_move_sentences():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("  The cube is red. It is small.\n", add_special_tokens=False)["input_ids"]
    plain = tokenizer("The cube is red. It is small.", add_special_tokens=False)["input_ids"]
    labels = torch.full((2, max(len(ids), len(plain)) + 1), IGNORE_INDEX)
    labels[0, 1 : len(ids) + 1], labels[1, 1 : len(plain) + 1] = torch.tensor(ids), torch.tensor(plain)
    layout, _ = labelled_layout(labels, tokenizer, [Scored([(0, 17), (17, 29)], [0.1, 0.2])])
    first = layout.targets[: layout.sentence_offsets[1]]
    assert tokenizer.decode(first).strip() == "The cube is red."


def test_sentences_of_another_text_and_half_scored_batches_are_errors():
    processor, rows = tiny_processor(), tiny_rows(2)
    labels = labelled(Collator(processor)(rows))
    with pytest.raises(ValueError, match="was read back from its tokens as"):
        labelled_layout(labels, processor.tokenizer, [Scored([(0, 5)], [0.1]), None])
    with pytest.raises(ValueError, match="1 of 2 rows"):
        labelled_layout(labels, processor.tokenizer, [scored(rows)[0], None])
    labels[0] = IGNORE_INDEX
    with pytest.raises(ValueError, match="no text"):
        labelled_layout(labels, processor.tokenizer, [None, None])


def test_a_scored_sentence_without_a_token_of_its_own_is_an_error():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("The cube is red.", add_special_tokens=False)["input_ids"]
    labels = torch.tensor([[IGNORE_INDEX, *ids], [IGNORE_INDEX, *ids]])
    with pytest.raises(ValueError, match="sentence 'h' has no token of its own in this tokenizer"):
        labelled_layout(labels, tokenizer, [Scored([(0, 1), (1, 2), (2, 16)], [0.1, 0.2, 0.3])])


def test_scored_rows_are_found_by_text_and_where_it_repeats_by_image():
    (row,) = tiny_rows(1)
    other = {**row, "images": [tiny_image("blue", (1, 1, 9, 9))], "chosen_similarity": [0.9] * 4}
    other["chosen_similarity"] = [0.9] * len(row["chosen_similarity"])
    rows = ScoredRows([row, other])
    assert rows.find(f" {row['chosen']}\n", row["images"]).similarity == row["chosen_similarity"]
    assert rows.find(row["chosen"], other["images"]).similarity == other["chosen_similarity"]
    with pytest.raises(ValueError, match="2 scored rows"):
        rows.find(row["chosen"], [tiny_image("green")])
    with pytest.raises(ValueError, match="no scored row"):
        rows.find("Something else.", row["images"])


# ---- the forward ----


def test_labelled_logps_through_peft_are_those_of_full_logits(tmp_path):
    model, processor = load_model(tiny_llava(tmp_path / "llava"))
    model = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    batch = Collator(processor)(tiny_rows(2))
    inputs, layout = {**batch["model_inputs"], "use_cache": False}, batch["layout"]
    logps = labelled_logps(model, model, inputs, layout, "auto")
    logits = model(**inputs).logits.flatten(0, 1)[layout.hidden_index]
    expected = logits.log_softmax(-1).gather(1, layout.targets[:, None])[:, 0]
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patched", [False, True], ids=["class's", "instance's"])
def test_the_models_own_forward_is_back_after_an_error(patched):
    model = torch.nn.Linear(2, 2)
    if patched:
        model.forward = lambda x: x
    before = model.forward
    with pytest.raises(RuntimeError), forward_runs(model, lambda: 1):
        assert model() == 1
        raise RuntimeError
    assert model.forward == before and ("forward" in vars(model)) == patched


# ---- refusals ----


def test_settings_refuse_what_the_objective_does_not_take():
    with pytest.raises(ValueError, match="framework's own beta"):
        Settings.make("dpo", beta=0.2)
    with pytest.raises(ValueError, match="takes no option alpha"):
        Settings.make("dpo", alpha=0.5)
    with pytest.raises(ValueError, match="alpha"):
        Settings.make("aspo", alpha=2.0)
    with pytest.raises(ValueError, match="unknown objective"):
        Settings.make("nope")
    with pytest.raises(ValueError, match="wpo reads sharp_logps, which this plug-in does not make: use AspoTrainer"):
        Settings.make("wpo")
    with pytest.raises(ValueError, match="mdpo reads negative images, which this plug-in does not make"):
        Settings.make("mdpo")
    with pytest.raises(ValueError, match="weights='given' reads columns which this plug-in does not pass on"):
        Settings.make("aspo", weights="given")
    with pytest.raises(ValueError, match="rejected_side='aligned' reads columns which this plug-in does not pass on"):
        Settings.make("aspo", rejected_side="aligned")
    with pytest.raises(ValueError, match="not the whole step or data: give target='pair'"):
        Settings.make("acpo")
    assert Settings.make("acpo", target="pair").options == {"target": "pair"}
    assert Settings.make("aspo").needs_similarity and not Settings.make("aspo", alpha=0.0).needs_similarity
    assert not Settings.make({"dpo": 1.0, "sft": 0.1}).needs_similarity


def test_options_at_their_defaults_are_fine_and_others_are_refused():
    ignored = {"ftx": (0.0, "use sft"), "alpha": (None, "no"), "kind": (["a"], "name it there")}
    refuse(SimpleNamespace(ftx=0, alpha=None, kind=["a"]), ignored)
    for options, words in (({"ftx": 0.1}, "ftx=0.1"), ({"alpha": 0.0}, "alpha=0.0"), ({"kind": ["b"]}, "kind=")):
        with pytest.raises(ValueError, match=words):
            refuse(SimpleNamespace(**options), ignored)
