"""OpenAI-compatible endpoints, through the `openai` client."""

import asyncio
import math
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import anyio

from ...modeling.backend import Backend, Generation, Opening, Piece, Timeouts, as_usage
from ...modeling.chat import Message
from ...modeling.errors import ExpertFailedError, RequestRefusedError
from ...modeling.experts import Expert, ExpertKind

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from tenacity import AsyncRetrying


REQUESTS = (400, 413, 422)  # a fault of the request
_FOR_NOW = (408, 409, 429)
_CHARACTERS = 32  # of a token, on average, at most: beyond that an endpoint does not heed the limit that it was given
_STOPS = 4  # stop texts that OpenAI's API takes
_NO_ANSWER = "the endpoint gave something else than an answer"
_OPENAI = "//api.openai.com"
_GO_ON = {"continue_final_message": True, "add_generation_prompt": False}


class EndpointBackend(Backend):
    """A model behind an HTTP address.

    Args:
        expert: with `model`, and `base_url` and `api_key_env` where they are needed.
        timeouts: how long it is waited for.

    Attributes:
        retries: requests made once more.

    Raises:
        ExpertFailedError: the environment variable that should hold the key is not set.
    """

    def __init__(self, expert: Expert, timeouts: Timeouts | None = None) -> None:
        import openai  # noqa: F401 - half a second, and whoever opens an expert has it before the first request

        self.expert = expert
        self.timeouts = timeouts or Timeouts()
        self.retries: int = 0
        self._key = expert.api_key()
        # A client's connections belong to one event loop.
        self._clients: dict[asyncio.AbstractEventLoop, AsyncOpenAI] = {}
        self._lock = threading.Lock()

    def client(self) -> "AsyncOpenAI":
        """The client of this event loop."""
        import openai

        loop = asyncio.get_running_loop()
        with self._lock:
            self._clients = {known: client for known, client in self._clients.items() if not known.is_closed()}
            if loop not in self._clients:
                limits = self.timeouts
                self._clients[loop] = openai.AsyncOpenAI(
                    api_key=self._key,
                    base_url=self.expert.base_url,
                    timeout=openai.Timeout(max(limits.first, limits.idle), connect=limits.connect),
                    max_retries=0,  # see `asking`: the client would heed a minute of Retry-After
                )
            return self._clients[loop]

    @property
    def asking(self) -> "AsyncRetrying":
        """Calls a function once more where the server refused for now or was not reached, after a short pause.

        Short, whatever the server asks for: the next best expert may be asked instead.
        """
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

        pause = wait_random_exponential(multiplier=0.5, max=2)
        attempts = stop_after_attempt(1 + self.timeouts.retries)

        def count(_: Any) -> None:
            self.retries += 1

        again = retry_if_exception(_passes)
        return AsyncRetrying(retry=again, wait=pause, stop=attempts, before_sleep=count, reraise=True)

    async def first_token(self, messages: Sequence[Message], candidates: int) -> "FirstToken":
        """Return the most probable first tokens of an answer.

        Args:
            messages: the conversation.
            candidates: number of tokens to ask for.

        Raises:
            RequestRefusedError: the endpoint refuses the conversation.
            ExpertFailedError: the endpoint can't be used, or gives no log-probabilities.
        """
        import openai

        limit = self.timeouts.first
        create: Any = self.client().chat.completions.create
        request = {"model": self.expert.model, "messages": list(messages), "max_tokens": 1, "temperature": 0.0}

        async def ask() -> Any:
            return await create(**request, logprobs=True, top_logprobs=candidates)

        try:
            with anyio.fail_after(limit):
                answer: Any = await self.asking(ask)
            top = answer.choices[0].logprobs.content[0].top_logprobs
            found = {entry.token: entry.logprob for entry in top}
        except openai.APIStatusError as error:
            kind = RequestRefusedError if error.status_code in REQUESTS else ExpertFailedError
            raise kind(f"its endpoint answered {error.status_code}") from error
        except TimeoutError as error:
            raise ExpertFailedError(f"its endpoint gave nothing within {limit:g} s") from error
        except (AttributeError, IndexError, TypeError) as error:
            raise ExpertFailedError("its endpoint gives no log-probabilities") from error
        except Exception as error:
            raise ExpertFailedError(f"its endpoint could not be used ({type(error).__name__})") from error
        return FirstToken(found, answer.usage.prompt_tokens if answer.usage else None)

    def _options(self, generation: Generation) -> dict[str, Any]:
        # OpenAI's own newer models refuse the older name; other servers know the older one.
        own = _OPENAI in (self.expert.base_url or _OPENAI)
        limit = "max_completion_tokens" if own else "max_tokens"
        asked = {
            limit: generation.max_new_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "seed": generation.seed,
            "stop": list(generation.stop[:_STOPS]) or None,  # whoever asks cuts the answer at the others
        }
        fixed = {"model": self.expert.model, "stream": True, "stream_options": {"include_usage": True}}
        return dict(generation.extra) | {key: value for key, value in asked.items() if value is not None} | fixed

    async def stream(
        self, messages: Sequence[Message], generation: Generation, *, begun: str = ""
    ) -> AsyncGenerator[Piece, None]:
        """The answer in pieces. An answer that was begun goes along as the assistant's last message.

        Servers go on behind it where they know `continue_final_message` (vLLM) or do so by themselves; of one that
        begins anew by repeating it the repetition is left out.

        Raises:
            RequestRefusedError: the endpoint refuses the conversation.
            ExpertFailedError: the endpoint can't be used, or breaks off in its answer.
        """
        import openai

        given = list(messages)
        if begun:
            given.append({"role": "assistant", "content": begun})
        deadline = anyio.current_time() + self.timeouts.first
        told = finished = False
        written, most = 0, _CHARACTERS * generation.max_new_tokens
        repetition, numbering, unicode = Repetition(begun), Numbering(), _Unicode()
        chunks: Any = None
        try:
            with anyio.fail_after(self.timeouts.first):
                chunks = await self.asking(self._begin, given, self._options(generation), going_on=bool(begun))
            pieces = aiter(chunks)
            while True:
                limit = self.timeouts.idle if told else max(0.0, deadline - anyio.current_time())
                with anyio.fail_after(limit):
                    chunk = await anext(pieces, None)
                if chunk is None:
                    break
                piece, thought = _piece(chunk, unicode)
                # Some models think for minutes before their first word, and stream that: they are alive.
                told = told or piece.visible or thought > 0
                written += 1 + thought + _characters(piece)
                if written > most and piece.finish is None:
                    piece = replace(piece, finish="length")
                finished = finished or piece.finish is not None
                text = repetition.without(piece.text, last=piece.finish is not None)
                yield replace(piece, text=text, tool_calls=numbering.of(piece.tool_calls))
                if written > most:
                    break  # it does not heed its limit, and may never end
            if not finished:  # a connection that was cut between two chunks looks like an end
                raise ExpertFailedError("the endpoint's answer was cut off")
        except ExpertFailedError:
            raise
        except openai.APIStatusError as error:
            kind = RequestRefusedError if error.status_code in REQUESTS else ExpertFailedError
            raise kind(f"the endpoint answered {error.status_code}") from error
        except (TimeoutError, openai.APITimeoutError) as error:
            stopped = f"stopped in its answer for {self.timeouts.idle:g} s"
            what = stopped if told else f"gave nothing within {self.timeouts.first:g} s"
            raise ExpertFailedError(f"the endpoint {what}") from error
        except Exception as error:  # in mid-stream the errors of the client's HTTP library come through as they are
            # Only the kind is told: messages of the client can quote requests, and with them headers.
            raise ExpertFailedError(f"the endpoint could not be used ({type(error).__name__})") from error
        finally:
            if chunks is not None:
                with anyio.CancelScope(shield=True):
                    await chunks.close()

    async def _begin(self, messages: list[Message], options: dict[str, Any], *, going_on: bool) -> Any:
        """Ask; a server that does not know how to be told to go on is asked once more without."""
        import openai

        ask = partial(
            self.client().post, "/chat/completions", cast_to=object, stream=True, stream_cls=openai.AsyncStream[object]
        )
        body = options | {"messages": messages}
        try:
            if going_on:
                with suppress(openai.BadRequestError, openai.UnprocessableEntityError):
                    return await ask(body=body | _GO_ON)
            return await ask(body=body)
        except (TypeError, ValueError) as error:  # of the client, which can't write it: no fault of the expert
            raise RequestRefusedError("the request holds something that JSON or Unicode does not know") from error


