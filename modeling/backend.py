"""The contract of a backend: it answers a conversation in pieces, or continues an answer that another one began."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from .source import Source

if TYPE_CHECKING:  # a pool is read without numpy
    from .chat import Message


def stop_texts(stop: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the stop texts of a request, which OpenAI's API takes as one text, a list or null."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


@dataclass(frozen=True)
class Generation:
    """Options of one generation.

    Attributes:
        max_new_tokens: longest answer, in tokens; None for as many as the expert's context leaves.
        temperature: temperature of sampling; 0 is greedy. Where None, models in this process are greedy, and endpoints
            use their own default. Models in this process are greedy below 0.001 too.
        top_p: mass of the nucleus to sample from; None as for the temperature.
        seed: seed of sampling; None draws a new one.
        stop: texts before which an answer ends. A single text becomes a tuple; empty ones are dropped, because they
            would end every answer.
        extra: further parameters for an endpoint, named as in OpenAI's API (`tools`, `logprobs`, ...). Models in this
            process answer in text and ignore them.
    """

    max_new_tokens: int | None = 512
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(text for text in stop_texts(self.stop) if text))

    @property
    def sampled(self) -> bool:
        """Whether models in this process sample: logits divided by a temperature near 0 overflow."""
        return (self.temperature or 0.0) >= _COLDEST


_MOST = 2**53  # tokens, and far more than there are


def as_usage(given: Any) -> tuple[int, int] | None:
    """Return prompt and completion tokens as a backend gave them, or None where they are not two counts."""
    try:
        read, written = given
    except (TypeError, ValueError):
        return None
    counts = all(isinstance(count, int) and 0 <= count < _MOST for count in (read, written))
    return (read, written) if counts else None


_COLDEST = 1e-3  # below it the most probable token has all of the probability, except for ties


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it arrives.

    Attributes:
        text: more of the answer; may be empty.
        tool_calls: more of its tool calls, in the form in which OpenAI's API streams them.
        logprobs: log-probabilities of the text's tokens, in the form of OpenAI's API.
        finish: why the answer ended (stop, length, tool_calls, content_filter); with its last piece.
        usage: prompt tokens and completion tokens, where the backend counts them; with one of the last pieces. What is
            not two counts becomes None: a server that counts wrongly has answered all the same.
        thought: more of what the model thinks before it answers, by the name under which its server sends that
            (`reasoning_content`, `reasoning`); no part of the answer.
        details: further counts beside the usage, by their names in OpenAI's API (`prompt_tokens_details`, ...).
    """

    text: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: dict[str, Any] | None = None
    finish: str | None = None
    usage: tuple[int, int] | None = None
    thought: Mapping[str, str] | None = None
    details: Mapping[str, Mapping[str, int]] | None = None

    def __post_init__(self) -> None:
        if self.usage is not None:
            object.__setattr__(self, "usage", as_usage(self.usage))

    @property
    def visible(self) -> bool:
        """Whether the user receives something of this piece."""
        return bool(self.text or self.tool_calls)


@dataclass(frozen=True)
class Timeouts:
    """Limits on waiting, in seconds.

    Attributes:
        decision: limit on deciding who answers, waiting for other decisions included; None for no limit.
        connect: limit on opening a connection to an endpoint.
        first: limit on the first piece of an endpoint's answer, retries included.
        idle: limit on the time between two of its pieces that hold something.
        retries: number of retries of a request that failed temporarily (429, 5xx, no connection), with growing pauses,
            before the next best expert is asked.
    """

    decision: float | None = None
    connect: float = 5.0
    first: float = 60.0
    idle: float = 30.0
    retries: int = 1


REQUEST_HEADERS: ContextVar[Mapping[str, str]] = ContextVar("request_headers", default=MappingProxyType({}))
"""Headers by which a request can be found again: they go along where an endpoint is asked on its behalf."""


class Models(Protocol):
    """Models that one process holds, each base once (`inference.backends.models.LocalModels`)."""

    def lease(self, source: Source) -> AbstractContextManager[Any]:
        """Keep a model in memory within the block."""

    def slot(self, resident: Any, base: Source, folder: str, revision: str | None = None) -> str:
        """Load a LoRA adapter into a model that is in memory, and return its name there."""


@dataclass(frozen=True)
class Opening:
    """Resources with which backends are opened.

    Attributes:
        base: source of the meta LLM's base, which adapters without a `base` use; None in a process without a meta LLM.
        models: the models of this process, or None.
        timeouts: limits on waiting for endpoints.
    """

    base: Source | None = None
    models: "Models | None" = None
    timeouts: Timeouts = field(default_factory=Timeouts)


class Backend(ABC):
    """A way to reach an expert. Failures raise `ExpertFailedError` with a reason in one line.

    Attributes:
        retries: number of requests made once more; None for a backend that makes none.
    """

    retries: int | None = None

    @property
    def addresses_up(self) -> Mapping[str, bool]:
        """Whether each of several addresses answered when it was last asked."""
        return {}

    async def check_addresses(self) -> None:
        """Ask each of several addresses whether it is alive; a server does so from time to time."""
        return

    @abstractmethod
    def stream(
        self, messages: "Sequence[Message]", generation: Generation, *, begun: str = ""
    ) -> AsyncGenerator[Piece, None]:
        """Yield the answer in pieces as they arrive.

        Args:
            messages: the conversation.
            generation: options of the generation.
            begun: beginning of the answer, by another expert; the pieces continue it.
        """

    def hold(self) -> AbstractContextManager[Any]:
        """Keep in memory what the answers need, within the block."""
        return nullcontext()

    def complete(
        self,
        conversations: "Sequence[Sequence[Message]]",
        generation: Generation,
        *,
        held: Any = None,
        batch_size: int = 32,
    ) -> list[Piece]:
        """Return an answer to each conversation, in one piece each; only of kinds that say `batches`.

        Args:
            conversations: the conversations.
            generation: options of the generation.
            held: what `hold` gave, where the caller is inside such a block.
            batch_size: conversations of one batch.
        """
        raise NotImplementedError

    def log_likelihood(self, messages: "Sequence[Message]", continuation: str) -> tuple[float, bool]:
        """Return the log-probability of an answer that begins with `continuation`, and whether it is the greedy one.

        Only of kinds that say `scores_texts`.
        """
        raise NotImplementedError
