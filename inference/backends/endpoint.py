"""OpenAI-compatible endpoints, through the `openai` client."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import anyio

from ...modeling.chat import Message
from ...modeling.errors import ExpertFailedError, RequestRefusedError
from ...modeling.experts import Expert
from .base import Backend, Generation, Piece

if TYPE_CHECKING:
    from openai import AsyncOpenAI


_REQUESTS = (400, 413, 422)  # a fault of the request


@dataclass(frozen=True)
class Timeouts:
    """How long an endpoint is waited for, in seconds.

    Attributes:
        connect: for a connection.
        first: for the first piece of an answer, retries included.
        idle: between two pieces.
        retries: of a request that was refused for now (429, 5xx) or did not come through, with growing pauses, before
            the next best expert is asked.
    """

    connect: float = 5.0
    first: float = 60.0
    idle: float = 30.0
    retries: int = 1


class EndpointBackend(Backend):
    """A model behind an HTTP address.

    Args:
        expert: with `model`, and `base_url` and `api_key_env` where they are needed.
        timeouts: how long it is waited for.

    Raises:
        ExpertFailedError: the environment variable that should hold the key is not set.
    """

    def __init__(self, expert: Expert, timeouts: Timeouts | None = None) -> None:
        self.expert = expert
        self.timeouts = timeouts or Timeouts()
        self._key = expert.api_key()
        # A client's connections belong to one event loop.
        self._clients: WeakKeyDictionary[Any, AsyncOpenAI] = WeakKeyDictionary()

    def client(self) -> "AsyncOpenAI":
        """The client of this event loop."""
        import openai

        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            limits = self.timeouts
            self._clients[loop] = openai.AsyncOpenAI(
                api_key=self._key,
                base_url=self.expert.base_url,
                timeout=openai.Timeout(max(limits.first, limits.idle), connect=limits.connect),
                max_retries=limits.retries,
            )
        return self._clients[loop]

    def _options(self, generation: Generation) -> dict[str, Any]:
        options = dict(generation.extra) | {
            "model": self.expert.model,
            "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if generation.stop:
            options["stop"] = list(generation.stop)
        return options if generation.seed is None else options | {"seed": generation.seed}

    async def stream(
        self, messages: Sequence[Message], generation: Generation, *, begun: str = ""
    ) -> AsyncIterator[Piece]:
        """The answer in pieces. An answer that was begun goes along as the assistant's last message.

        Servers go on behind it where they know `continue_final_message` (vLLM) or do so by themselves; of one that
        begins anew by repeating it the repetition is left out.
        """
        import openai

        given = list(messages)
        options = self._options(generation)
        if begun:
            given.append({"role": "assistant", "content": begun})
            options["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
        limit = self.timeouts.first
        repetition = Repetition(begun)
        told = finished = False
        chunks = None
        try:
            with anyio.fail_after(limit):
                chunks = await self.client().chat.completions.create(messages=given, **options)
            pieces = aiter(chunks)
            while True:
                with anyio.fail_after(limit):
                    chunk = await anext(pieces, None)
                if chunk is None:
                    break
                piece = _piece(chunk)
                if piece.tells:
                    told, limit = True, self.timeouts.idle
                finished = finished or piece.finish is not None
                yield replace(piece, text=repetition.without(piece.text, last=piece.finish is not None))
            if not finished:  # a connection that was cut between two chunks looks like an end
                raise ExpertFailedError("the endpoint's answer was cut off")
        except ExpertFailedError:
            raise
        except openai.APIStatusError as error:
            kind = RequestRefusedError if error.status_code in _REQUESTS else ExpertFailedError
            raise kind(f"the endpoint answered {error.status_code}") from error
        except (TimeoutError, openai.APITimeoutError) as error:
            what = "stopped in its answer for" if told else "gave nothing within"
            raise ExpertFailedError(f"the endpoint {what} {limit:g} s") from error
        except Exception as error:  # in mid-stream the errors of the client's HTTP library come through as they are
            # Only the kind is told: messages of the client can quote requests, and with them headers.
            raise ExpertFailedError(f"the endpoint could not be used ({type(error).__name__})") from error
        finally:
            if chunks is not None:
                with anyio.CancelScope(shield=True):
                    await chunks.close()


def _piece(chunk: Any) -> Piece:
    """What a chunk of the client brings.

    Raises:
        ExpertFailedError: it is something else than a chunk of an answer.
    """
    usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) if getattr(chunk, "usage", None) else None
    if not getattr(chunk, "choices", None):
        if usage is None and getattr(chunk, "choices", None) is None:
            raise ExpertFailedError("the endpoint gave something else than an answer")
        return Piece(usage=usage)
    choice = chunk.choices[0]
    calls = choice.delta.tool_calls
    return Piece(
        text=choice.delta.content or "",
        tool_calls=[call.model_dump(exclude_none=True) for call in calls] if calls else None,
        logprobs=choice.logprobs.model_dump() if choice.logprobs else None,
        finish=choice.finish_reason,
        usage=usage,
    )


class Repetition:
    """Leaves out the beginning of an answer where it repeats what was there already.

    Args:
        begun: what may be repeated.
    """

    def __init__(self, begun: str) -> None:
        self._rest, self._held = begun, ""

    def without(self, text: str, *, last: bool = False) -> str:
        """More of the answer, without the repetition; what may turn out to be one is held back until that is known."""
        if not self._rest:
            return text
        self._held += text
        if self._held.startswith(self._rest):
            text, self._rest = self._held[len(self._rest) :], ""
        elif self._rest.startswith(self._held) and not last:
            text = ""
        else:
            text, self._rest = self._held, ""
        return text
