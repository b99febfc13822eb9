"""Every objective from rows to a step of the trainer: the columns it reads, whatever is shared, packed or in parts."""

import warnings

import datasets
import pytest
import torch
from PIL import Image
from tiny import tiny_llava, tiny_rows
from torch import Tensor

from aspo.columns import KL_COLUMN, with_others_responses
from aspo.config import AspoConfig
from aspo.data import Collator
from aspo.model import load_model
from aspo.prompts import encode_prompt, encode_response
from aspo.reference.logp_cache import ReferenceCache
from aspo.train import CHECKPOINTING
from aspo.trainer import AspoTrainer
from aspo_kernels import objectives

SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1, "per_device_train_batch_size": 4}
OPTIONS = {  # objective -> options other than its defaults
    "aspo": {"weights": "given", "rejected_side": "misaligned"},
    "misp": {"objective_kwargs": {"importance": "self"}},
    "chip": {"objective_kwargs": {"segment_weight": 3.0}},
}
NEGATIVES = ("misp", "mdpo", "chip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("family") / "llava")


def noise(seed: int) -> Image.Image:
    pixels = torch.randint(0, 255, (30, 30, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def rows_for(name: str, processor, count: int = 4) -> list[dict]:
    """Rows with what the objective reads; the last one is text alone."""
    rows = []
    for n, row in enumerate(tiny_rows(count)):
        row = dict(row)
        if name == "aspo":
            for column in ("chosen", "rejected"):
                spans = row.get(f"{column}_sentences") or [[0, len(row[column])]]
                row[f"{column}_sentences"] = spans
                row[f"{column}_sentence_weights"] = [0.2 + 0.3 * k for k in range(len(spans))]
        if name in ("fisao", "ddpo", "weighted_dpo", "chip"):
            row["chosen_token_scores"] = [[0, 5, 0.5], [6, 9, -0.25]]
            row["rejected_token_scores"] = [[1, 4, 1.0]]
        if name in NEGATIVES:
            number = 1 + n % 3 if name == "misp" else 1
            row["negative_images"] = [noise(10 * n + k) for k in range(number)]
            row["negative_log_q"] = [-1.0 - k for k in range(number)]
        if name == "povid":
            prompt = encode_prompt(processor, row["prompt"], row["images"])
            ids, _ = encode_response(processor, prompt, row["chosen"])
            row["chosen_alternative_ids"] = [token if k % 3 else 5 + n for k, token in enumerate(ids)]
        if name == "kto":
            row = {"prompt": row["prompt"], "images": row["images"], "completion": row["chosen"], "label": n % 2 == 0}
        if n == count - 1:
            for column in ("images", "negative_images", "negative_log_q", "chosen_alternative_ids"):
                row[column] = None
        rows.append(row)
    return rows


@pytest.fixture
def make(folder, tmp_path):
    def build(name: str, rows=None, **options) -> AspoTrainer:
        model, processor = load_model(folder)
        defaults = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
        given = {**defaults, **SGD, **OPTIONS.get(name, {}), **options}
        args = AspoConfig(output_dir=str(tmp_path / "out"), loss_type=name, report_to="none", **given)
        trainer = AspoTrainer(model, args, rows_for(name, processor) if rows is None else rows, None, processor)
        generator = torch.Generator().manual_seed(3)  # away from the reference, so that every term has a gradient
        for key, p in trainer.model.named_parameters():
            if p.requires_grad and "lora_A" not in key:
                p.data.add_(0.05 * torch.randn(p.shape, generator=generator))
        trainer._starts_at_reference = False
        return trainer

    return build


def step(trainer: AspoTrainer) -> tuple[float, dict[str, Tensor]]:
    """The first step's loss, and the change of what trains (plain SGD: minus the gradient)."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = trainer.train().training_loss
    now = dict(trainer.model.named_parameters())
    return loss, {name: now[name].detach() - value for name, value in before.items()}


def same(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=2e-5)
    largest = max(float(change.abs().max()) for change in a[1].values())
    assert largest > 0
    for name, change in a[1].items():
        assert float((change - b[1][name]).abs().max()) <= 2e-4 * largest, name


@pytest.mark.parametrize("name", objectives.names())
def test_a_step_is_the_same_plain_shared_packed_in_parts_and_in_micro_batches(make, name):
    plain = step(make(name, shared_prefix="off"))
    same(plain, step(make(name, shared_prefix="on")))
    same(plain, step(make(name, shared_prefix="on", padding_free=True)))
    same(plain, step(make(name, shared_prefix="off", forward_tokens=100)))
    same(plain, step(make(name, shared_prefix="on", forward_tokens=150, gradient_checkpointing=True)))
    if name != "kto":  # whose divergence is a forward pass's
        same(plain, step(make(name, per_device_train_batch_size=1, gradient_accumulation_steps=4)))


@pytest.mark.parametrize("shared_prefix", ["off", "on"])
def test_checkpointing_forms_the_layers_again(make, shared_prefix):
    """Equal gradients alone would not show an option that is not passed on."""
    calls, steps = {}, {}
    for again in (False, True):
        trainer = make("dpo", shared_prefix=shared_prefix, **{CHECKPOINTING: again})
        calls[again] = 0

        def count(module, args, again=again):  # before it runs: torch stops where it has all it needs
            calls[again] += 1

        trainer.model.get_base_model().model.language_model.layers[0].mlp.register_forward_pre_hook(count)
        steps[again] = step(trainer)
    assert calls[True] == calls[False] + 1  # of the one forward pass that has a backward
    same(steps[False], steps[True])


@pytest.mark.parametrize("negatives", [1, 4, 16])
def test_many_negatives_run_within_one_forward_budget(make, folder, negatives):
    """The tokens of a forward pass, and so its activations, do not grow with the negatives."""
    rows = [{**row, "negative_images": [noise(k) for k in range(negatives)]} for row in tiny_rows(1)]
    trainer = make("misp", rows, objective_kwargs={}, forward_tokens=100, per_device_train_batch_size=1)
    widths: list[int] = []
    trunk = trainer.model.get_base_model().model
    trunk.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    loss, _ = step(trainer)
    assert loss > 0 and max(widths) <= 100
    assert sum(widths) > negatives * 20  # all of them were run


def test_a_pair_above_the_forward_budget_is_named(make):
    with pytest.raises(ValueError, match=r"row '.*': its prompt and responses take \d+ tokens in one piece, above"):
        step(make("dpo", forward_tokens=10, shared_prefix="on"))


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("misp", "negative_images", "misp reads the column 'negative_images', which the rows have not"),
        ("povid", "chosen_alternative_ids", "aspo pairs --method povid"),
        ("fisao", "chosen_token_scores", "aspo rewards"),
    ],
)
def test_rows_without_what_an_objective_lives_on_are_refused(make, folder, name, missing, message):
    _, processor = load_model(folder)
    rows = [{k: v for k, v in row.items() if k != missing} for row in rows_for(name, processor)]
    with pytest.raises(ValueError, match=message):
        make(name, rows)


@pytest.mark.parametrize(
    ("name", "column", "nothing"), [("misp", "negative_images", []), ("fisao", "chosen_token_scores", None)]
)
@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_a_column_that_is_empty_in_all_rows_is_refused(make, folder, name, column, nothing, kind):
    _, processor = load_model(folder)
    rows = [{**row, "images": None, column: nothing} for row in rows_for(name, processor)]
    with pytest.raises(ValueError, match=f"'{column}', which is empty in all 4 rows"):
        make(name, kind(rows))


def test_answers_without_a_scored_word_are_no_empty_column(make, folder):
    _, processor = load_model(folder)
    make("fisao", [{**row, "chosen_token_scores": []} for row in rows_for("fisao", processor)])


def test_the_reference_cannot_come_from_a_cache_where_its_distribution_is_read(make):
    with pytest.raises(ValueError, match="reference's whole distribution at each token"):
        step(make("tdpo", precompute_ref_log_probs=True))


def test_kto_needs_company(make, folder):
    _, processor = load_model(folder)
    with pytest.raises(ValueError, match="must be at least 2"):
        make("kto", per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="the last of 5 rows would be alone"):
        make("kto", rows_for("kto", processor, 5))
    with pytest.raises(ValueError, match="precompute_ref_log_probs keeps"):
        make("kto", precompute_ref_log_probs=True)


def test_acpos_target_is_of_the_whole_step_and_its_scale_with_it(make):
    """Micro-batches of one pair have the target of the four together; so the scales are those of one batch."""
    seen: dict[int, list[Tensor]] = {}
    plain = [{k: v for k, v in row.items() if "sentences" not in k and "similarity" not in k} for row in tiny_rows(4)]
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in plain]
    for size in (4, 1):
        options = {"beta": 5.0, "objective_kwargs": {"delta": 0.01}, "gradient_accumulation_steps": 4 // size}
        trainer = make("acpo", rows, per_device_train_batch_size=size, **options)
        for name, p in trainer.model.named_parameters():  # the other way from the reference: rewards below 0
            if "lora_B" in name:
                p.data.neg_()
        seen[size] = []
        losses = trainer.pair_losses

        def spy(inputs, model, losses=losses, kept=seen[size]):
            given, result = losses(inputs, model)
            kept.append(torch.stack([result.stats["acpo_scale"], result.stats["acpo_target"]], 1))
            return given, result

        trainer.pair_losses = spy
        step(trainer)
    together, apart = (torch.cat(seen[size]).sort(0).values for size in (4, 1))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert together[:, 1].unique().numel() == 1 and together[:, 0].min() < 1


def test_acpos_target_over_the_data_set(make):
    trainer = make("acpo", objective_kwargs={"target": "dataset"})
    lengths = [
        sum(n for _, own in trainer.data_collator.reading_lengths(row) for n in own) for row in trainer.train_dataset
    ]
    assert trainer._pair_tokens == pytest.approx(sum(lengths) / len(lengths))


# ---- the collator ----


def test_token_scores_go_to_the_tokens_that_their_characters_overlap(folder):
    _, processor = load_model(folder)
    row = {**tiny_rows(1)[0], "chosen": "The cube is red. It is a small cube.", "rejected": "The cube is blue."}
    row = {k: v for k, v in row.items() if "sentences" not in k and "similarity" not in k}
    row["chosen_token_scores"] = [[4, 8, 0.5], [12, 15, -1.0]]
    batch = Collator(processor)([row])
    prompt = encode_prompt(processor, row["prompt"], row["images"])
    _, offsets = encode_response(processor, prompt, row["chosen"])
    expected = [0.5 if a < 8 and b > 4 else -1.0 if a < 15 and b > 12 else 0.0 for a, b in offsets]
    chosen = batch["token_scores"][: len(offsets)].tolist()
    assert chosen == expected and set(chosen) == {0.5, -1.0, 0.0}
    assert not batch["token_scores"][len(offsets) :].any()


def test_an_unfinished_response_has_no_end_of_turn(folder):
    _, processor = load_model(folder)
    row = {k: v for k, v in tiny_rows(1)[0].items() if "sentences" not in k and "similarity" not in k}
    eos = processor.tokenizer.eos_token_id
    assert (Collator(processor)([row])["layout"].targets == eos).sum() == 2
    assert not (Collator(processor)([{**row, "unfinished": True}])["layout"].targets == eos).any()


def test_a_contexts_pair_is_dpo_of_the_next_sentence(make):
    """Context + next sentence, unfinished: what both have in common changes neither the loss nor the gradient."""
    base = {k: v for k, v in tiny_rows(1)[0].items() if "sentences" not in k and "similarity" not in k}
    row = {
        **base,
        "chosen": "It is a small cube. The cube is red.",
        "rejected": "It is a small cube. The cube is blue.",
    }
    trainer = make("dpo", [{**row, "unfinished": True}], shared_prefix="off", per_device_train_batch_size=1)
    batch = trainer.data_collator(trainer.train_dataset)
    given, result = trainer.pair_losses(batch)
    ratios = (given.logps - given.ref_logps).detach()
    start, end = given.layout.response_token_offsets[1:].tolist()
    chosen, rejected = ratios[:start], ratios[start:end]
    common = next(k for k in range(len(chosen)) if given.layout.targets[k] != given.layout.targets[start + k])
    alone = -torch.nn.functional.logsigmoid(0.1 * (chosen[common:].sum() - rejected[common:].sum()))
    assert common > 3
    torch.testing.assert_close(result.losses[0].detach(), alone, rtol=1e-5, atol=1e-6)


def test_alternative_ids_of_another_length_are_refused(folder):
    _, processor = load_model(folder)
    row = {**rows_for("povid", processor)[0], "chosen_alternative_ids": [1, 2, 3]}
    with pytest.raises(ValueError, match="3 ids for a response of"):
        Collator(processor)([row])


def test_every_negative_image_needs_its_log_q(folder):
    _, processor = load_model(folder)
    row = {**rows_for("misp", processor)[1], "negative_log_q": [-1.0]}
    assert len(row["negative_images"]) == 2
    with pytest.raises(ValueError, match="negative_log_q has no value for its negative image 1: draw"):
        Collator(processor)([row])


def test_token_scores_weigh_the_reading_under_another_image_alike(folder):
    """CHiP weighs the chosen response's segments under both images."""
    _, processor = load_model(folder)
    batch = Collator(processor)(rows_for("chip", processor)[:1])
    offsets = batch["layout"].response_token_offsets.tolist()
    chosen, negative = (batch["token_scores"][offsets[k] : offsets[k + 1]] for k in (0, 2))
    assert chosen.any() and torch.equal(chosen, negative)


# ---- what would be ignored, or be something else ----


def test_kto_logs_a_window_of_good_answers_alone(make, folder):
    _, processor = load_model(folder)
    rows = [{**row, "label": True} for row in rows_for("kto", processor)]
    trainer = make("kto", rows, logging_steps=1)
    step(trainer)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged and "rewards/chosen" in logged[0] and "rewards/rejected" not in logged[0]


def test_kto_compares_with_an_answer_to_another_prompt():
    ask = [{"prompt": p, "completion": c} for p, c in (("a", "1"), ("a", "2"), ("b", "3"), ("b", "4"))]
    assert [row[KL_COLUMN] for row in with_others_responses(ask)] == ["4", "4", "2", "2"]
    with pytest.raises(ValueError, match="it needs two rows in a forward pass"):
        with_others_responses(ask[:1])


def test_kto_stands_alone_and_its_evaluation_is_checked_before_training(make, folder, tmp_path):
    with pytest.raises(ValueError, match="objectives of pairs cannot be added"):
        AspoConfig(output_dir=str(tmp_path), use_cpu=True, loss_type=["kto", "sft"])
    model, processor = load_model(folder)
    args = AspoConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="kto", per_device_eval_batch_size=4)
    with pytest.raises(ValueError, match="the last of 5 rows would be alone"):
        AspoTrainer(model, args, rows_for("kto", processor), rows_for("kto", processor, 5), processor)


def test_a_label_beside_pairs_is_none_of_ktos(folder):
    _, processor = load_model(folder)
    rows = [{**row, "label": n % 2 == 0} for n, row in enumerate(tiny_rows(2))]
    assert Collator(processor)(rows)["desirable"] is None


def test_more_negatives_than_are_read_are_refused(make):
    rows = [{**row, "negative_images": [noise(1), noise(2)]} for row in tiny_rows(4)]
    with pytest.raises(ValueError, match="up to 2 negative images, and mdpo reads one"):
        step(make("mdpo", rows))
    with pytest.raises(ValueError, match="objective 'dpo' does not read"):
        step(make("dpo", rows))


def test_given_weights_on_both_sides_need_both_columns(make, folder):
    _, processor = load_model(folder)
    rows = [{k: v for k, v in row.items() if k != "rejected_sentence_weights"} for row in rows_for("aspo", processor)]
    with pytest.raises(ValueError, match="rejected_sentence_weights"):
        make("aspo", rows)


def test_another_alternative_is_another_row_of_the_reference_cache(folder, tmp_path):
    _, processor = load_model(folder)
    rows = rows_for("povid", processor)[:2]
    cache = ReferenceCache.create(tmp_path / "cache", {"responses": ["chosen", "rejected"]})
    again = {**rows[0], "chosen_alternative_ids": [*rows[0]["chosen_alternative_ids"][:-1], 7]}
    assert cache.key(rows[0]) != cache.key(again)
    assert cache.key(rows[0]) == cache.key(dict(rows[0]))
