"""An event loop in a thread of its own, for callers that have none: answers are asynchronous inside."""

import asyncio
import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


_AT_EXIT = 5.0  # seconds that the program's end waits for threads that are about to end
_INTERRUPTED = 2.0  # the same, where the user does not want to wait
_ending: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def start_daemon(thread: threading.Thread) -> None:
    """Start a daemon thread that the program's end waits for, a little.

    A daemon thread that comes back from torch's code while the interpreter ends is torn down in the midst of it, and
    the process aborts (seen once in six runs of the demo).
    """
    _ending.add(thread)
    thread.start()


def in_thread(function: Callable[..., T], *arguments: Any) -> "Future[T]":
    """Run a function in a daemon thread of its own: the loading of a model must not keep a program from ending.

    Not in a `ThreadPoolExecutor`, whose threads the program's end waits for however long they take.
    """
    future: Future[T] = Future()

    def run() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

    start_daemon(threading.Thread(target=run, daemon=True))
    return future


@atexit.register
def _wait(seconds: float = _AT_EXIT) -> None:
    deadline = time.monotonic() + seconds
    for thread in list(_ending):
        thread.join(max(0.0, deadline - time.monotonic()))


def end_interrupted() -> NoReturn:
    """End a program that was interrupted, within seconds, also where a thread is in the midst of loading a model.

    Such a thread can't be stopped, and Python's own end would tear it down.
    """
    print("interrupted", file=sys.stderr)  # noqa: T201 - the last word to who pressed Ctrl-C
    _wait(_INTERRUPTED)
    if any(thread.is_alive() for thread in list(_ending)):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(1)


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
    def iterate(cls, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """Iterate over an asynchronous iterator, one step at a time; closing closes it."""

        async def step() -> list[T]:
            try:
                return [await anext(source)]
            except StopAsyncIteration:
                return []

        try:
            while found := cls.call(step()):
                yield found[0]
        finally:
            cls.close(source)

    @classmethod
    def close(cls, source: AsyncGenerator[Any, None]) -> None:
        """Close an asynchronous iterator."""
        cls.call(_close(source))


async def _close(source: AsyncGenerator[Any, None]) -> None:
    while True:
        try:
            await source.aclose()
            return
        except RuntimeError as error:  # a step that was cancelled has not come to its end yet
            if "already running" not in str(error):
                raise
            await asyncio.sleep(0.01)
