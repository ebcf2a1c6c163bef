"""Ways to reach an expert: a local model, an adapter on a shared base, an OpenAI-compatible endpoint, the meta LLM."""

from ...modeling.experts import Expert
from ...modeling.meta import Source
from .base import Backend, Generation, Piece
from .endpoint import EndpointBackend, Timeouts
from .local import LocalModels, same_model

__all__ = ["Backend", "Generation", "LocalModels", "Piece", "Timeouts", "open_backend"]


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
    if expert.backend == "adapter":
        shared = not expert.base or same_model(expert.base, meta_base.model)
        return models.adapter(meta_base if shared else Source(expert.base), expert.model, expert.revision)
    if expert.backend == "transformers":
        shared = not expert.revision and same_model(expert.model, meta_base.model)
        return models.model(meta_base if shared else Source(expert.model, expert.revision))
    return models.model(meta_base)
