"""aspo plan --gpus: what two processes send and hold is what is predicted; docs/scaling.md is the command's."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import copy
import dataclasses
import types
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from tiny import tiny_llava
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from aspo import cli
from aspo.config import AspoConfig
from aspo.model import load_model, output_head, trunk_hidden
from aspo.policy import LoraOptions, add_lora, vision_tower
from aspo.processes import inside
from aspo.scaling import tables, units
from aspo.scaling.hardware import GPUS, Cluster, named_gpu
from aspo.scaling.job import make_plan, step_work
from aspo.scaling.report import lift
from aspo.scaling.sharding import Transfer, sizes, transfers
from aspo.step_memory import Step, meta_model, predict
from aspo_kernels import gather_head, linear_logps
from benchmarks import results
from benchmarks.units import RESULTS

RANKS, LORA_RANK = 2, 4
GATHERS, SCATTERS, REDUCTIONS, OTHERS = "gathered", "scattered", "reduced", "broadcast"
KINDS = {"allgather": GATHERS, "all_gather": GATHERS, "reduce_scatter": SCATTERS, "allreduce": REDUCTIONS,
         "broadcast": OTHERS}  # fmt: skip
WHOLE = {"weights, forward": GATHERS, "weights, backward": GATHERS, "weights, reference": GATHERS, "head": GATHERS,
         "gradients to their shards": SCATTERS, "gradients": REDUCTIONS, "buffers": OTHERS}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("scaling") / "llava")


@pytest.fixture(scope="module")
def ranks():
    processes = Ranks(RANKS)
    yield processes
    processes.close()


# ---- what two processes send ----


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensors that collectives gather, scatter and reduce, DDP's and FSDP's from C++ too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and (kind := self._kind(func)):
            sizes = [t.numel() * t.element_size() for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            if func.namespace == "_c10d_functional" and kind == GATHERS:  # only the shard is an argument
                sizes = [dist.get_world_size() * size for size in sizes]
            self.bytes[kind] += max(sizes)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _kind(func) -> str | None:
        return next((kind for name, kind in KINDS.items() if name in func.__name__), None)


def sent_in_a_step(folder: str, strategy: str, lora: bool, cached: bool) -> dict[str, int]:
    """A step as the trainer makes it, on this rank: reference, policy, the head once each, the backward."""
    torch.manual_seed(0)
    policy, _ = load_model(folder, device="cpu")
    reference = None
    if lora:
        policy = add_lora(policy, LoraOptions(lora_r=LORA_RANK))
    else:
        reference = None if cached else copy.deepcopy(policy).requires_grad_(False)
        policy.requires_grad_(True)
        vision_tower(policy).requires_grad_(False)
    prepare = fsdp if strategy == "fsdp2" else whole
    wrapped, wrapped_reference = prepare(policy), reference and prepare(reference)
    ids = torch.randint(4, 300, (2, 30))
    ids[:, :9] = 3
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 30, 30)}

    def rows(model: nn.Module) -> torch.Tensor:
        return trunk_hidden(model, inputs)[:, 9:-1].flatten(0, 1)

    def losses() -> torch.Tensor:
        targets = ids[:, 10:].flatten()
        hidden = []
        with torch.no_grad():
            if reference is not None:
                weight = output_head(reference).weight
                linear_logps(inside(wrapped_reference, rows, reference, inner=reference), weight, targets)
            elif lora and not cached:
                with policy.disable_adapter():
                    hidden = [rows(policy)]
        weight = output_head(policy).weight
        weight = gather_head(weight) if hasattr(weight, "full_tensor") else weight
        return sum(linear_logps(h, weight, targets).sum() for h in [*hidden, rows(policy)])

    for _ in range(3):  # the third is as all that follow: DDP has set up its buckets
        with Collectives() as counter:
            inside(wrapped, losses, inner=policy).backward()
        wrapped.zero_grad()
    return dict(counter.bytes)


def whole(model: nn.Module) -> nn.Module:
    trains = any(p.requires_grad for p in model.parameters())
    return nn.parallel.DistributedDataParallel(model) if trains else model


def fsdp(model: nn.Module) -> nn.Module:
    """accelerate's FSDP2 wrapping with configs/accelerate/fsdp2.yaml's options, which it offers for GPUs only."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True,
        cpu_ram_efficient_loading=False, transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )  # fmt: skip
    state = types.SimpleNamespace(fsdp_plugin=plugin)
    fields = {"mixed_precision": "no", "parallelism_config": None, "device": torch.device("cpu")}
    return fsdp2_prepare_model(types.SimpleNamespace(state=state, is_main_process=True, **fields), model)


