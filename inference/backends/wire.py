"""The wire format of endpoints: responses with a size limit, read as events, and converted to pieces of an answer."""

import math
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import cache
from http import HTTPStatus
from typing import Any

from ...modeling.backend import Piece, as_usage
from ...modeling.errors import ExpertFailedError

_NO_ANSWER = "expected a chunk of an answer from the endpoint, got something else"
_BROKEN = ("error", "abort")  # finish reasons of an incomplete answer
_OURS = ("max_tokens", "stream_options", "top_p", "temperature", "seed")  # parameters that a server may refuse
_SHORTER = ("context length", "context_length", "context window", "too large", "completion tokens")
_MOST_TOKENS = 2**53  # tokens, far above any real count

DONE = object()
"""Marker of `[DONE]` among the chunks of an answer."""
_MOST_BYTES = 64 * 2**20  # limit on one response
_EVENT_BYTES = 4 * 2**20  # limit on one chunk of an answer
_ERROR_BYTES = 64 * 2**10  # limit on an error response


@cache
def events_of(stream: Any) -> Any:
    """Return a client's stream of events that accepts the variants that servers send.

    Events without data (`retry:`, pings) are skipped, `[DONE]` is passed on, and the size of an event is limited.

    Args:
        stream: The client's stream class.
    """

    class Events(stream):
        async def _bytes(self) -> AsyncGenerator[bytes, None]:
            held = 0
            async for part in self.response.aiter_bytes():
                end = part.rfind(b"\n\n")
                held = len(part) - end if end >= 0 else held + len(part)
                if held > _EVENT_BYTES or len(part) > _EVENT_BYTES:
                    raise ExpertFailedError(
                        f"expected chunks of at most {_EVENT_BYTES:,} bytes from the endpoint, got a longer one"
                    )
                yield part

        async def __stream__(self) -> AsyncGenerator[object, None]:
            async for event in self._decoder.aiter_bytes(self._bytes()):
                if event.data.startswith("[DONE]"):
                    yield DONE
                    return
                if event.data.strip():
                    yield event.json()

    return Events


@cache
def bounded(client: Any) -> Any:
    """Return an HTTP client that limits the size of responses.

    Args:
        client: Class of the client.
    """

    class Bounded(client):
        async def send(self, request: Any, **how: Any) -> Any:
            response = await super().send(request, **(how | {"stream": True}))
            failed = response.status_code >= HTTPStatus.MULTIPLE_CHOICES
            if failed:  # a compressed error may unpack to any size
                response.headers.pop("content-encoding", None)
            raw, most = response.aiter_raw, _ERROR_BYTES if failed else _MOST_BYTES

            async def limited(chunk_size: int | None = None) -> AsyncGenerator[bytes, None]:
                seen = 0
                async for part in raw(chunk_size):
                    seen += len(part)
                    if seen > most:
                        if failed:  # enough to identify the error
                            return
                        raise ExpertFailedError(f"expected at most {most:,} bytes from the endpoint, got more")
                    yield part

            response.aiter_raw = limited
            if not how.get("stream"):
                await response.aread()
            return response

    return Bounded


def piece_of(chunk: Any, unicode: "Unicode") -> Piece:
    """Return the piece that a chunk holds.

    Chunks are read as plain JSON, because creating the client's classes took a fifth of the server's time.

    Raises:
        ExpertFailedError: The chunk is no chunk of an answer.
    """
    try:
        counts = chunk.get("usage") or {}
        usage = as_usage((counts.get("prompt_tokens"), counts.get("completion_tokens")))
        details = _details(counts)
        if chunk.get("error") is not None:
            raise ExpertFailedError("the endpoint reported an error in its answer")
        choices = chunk.get("choices")
        if choices is None and usage is None:
            raise ExpertFailedError(_NO_ANSWER)
        if not choices:
            return Piece(usage=usage, details=details)
        delta = choices[0].get("delta") or {}
        finish = choices[0].get("finish_reason") or None
        stopped_by = choices[0].get("stop_reason") or choices[0].get("matched_stop")  # vLLM, SGLang: a text or an id
        if finish in _BROKEN:
            raise ExpertFailedError(f"the endpoint ended its answer with {finish!r}")
        text, thinking = _parts(delta.get("content"))
        thought = {name: _text(delta[name]) for name in _THOUGHTS if delta.get(name)}
        if thinking:
            thought[_THOUGHTS[0]] = thought.get(_THOUGHTS[0], "") + _text(thinking)
        return Piece(
            text=unicode.joined(text or delta.get("refusal") or "", last=finish is not None),
            tool_calls=[_call(call) for call in delta.get("tool_calls") or ()] or _function(delta) or None,
            logprobs=_logprobs(choices[0].get("logprobs")),
            finish=None if finish is None else _text(finish),
            usage=usage,
            thought=thought or None,
            details=details,
            stopped_by=stopped_by if isinstance(stopped_by, str) else None,
        )
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise ExpertFailedError(_NO_ANSWER) from error


_THOUGHTS = ("reasoning_content", "reasoning")
_DETAILS = ("prompt_tokens_details", "completion_tokens_details")


def _details(counts: dict[str, Any]) -> dict[str, dict[str, int]] | None:
    """Return the valid counts beside the usage."""
    found = {}
    for group in _DETAILS:
        given = counts.get(group)
        entries = given.items() if isinstance(given, dict) else ()
        known = {_text(name): n for name, n in entries if type(n) is int and 0 <= n < _MOST_TOKENS}
        if known:
            found[group] = known
    return found or None


