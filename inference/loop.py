"""An event loop in a thread of its own, for callers that have none: answers are asynchronous inside."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines for ordinary code. One loop for the whole process: connections belong to a loop."""

    _lock = threading.Lock()
    _loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def _running(cls) -> asyncio.AbstractEventLoop:
        with cls._lock:
            if cls._loop is None:
                cls._loop = asyncio.new_event_loop()
                threading.Thread(target=cls._loop.run_forever, name="expertoken-loop", daemon=True).start()
            return cls._loop

    @classmethod
    def call(cls, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; an interruption here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, cls._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @classmethod
    def iterate(cls, source: AsyncIterator[T]) -> Iterator[T]:
        """Iterate over an asynchronous iterator, one step at a time; closing closes it."""

        async def step() -> tuple[bool, T | None]:
            try:
                return True, await anext(source)
            except StopAsyncIteration:
                return False, None

        try:
            while True:
                more, value = cls.call(step())
                if not more:
                    return
                yield value
        finally:
            cls.close(source)

    @classmethod
    def close(cls, source: AsyncIterator[Any]) -> None:
        """Close an asynchronous iterator."""
        cls.call(_close(source))


async def _close(source: AsyncIterator[Any]) -> None:
    while True:
        try:
            await source.aclose()
            return
        except RuntimeError as error:  # a step that was cancelled has not come to its end yet
            if "already running" not in str(error):
                raise
            await asyncio.sleep(0.01)
