"""Answers of a composite in the form of OpenAI's API."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...modeling.backend import Piece
from ...modeling.errors import ExpertokenError, NoAnswerError
from ..reply import Reply, ReplyStream, added
from .guard import error_body
from .schema import ChatRequest

T = TypeVar("T")


@dataclass
class Completion:
    """Answers to one request, while they stream and as a whole.

    Attributes:
        request: Request that is answered.
        streams: Streams of the answers, one for each.
        reasons: True if the client may see why an expert failed. Reasons name paths and variables of this machine.
        visible_to: Names of the candidates that this client may see. None for all.
        session: Id of the request's session, as the client sends it. None if the client sends none.
        scope: Scope that separates this client's sessions from other clients' sessions.
    """

    request: ChatRequest
    streams: Sequence[ReplyStream]
    reasons: bool = False
    visible_to: Collection[str] | None = None
    session: str | None = None
    scope: str = ""
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def replies(self) -> list[Reply]:
        """Answers so far."""
        return [stream.reply for stream in self.streams]

    def usage(self) -> dict[str, Any]:
        """Count the tokens. The prompt counts once, however many answers there are."""
        read = max(reply.prompt_tokens for reply in self.replies)
        written = sum(reply.completion_tokens for reply in self.replies)
        usage: dict[str, Any] = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        for reply in self.replies:
            usage |= added({k: v for k, v in usage.items() if k in reply.details}, reply.details)
        return usage

    def shown(self, reply: Reply) -> dict[str, Any]:
        """Return the details of an answer's decision, which a request with `show` gets."""
        failures = reply.failures if self.reasons else dict.fromkeys(reply.failures, "could not answer")
        return {
            "expert": reply.expert,
            "chosen": reply.dispatch.expert,
            "reason": reply.dispatch.reason,
            "probabilities": visible(reply.dispatch.probabilities, self.visible_to),
            "chances": None if reply.dispatch.chances is None else visible(reply.dispatch.chances, self.visible_to),
            "handed_over": _handed_over(reply),
            "failures": failures,
            "skipped": list(reply.skipped),
            "cost": reply.cost,
            "decided_seconds": round(reply.decided, 4),
            "first_piece_seconds": round(reply.first, 4),
            "seconds": round(reply.seconds, 4),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    async def whole(self) -> dict[str, Any]:
        """Return the response, not streamed."""
        collecting = [asyncio.ensure_future(_collect(stream)) for stream in self.streams]
        try:
            collected = await asyncio.gather(*collecting)
        finally:  # a failed answer or a disconnected client ends the other answers too
            for task in collecting:
                task.cancel()
            await asyncio.gather(*collecting, return_exceptions=True)
        choices = [{"index": index, **choice} for index, choice in enumerate(collected)]
        body = self._head("chat.completion") | {"choices": choices, "usage": self.usage()}
        return (
            body | {"expertoken": [self.shown(reply) for reply in self.replies]}
            if self.request.expertoken.show
            else body
        )

    async def events(self, pieces: AsyncGenerator[tuple[int, Piece], None]) -> AsyncGenerator[str, None]:
        """Yield the response as server-sent events, from the numbered pieces of `merged`."""
        head = json.dumps(self._head("chat.completion.chunk"))[:-1]
        begun: set[int] = set()
        try:
            async with aclosing(pieces):
                async for index, piece in pieces:
                    silent = not piece.visible and (piece.finish or piece.thought)
                    delta: dict[str, Any] = {} if silent else {"content": piece.text}
                    if piece.tool_calls:
                        delta = {"tool_calls": piece.tool_calls} | ({"content": piece.text} if piece.text else {})
                    delta |= piece.thought or {}
                    edge = index not in begun or piece.finish
                    if index not in begun:
                        begun.add(index)
                        delta = {"role": "assistant", "content": ""} | delta
                    choice = {"index": index, "delta": delta, "finish_reason": piece.finish}
                    if piece.logprobs:
                        choice["logprobs"] = piece.logprobs
                    more: dict[str, Any] = {"choices": [choice]}
                    if self.request.expertoken.show and edge:  # a thousand probabilities in every chunk are too many
                        more["expertoken"] = self.shown(self.streams[index].reply)
                    yield f"data: {head}, {json.dumps(more)[1:]}\n\n"
            if self.request.include_usage:
                yield f"data: {head}, {json.dumps({'choices': [], 'usage': self.usage()})[1:]}\n\n"
        except ExpertokenError as error:
            # The user has a part of an answer already, so clients look for the error in the stream.
            yield f"data: {json.dumps(error_body(public(error), 'server_error', 'answer_broke_off'))}\n\n"
        yield "data: [DONE]\n\n"


def _handed_over(reply: Reply) -> dict[str, Any] | None:
    """Return the decision inside self's answer that called an expert, or None."""
    if reply.handed_over is None:
        return None
    called = reply.handed_over.expert
    shares = reply.handed_over.probabilities
    return {"expert": called, "after_characters": reply.handed_over_after, "probabilities": shares}


async def merged(streams: Sequence[ReplyStream]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the pieces of several answers as they arrive, each with its answer's number."""
    if len(streams) == 1:
        async with aclosing(streams[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    ready: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue(maxsize=8)

    async def pump(index: int, stream: ReplyStream) -> None:
        try:
            async with aclosing(stream.pieces()) as pieces:
                async for piece in pieces:
                    await ready.put((index, piece))
            await ready.put((index, None))
        except Exception as error:  # every error must reach the consumer, which would wait forever otherwise
            await ready.put((index, error))

    pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            index, received = await ready.get()
            if isinstance(received, Exception):
                raise received
            if received is None:
                running -= 1
            else:
                yield index, received
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _collect(stream: ReplyStream) -> dict[str, Any]:
    """Collect an answer as a choice of the response."""
    calls: dict[int, dict[str, Any]] = {}
    logprobs: list[Any] = []
    async with aclosing(stream.pieces()) as pieces:
        async for piece in pieces:
            for delta in piece.tool_calls or ():
                _add_call(calls, delta)
            logprobs += (piece.logprobs or {}).get("content") or []
    reply = stream.reply
    message: dict[str, Any] = {"role": "assistant", "content": reply.text if reply.text or not calls else None}
    if calls:
        message["tool_calls"] = [calls[place] for place in sorted(calls)]
    message |= reply.thought
    choice = {"message": message, "finish_reason": reply.finish}
    return choice | {"logprobs": {"content": logprobs} if logprobs else None}


def _add_call(calls: dict[int, dict[str, Any]], delta: dict[str, Any]) -> None:
    """Add a delta to its tool call. Names and arguments arrive in parts."""
    call = calls.setdefault(
        delta.get("index", 0), {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
    )
    call["id"] = delta.get("id") or call["id"]
    for key in ("name", "arguments"):
        call["function"][key] += (delta.get("function") or {}).get(key) or ""


def visible(table: Mapping[str, T], names: Collection[str] | None) -> dict[str, T]:
    """Return the entries of a table by candidate that a client may see."""
    return {name: value for name, value in table.items() if names is None or name in names}


def public(error: ExpertokenError) -> str:
    """Return an error's text for a client, without reasons, which may name paths and variables of this machine."""
    return error.public if isinstance(error, NoAnswerError) else str(error)
