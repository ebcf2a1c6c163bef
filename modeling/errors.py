"""Errors that a user can mend, and the helpers that word them alike."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class ExpertokenError(Exception):
    """Something the user can mend. The message is one line: what was expected, what came, what to do."""


class ConfigError(ExpertokenError):
    """A configuration with mistakes; the message lists all of them."""


class PoolError(ExpertokenError):
    """A pool that is not well formed; the message lists every mistake."""


class LeakError(ExpertokenError):
    """Test queries stand in the train side."""


class ResultsError(ExpertokenError):
    """Benchmark results that are not well formed; the message names file, row and field."""


class OutOfMemoryError(ExpertokenError):
    """Memory ran out; the message names settings that need less."""


class ExpertFailedError(ExpertokenError):
    """An expert could not answer (refused, out of memory, missing key); the next best one takes the turn."""


class RequestRefusedError(ExpertFailedError):
    """An expert refused this very request (too long, malformed); it may be well otherwise."""


class NoAnswerError(ExpertokenError):
    """Nobody could answer, or go on with an answer that broke off.

    Args:
        failures: those who were asked, with the reason; or one text that says it all.
        begun: whether a part of an answer is out.
        refused: whether all of them refused the request itself.

    Attributes:
        public: the message without reasons, which may name paths and variables of the machine; with those that a
            request was refused for, which are about the request.
    """

    def __init__(self, failures: dict[str, str] | str, *, begun: bool = False, refused: bool = False) -> None:
        what = "the answer broke off and nobody could go on with it" if begun else "no expert could answer"
        self.refused = refused
        if isinstance(failures, str):
            self.public = failures
            super().__init__(failures)
            return
        self.public = f"{what} ({', '.join(failures)} failed)" if failures else what
        if refused and failures:
            self.public = f"{what}: {'; '.join(dict.fromkeys(failures.values()))}"
        super().__init__(f"{what} ({'; '.join(f'{name}: {reason}' for name, reason in failures.items())})")


def one_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or its type where none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a CPU torch says so in the words of a RuntimeError only."""
    words = ("out of memory", "can't allocate memory", "DefaultCPUAllocator")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


_MOST_SHOWN = 30


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known word, or all of them."""
    known = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(given.casefold(), known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {known[close[0]]!r}?"
    shown = [*known.values()][:_MOST_SHOWN]
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return f"available: {', '.join(shown) or 'none'}{more}"


def require_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # the library is there but broken: its own message is the true one
        message = f"{module!r} is needed here and not installed: pip install 'expertoken[{extra}]'"
        raise ImportError(message) from error
