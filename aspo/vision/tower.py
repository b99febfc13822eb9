"""One look at each image: a vision tower's forward runs once for each distinct image of a step.

    vision = VisionFeatures([policy, ref_model], "step")
    with vision.step():                      # around the forwards of one batch
        ref_logps, logps = ..., ...          # policy, reference, both responses: the tower runs once an image

Only the tower's own forward is replaced, and only inside the context. Everything behind it (projector, Q-Former,
deepstack, M-RoPE, scatter) stays the model's own and keeps its gradients, whatever the model's class.

A tower's call is cut along dim 0 into entries that it treats alone: a picture, a tile (LLaVA-NeXT, Idefics3, ...), or
an image's packed patches where `grid_thw` says how many (Qwen-VL). An entry is known by a hash of its pixels, so that
neither an order nor a count of images has to be trusted: another image, size, padding or dtype is another entry. That a
tower can be cut so is seen at its first run, where one entry runs alone and beside another one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from aspo.model import base_model
from aspo.policy import vision_tower
from aspo.shared_prefix.segments import KEYWORD
from aspo.vision.call import TowerCall, content, hash_of
from aspo.vision.folder import Entry, FeatureFolder

MODES = ("none", "step", "disk")


class VisionFeatures:
    """The vision towers of `models`, which run once an image inside `step()`.

    Args:
        models: the policy and its reference if that is a model of its own; None and text-only models are skipped.
        mode: "none" = nothing is replaced; "step" = features live as long as the step; "disk" = those of a frozen
            tower are also kept in `folder` for later epochs and runs.
        folder: where "disk" keeps them, one folder inside for each tower (weights, configuration, transformers
            version). An image costs its outputs in the tower's dtype: last hidden state, pooled output, and of
            `hidden_states` the layers that the model reads. LLaVA-1.5 at 336 pixels in bfloat16: 2 x 1.2 MB; nothing
            is ever deleted.
        sharded: FSDP or ZeRO-3 has the weights in shards (within a forward they may look whole).

    A frozen tower runs without gradients; two frozen towers of equal weights share (compared by content). A tower that
    trains, or has adapter layers, is only spared the duplicates within each of its own calls, with gradients; nothing
    of it is kept. A tower in training mode with dropout is left alone. Where a call cannot be cut into entries, equal
    calls of a step still run once.

    A checkpoint around the whole model recomputes the tower's call in the backward. Outside the context that is the
    tower's own forward: right, but not spared; a trained tower with duplicate images has other shapes then, and torch
    raises. Let the context enclose the backward too in that case. Checkpoints inside the tower or the language
    model (what `gradient_checkpointing` does) never come back to the tower's call.

    `asked` and `computed` count entries since the start. Raises ValueError for an unknown mode, a folder without
    "disk" or the reverse, and "disk" for towers that all train or whose parameters are sharded.
    """

    def __init__(
        self,
        models: Sequence[nn.Module | None],
        mode: str = "step",
        folder: str | Path | None = None,
        sharded: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"vision_cache is {mode!r}; choose one of {', '.join(MODES)}")
        if (folder is None) == (mode == "disk"):
            raise ValueError(f"vision_cache is {mode!r} and folder {folder!r}: 'disk' needs a folder, others have none")
        self.folder = None if folder is None else Path(folder)
        self.sharded = sharded
        self.asked = self.computed = 0
        self._towers: dict[nn.Module, Any] = {}  # and the layers that the model around the tower reads
        for model in models if mode != "none" else ():
            if model is not None and (tower := vision_tower(model)) is not None:
                self._towers[tower] = getattr(base_model(model).config, "vision_feature_layer", None)
        if self.folder is not None and not any(is_frozen(tower) for tower in self._towers):
            has = "this one trains" if self._towers else "this model has none"
            raise ValueError(f"vision_cache='disk' is for a frozen vision tower, and {has}: choose 'step'")
        self._can_be_cut: dict[str, bool] = {}  # seen at a tower's first run
        self._names: dict[nn.Module, tuple[Any, str]] = {}
        self._folders: dict[str, FeatureFolder] = {}
        self._step: dict[str, Entry] = {}
        self._hashed: dict[Any, tuple[list[Tensor], list[str]]] = {}
        self._active = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Every tower runs once an image inside; its forward is put back afterwards, after an error too."""
        if self._active:
            raise RuntimeError("VisionFeatures.step() is active already: enter it once a step")
        self._active = True
        with ExitStack() as stack:
            stack.callback(self._end_step)
            for tower in self._towers:
                forward = functools.partial(self._forward, tower, tower.forward)
                stack.enter_context(_replaced_forward(tower, forward))
            yield

    def again(self) -> AbstractContextManager[None]:
        """For a part of a step that may be run a second time, in the backward: inside `step` nothing new, else one."""
        return nullcontext() if self._active else self.step()

    @property
    def trains(self) -> bool:
        """Whether a tower trains, so that its features hold a graph."""
        return not all(is_frozen(tower) for tower in self._towers)

    def flush(self) -> None:
        """Write what "disk" still holds in memory (less than a shard); at the end of a run."""
        for folder in self._folders.values():
            folder.flush()

    def _end_step(self) -> None:
        self._active = False
        self._step, self._hashed = {}, {}
        for folder in self._folders.values():
            folder.end_step()

    def _forward(self, tower: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(KEYWORD, None)  # the text's attention, which Qwen-VL hands down to a tower that does not read it
        call = TowerCall(tower, args, kwargs)
        if any(tensor.requires_grad for tensor in call.tensors) or _has_dropout(tower):
            return original(*args, **kwargs)
        if is_frozen(tower):
            with torch.no_grad():
                return self._frozen_forward(tower, original, call)
        entries = self._entries(f"trains-{id(tower)}", original, call, {}, None)
        return original(*args, **kwargs) if entries is None else _join(entries)

    def _frozen_forward(self, tower: nn.Module, original: Any, call: TowerCall) -> Any:
        name = self._name(tower)
        folder = self._folder(name)
        entries = self._entries(name, original, call, self._step, folder)
        if entries is not None:
            return _join(entries) if folder is None else folder.watch(_join(entries), call.signature)
        if folder is not None:
            folder.warn_not_kept()
        key = f"{name}-{call.whole_key()}"
        if key not in self._step:
            self._step[key] = pytree.tree_flatten(original(*call.args, **call.kwargs))
        return _join([self._step[key]])

    def _entries(
        self, name: str, original: Any, call: TowerCall, known: dict[str, Entry], folder: FeatureFolder | None
    ) -> list[Entry] | None:
        """The output of each entry of a call, run where it is not `known`, which it then is; None = cannot be cut."""
        if call.counts is None or self._can_be_cut.get(name) is False:
            return None
        keys = [f"{name}-{key}" for key in self._keys(call)]
        if folder is not None:
            kept = {key: folder.get(key, call.device) for key in dict.fromkeys(keys) if key not in known}
            found = {key: entry for key, entry in kept.items() if entry is not None}
            known.update(found)
            if found:
                self._can_be_cut[name] = True  # no others are kept
        missing = {key: keys.index(key) for key in dict.fromkeys(keys) if key not in known}
        if missing:
            if name not in self._can_be_cut:
                with torch.no_grad():
                    self._can_be_cut[name] = call.can_be_cut(original)
            entries = call.run(original, list(missing.values())) if self._can_be_cut[name] else None
            if entries is None:
                return None
            fresh = dict(zip(missing, entries, strict=True))
            known.update(fresh)
            if folder is not None:
                folder.add(fresh, call.signature)
        self.asked, self.computed = self.asked + len(keys), self.computed + len(missing)
        return [known[key] for key in keys]

    def _keys(self, call: TowerCall) -> list[str]:
        """The call's keys; hashed once where policy and reference are given the very same tensors."""
        if any(tensor.is_inference() for tensor in call.tensors):  # they do not count what is written to them
            return call.keys()
        same = call.signature, *((id(tensor), tensor._version) for tensor in call.tensors)
        if same not in self._hashed:
            self._hashed[same] = call.tensors, call.keys()  # the tensors too: an id is unique while they live
        return self._hashed[same][1]

    def _name(self, tower: nn.Module) -> str:
        """What tells a frozen tower from others: its content, looked at again when a parameter was written to."""
        sharded = self.sharded or any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in tower.parameters())
        if sharded and self.folder is not None:
            raise ValueError(
                "vision_cache='disk' is not supported where the vision tower's parameters are sharded (FSDP, ZeRO-3): "
                "a rank that finds its features would not take part in gathering them; choose 'step'"
            )
        if sharded or (len(self._towers) == 1 and self.folder is None):
            return str(id(tower))
        state = [(p.data_ptr(), p._version) for p in tower.parameters()]
        if self._names.get(tower, (None, ""))[0] != state:
            self._names[tower] = state, tower_fingerprint(tower, self._towers[tower])
        return self._names[tower][1]

    def _folder(self, name: str) -> FeatureFolder | None:
        if self.folder is not None and name not in self._folders:
            self._folders[name] = FeatureFolder(self.folder / name)
        return self._folders.get(name)


