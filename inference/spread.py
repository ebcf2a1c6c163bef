"""Answers to a file of conversations from several machines: each worker of a Ray cluster holds the whole composite."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..modeling.backend import Generation
from ..modeling.cluster import Cluster, Workers
from ..modeling.policy import Policy
from .batch import Answer, Block, answers_of, settings_of
from .factory import open_model


class RayWorkers:
    """Workers on a Ray cluster, accepted by `generate_file` in place of a model.

    Args:
        path: Composite folder, or YAML file of a gateway. Every machine of the cluster needs it at this path.
        workers: Number of workers.
        cluster: Cluster to run on, with the resources of each worker.
        **options: Further arguments of `open_model`.
    """

    def __init__(self, path: Path | str, workers: int, cluster: Cluster | None = None, **options: Any) -> None:
        here = Path(path)
        path = str(here.absolute() if here.exists() else path)  # or `owner/name` on the hub
        self._workers = Workers(cluster or Cluster(), workers, _Worker, path, options)

    def __enter__(self) -> "RayWorkers":
        self._workers.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._workers.__exit__(*error)

    def settings(self, policy: Policy | None) -> list[Any]:
        """Return the settings that answers depend on, as in `batch.settings_of`.

        Raises:
            ExpertokenError: A worker can't open the composite.
        """
        return self._workers.one("settings", policy)

    def answers(
        self, blocks: Iterator[Block], generation: Generation, policy: Policy | None, concurrent: int
    ) -> Iterator[tuple[str, Answer]]:
        """Yield the answers of each block as soon as its worker is done, as in `batch.answers_of`.

        Raises:
            ExpertokenError: A worker can't open the composite, or was lost too often.
        """
        parts = ((block, generation, policy, concurrent) for block in blocks)
        for _, answered in self._workers.each("answers", parts):
            yield from answered


class _Worker:
    """A worker that holds the composite and answers blocks."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self._open = (path, options)
        self._model: Any = None

    @property
    def model(self) -> Any:
        """Composite, opened on the first call, because an actor's constructor can't report errors."""
        if self._model is None:
            path, options = self._open
            self._model = open_model(path, **options)
        return self._model

    def settings(self, policy: Policy | None) -> list[Any]:
        return settings_of(self.model, policy)

    def answers(
        self, block: Block, generation: Generation, policy: Policy | None, concurrent: int
    ) -> list[tuple[str, Answer]]:
        return list(answers_of(self.model, block, generation, policy, concurrent))
