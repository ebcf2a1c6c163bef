"""An event loop in a thread of its own, for callers that have none: answers are asynchronous inside."""

import asyncio
import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


_AT_EXIT = 5.0  # seconds that the program's end waits for threads that are about to end
_INTERRUPTED = 2.0  # the same, where the user does not want to wait
_working: set[threading.Event] = set()  # one for each piece of work, set at its end
_lock = threading.Lock()


@contextmanager
def at_work() -> Iterator[None]:
    """Let the program's end wait, a little, for the work of a daemon thread.

    A daemon thread that comes back from torch's code while the interpreter ends is torn down in the midst of it, and
    the process aborts (seen once in six runs of the demo).
    """
    ended = threading.Event()
    with _lock:
        _working.add(ended)
    try:
        yield
    finally:
        with _lock:
            _working.discard(ended)
        ended.set()


def start_daemon(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a daemon thread that is `at_work` all the time."""

    def run() -> None:
        with at_work():
            function(*arguments)

    threading.Thread(target=run, daemon=True).start()


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

    start_daemon(run)
    return future


@atexit.register
def _wait(seconds: float = _AT_EXIT) -> bool:
    """Wait for what is at work; return whether all of it came to its end."""
    deadline = time.monotonic() + seconds
    with _lock:
        working = list(_working)
    return all(ended.wait(max(0.0, deadline - time.monotonic())) for ended in working)


def end_interrupted() -> NoReturn:
    """End a program that was interrupted, within seconds, also where a thread is in the midst of loading a model.

    Such a thread can't be stopped, and Python's own end would tear it down.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
    print("interrupted", file=sys.stderr)  # noqa: T201 - the last word to who pressed Ctrl-C
    if not _wait(_INTERRUPTED):
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