@pytest.mark.parametrize("cached", [False, True], ids=["live reference", "cached reference"])
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "all"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_send_what_is_predicted(ranks, folder, strategy, lora, cached):
    first, second = ranks.run(sent_in_a_step, str(folder), strategy, lora, cached)
    assert first == second
    options = {"lora_r": LORA_RANK} if lora else {}
    args = AspoConfig(output_dir="x", use_cpu=True, use_lora=lora, **options)
    size = sizes(meta_model(str(folder), args), None)
    step = Step(1, 10, 10, cached_reference=cached)
    cluster = Cluster(GPUS["h100"], RANKS)
    predicted: Counter[str] = Counter()
    for transfer in transfers(strategy, size, args, step, cluster, RANKS):
        if transfer.name in WHOLE:
            predicted[WHOLE[transfer.name]] += round(transfer.bytes)
    assert set(first) == set(predicted)
    for kind, nbytes in predicted.items():  # FSDP pads the first dimension of a tensor to a multiple of the ranks
        assert first[kind] == pytest.approx(nbytes, rel=0.002), kind


def test_sent_bytes_by_hand():
    """100 bytes gathered among 4 GPUs of 2 nodes: 75 leave each, of which a node's half, by two adapters, 25."""
    gathered = Transfer("weights", 100, 1, per_node=2, nodes=2)
    assert (gathered.sent, gathered.across) == (75, 25)
    inside_a_node = Transfer("weights", 100, 1, per_node=4, nodes=1)
    assert (inside_a_node.sent, inside_a_node.across) == (75, 0)
    reduced = Transfer("gradients", 100, 2, per_node=1, nodes=4)
    assert (reduced.sent, reduced.across) == (150, 150)


def test_sharding_within_a_node_gathers_nothing_across(folder):
    config = AutoConfig.from_pretrained(folder)
    args = AspoConfig(output_dir="x", use_cpu=True, use_lora=False)
    step, cluster = Step(1, 20, 10), Cluster(GPUS["h100"], 16)
    everywhere, in_nodes = (
        make_plan(config, args, step, cluster, "fsdp2", 100, shards=n, images=(0, 30)) for n in (16, 8)
    )
    across = [{t.name: t.across for t in p.sends} for p in (everywhere, in_nodes)]
    assert across[0]["weights, forward"] > 0 == across[1]["weights, forward"]
    assert across[1]["shards over copies"] == pytest.approx(in_nodes.size.numbers * 4 / 8)  # 2 x (2-1)/2 of the shard
    assert in_nodes.held > everywhere.held
    with pytest.raises(ValueError, match="dp_shard_size is 5"):
        make_plan(config, args, step, cluster, "fsdp2", 100, shards=5, images=(0, 30))
    with pytest.raises(ValueError, match="zero3 has none"):
        make_plan(config, args, step, cluster, "zero3", 100, shards=8, images=(0, 30))


# ---- what a GPU holds ----


def shard_bytes(folder: str) -> tuple[int, int, int]:
    """(weights, gradients, optimiser state) that this rank holds of a model under FSDP2."""
    policy, _ = load_model(folder, device="cpu")
    policy.requires_grad_(True)
    vision_tower(policy).requires_grad_(False)
    wrapped = fsdp(policy)
    optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    for p in wrapped.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimiser.step()

    def size(tensors) -> int:
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        return sum(t.numel() * t.element_size() for t in local)

    state = [t for s in optimiser.state.values() for name, t in s.items() if name != "step"]
    weights = [*wrapped.parameters()]
    return size(weights), size(p.grad for p in weights if p.grad is not None), size(state)


