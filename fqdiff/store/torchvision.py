"""The only place that imports torchvision, and only when a data set must be downloaded."""

import sys
from types import ModuleType

import torch

_declared: list[object] = []  # operator libraries live as long as a reference to them


def import_torchvision() -> ModuleType:
    """torchvision, also beside a torch build that its compiled extension does not fit.

    torchvision's PyPI wheel links CUDA; beside a CPU-only torch it fails to load, and importing the package then stops at two
    operators that were never declared (pytorch/vision#8985). Declaring them is enough for data sets.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    import torchvision.datasets

    module: ModuleType = torchvision
    return module
