"""What every backend does: answer a conversation in pieces, or go on with an answer that somebody began."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...modeling.chat import Message


@dataclass(frozen=True)
class Generation:
    """How to generate.

    Attributes:
        max_new_tokens: at most this many tokens of answer.
        temperature: 0 is greedy; where None, models that run here are, and endpoints do as they do. Here anything below
            0.001 is.
        top_p: mass of the nucleus to sample from; where None as for the temperature.
        seed: of sampling; None draws a new one.
        stop: texts before which an answer ends, or a single one; kept as a tuple without empty ones, which would end
            every answer.
        extra: what else an endpoint is asked, as OpenAI's API calls it (`tools`, `logprobs`, ...); models that run here
            answer in text alone.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] | str | None = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        object.__setattr__(self, "stop", tuple(text for text in texts if text))

    @property
    def sampled(self) -> bool:
        """Whether models that run here draw their tokens: logits over a temperature near 0 are no numbers any more."""
        return (self.temperature or 0.0) >= _COLDEST


_COLDEST = 1e-3  # below it the most probable token has all of the probability, but for ties


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it comes.

    Attributes:
        text: more of the answer; may be empty.
        tool_calls: more of its tool calls, as OpenAI's API streams them.
        logprobs: of the text's tokens, as OpenAI's API has them.
        finish: why the answer ended (stop, length, tool_calls, content_filter); with its last piece.
        usage: tokens read and written, where the backend counts them; with one of the last pieces.
    """

    text: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: dict[str, Any] | None = None
    finish: str | None = None
    usage: tuple[int, int] | None = None

    @property
    def tells(self) -> bool:
        """Whether the user gets something of it."""
        return bool(self.text or self.tool_calls)


class Backend(ABC):
    """A way to reach an expert. Failures are raised as `ExpertFailedError`, with one line that says why."""

    @abstractmethod
    def stream(self, messages: Sequence[Message], generation: Generation, *, begun: str = "") -> AsyncIterator[Piece]:
        """The answer in pieces, as they come.

        Args:
            messages: the conversation.
            generation: how.
            begun: an answer that somebody else began; the pieces go on behind it.
        """
