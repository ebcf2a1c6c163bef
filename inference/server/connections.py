"""HTTP connections that nobody can hold open for nothing."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADERS = 20.0  # seconds that the headers of a request may take
UNREAD = 60.0  # seconds that a response waits for a client that does not read it

_Protocol: Any = AutoHTTPProtocol  # of uvicorn; which class that is depends on what is installed


class Connection(_Protocol):
    """uvicorn's connection, with limits on headers that do not come and on responses that nobody reads.

    uvicorn has a limit on connections that are idle between two requests, and no other one.
    """

    # Apart: a client that sends goes on without reading, and the other way round.
    _headers: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._headers = self._after(HEADERS)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of the headers, as long as no request is being answered."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            _stop(self._headers)
            self._headers = None
        elif self._headers is None:  # a byte now and then does not prolong it
            self._headers = self._after(HEADERS)

    def pause_writing(self) -> None:
        """Wait for a client that reads more slowly than it is written to."""
        super().pause_writing()
        _stop(self._unread)
        self._unread = self._after(UNREAD)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        super().resume_writing()
        _stop(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the waiting."""
        _stop(self._headers)
        _stop(self._unread)
        super().connection_lost(exc)

    def _after(self, seconds: float) -> asyncio.TimerHandle:
        # Not `close`, which would wait until the client has read what is written already.
        return asyncio.get_running_loop().call_later(seconds, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
