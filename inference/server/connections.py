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

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._start(HEADERS)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of the headers, as long as no request is being answered."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:  # a byte now and then does not prolong it
            self._start(HEADERS)

    def pause_writing(self) -> None:
        """Wait for a client that reads more slowly than it is written to."""
        super().pause_writing()
        self._start(UNREAD)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        super().resume_writing()
        self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the waiting."""
        self._stop()
        super().connection_lost(exc)

    def _start(self, seconds: float) -> None:
        self._stop()
        # Not `close`, which would wait until the client has read what is written already.
        self._timer = asyncio.get_running_loop().call_later(seconds, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
