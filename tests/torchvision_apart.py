"""torchvision from a separate folder, made importable beside a CPU build of torch.

PyPI's torchvision lacks operators beside such a build. The tests do not need them, but without them all of transformers
fails to import. This module imports neither library before `usable_torchvision` is called.
"""

import os
import sys
from importlib.util import find_spec
from typing import Any

_DEFINED: Any = None


def usable_torchvision() -> bool:
    """Make torchvision importable, from `$EXPERTOKEN_TORCHVISION` if that is set. Return whether it is found."""
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