def test_two_processes_hold_what_is_predicted(ranks, folder):
    found = ranks.run(shard_bytes, str(folder))
    args = AspoConfig(output_dir="x", use_cpu=True, use_lora=False)
    step, cluster = Step(1, 20, 10, cached_reference=True), Cluster(GPUS["h100"], RANKS)
    plan = make_plan(AutoConfig.from_pretrained(folder), args, step, cluster, "fsdp2", 100, images=(0, 30))
    parts = {part.name: part.bytes for part in plan.parts}
    weights = (
        parts["weights"] - plan.size.buffers / RANKS
    )  # which are whole in each; so small that the plan shares them
    predicted = weights, parts["gradients"], parts["optimiser"]
    for rank in found:
        assert rank == pytest.approx(predicted, rel=0.01)


def test_shallow_models_say_what_a_deep_one_takes(folder):
    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = 9
    args, step = AspoConfig(output_dir="x", use_cpu=True), Step(2, 40, 20)
    deep = predict(meta_model(config, args), step, 1, 30, drop_gradients=True)
    found = step_work(config, args, step, (1, 30))
    assert found.flops == deep.flops
    for field in dataclasses.fields(deep):
        if field.name != "flops":
            assert getattr(found, field.name) == pytest.approx(getattr(deep, field.name), abs=2), field.name


@pytest.mark.slow
def test_seven_billion_numbers_shallow_and_deep():
    config, pixels = tables.ARCHITECTURES["llava-1.5-7b"]
    args, step = tables.settings(True), tables.step(True)
    deep = predict(meta_model(config(), args), step, 1, pixels, drop_gradients=True)
    assert step_work(config(), args, step, (1, pixels)) == deep


def test_architectures_have_their_published_numbers_of_parameters():
    published = {"llava-1.5-7b": 7.06e9, "llava-1.5-13b": 13.35e9, "qwen2.5-vl-72b": 73.4e9}
    for name, number in published.items():
        model = meta_model(tables.ARCHITECTURES[name][0](), tables.settings(False))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(number, rel=0.002)


# ---- time and cost ----


def test_times_by_hand(folder):
    """A GPU of round figures at full efficiency."""
    gpu = dataclasses.replace(GPUS["h100"], tflops=1.0, hbm=1.0, nvlink=1.0, network=8.0)
    full = {"compute_efficiency": 1.0, "network_efficiency": 1.0, "memory_efficiency": 1.0}
    cluster = Cluster(gpu, 4, 2, cores_per_gpu=2, **full)
    args = AspoConfig(output_dir="x", use_cpu=True, use_lora=False, save_steps=10)
    plan = make_plan(AutoConfig.from_pretrained(folder), args, Step(3, 20, 10), cluster, "ddp", 1000, images=(1, 30))
    seconds = plan.seconds()
    assert seconds["compute"] == pytest.approx(plan.memory.flops.total / 1e12)
    across = 2 * plan.size.numbers * 4 / (2 * 2) + plan.size.buffers / (2 * 2) + 2 * 64 / (2 * 2)  # 2 nodes of 2
    assert seconds["network across nodes"] == pytest.approx(across / 1e9)
    assert seconds["batches on the CPU"] == pytest.approx(3 * units.MEASURED["pair_seconds"] / 2)
    assert plan.batch == 12 and plan.steps == 84
    around = (2 * plan.parameters + 8 * plan.saved) / 2e9 / 3600
    fast, slow = plan.step_seconds()
    assert fast == max(seconds.values()) <= slow
    assert plan.hours == pytest.approx((84 * fast / 3600 + around, 84 * slow / 3600 + around))
    assert plan.in_the_way[0][0] == max(seconds, key=seconds.get)
    assert dict(plan.in_the_way)["loading, saving"] == pytest.approx(around * 3600 / 84)
    assert "--save_steps" in lift(plan, "loading, saving")
    assert "--save_steps" not in lift(dataclasses.replace(plan, pairs=36), "loading, saving")  # nothing is saved


