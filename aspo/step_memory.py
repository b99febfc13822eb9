"""The peak memory of a training step and what it is made of, before any weight is loaded.

The step is run on tensors without memory (torch's FakeTensorMode): the real model class, adapters, attention routes
and autograd, so that what is kept for the backward is known and not guessed. Every storage that an operator makes is
counted until it is freed, and the operations of its matrix products and convolutions. What is not run is the optimiser
(AdamW: two numbers a trained parameter, and one more while it steps) and the head's kernels (their one row a token and
their tiles; 2 N H V operations a pass, docs/performance.md).
Axes: B pairs, R rows, T columns of the grid, N counted tokens, H hidden size.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from aspo.config import AspoConfig
from aspo.model import auto_class, base_model, model_config, output_head, parse_dtype
from aspo.policy import add_lora, disable_dropout, vision_tower
from aspo.shared_prefix.attention import routes_to_try, tree_attention_inputs, with_route
from aspo.shared_prefix.tree import TokenTree
from aspo_kernels.tiles import tile_size


@dataclasses.dataclass(frozen=True)
class Step:
    """What is planned. Lengths in tokens; `prompt` with its image tokens."""

    pairs: int
    prompt: int
    response: int
    shared: bool = True
    cached_reference: bool = False
    autocast: torch.dtype | None = None
    checkpointing: bool = False

    def tree(self) -> TokenTree:
        """The batch's tree: an item for each pair, or for each response."""
        if self.shared:
            return TokenTree.place([(self.prompt, (self.response,) * 2)] * self.pairs, packed=False)
        return TokenTree.place([(self.prompt, (self.response,))] * 2 * self.pairs, packed=False)


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of a step: two for each multiplication and addition of a matrix product.

    Attention counts every query against every key of its call, seen or not. What is not a product (norms, activation
    functions, the optimiser), the projector and the embeddings are left out.
    """

    vision: int = 0  # the tower's forward, once an image
    reference: int = 0  # of the language model
    forward: int = 0
    backward: int = 0  # with what checkpointing runs again
    head: int = 0  # policy and reference

    @property
    def total(self) -> int:
        """Of the step."""
        return self.vision + self.reference + self.forward + self.backward + self.head


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes. `peak` is the step's; the others are what is alive there, or could be (`backward`: the rest)."""

    weights: int
    optimiser: int  # its state
    vision: int  # features that live as long as the step
    activations: int  # kept for the backward
    head: int  # kept for the backward by the head
    peak: int
    workspace: int = 0  # of the head's kernels while they run; in `peak` where that is the moment
    running: int = 0  # the most that forward and backward hold beside weights and optimiser state
    flops: Flops = Flops()

    @property
    def backward(self) -> int:
        """What the backward, or whichever moment takes most, needs beyond the parts: gradients too, as far as they are
        made by then."""
        return self.peak - self.weights - self.optimiser - self.vision - self.activations - self.head


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operators make inside, while they live: `live` now, `peak` at most; `flops` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet in ATTENTION_PRODUCTS:
            self.flops += _attention_flops(packet, *args)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def ignore(self, *tensors: Tensor) -> None:
        """Tensors that were there before are not counted, nor are views of them."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


# Attention of a CPU, which torch's registry of operations does not know, and its matrix products.
ATTENTION_PRODUCTS: dict[Any, int] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 2,  # q k, p v
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,  # q k again, and a gradient of each operand
}


def _attention_flops(packet: Any, *args: Any) -> int:
    """(..., H, S_q, D) queries and (..., H, S_k, D) keys, after the gradient in a backward."""
    products = ATTENTION_PRODUCTS[packet]
    query, key = args[0:2] if products == 2 else args[1:3]
    return products * 2 * query.numel() * key.shape[-2]


# ---- the model without memory ----


def meta_model(model: str | Any, args: AspoConfig) -> Any:
    """The policy that `args` make of a model, its configuration alone read: parameters on the meta device.

    model: as in `load_model`, or a transformers configuration.
    """
    config = model_config(model) if isinstance(model, str) else model
    with torch.device("meta"):
        model = auto_class(config).from_config(
            config, dtype=parse_dtype(args.weights_dtype()), attn_implementation=args.attn_implementation
        )
        if args.use_lora:
            model = add_lora(model, args)
        elif args.freeze_vision and (tower := vision_tower(model)) is not None:
            tower.requires_grad_(False)
    disable_dropout(model)
    return model.train()


@contextmanager
def faked(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Inside, a meta model's tensors are fake ones on the CPU, and so is everything that operators make."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}
    places: list[tuple[Any, str, Tensor]] = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    try:
        for tensors, name, tensor in places:
            if id(tensor) not in made:
                fake = FakeTensor(mode, torch.empty_like(tensor, device="meta"), torch.device("cpu"))
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
            tensors[name] = made[id(tensor)]
        with mode:
            yield mode
    finally:
        for tensors, name, tensor in places:
            tensors[name] = tensor


# ---- the step ----


def predict(model: Any, step: Step, images: int = 0, image_size: int = 0, drop_gradients: bool = False) -> Memory:
    """Run a step on a meta model (`meta_model`) without memory.

    images: of each pair, square ones of `image_size` pixels a side as the frozen tower reads them, for its features
        (0: left out).
    drop_gradients: each gradient is freed where it is made, as it is where gradients are kept in shards; `peak` and
    `trained` are then those of one process no more.
    """
    outer, tree = base_model(model), step.tree()
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    weights = sum(map(_bytes, tensors))
    trained = sum(_bytes(t) for t in tensors if t.requires_grad)
    route = routes_to_try(model, dtype=step.autocast, longest=tree.longest_sequence)[0]
    with_route(model, route)
    attention = {} if tree.is_plain else tree_attention_inputs(model, tree, "cpu", route)
    if step.checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        outer.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    with faked(model), Allocations() as counter:
        counter.ignore(*model.parameters(), *model.buffers())
        if drop_gradients:
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.register_post_accumulate_grad_hook(_drop)
        with torch.autocast("cpu", step.autocast, enabled=step.autocast is not None):
            features = _features(outer, step.pairs * images, image_size)
            vision, vision_flops = counter.live, counter.flops
            if not step.cached_reference:
                adapter_off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
                with torch.no_grad(), adapter_off:
                    _hidden(outer, tree, attention)
            before, reference_flops = counter.live, counter.flops - vision_flops
            hidden = _hidden(outer, tree, attention, wants_grad=step.checkpointing)
            activations, forward_flops = counter.live - before, counter.flops - vision_flops - reference_flops
            rows = hidden.flatten(0, 1)[torch.zeros(2 * step.pairs * step.response, dtype=torch.long)]
            kept = torch.empty_like(rows)  # what the head keeps to the backward
            loss = (rows * kept).sum()
            at_head, before_backward = counter.live, counter.flops
            del hidden
        loss.backward()
        del features
    head, workspace = _head_memory(outer, rows)
    running = max(counter.peak, at_head + workspace) - _bytes(kept) + head
    stepping = 4 * trained  # AdamW: gradient, two moments, and a temporary while it steps
    peak = weights + max(running + 2 * trained, stepping)
    head_flops = _head_flops(outer, rows, head, not step.cached_reference)
    flops = Flops(vision_flops, reference_flops, forward_flops, counter.flops - before_backward, head_flops)
    return Memory(weights, 2 * trained, vision, activations, head, peak, workspace, running, flops)


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _hidden(outer: Any, tree: TokenTree, attention: dict[str, Any], wants_grad: bool = False) -> Tensor:
    """The language model's last hidden states (R, T, H) for embeddings of nothing."""
    weight = outer.get_input_embeddings().weight
    embeddings = torch.empty(*tree.shape, weight.shape[1], dtype=weight.dtype)
    embeddings.requires_grad_(wants_grad or weight.requires_grad)
    decoder = outer.get_decoder()
    positions = tree.positions
    if hasattr(outer.base_model, "get_rope_index"):
        positions = positions.expand(3, -1, -1)
    inputs = attention or {"attention_mask": torch.ones(tree.shape, dtype=torch.long)}
    return decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False, **inputs).last_hidden_state


