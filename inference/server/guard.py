"""What stands before every request: keys, and limits of body, rate and concurrency."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import anyio
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from .keys import KeyRing
from .prometheus import Metrics
from .settings import Settings, is_elsewhere, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

logger = logging.getLogger("expertoken.requests")

_PATIENCE = 10.0  # seconds between two parts of a body
_WHOLE = 60.0  # seconds for all of a body
_ANSWERS = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/route", "/v1/messages/count_tokens",
            "/v1/feedback")  # fmt: skip
_RENDER = "/render"  # what the page shows: limited as what is answered, but none of that
_ANTHROPIC = "/v1/messages"


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API has it."""
    message = message.encode("utf-8", "replace").decode()  # it may quote half a surrogate, which can't be sent
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def anthropic_error(message: str, status: int) -> dict[str, Any]:
    """An error as Anthropic's API has it."""
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def _in_anthropics_form(send: Send) -> Send:
    """Return a `send` that makes errors of OpenAI's form, wherever they come from, into Anthropic's."""
    held: MutableMapping[str, Any] | None = None

    async def reshaping(message: MutableMapping[str, Any]) -> None:
        nonlocal held
        if message["type"] == "http.response.start" and message["status"] >= 400:
            held = message
            return
        if held is None:
            await send(message)
            return
        start, held = held, None  # an error is one body
        told = json.loads(message.get("body") or b"{}").get("error") or {}
        content = json.dumps(anthropic_error(str(told.get("message")), start["status"])).encode()
        headers = [item for item in start["headers"] if item[0].lower() != b"content-length"]
        length = (b"content-length", str(len(content)).encode())
        await send({**start, "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": content})

    return reshaping


