"""Training on several processes ends where one process ends, however the model is wrapped.

The processes are gloo groups on the CPU (`ranks.Ranks`); each call builds model and trainer anew.
"""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from forked import launched
from ranks import Ranks
from safetensors.torch import load_file
from tiny import tiny_llava, tiny_rows

from aspo.train import CHECKPOINTING

STEPS = 20
PAIRS = 6  # of an optimiser step, however many processes share it
BASE = {"max_steps": STEPS, "learning_rate": 1e-3, "loss_type": "dpo", "beta": 0.5, "warmup_steps": 2}


def rows(count: int, text_only: bool = False) -> list[dict[str, Any]]:
    """Rows; with `text_only` every third one has no image."""
    made = [{**row, "id": f"row-{n}"} for n, row in enumerate(tiny_rows(count))]
    if not text_only:
        return made
    return [without_image(row) if n % 3 == 0 else row for n, row in enumerate(made)]


def without_image(row: dict[str, Any]) -> dict[str, Any]:
    prompt = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}]
    return {**{k: v for k, v in row.items() if k not in ("images", "image")}, "prompt": prompt}


class Stream(torch.utils.data.IterableDataset):
    """The rows of `rows` without a length, each pass beginning at another one."""

    def __init__(self, count: int) -> None:
        self.rows, self.epoch = rows(count), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        begin = self.epoch % len(self.rows)
        return iter(self.rows[begin:] + self.rows[:begin])


def train(folder: str, out: str, kind: str = "ddp", **options: Any) -> dict[str, Any]:
    """One training in this process, together with the others of its group: weights, losses and logs.

    options: AspoConfig's, and data, ref (True: a reference of its own), resume, save (a folder for the final model).
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState

    from aspo.config import AspoConfig
    from aspo.model import load_model
    from aspo.trainer import AspoTrainer

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    meet(kind)
    torch.manual_seed(0)
    model, processor = load_model(folder, device="cpu")
    data = options.pop("data", None) or rows(37)
    ref_model = load_model(folder, device="cpu")[0] if options.pop("ref", False) else None
    resume, save = options.pop("resume", None), options.pop("save", None)
    defaults = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "report_to": "none"}
    if kind.startswith("zero"):
        defaults |= {"deepspeed": zero(int(kind[-1])), "ddp_backend": "gloo"}
    args = AspoConfig(output_dir=out, **{**defaults, **BASE, **options})
    evaluates = {"eval_dataset": rows(5)} if "eval_strategy" in options else {}
    trainer = AspoTrainer(model, args, data, processing_class=processor, ref_model=ref_model, **evaluates)
    trainer.train(resume_from_checkpoint=resume)
    if save is not None:
        trainer.save_model(save)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}  # of shards: in the first process alone
    trained = {name for name, p in trainer._policy.named_parameters() if p.requires_grad}
    return {
        "weights": {name: value.clone() for name, value in weights.items() if name in trained},
        "logs": trainer.state.log_history,
        "processes": trainer.accelerator.num_processes,
        "type": trainer.accelerator.distributed_type.value,
    }


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's options; the threshold lets it shard even small tensors, as it does all of a real model's."""
    own = (
        {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        if stage == 3
        else {}
    )
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": {"stage": stage, **own}, **dict.fromkeys(sizes, "auto")}


def meet(kind: str) -> None:
    """What a launcher would set."""
    import torch.distributed as dist

    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        os.environ |= launched(rank, size, 29_500)  # met already
    if kind == "fsdp":
        import fsdp_on_cpu  # noqa: F401  accelerate itself asks for a GPU

        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        }


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    """Groups of 1, 2 and 3 processes."""
    groups = {size: Ranks(size, 300) for size in (1, 2, 3)}
    yield groups
    for group in groups.values():
        group.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llava(tmp_path_factory.mktemp("distributed") / "llava"))


