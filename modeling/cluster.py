"""A Ray cluster that work is distributed over (extra `ray`)."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import ExpertokenError, one_line, require_extra

logger = logging.getLogger(__name__)

ENGINES = ("local", "ray")
"""Engines that run work of many parts."""

_AHEAD = 2  # parts queued at each worker
_PATIENCE = 30.0  # seconds between warnings that no worker has room
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
            ExpertokenError: The cluster can't be reached.
        """
        ray = require_extra("ray", "ray")
        started = not ray.is_initialized()
        if started:
            try:
                ray.init(self.address, include_dashboard=False, log_to_driver=False)
            except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
                where = "a local Ray cluster" if self.address is None else f"the Ray cluster at {self.address}"
                raise ExpertokenError(f"{where} can't be reached ({one_line(error)})") from None
        try:
            yield ray
        finally:
            if started:
                ray.shutdown()


class Workers:
    """Workers on a cluster that share the parts of a work. Each is a process with an object of its own.

    A worker that is lost with its machine restarts on another one and repeats its part. Workers that the cluster can't
    place yet join when it can.

    Args:
        cluster: Cluster to run on, with the resources of each worker.
        count: Number of workers.
        kind: Class of the object. Its constructor can't report errors, so it should not load anything.
        *arguments: Arguments of the constructor.

    Raises:
        ExpertokenError: Ray refuses the resources. Raised on entry.
    """

    def __init__(self, cluster: Cluster, count: int, kind: type, *arguments: Any) -> None:
        self._cluster, self._count, self._kind, self._arguments = cluster, count, kind, arguments
        self._actors: list[Any] = []
        self._starting: dict[Any, Any] = {}  # workers by the future that ends when they are placed
        self._ready: list[Any] = []

    def __enter__(self) -> "Workers":
        with ExitStack() as stack:
            self._ray = stack.enter_context(self._cluster.connected())
            stack.callback(self._kill)
            given = {"num_cpus": self._cluster.cpus, "num_gpus": self._cluster.gpus, "max_restarts": -1,
                     "max_task_retries": _AGAIN}  # fmt: skip
            try:
                actor = self._ray.remote(**given)(self._kind)
                self._actors = [actor.remote(*self._arguments) for _ in range(self._count)]
            except ValueError as error:
                raise ExpertokenError(f"workers of a Ray cluster: {one_line(error)}") from None
            self._starting = {actor.__ray_ready__.remote(): actor for actor in self._actors}
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def _kill(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)

    def one(self, method: str, *arguments: Any) -> Any:
        """Return the result of a method of one worker.

        Raises:
            ExpertokenError: The method raised it, or the worker was lost too often.
        """
        [(_, result)] = self.each(method, iter([arguments]))
        return result

    def each(self, method: str, parts: Iterator[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Yield each part with its result, as soon as a worker is done with it.

        Args:
            method: Name of the method.
            parts: Arguments of each call.

        Raises:
            ExpertokenError: The method raised it, or a worker was lost too often.
        """
        pending: dict[Any, Any] = {}
        exhausted = False

        def give(actor: Any) -> None:
            nonlocal exhausted
            part = next(parts, None)
            if part is None:
                exhausted = True
            else:
                pending[getattr(actor, method).remote(*part)] = actor, part

        for actor in self._ready * _AHEAD:
            give(actor)
        while pending or not exhausted:
            done, _ = self._ray.wait([*pending, *self._starting], num_returns=1, timeout=_PATIENCE)
            if not done:
                if not pending:
                    self._tell_waiting()
            elif done[0] in pending:
                actor, part = pending.pop(done[0])
                give(actor)
                yield part, self._result(done[0])
            else:
                actor = self._starting.pop(done[0])
                self._result(done[0])
                self._ready.append(actor)
                for _ in range(_AHEAD):
                    give(actor)

    def _tell_waiting(self) -> None:
        logger.warning(
            "the cluster has no room for a worker so far. Each of the %d needs %g CPUs and %g GPUs",
            self._count,
            self._cluster.cpus,
            self._cluster.gpus,
        )

    def _result(self, future: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(future)
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ExpertokenError) else error from None
        except errors.RayError as error:
            raise ExpertokenError(f"a worker of the cluster was lost ({one_line(error)})") from None
