"""A job on a cluster: what a GPU holds, what a step sends, how long it takes, what is in the way."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from aspo.config import AspoConfig
from aspo.model import base_model
from aspo.policy import vision_tower
from aspo.scaling import units
from aspo.scaling.hardware import Cluster
from aspo.scaling.sharding import Held, Sizes, Transfer, check_shards, held, sizes, transfers
from aspo.step_memory import Flops, Memory, Step, meta_model, predict

SHALLOW = 2, 4  # layers that are run instead of all, where all are alike: memory and operations are linear in them
WAYS = ("compute", "memory bandwidth", "network in the node", "network across nodes", "batches on the CPU", "storage")


# ---- the step of one GPU ----


def step_work(config: Any, args: AspoConfig, step: Step, images: tuple[int, int]) -> Memory:
    """`predict` of a configuration's model with gradients dropped; of a deep one two shallow ones are run.

    images: of a pair, and their side in pixels.
    """
    depth = config.get_text_config().num_hidden_layers
    if depth <= max(SHALLOW) + 1 or not _layers_alike(config, args):
        return predict(meta_model(config, args), step, *images, drop_gradients=True)
    few, more = (
        predict(meta_model(_with_layers(config, n), args), step, *images, drop_gradients=True) for n in SHALLOW
    )
    return _further(few, more, (depth - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0]))


def _layers_alike(config: Any, args: AspoConfig) -> bool:
    kinds = getattr(config.get_text_config(), "layer_types", None)
    layers = base_model(meta_model(config, args)).get_decoder().layers
    numbers = {sum(p.numel() for p in layer.parameters()) for layer in layers}
    return len(set(kinds or ())) <= 1 and len(numbers) == 1


def _with_layers(config: Any, number: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = number
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:number]
    return config


def _further(few: Any, more: Any, factor: float) -> Any:
    """The line through two results at 0 and 1, at `factor`."""
    values = {}
    for field in dataclasses.fields(few):
        a, b = getattr(few, field.name), getattr(more, field.name)
        values[field.name] = _further(a, b, factor) if isinstance(a, Flops) else round(a + (b - a) * factor)
    return type(few)(**values)


# ---- the job ----


@dataclasses.dataclass(frozen=True)
class Offline:
    """A job before the training. hours: of GPUs, and of CPU cores; bytes: on the disk afterwards."""

    name: str
    gpu_hours: float
    core_hours: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """One job. Bytes, seconds and operations are of one GPU and one step, which is one batch of `step.pairs` a GPU."""

    args: AspoConfig
    step: Step
    cluster: Cluster
    strategy: str
    shards: int
    pairs: int  # of the job
    size: Sizes
    memory: Memory
    parts: Sequence[Held]
    sends: Sequence[Transfer]
    images: int
    parameters: int

    @property
    def held(self) -> float:
        """Bytes of a GPU."""
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether a GPU has room for that."""
        return self.held <= self.cluster.room

    @property
    def batch(self) -> int:
        """Pairs of a step, of all GPUs."""
        return self.step.pairs * self.cluster.gpus

    def seconds(self) -> dict[str, float]:
        """What each part of the machine needs for a step, were it alone: the entries of WAYS."""
        cluster, size = self.cluster, self.size
        passes = 2 + (not self.step.cached_reference) + self.step.checkpointing
        # Weights are read in each pass; AdamW reads weight, gradient and two moments and writes all but the gradient.
        update = 7 * 4 * size.numbers / (1 if self.strategy == "ddp" else self.shards)
        pictures = self.step.pairs * self.images * units.MEASURED["jpeg_bytes"]
        rows = pictures + self.step.pairs * units.MEASURED["row_bytes"]
        return {
            "compute": cluster.compute_seconds(self.memory.flops.total),
            "memory bandwidth": cluster.memory_seconds(passes * size.gathered + update),
            "network in the node": sum(cluster.inside_seconds(t.sent - t.across) for t in self.sends),
            "network across nodes": sum(cluster.across_seconds(t.across) for t in self.sends),
            "batches on the CPU": self.step.pairs * units.MEASURED["pair_seconds"] / cluster.cores_per_gpu,
            "storage": rows * cluster.per_node / (cluster.storage * 1e9),
        }

    def step_seconds(self) -> tuple[float, float]:
        """(everything at once, nothing of the network hidden behind the computing)."""
        seconds = self.seconds()
        at_work = max(seconds["compute"], seconds["memory bandwidth"])
        network = max(seconds["network in the node"], seconds["network across nodes"])
        beside = max(seconds["batches on the CPU"], seconds["storage"])  # workers make the next batches meanwhile
        return max(at_work, network, beside), max(at_work + network, beside)

    @property
    def steps(self) -> int:
        """Of the job; the last batch of an epoch counts as whole."""
        return math.ceil(-(-self.pairs // self.batch) * self.args.num_train_epochs)

    @property
    def saved(self) -> float:
        """Bytes of a checkpoint: what trains, and AdamW's state."""
        return self.size.numbers * units.MEASURED["saved_number_bytes"]

    @property
    def saves(self) -> int:
        """Checkpoints of the job."""
        return self.steps // max(int(self.args.save_steps), 1)

    @property
    def around_hours(self) -> float:
        """Beside the steps: every node reads the weights in bf16 once; a checkpoint every save_steps, which one process
        writes, whole (configs/accelerate/fsdp2.yaml asks for that); ZeRO's are written by all."""
        disk = self.cluster.storage * 1e9
        writers = self.cluster.nodes if self.strategy.startswith("zero") else 1
        return (2 * self.parameters / disk + self.saves * self.saved / (disk * writers)) / 3600

    @property
    def hours(self) -> tuple[float, float]:
        """Of the training, as `step_seconds`."""
        fast, slow = self.step_seconds()
        around = self.around_hours
        return self.steps * fast / 3600 + around, self.steps * slow / 3600 + around

    @property
    def in_the_way(self) -> list[tuple[str, float]]:
        """What takes time by the seconds of a step, longest first, loading weights and saving checkpoints among
        them; memory before all where it does not do."""
        seconds = self.seconds() | {"loading, saving": self.around_hours * 3600 / self.steps}
        ranked = sorted(seconds.items(), key=lambda item: -item[1])
        return ranked if self.fits else [("memory", float("inf")), *ranked]

    def offline(self) -> list[Offline]:
        """Jobs before the training, over all pairs, at the stated efficiencies and with any number of GPUs."""
        cluster, step, cost = self.cluster, self.step, units.MEASURED
        tree, forward = step.tree(), self.memory.flops
        whole = tree.num_unshared_tokens / tree.num_tokens  # the reference is cached with each answer's own prompt
        language = forward.reference or forward.forward  # LoRA's products, a hundredth, in the latter
        head = 2 * 2 * step.pairs * step.response * self.size.head / 2  # one pass, bf16
        a_pair = (language * whole + head + forward.vision) / step.pairs
        answers = 2 * self.pairs
        together = units.ANSWERS_AT_ONCE
        reading, multiplying = cluster.memory_seconds(2 * self.parameters), cluster.compute_seconds(2 * self.parameters)
        token = max(reading / together, multiplying)  # all answers' next tokens read the weights once
        scored = units.CLIP_IMAGE_FLOPS * self.images + units.CLIP_SENTENCE_FLOPS * units.SENTENCES
        gpu = {
            "aspo pairs": answers * (step.response * token + cluster.compute_seconds(a_pair / 2)),
            "aspo score": self.pairs * cluster.compute_seconds(scored),
            "aspo reference": self.pairs * cluster.compute_seconds(a_pair),
        }
        cached = cost["reference_row_bytes"] + 2 * step.response * cost["reference_token_bytes"]
        disk = {"aspo pairs": cost["row_bytes"], "aspo score": cost["row_bytes"], "aspo reference": cached}
        core = cost["pair_seconds"] * self.pairs / 3600  # each of them reads every picture once
        return [Offline(name, value / 3600, core, self.pairs * disk[name]) for name, value in gpu.items()]


def make_plan(
    config: Any,
    args: AspoConfig,
    step: Step,
    cluster: Cluster,
    strategy: str,
    pairs: int,
    *,
    shards: int | None = None,
    images: tuple[int, int] = (1, 336),
    image_tokens: int = 576,
    work: Memory | None = None,
    model: Any = None,
) -> Plan:
    """Plan a job.

    config: a transformers configuration. args.dtype: of the weights that are kept. step: of one GPU; its autocast is
    mixed precision. images: of a pair, and their side in pixels. work: `step_work` of the same step, and model:
    `meta_model(config, args)`, where they are known. Raises ValueError for what the strategy cannot do.
    """
    shards = check_shards(strategy, cluster, shards)
    if pairs < 1:
        raise ValueError(f"pairs is {pairs}; a job has at least 1")
    model = meta_model(config, args) if model is None else model
    size = sizes(model, step.autocast)
    work = work or step_work(config, computing(args, step, strategy), step, images)
    if images[0] and not work.flops.vision:  # a tower that takes more than pixels, and was not run
        work = dataclasses.replace(
            work, flops=dataclasses.replace(work.flops, vision=_tower_flops(model, step, image_tokens))
        )
    return Plan(
        args, step, cluster, strategy, shards, pairs, size, work,
        held(strategy, size, work, args, step, shards), transfers(strategy, size, args, step, cluster, shards),
        images[0], sum(p.numel() for p in base_model(model).parameters()),
    )  # fmt: skip


def computing(args: AspoConfig, step: Step, strategy: str) -> AspoConfig:
    """The settings whose weights have the dtype that the step's products read: sharded ones are gathered in it."""
    if step.autocast is None or (strategy == "ddp" and not args.use_lora):
        return args
    other = copy.copy(args)
    other.dtype = str(step.autocast).removeprefix("torch.")
    return other


def _tower_flops(model: Any, step: Step, image_tokens: int) -> int:
    """2 x parameters x patches, attention left out."""
    tower = vision_tower(model)
    if tower is None:
        return 0
    merged = getattr(getattr(base_model(model).config, "vision_config", None), "spatial_merge_size", 1) ** 2
    return 2 * sum(p.numel() for p in tower.parameters()) * step.pairs * image_tokens * merged
