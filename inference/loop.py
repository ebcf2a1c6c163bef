"""An event loop in a background thread, for callers without one, because answers are asynchronous."""

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


_AT_EXIT = 5.0  # seconds that the program's exit waits for threads at work
_INTERRUPTED = 2.0  # the same after Ctrl-C
_STATUS = 128 + signal.SIGINT  # exit status of a program that Ctrl-C ended, as shells report it
_working: set[threading.Event] = set()  # one for each thread at work, set at its end
_lock = threading.Lock()


@contextmanager
def at_work() -> Iterator[None]:
    """Keep the program from exiting, for some seconds, until the work of a daemon thread ends.

    A daemon thread that returns from torch's code while the interpreter exits is torn down midway. The process then
    aborts (seen once in six runs of the demo).
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
    """Run a function in a daemon thread that is `at_work` until the function returns."""

    def run() -> None:
        with at_work():
            function(*arguments)

    threading.Thread(target=run, daemon=True).start()


def in_thread(function: Callable[..., T], *arguments: Any) -> "Future[T]":
    """Run a function in a daemon thread, so that the loading of a model does not keep a program from exiting.

    Rejected: a `ThreadPoolExecutor`, because the program's exit waits for its threads however long they take.
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
    """Wait for the threads at work. Return whether all of them ended."""
    deadline = time.monotonic() + seconds
    with _lock:
        working = list(_working)
    return all(ended.wait(max(0.0, deadline - time.monotonic())) for ended in working)


def end_interrupted() -> NoReturn:
    """Exit an interrupted program within seconds, even while a thread loads a model.

    Such a thread can't be stopped, and Python's own exit would tear it down.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the exit
    print("interrupted", file=sys.stderr)  # noqa: T201 - for the user at the terminal
    if not _wait(_INTERRUPTED):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_STATUS)
    sys.exit(_STATUS)


class BackgroundLoop:
    """A loop that runs coroutines for ordinary code. The process has one, because connections belong to a loop."""

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
        """Run a coroutine to its end. An interruption of the caller cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, cls._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @classmethod
    def iterate(cls, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """Iterate over an asynchronous iterator, one step at a time. Closing the result closes it."""

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
        except RuntimeError as error:  # a cancelled step has not ended yet
            if "already running" not in str(error):
                raise
            await asyncio.sleep(0.01)
