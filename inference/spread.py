"""Answers to a file of conversations from several machines: each worker of a Ray cluster holds the whole composite."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..modeling.backend import Generation
from ..modeling.cluster import Cluster
from ..modeling.errors import ExpertokenError, one_line
from ..modeling.policy import Policy
from .batch import Answer, Block, answers_of, settings_of
from .factory import open_model

_AHEAD = 2  # blocks queued at each worker
_AGAIN = 3  # retries of a block after its worker was lost


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
        self._path = str(here.absolute() if here.exists() else path)  # or `owner/name` on the hub
        self._workers, self._options = workers, options
        self._cluster = cluster or Cluster()
        self._actors: list[Any] = []

    def __enter__(self) -> "RayWorkers":
        self._connection = self._cluster.connected()
        self._ray = self._connection.__enter__()
        # A worker that is lost with its machine restarts on another one and repeats its block.
        given = {"num_cpus": self._cluster.cpus, "num_gpus": self._cluster.gpus, "max_restarts": -1,
                 "max_task_retries": _AGAIN}  # fmt: skip
        worker = self._ray.remote(**given)(_Worker)
        self._actors = [worker.remote(self._path, self._options) for _ in range(self._workers)]
        return self

    def __exit__(self, *error: Any) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._connection.__exit__(*error)

    def settings(self, policy: Policy | None) -> list[Any]:
        """Return the settings that answers depend on, as in `batch.settings_of`.

        Raises:
            ExpertokenError: A worker can't open the composite.
        """
        return self._result(self._actors[0].settings.remote(policy))

    def answers(
        self, blocks: Iterator[Block], generation: Generation, policy: Policy | None, concurrent: int
    ) -> Iterator[tuple[str, Answer]]:
        """Yield the answers of each block as soon as its worker is done, as in `batch.answers_of`.

        Raises:
            ExpertokenError: A worker can't open the composite, or was lost too often.
        """
        pending: dict[Any, Any] = {}

        def give(actor: Any) -> None:
            for block in islice(blocks, 1):
                pending[actor.answers.remote(block, generation, policy, concurrent)] = actor

        for actor in self._actors * _AHEAD:
            give(actor)
        while pending:
            [done], _ = self._ray.wait(list(pending), num_returns=1)
            give(pending.pop(done))
            yield from self._result(done)

    def _result(self, future: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(future)
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ExpertokenError) else error from None
        except errors.RayError as error:
            raise ExpertokenError(f"a worker of the cluster was lost ({one_line(error)})") from None


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
