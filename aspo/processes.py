"""Training on several processes: our loss inside a wrapped model, and sums over all of them.

DDP, FSDP and DeepSpeed act when a module is *called*: they gather its weights before its forward, and prepare for its
backward after it. Our loss never calls the whole model (that would build logits), so it runs as the model's forward for
the time of one call: `inside`. The idea is Lightning's and TRL's (`_ForwardRedirection`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils import _pytree as pytree

T = TypeVar("T")
# gloo's words, in plain RuntimeErrors; NCCL has a class of its own.
LOST = re.compile(r"(Connection (closed|reset|refused)|Timed out waiting|Broken pipe|Connection timed out)[^[\n.,]*")


def inside(module: nn.Module, function: Callable[..., T], *args: Any, inner: nn.Module | None = None) -> T:
    """function(*args), run as the forward of a module that is called as any caller would call it.

    module: what is called, wrapped or not. inner: the module inside the wrapper whose forward is stood in for (None:
    `module` itself). Within `function` the module has its own forward again. What it returned comes back as it passed
    the module's hooks, but for its dtype: FSDP's mixed precision casts outputs, and log-probabilities in bfloat16 would
    be worth nothing. Then function's own tensors come back, on which FSDP's hooks sit.
    """
    inner = module if inner is None else inner
    own = vars(inner).get("forward")  # accelerate may have set one on the instance
    found: list[T] = []

    def give_back() -> None:
        if own is None:
            vars(inner).pop("forward", None)
        else:
            inner.forward = own

    def stand_in(*given: Any) -> T:
        give_back()
        found.append(function(*given))
        return found[0]

    inner.forward = stand_in  # type: ignore[assignment]
    try:
        hooked = module(*args)
    finally:
        give_back()
    dtypes = [[t.dtype for t in pytree.tree_leaves(value) if isinstance(t, Tensor)] for value in (hooked, found[0])]
    return hooked if dtypes[0] == dtypes[1] else found[0]


def of_all(function: Callable[[], T]) -> list[T]:
    """What each process's call of a function gives, by rank. A collective call.

    A ValueError of one process is raised in all of them.
    """
    if PartialState().num_processes == 1:
        return [function()]
    value, error = None, None
    try:
        value = function()
    except ValueError as caught:
        error = caught
    given = gather_object([(value, None if error is None else str(error))])
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(given):
        if message is not None:
            raise ValueError(f"process {rank}: {message}")
    return [value for value, _ in given]


def summed(values: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Tuples of numbers by name, added up over all processes, which may have different names. A collective call."""
    if PartialState().num_processes == 1:
        return {name: list(numbers) for name, numbers in values.items()}
    total: dict[str, list[float]] = {}
    for of_one in gather_object([{name: list(map(float, numbers)) for name, numbers in values.items()}]):
        for name, numbers in of_one.items():
            before = total.get(name, [0.0] * len(numbers))
            total[name] = [a + b for a, b in zip(before, numbers, strict=True)]
    return total


def summed_tensor(value: Tensor, accelerator: Accelerator) -> Tensor:
    """A tensor of one shape everywhere, added up over all processes. A collective call."""
    return accelerator.reduce(value.to(accelerator.device), "sum")


def lost_peer(error: BaseException) -> str | None:
    """One line, where an error says that another process has died or no longer answers; None for other errors."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error).strip()
    if "DataLoader worker" in text and ("killed" in text or "exited unexpectedly" in text):
        return (
            f"a process that loads data has died ({text.splitlines()[0]}): with too little memory for them, lower "
            "--dataloader_num_workers. What is done is kept: run the same command again"
        )
    found = LOST.search(text) if "gloo" in text else None
    if not (found or isinstance(error, dist.DistError)):
        return None
    why = found.group(0).strip() if found else text.partition("\n")[0]
    rank, size = (os.environ.get(name, "?") for name in ("RANK", "WORLD_SIZE"))
    return (
        f"process {rank} of {size} waited for the others, and one of them has died or hangs ({why}). What is done is "
        "kept: run the same command again"
    )
