"""States from several machines: each worker of a Ray cluster holds the meta LLM (extra `ray`)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from .batching import MAX_TOKENS, run_batches, token_batches
from .chat import Query
from .cluster import Cluster, Workers
from .errors import ExpertokenError
from .meta import MetaLLM
from .source import Source
from .state import StateSpec

Found = tuple[torch.Tensor, torch.Tensor] | dict[int, torch.Tensor]
"""Result of `MetaLLM.states`, or of `MetaLLM.states_behind`."""


def state_batches(
    meta: MetaLLM, queries: Sequence[Query], layers: Sequence[int], *, max_tokens: int | None, label: str
) -> Iterator[tuple[list[int], Found]]:
    """Yield batches of queries, by their indices, with their states. Arguments and errors as in `StateWorkers.states`.

    Args:
        meta: Meta LLM of this process, at whose state the queries are read.
        queries: N queries.
        layers: Layers whose states are computed in one pass instead.
        max_tokens: Limit on the padded tokens of one batch.
        label: Name of the work in errors.
    """

    def run(batch: list[int]) -> Found:
        asked = [queries[index] for index in batch]
        return meta.states_behind(asked, layers) if layers else meta.states(asked)

    return run_batches(
        list(map(len, queries)),
        run,
        label=label,
        max_tokens=max_tokens,
        kept="States computed so far are kept",
    )


class StateWorkers:
    """Workers on a Ray cluster that compute states in place of a meta LLM of this process.

    Args:
        meta: Meta LLM. Every machine of the cluster needs its files under the same name.
        count: Number of workers.
        cluster: Cluster to run on, with the resources of each worker.
        attention: Implementation of attention. Defaults to the one that transformers chooses.
    """

    def __init__(self, meta: MetaLLM, count: int, cluster: Cluster, attention: str | None = None) -> None:
        self._meta = meta
        options = {"dtype": meta.plain.dtype, "quantization": meta.quantization, "attention": attention}
        self._workers = Workers(
            cluster, count, _Worker, meta.source.resolved(), options, meta.base_fingerprint, cluster.gpus == 0
        )

    def __enter__(self) -> "StateWorkers":
        self._workers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._workers.__exit__(*error)

    def states(
        self, queries: Sequence[Query], *, layers: Sequence[int] = (), max_tokens: int | None, label: str
    ) -> Iterator[tuple[list[int], Found]]:
        """Yield batches of queries, by their indices, with their states at the meta LLM's state.

        Args:
            queries: N queries.
            layers: Layers whose states are computed in one pass instead, as by `MetaLLM.states_behind`.
            max_tokens: Limit on the padded tokens of one batch. See `batching.run_batches`.
            label: Name of the work in errors.

        Raises:
            ExpertokenError: A worker can't load the meta LLM, has another one under its name, ran out of memory, or was
                lost too often.
        """
        if self._meta.adapted:
            raise ExpertokenError(f"{label}: workers have no adapter. Compute these states without a cluster")
        batches = token_batches([len(query) for query in queries], max_tokens or MAX_TOKENS)
        how = (self._meta.state, tuple(layers), max_tokens, label)
        parts = ((batch, [_portable(queries[index]) for index in batch], *how) for batch in batches)
        for (batch, *_), found in self._workers.each("states", parts):
            yield batch, found


class _Worker:
    """A worker that holds the meta LLM."""

    def __init__(self, source: Source, options: dict[str, Any], fingerprint: str, on_cpu: bool) -> None:
        self._source, self._options, self._fingerprint = source, options, fingerprint
        self._device = "cpu" if on_cpu else None
        self._meta: MetaLLM | None = None

    def meta(self, state: StateSpec) -> MetaLLM:
        """Return the meta LLM at a state. It is loaded on the first call, since a constructor can't report errors."""
        if self._meta is None:
            meta = MetaLLM.from_pretrained(self._source, 1, device=self._device, state=state, **self._options)
            if meta.base_fingerprint != self._fingerprint:
                raise ExpertokenError(
                    f"{self._source.model}: a machine of the cluster has other weights under this name. Copy the same "
                    "files there"
                )
            self._meta = meta
        if self._meta.state != state:
            self._meta.read_at(state, 1)
        return self._meta

    def states(
        self,
        indices: Sequence[int],
        queries: Sequence[Query],
        state: StateSpec,
        layers: Sequence[int],
        max_tokens: int | None,
        label: str,
    ) -> Found:
        # The part is one batch, longest first. An exhausted memory becomes advice, as in one process.
        [(_, found)] = state_batches(self.meta(state), queries, layers, max_tokens=max_tokens, label=label)
        return found


def _portable(query: Query) -> Query:
    """Return a query whose pictures are bytes, since another machine lacks their files."""
    if not query.media:
        return query
    return replace(query, media=tuple(replace(one, source=one.data) for one in query.media))
