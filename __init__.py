"""expertoken makes many LLMs answer as one: one trained vocabulary token per expert, learned from benchmark results.

The names below are loaded when first used, so that `import expertoken` stays light (no torch).
"""

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "BenchmarkResults": ".data_prep.results",
    "CompositeModel": ".inference.composite",
    "Dispatch": ".modeling.dispatch",
    "Expert": ".modeling.experts",
    "ExpertPool": ".modeling.experts",
    "Policy": ".inference.policy",
    "build_supervision": ".data_prep.supervision",
    "evaluate": ".evaluation.evaluate",
    "label": ".data_prep.labels",
}

__all__ = [
    "BenchmarkResults",
    "CompositeModel",
    "Dispatch",
    "Expert",
    "ExpertPool",
    "Policy",
    "build_supervision",
    "evaluate",
    "label",
]

if TYPE_CHECKING:
    from .data_prep.labels import label
    from .data_prep.results import BenchmarkResults
    from .data_prep.supervision import build_supervision
    from .evaluation.evaluate import evaluate
    from .inference.composite import CompositeModel
    from .inference.policy import Policy
    from .modeling.dispatch import Dispatch
    from .modeling.experts import Expert, ExpertPool


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("expertoken")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
