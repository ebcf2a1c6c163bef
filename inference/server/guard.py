"""Checks of every request before the routes: keys, and limits of body size, rate and concurrency."""

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

_PATIENCE = 10.0  # seconds between two chunks of a body
_WHOLE = 60.0  # seconds for a whole body
_ANSWERS = ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/route", "/v1/messages/count_tokens",
            "/v1/feedback")  # fmt: skip
GONE = 499
"""Status of a request whose client disconnected, as nginx logs it. No client receives it."""

_RENDER = "/render"  # the page's Markdown: limited like a request for an answer, but not counted as one
_ANTHROPIC = "/v1/messages"


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error in the form of OpenAI's API."""
    message = message.encode("utf-8", "replace").decode()  # it may quote a lone surrogate, which UTF-8 can't encode
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
    """Return an error in the form of Anthropic's API."""
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def _in_anthropics_form(send: Send) -> Send:
    """Return a `send` that converts errors from OpenAI's form to Anthropic's, wherever they arise."""
    held: MutableMapping[str, Any] | None = None

    async def reshaping(message: MutableMapping[str, Any]) -> None:
        nonlocal held
        if message["type"] == "http.response.start" and message["status"] >= 400:
            held = message
            return
        if held is None:
            await send(message)
            return
        start, held = held, None  # an error's body is one message
        told = json.loads(message.get("body") or b"{}").get("error") or {}
        content = json.dumps(anthropic_error(str(told.get("message")), start["status"])).encode()
        headers = [item for item in start["headers"] if item[0].lower() != b"content-length"]
        length = (b"content-length", str(len(content)).encode())
        await send({**start, "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": content})

    return reshaping


