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
        rank: of this one.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def barrier(self) -> None:
        """Wait for the others."""
        if self.world > 1:
            barrier()

    def agree(self, look: Callable[[], T]) -> T:
        """Return on every process what the first one finds: in a shared folder each may see something else.

        Raises:
            ExpertokenError: on all, what it raised on the first, so that the others do not wait for it in vain.
        """
        if self.world == 1:
            return look()
        shared: list[Any] = [None]
        if self.rank == 0:
            try:
                shared = [look()]
            except ExpertokenError as error:
                shared = [error]
            except Exception as error:  # the others wait for a word, whatever it is
                shared = [ExpertokenError(f"the first process failed: {one_line(error)}")]
        torch.distributed.broadcast_object_list(shared, src=0)
        if isinstance(shared[0], ExpertokenError):
            raise shared[0]
        return shared[0]


ALONE = Team()
"""A process that works by itself."""
