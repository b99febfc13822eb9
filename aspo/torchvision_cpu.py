"""Make `import torchvision` work where torch is a CPU build and torchvision has no matching compiled part.

torchvision registers shape functions for `torchvision::nms` and friends when it is imported; its compiled library
declares those operators. Package indexes carry torchvision's CUDA build only, and on a CPU torch its library does not
load, so the import dies with "operator torchvision::nms does not exist", and takes open_clip and transformers' LLaVA
with it. Declaring the operators first is enough: nothing here calls them.

An import hook rather than an import: what never needs torchvision (`aspo --help`) does not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_declared: list = []  # a torch.library.Library lives as long as it is referenced


class _DeclaringLoader(Loader):
    """torchvision's own loader, tried again with the operators declared where they are missing."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loader.exec_module(module)
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            for name in [m for m in sys.modules if m.startswith("torchvision.")]:
                del sys.modules[name]
            _declare_operators()
            self.loader.exec_module(module)


class _TorchvisionFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == "torchvision" else None
        if spec is not None and spec.loader is not None:
            spec.loader = _DeclaringLoader(spec.loader)
        return spec


def install() -> None:
    """From now on `import torchvision` declares its operators itself where its compiled library is unusable."""
    if not any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchvisionFinder())


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