class Guard:
    """ASGI middleware that checks keys and limits.

    Args:
        app: Guarded application.
        settings: Keys and limits.
        metrics: Metrics that count the requests by status.
        open_paths: Paths that need no key: the page's own files, and health checks by monitoring, which has no key.
        stopping: Function that returns true while the server is being stopped.
        keys: Function that returns the API keys, which may be reloaded while the server runs.
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
        """Pass a request on, or reject it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        # The router strips a prefix (a mount, a proxy's root path), so the guard strips it too.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.startswith(_ANTHROPIC):
            send = _in_anthropics_form(send)
        if path in self.open_paths:
            await self.app(scope, receive, send)
            return
        keys = self._keys()
        if not keys and not self._is_from_here(scope, headers):
            # Without keys only this machine may send requests. Through a browser a foreign page could send them too,
            # from its own origin or under a host name that it points at this machine.
            told = "without API keys this server answers on loopback only. Set keys, or use --allow-host NAME."
            await _refuse(send, 403, error_body(told, "invalid_request_error"))
            return
        key = key_of(headers)
        client = keys.find(key)
        if keys and client is None:
            body = error_body(
                "expected a valid API key as bearer token or x-api-key", "invalid_request_error", "invalid_api_key"
            )
            await (self._turn_away if path in _ANSWERS else _refuse)(send, 401, body)
            return
        scope.setdefault("state", {})["client"] = client
        if path not in (*_ANSWERS, _RENDER):
            await self.app(scope, receive, send)
            return
        who = key if keys else (scope.get("client") or ("",))[0]
        await self._answer(scope, receive, send, headers, who or "")

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], who: str) -> None:
        """Check the limits of a request for an answer, and pass it on."""
        counted = scope["path"].removeprefix(scope.get("root_path", "")) != _RENDER
        if counted and self._rate is not None and not self._limiter.hit(self._rate, who):
            told = f"expected at most {self.settings.rate} requests a minute. Retry after the time in Retry-After."
            until = self._limiter.get_window_stats(self._rate, who).reset_time
            wait = max(1, math.ceil(until - time.time()))
            await self._turn_away(send, 429, error_body(told, "rate_limit_error", "rate_limited"), retry=wait)
            return
        if not headers.get("content-type", "").lower().startswith("application/json"):
            body = error_body("expected the header content-type: application/json", "invalid_request_error")
            await self._turn_away(send, 415, body)
            return
        most = self.settings.max_body
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > most:
            await _discard(receive, 4 * most)
            await self._turn_away(send, 413, _too_large(most))
            return
        if self._running >= self.settings.max_concurrent:
            body = error_body("too many requests at a time. Retry in a second.", "overloaded_error", "overloaded")
            await self._turn_away(send, 503, body, retry=1)
            return
        scope["state"]["counted"] = counted
        await self._admitted(scope, receive, send)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request that holds a concurrency slot, from the arrival of its body to the end of its answer."""
        most = self.settings.max_body
        read, status, complete, begun = 0, 500, False, False
        broken: int | None = None  # status for an incomplete body, in place of the application's response to it
        deadline = anyio.current_time() + _WHOLE
        state = scope.setdefault("state", {})

        async def limited() -> MutableMapping[str, Any]:
            nonlocal read, complete, broken
            if complete:
                return await receive()
            try:
                # A slow client holds a slot that other requests need.
                with anyio.fail_after(max(0.0, min(_PATIENCE, deadline - anyio.current_time()))):
                    message = await receive()
            except TimeoutError:
                broken = 408
                raise _BrokenBodyError from None
            read += len(message.get("body", b""))
            complete = not message.get("more_body")
            if read > most:  # a chunked body comes without its length
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
                told = f"expected the body within {_WHOLE:g} s and with pauses of at most {_PATIENCE:g} s"
                await _refuse(send, 408, error_body(told, "invalid_request_error"))
        except asyncio.CancelledError:
            if not self._stopping() or begun:
                status = status if begun else GONE
                raise
            # The server stops and the request's grace period is over: an error to report, not a crash.
            status = 503
            body = error_body("the server was stopped before the answer was complete", "server_error", "stopped")
            await _refuse(send, status, body)
        finally:
            self._running -= 1
            self.metrics.in_flight.dec()
            self._note(status, logged=state.get("logged", False), counted=state.get("counted", True))

    async def _turn_away(self, send: Send, status: int, body: dict[str, Any], retry: int | None = None) -> None:
        """Reject a request for an answer, and count it."""
        self._note(status)
        await _refuse(send, status, body, retry)

    def _note(self, status: int, *, logged: bool = False, counted: bool = True) -> None:
        """Count a request for an answer. Log a short line about it, unless the service logged a full one."""
        if not counted:
            return
        self.metrics.requests.labels(str(int(status))).inc()  # the text of an `HTTPStatus` differs before Python 3.11
        if not logged:
            logger.info(json.dumps({"time": round(time.time(), 3), "status": status}))

    def _is_from_here(self, scope: Scope, headers: dict[str, str]) -> bool:
        """Check whether the client, a browser page's origin and the requested host are this machine's own."""
        client = scope.get("client")
        if client and is_elsewhere(client[0]) and not self.settings.hosts:
            return False  # whatever its headers claim
        origin = headers.get("origin")
        if origin and origin not in self.settings.origins and not self._is_local(_name_of(origin)):
            return False
        return self._is_local(headers.get("host", ""))

    def _is_local(self, host: str) -> bool:
        name = (host if host.endswith("]") else host.rsplit(":", 1)[0]).lower()
        return is_loopback(name.strip("[]")) or name in (self.settings.host, *self.settings.hosts)


def _name_of(origin: str) -> str:
    """Return the host and port of an origin, or an empty string if it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


async def _discard(receive: Receive, most: int) -> None:
    """Read and drop the rest of a body for a while.

    A client that is cut off while it sends sees a broken connection instead of the error.
    """
    read = 0
    with anyio.move_on_after(_PATIENCE):  # for the whole rest
        while read < most:
            message = await receive()
            read += len(message.get("body", b""))
            if not message.get("more_body"):
                return


def _too_large(most: int) -> dict[str, Any]:
    return error_body(
        f"expected a body of at most {most} bytes. Shorten the conversation.", "invalid_request_error", "too_large"
    )


class _BrokenBodyError(Exception):
    """Error of a body that exceeded its limit while it was read, or stopped arriving."""


def key_of(headers: Mapping[str, str]) -> str | None:
    """Return the API key of a request: a bearer token, or `x-api-key` as Anthropic's clients send it."""
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
