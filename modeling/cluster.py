"""A Ray cluster that work is distributed over (extra `ray`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import require_extra

ENGINES = ("local", "ray")
"""Engines that run work of many parts."""


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
