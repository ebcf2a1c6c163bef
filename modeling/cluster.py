"""A Ray cluster, over which work is spread (extra `ray`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import require_extra

ENGINES = ("local", "ray")
"""Where work that consists of many parts is done."""


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what a part of the work asks of it.

    Attributes:
        address: address of the cluster; None starts a local one.
        cpus: number of CPUs for each part.
        gpus: number of GPUs for each part that runs a model of its own; a share is possible.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float = 0

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """Connect within the block, and yield the `ray` module; a cluster that was started is stopped.

        Raises:
            ImportError: the extra `ray` is not installed.
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