def _features(outer: Any, images: int, size: int) -> Any:
    """The frozen vision tower's output for square images; None where there are none, or it wants more than pixels."""
    tower = vision_tower(outer) if images else None
    if tower is None or any(p.requires_grad for p in tower.parameters()):
        return None
    weight = next(tower.parameters())
    with torch.no_grad():
        try:
            return tower(torch.empty(images, 3, size, size, dtype=weight.dtype))
        except (TypeError, ValueError, RuntimeError, IndexError):  # packed patches, tiles, masks of their own
            return None


def _head_memory(outer: Any, rows: Tensor) -> tuple[int, int]:
    """(kept to the backward, workspace) of the head's kernels for (N, H) rows: see `aspo_kernels.tiles`."""
    head = output_head(outer).weight
    size = tile_size(rows)
    chunk = min(size.tokens, rows.shape[0])
    workspace = 2 * min(size.bytes, 4 * chunk * head.shape[0]) + 4 * chunk * rows.shape[1]
    if not head.requires_grad:
        return _bytes(rows), workspace
    stored, budget = 2 * rows.shape[0] * head.shape[0], 4 * head.numel()
    return _bytes(rows) + (stored if stored <= budget else 0) + _bytes(head), workspace


def _head_flops(outer: Any, rows: Tensor, kept: int, with_reference: bool) -> int:
    """Passes of 2 N H V: two for a frozen head, three for a trainable one (four where it is run again), the
    reference's one."""
    head = output_head(outer).weight
    stored = kept > _bytes(rows) + _bytes(head)
    passes = 2 if not head.requires_grad else 3 if stored else 4
    return (passes + with_reference) * 2 * rows.shape[0] * head.numel()
