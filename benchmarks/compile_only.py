"""Run code that launches Triton kernels, with each launch replaced by "compile for that GPU": nothing runs, no GPU.

What a kernel is compiled for (argument types and specialisations, constants, warps, stages) is what the real launch
would have asked for, because the real launcher asks. Not under the interpreter: there nothing compiles.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: its decorator reads it

import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what its matrix instructions are called in its machine code."""

    gpu: GPUTarget
    capability: tuple[int, int]
    shared_bytes: int  # the most that one block can have
    matrix: str  # pattern of the opcode
    processors: int  # of the usual product with this architecture: launchers may ask


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), (8, 0), 163 * KIB, "HMMA", 108),  # mma.sync
    "sm_90": Target(GPUTarget("cuda", 90, 32), (9, 0), 227 * KIB, "HGMMA", 132),  # wgmma
    "sm_100": Target(GPUTarget("cuda", 100, 32), (10, 0), 227 * KIB, r"UTC\w*MMA", 148),  # tcgen05.mma
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), (9, 4), 64 * KIB, "v_mfma", 304),
}


class GpuTensor(Tensor):
    """A tensor without data that says it is on "cuda". Below Python it is one of the CPU, which needs no driver."""

    meta: Tensor  # the same on the device "meta": what every operation is really done with
    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[GpuTensor], meta: Tensor) -> GpuTensor:
        sizes, strides, offset = meta.shape, meta.stride(), meta.storage_offset()
        cpu = torch.device("cpu")
        self = Tensor._make_wrapper_subclass(cls, sizes, strides, offset, dtype=meta.dtype, device=cpu)
        self.meta = meta
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        with _Gpu():
            return func(*args, **(kwargs or {}))

    def data_ptr(self) -> int:
        return (
            int(self.meta.storage_offset()) * self.element_size()
        )  # a storage starts at a multiple of 256 bytes or more

    def ptr_range(self) -> int:
        return self.meta.untyped_storage().nbytes()


class _Gpu(TorchDispatchMode):
    """Operations on GpuTensors, or with device="cuda", give GpuTensors; to ask one for its values is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = {id(t.meta): t for t in tree_leaves((args, kwargs)) if isinstance(t, GpuTensor)}
        if not tensors and (kwargs.get("device") or torch.device("cpu")).type != "cuda":
            return func(*args, **kwargs)
        custom = _maybe_get_opdef(func)
        if custom is not None:  # the body that a GPU would run
            with self:
                return custom._init_fn(*args, **kwargs)

        def to_meta(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.meta if isinstance(value, GpuTensor) else value.to("meta")
            return torch.device("meta") if isinstance(value, torch.device) else value

        def from_meta(value: Any) -> Any:  # an operation in place gives back what it was given
            if not isinstance(value, Tensor):
                return value
            return tensors[id(value)] if id(value) in tensors else GpuTensor(value)

        return tree_map(from_meta, func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs)))


@contextlib.contextmanager
def compile_only(name: str) -> Iterator[list[tuple[JITFunction, Any]]]:
    """Within it launches compile for TARGETS[name], and the device "cuda" is that GPU, of tensors without data.

    Gives the list of launched kernels, each with what it compiled to, or with the exception that stopped it.
    """
    target = TARGETS[name]
    launched: list[tuple[JITFunction, Any]] = []
    launch = JITFunction.run

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        try:
            compiled = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # whatever a compiler raises: the other kernels are still worth a look
            compiled = error
        launched.append((kernel, compiled))

    properties = SimpleNamespace(
        name=name,
        major=target.capability[0],
        minor=target.capability[1],
        multi_processor_count=target.processors,
        shared_memory_per_block_optin=target.shared_bytes,
        warp_size=target.gpu.warp_size,
        gcnArchName=name,
    )
    gpu = SimpleNamespace(
        get_current_target=lambda: target.gpu,
        get_current_device=lambda: name,  # Triton keeps what it compiled by device
        get_current_stream=lambda device: 0,
    )
    before = driver._active  # not `active`: without a GPU there is none, and asking raises
    driver.set_active(gpu)
    try:
        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(torch.version, "hip", "6.0" if target.gpu.backend == "hip" else None),
            mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
            mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: target.capability),
            mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
            mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
            mock.patch.object(torch.accelerator, "device_index", lambda index: contextlib.nullcontext()),
            _Gpu(),
        ):
            yield launched
    finally:
        driver._active = before