@dataclass(frozen=True)
class FirstToken:
    """The most probable first tokens of an answer.

    Attributes:
        logprobs: log-probability by the token's text.
        prompt_tokens: tokens of the conversation, where the endpoint counts them.
    """

    logprobs: dict[str, float]
    prompt_tokens: int | None


def _piece(chunk: Any, unicode: "_Unicode") -> tuple[Piece, int]:
    """What a chunk brings, and how many characters of the model's thinking.

    Chunks are read as the JSON that they are: to make the client's classes of them took a fifth of the server's time.

    Raises:
        ExpertFailedError: it is something else than a chunk of an answer.
    """
    try:
        counts = chunk.get("usage") or {}
        usage = as_usage((counts.get("prompt_tokens"), counts.get("completion_tokens")))
        choices = chunk.get("choices")
        if choices is None and usage is None:
            raise ExpertFailedError(_NO_ANSWER)
        if not choices:
            return Piece(usage=usage), 0
        delta = choices[0].get("delta") or {}
        finish = choices[0].get("finish_reason") or None
        piece = Piece(
            text=unicode.joined(delta.get("content") or delta.get("refusal") or "", last=finish is not None),
            tool_calls=[_call(call) for call in delta.get("tool_calls") or ()] or None,
            logprobs=_logprobs(choices[0].get("logprobs")),
            finish=None if finish is None else _text(finish),
            usage=usage,
        )
        thought = len(_text(delta.get("reasoning_content") or delta.get("reasoning") or ""))
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise ExpertFailedError(_NO_ANSWER) from error
    return piece, thought