class Guard:
    """ASGI middleware.

    Args:
        app: what is guarded.
        settings: keys and limits.
        metrics: are told how requests end.
        open_paths: what is told to whoever asks: the page's own files, and what watches a service, which has no key.
        stopping: returns whether the server is being stopped.
        keys: returns the API keys, which may be read anew while the server runs.
    """

    def __init__(
        self,
        app: Callable,
        settings: Settings,
        metrics: Metrics,
        open_paths: Collection[str],
        stopping: Callable[[], bool],
        keys: Callable[[], KeyRing],
    ) -> None:
        self.app, self.settings, self.metrics, self.open_paths = app, settings, metrics, open_paths
        self._stopping, self._keys = stopping, keys
        self._running = 0
        self._rate = None if settings.rate is None else RateLimitItemPerMinute(settings.rate)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        # Behind a prefix (a mount, a proxy's root path) the router takes it off, so it is taken off here.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith(_ANTHROPIC):
            send = _in_anthropics_form(send)
        if path in self.open_paths:
            await self.app(scope, receive, send)
            return
        keys = self._keys()
        if not keys and not self._is_from_here(scope, headers):
            # Without keys only this machine may ask. By a name of its own, or from where it is, a foreign page could
            # get here in a browser.
            told = "without API keys this server answers on loopback only; --allow-host NAME lets another name in"
            await _refuse(send, 403, error_body(told, "invalid_request_error"))
            return
        key = key_of(headers)
        client = keys.find(key)
        if keys and client is None:
            body = error_body("no valid API key was given", "invalid_request_error", "invalid_api_key")
            await (self._turn_away if path in _ANSWERS else _refuse)(send, 401, body)
            return
        scope.setdefault("state", {})["client"] = client
        if path not in (*_ANSWERS, _RENDER):
            await self.app(scope, receive, send)
            return
        who = key if keys else (scope.get("client") or ("",))[0]
        await self._answer(scope, receive, send, headers, who or "")

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], who: str) -> None:
        """A request for an answer, within its limits."""
        counted = scope["path"].removeprefix(scope.get("root_path", "")) != _RENDER
        if counted and self._rate is not None and not self._limiter.hit(self._rate, who):
            told = f"more than {self.settings.rate} requests in a minute"
            until = self._limiter.get_window_stats(self._rate, who).reset_time
            wait = max(1, math.ceil(until - time.time()))
            await self._turn_away(send, 429, error_body(told, "rate_limit_error", "rate_limited"), retry=wait)
            return
        if not headers.get("content-type", "").lower().startswith("application/json"):
            body = error_body("expected content-type: application/json", "invalid_request_error")
            await self._turn_away(send, 415, body)
            return
        most = self.settings.max_body
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            await _discard(receive, 4 * most)
            await self._turn_away(send, 413, _too_large(most))
            return
        if self._running >= self.settings.max_concurrent:
            body = error_body("too many requests at a time; come again", "overloaded_error", "overloaded")
            await self._turn_away(send, 503, body, retry=1)
            return
        scope["state"]["counted"] = counted
        await self._admitted(scope, receive, send)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request that takes one of the places, while its body comes and while it is answered."""
        most = self.settings.max_body
        read, status, complete, begun = 0, 500, False, False
        broken: int | None = None  # what the application makes of half a body is not what it was
        deadline = anyio.current_time() + _WHOLE
        state = scope.setdefault("state", {})

        async def limited() -> MutableMapping[str, Any]:
            nonlocal read, complete, broken
            if complete:
                return await receive()
            try:
                # Who sends slowly holds a place that others wait for.
                with anyio.fail_after(max(0.0, min(_PATIENCE, deadline - anyio.current_time()))):
                    message = await receive()
            except TimeoutError:
                broken = 408
                raise _BrokenBodyError from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body")
            if read > most:  # a body that is sent in chunks does not tell its length
                broken = 413
                raise _BrokenBodyError
            return message

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status, begun
            if broken is not None:
                return
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
            await send(message)

        self._running += 1
        self.metrics.in_flight.inc()
        try:
            with suppress(_BrokenBodyError):
                await self.app(scope, limited, noting)
            status = broken or status
            if broken == 413:
                await _discard(receive, 4 * most)
                await _refuse(send, 413, _too_large(most))
            elif broken == 408:
                told = f"the body did not come: it may pause for {_PATIENCE:g} s and take {_WHOLE:g} s"
                await _refuse(send, 408, error_body(told, "invalid_request_error"))
        except asyncio.CancelledError:
            if not self._stopping() or begun:
                raise
            # The server stops, and this request had its time: that is said, and is no crash.
            status = 503
            body = error_body("the server was stopped before the answer was there", "server_error", "stopped")
            await _refuse(send, status, body)
        finally:
            self._running -= 1
            self.metrics.in_flight.dec()
            self._note(status, logged=state.get("logged", False), counted=state.get("counted", True))

    async def _turn_away(self, send: Send, status: int, body: dict[str, Any], retry: int | None = None) -> None:
        """Refuse a request for an answer."""
        self._note(status)
        await _refuse(send, status, body, retry)

    def _note(self, status: int, *, logged: bool = False, counted: bool = True) -> None:
        """Count a request for an answer, and write its line where nobody could who knows more of it."""
        if not counted:
            return
        self.metrics.requests.labels(str(int(status))).inc()  # an `HTTPStatus` has another text before Python 3.11
        if not logged:
            logger.info(json.dumps({"time": round(time.time(), 3), "status": status}))

    def _is_from_here(self, scope: Scope, headers: dict[str, str]) -> bool:
        """Whether who asks, a browser's page, and the name by which it asks are this machine's own."""
        client = scope.get("client")
        if client and is_elsewhere(client[0]) and not self.settings.hosts:
            return False  # whatever it says of itself
        origin = headers.get("origin")
        if origin and origin not in self.settings.origins and not self._is_local(_name_of(origin)):
            return False
        return self._is_local(headers.get("host", ""))

    def _is_local(self, host: str) -> bool:
        name = (host if host.endswith("]") else host.rsplit(":", 1)[0]).lower()
        return is_loopback(name.strip("[]")) or name in (self.settings.host, *self.settings.hosts)


def _name_of(origin: str) -> str:
    """Host and port of an origin; nothing where it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


async def _discard(receive: Receive, most: int) -> None:
    """Read on for a while and keep nothing: who is cut off while sending sees a broken connection, and not why."""
    read = 0
    with anyio.move_on_after(_PATIENCE):  # for all of it
        while read < most:
            message = await receive()
            read += len(message.get("body", b""))
            if not message.get("more_body"):
                return


def _too_large(most: int) -> dict[str, Any]:
    return error_body(f"the body is larger than {most} bytes", "invalid_request_error", "too_large")


class _BrokenBodyError(Exception):
    """A body went over its limit while it was read, or stopped coming."""


def key_of(headers: Mapping[str, str]) -> str | None:
    """Return the API key of a request: a bearer's, or under `x-api-key` as Anthropic's clients send it."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    bearer = key.strip() if kind.lower() == "bearer" else ""
    return bearer or headers.get("x-api-key", "").strip() or None


async def _refuse(send: Send, status: int, body: dict[str, Any], retry: int | None = None) -> None:
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if retry is not None:
        headers.append((b"retry-after", str(retry).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
