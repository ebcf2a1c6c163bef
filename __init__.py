"""expertoken makes many LLMs answer as one: one trained vocabulary token per expert, learnt from benchmark results.

The names below are loaded at their first use, so that `import expertoken` stays light (no torch).
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# This must be set before any entry point loads torch. By default libgomp spins a hundred times longer, which makes
# torch 20 times slower if its threads share a core (a busy machine, a container's limit). If they do not share one,
# this value costs no speed (docs/results.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOMES = {
    "BenchmarkResults": ".data_prep.results",
    "CompositeModel": ".inference.composite_model",
    "ConfigError": ".modeling.errors",
    "Dispatch": ".modeling.dispatch",
    "Expert": ".modeling.experts",
    "ExpertFailedError": ".modeling.errors",
    "ExpertPool": ".modeling.pool",
    "ExpertokenError": ".modeling.errors",
    "GatewayModel": ".inference.gateway",
    "Generation": ".modeling.backend",
    "Labelling": ".data_prep.labels",
    "LeakError": ".modeling.errors",
    "NoAnswerError": ".modeling.errors",
    "OutOfMemoryError": ".modeling.errors",
    "Policy": ".modeling.policy",
    "PoolError": ".modeling.errors",
    "Reply": ".inference.reply",
    "Report": ".evaluation.report",
    "RequestRefusedError": ".modeling.errors",
    "ResultsError": ".modeling.errors",
    "Supervision": ".data_prep.supervision",
    "add_expert": ".train.plugin",
    "build_supervision": ".data_prep.supervision",
    "evaluate": ".evaluation.evaluate",
    "export_checkpoint": ".modeling.export",
    "label": ".data_prep.labels",
    "read_results": ".data_prep.reading",
    "remove_expert": ".train.plugin",
    "train_composite": ".train.run",
}

__all__ = [
    "BenchmarkResults",
    "CompositeModel",
    "ConfigError",
    "Dispatch",
    "Expert",
    "ExpertFailedError",
    "ExpertPool",
    "ExpertokenError",
    "GatewayModel",
    "Generation",
    "Labelling",
    "LeakError",
    "NoAnswerError",
    "OutOfMemoryError",
    "Policy",
    "PoolError",
    "Reply",
    "Report",
    "RequestRefusedError",
    "ResultsError",
    "Supervision",
    "add_expert",
    "build_supervision",
    "evaluate",
    "export_checkpoint",
    "label",
    "read_results",
    "remove_expert",
    "train_composite",
]

if TYPE_CHECKING:
    from .data_prep.labels import Labelling, label
    from .data_prep.reading import read_results
    from .data_prep.results import BenchmarkResults
    from .data_prep.supervision import Supervision, build_supervision
    from .evaluation.evaluate import evaluate
    from .evaluation.report import Report
    from .inference.composite_model import CompositeModel
    from .inference.gateway import GatewayModel
    from .inference.reply import Reply
    from .modeling.backend import Generation
    from .modeling.dispatch import Dispatch
    from .modeling.errors import (
        ConfigError,
        ExpertFailedError,
        ExpertokenError,
        LeakError,
        NoAnswerError,
        OutOfMemoryError,
        PoolError,
        RequestRefusedError,
        ResultsError,
    )
    from .modeling.experts import Expert
    from .modeling.export import export_checkpoint
    from .modeling.policy import Policy
    from .modeling.pool import ExpertPool
    from .train.plugin import add_expert, remove_expert
    from .train.run import train_composite


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("expertoken")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
