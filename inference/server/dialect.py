"""Interface that the APIs share. Each has a request that becomes a completion, and a form of its answers."""

import json
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from ...modeling.backend import Piece
from .completions import Completion
from .guard import error_body


class Dialect(Protocol):
    """Form of an API's answers."""

    def whole(self, completion: Completion, body: dict[str, Any]) -> dict[str, Any]:
        """Return the response, not streamed.

        Args:
            completion: Answers to the request.
            body: Response in the form of OpenAI's chat API.
        """

    def events(
        self, completion: Completion, pieces: AsyncGenerator[tuple[int, Piece], None]
    ) -> AsyncGenerator[str, None]:
        """Yield the response as server-sent events."""

    def broken(self, message: str) -> list[str]:
        """Return the events that end a stream whose answer can't continue."""


class ChatDialect:
    """Form of OpenAI's chat completions."""

    def whole(self, completion: Completion, body: dict[str, Any]) -> dict[str, Any]:
        """Return the response unchanged."""
        return body

    def events(
        self, completion: Completion, pieces: AsyncGenerator[tuple[int, Piece], None]
    ) -> AsyncGenerator[str, None]:
        """Yield the response as server-sent events."""
        return completion.events(pieces)

    def broken(self, message: str) -> list[str]:
        """Return the events that end a stream whose answer can't continue."""
        body = json.dumps(error_body(message, "server_error", "answer_broke_off"))
        return [f"data: {body}\n\n", "data: [DONE]\n\n"]


CHAT = ChatDialect()


def event(body: Any) -> str:
    """Return a named server-sent event from a library's model of it."""
    return f"event: {body.type}\ndata: {body.model_dump_json(exclude_unset=True)}\n\n"
