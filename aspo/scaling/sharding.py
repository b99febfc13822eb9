"""What each GPU holds of a model under DDP, FSDP2 and ZeRO, and what a step sends.

A step is one optimiser step of one batch a GPU (gradient accumulation off). Sizes come from the real model on the meta
device. Collectives are counted as rings, whose bytes are the least that any algorithm needs: of M bytes gathered or
reduced among n GPUs each sends M (n-1)/n, of M reduced to all twice that; and as NCCL does over nodes, with every
GPU's adapter at work, each sends M (k-1)/(k q) to other nodes, where the n are q in each of k nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from aspo.config import AspoConfig
from aspo.model import base_model, output_head
from aspo.policy import vision_tower
from aspo.scaling.hardware import Cluster
from aspo.step_memory import Memory, Step

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
FEW_NUMBERS = 64  # bytes: the pairs of the window, ACPO's mean over all ranks, the loss that is logged
# DeepSpeed's defaults, in numbers: gathered weights that may be alive, and the bucket in which gradients are reduced.
ZERO_LIVE, ZERO_BUCKET = 1_000_000_000, 500_000_000


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts as one process without sharding has them, and of a whole part when it is gathered."""

    weights: int  # parameters and buffers, as they are kept
    buffers: int
    frozen: int  # of them those that do not train
    numbers: int  # that train
    gradient: int  # bytes of one number of them in the optimiser's gradient
    decoder: int  # gathered: the language model's layers
    tower: int  # gathered: the vision tower
    embeddings: int  # gathered; 0 where they are the head
    head: int  # gathered
    rest: int  # gathered: projector, norms
    layer: int  # gathered: the largest layer
    layer_numbers: int  # that train in it

    @property
    def gathered(self) -> int:
        """Bytes of the whole model, gathered."""
        return self.decoder + self.tower + self.embeddings + self.head + self.rest


def sizes(model: Any, compute: torch.dtype | None) -> Sizes:
    """The sizes of a meta model (`aspo.step_memory.meta_model`).

    compute: what mixed precision computes in: FSDP2 and ZeRO gather weights in it, and keep what trains in fp32.
    """
    outer = base_model(model)
    decoder = outer.get_decoder()
    tower, head, embeddings = vision_tower(model), output_head(model).weight, outer.get_input_embeddings().weight

    def gathered(tensors: Any) -> int:
        return sum(p.numel() * (compute or p.dtype).itemsize for p in tensors)

    layers = [list(layer.parameters()) for layer in decoder.layers]
    largest = max(layers, key=gathered)
    in_layers = gathered(p for layer in layers for p in layer)
    in_tower = 0 if tower is None else gathered(tower.parameters())
    in_ends = gathered([head]), 0 if embeddings is head else gathered([embeddings])
    trained = [p for p in model.parameters() if p.requires_grad]
    everything = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    weights = sum(t.numel() * t.element_size() for t in everything)
    return Sizes(
        weights=weights,
        buffers=sum(t.numel() * t.element_size() for t in model.buffers()),
        frozen=weights - sum(p.numel() * p.element_size() for p in trained),
        numbers=sum(p.numel() for p in trained),
        gradient=4 if compute else max((p.element_size() for p in trained), default=4),
        decoder=in_layers,
        tower=in_tower,
        embeddings=in_ends[1],
        head=in_ends[0],
        rest=gathered(model.parameters()) - in_layers - in_tower - sum(in_ends),
        layer=gathered(largest),
        layer_numbers=sum(p.numel() for p in largest if p.requires_grad),
    )


# ---- what a GPU holds ----


@dataclass(frozen=True)
class Held:
    """Bytes of one GPU; over: among how many GPUs the part is divided, 1 = each has the whole of it (or its own)."""

    name: str
    bytes: float
    over: int = 1


def held(strategy: str, size: Sizes, memory: Memory, config: AspoConfig, step: Step, shards: int) -> list[Held]:
    """What a GPU holds at the most demanding moment of a step.

    memory: of the step with `drop_gradients` and the weights in the dtype that is computed in. shards: GPUs that divide
    a copy among them (all of them, or a node's: HSDP). Activations count as if whole while all gradients are there,
    which is up to one copy of the gradients too much in full fine-tuning.
    """
    mixed = step.autocast is not None
    sharded, of_weights, of_training = strategy != "ddp", 1, 1
    if sharded:
        of_training = shards
        of_weights = shards if strategy in ("fsdp2", "zero3") else 1
    zero = strategy.startswith("zero")
    number = 2 if zero and mixed else size.gradient  # ZeRO trains a model in bf16 beside fp32 copies
    weights = size.frozen + size.numbers * number
    frozen_copy = not config.use_lora and not step.cached_reference
    out = [Held("weights", weights / of_weights, of_weights)]
    if frozen_copy:
        copy = size.gathered if zero else size.weights
        out.append(Held("reference", copy / of_weights, of_weights))
    out.append(Held("gradients", size.numbers * number / of_training, of_training))
    state = 8 + 4 * zero if mixed or zero else 2 * size.gradient  # AdamW's two; ZeRO's fp32 copy of the weights
    out.append(Held("optimiser", size.numbers * state / of_training, of_training))
    if buffers := _buffers(strategy, size, number, shards, frozen_copy):
        out.append(Held("gathered and reduced", buffers))
    out.append(Held("image features", memory.vision))
    out.append(Held("activations", memory.activations))
    out.append(Held("head", memory.head + memory.workspace))
    known = memory.vision + memory.activations + memory.head + memory.workspace
    out.append(Held("backward and the rest", max(memory.running - known, 0)))
    return [part for part in out if part.bytes]


