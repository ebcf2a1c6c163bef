"""What an operator may want to know: told as it happens, by those who do it."""

from dataclasses import dataclass

from ..modeling.dispatch import Dispatch


@dataclass(frozen=True)
class Answered:
    """An answer that came to its end.

    Attributes:
        expert: who gave it.
        chosen: who was to give it.
        first: seconds until its first piece, from the decision.
        seconds: until its end.
    """

    expert: str
    chosen: str
    first: float
    seconds: float


@dataclass(frozen=True)
class Spent:
    """What a candidate's part of an answer took, also where it broke off.

    Attributes:
        expert: whose.
        prompt_tokens: read.
        completion_tokens: written.
        cost: USD, or None where the pool has no price.
    """

    expert: str
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


class Observer:
    """Does nothing; whoever wants to know overrides what it wants to know. Called from several threads."""

    def decided(self, dispatch: Dispatch, seconds: float, batch: int) -> None:
        """A decision was made, `batch` of them in one pass."""

    def failed(self, expert: str, reason: str, *, begun: bool, refused: bool = False) -> None:
        """An expert failed.

        Args:
            expert: who.
            reason: why.
            begun: whether something of the answer was out already.
            refused: whether it took no fault of its own: the request was one that it can't take.
        """

    def handed_over(self, expert: str) -> None:
        """Self stopped in its answer for an expert to go on."""

    def skipped(self, expert: str) -> None:
        """An expert was not asked: it has failed too often of late."""

    def spent(self, part: Spent) -> None:
        """A candidate read and wrote."""

    def answered(self, answer: Answered) -> None:
        """An answer came to its end."""

    def lost(self) -> None:
        """A turn ended without a whole answer."""
