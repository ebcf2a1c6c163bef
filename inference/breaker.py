"""Experts that fail again and again are not asked for a while."""

import threading
import time
from collections.abc import Callable


class Breaker:
    """Of one expert.

    Args:
        failures: in a row, until it opens.
        pause: seconds until one request may try again; doubled each time that fails too.
        longest: pause.
        clock: seconds.
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
        """Whether it is left alone now."""
        return self._failures >= self._limit and self._clock() < self._until

    def admits(self) -> bool:
        """Whether it may be asked. After a pause one caller gets a yes, the others wait for how it ends."""
        with self._lock:
            if self._failures < self._limit:
                return True
            if self._clock() < self._until:
                return False
            self._until, self._trying = self._clock() + self._wait, True
            return True

    def succeeded(self) -> None:
        """It answered."""
        with self._lock:
            self._failures, self._wait, self._trying = 0, self._pause, False

    def left(self) -> None:
        """Whoever asked went away before it was known, or the request was at fault: the next one may try."""
        with self._lock:
            if self._trying:
                self._until, self._trying = self._clock(), False

    def failed(self) -> None:
        """It did not. Many who were asking at the same time are one failure more, and not many pauses."""
        with self._lock:
            self._failures += 1
            if self._failures < self._limit or (self._clock() < self._until and not self._trying):
                return
            if self._trying:
                self._wait = min(2 * self._wait, self._longest)
            self._until, self._trying = self._clock() + self._wait, False
