"""AspoTrainer: its loss and gradients are those of full logits, accumulation is by pairs, nothing is silently wrong."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import contextlib
import copy
import math
import types
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llava, tiny_rows, tiny_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from aspo.checkpoints import is_complete
from aspo.config import AspoConfig
from aspo.data import Collator
from aspo.generation import generate
from aspo.meters import FallingRewards, Meters
from aspo.model import load_model
from aspo.policy import add_lora, lora_targets
from aspo.trainer import AspoTrainer
from aspo_kernels import objectives, sentence_dpo_loss_from_logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("trainer") / "llava")


@pytest.fixture
def make(folder, tmp_path):
    """make(rows, **options) -> a trainer on a fresh copy of the tiny model."""

    def build(rows=None, eval_rows=None, model=None, ref_model=None, data_collator=None, **options):
        own, processor = load_model(folder)
        defaults = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
        args = AspoConfig(output_dir=str(tmp_path / "out"), **{**defaults, **options})
        return AspoTrainer(
            model or own,
            args,
            tiny_rows(4) if rows is None else rows,
            eval_rows,
            processor,
            data_collator=data_collator,
            ref_model=ref_model,
        )

    return build


def trainable(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def train_one_step(trainer):
    """The trainable parameters' change in one step of plain SGD, which is proportional to the gradient."""
    before = trainable(trainer)
    trainer.train()
    return {name: after - before[name] for name, after in trainable(trainer).items()}


SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1}


def start_unlike_reference(trainer):
    """Move what trains (LoRA's B starts at 0), so that policy and reference differ and every term has a gradient."""
    generator = torch.Generator().manual_seed(3)
    for name, p in trainer.model.named_parameters():
        if p.requires_grad and "lora_A" not in name:
            p.data.add_(0.03 * torch.randn(p.shape, generator=generator))
    trainer._starts_at_reference = False


# ---- the loss ----


@pytest.mark.parametrize("use_lora", [True, False])
def test_dpo_starts_at_ln_2(make, use_lora):
    trainer = make(loss_type="dpo", use_lora=use_lora, max_steps=1)
    trainer.train()
    assert trainer.start_loss == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("use_lora", [True, False])
def test_every_kernel_backend_takes_the_same_step(make, use_lora):
    pytest.importorskip("triton")
    steps = {
        backend: train_one_step(make(kernel_backend=backend, use_lora=use_lora, loss_type="aspo", **SGD))
        for backend in ("torch", "triton", "reference")
    }
    for name, step in steps["torch"].items():
        for backend in ("triton", "reference"):
            torch.testing.assert_close(steps[backend][name], step, rtol=1e-3, atol=1e-6, msg=f"{backend} {name}")


