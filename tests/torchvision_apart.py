"""torchvision where it lies apart: beside a torch for CPUs alone the one of PyPI can't be imported as it is.

It lacks operators there that nothing here needs, and without them all of transformers would fail to import. Imports
neither of them before it is asked to.
"""

import os
import sys
from importlib.util import find_spec
from typing import Any

_DEFINED: Any = None


def usable_torchvision() -> bool:
    """Make torchvision usable, of `$EXPERTOKEN_TORCHVISION` where that is set, and return whether it is."""
    global _DEFINED
    apart = os.environ.get("EXPERTOKEN_TORCHVISION")
    if apart and apart not in sys.path:
        sys.path.insert(0, apart)
    if find_spec("torchvision") is None:
        return False
    if apart and "torchvision" not in sys.modules:
        import torch

        _DEFINED = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _DEFINED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True
