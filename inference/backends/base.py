"""What every backend does: answer conversations."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...modeling.chat import Message


@dataclass(frozen=True)
class Generation:
    """How to generate.

    Attributes:
        max_new_tokens: at most this many tokens of answer.
        temperature: 0 is greedy.
        top_p: mass of the nucleus to sample from.
        seed: of sampling; None draws a new one.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Backend(ABC):
    """A way to reach an expert. Failures are raised as `ExpertFailedError`, with one line that says why."""

    @abstractmethod
    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str]:
        """The answer in pieces, as they come."""

    def complete(self, conversations: Sequence[Sequence[Message]], generation: Generation) -> list[str]:
        """Answers of many conversations, in their order."""
        return ["".join(self.stream(messages, generation)) for messages in conversations]
