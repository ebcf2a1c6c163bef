"""An answer, in progress and complete."""

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..modeling.backend import Generation, Piece
from ..modeling.dispatch import Dispatch
from ..modeling.stops import StopTexts
from .decider import Decision
from .loop import BackgroundLoop


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: Text of the answer.
        expert: Name of the candidate that answered. After a fallback or a hand-over, the last one.
        dispatch: Decision behind the answer.
        failures: Reasons of failure by expert, for experts that were tried before.
        skipped: Experts that were skipped because they failed too often recently.
        finish: Reason of the end (stop, length, tool_calls, ...), or None for an incomplete answer.
        prompt_tokens: Number of tokens read.
        completion_tokens: Number of tokens written.
        cost: Cost in USD, or None if the pool has no price.
        decided: Seconds that the decision took.
        first: Seconds from the decision to the first piece.
        seconds: Seconds from the decision to the end.
        handed_over: Decision inside self's answer by which an expert continued it, or None.
        handed_over_after: Number of characters that self had written before.
        thought: Thought of the models, by the field in which their servers sent it.
        details: Further token counts from servers (`completion_tokens_details`, ...).
        calls: Ids of the tool calls in the answer.
        stopped_by: Stop text of the request that ended the answer, or None.
    """

    text: str
    expert: str
    dispatch: Dispatch
    failures: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    finish: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    decided: float = 0.0
    first: float = 0.0
    seconds: float = 0.0
    handed_over: Dispatch | None = None
    handed_over_after: int = 0
    thought: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    calls: tuple[str, ...] = ()
    stopped_by: str | None = None


class ReplyStream:
    """An answer in progress: iterate over its pieces of text, with `for` or with `async for`.

    Attributes:
        dispatch: Decision, known from the start.
        reply: Answer so far.
    """

    _pieces: AsyncGenerator[Piece, None]

    def __init__(self, decision: Decision) -> None:
        self.dispatch = decision.dispatch
        self.reply = Reply("", decision.dispatch.expert, decision.dispatch, decided=decision.seconds)

    @property
    def expert(self) -> str:
        """Name of the candidate that answers. Final after the first piece, unless the candidate fails later."""
        return self.reply.expert

    @property
    def failures(self) -> dict[str, str]:
        """Reasons of failure by expert, so far."""
        return self.reply.failures

    def __iter__(self) -> Iterator[str]:
        return (piece.text for piece in BackgroundLoop.iterate(self._pieces) if piece.text)

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        async for piece in self.pieces():
            if piece.text:
                yield piece.text

    def pieces(self) -> AsyncGenerator[Piece, None]:
        """Return the pieces of the answer as they arrive: text, tool calls, the reason of the end."""
        return self._pieces

    def close(self) -> None:
        """Stop generating."""
        BackgroundLoop.close(self._pieces)

    async def aclose(self) -> None:
        """Stop generating."""
        await self._pieces.aclose()


@dataclass(frozen=True)
class Whole:
    """Outcome of an attempt: the answer is whole."""


@dataclass(frozen=True)
class HandedOver:
    """Outcome of an attempt: self stopped in its answer for an expert to continue it.

    Attributes:
        dispatch: Decision for that expert.
    """

    dispatch: Dispatch


@dataclass(frozen=True)
class Failed:
    """Outcome of an attempt: no answer, or only a part of one.

    Attributes:
        reason: Reason in one line.
        refused: True if the request is at fault and not the candidate.
    """

    reason: str
    refused: bool = False


@dataclass
class Attempt:
    """One candidate's attempt at a turn.

    Attributes:
        name: Name of the candidate.
        outcome: Outcome of the attempt. None until its pieces are complete.
    """

    name: str
    outcome: Whole | HandedOver | Failed | None = None


def added(known: Mapping[str, Mapping[str, int]], more: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return the sum of two sets of counts by group and name."""
    groups = dict.fromkeys([*known, *more])
    found = {}
    for group in groups:
        one, other = known.get(group, {}), more.get(group, {})
        found[group] = {name: one.get(name, 0) + other.get(name, 0) for name in dict.fromkeys([*one, *other])}
    return found


