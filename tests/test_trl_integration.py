"""AspoDPOTrainer: with DPO as the objective it takes TRL's own steps; with ASPO its loss is the kernels'."""

# ruff: noqa: E402  trl is looked for before anything needs it

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import pytest

trl = pytest.importorskip("trl", minversion="1.14")

import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import CHAT_TEMPLATE, tiny_llava, tiny_rows
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from aspo.data import generation_inputs
from aspo.integrations.trl import AspoDPOConfig, AspoDPOTrainer
from aspo.model import output_head, trunk_hidden
from aspo_kernels import sentence_dpo_loss

LORA = {"r": 4, "target_modules": r".*language_model.*\.(q_proj|v_proj|down_proj)"}
# TRL's collator writes what the template writes, and nothing more; ours adds BOS where the template leaves it out.
BOS_TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_llava(tmp_path_factory.mktemp("trl") / "llava")
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template = BOS_TEMPLATE
    processor.save_pretrained(folder)
    return folder


def conversational(rows):
    """Rows as message lists: TRL puts strings into the model as they are, without a chat template."""
    turn = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{**row, **{k: [{"role": role, "content": row[k]}] for k, role in turn.items()}} for row in rows]


@pytest.fixture
def make(folder, tmp_path):
    """make(trainer class, rows, ...) -> a trainer on a fresh copy of the tiny model."""

    def build(
        cls, rows=None, eval_rows=None, lora=False, data_collator=None, model=None, dataset=None, peft=None, **options
    ):
        config = AspoDPOConfig if cls is AspoDPOTrainer else trl.DPOConfig
        defaults = {"save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none"}
        defaults |= {"lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1}
        rows = conversational(tiny_rows(7)) if rows is None else rows
        torch.manual_seed(0)  # before 1.16 TRL draws the adapter's start from whatever state there is
        return cls(
            model or AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32),
            args=config(output_dir=str(tmp_path / "out"), **{**defaults, **options}),
            train_dataset=Dataset.from_list(rows) if dataset is None else dataset,
            eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
            processing_class=AutoProcessor.from_pretrained(folder),
            peft_config=LoraConfig(**LORA) if lora else peft,
            data_collator=data_collator,
        )

    return build


class Gradients(TrainerCallback):
    """The gradient of every parameter at every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def run(trainer):
    """(gradients of each step, log history, trainable weights at the end)."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return gradients.steps, [log for log in trainer.state.log_history if "loss" in log], weights


def assert_alike(ours, theirs, name, rtol=2e-4):
    """Within rounding: fp32 sums in another order, relative to the largest entry."""
    scale = max(float(theirs.abs().max()), 1e-6)
    assert float((ours - theirs).abs().max()) <= rtol * scale, name


