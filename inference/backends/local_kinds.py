"""Kinds of experts that run in this process: a causal LM, a LoRA adapter on one, and the meta LLM itself.

This module is light, because every pool that is read imports it. The models behind the kinds are in `local.py` and
`models.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...modeling.errors import ExpertFailedError
from ...modeling.experts import ExpertKind, Weights
from ...modeling.source import Source, same_model

if TYPE_CHECKING:
    from ...modeling.backend import Backend, Opening
    from ...modeling.experts import Expert


def is_adapter(model: str) -> bool:
    """Return whether a local folder holds a LoRA adapter."""
    return (Path(model) / "adapter_config.json").exists()


def _model(expert: "Expert", base: Source | None) -> Weights:
    model = str(expert.model)
    if base is not None and not expert.revision and same_model(model, base.model):
        return Weights(base)
    return Weights(Source(model, expert.revision))


def _adapted(expert: "Expert", base: Source | None) -> Weights:
    own = base if expert.base is None else Source(expert.base)
    if base is not None and own is not None and same_model(own.model, base.model):
        own = base
    if own is None:
        raise ExpertFailedError(f"expert {expert.name!r} needs the meta LLM's base, and this process has none")
    return Weights(own, (str(expert.model), expert.revision))


def _meta(expert: "Expert", base: Source | None) -> Weights:
    if base is None:
        raise ExpertFailedError(f"expert {expert.name!r} is the meta LLM, and this process has none")
    return Weights(base)


def _open(expert: "Expert", opening: "Opening") -> "Backend":
    from .local import LocalBackend

    weights = expert.kind.weights(expert, opening.base)
    if weights is None or opening.models is None:
        raise ExpertFailedError(f"expert {expert.name!r} needs a model in this process, which holds none")
    if weights.adapter is not None:
        # An adapter that does not fit raises an error now. Whole models are loaded when they answer.
        with opening.models.lease(weights.source) as resident:
            opening.models.slot(resident, weights.source, *weights.adapter)
    models: Any = opening.models  # `LocalModels`, which this light module does not import
    return LocalBackend(models, weights.source, weights.adapter, calls="tools" in (expert.supports or ()))


def _no_adapter(entry: Mapping[str, Any], place: str) -> list[str]:
    model = entry.get("model") or ""
    return [f"{place}.backend: {model} is a LoRA adapter; expected `backend: adapter`"] if is_adapter(model) else []


def _no_whole_model(entry: Mapping[str, Any], place: str) -> list[str]:
    model = entry.get("model") or ""
    if (Path(model) / "config.json").exists() and not is_adapter(model):
        return [f"{place}.backend: {model} is a whole model, not an adapter; expected `backend: transformers`"]
    return []


def _no_model(entry: Mapping[str, Any], place: str) -> list[str]:
    if entry.get("model"):
        return [f"{place}.model: not for backend 'self', which is always the meta LLM (`results` names its scores)"]
    return []


KINDS = (
    ExpertKind(
        "transformers",
        _open,
        paths=("model",),
        weights=_model,
        batches=True,
        scores_texts=True,
        is_weights=True,
        check_files=_no_adapter,
    ),
    ExpertKind(
        "adapter",
        _open,
        fields=("model", "base"),
        paths=("model", "base"),
        weights=_adapted,
        needs_base=lambda expert: not expert.base,
        batches=True,
        scores_texts=True,
        is_weights=True,
        check_files=_no_whole_model,
        recognises=lambda entry: not entry.get("base_url") and is_adapter(entry.get("model") or ""),
    ),
    ExpertKind(
        "self",
        _open,
        required=(),
        weights=_meta,
        needs_base=lambda expert: True,
        batches=True,
        scores_texts=True,
        is_weights=True,
        check=_no_model,
    ),
)
