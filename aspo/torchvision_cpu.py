"""Make `import torchvision` work where torch is a CPU build and torchvision has no matching compiled part.

torchvision registers shape functions for `torchvision::nms` and friends when it is imported; its compiled library
declares those operators. Package indexes carry torchvision's CUDA build only, and on a CPU torch its library does not
load, so the import dies with "operator torchvision::nms does not exist", and takes open_clip and transformers' LLaVA
with it. Declaring the operators first is enough: nothing here calls them.
"""

import importlib
import importlib.util
import sys

_declared = None  # a torch.library.Library lives as long as it is referenced


def import_torchvision() -> None:
    """Import torchvision if it is installed; declare its operators first where its compiled library is unusable."""
    global _declared
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    import torch

    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