@pytest.mark.filterwarnings("ignore:step 0")
@pytest.mark.parametrize(("normalizer", "use_lora"), [("sentence", True), ("reward", True), ("sentence", False)])
def test_aspo_gradients_are_those_of_full_logits(make, normalizer, use_lora):
    trainer = make(per_device_train_batch_size=4, normalizer=normalizer, alpha=0.7, use_lora=use_lora, **SGD)
    start_unlike_reference(trainer)
    twin = copy.deepcopy(trainer.model)
    steps = train_one_step(trainer)

    batch = Collator(trainer.processing_class)([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad(), twin.disable_adapter() if use_lora else contextlib.nullcontext():
        ref_logits = (twin if use_lora else trainer.ref_model)(**batch["model_inputs"]).logits
    loss = sentence_dpo_loss_from_logits(
        twin(**batch["model_inputs"]).logits,
        batch["layout"],
        ref_logits=ref_logits,
        similarity=batch["similarity"],
        alpha=0.7,
        normalizer=normalizer,
    ).loss
    loss.backward()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert max(step.abs().max() for step in steps.values()) > 1e-3
    for name, p in twin.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(steps[name], -p.grad, rtol=1e-3, atol=1e-5)
    assert use_lora or steps["lm_head.weight"].abs().max() > 1e-3


def test_logits_are_never_built_but_to_check_the_head(make):
    trainer = make(max_steps=2, eval_rows=tiny_rows(2), eval_strategy="steps", eval_steps=1)
    shapes = []
    head = trainer.model.get_base_model().lm_head

    def note(_module, _inputs, out):
        shapes.extend(tuple(t.shape) for t in (out if isinstance(out, tuple) else [out]) if t is not None)

    head.register_forward_hook(note)
    trainer.train()
    # Its logits and the model's own, once, at the last position of 2 pairs that share their prefix; then numbers.
    logits = [shape for shape in shapes if shape[-1] == head.out_features]
    assert logits == [(2, head.out_features), (2, 1, head.out_features)] and len(shapes) > 4
    assert {len(shape) for shape in shapes if shape not in logits} == {1}


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "ipo"},
        {"loss_type": "hinge", "beta": 0.3},
        {"loss_type": "simpo", "gamma": 0.5},
        {"loss_type": ["dpo", "sft"], "loss_weights": [1.0, 0.1]},
        {"loss_type": "aspo", "alpha": 0.0, "normalizer": "token"},
    ],
)
def test_objectives_train(make, options):
    trainer = make(max_steps=3, learning_rate=1e-3, per_device_train_batch_size=4, logging_steps=1, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[2] < losses[0]


def test_simpo_runs_no_reference(make):
    trainer = make(loss_type="simpo", max_steps=1, use_lora=False)
    assert trainer.ref_model is None
    lora = make(loss_type="simpo", max_steps=1)
    lora.model.disable_adapter = None  # would fail if it were entered
    lora.train()


def test_text_only_models(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
        )
    )
    rows = [
        {"prompt": "Which colour?", "chosen": f"It is red. It is {i}.", "rejected": "It is blue."} for i in range(4)
    ]
    args = AspoConfig(
        output_dir=str(tmp_path), alpha=0.0, max_steps=2, use_cpu=True, disable_tqdm=True, logging_steps=1
    )
    trainer = AspoTrainer(model, args, rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(".layers." in name for name, p in trainer.model.named_parameters() if p.requires_grad)


# ---- accumulation and weights ----


def test_accumulation_is_by_pairs(make):
    """4 pairs at once, one by one, and as 3 + 1 make the same step; the logged loss is the pairs' mean too."""
    cuts = {(4, 1): None, (1, 4): None, (3, 2): None}
    for batch, accumulation in cuts:
        trainer = make(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, logging_steps=1, **SGD
        )
        start_unlike_reference(trainer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cuts[batch, accumulation] = train_one_step(trainer), trainer.state.log_history[0]
    whole, entry = cuts.pop((4, 1))
    assert max(step.abs().max() for step in whole.values()) > 1e-3
    for steps, other in cuts.values():
        for name in whole:
            torch.testing.assert_close(steps[name], whole[name], rtol=1e-3, atol=2e-6)
        for key in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "sentences/weight_std"):
            assert other[key] == pytest.approx(entry[key], abs=2e-5), key


def test_sample_weight(make):
    rows = tiny_rows(2)
    plain = train_one_step(make(rows, per_device_train_batch_size=2, **SGD))
    only = train_one_step(make(rows[:1], per_device_train_batch_size=1, **SGD))
    weighted = [{**rows[0], "sample_weight": 2.0}, {**rows[1], "sample_weight": 0.0}]
    steps = train_one_step(make(weighted, per_device_train_batch_size=2, **SGD))
    assert any((steps[name] - plain[name]).abs().max() > 1e-4 for name in steps)
    for name in steps:  # mean over two pairs of (2 * loss_0, 0 * loss_1) = loss_0
        torch.testing.assert_close(steps[name], only[name], rtol=1e-3, atol=2e-6)


# ---- metrics and evaluation ----


def test_evaluation_is_a_mean_over_pairs(make):
    rows = tiny_rows(5)
    trainer = make(eval_rows=rows, per_device_eval_batch_size=2)  # 2 + 2 + 1
    start_unlike_reference(trainer)
    metrics = trainer.evaluate()
    single = [trainer.pair_losses(Collator(trainer.processing_class)([row])) for row in rows]
    losses = torch.cat([result.losses.detach() for _, result in single])
    chosen = torch.cat([result.stats["chosen_rewards"] for _, result in single])
    weights = torch.cat([result.stats["sentence_weights"] for _, result in single])
    assert metrics["eval_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    assert metrics["eval_rewards/chosen"] == pytest.approx(float(chosen.mean()), abs=1e-5)
    assert metrics["eval_sentences/weight_mean"] == pytest.approx(float(weights.mean()), abs=1e-5)
    assert metrics["eval_sentences/weight_std"] == pytest.approx(float(weights.std(correction=0)), abs=1e-4)
    assert metrics["eval_sentences/per_response"] == pytest.approx(weights.numel() / 5)


def test_metrics_have_trls_names(make):
    trainer = make(loss_type="dpo", max_steps=1, logging_steps=1)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("chosen", "rejected", "accuracies", "margins"):
        assert f"rewards/{name}" in entry
    assert entry["logps/chosen"] < 0 and entry["logps/rejected"] < 0
    assert not any(name.startswith("stats/") for name in entry)


def test_meters():
    meters = Meters()
    meters.add("rewards/chosen", torch.tensor([1.0, 2.0]))
    meters.add("rewards/chosen", torch.tensor([6.0]))
    meters.add("sentences/weight", torch.tensor([0.0, 1.0]))
    means = meters.drain()
    assert means == {"rewards/chosen": 3.0, "sentences/weight_mean": 0.5, "sentences/weight_std": 0.5}
    assert meters.drain() == {}


# ---- the reference, and what is trained ----


def test_full_fine_tuning_keeps_reference_and_vision_tower(make):
    trainer = make(use_lora=False, max_steps=2, learning_rate=1e-3)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    for name, value in trainer.ref_model.state_dict().items():
        assert torch.equal(value, start[name]), name
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, start[name])}
    assert any("language_model" in name for name in moved) and any("lm_head" in name for name in moved)
    assert any("projector" in name for name in moved) and not any("vision_tower" in name for name in moved)
    assert any("vision_tower" in name for name in trainable(make(use_lora=False, freeze_vision=False)))