def move(model, seed=3):
    """Other weights, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.add_(0.03 * torch.randn(p.shape, generator=generator))
    return model


# ---- equal to TRL's own ----


def test_batches_are_trls_token_for_token(make):
    rows = conversational(tiny_rows(3))
    theirs = make(trl.DPOTrainer, rows).data_collator([dict(row) for row in rows])
    ours = make(AspoDPOTrainer, rows, shared_prefix="off").data_collator(rows)
    assert len(set(theirs["attention_mask"].sum(1).tolist())) > 1  # rows of unequal lengths
    token = theirs["attention_mask"].bool()  # TRL pads with EOS where the pad token's id is 0
    assert torch.equal(ours["model_inputs"]["attention_mask"], theirs["attention_mask"])
    assert torch.equal(ours["model_inputs"]["input_ids"][token], theirs["input_ids"][token])
    assert torch.equal(ours["model_inputs"]["pixel_values"], theirs["pixel_values"])
    mask = theirs["completion_mask"].bool()
    assert torch.equal(ours["layout"].targets, theirs["input_ids"][mask])


@pytest.mark.parametrize(
    ("lora", "accumulation", "shared"), [(True, 2, "off"), (False, 1, "off"), (True, 1, "on"), (False, 2, "on")]
)
def test_twenty_steps_of_dpo_equal_trls(make, lora, accumulation, shared):
    """lr 5 with LoRA, 0.5 without: the loss moves away from ln 2, so policy and reference differ. The rows of a batch
    differ in length, and of 7 rows the last micro-batch is a single one, which both average as if it were two."""
    options = {"max_steps": 20, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    options |= {"learning_rate": 5.0 if lora else 0.5, "loss_type": "sigmoid", "lora": lora}
    ours, theirs = run(make(AspoDPOTrainer, **options, shared_prefix=shared)), run(make(trl.DPOTrainer, **options))
    assert len(ours[0]) == len(theirs[0]) == 20
    for step, (mine, its) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert mine.keys() == its.keys()
        for name in its:
            assert_alike(mine[name], its[name], f"step {step}: {name}")
    names = ["loss", "num_tokens", *(f"rewards/{x}" for x in ("chosen", "rejected", "accuracies", "margins"))]
    for mine, its in zip(ours[1], theirs[1], strict=True):
        for name in [*names, "logps/chosen", "logps/rejected"]:
            assert mine[name] == pytest.approx(its[name], rel=1e-4, abs=1e-4), name
    assert max(abs(log["loss"] - 0.6931) for log in theirs[1]) > 0.05
    for name, weight in theirs[2].items():
        assert_alike(ours[2][name], weight, name)


def test_text_only_rows_equal_trls(make):
    rows = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in conversational(tiny_rows(4))]
    options = {"max_steps": 3, "learning_rate": 0.5, "loss_type": "sigmoid"}
    ours, theirs = (run(make(cls, rows, **options)) for cls in (AspoDPOTrainer, trl.DPOTrainer))
    for mine, its in zip(ours[0], theirs[0], strict=True):
        for name in its:
            assert_alike(mine[name], its[name], name)


def test_an_implicit_prompt_is_taken_out_as_trl_does(make):
    rows = conversational(tiny_rows(2))
    joined = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in rows]
    ours = make(AspoDPOTrainer, joined, loss_type="dpo")
    assert ours.train_dataset[0]["prompt"] == rows[0]["prompt"]
    assert ours.train_dataset[0]["chosen"] == rows[0]["chosen"]


def test_evaluation_equals_trls(make, folder):
    """Three rows in batches of two: the last one counts as one pair."""
    rows = conversational(tiny_rows(3, seed=5))
    metrics = []
    for cls in (AspoDPOTrainer, trl.DPOTrainer):
        model = move(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32))
        trainer = make(cls, eval_rows=rows, model=model, loss_type="sigmoid", per_device_eval_batch_size=2)
        metrics.append(trainer.evaluate())
    assert metrics[1]["eval_loss"] != pytest.approx(0.6931, abs=1e-2)
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert metrics[0][f"eval_{name}"] == pytest.approx(metrics[1][f"eval_{name}"], rel=1e-4, abs=1e-5), name


def test_going_on_from_an_adapter_compares_with_its_copy(make, folder):
    """TRL keeps a copy of the adapter as it was; the reference is that copy, and not the base model."""
    losses = []
    for cls in (AspoDPOTrainer, trl.DPOTrainer):
        torch.manual_seed(0)
        base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False))
        _, logs, _ = run(make(cls, model=model, loss_type="sigmoid", learning_rate=5.0, max_steps=3))
        losses.append([log["loss"] for log in logs])
    assert losses[0][0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- ASPO ----


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_aspo_is_the_kernels_loss_of_the_same_hidden_states(make, folder, weights):
    rows = conversational(tiny_rows(3))
    for row, weight in zip(rows, weights or (), strict=bool(weights)):
        row["sample_weight"] = weight
    options = {"alpha": 0.3, "beta": 0.4, "normalizer": "token"}
    policy = move(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32))
    trainer = make(AspoDPOTrainer, rows, model=policy, loss_type="aspo", shared_prefix="off", **options)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    hidden, ref_hidden = (trunk_hidden(m, batch["model_inputs"]) for m in (policy, reference))
    heads = [output_head(m).weight for m in (policy, reference)]
    expected = sentence_dpo_loss(
        hidden, heads[0], batch["layout"], ref_hidden=ref_hidden, ref_head=heads[1].detach(),
        similarity=batch["similarity"], reduction="none", **options,
    )  # fmt: skip
    loss = trainer.compute_loss(trainer.model, batch)
    expected_loss = (expected.loss * (batch["sample_weight"] if weights else torch.ones(3))).mean()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, heads[0])[0] for x in (loss, expected_loss)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_training_with_aspo_logs_sentences_and_keeps_no_unread_column(make):
    rows = [{**row, "colour": "red"} for row in conversational(tiny_rows(4))]
    trainer = make(AspoDPOTrainer, rows, lora=True, max_steps=2, learning_rate=1.0)
    _, logs, _ = run(trainer)
    assert logs[0]["sentences/weight_mean"] > 0 and logs[0]["sentences/similarity_mean"] > 0
    assert "colour" not in next(iter(trainer.get_train_dataloader().dataset))


def test_sharing_and_packing_are_on_and_take_the_same_step(make):
    losses = []
    for options in ({"shared_prefix": "off"}, {"shared_prefix": "on"}, {"shared_prefix": "on", "padding_free": True}):
        trainer = make(AspoDPOTrainer, lora=True, max_steps=3, learning_rate=5.0, **options)
        losses.append([log["loss"] for log in run(trainer)[1]])
        rows = trainer.data_collator(conversational(tiny_rows(3)))["tree"].shape[0]
        assert rows == {"off": 6, "on": 1 if trainer.args.padding_free else 3}[options["shared_prefix"]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_the_rows_own_reference_logps_are_used(make):
    rows = conversational(tiny_rows(2))
    plain = make(AspoDPOTrainer, rows, loss_type="dpo", shared_prefix="off")
    layout = plain.data_collator(rows)["layout"]
    tokens = layout.response_token_offsets.diff().tolist()
    for i, row in enumerate(rows):
        row["ref_chosen_logps"], row["ref_rejected_logps"] = [-1.0] * tokens[i], [-2.0] * tokens[2 + i]
    trainer = make(AspoDPOTrainer, rows, loss_type="dpo", beta=0.1)
    with torch.no_grad():
        cached = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    batch = plain.data_collator(rows)
    hidden = trunk_hidden(plain.model, batch["model_inputs"]).flatten(0, 1)[layout.hidden_index]
    logps = (hidden @ output_head(plain.model).weight.T).log_softmax(-1).gather(1, layout.targets[:, None])[:, 0]
    ref = torch.cat([torch.full((n,), -1.0 if i < 2 else -2.0) for i, n in enumerate(tokens)])
    h = torch.stack([part.sum() for part in (logps - ref).detach().split(tokens)])
    assert float(cached) == pytest.approx(float(-torch.nn.functional.logsigmoid(0.1 * (h[:2] - h[2:])).mean()), 1e-4)


# ---- what would be ignored is refused ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "exo_pair"}, "no objective of ours"),
        ({"loss_type": "sigmoid", "alpha": 0.5}, "takes no option alpha"),
        ({"loss_type": ["dpo", "sft"], "loss_weights": [1.0, float("nan")]}, "must be finite"),
        ({"alpha": 1.5}, "alpha"),
        ({"label_smoothing": 0.1}, "takes no option label_smoothing"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True"),
        ({"precompute_ref_batch_size": 2}, "precompute_ref_batch_size"),
        ({"shared_prefix": "maybe"}, "shared_prefix"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of"),
        ({"ld_alpha": 0.0}, "ld_alpha"),
        ({"use_weighting": True}, "use_weighting"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef"),
        ({"discopop_tau": 0.1}, "discopop_tau"),
        ({"truncation_mode": "keep_end"}, "truncation_mode"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"torch_compile": True}, "torch_compile"),
        ({"loss_type": "kto"}, "kto reads unpaired rows, which a DPOTrainer has not"),
        ({"loss_type": "acpo", "objective_kwargs": {"target": "dataset"}}, "use target 'batch' or 'pair' here"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_options_that_the_loss_would_ignore_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        AspoDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_each_objective_keeps_its_own_beta(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert AspoDPOConfig(**options).beta == 0.1
    assert AspoDPOConfig(**options, loss_type="simpo").beta == 2.0


def test_trainer_refuses_what_it_cannot_do(make, tmp_path):
    rows = conversational(tiny_rows(2))
    unscored = [{k: v for k, v in row.items() if k != "chosen_similarity"} for row in rows]
    with pytest.raises(ValueError, match="no chosen_similarity"):
        make(AspoDPOTrainer, unscored)
    with pytest.raises(ValueError, match="'tools' would change the prompt"):
        make(AspoDPOTrainer, [{**row, "tools": "[]"} for row in rows])
    with pytest.raises(ValueError, match="only an aspo"):
        make(AspoDPOTrainer, rows, data_collator=lambda rows: rows)
    with pytest.raises(ValueError, match="AspoDPOConfig"):
        AspoDPOTrainer("nowhere", args=trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False))
    with pytest.raises(ValueError, match="compute_metrics wants logits, which are never built"):
        AspoDPOTrainer("nowhere", args=AspoDPOConfig(str(tmp_path), use_cpu=True, bf16=False), compute_metrics=len)
    with pytest.raises(ValueError, match="PROMPT_TUNING puts tokens in front of the prompt"):
        make(AspoDPOTrainer, rows, peft=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="nothing to predict"):
        make(AspoDPOTrainer, rows).predict(Dataset.from_list(rows))


def test_a_prompt_that_fills_max_length_is_an_error_not_a_cut_image(make):
    with pytest.raises(ValueError, match="prompts and images are never cut"):
        make(AspoDPOTrainer, max_length=10)


def test_generation_still_works(make):
    """The model's own forward is back after a step."""
    trainer = make(AspoDPOTrainer, max_steps=1)
    trainer.train()
    inputs = generation_inputs(trainer.processing_class, conversational(tiny_rows(1)))
    with torch.no_grad():
        assert trainer.model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
        assert trainer.model.generate(**inputs, max_new_tokens=2).shape[1] <= inputs["input_ids"].shape[1] + 2