def test_bad_figures_are_refused():
    with pytest.raises(ValueError, match="choose one of a100, h100"):
        named_gpu("h1000")
    with pytest.raises(ValueError, match="gpu_tflops is -1"):
        named_gpu("h100", tflops=-1)
    assert named_gpu("h100", memory=96, hbm=None).memory == 96
    with pytest.raises(ValueError, match="12 GPUs do not fill nodes of 8"):
        Cluster(GPUS["h100"], 12)
    with pytest.raises(ValueError, match=r"compute_efficiency is 1\.5"):
        Cluster(GPUS["h100"], 8, compute_efficiency=1.5)


def test_the_command(folder, capsys):
    command = ["plan", "--model", str(folder), "--response-tokens", "40", "--gpus", "16", "--bf16"]
    job = [*command, "--pairs", "1000000", "--strategy", "fsdp2", "--no_use_lora", "--price", "2"]
    assert cli.main(job) == 0
    out = capsys.readouterr().out
    assert "16 GPUs (2 nodes of 8), fsdp2" in out and "1/16 of it" in out and "whole in each" in out
    assert "weights, reference" in out and "aspo reference (if cached)" in out and ", costs " in out
    assert "in the way: " in out and "what would lift it: " in out
    assert cli.main([*job, "--precompute_ref_log_probs"]) == 0
    assert "weights, reference" not in capsys.readouterr().out
    assert cli.main([*job, "--gpu_memory", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "in the way: memory" in out and "--activation_checkpointing" in out
    assert cli.main([*command, "--pairs", "1000"]) == 0
    out = capsys.readouterr().out
    assert "0 checkpoints of" in out and "hours" not in out.partition("1,000 pairs, 1 epoch(s): ")[2]
    assert out.count("minutes") == 9
    for wrong, message in (
        (command, "not --pairs"),
        ([*job, "--memory", "80"], "--gpu_memory"),
        ([*job, "--strategy", "fsdp"], "choose one of ddp"),
        ([*job, "--num_train_epochs", "0"], "--num_train_epochs is 0"),
        ([x for x in job if x != "--bf16"], "plan with --bf16"),
    ):
        assert cli.main(wrong) == 2 and message in capsys.readouterr().err


# ---- the page ----


def test_measured_units_are_those_of_the_results():
    """Rounded up to two digits."""
    measured = {row["unit"]: float(row["value"]) for row in results.read(RESULTS)[1]}
    assert set(measured) == set(units.MEASURED)
    for name, value in measured.items():
        digit = 10 ** (len(f"{value:.0f}") - 2) if value >= 10 else 10.0 ** (int(f"{value:e}".split("e")[1]) - 1)
        assert value <= units.MEASURED[name] * 1.0001 <= (value + digit) * 1.001, name


def test_the_page_is_the_commands_in_part():
    """The rows of one model."""
    row = next(
        r for r in tables.markdown(small_time_table()).splitlines() if r.startswith("| llava-1.5-7b | LoRA | 64 ")
    )
    assert row in tables.PAGE.read_text()


def small_time_table() -> tables.Table:
    wanted = [("llava-1.5-7b", True, 64, tables.best("llava-1.5-7b", True, 64))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "cases", lambda: wanted)
        return tables.time_table()


STEPS_OF_MODELS = [pytest.param(name, marks=pytest.mark.slow) for name in tables.SECTIONS if name != "hardware"]


@pytest.mark.parametrize("section", ["hardware", *STEPS_OF_MODELS])  # what one has worked out, the next ones read
def test_the_page_is_the_commands(section, monkeypatch):
    page = tables.PAGE.read_text()
    monkeypatch.setattr(tables, "SECTIONS", {section: tables.SECTIONS[section]})
    assert tables.filled(page) == page


def test_a_missing_marker_is_said():
    with pytest.raises(ValueError, match="hardware: begin"):
        tables.filled("nothing here")
