"""The circuit breaker that skips experts after repeated failures."""

import threading
import time
from collections.abc import Callable


class Breaker:
    """The circuit breaker of one expert.

    Args:
        failures: Number of consecutive failures that opens the breaker.
        pause: Seconds until one request may try again, doubled after each failed trial.
        longest: Longest pause in seconds.
        clock: Clock in seconds.
    """

    def __init__(
        self,
        failures: int = 3,
        pause: float = 10.0,
        longest: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._pause, self._longest, self._clock = failures, pause, longest, clock
        self._lock = threading.Lock()
        self._failures, self._wait, self._until, self._trying = 0, pause, 0.0, False

    @property
    def is_open(self) -> bool:
        """True while the expert is skipped."""
        return self._failures >= self._limit and self._clock() < self._until

    def admits(self) -> bool:
        """Check whether a request may be sent to the expert.

        After a pause one caller is admitted, and the others are refused until its outcome is known.
        """
        with self._lock:
            if self._failures < self._limit:
                return True
            if self._clock() < self._until:
                return False
            self._until, self._trying = self._clock() + self._wait, True
            return True

    def succeeded(self) -> None:
        """Record an answer."""
        with self._lock:
            self._failures, self._wait, self._trying = 0, self._pause, False

    def left(self) -> None:
        """Record a request without an outcome, and admit the next one.

        The caller disconnected, or the request itself was at fault.
        """
        with self._lock:
            if self._trying:
                self._until, self._trying = self._clock(), False

    def failed(self) -> None:
        """Record a failure. Concurrent failures lengthen the pause only once."""
        with self._lock:
            self._failures += 1
            if self._failures < self._limit or (self._clock() < self._until and not self._trying):
                return
            if self._trying:
                self._wait = min(2 * self._wait, self._longest)
            self._until, self._trying = self._clock() + self._wait, False
