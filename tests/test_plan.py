"""aspo plan: what it predicts is what a real step allocates; no weight is loaded, nothing is left behind."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import json
import shutil

import pytest
import torch
from families import family
from tiny import IMAGE_TOKENS, tiny_llava, tiny_rows, tiny_tokenizer
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from aspo import cli, plan, step_memory, trust
from aspo.config import AspoConfig
from aspo.model import base_model, load_model
from aspo.shared_prefix.exact import _one_more_pad
from aspo.step_memory import Allocations, Step, meta_model, predict
from aspo.trainer import AspoTrainer

PROMPT, PAIRS, MAX_LENGTH = "Describe the image. " * 20, 3, 220
CHOSEN, REJECTED = "The star is red. It is a small star. " * 12, "It is a small star. The star is red. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("plan") / "llava")


def equal_rows():
    """Pairs whose responses are cut to one length and have no common start, so that the tree is the planned one."""
    texts = {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}
    return [{"id": row["id"], "images": row["images"], **texts} for row in tiny_rows(PAIRS)]


OPTIONS = [
    {},
    {"shared_prefix": "off"},
    {"precompute_ref_log_probs": True},
    {"activation_checkpointing": True},
    {"activation_checkpointing": True, "shared_prefix": "off"},
    {"use_lora": False},
    {"bf16": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=[" ".join(o) or "defaults" for o in OPTIONS])
def test_the_prediction_is_what_a_step_allocates(folder, tmp_path, monkeypatch, options):
    model, processor = load_model(folder, device="cpu")
    fixed = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "loss_type": "dpo"}
    if not hasattr(AspoConfig, "activation_checkpointing"):  # its name in older transformers
        options = {k.replace("activation_checkpointing", "gradient_checkpointing"): v for k, v in options.items()}
    fixed |= {"per_device_train_batch_size": PAIRS, "max_length": MAX_LENGTH, "shared_prefix": "on"}
    args = AspoConfig(output_dir=str(tmp_path), **{**fixed, **options})
    trainer = AspoTrainer(model, args, equal_rows(), processing_class=processor)
    checkpointing = bool(options.get("activation_checkpointing") or options.get("gradient_checkpointing"))
    if checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = next(iter(trainer.get_train_dataloader()))
    if args.shared_prefix == "off":  # batches have padding, or transformers would leave their mask out
        batch = _one_more_pad(batch)
    trainer.compute_loss(trainer.model, batch).backward()  # what only the first step does
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.train()
    with Allocations() as counter:
        counter.ignore(*trainer.model.parameters(), *trainer.model.buffers())
        before = counter.live
        trainer.compute_loss(trainer.model, batch).backward()
        measured = counter.peak - before
    tree = trainer.data_collator(equal_rows())["tree"]
    lengths = {(item.prefix, item.branches) for item in tree.items}
    (prefix, branches) = lengths.pop()
    assert not lengths and prefix + branches[0] == MAX_LENGTH
    planned = Step(
        PAIRS, prefix, branches[0], args.shared_prefix == "on", args.precompute_ref_log_probs,
        torch.bfloat16 if args.bf16 else None, checkpointing,
    )  # fmt: skip
    assert planned.tree() == tree
    meta = meta_model(str(folder), args)
    # The kernels' workspace is made inside one operator, which the count does not see.
    kept = lambda outer, rows: (rows.numel() * rows.element_size(), 0)  # noqa: E731
    monkeypatch.setattr(step_memory, "_head_memory", kept)
    memory = predict(meta, planned, 1, 30)
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    predicted = memory.peak - memory.weights - 2 * trained
    assert predicted == pytest.approx(measured, rel=0.1), (predicted / measured, memory)
    weights = sum(t.numel() * t.element_size() for t in (*trainer.model.parameters(), *trainer.model.buffers()))
    assert memory.weights == weights and memory.optimiser == 2 * trained
    assert memory.activations > 0 and memory.backward >= 0
    assert all(p.is_meta for p in meta.parameters())  # as they were


def test_the_command_suggests_what_fits(folder, capsys):
    command = ["plan", "--model", str(folder), "--response-tokens", "40", "--prompt-tokens", "50"]
    assert cli.main([*command, "--memory", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "prompt 59 tokens (9 of images), responses 40" in out and "sharing saves 30%" in out
    pairs = int(out.partition("--per_device_train_batch_size ")[2].split(",")[0])
    model = meta_model(str(folder), AspoConfig(output_dir="unused", use_cpu=True))
    room = 0.9 * 0.1 * 2**30
    assert 0.85 * room < predict(model, Step(pairs, 59, 40), 1, 30).peak <= room  # linear but for the tiles' steps
    assert f"--token_budget {pairs * 139}" in out
    assert cli.main([*command, "--memory", "0.0003"]) == 0
    assert "not one pair fits into 0.0003 GiB" in capsys.readouterr().out
    assert cli.main([*command[:4], "0"]) == 2 and "--response-tokens is 0" in capsys.readouterr().err
    assert cli.main([*command, "--images", "-1"]) == 2 and "--images is -1" in capsys.readouterr().err
    assert cli.main([*command, "--memory", "0"]) == 2 and "--memory is 0 GiB" in capsys.readouterr().err


def test_no_weights_are_read(folder, tmp_path, capsys):
    """A folder with configuration and processor alone."""
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert cli.main(["plan", "--model", str(tmp_path), "--response-tokens", "30", "--no_use_lora"]) == 0
    out = capsys.readouterr().out
    assert "reference (a frozen copy)" in out and "peak" in out
    assert base_model(meta_model(str(tmp_path), AspoConfig(output_dir="x", use_cpu=True))).config.model_type == "llava"
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llava"


def test_operations_are_those_of_the_products(folder):
    """2 x numbers x tokens for each pass over the linear layers, and the attention's own products."""
    pairs, prompt, response = 2, 30, 10
    args = AspoConfig(output_dir="x", use_cpu=True, use_lora=False)
    meta = meta_model(str(folder), args)
    memory = predict(meta, Step(pairs, prompt, response, shared=False), 1, 30)
    decoder = base_model(meta).get_decoder()
    tokens, layers = 2 * pairs * (prompt + response), len(decoder.layers)
    linear = sum(p.numel() for layer in decoder.layers for p in layer.parameters() if p.dim() == 2)
    attention = layers * 2 * 2 * tokens * (prompt + response) * 32  # q k and p v, H = 32
    head = 2 * pairs * response * base_model(meta).get_output_embeddings().weight.numel() * 2
    assert memory.flops.forward == memory.flops.reference
    assert memory.flops.forward == pytest.approx(2 * linear * tokens + attention, rel=1e-3)  # rotary angles may be more
    assert memory.flops.backward == pytest.approx(2 * 2 * linear * tokens + 2.5 * attention, rel=0.03)
    assert memory.flops.head == (3 + 1) * head  # stored, and the reference's pass
    assert memory.flops.vision > 0
    cached = predict(meta, Step(pairs, prompt, response, shared=False, cached_reference=True), 1, 30)
    assert cached.flops.reference == 0 and cached.flops.head == 3 * head
    again = predict(meta, Step(pairs, prompt, response, shared=False, checkpointing=True), 1, 30)
    assert memory.flops.forward * 0.6 < again.flops.backward - memory.flops.backward <= memory.flops.forward
    lora = predict(
        meta_model(str(folder), AspoConfig(output_dir="x", use_cpu=True, lora_r=1)),
        Step(pairs, prompt, response, False),
    )
    assert lora.flops.backward < 0.8 * memory.flops.backward and lora.flops.head == (2 + 1) * head


