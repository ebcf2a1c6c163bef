"""Contract of a backend: it answers a conversation in pieces, or continues an answer that another backend began."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from .source import Source

if TYPE_CHECKING:  # reading a pool must not import numpy
    from .chat import Message


def stop_texts(stop: Sequence[str] | str | None) -> tuple[str, ...]:
    """Return the stop texts of a request, which OpenAI's API accepts as one text, a list or null."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


@dataclass(frozen=True)
class Generation:
    """Options of one generation.

    Attributes:
        max_new_tokens: Longest answer, in tokens. None for as many as the expert's context leaves.
        temperature: Sampling temperature. 0 is greedy, and so is any value below 0.001 for models in this process. With
            None, models in this process are greedy, and endpoints use their own default.
        top_p: Mass of the nucleus to sample from. None as for the temperature.
        seed: Seed of sampling. None draws a new seed.
        stop: Texts before which an answer ends. A single text becomes a tuple. Empty texts are dropped, because they
            would end every answer.
        extra: Further parameters for an endpoint, named as in OpenAI's API (`tools`, `logprobs`, ...). Models in this
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
        """True if models in this process sample. Logits divided by a temperature near 0 overflow."""
        return (self.temperature or 0.0) >= _COLDEST


_MOST = 2**53  # tokens, far above any real count


def as_usage(given: Any) -> tuple[int, int] | None:
    """Return a backend's counts of prompt and completion tokens, or None unless both are plausible integers."""
    try:
        read, written = given
    except (TypeError, ValueError):
        return None
    counts = all(isinstance(count, int) and 0 <= count < _MOST for count in (read, written))
    return (read, written) if counts else None


_COLDEST = 1e-3  # below this temperature the most probable token has all of the probability, except for ties


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it arrives.

    Attributes:
        text: Next part of the answer. It may be empty.
        tool_calls: Next part of the answer's tool calls, in the form in which OpenAI's API streams them.
        logprobs: Log-probabilities of the text's tokens, in the form of OpenAI's API.
        finish: Reason why the answer ended (stop, length, tool_calls, content_filter). Set in the last piece.
        usage: Prompt tokens and completion tokens, if the backend counts them. Set in one of the last pieces. A value
            that is not two counts becomes None, because the answer of a server that counts wrongly is still valid.
        thought: Next part of the model's reasoning before its answer, by the server's name for the field
            (`reasoning_content`, `reasoning`). It is no part of the answer.
        details: Further counts beside the usage, by their names in OpenAI's API (`prompt_tokens_details`, ...).
        stopped_by: Stop text that ended the answer, if the backend applies stop texts itself and reports the text.
    """

    text: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    logprobs: dict[str, Any] | None = None
    finish: str | None = None
    usage: tuple[int, int] | None = None
    thought: Mapping[str, str] | None = None
    details: Mapping[str, Mapping[str, int]] | None = None
    stopped_by: str | None = None

    def __post_init__(self) -> None:
        if self.usage is not None:
            object.__setattr__(self, "usage", as_usage(self.usage))

    @property
    def visible(self) -> bool:
        """True if the user receives a part of this piece."""
        return bool(self.text or self.tool_calls)


@dataclass(frozen=True)
class Timeouts:
    """Limits on waiting, in seconds.

    Attributes:
        decision: Limit on a decision, including its wait for other decisions. None for no limit.
        connect: Limit on opening a connection to an endpoint.
        first: Limit on the first piece of an endpoint's answer, retries included.
        idle: Limit on the time between two pieces of an endpoint's answer that are not empty.
        retries: Number of retries of a request that failed temporarily (429, 5xx, no connection), with growing pauses,
            before the fallback to the next candidate.
    """

    decision: float | None = None
    connect: float = 5.0
    first: float = 60.0
    idle: float = 30.0
    retries: int = 1


REQUEST_HEADERS: ContextVar[Mapping[str, str]] = ContextVar("request_headers", default=MappingProxyType({}))
"""Headers that identify a request in logs. They are forwarded to every endpoint that serves the request."""


class Models(Protocol):
    """Models in the memory of one process, each base once (`inference.backends.models.LocalModels`)."""

    def lease(self, source: Source) -> AbstractContextManager[Any]:
        """Keep a model in memory within the block."""

    def slot(self, resident: Any, base: Source, folder: str, revision: str | None = None) -> str:
        """Load a LoRA adapter into a model in memory, and return the adapter's name in that model."""


@dataclass(frozen=True)
class Opening:
    """Resources for opening backends.

    Attributes:
        base: Source of the meta LLM's base, which adapters without a `base` use. None in a process without a meta LLM.
        models: Models of this process, or None.
        timeouts: Limits on waiting for endpoints.
    """

    base: Source | None = None
    models: "Models | None" = None
    timeouts: Timeouts = field(default_factory=Timeouts)


class Backend(ABC):
    """A way to reach an expert. Failures raise `ExpertFailedError` with a reason in one line.

    Attributes:
        retries: Number of retried requests. None for a backend that never retries.
    """

    retries: int | None = None

    @property
    def addresses_up(self) -> Mapping[str, bool]:
        """Map from each of several addresses to True if it answered its last check. Empty for a single address."""
        return {}

    async def check_addresses(self) -> None:
        """Check whether each of several addresses is alive. A server repeats this periodically."""
        return

    @abstractmethod
    def stream(
        self, messages: "Sequence[Message]", generation: Generation, *, begun: str = ""
    ) -> AsyncGenerator[Piece, None]:
        """Yield the answer in pieces as they arrive.

        Args:
            messages: Messages of the conversation.
            generation: Options of the generation.
            begun: Beginning of the answer, by another expert. The pieces continue it.
        """

    def hold(self) -> AbstractContextManager[Any]:
        """Keep the resources of the answers in memory within the block."""
        return nullcontext()

    def complete(
        self,
        conversations: "Sequence[Sequence[Message]]",
        generation: Generation,
        *,
        held: Any = None,
        batch_size: int = 32,
    ) -> list[Piece]:
        """Return an answer to each conversation, in one piece each.

        Only backends of kinds with `batches` implement this.

        Args:
            conversations: Conversations to answer.
            generation: Options of the generation.
            held: Value that `hold` yielded, if the caller is inside such a block.
            batch_size: Number of conversations in one batch.
        """
        raise NotImplementedError

    def log_likelihood(self, messages: "Sequence[Message]", continuation: str) -> tuple[float, bool]:
        """Return the log-probability of an answer that begins with `continuation`, and whether it is the greedy answer.

        Only backends of kinds with `scores_texts` implement this.
        """
        raise NotImplementedError
