"""OpenAI-compatible endpoints, through the `openai` client."""

import asyncio
import logging
import math
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from ...modeling.backend import REQUEST_HEADERS, Backend, Generation, Opening, Piece, Timeouts
from ...modeling.chat import Message
from ...modeling.errors import ExpertFailedError, RequestRefusedError
from ...modeling.experts import Expert, ExpertKind
from ...modeling.pictures import as_urls
from .addresses import Address, Addresses, mistakes, told
from .wire import (
    DONE,
    Allowance,
    Numbering,
    Repetition,
    Unicode,
    bounded,
    events_of,
    piece_of,
    refused_parameter,
    wants_shorter,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from tenacity import AsyncRetrying

T = TypeVar("T")

logger = logging.getLogger(__name__)

REQUESTS = (400, 413, 422)  # status codes for a fault of the request
_FOR_NOW = (408, 409, 429)
_MOST_TOKENS = 2**17  # limit on an answer without a limit of its own
_CHARACTERS = 32  # most characters of an average token: an answer with more ignores its limit
_CERTAIN = 0.01  # a log-probability is at most 0, apart from rounding
_SHARE = 0.8  # share of the time for the first piece that the addresses divide among themselves
_CHECK = 5.0  # seconds to list the models
_STOPS = 4  # most stop texts that OpenAI's API accepts
_OPENAI = "//api.openai.com"
_OPENAI_ADDRESS = f"https:{_OPENAI}/v1"
_GO_ON = {"continue_final_message": True, "add_generation_prompt": False}


class EndpointBackend(Backend):
    """A model behind an HTTP address.

    Args:
        expert: Expert with `model`, and `base_url` and `api_key_env` if needed.
        timeouts: Timeouts of requests. Defaults to `Timeouts()`. The expert's own options take precedence.

    Attributes:
        retries: Number of retried requests.

    Raises:
        ExpertFailedError: The environment variable of the key is not set.
    """

    def __init__(self, expert: Expert, timeouts: Timeouts | None = None) -> None:
        import openai  # noqa: F401 - takes half a second, which the first request must not wait for

        self.expert = expert
        self.timeouts = replace(timeouts or Timeouts(), **expert.options.get("timeouts") or {})
        self.retries: int = 0
        self._key = expert.api_key()
        self._refused: set[str] = set()  # parameters that this server does not know
        # A client's connections belong to one event loop.
        self._clients: dict[tuple[asyncio.AbstractEventLoop, str], AsyncOpenAI] = {}
        self.addresses = Addresses(expert, _OPENAI_ADDRESS)  # the client's default would be an environment variable
        self._lock = threading.Lock()

    def client(self, address: Address | None = None) -> "AsyncOpenAI":
        """Return this event loop's client for an address, or for a picked address if it is None."""
        import openai

        address = address or self.addresses.pick()
        key = (asyncio.get_running_loop(), address.url)
        with self._lock:
            self._clients = {known: client for known, client in self._clients.items() if not known[0].is_closed()}
            if key not in self._clients:
                limits = self.timeouts
                timeout = openai.Timeout(max(limits.first, limits.idle), connect=limits.connect)
                client = openai.AsyncOpenAI(
                    api_key=self._key,
                    base_url=address.url,
                    timeout=timeout,
                    max_retries=0,  # see `asking`: the client would obey a Retry-After of a minute
                    # A conversation goes to the pool's address only, and never to a redirect's.
                    http_client=bounded(openai.DefaultAsyncHttpxClient)(follow_redirects=False, timeout=timeout),
                )
                # The client would take these from environment variables, which may belong to another server.
                client.organization = client.project = None
                headers = self.expert.options.get("headers") or {}
                client._custom_headers = headers | {"Accept-Encoding": "identity"}  # unpacked content has no size limit
                self._clients[key] = client
            return self._clients[key]

    @property
    def addresses_up(self) -> dict[str, bool]:
        """State of each of several addresses: true if it responded to its last check."""
        return {address.url: address.up for address in self.addresses.all} if len(self.addresses) > 1 else {}

    async def check_addresses(self) -> None:
        """Check each of several addresses by listing its models.

        An address that does not respond gets no requests until it does.
        """
        if len(self.addresses) > 1:
            await asyncio.gather(*map(self._check, self.addresses.all))

    async def _check(self, address: Address) -> None:
        import openai

        was, why = address.up, ""
        try:
            with anyio.fail_after(_CHECK):
                await self.client(address).models.list()
            address.up = True
        except (TimeoutError, openai.APIConnectionError) as error:
            address.up, why = False, type(error).__name__
        except openai.APIStatusError as error:  # the server runs: some servers list no models
            address.up = error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR
            why = str(error.status_code)
        except Exception as error:  # any response shows that the server runs
            address.up, why = True, type(error).__name__
        if address.up and not was:
            address.breaker.succeeded()
            logger.warning("%s: %s is up again", self.expert.name, address.url)
        elif was and not address.up:
            logger.warning("%s: %s is down (%s), requests go to other addresses", self.expert.name, address.url, why)

    @property
    def asking(self) -> "AsyncRetrying":
        """Caller that retries a function after a temporary refusal or a failed connection, with a short pause.

        The pause is short whatever the server requests, because another expert may answer instead.
        """
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

        pause = wait_random_exponential(multiplier=0.5, max=2)
        attempts = stop_after_attempt(len(self.addresses) + self.timeouts.retries)

        def count(_: Any) -> None:
            self.retries += 1

        again = retry_if_exception(_passes)
        return AsyncRetrying(retry=again, wait=pause, stop=attempts, before_sleep=count, reraise=True)

    async def first_token(self, messages: Sequence[Message], candidates: int) -> "FirstToken":
        """Return the most probable first tokens of an answer.

        Args:
            messages: Conversation to answer.
            candidates: Number of tokens to request.

        Raises:
            RequestRefusedError: The endpoint refuses the conversation.
            ExpertFailedError: The endpoint fails, or returns no log-probabilities.
        """
        import openai

        limit = self.timeouts.first
        tried: list[Address] = []
        request = {"model": self.expert.model, "messages": list(messages), "max_tokens": 1, "temperature": 0.0}

        async def ask() -> Any:
            async def create(client: "AsyncOpenAI") -> Any:
                asking: Any = client.chat.completions.create
                headers = dict(REQUEST_HEADERS.get())
                return await asking(**request, logprobs=True, top_logprobs=candidates, extra_headers=headers)

            return await self._at(tried, create)

        try:
            with anyio.fail_after(limit):
                answer: Any = await self.asking(ask)
            tried[-1].breaker.succeeded()
            top = answer.choices[0].logprobs.content[0].top_logprobs
            found = [(entry.token or "", getattr(entry, "id", None), float(entry.logprob)) for entry in top]
        except openai.APIStatusError as error:
            kind = RequestRefusedError if error.status_code in REQUESTS else ExpertFailedError
            raise kind(f"its endpoint answered {error.status_code}") from error
        except TimeoutError as error:
            raise ExpertFailedError(f"its endpoint sent nothing within {limit:g} s") from error
        except UnicodeError as error:  # raised by the client, which can't encode the request
            raise RequestRefusedError("the request holds text that can't be encoded") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ExpertFailedError("its endpoint returns no log-probabilities") from error
        except Exception as error:
            raise ExpertFailedError(f"its endpoint could not be used ({type(error).__name__})") from error
        if any(math.isnan(value) or value > _CERTAIN for _, _, value in found):
            raise ExpertFailedError("its endpoint returns log-probabilities above 0 or NaN")
        read = answer.usage.prompt_tokens if answer.usage else None
        return FirstToken(
            {text: value for text, _, value in found if text},
            {place: value for _, place, value in found if isinstance(place, int)},
            tuple(place if isinstance(place, int) else None for text, place, _ in found if not text),
            read,
        )

    def _options(self, generation: Generation) -> dict[str, Any]:
        # OpenAI's newer models refuse the older name. Other servers know the older one only.
        own = any(_OPENAI in address.url for address in self.addresses.all) or "max_tokens" in self._refused
        asked = {
            "max_completion_tokens" if own else "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "seed": generation.seed,
            "stop": list(generation.stop[:_STOPS]) or None,  # the caller applies the others to the answer
        }
        fixed = {"model": self.expert.model, "stream": True, "stream_options": {"include_usage": True}}
        options = dict(generation.extra) | {key: value for key, value in asked.items() if value is not None} | fixed
        return {name: value for name, value in options.items() if name not in self._refused}

    async def stream(
        self, messages: Sequence[Message], generation: Generation, *, begun: str = ""
    ) -> AsyncGenerator[Piece, None]:
        """Stream the answer in pieces. A partial answer is sent as the assistant's last message.

        Servers continue it if they support `continue_final_message` (vLLM) or do so by default. If a server starts over
        and repeats the partial answer, the repetition is removed.

        Raises:
            RequestRefusedError: The endpoint refuses the conversation.
            ExpertFailedError: The endpoint fails, or its answer ends early.
        """
        import openai

        given = as_urls(messages)
        if begun:
            given.append({"role": "assistant", "content": begun})
        told = finished = False
        # Seconds spent waiting for the endpoint since its last output, without the time that the reader takes.
        began, waited, limit = anyio.current_time(), 0.0, self.timeouts.first
        allowance = Allowance(_CHARACTERS * (generation.max_new_tokens or _MOST_TOKENS))
        repetition, numbering, unicode = Repetition(begun), Numbering(), Unicode()
        chunks: Any = None
        tried: list[Address] = []
        try:
            with anyio.fail_after(self.timeouts.first):
                chunks = await self.asking(self._begin, given, generation, tried, going_on=bool(begun))
            pieces = aiter(chunks)
            waited = anyio.current_time() - began
            while True:
                began = anyio.current_time()
                with anyio.fail_after(max(0.0, limit - waited)):
                    chunk = await anext(pieces, None)
                waited += anyio.current_time() - began
                if chunk is None or chunk is DONE:
                    finished = finished or chunk is DONE  # some servers end without a finish reason
                    break
                piece = piece_of(chunk, unicode)
                # Some models stream their thought for minutes before their first word, and count as alive.
                if piece.visible or piece.thought:
                    tried[-1].breaker.succeeded()
                    told, waited, limit = True, 0.0, self.timeouts.idle
                # Keep-alive chunks before the first word do not use up the limit.
                piece = allowance.of(piece) if told else piece
                finished = finished or piece.finish is not None
                text = repetition.without(piece.text, last=piece.finish is not None)
                yield replace(piece, text=text, tool_calls=numbering.of(piece.tool_calls))
                if allowance.spent:
                    break  # the endpoint ignores its limit, and may never end
            if not finished:  # a connection that was cut between two chunks looks like an end
                raise ExpertFailedError("the endpoint's answer was cut off")
        except ExpertFailedError:
            raise
        except openai.APIStatusError as error:
            kind = RequestRefusedError if error.status_code in REQUESTS else ExpertFailedError
            raise kind(f"the endpoint answered {error.status_code}") from error
        except (TimeoutError, openai.APITimeoutError) as error:
            _note_hung(tried, error)
            stopped = f"sent nothing more for {self.timeouts.idle:g} s"
            what = stopped if told else f"sent nothing within {self.timeouts.first:g} s"
            raise ExpertFailedError(f"the endpoint {what}") from error
        except Exception as error:  # during a stream, errors of the client's HTTP library are not wrapped
            # Only the type is reported: the client's messages can quote requests, including their headers.
            raise ExpertFailedError(f"the endpoint could not be used ({type(error).__name__})") from error
        finally:
            if chunks is not None:
                with anyio.CancelScope(shield=True):
                    await chunks.close()

    async def _at(self, tried: list[Address], ask: "Callable[[AsyncOpenAI], Awaitable[T]]") -> T:
        """Send a request to one of the addresses, add the address to `tried`, and record a failure.

        A silent address leaves time for the other addresses.
        """
        import openai

        address = self.addresses.pick({one.url for one in tried})
        tried.append(address)
        share = _SHARE * self.timeouts.first / len(self.addresses) if len(self.addresses) > 1 else None
        try:
            with anyio.fail_after(share):
                return await ask(self.client(address))
        except TimeoutError as error:
            address.breaker.failed()
            raise _SilentError from error
        except BaseException as error:
            at_fault = isinstance(error, openai.OpenAIError | OSError) and _passes(error)
            address.breaker.failed() if at_fault else address.breaker.left()
            raise

    async def _begin(
        self, messages: list[Message], generation: Generation, tried: list[Address], *, going_on: bool
    ) -> Any:
        """Send the request to an address that was not `tried` yet, if there is one."""
        return await self._at(tried, partial(self._begin_at, messages, generation, going_on))

    async def _begin_at(
        self, messages: list[Message], generation: Generation, going_on: bool, client: "AsyncOpenAI"
    ) -> Any:
        """Send the request.

        The request is repeated without a parameter that the server does not know, and without the parameters that
        request a continuation.
        """
        import openai

        limited = generation.max_new_tokens is not None
        events = events_of(openai.AsyncStream[object])
        headers: Any = {"headers": dict(REQUEST_HEADERS.get())}
        ask = partial(client.post, "/chat/completions", cast_to=object, stream=True, stream_cls=events, options=headers)
        while True:
            body = self._options(generation) | {"messages": messages}
            try:
                if going_on:
                    with suppress(openai.BadRequestError, openai.UnprocessableEntityError):
                        return await ask(body=body | _GO_ON)
                return await ask(body=body)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if limited and wants_shorter(error.body):
                    # The limit exceeds the context left after the conversation, which only the endpoint can count.
                    limited, generation = False, replace(generation, max_new_tokens=None)
                    continue
                refused = refused_parameter(error.body)
                asked_for = {name for name in ("temperature", "top_p", "seed") if getattr(generation, name) is not None}
                if refused is None or refused in self._refused or refused in asked_for:
                    raise
                self._refused.add(refused)
            except (TypeError, ValueError) as error:  # the client can't encode the request: no fault of the expert
                raise RequestRefusedError("the request holds a value that JSON or Unicode can't encode") from error


@dataclass(frozen=True)
class FirstToken:
    """The most probable first tokens of an answer.

    Attributes:
        logprobs: Log-probability by the token's text. Servers sometimes omit the text of added tokens.
        by_id: Log-probability by the token's id, if the endpoint returns ids.
        unnamed: Ids of tokens without a text. None for a token without an id.
        prompt_tokens: Number of tokens of the conversation, if the endpoint counts them.
    """

    logprobs: dict[str, float]
    by_id: dict[int, float]
    unnamed: tuple[int | None, ...]
    prompt_tokens: int | None


class _SilentError(TimeoutError):
    """The silence of one of several addresses during its share of the time."""


def _note_hung(tried: Sequence[Address], error: Exception) -> None:
    """Record that an address hangs, unless it is already recorded."""
    if tried and not isinstance(error, _SilentError):
        tried[-1].breaker.failed()


def _passes(error: BaseException) -> bool:
    """Check whether a server may answer the same request a moment later."""
    import openai

    if isinstance(error, _SilentError):
        return True
    if isinstance(error, openai.APIStatusError):
        return error.status_code in _FOR_NOW or error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    return isinstance(error, openai.APIConnectionError)


def _open(expert: Expert, opening: Opening) -> EndpointBackend:
    return EndpointBackend(expert, opening.timeouts)


def _key(expert: Expert) -> str | None:
    # The client's own variable belongs to its default address. Another endpoint must not receive that key.
    elsewhere = expert.base_url or expert.options.get("addresses")
    return expert.api_key_env or (None if elsewhere else "OPENAI_API_KEY")


ENDPOINT = ExpertKind(
    "openai",
    _open,
    fields=("model", "base_url", "api_key_env", "addresses", "timeouts", "headers"),
    remote=True,
    priced=True,
    key=_key,
    address=told,
    check=mistakes,
    recognises=lambda entry: bool(entry.get("base_url") or entry.get("addresses")),
)
KINDS = (ENDPOINT,)