class Turn:
    """An answer in progress, across all candidates that contribute to it.

    Attributes:
        stream: Stream that publishes the answer.
        generation: Options of the request.
        stops: Stop texts of the answer.
        calls: True if the answer calls tools.
        usage: Prompt and completion tokens of the current candidate, if its backend counts them.
        cached: Number of prompt tokens that the current candidate had cached, if its server reports them.
        refused: True if all candidates that failed refused the request itself.
    """

    def __init__(self, stream: ReplyStream, generation: Generation) -> None:
        self.stream, self.generation = stream, generation
        self.calls, self.refused = False, True
        self._started = time.perf_counter()
        self.begin(stream.reply.expert)

    def begin(self, name: str) -> None:
        """Start the next candidate, which may continue the text already sent."""
        self.stream.reply = replace(self.stream.reply, expert=name)
        self.stops = StopTexts(self.generation.stop)  # text held back was not sent, so no candidate continues it
        self.usage: tuple[int, int] | None = None
        self.cached = 0
        self._before = self.stream.reply.details
        self._finish: str | None = None
        self._stopped_by: str | None = None
        self._from = len(self.text)

    @property
    def text(self) -> str:
        """Text already sent to the user."""
        return self.stream.reply.text

    @property
    def part(self) -> str:
        """The current candidate's part of the text."""
        return self.text[self._from :]

    @property
    def begun(self) -> bool:
        """True if a part of the answer was already sent to the user."""
        return bool(self.text) or self.calls

    @property
    def finished(self) -> bool:
        """True if the current candidate reported its end, or a stop text ended it."""
        return self._finish is not None or self.stops.reached

    @property
    def is_empty(self) -> bool:
        """True if the answer is empty without a limit, a filter or a stop text as the reason.

        Most servers do not report which stop text ended an answer, so an end at once may be one.
        """
        given = self.begun or self.stops.reached or self.stops.holds
        may_be_stopped = self._finish == "stop" and bool(self.generation.stop)
        return not given and not may_be_stopped and self._finish in (None, "stop")

    @property
    def handed_over(self) -> bool:
        """True if self called for an expert."""
        return self.stream.reply.handed_over is not None

    @property
    def elapsed(self) -> float:
        """Seconds since the decision."""
        return time.perf_counter() - self._started

    def left(self, count: Callable[[str], int]) -> Generation:
        """Return the options for the rest of the answer."""
        if not self.text:
            return self.generation
        used = count(self.text)
        limit = self.generation.max_new_tokens
        return self.generation if limit is None else replace(self.generation, max_new_tokens=max(1, limit - used))

    def take(self, piece: Piece) -> Iterator[Piece]:
        """Yield the part of a piece that is sent to the user."""
        self.usage = piece.usage or self.usage
        self._finish = piece.finish or self._finish
        if piece.stopped_by in self.generation.stop:
            self._stopped_by = piece.stopped_by
        text = self.stops.feed(piece.text)
        if not self.begun and (text or piece.tool_calls):
            self.stream.reply = replace(self.stream.reply, first=self.elapsed)
        self.calls = self.calls or bool(piece.tool_calls)
        reply = self.stream.reply
        if piece.tool_calls:
            ids = (call.get("id") for call in piece.tool_calls)
            reply = replace(reply, calls=tuple(dict.fromkeys((*reply.calls, *filter(None, ids)))))
        if piece.details:
            # If a server sends counts with every piece, the last ones are valid.
            self.cached = piece.details.get("prompt_tokens_details", {}).get("cached_tokens", 0)
            reply = replace(reply, details=added(self._before, piece.details))
        if piece.thought:
            known = reply.thought
            more = {name: known.get(name, "") + part for name, part in piece.thought.items()}
            reply = replace(reply, thought={**known, **more})
        self.stream.reply = replace(reply, text=self.text + text)
        if text or piece.tool_calls or piece.logprobs or piece.thought:
            yield replace(piece, text=text, finish=None, usage=None, details=None)

    def end(self) -> Piece:
        """Return the last piece of a whole answer."""
        rest = "" if self.stops.reached else self.stops.rest()
        if rest and not self.begun:
            self.stream.reply = replace(self.stream.reply, first=self.elapsed)
        finish = "stop" if self.stops.reached else self._finish or "stop"
        stopped = self.stops.found or self._stopped_by
        self.stream.reply = replace(self.stream.reply, text=self.text + rest, finish=finish, stopped_by=stopped)
        return Piece(rest, finish=finish, usage=self.usage)
