"""Answers as server-sent events, which begin with the first piece and end in every case."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ...modeling.backend import Piece
from .completions import Completion, merged
from .dialect import CHAT, Dialect
from .guard import GONE
from .schema import ChatRequest
from .service import STOPPED, Service, status_of

T = TypeVar("T")

_SILENCE = 10.0  # seconds without an event until a comment keeps proxies and browsers connected


async def answered(service: Service, request: ChatRequest, http: Request, dialect: Dialect = CHAT) -> Response:
    """Answer a conversation.

    Args:
        service: Shared state of the routes.
        request: Conversation and options of its answer.
        http: HTTP request.
        dialect: Form of the answer.
    """
    started, completion = time.time(), None
    service.begin(http)
    try:
        completion = await unless_gone(service.answer(request, http), http)
        if completion is None:
            service.log(None, request, GONE, started, http)
            return Response(status_code=GONE)
        if request.stream:
            return await _streamed(service, completion, dialect, started, http)
        body = await unless_gone(completion.whole(), http)
        for reply in completion.replies if body is not None else ():
            await service.remember(completion, reply)
        told = None if body is None else dialect.whole(completion, body)
        response = JSONResponse(told, headers=service.headers(completion, http))
    except BaseException as error:
        service.log(completion, request, status_of(error), started, http)
        raise
    await service.finish(completion, GONE if body is None else 200, started, http)
    service.trace(completion)
    return response


async def _streamed(
    service: Service, completion: Completion, dialect: Dialect, started: float, http: Request
) -> Response:
    """Return a streamed response. It begins with the first piece, so that an earlier error fails the whole request.

    If that piece takes long (a model that reasons), the response begins before it.
    """
    pieces = merged(completion.streams)
    coming = asyncio.ensure_future(anext(pieces))
    begun = False
    try:
        told = await unless_gone(asyncio.wait([coming], timeout=_SILENCE), http)
        if told is None:
            await service.finish(completion, GONE, started, http)
            return Response(status_code=GONE)
        if coming.done():
            coming.result()  # raises the error of the first piece
        begun = True
    finally:
        if not begun:
            await _ended(coming, pieces)

    async def all_pieces() -> AsyncGenerator[tuple[int, Piece], None]:
        found: tuple[int, Piece] | None = await coming
        while found is not None:
            index, piece = found
            if piece.finish is not None:  # before the client gets it and sends its next request
                await service.remember(completion, completion.replies[index])
            yield index, piece
            found = await anext(pieces, None)

    status = GONE

    async def events() -> AsyncGenerator[str, None]:
        nonlocal status
        async with aclosing(dialect.events(completion, all_pieces())) as told:
            async for event in told:
                yield event
        service.trace(completion)
        status = 200

    async def end(*, stopped: bool) -> None:
        await _ended(coming, pieces)
        await service.finish(completion, STOPPED if stopped else status, started, http)

    return _Events(events(), end, service, dialect, service.headers(completion, http))


_CUT_OFF = "the server was stopped before the answer was complete"


class _Events(StreamingResponse):
    """Response of server-sent events whose end is recorded even if the client disconnects before the first event.

    While there is no event (a model reasons, or is loaded to continue), comments keep proxies from closing the
    connection.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        end: Callable[..., Awaitable[None]],
        service: Service,
        dialect: Dialect,
        headers: dict[str, str],
    ) -> None:
        headers = headers | {"cache-control": "no-cache", "x-accel-buffering": "no"}
        self._events = events
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._end, self._service, self._dialect = end, service, dialect

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        said, commenting, stopped = 0.0, None, False

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal said, commenting
            said = time.monotonic()
            if commenting is None:
                commenting = asyncio.ensure_future(comment())
            if message["type"] == "http.response.body" and not message.get("more_body"):
                commenting.cancel()
            await send(message)

        async def comment() -> None:
            while True:
                await asyncio.sleep(max(0.0, said + _SILENCE - time.monotonic()))
                if time.monotonic() - said >= _SILENCE:
                    await noting({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})

        try:
            await super().__call__(scope, receive, noting)
        except asyncio.CancelledError:
            if not self._service.draining:
                raise
            stopped = True
            # The server stops and the answer's grace period is over: an error to report, not a crash.
            for body in (*self._dialect.broken(_CUT_OFF), ""):
                await noting({"type": "http.response.body", "body": body.encode(), "more_body": bool(body)})
        finally:
            if commenting is not None:
                commenting.cancel()
            with anyio.CancelScope(shield=True):
                await self._events.aclose()
                await self._end(stopped=stopped)


async def _ended(coming: asyncio.Future, pieces: AsyncGenerator) -> None:
    """End an answer that has begun, in whatever state it is."""
    coming.cancel()
    await asyncio.gather(coming, return_exceptions=True)
    await pieces.aclose()


async def unless_gone(answer: Awaitable[T], http: Request) -> T | None:
    """Return an answer or its first piece, or None if the client disconnects first, which ends the generation."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
