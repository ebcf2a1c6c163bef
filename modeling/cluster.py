"""A Ray cluster that work is distributed over (extra `ray`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .errors import ExpertokenError, one_line, require_extra

ENGINES = ("local", "ray")
"""Engines that run work of many parts."""

_AHEAD = 2  # parts queued at each worker
_AGAIN = 3  # retries of a part after its worker was lost


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and the resources for each part of the work.

    Attributes:
        address: Address of the cluster. None starts a local cluster.
        cpus: Number of CPUs for each part.
        gpus: Number of GPUs for each part that runs its own model. It may be a fraction.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float = 0

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """Connect within the block, and yield the `ray` module. A cluster that this method started is stopped.

        Raises:
            ImportError: The extra `ray` is not installed.
        """
        ray = require_extra("ray", "ray")
        started = not ray.is_initialized()
        if started:
            ray.init(self.address, include_dashboard=False, log_to_driver=False)
        try:
            yield ray
        finally:
            if started:
                ray.shutdown()


class Workers:
    """Workers on a cluster that share the parts of a work. Each is a process with an object of its own.

    A worker that is lost with its machine restarts on another one and repeats its part.

    Args:
        cluster: Cluster to run on, with the resources of each worker.
        count: Number of workers.
        kind: Class of the object. Its constructor can't report errors, so it should not load anything.
        *arguments: Arguments of the constructor.
    """

    def __init__(self, cluster: Cluster, count: int, kind: type, *arguments: Any) -> None:
        self._cluster, self._count, self._kind, self._arguments = cluster, count, kind, arguments
        self._actors: list[Any] = []

    def __enter__(self) -> "Workers":
        self._connection = self._cluster.connected()
        self._ray = self._connection.__enter__()
        given = {"num_cpus": self._cluster.cpus, "num_gpus": self._cluster.gpus, "max_restarts": -1,
                 "max_task_retries": _AGAIN}  # fmt: skip
        actor = self._ray.remote(**given)(self._kind)
        self._actors = [actor.remote(*self._arguments) for _ in range(self._count)]
        return self

    def __exit__(self, *error: Any) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._connection.__exit__(*error)

    def one(self, method: str, *arguments: Any) -> Any:
        """Return the result of a method of the first worker.

        Raises:
            ExpertokenError: The method raised it, or the worker was lost too often.
        """
        return self._result(getattr(self._actors[0], method).remote(*arguments))

    def each(self, method: str, parts: Iterator[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Yield each part with its result, as soon as a worker is done with it.

        Args:
            method: Name of the method.
            parts: Arguments of each call.

        Raises:
            ExpertokenError: The method raised it, or a worker was lost too often.
        """
        pending: dict[Any, Any] = {}

        def give(actor: Any) -> None:
            for part in islice(parts, 1):
                pending[getattr(actor, method).remote(*part)] = actor, part

        for actor in self._actors * _AHEAD:
            give(actor)
        while pending:
            [done], _ = self._ray.wait(list(pending), num_returns=1)
            actor, part = pending.pop(done)
            give(actor)
            yield part, self._result(done)

    def _result(self, future: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(future)
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ExpertokenError) else error from None
        except errors.RayError as error:
            raise ExpertokenError(f"a worker of the cluster was lost ({one_line(error)})") from None
