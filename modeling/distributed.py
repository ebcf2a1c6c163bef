"""Processes that share a piece of work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .errors import ExpertokenError, one_line

T = TypeVar("T")


def barrier() -> None:
    """Wait for the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


@dataclass(frozen=True)
class Team:
    """The processes that share a piece of work.

    Attributes:
        rank: Rank of this process.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            barrier()

    def agree(self, look: Callable[[], T]) -> T:
        """Return the first process's result of `look` on every process.

        In a shared folder each process may see different files.

        Raises:
            ExpertokenError: The first process raised this error. All processes raise it, so that none waits in vain.
        """
        if self.world == 1:
            return look()
        shared: list[Any] = [None]
        if self.rank == 0:
            try:
                shared = [look()]
            except ExpertokenError as error:
                shared = [error]
            except Exception as error:  # the other processes wait for the broadcast, whatever the error is
                shared = [ExpertokenError(f"the first process failed: {one_line(error)}")]
        torch.distributed.broadcast_object_list(shared, src=0)
        if isinstance(shared[0], ExpertokenError):
            raise shared[0]
        return shared[0]


ALONE = Team()
"""A process that works by itself."""
