"""Answers as a sequence of blocks: reasoning, text and tool calls. Two of the APIs have this form."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from ...modeling.backend import Piece


@dataclass(frozen=True)
class Opened:
    """Start of a block.

    Attributes:
        kind: Kind of its content.
        id: Id of a call.
        name: Name of a called function.
    """

    kind: Literal["thought", "text", "call"]
    id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Added:
    """More content of the open block: text, or a call's arguments as JSON."""

    text: str


@dataclass(frozen=True)
class Closed:
    """End of the open block."""


Step = Opened | Added | Closed


def thought_of(told: Mapping[str, Any]) -> str | None:
    """Return the reasoning in a message or delta. Servers use one of two names for it, or both."""
    return told.get("reasoning_content") or told.get("reasoning")


class Blocks:
    """Converter of pieces to blocks. A call that begins before the open one ends is held back until that end."""

    def __init__(self) -> None:
        self._open: str | None = None  # a kind, or `call` and the call's index
        self._waiting: dict[int, list[Added]] = {}
        self._begun: dict[int, Opened] = {}
        self._late: list[str] = []

    def of(self, piece: Piece) -> list[Step]:
        """Return the steps that a piece adds."""
        steps: list[Step] = []
        if thought := thought_of(piece.thought or {}):
            steps += self._text("thought", thought)
        if piece.text:
            steps += self._text("text", piece.text)
        for call in piece.tool_calls or ():
            steps += self._call(call)
        return steps

    def end(self) -> list[Step]:
        """Return the steps that remain after the last piece."""
        steps: list[Step] = [] if self._open is None else [Closed()]
        for index, added in self._waiting.items():
            steps += [self._begun[index], *added, Closed()]
        if self._late:
            steps += [Opened("text"), Added("".join(self._late)), Closed()]
        self._open, self._waiting, self._late = None, {}, []
        return steps

    def _text(self, kind: Literal["thought", "text"], text: str) -> list[Step]:
        if self._open is not None and self._open.startswith("call"):
            if kind == "text":  # the open call may continue, and must not be split in two
                self._late.append(text)
            return []
        if self._open == kind:
            return [Added(text)]
        closing: list[Step] = [] if self._open is None else [Closed()]
        self._open = kind
        return [*closing, Opened(kind), Added(text)]

    def _call(self, call: dict) -> list[Step]:
        index, function = call.get("index") or 0, call.get("function") or {}
        arguments = [Added(function["arguments"])] if function.get("arguments") else []
        if self._open == f"call {index}":
            return [*arguments]
        if index not in self._begun:
            opened = Opened("call", call.get("id") or f"call_{index}", function.get("name") or "")
            self._begun[index] = opened
            if self._open is None or not self._open.startswith("call"):
                closing: list[Step] = [] if self._open is None else [Closed()]
                self._open = f"call {index}"
                return [*closing, opened, *arguments]
        self._waiting.setdefault(index, []).extend(arguments)
        return []


async def steps_of(pieces: AsyncGenerator[tuple[int, Piece], None]) -> AsyncGenerator[Step, None]:
    """Yield the steps of an answer. Its pieces carry the answer's number, which is always 0 here."""
    blocks = Blocks()
    async with aclosing(pieces):
        async for _, piece in pieces:
            for step in blocks.of(piece):
                yield step
    for step in blocks.end():
        yield step