def test_lora_goes_to_the_language_model_only(make, folder):
    names = list(trainable(make()))
    assert names and all("language_model" in name and "lora_" in name for name in names)
    some = list(trainable(make(lora_target_modules=["q_proj", "v_proj"])))
    assert some and all(".q_proj." in name or ".v_proj." in name for name in some)
    assert not any("vision_tower" in name for name in some)
    tower = trainable(make(lora_target_modules=[r".*vision_tower.*\.q_proj"]))
    assert tower and all("vision_tower" in name for name in tower)
    with pytest.raises(ValueError, match="'lm_head' is no linear layer"):
        lora_targets(load_model(folder)[0], ["q_proj", "lm_head"])


def test_a_wrong_reference_is_seen_at_step_0(make):
    trainer = make(use_lora=False, loss_type="dpo", beta=1.0, max_steps=1)
    trainer.ref_model.lm_head.weight.data.mul_(30.0)
    with pytest.raises(ValueError, match=r"step 0: the loss is .* but 0\.6931"):
        trainer.train()


def test_a_trained_adapter(make, folder, tmp_path):
    """As the start model it is refused; in Python a trained, trainable adapter is allowed but warned about."""
    args = AspoConfig(output_dir=str(tmp_path / "a"), use_cpu=True)
    adapted = add_lora(load_model(folder)[0], args)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=1.0)
    adapted.save_pretrained(tmp_path / "adapter")
    frozen, _ = load_model(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge_and_unload"):
        make(model=frozen)
    with pytest.raises(ValueError, match="use_lora is False"):
        make(model=adapted, use_lora=False)
    with pytest.warns(UserWarning, match="step 0: the loss is"):
        make(model=adapted, loss_type="dpo", beta=5.0, max_steps=1).train()  # a margin far from 0


def test_an_adapter_of_another_kind_is_refused(make, folder):
    from peft import IA3Config

    model = get_peft_model(load_model(folder)[0], IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="IA3Model"):
        make(model=model)


def test_a_reference_of_ones_own(make, folder):
    other, _ = load_model(folder)
    other.lm_head.weight.data.mul_(30.0)
    with pytest.warns(UserWarning, match="step 0"):
        make(ref_model=other, use_lora=False, loss_type="dpo", beta=1.0, max_steps=1).train()


@pytest.mark.parametrize("implementations", [("sdpa", "eager"), ("eager", "sdpa")])
def test_a_reference_with_another_attention_is_told_who_sees_whom_in_its_own_way(make, folder, implementations):
    """SDPA's mask is of booleans, eager's is added: one for both would let the reference see both responses."""
    policy, reference = (load_model(folder, attn_implementation=name)[0] for name in implementations)
    trainer = make(model=policy, ref_model=reference, shared_prefix="on", prefix_attention="mask", loss_type="dpo")
    inputs, _ = trainer.pair_losses(trainer.data_collator(tiny_rows(3)))
    torch.testing.assert_close(inputs.ref_logps, inputs.logps, rtol=0, atol=1e-5)


def test_a_reference_that_cannot_share_is_refused(make, folder, monkeypatch):
    other, _ = load_model(folder)
    monkeypatch.setattr("aspo.start.check_tree", lambda *_: "it leaks")
    with pytest.raises(ValueError, match="ref_model cannot take shared or packed rows: it leaks; set shared_prefix"):
        make(ref_model=other)


def test_an_adapter_as_the_reference_is_not_cached_without_it(make, folder):
    adapted = get_peft_model(load_model(folder)[0], LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"ref_model is an adapter.*merge it into its base"):
        make(ref_model=adapted, precompute_ref_log_probs=True)


# ---- what rows and collators come as ----


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_stream_trains_and_evaluates_as_a_list_does(make, padding_free):
    rows = [{**row, "sample_weight": float(n)} for n, row in enumerate(tiny_rows(6))]
    ends = []
    for given in (rows, Stream(rows)):
        options = {"padding_free": padding_free, "train_sampling_strategy": "sequential", "learning_rate": 1e-2}
        trainer = make(given, max_steps=3, loss_type="dpo", **options)
        trainer.train()
        ends.append((trainable(trainer), trainer.evaluate(given)["eval_loss"]))
    (listed, listed_loss), (streamed, streamed_loss) = ends
    assert streamed_loss == listed_loss
    for name, value in listed.items():
        torch.testing.assert_close(streamed[name], value, rtol=0, atol=0)


def test_a_collator_of_ones_own_shares_as_args_say(make, folder):
    processor = load_model(folder)[1]
    trainer = make(data_collator=Collator(processor), shared_prefix="on", padding_free=True)
    assert trainer.data_collator.shared_prefix and trainer.data_collator.padding_free and trainer.route == "segments"
    with pytest.raises(ValueError, match="set it in args"):
        make(data_collator=Collator(processor, shared_prefix=True))


@pytest.mark.parametrize("option", [{"shared_prefix": "on"}, {"padding_free": True}, {"prefix_attention": "mask"}])
def test_sharing_that_cannot_be_checked_is_refused(make, option):
    with pytest.raises(ValueError, match=r"need aspo.data.Collator, not function: leave data_collator out"):
        make(data_collator=lambda rows: rows, **option)
    with pytest.raises(ValueError, match="need train_dataset or eval_dataset"):
        make(rows=[], **option)
    assert make(rows=[]).route == "mask"


def test_features_on_disk_are_written_by_an_evaluation_alone(make, tmp_path):
    make(eval_rows=tiny_rows(2), vision_cache="disk").evaluate()
    assert list((tmp_path / "out" / "vision_cache").glob("*/*.safetensors"))


# ---- precision and memory options ----


def test_bf16_autocast(make):
    trainer = make(bf16=True, loss_type="dpo", max_steps=2, logging_steps=1)
    trainer.train()
    assert trainer.start_loss == pytest.approx(math.log(2), abs=1e-3)
    collated = trainer.data_collator(tiny_rows(2))
    with trainer.accelerator.autocast():
        hidden = trainer.model.get_base_model().base_model(**collated["model_inputs"]).last_hidden_state
    inputs, _ = trainer.pair_losses(collated)
    assert inputs.logps.dtype == torch.float32 and hidden.isfinite().all()
    trainer.accelerator.native_amp = False
    exact, _ = trainer.pair_losses(collated)
    error = (exact.logps - inputs.logps).abs().max()
    assert 1e-6 < error < 0.1  # autocast was on, and is close


def test_deepspeed_rounds_the_models_inputs_alone(make, monkeypatch):
    """It has Trainer cast a batch to half precision: cached log-probabilities and scores keep every bit."""
    rows = [{**row, "sample_weight": 0.7 + n / 3} for n, row in enumerate(tiny_rows(3))]
    trainer = make(rows, precompute_ref_log_probs=True, forward_tokens=160, alpha=0.5)
    batch = trainer.data_collator(rows)
    config = types.SimpleNamespace(hf_ds_config=types.SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", config)
    trainer.is_deepspeed_enabled = True
    prepared = trainer._prepare_inputs(batch)
    assert prepared.keys() == batch.keys()
    for name in ("ref_logps", "similarity", "sample_weight"):
        assert torch.equal(prepared[name], batch[name]) and prepared[name].dtype == torch.float32
        assert not torch.equal(batch[name].bfloat16().float(), batch[name])  # it would have been seen
    assert prepared["model_inputs"]["pixel_values"].dtype == torch.bfloat16
    assert all(part["model_inputs"]["pixel_values"].dtype == torch.bfloat16 for part in prepared["parts"])


def test_activation_checkpointing_changes_no_gradient(make):
    name = "activation_checkpointing" if hasattr(AspoConfig, "activation_checkpointing") else "gradient_checkpointing"
    plain, checkpointed = train_one_step(make(**SGD)), train_one_step(make(**{name: True}, **SGD))
    for key in plain:
        torch.testing.assert_close(checkpointed[key], plain[key])


def test_dropout_is_off_unless_asked_for(make, folder):
    model, _ = load_model(folder)
    model.model.language_model.layers[0].self_attn.attention_dropout = 0.5
    trainer = make(model=model, max_steps=1, loss_type="dpo")
    trainer.train()
    assert trainer.start_loss == pytest.approx(math.log(2), abs=1e-6)
    with pytest.warns(UserWarning, match="step 0"):
        make(
            lora_dropout=0.9, disable_dropout=False, loss_type="dpo", beta=50.0, max_steps=1, model=noisy(folder)
        ).train()


def noisy(folder):
    model, _ = load_model(folder)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


# ---- warnings and errors ----


def test_falling_rewards_are_warned_about_once():
    rewards = FallingRewards()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            rewards.look({"rewards/chosen": -0.1 * step, "rewards/rejected": -0.2 * step})
        rewards.look({"rewards/chosen": 0.3, "rewards/rejected": -2.0})
    assert len(caught) == 1 and "both rewards are negative and falling" in str(caught[0].message)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(make):
    rows = [{**row, "id": f"row {n}"} for n, row in enumerate(tiny_rows(4))]
    rows[2]["sample_weight"] = math.nan
    options = {"loss_type": "dpo", "max_steps": 4, "per_device_train_batch_size": 1, "logging_steps": 10}
    trainer = make(rows, **options, save_strategy="steps", save_steps=1, train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match=r"loss is nan at step 2, in a batch of the rows row 2\. Nothing was saved"):
        trainer.train()
    saved = sorted(Path(str(trainer.args.output_dir)).glob("checkpoint-*"))
    assert [path.name for path in saved] == ["checkpoint-1", "checkpoint-2"] and all(map(is_complete, saved))


def test_weights_that_are_not_finite_are_not_saved(make):
    trainer = make(loss_type="dpo", max_steps=2)
    next(p for p in trainer.model.parameters() if p.requires_grad).data[0] = math.inf
    with pytest.raises(ValueError, match="weights are no longer finite"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(Path(str(trainer.args.output_dir)).glob("checkpoint-*"))


def test_rows_without_similarity(make):
    rows = [{k: v for k, v in row.items() if k != "chosen_similarity"} for row in tiny_rows(2)]
    with pytest.raises(ValueError, match="aspo score"):
        make(rows)
    make(rows, alpha=0.0, max_steps=1).train()
    make(rows, loss_type="dpo", max_steps=1).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo", "alpha": 0.3}, "'dpo' takes no option alpha"),
        ({"loss_type": "aspo", "label_smoothing": 0.1}, "'aspo' takes no option label_smoothing"),
        ({"loss_type": "nope"}, "unknown objective 'nope'"),
        ({"loss_type": ["dpo", "sft"], "loss_weights": [1.0]}, "1 loss_weights for 2 loss_type"),
        ({"loss_type": ["dpo", "dpo"]}, "name each objective once"),
        ({"objective_kwargs": {"margin": 1}}, "takes no option margin"),
        ({"objective_kwargs": "margin"}, "write JSON"),
        ({"use_lora": False, "lora_r": 4}, "lora_r given, but use_lora is off"),
        ({"lora_dropout": 0.1}, "no effect with disable_dropout"),
        ({"freeze_vision": False}, "only the adapters train"),
        ({"max_length": 0}, "max_length is 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"torch_compile": True}, "torch_compile=True is not supported"),
        ({"shared_prefix": "yes"}, "shared_prefix is 'yes'; choose one of auto, on, off"),
        ({"vision_cache": "ram"}, "vision_cache is 'ram'; choose one of none, step, disk"),
        ({"prefix_attention": "flash"}, "prefix_attention is 'flash'"),
        ({"token_budget": 0}, "token_budget is 0; it must be positive"),
        ({"reference_cache": "somewhere"}, "reference_cache is given, but precompute_ref_log_probs is off"),
        ({"load_in_4bit": True, "use_lora": False}, "load_in_4bit keeps the weights frozen"),
        ({"use_dora": True, "use_lora": False}, "use_dora given, but use_lora is off"),
        ({"label_smoothing_factor": 0.1}, "use label_smoothing"),
        ({"objective_kwargs": {"beta": 1}}, "an option of its own: --beta"),
        ({"beta": -1.0}, "beta is -1.0; it must be positive"),
        ({"normalizer": "tokens"}, "normalizer is 'tokens'; choose one of"),
        ({"plugins": ["nowhere.py"]}, "nowhere.py is not there"),
        ({"train_sampling_strategy": "group_by_length", "token_budget": 99}, "it groups rows by itself"),
        ({"dataloader_drop_last": True, "token_budget": 99}, "dataloader_drop_last=True does not go with token_budget"),
        ({"loss_type": "simpo", "precompute_ref_log_probs": True}, "simpo reads no reference: turn it off"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches is on"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance is not supported: use token_budget"),
        ({"plugins": ["nowhere"]}, "plugin 'nowhere' cannot be imported"),
        ({"dtype": "int4"}, "int4"),
        ({"kernel_backend": "cuda"}, "kernel_backend is 'cuda'; choose one of auto, torch"),
    ],
)
def test_config_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        AspoConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_config_fills_in_what_the_objective_takes(tmp_path):
    config = AspoConfig(output_dir=str(tmp_path), use_cpu=True)
    assert config.objective_options() == objectives.options("aspo")
    assert config.label_smoothing is None and (config.lora_r, config.lora_alpha) == (16, 32)
    again = AspoConfig(
        **{k: v for k, v in vars(config).items() if k in AspoConfig.__dataclass_fields__ and v is not None}
    )
    assert again.objective_options() == config.objective_options()
    assert AspoConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="sigmoid").loss_type == ["dpo"]
    several = AspoConfig(output_dir=str(tmp_path), use_cpu=True, loss_type=["simpo", "dpo", "sft"])
    assert several.objective_options() == {"gamma": 1.0, "label_smoothing": 0.0}  # beta: each its own default


def test_several_devices_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(AspoConfig, "n_gpu", 4)
    with pytest.raises(ValueError, match=r"one process has 4 devices: start one for each .*CUDA_VISIBLE_DEVICES"):
        AspoConfig(output_dir=str(tmp_path), use_cpu=True)


def test_an_objective_of_ones_own_from_a_plugin(make, tmp_path, monkeypatch):
    monkeypatch.setattr(objectives, "_REGISTRY", dict(objectives._REGISTRY))
    plugin = tmp_path / "my_objective.py"
    plugin.write_text(
        "from aspo_kernels.objectives import Inputs, Result, register\n"
        "@register('square')\n"
        "def square(x: Inputs, target: float = 1.0) -> Result:\n"
        "    chosen, rejected = x.pair(x.response_logratios)\n"
        "    return Result((chosen - rejected - target) ** 2, x.reward_stats(1.0))\n"
    )
    options = {"loss_type": "square", "plugins": [str(plugin)], "objective_kwargs": '{"target": 3.0}'}
    trainer = make(max_steps=1, **options)
    trainer.train()
    assert trainer.start_loss == pytest.approx(9.0, abs=1e-4)


# ---- what is saved ----


@pytest.mark.parametrize("use_lora", [True, False])
def test_what_is_saved_loads_with_plain_from_pretrained(make, folder, tmp_path, use_lora):
    trainer = make(use_lora=use_lora, max_steps=3, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    if use_lora:
        base = AutoModelForImageTextToText.from_pretrained(folder)
        model = PeftModel.from_pretrained(base, tmp_path / "saved")
    else:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    row = tiny_rows(1)[0]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=text, images=row["images"], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = processor.decode(tokens, skip_special_tokens=True).strip()
    assert answer == generate(trainer.model, trainer.processing_class, [row], max_new_tokens=12)[0]
    start, _ = load_model(folder)
    assert answer != generate(start, processor, [row], max_new_tokens=12)[0]


def test_the_best_checkpoint_of_full_fine_tuning_is_loaded(make):
    """Trainer compares bare names, and of a LLaVA none match those it is saved under."""
    trainer = make(
        use_lora=False,
        max_steps=2,
        learning_rate=3e-3,
        eval_rows=tiny_rows(2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="logps/rejected",  # falls with every step, so the first checkpoint is the best
        greater_is_better=True,
    )
    trainer.train()
    history = [entry["eval_logps/rejected"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1") and history[0] > history[1]
    assert trainer.evaluate()["eval_logps/rejected"] == pytest.approx(history[0], abs=1e-4)
