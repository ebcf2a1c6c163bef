"""The binding of a conversation to the expert of its last answer, and its storage.

An expert that has read a conversation may have its beginning cached, and one that called tools has to read their
results. A session is identified by the id that a client sends. Without an id, it is identified by the beginning of the
conversation (system prompt, tools, first request) and the last answer. Clients send these back unchanged.

The store is the memory of this process, or Redis, which several servers can share.
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

_REMEMBERED = 10_000  # sessions in a process's store
_CACHED_FOR = 300.0  # approximate seconds for which servers cache the beginning of a conversation
_PATIENCE = 1.0  # seconds for a response of Redis: requests are answered without it too


@dataclass(frozen=True)
class Affinity:
    """The binding of a conversation to a candidate.

    Attributes:
        last: Name of the candidate that gave the last answer. None if there is no such answer or it is unknown.
        cached: Approximate number of tokens of the conversation that the candidate has cached.
        open_calls: True if the candidate called tools whose results come now, so that it has to continue.
    """

    last: str | None = None
    cached: int = 0
    open_calls: bool = False

    @classmethod
    def of(
        cls, messages: Sequence[Message], pool: ExpertPool, known: "LastAnswer | None" = None, *, exact: bool = True
    ) -> "Affinity":
        """Return the binding of a conversation.

        Args:
            messages: Conversation. The `name` of an answer is the name of its candidate.
            pool: Candidates.
            known: Stored last answer of the conversation, or None.
            exact: If true, `known` describes the last answer of this conversation. If false, it describes the session,
                in which other conversations may run concurrently.
        """
        if known is None or known.expert not in pool.names:
            last = last_answerer(messages, pool)
            return cls(last, 0, last is not None and is_open_call(messages))
        warm = time.time() - known.at < _CACHED_FOR
        return cls(known.expert, known.tokens if warm else 0, exact and is_open_call(messages))


@dataclass(frozen=True)
class LastAnswer:
    """The stored facts of a conversation's last answer.

    Attributes:
        expert: Name of the candidate that answered.
        tokens: Number of tokens that the candidate has read and written.
        at: Time of the answer, as in `time.time()`.
    """

    expert: str
    tokens: int = 0
    at: float = 0.0


class SessionStore(ABC):
    """A store of last answers by session."""

    @abstractmethod
    async def get(self, key: str) -> LastAnswer | None:
        """Return the last answer of a session, or None."""

    @abstractmethod
    async def put(self, key: str, answered: LastAnswer) -> None:
        """Store the last answer of a session."""

    async def aclose(self) -> None:  # noqa: B027 - a store in this process has no connections
        """Close all connections."""


class ProcessStore(SessionStore):
    """The store in this process's memory, which keeps the newest sessions.

    Args:
        most: Maximum number of sessions.
    """

    def __init__(self, most: int = _REMEMBERED) -> None:
        self._most = most
        self._known: dict[str, LastAnswer] = {}

    async def get(self, key: str) -> LastAnswer | None:
        """Return the last answer of a session, or None."""
        return self._known.get(key)

    async def put(self, key: str, answered: LastAnswer) -> None:
        """Store the last answer of a session, and evict the least recently stored one."""
        self._known.pop(key, None)
        self._known[key] = answered
        if len(self._known) > self._most:
            del self._known[next(iter(self._known))]


class RedisStore(SessionStore):
    """The store in Redis, which several servers share. While Redis is unreachable, all sessions are unknown.

    Args:
        url: URL of the server in redis-py's form (`redis://host:6379/0`, `rediss://`, `unix://`).
        seconds: Seconds to keep a session after its last answer.

    Raises:
        ExpertokenError: The URL is invalid.
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
        """Return the last answer of a session, or None."""
        try:
            found = await self._redis.get(_PREFIX + key)
            return None if found is None else LastAnswer(**json.loads(found))
        except self._failures as error:
            logger.warning("the session store can't be read, the session counts as unknown: %s", type(error).__name__)
            return None

    async def put(self, key: str, answered: LastAnswer) -> None:
        """Store the last answer of a session."""
        try:
            await self._redis.set(_PREFIX + key, json.dumps(asdict(answered)), ex=self._seconds)
        except self._failures as error:
            logger.warning("the session store can't be written, the session is not kept: %s", type(error).__name__)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()


_PREFIX = "expertoken:session:"


def open_store(url: str | None) -> SessionStore:
    """Return the store at a URL, or a store in this process if it is None."""
    return ProcessStore() if url is None else RedisStore(url)


def keys_of(
    messages: Sequence[Message],
    *,
    session: str | None = None,
    scope: str = "",
    tools: Any = None,
) -> list[str]:
    """Return the keys of a conversation's last answer: the answer's own key, then the session's.

    Args:
        messages: Conversation up to and including that answer.
        session: Session id from the client, or None. Agents send one id for several concurrent conversations.
        scope: Namespace of a client. One client must not find another client's sessions.
        tools: Tools of the request.
    """
    asked = next((m.get("content") for m in reversed(messages) if m.get("role") == "user"), None)
    said = next((m for m in reversed(messages) if m.get("role") == "assistant"), {})
    given = said.get("tool_calls")
    calls = [call.get("id") for call in given if isinstance(call, dict)] if isinstance(given, list) else []
    where = _where(messages, session, tools)
    # Agents send calls back unchanged, but may have shortened earlier messages.
    exact = (
        _digest("calls", scope, where, calls) if calls else _digest("turn", scope, where, asked, said.get("content"))
    )
    return [exact] if session is None else [exact, _digest("id", scope, session)]


def key_of_request(
    messages: Sequence[Message], *, session: str | None = None, scope: str = "", tools: Any = None
) -> str:
    """Return the key of the expert that a request was sent to, for a caller that does not send its answer back.

    The conversation's next request has the same messages before its last answer.

    Args:
        messages: Conversation up to its last answer, without that answer.
        session: Session id from the client, or None.
        scope: Namespace of a client.
        tools: Tools of the request.
    """
    last = messages[-1] if messages else {}
    asked = [last.get(name) for name in ("role", "content", "tool_call_id")]
    return _digest("asked", scope, _where(messages, session, tools), asked)


def _where(messages: Sequence[Message], session: str | None, tools: Any) -> list[Any]:
    """Return what identifies a session: its id, or else the beginning of the conversation."""
    if session is not None:
        return [session]
    first = next((place for place, message in enumerate(messages) if message.get("role") == "user"), 0)
    return [[(message.get("role"), message.get("content")) for message in messages[: first + 1]], tools or None]


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