def _buffers(strategy: str, size: Sizes, number: int, shards: int, frozen_copy: bool) -> float:
    """Whole weights and gradients that are there for a while."""
    if shards == 1:
        return 0
    if strategy == "ddp":
        return size.numbers * number  # its buckets, beside the gradients
    if strategy == "zero2":
        return min(size.numbers, ZERO_BUCKET) * number
    # One layer at work and the next on its way, the head and the embeddings, a layer's gradients while they are
    # reduced. What no layer holds is whole from forward to backward under FSDP2, and in a copy from its first forward
    # on; ZeRO-3 is told to keep the tower whole.
    whole = size.tower + size.rest
    gathered = size.head + size.embeddings + 2 * size.layer
    if strategy == "zero3":
        gathered = max(gathered, min(size.gathered, 2 * ZERO_LIVE)) + min(size.numbers, ZERO_BUCKET) * number
    else:
        gathered += size.layer_numbers * number
    return gathered + whole * (1 + frozen_copy)


# ---- what a step sends ----


@dataclass(frozen=True)
class Transfer:
    """A collective over a group of GPUs. rounds: times that (n-1)/n of its bytes leave each GPU."""

    name: str
    bytes: float  # of the whole tensors that are gathered or reduced, by all its calls of a step
    rounds: int
    per_node: int  # GPUs of the group in each node
    nodes: int

    @property
    def sent(self) -> float:
        """Bytes that a GPU sends in a step, to its own node and to others."""
        ranks = self.per_node * self.nodes
        return self.rounds * self.bytes * (ranks - 1) / ranks

    @property
    def across(self) -> float:
        """Of them to other nodes."""
        return self.rounds * self.bytes * (self.nodes - 1) / (self.nodes * self.per_node)


def transfers(
    strategy: str, size: Sizes, config: AspoConfig, step: Step, cluster: Cluster, shards: int
) -> list[Transfer]:
    """The collectives of one step.

    FSDP2 and ZeRO-3 gather every layer for the policy's forward and again for its backward (frozen ones too: the
    gradient of what lies before them goes through their weights), and for the reference's forward once more, be it the
    same weights without their adapter or a copy of its own. The embeddings with them (FSDP2 prefetches them in the
    backward, where nothing reads them). The head, and what no layer of the language model holds, once a step; under
    ZeRO-3 the vision tower is whole everywhere (`aspo.sharded`).
    """
    inside = min(shards, cluster.per_node)
    group = inside, shards // inside
    everyone = cluster.per_node, cluster.nodes
    wire = 2 if step.autocast is not None else size.gradient
    live = 0 if step.cached_reference else 1
    own_copy = live if not config.use_lora else 0
    out = []
    if strategy in ("fsdp2", "zero3"):
        layers, tower = size.decoder + size.embeddings, size.tower if strategy == "fsdp2" else 0
        out += [
            Transfer("weights, forward", layers + size.rest + tower, 1, *group),
            Transfer("weights, backward", layers, 1, *group),
            Transfer("weights, reference", live * layers, 1, *group),
            Transfer("head", size.head * (1 + own_copy), 1, *group),
            Transfer("gradients to their shards", size.numbers * wire, 1, *group),
        ]
        if shards < cluster.gpus:  # HSDP: each shard is then summed over the copies
            copies = cluster.gpus // shards
            in_node = max(cluster.per_node // shards, 1)
            out.append(Transfer("shards over copies", size.numbers * wire / shards, 2, in_node, copies // in_node))
    elif strategy == "zero2":
        out.append(Transfer("gradients to their shards", size.numbers * wire, 1, *everyone))
        out.append(Transfer("weights after the step", size.numbers * wire, 1, *everyone))
    else:
        out.append(Transfer("gradients", size.numbers * size.gradient, 2, *everyone))
        out.append(Transfer("buffers", size.buffers, 1, *everyone))  # DDP's broadcast before each forward
    out.append(Transfer("a few numbers", FEW_NUMBERS, 2, *everyone))
    return [transfer for transfer in out if transfer.sent]


def check_shards(strategy: str, cluster: Cluster, shards: int | None) -> int:
    """GPUs that divide one copy of the model; raises ValueError for a number that the strategy cannot have."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if shards is None:
        return cluster.gpus
    if strategy != "fsdp2":
        raise ValueError(f"dp_shard_size is {shards}, but {strategy} has none: it is FSDP2's (HSDP); leave it out")
    fits = (
        shards > 0 and cluster.gpus % shards == 0 and (cluster.per_node % shards == 0 or shards % cluster.per_node == 0)
    )
    if not fits:
        raise ValueError(
            f"dp_shard_size is {shards}; it must divide the {cluster.gpus} GPUs, and a node's {cluster.per_node} or be "
            "a multiple of them"
        )
    return shards
