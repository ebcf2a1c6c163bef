"""What the APIs have in common: each is a way to ask for a completion, and a form in which it is told."""

import json
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from ...modeling.backend import Piece
from .completions import Completion
from .guard import error_body


class Dialect(Protocol):
    """The form in which answers are told."""

    def whole(self, completion: Completion, body: dict[str, Any]) -> dict[str, Any]:
        """Return the response, not streamed.

        Args:
            completion: that is told.
            body: the response as OpenAI's chat API has it.
        """

    def events(
        self, completion: Completion, pieces: AsyncGenerator[tuple[int, Piece], None]
    ) -> AsyncGenerator[str, None]:
        """Yield the response as server-sent events."""

    def broken(self, message: str) -> list[str]:
        """Return the events that end a stream whose answer can't go on."""


class ChatDialect:
    """OpenAI's chat completions."""

    def whole(self, completion: Completion, body: dict[str, Any]) -> dict[str, Any]:
        """Return the response as it is."""
        return body

    def events(
        self, completion: Completion, pieces: AsyncGenerator[tuple[int, Piece], None]
    ) -> AsyncGenerator[str, None]:
        """Yield the response as server-sent events."""
        return completion.events(pieces)

    def broken(self, message: str) -> list[str]:
        """Return the events that end a stream whose answer can't go on."""
        body = json.dumps(error_body(message, "server_error", "answer_broke_off"))
        return [f"data: {body}\n\n", "data: [DONE]\n\n"]


CHAT = ChatDialect()


def event(body: Any) -> str:
    """Return a named server-sent event of a library's model of it."""
    return f"event: {body.type}\ndata: {body.model_dump_json(exclude_unset=True)}\n\n"