def _characters(piece: Piece) -> int:
    return len(piece.text) + sum(len(str(call)) for call in piece.tool_calls or ())


def _text(given: str) -> str:
    """A text without halves of surrogates, which can't be sent on. Raises AttributeError where it is none."""
    return given.encode("utf-8", "replace").decode()


class _Unicode:
    """Joins halves of characters that a server cut its text between."""

    def __init__(self) -> None:
        self._half = ""

    def joined(self, text: str, *, last: bool) -> str:
        """More of the text; a half at its end is held back for the next one, and lost where none comes."""
        if not self._half and text.isascii():
            return text
        text = self._half + text
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" and not last else ""
        return text[: len(text) - len(self._half)].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _call(call: Any) -> dict[str, Any]:
    """A part of a tool call.

    Raises:
        AttributeError, TypeError: it is something else.
    """
    function = call.get("function") or {}
    texts = (call.get("id"), call.get("type"), function.get("name"), function.get("arguments"))
    if not all(isinstance(text, str | None) for text in texts) or not isinstance(call.get("index"), int | None):
        raise TypeError
    return _sendable(call)


def _logprobs(given: Any) -> dict[str, Any] | None:
    """Log-probabilities of a piece's tokens.

    Raises:
        AttributeError, TypeError: they are something else.
    """
    found = {key: list(given[key]) for key in ("content", "refusal") if given.get(key)} if given else {}
    return _sendable(found) or None


_UNLIKELY = -9999.0  # what OpenAI's API says for a probability of 0: JSON has no infinity


def _sendable(thing: Any) -> Any:
    """What was read as JSON without what JSON and UTF-8 can't write."""
    if isinstance(thing, dict):
        return {_text(key): _sendable(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [_sendable(value) for value in thing]
    if isinstance(thing, float) and not math.isfinite(thing):
        return _UNLIKELY
    return _text(thing) if isinstance(thing, str) else thing


def _passes(error: BaseException) -> bool:
    """Whether a server may answer the same request a moment later."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in _FOR_NOW or error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    return isinstance(error, openai.APIConnectionError)


_TELLING = 8  # characters


class Numbering:
    """Gives parts of tool calls the index that says which call they belong to, where a server leaves it out."""

    def __init__(self) -> None:
        self._known: list[str | None] = []

    def of(self, calls: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """The parts with their indices: one with an id that was not there yet begins a call."""
        return [self._numbered(call) for call in calls] if calls else calls

    def _numbered(self, call: dict[str, Any]) -> dict[str, Any]:
        if call.get("index") is not None:
            return call
        if not self._known or (call.get("id") and call["id"] not in self._known):
            self._known.append(call.get("id"))
        place = self._known.index(call["id"]) if call.get("id") else len(self._known) - 1
        return call | {"index": place}


class Repetition:
    """Leaves out the beginning of an answer where it repeats what was there already.

    Args:
        begun: what may be repeated; of a word or two it can't be told whether it is.
    """

    def __init__(self, begun: str) -> None:
        self._rest, self._held = begun if len(begun) >= _TELLING else "", ""

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


def _open(expert: Expert, opening: Opening) -> EndpointBackend:
    return EndpointBackend(expert, opening.timeouts)


def _key(expert: Expert) -> str | None:
    # The client's own variable belongs to its default address; an endpoint elsewhere must not receive that key.
    return expert.api_key_env or (None if expert.base_url else "OPENAI_API_KEY")


def _address(expert: Expert) -> str:
    return expert.base_url or "OpenAI"


ENDPOINT = ExpertKind(
    "openai",
    _open,
    fields=("model", "base_url", "api_key_env"),
    remote=True,
    priced=True,
    key=_key,
    address=_address,
    recognises=lambda entry: bool(entry.get("base_url")),
)
KINDS = (ENDPOINT,)