def test_dropped_gradients_are_not_held(folder):
    meta = meta_model(str(folder), AspoConfig(output_dir="x", use_cpu=True, use_lora=False))
    step = Step(1, 2, 2)  # few activations
    kept, dropped = (predict(meta, step, drop_gradients=drop) for drop in (False, True))
    assert dropped.running < kept.running - 0.2 * kept.optimiser / 2  # layers' gradients: without head and embeddings
    assert dropped.flops == kept.flops and not any(p._post_accumulate_grad_hooks for p in meta.parameters())


def test_the_parts_add_up_to_the_peak_and_none_is_negative(folder, tmp_path, capsys):
    """Many layers: the peak comes before most gradients are made."""
    shutil.copytree(folder, tmp_path / "deep")
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["num_hidden_layers"] = 16
    settings["text_config"].pop("layer_types", None)
    (tmp_path / "deep/config.json").write_text(json.dumps(settings))
    few = ["--response-tokens", "10", "--prompt-tokens", "20", "--per_device_train_batch_size", "1"]
    assert cli.main(["plan", "--model", str(tmp_path / "deep"), *few]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" MiB")]
    sizes = {line[2:30].strip(): float(line.split()[-2].replace(",", "")) for line in lines}
    peak = sizes.pop("peak")
    assert len(sizes) > 4 and min(sizes.values()) >= 0
    assert sum(sizes.values()) == pytest.approx(peak, abs=0.05 * len(sizes))


@pytest.mark.parametrize("stray", ["--gpu h100", "--strategy ddp", "--num_train_epochs 2", "--gpu_memory 80",
                                   "--storage 2", "--gpus_per_node 8", "--price 2"])  # fmt: skip