def is_frozen(tower: nn.Module) -> bool:
    """Whether the tower gives the same features to policy and reference: nothing in it trains, no adapter is on it."""
    adapters = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return not any(p.requires_grad for p in tower.parameters()) and not any(
        isinstance(module, adapters) for module in tower.modules()
    )


def tower_fingerprint(tower: Any, layers: Any = None) -> str:
    """A hash of all that decides a tower's outputs: class, configuration, attention, weights and their dtype.

    layers: the layers that the model around it reads.
    """
    config = getattr(tower, "config", None)
    options = {} if config is None else config.to_dict()
    told = {name: value for name, value in options.items() if name not in ("_name_or_path", "transformers_version")}
    attention = getattr(config, "_attn_implementation", None)
    weights = {name: value for name, value in tower.state_dict().items() if isinstance(value, Tensor)}
    described = [(name, value.dtype, tuple(value.shape)) for name, value in weights.items()]
    about = (type(tower).__name__, sorted(told.items()), attention, layers, described, transformers.__version__)
    return hash_of(repr(about), *map(content, weights.values()))


def _has_dropout(tower: nn.Module) -> bool:
    """Whether two runs of the tower differ: it is in training mode and drops something."""
    return tower.training and any(
        isinstance(value, float) and value > 0 and ("drop" in name or isinstance(module, nn.modules.dropout._DropoutNd))
        for module in tower.modules()
        for name, value in vars(module).items()
    )


def _join(entries: list[Entry]) -> Any:
    """A tower's output from the outputs of its entries.

    A new object, since models write into it, with new tensors: those of a call under inference_mode could not be saved
    for a projector's backward.
    """
    columns = zip(*(leaves for leaves, _ in entries), strict=True)
    leaves = [None if any(part is None for part in parts) else _joined(parts) for parts in columns]
    return pytree.tree_unflatten(leaves, entries[0][1])


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0].clone()


@contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    own = vars(module).get("forward")  # accelerate and others put one on the instance too
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]
