"""Notifications for operators, sent as events happen."""

from dataclasses import dataclass

from ..modeling.dispatch import Dispatch


@dataclass(frozen=True)
class Answered:
    """A completed answer.

    Attributes:
        expert: Name of the candidate that completed it.
        chosen: Name of the candidate that the decision chose.
        first: Seconds from the decision to the first piece.
        seconds: Seconds from the decision to the end.
    """

    expert: str
    chosen: str
    first: float
    seconds: float


@dataclass(frozen=True)
class Spent:
    """The tokens and cost of a candidate's part of an answer, complete or not.

    Attributes:
        expert: Name of the candidate.
        prompt_tokens: Number of tokens read.
        completion_tokens: Number of tokens written.
        cost: Cost in USD, or None if the pool has no price.
    """

    expert: str
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


class Observer:
    """An observer that ignores all events. Subclasses override methods, which are called from several threads."""

    def decided(self, dispatch: Dispatch, seconds: float, batch: int) -> None:
        """Record a decision, one of `batch` decisions in one forward pass."""

    def failed(self, expert: str, reason: str, *, begun: bool, refused: bool = False) -> None:
        """Record the failure of an expert.

        Args:
            expert: Name of the expert.
            reason: Reason of the failure.
            begun: True if a part of the answer was already sent to the user.
            refused: True if the expert refused the request itself, which is no fault of the expert.
        """

    def handed_over(self, expert: str) -> None:
        """Record that self stopped in its answer for an expert to continue it."""

    def skipped(self, expert: str) -> None:
        """Record that an expert was skipped because it failed too often recently."""

    def spent(self, part: Spent) -> None:
        """Record the tokens that a candidate read and wrote."""

    def answered(self, answer: Answered) -> None:
        """Record a completed answer."""

    def lost(self) -> None:
        """Record a turn that ended without a whole answer."""
