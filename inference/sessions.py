"""What binds a conversation to the expert that gave its last answer, and where that is remembered.

An expert that has read a conversation may have its beginning cached, and one that called tools has to read their
results. A session is found by the id that a client sends. Where it sends none, it is found by how the conversation
begins (system prompt, tools, first request) and what was said last: clients send that back as they got it.

The memory is this process's own, or Redis, by which several servers agree.
"""

import hashlib
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..modeling.chat import Message
from ..modeling.errors import ExpertokenError, one_line, require_extra
from ..modeling.policy import last_answerer
from ..modeling.pool import ExpertPool
from ..modeling.reminders import is_open_call

logger = logging.getLogger(__name__)

_REMEMBERED = 10_000  # sessions of a process
_CACHED_FOR = 300.0  # seconds for which servers keep the beginning of a conversation, about
_PATIENCE = 1.0  # seconds for an answer of Redis: a request is answered without it, too


@dataclass(frozen=True)
class Affinity:
    """What binds a conversation to a candidate.

    Attributes:
        last: name of the candidate that gave the last answer; None where nobody did, or nobody knows.
        cached: tokens of the conversation that it has cached, about.
        open_calls: whether it called tools whose results come now, so that it has to go on.
    """

    last: str | None = None
    cached: int = 0
    open_calls: bool = False

    @classmethod
    def of(
        cls, messages: Sequence[Message], pool: ExpertPool, known: "LastAnswer | None" = None, *, exact: bool = True
    ) -> "Affinity":
        """Return what binds a conversation.

        Args:
            messages: the conversation; `name` of an answer says who gave it.
            pool: the candidates.
            known: what is remembered of the conversation.
            exact: whether that is of its last answer, and not only of the session, in which others may go on beside.
        """
        if known is None or known.expert not in pool.names:
            last = last_answerer(messages, pool)
            return cls(last, 0, last is not None and is_open_call(messages))
        warm = time.time() - known.at < _CACHED_FOR
        return cls(known.expert, known.tokens if warm else 0, exact and is_open_call(messages))


@dataclass(frozen=True)
class LastAnswer:
    """What is remembered of a conversation.

    Attributes:
        expert: name of who answered.
        tokens: that it has read and written.
        at: when, as `time.time()` says.
    """

    expert: str
    tokens: int = 0
    at: float = 0.0


class SessionStore(ABC):
    """Remembers who answered last."""

    @abstractmethod
    async def get(self, key: str) -> LastAnswer | None:
        """Return what is known of a session, or None."""

    @abstractmethod
    async def put(self, key: str, answered: LastAnswer) -> None:
        """Remember who answered."""

    async def aclose(self) -> None:  # noqa: B027 - a process's own memory holds nothing open
        """Close what is held open."""


class ProcessStore(SessionStore):
    """The memory of this process: the newest sessions.

    Args:
        most: sessions that are kept.
    """

    def __init__(self, most: int = _REMEMBERED) -> None:
        self._most = most
        self._known: dict[str, LastAnswer] = {}

    async def get(self, key: str) -> LastAnswer | None:
        """Return what is known of a session, or None."""
        return self._known.get(key)

    async def put(self, key: str, answered: LastAnswer) -> None:
        """Remember who answered; what was used longest ago is forgotten."""
        self._known.pop(key, None)
        self._known[key] = answered
        if len(self._known) > self._most:
            del self._known[next(iter(self._known))]


class RedisStore(SessionStore):
    """Redis, which several servers share. Where it can't be reached, a session is one that nobody knows.

    Args:
        url: of the server, as redis-py reads it (`redis://host:6379/0`, `rediss://`, `unix://`).
        seconds: for which a session is kept after its last answer.

    Raises:
        ExpertokenError: the URL is none.
        ImportError: redis-py is not installed.
    """

    def __init__(self, url: str, seconds: int = 86_400) -> None:
        require_extra("redis", "redis")
        from redis.asyncio import Redis
        from redis.exceptions import RedisError

        try:
            self._redis: Any = Redis.from_url(url, socket_timeout=_PATIENCE, socket_connect_timeout=_PATIENCE)
        except ValueError as error:
            raise ExpertokenError(f"session store: expected redis://host:port/number ({one_line(error)})") from None
        self._seconds, self._failures = seconds, (RedisError, OSError, ValueError, TypeError)

    async def get(self, key: str) -> LastAnswer | None:
        """Return what is known of a session, or None."""
        try:
            found = await self._redis.get(_PREFIX + key)
            return None if found is None else LastAnswer(**json.loads(found))
        except self._failures as error:
            logger.warning("the session store can't be read: %s", type(error).__name__)
            return None

    async def put(self, key: str, answered: LastAnswer) -> None:
        """Remember who answered."""
        try:
            await self._redis.set(_PREFIX + key, json.dumps(asdict(answered)), ex=self._seconds)
        except self._failures as error:
            logger.warning("the session store can't be written: %s", type(error).__name__)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()


_PREFIX = "expertoken:session:"


def open_store(url: str | None) -> SessionStore:
    """Return the store of a URL, or the process's own where None."""
    return ProcessStore() if url is None else RedisStore(url)


def keys_of(
    messages: Sequence[Message],
    *,
    session: str | None = None,
    scope: str = "",
    tools: Any = None,
) -> list[str]:
    """Return the keys under which a conversation's last answer is remembered: of that answer, then of the session.

    Args:
        messages: the conversation up to that answer, the answer included.
        session: the id that the client sent, or None. Agents send one id for conversations that run beside each other.
        scope: what keeps clients apart: one must not find out another's sessions.
        tools: of the request.
    """
    first = next((place for place, message in enumerate(messages) if message.get("role") == "user"), 0)
    beginning = [(message.get("role"), message.get("content")) for message in messages[: first + 1]]
    asked = next((m.get("content") for m in reversed(messages) if m.get("role") == "user"), None)
    said = next((m for m in reversed(messages) if m.get("role") == "assistant"), {})
    given = said.get("tool_calls")
    calls = [call.get("id") for call in given if isinstance(call, dict)] if isinstance(given, list) else []
    where = [session] if session is not None else [beginning, tools or None]
    # Agents send calls back as they got them; what was said and asked before they may have shortened.
    exact = (
        _digest("calls", scope, where, calls) if calls else _digest("turn", scope, where, asked, said.get("content"))
    )
    return [exact] if session is None else [exact, _digest("id", scope, session)]


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