@pytest.fixture(scope="module")
def one_process(ranks: dict[int, Ranks], folder: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """one_process(**options) -> what one process trains; each only once."""
    kept: dict[str, Any] = {}

    def run(**options: Any) -> Any:
        key = repr(sorted(options.items()))
        if key not in kept:
            out = str(tmp_path_factory.mktemp("one"))
            (kept[key],) = ranks[1].run(train, folder, out, per_device_train_batch_size=PAIRS, **options)
        return kept[key]

    return run


def losses_of(run: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in run["logs"] if "loss" in entry]


def assert_same(found: list[dict[str, Any]], expected: dict[str, Any], kind: str) -> None:
    assert len(expected["weights"]) > 4
    losses = losses_of(expected)
    assert max(losses) - min(losses) > 0.02  # it did train
    for rank, of_rank in enumerate(found):
        assert (of_rank["processes"], of_rank["type"]) == (len(found), TYPES[kind])
        assert losses_of(of_rank) == pytest.approx(losses, abs=2e-5)
        for name in ("rewards/chosen", "rewards/accuracies", "logps/rejected", "sentences/nll_std", "eval_loss"):
            theirs = [entry[name] for entry in of_rank["logs"] if name in entry]
            assert theirs == pytest.approx([entry[name] for entry in expected["logs"] if name in entry], abs=2e-4)
        if rank and kind != "ddp":
            continue
        assert of_rank["weights"].keys() == expected["weights"].keys()
        for name, value in expected["weights"].items():
            difference = (of_rank["weights"][name] - value).abs().max()
            assert difference < 1e-4, (name, float(difference))  # of a learning rate of 1e-3 over 20 steps


TYPES = {"ddp": "MULTI_CPU", "fsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
KINDS = [("ddp", 2), ("ddp", 3), ("fsdp", 2), ("zero2", 2), ("zero3", 2)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_lora": False},
    {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 10},
    {"use_lora": False, "data": "mixed", "loss_type": "aspo", "alpha": 0.0},
    {"use_lora": False, "freeze_vision": False, "data": "mixed", CHECKPOINTING: True},
    {"ref": True, "shared_prefix": "off"},
    {"loss_type": "acpo", "beta": 0.5},
    {"loss_type": "tdpo", "beta": 0.5},
    {"precompute_ref_log_probs": True, "forward_tokens": 200},
]


@pytest.mark.parametrize(("kind", "size"), KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(f"{k}={options[k]}" for k in options) or "{}")
def test_several_processes_end_where_one_does(ranks, one_process, folder, tmp_path, kind, size, options):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    if options.get("data") == "mixed":  # some batches have an image, some have none
        options = {**options, "data": rows(37, text_only=True)}
        if kind.startswith("zero"):
            with pytest.raises(RuntimeError, match="1 of 2 processes have a batch with images, the others have none"):
                ranks[size].run(train, folder, str(tmp_path), kind, **options, per_device_train_batch_size=1)
            return
    expected = one_process(**options)
    assert len(losses_of(expected)) == STEPS
    if "precompute_ref_log_probs" in options and kind != "ddp":  # a sharded model fills no cache
        options = {**options, "reference_cache": str(tmp_path / "filled")}
        ranks[2].run(train, folder, str(tmp_path / "whole"), **{**options, "max_steps": 1})
    pairs = PAIRS // size
    found = ranks[size].run(train, folder, str(tmp_path), kind, **options, per_device_train_batch_size=pairs)
    assert_same(found, expected, kind)


def test_batches_of_tokens_are_shared_too(ranks, folder, tmp_path):
    """The same batches by another number of processes: two each step by one that accumulates, one each by two."""
    options = {"token_budget": 400, "train_sampling_strategy": "random", "shared_prefix": "on", "max_steps": 8}
    (expected,) = ranks[1].run(train, folder, str(tmp_path / "one"), **options, gradient_accumulation_steps=2)
    found = ranks[2].run(train, folder, str(tmp_path / "two"), **options)
    for of_rank in found:
        assert losses_of(of_rank) == pytest.approx(losses_of(expected), abs=2e-5)


def test_a_stream_is_shared_pass_after_pass(ranks, folder, tmp_path):
    """Steps of 6 + 6, 1 + 6, 6 + 1 rows, by one process and by two, which go on from a checkpoint in the third pass."""
    options = {"gradient_accumulation_steps": 2, "max_steps": 7, "data": Stream(13)}
    out = str(tmp_path / "one")
    (expected,) = ranks[1].run(train, folder, out, per_device_train_batch_size=PAIRS, **options)
    options |= {"per_device_train_batch_size": PAIRS // 2, "save_strategy": "steps", "save_steps": 4}
    ranks[2].run(train, folder, str(tmp_path / "two"), **options)
    resume = str(tmp_path / "two" / "checkpoint-4")
    assert_same(ranks[2].run(train, folder, str(tmp_path / "on"), resume=resume, **options), expected, "ddp")


def test_a_sharded_model_does_not_fill_the_reference_cache(ranks, folder, tmp_path):
    with pytest.raises(RuntimeError, match="lacks 37 of 37 rows, and a sharded model does not fill it"):
        ranks[2].run(train, folder, str(tmp_path), "fsdp", precompute_ref_log_probs=True)


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("kind", ["fsdp", "zero2", "zero3"])
def test_a_sharded_run_at_its_end_is_saved_without_a_further_step(ranks, folder, tmp_path, kind, use_lora):
    """Killed behind its last checkpoint, in the middle of an epoch, and begun again."""
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    options = {"use_lora": use_lora, "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    options |= {"per_device_train_batch_size": 3, "warmup_steps": 0}
    whole, _ = ranks[2].run(train, folder, str(tmp_path), kind, **options)
    again = {"resume": str(tmp_path / "checkpoint-3"), "save": str(tmp_path / "saved")}
    found, _ = ranks[2].run(train, folder, str(tmp_path / "on"), kind, **options, **again)
    assert losses_of(found) == losses_of(whole) and len(losses_of(whole)) == 3
    assert [entry["train_loss"] for entry in found["logs"] if "train_loss" in entry] == []
    saved = load_file(tmp_path / "saved" / ("adapter_model.safetensors" if use_lora else "model.safetensors"))
    assert len(saved) > 4 and found["weights"].keys() == whole["weights"].keys()
    for name, value in whole["weights"].items():
        assert torch.equal(found["weights"][name], value)
        assert any(torch.equal(value, other) for other in saved.values()), name  # under other names


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_sharded_model_goes_on_with_its_cached_reference(ranks, folder, tmp_path, use_lora):
    """In full fine-tuning the weights are the checkpoint's when the cache is opened: no sample of it can be checked."""
    options = {"use_lora": use_lora, "per_device_train_batch_size": 3, "max_steps": 1, "precompute_ref_log_probs": True}
    options |= {"reference_cache": str(tmp_path / "cache")}
    ranks[2].run(train, folder, str(tmp_path / "filled"), **options)
    options |= {"max_steps": 8, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4}
    whole, _ = ranks[2].run(train, folder, str(tmp_path / "out"), "fsdp", **options)
    resume = str(tmp_path / "out" / "checkpoint-4")
    resumed, _ = ranks[2].run(train, folder, str(tmp_path / "on"), "fsdp", resume=resume, **options)
    assert losses_of(resumed) == losses_of(whole) and len(losses_of(whole)) == 8
    assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())


def test_log_probabilities_stay_fp32_where_fsdp_casts_outputs(ranks, folder, tmp_path):
    found = ranks[2].run(train, folder, str(tmp_path), "fsdp", bf16=True, max_steps=3, per_device_train_batch_size=3)
    chosen = [entry["logps/chosen"] for entry in found[0]["logs"] if "logps/chosen" in entry]
    # Sums of some 20 tokens: in bfloat16 each would be a multiple of 0.5.
    assert len(chosen) == 3 and any(abs(value * 2 - round(value * 2)) > 1e-3 for value in chosen)


def head_gathers(folder: str, out: str, **options: Any) -> list[int]:
    """How often FSDP2 gathers the output head's weight in each optimiser step, the steps' first checks left out."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    from aspo.trainer import AspoTrainer

    seen, counts = [], []
    gather, step = groups.foreach_all_gather, AspoTrainer.training_step

    def counting(fsdp_params: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(p for p in fsdp_params if str(p._param_fqn).endswith("lm_head.weight"))
        return gather(fsdp_params, *args, **kwargs)

    def one_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        loss = step(self, *args, **kwargs)  # with its backward
        counts.append(len(seen))
        return loss

    groups.foreach_all_gather, AspoTrainer.training_step = counting, one_step
    try:
        train(folder, out, "fsdp", **options)
    finally:
        groups.foreach_all_gather, AspoTrainer.training_step = gather, step
    return counts[1:]


@pytest.mark.parametrize("use_lora", [True, False])
def test_fsdp_gathers_the_head_once_a_step(ranks, folder, tmp_path, use_lora):
    """Frozen or trained, with policy and reference before it: in the forward, and not again in the backward."""
    options = {"use_lora": use_lora, "max_steps": 4, "per_device_train_batch_size": 3}
    assert ranks[2].run(head_gathers, folder, str(tmp_path), **options) == [[1, 1, 1]] * 2


def train_in_parts(*args: Any, **options: Any) -> dict[str, Any]:
    """`train`, and in how many parts each batch came."""
    from aspo.trainer import AspoTrainer

    compute_loss, parts = AspoTrainer.compute_loss, []

    def counting(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        parts.append(len(inputs.get("parts", [inputs])))
        return compute_loss(self, model, inputs, *rest, **more)

    AspoTrainer.compute_loss = counting
    try:
        return {**train(*args, **options), "parts": parts}
    finally:
        AspoTrainer.compute_loss = compute_loss


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_whose_batches_have_other_numbers_of_parts(ranks, one_process, folder, tmp_path, kind):
    options = {"forward_tokens": 160, "per_device_train_batch_size": 3}
    found = ranks[2].run(train_in_parts, folder, str(tmp_path), kind, **options)
    pairs = list(zip(*(of_rank["parts"] for of_rank in found), strict=True))
    assert {(1, 2), (2, 1)} & set(pairs) and len(pairs) == STEPS
    assert_same(found, one_process(), kind)


def test_tokens_are_counted_over_unlike_numbers_of_parts(ranks, one_process, folder, tmp_path):
    """Each count adds up over the processes: one for each part would wait for ever."""
    options = {"max_steps": 6, "include_num_input_tokens_seen": "non_padding"}
    expected = one_process(**options)["logs"][-1]["num_input_tokens_seen"]
    options |= {"forward_tokens": 160, "per_device_train_batch_size": 3}
    found = ranks[2].run(train_in_parts, folder, str(tmp_path), **options)
    assert {(1, 2), (2, 1)} & set(zip(*(of_rank["parts"] for of_rank in found), strict=True))
    assert [of_rank["logs"][-1]["num_input_tokens_seen"] for of_rank in found] == [expected] * 2 and expected > 1000


def refusal(*args: Any, **options: Any) -> str | None:
    """The ValueError with which `train` ends in this process."""
    try:
        train(*args, **options)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("kind", "use_lora"), [("zero3", True), ("zero2", False)])
def test_a_first_batch_with_images_in_one_process_alone_is_refused_in_all(ranks, folder, tmp_path, kind, use_lora):
    """Rows in their order: the first process begins with one without an image, the second with one that has one."""
    pytest.importorskip("deepspeed")
    options = {"train_sampling_strategy": "sequential", "data": rows(12, text_only=True), "use_lora": use_lora}
    options |= {"loss_type": "aspo", "alpha": 0.0, "per_device_train_batch_size": 1, "max_steps": 1}
    one, other = ranks[2].run(refusal, folder, str(tmp_path), kind, **options)
    assert one == other and "\n" not in one
    assert one.startswith("1 of 2 processes have a batch with images, the others have none: DeepSpeed would wait")


def test_batches_of_rows_with_and_without_images_train_under_zero3(ranks, one_process, folder, tmp_path):
    """Where each process's batch has an image, all run the tower: every third row has none."""
    pytest.importorskip("deepspeed")
    options = {"train_sampling_strategy": "sequential", "data": rows(36, text_only=True)}
    options |= {"loss_type": "aspo", "alpha": 0.0}
    found = ranks[2].run(train, folder, str(tmp_path), "zero3", **options, per_device_train_batch_size=3)
    assert_same(found, one_process(**options), "zero3")


def test_parts_are_refused_under_zero3(ranks, folder, tmp_path):
    pytest.importorskip("deepspeed")
    options = {"forward_tokens": 160, "per_device_train_batch_size": 3, "max_steps": 4}
    one, other = ranks[2].run(refusal, folder, str(tmp_path), "zero3", **options)
    assert one == other and one.startswith("forward_tokens cuts a batch into 2 parts, and ZeRO-3 needs one order")


def settled(folder: str, out: str, differs: str, **options: Any) -> tuple[Any, ...]:
    """What this process settles where the second one measures, or can do, something else than the first."""
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.state import AcceleratorState, GradientState

    from aspo.config import AspoConfig
    from aspo.data import Collator
    from aspo.model import load_model
    from aspo.shared_prefix import exact

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    meet("ddp")
    model, processor = load_model(folder, device="cpu")
    collator = Collator(processor)
    before = exact.check_tree, exact.routes_to_try

    def check(model: Any, collator: Any, rows: Any, route: str, *rest: Any) -> str | None:
        return "it leaks" if differs == "all" or route == differs else before[0](model, collator, rows, route, *rest)

    def routes(*args: Any, **more: Any) -> list[str]:
        if differs == "error":
            raise ValueError("it cannot take it")
        return ["mask"]

    if dist.get_rank() == 1:
        exact.check_tree, exact.routes_to_try = check, routes if differs in ("routes", "error") else before[1]
    try:
        args = AspoConfig(output_dir=out, use_cpu=True, report_to="none", **options)
        route = exact.settle_sharing(model, collator, tiny_rows(2), args)
        return route, collator.shared_prefix
    except ValueError as error:
        return "error", str(error)
    finally:
        exact.check_tree, exact.routes_to_try = before


@pytest.mark.parametrize(
    ("differs", "expected"),
    [
        ("nothing", ("segments", True)),
        ("segments", ("mask", True)),
        ("routes", ("mask", True)),
        ("all", ("mask", False)),
    ],
)
def test_processes_settle_alike_what_is_shared(ranks, folder, tmp_path, differs, expected):
    assert ranks[2].run(settled, folder, str(tmp_path), differs) == [expected] * 2


def test_what_one_process_cannot_share_is_an_error_in_all(ranks, folder, tmp_path):
    """Each says it in the words of the one that cannot."""
    for words, run in (
        ("it leaks", ranks[2].run(settled, folder, str(tmp_path), "all", shared_prefix="on")),
        ("it cannot take it", ranks[2].run(settled, folder, str(tmp_path), "error", prefix_attention="segments")),
    ):
        assert [kind for kind, _ in run] == ["error"] * 2 and "process 1" in run[0][1]
        assert all(words in message for _, message in run)