def test_a_jobs_options_want_gpus(stray, capsys):
    command = ["plan", "--model", "llava-1.5-7b", "--response-tokens", "40", *stray.split()]
    assert cli.main(command) == 2
    assert f"{stray.split()[0]} wants --gpus" in capsys.readouterr().err


def test_everything_that_is_wrong_is_said_at_once(monkeypatch, capsys):
    monkeypatch.setattr(plan, "model_config", lambda name: pytest.fail("a model was read"))
    assert cli.main(["plan", "--gpus", "12", "--gpu", "h1000", "--strategy", "fsdp", "--images", "-1"]) == 2
    error = capsys.readouterr().err
    for part in ("missing: --model, --response-tokens", "--images is -1", "not --pairs", "plan with --bf16",
                 "gpu is 'h1000'", "12 GPUs do not fill nodes of 8", "strategy is 'fsdp'"):  # fmt: skip
        assert part in error
    assert error.count("\n") == 1 and "(7)" in error and "(8)" not in error
    command = ["plan", "--model", "/no/model", "--response-tokens", "4", "--dtype", "float8", "--memory", "0"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "there is no model folder /no/model" in error and "dtype is 'float8'" in error and "--memory is 0" in error


def test_an_unknown_model_is_told_with_the_names_that_need_no_hub(monkeypatch, capsys):
    def unreachable(*args, **options):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(trust, "pretrained", unreachable)
    for more in ([], ["--gpus", "8", "--pairs", "10", "--bf16"]):
        assert cli.main(["plan", "--model", "llava-1.5-8b", "--response-tokens", "40", *more]) == 2
        error = capsys.readouterr().err
        assert "the model 'llava-1.5-8b' is no folder here, and the hub does not give it: We couldn't" in error
        assert "known without a hub: llava-1.5-7b, llava-1.5-13b, qwen2.5-vl-72b; did you mean llava-1.5-" in error


def test_a_jobs_pairs_are_not_a_batchs(folder, capsys):
    command = ["plan", "--model", str(folder), "--response-tokens", "40"]
    assert cli.main([*command, "--pairs", "2"]) == 2
    assert "--pairs wants --gpus, how many GPUs the job has; a batch's pairs" in capsys.readouterr().err
    assert cli.main([*command, "--per_device_train_batch_size", "0"]) == 2
    assert "--per_device_train_batch_size is 0" in capsys.readouterr().err


def planned(capsys, *flags):
    """What `aspo plan` says of two pairs, or why it refuses."""
    code = cli.main(["plan", "--response-tokens", "40", *map(str, flags)])
    said = capsys.readouterr()
    assert code in (0, 2)
    return said.err if code else said.out


def test_the_image_size_changes_the_plan(tmp_path, capsys):
    """Of a model that reads images at their own size: a token for each square of 10 pixels."""
    for part in family("Qwen2.5-VL"):
        part.save_pretrained(tmp_path)
    for size, tokens in ((40, 16), (60, 36)):
        assert f"({tokens} of images)" in planned(capsys, "--model", tmp_path, "--image-size", size)


def test_the_prefix_changes_the_plan(folder, capsys):
    prompt = ["--model", folder, "--prompt-tokens", "20"]
    shared, apart = planned(capsys, *prompt), planned(capsys, *prompt, "--no_shared_prefix")
    count = 2 * (20 + IMAGE_TOKENS)
    assert f"tokens: {count + 160:,}; each response with its own prompt: {2 * count + 160:,} (sharing saves" in shared
    assert f"tokens: {2 * count + 160:,}; " in apart and "sharing saves" not in apart


def test_images_that_the_model_cannot_have(tmp_path, capsys):
    refused = planned(capsys, "--model", "llava-1.5-7b", "--image-size", 448)
    assert "--image-size is 448, but llava-1.5-7b is planned with 336 pixels" in refused
    refused = planned(capsys, "--model", "world", "--image-size", 96)
    assert "--image-size is 96, but world is planned with 72 pixels, whatever an image's size" in refused
    same = planned(capsys, "--model", "world", "--image-size", 72)
    assert same == planned(capsys, "--model", "world") and "image features" in same
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, **small)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "reads text only: pass --images 0" in planned(capsys, "--model", tmp_path)
    assert "(0 of images)" in planned(capsys, "--model", tmp_path, "--images", 0)


def test_how_many_gpus_share_a_copy_changes_the_plan(folder, capsys):
    job = ["--model", folder, "--gpus", 16, "--bf16", "--pairs", 1000, "--strategy", "fsdp2", "--no_use_lora"]
    assert "1/16 of it" in planned(capsys, *job) and "1/8 of it" in planned(capsys, *job, "--dp_shard_size", 8)
