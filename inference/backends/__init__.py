"""Ways to reach an expert: a local model, an adapter on a shared base, an OpenAI-compatible endpoint, the meta LLM."""

from ...modeling.experts import Expert
from ...modeling.meta import Source
from .base import Backend, Generation, Piece
from .endpoint import EndpointBackend, Timeouts
from .local import LOADERS, LocalBackend
from .models import LocalModels, same_model

__all__ = [
    "LOADERS",
    "Backend",
    "Generation",
    "LocalBackend",
    "LocalModels",
    "Piece",
    "Timeouts",
    "local_source",
    "open_backend",
]


def open_backend(expert: Expert, models: LocalModels, meta_base: Source, timeouts: Timeouts | None = None) -> Backend:
    """The backend of an expert (of self too: the meta LLM's plain base).

    Args:
        expert: of the pool.
        models: local models that are shared.
        meta_base: the meta LLM's base, which adapters without a `base` sit on.
        timeouts: of endpoints.

    Raises:
        ExpertFailedError: it can't be opened.
    """
    if expert.backend == "openai":
        return EndpointBackend(expert, timeouts)
    base = local_source(expert, meta_base)
    if expert.backend == "adapter":
        with models.lease(base) as resident:  # what does not fit is told now; models as they are load when they answer
            models.slot(resident, base, expert.model, expert.revision)
        return LocalBackend(models, base, (expert.model, expert.revision))
    return LocalBackend(models, base)


def local_source(expert: Expert, meta_base: Source) -> Source | None:
    """The model that has to be in memory for an expert to answer, or None for an endpoint."""
    if expert.backend == "openai":
        return None
    if expert.backend == "adapter":
        shared = not expert.base or same_model(expert.base, meta_base.model)
        return meta_base if shared else Source(expert.base)
    if expert.backend == "transformers":
        shared = not expert.revision and same_model(expert.model, meta_base.model)
        return meta_base if shared else Source(expert.model, expert.revision)
    return meta_base