def _parts(content: Any) -> tuple[str, str]:
    """Return the text and the thought of a content, which some servers send as a list of parts.

    Raises:
        AttributeError, TypeError: The content has another form.
    """
    if not isinstance(content, list):
        return content or "", ""
    text = thought = ""
    for part in content:
        if part.get("type") == "thinking":
            thought += _parts(part.get("thinking"))[0]
        else:
            text += part.get("text") or ""
    return text, thought


def _function(delta: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Convert a call in OpenAI's older form (`function_call`) to the current one (`tool_calls`)."""
    given = delta.get("function_call")
    if not given:
        return None
    return [
        _call(
            {"index": 0, "type": "function", "function": dict(given)} | ({"id": "call_0"} if given.get("name") else {})
        )
    ]


def refused_parameter(body: Any) -> str | None:
    """Return the optional parameter that an error reports as unknown, or None."""
    given = _error_of(body)
    message = str(given.get("message") or "")
    quoted = (name for name in _OURS if f"'{name}'" in message or f"`{name}`" in message or f'"{name}"' in message)
    return given.get("param") if given.get("param") in _OURS else next(quoted, None)


def wants_shorter(body: Any) -> bool:
    """Return whether an error reports that conversation and answer together exceed the context."""
    given = _error_of(body)
    told = f"{given.get('code')} {given.get('message')}".lower()
    return any(words in told for words in _SHORTER)


def _error_of(body: Any) -> dict[str, Any]:
    given = body.get("error", body) if isinstance(body, dict) else {}
    return given if isinstance(given, dict) else {}


class Allowance:
    """A limit on the length of an answer, in case the server ignores its own.

    Args:
        most: Limit in characters, thought and calls included. Each piece counts one more.
    """

    def __init__(self, most: int) -> None:
        self._left = most

    @property
    def spent(self) -> bool:
        """True if the limit is exceeded."""
        return self._left < 0

    def of(self, piece: Piece) -> Piece:
        """Return the part of a piece that is within the limit."""
        self._left -= 1 + _characters(piece)
        if not self.spent:
            return piece
        text = piece.text[: max(0, len(piece.text) + self._left)]
        return replace(piece, text=text, finish=piece.finish or "length")


def _characters(piece: Piece) -> int:
    thought = sum(map(len, (piece.thought or {}).values()))
    return len(piece.text) + thought + sum(len(str(call)) for call in piece.tool_calls or ())


def _text(given: str) -> str:
    """Replace unpaired surrogates in a text, which can't be encoded.

    Raises:
        AttributeError: The value is no text.
    """
    return given.encode("utf-8", "replace").decode()


class Unicode:
    """A joiner of surrogate pairs that a server split between two chunks."""

    def __init__(self) -> None:
        self._half = ""

    def joined(self, text: str, *, last: bool) -> str:
        """Return the next part of the text.

        Half of a pair at its end is held back for the next part, and lost if there is none.
        """
        if not self._half and text.isascii():
            return text
        text = self._half + text
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" and not last else ""
        return text[: len(text) - len(self._half)].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _call(call: Any) -> dict[str, Any]:
    """Return a part of a tool call.

    Raises:
        AttributeError, TypeError: The value has another form.
    """
    function = call.get("function") or {}
    texts = (call.get("id"), call.get("type"), function.get("name"), function.get("arguments"))
    if not all(isinstance(text, str | None) for text in texts) or not isinstance(call.get("index"), int | None):
        raise TypeError
    return sendable(call)


def _logprobs(given: Any) -> dict[str, Any] | None:
    """Return the log-probabilities of a piece's tokens.

    Raises:
        AttributeError, TypeError: The value has another form.
    """
    found = {key: list(given[key]) for key in ("content", "refusal") if given.get(key)} if given else {}
    return sendable(found) or None


_UNLIKELY = -9999.0  # OpenAI's value for a probability of 0, because JSON has no infinity


def sendable(thing: Any) -> Any:
    """Return parsed JSON without values that JSON and UTF-8 can't encode."""
    if isinstance(thing, dict):
        return {_text(key): sendable(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [sendable(value) for value in thing]
    if isinstance(thing, float) and not math.isfinite(thing):
        return _UNLIKELY
    return _text(thing) if isinstance(thing, str) else thing


_TELLING = 8  # characters: shorter texts may repeat by chance


class Numbering:
    """The numbering of tool calls, for servers that omit the index of a call's parts."""

    def __init__(self) -> None:
        self._known: list[str | None] = []

    def of(self, calls: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Return the parts with their indices. A part with a new id starts a call."""
        return [self._numbered(call) for call in calls] if calls else calls

    def _numbered(self, call: dict[str, Any]) -> dict[str, Any]:
        if call.get("index") is not None:
            return call
        if not self._known or (call.get("id") and call["id"] not in self._known):
            self._known.append(call.get("id"))
        place = self._known.index(call["id"]) if call.get("id") else len(self._known) - 1
        return call | {"index": place}


class Repetition:
    """A filter that removes the beginning of an answer if it repeats the partial answer before it.

    Args:
        begun: Partial answer that may be repeated. Texts under 8 characters are too short to recognise.
    """

    def __init__(self, begun: str) -> None:
        self._rest, self._held = begun if len(begun) >= _TELLING else "", ""

    def without(self, text: str, *, last: bool = False) -> str:
        """Return the next part of the answer, without the repetition.

        A part that may belong to a repetition is held back until it is certain.
        """
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
