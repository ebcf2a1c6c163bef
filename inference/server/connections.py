"""HTTP connections with timeouts, so that an idle client can't hold one open."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADERS = 20.0  # seconds for the headers of a request
UNREAD = 60.0  # seconds until a client that does not read its response is disconnected

_Protocol: Any = AutoHTTPProtocol  # uvicorn's class, which depends on the installed packages


class Connection(_Protocol):
    """uvicorn's connection, with timeouts for headers that do not arrive and for responses that are not read.

    In uvicorn itself only connections that are idle between two requests have a timeout.
    """

    # Two timers, since a client can send without reading and read without sending.
    _headers: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the timer for the first request's headers."""
        super().connection_made(transport)
        self._headers = self._after(HEADERS)

    def data_received(self, data: bytes) -> None:
        """Run the timer for the rest of the headers, unless a request is being answered."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            _stop(self._headers)
            self._headers = None
        elif self._headers is None:  # a byte now and then does not restart the timer
            self._headers = self._after(HEADERS)

    def pause_writing(self) -> None:
        """Start the timer for a client that reads more slowly than the server writes."""
        super().pause_writing()
        _stop(self._unread)
        self._unread = self._after(UNREAD)

    def resume_writing(self) -> None:
        """Stop the timer, since the client has read."""
        super().resume_writing()
        _stop(self._unread)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both timers."""
        _stop(self._headers)
        _stop(self._unread)
        super().connection_lost(exc)

    def _after(self, seconds: float) -> asyncio.TimerHandle:
        # `close` would wait until the client has read the data that is already written.
        return asyncio.get_running_loop().call_later(seconds, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
