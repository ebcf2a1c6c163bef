"""An answer: while it is being given, and as it was given."""

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
        text: what was answered.
        expert: who answered; where one broke off and another went on, the one that went on.
        dispatch: the decision behind it.
        failures: experts that were asked before and failed, with the reason.
        skipped: experts that were not asked, because they failed too often of late.
        finish: why it ended (stop, length, tool_calls, ...); None where it did not come to its end.
        prompt_tokens: that were read.
        completion_tokens: that were written.
        cost: USD, or None where the pool has no price.
        decided: seconds that the decision took.
        first: seconds from the decision to the first piece.
        seconds: from the decision to the end.
        handed_over: the decision inside self's answer by which an expert went on with it, or None.
        handed_over_after: characters that self had written then.
        thought: what the models thought, by the name under which their servers sent it.
        details: further counts of tokens, as servers gave them (`completion_tokens_details`, ...).
        calls: ids of the tool calls in it.
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


class ReplyStream:
    """An answer that is being given: iterate over its pieces of text, with `for` or with `async for`.

    Attributes:
        dispatch: the decision; known from the start.
        reply: what was answered so far.
    """

    _pieces: AsyncGenerator[Piece, None]

    def __init__(self, decision: Decision) -> None:
        self.dispatch = decision.dispatch
        self.reply = Reply("", decision.dispatch.expert, decision.dispatch, decided=decision.seconds)

    @property
    def expert(self) -> str:
        """Who answers; final once the first piece is there, unless it breaks off."""
        return self.reply.expert

    @property
    def failures(self) -> dict[str, str]:
        """Experts that failed so far, with the reason."""
        return self.reply.failures

    def __iter__(self) -> Iterator[str]:
        return (piece.text for piece in BackgroundLoop.iterate(self._pieces) if piece.text)

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        async for piece in self.pieces():
            if piece.text:
                yield piece.text

    def pieces(self) -> AsyncGenerator[Piece, None]:
        """The whole of the answer as it comes: text, tool calls, why it ended."""
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
        dispatch: the decision for that expert.
    """

    dispatch: Dispatch


@dataclass(frozen=True)
class Failed:
    """Outcome of an attempt: no answer, or only a part of one.

    Attributes:
        reason: why, in one line.
        refused: whether the request is at fault and not the candidate.
    """

    reason: str
    refused: bool = False


@dataclass
class Attempt:
    """One candidate's attempt at a turn.

    Attributes:
        name: name of the candidate.
        outcome: how the attempt ended; None until its pieces are through.
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
    """An answer while it comes into being, whoever gives it.

    Attributes:
        stream: that tells it.
        generation: how it was asked for.
        stops: that end it.
        calls: whether it calls tools.
        usage: tokens of the present candidate, where it counts them.
        cached: tokens of its prompt that it had cached, as far as it says so.
        refused: whether all who failed refused the request itself.
    """

    def __init__(self, stream: ReplyStream, generation: Generation) -> None:
        self.stream, self.generation = stream, generation
        self.calls, self.refused = False, True
        self._started = time.perf_counter()
        self.begin(stream.reply.expert)

    def begin(self, name: str) -> None:
        """The next candidate begins, or goes on with what is out."""
        self.stream.reply = replace(self.stream.reply, expert=name)
        self.stops = StopTexts(self.generation.stop)  # what was held back is not out, and is not gone on with
        self.usage: tuple[int, int] | None = None
        self.cached = 0
        self._before = self.stream.reply.details
        self._finish: str | None = None
        self._from = len(self.text)

    @property
    def text(self) -> str:
        """That is out."""
        return self.stream.reply.text

    @property
    def part(self) -> str:
        """The present candidate's part of it."""
        return self.text[self._from :]

    @property
    def begun(self) -> bool:
        """Whether the user has something of it."""
        return bool(self.text) or self.calls

    @property
    def finished(self) -> bool:
        """Whether the present candidate said that it is whole, or a stop text did."""
        return self._finish is not None or self.stops.reached

    @property
    def is_empty(self) -> bool:
        """Whether nothing came where something should have: not where a limit, a filter or a stop text ended it."""
        given = self.begun or self.stops.reached or self.stops.holds
        return not given and self._finish in (None, "stop")

    @property
    def handed_over(self) -> bool:
        """Whether self called for an expert."""
        return self.stream.reply.handed_over is not None

    @property
    def elapsed(self) -> float:
        """Seconds since the decision."""
        return time.perf_counter() - self._started

    def left(self, count: Callable[[str], int]) -> Generation:
        """How the rest is to be generated."""
        if not self.text:
            return self.generation
        used = count(self.text)
        limit = self.generation.max_new_tokens
        return self.generation if limit is None else replace(self.generation, max_new_tokens=max(1, limit - used))

    def take(self, piece: Piece) -> Iterator[Piece]:
        """What of a piece is passed on."""
        self.usage = piece.usage or self.usage
        self._finish = piece.finish or self._finish
        text = self.stops.feed(piece.text)
        if not self.begun and (text or piece.tool_calls):
            self.stream.reply = replace(self.stream.reply, first=self.elapsed)
        self.calls = self.calls or bool(piece.tool_calls)
        reply = self.stream.reply
        if piece.tool_calls:
            ids = (call.get("id") for call in piece.tool_calls)
            reply = replace(reply, calls=tuple(dict.fromkeys((*reply.calls, *filter(None, ids)))))
        if piece.details:
            # Of a server that tells them with every piece the last ones hold.
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
        """The last piece of a whole answer."""
        rest = "" if self.stops.reached else self.stops.rest()
        if rest and not self.begun:
            self.stream.reply = replace(self.stream.reply, first=self.elapsed)
        finish = "stop" if self.stops.reached else self._finish or "stop"
        self.stream.reply = replace(self.stream.reply, text=self.text + rest, finish=finish)
        return Piece(rest, finish=finish, usage=self.usage)
