"""Errors that a user can fix, and helpers that give them the same form."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class ExpertokenError(Exception):
    """An error that the user can fix. Its message is one line: the expectation, the finding and the remedy."""


class ConfigError(ExpertokenError):
    """A configuration with mistakes. The message lists all of them."""


class PoolError(ExpertokenError):
    """A malformed pool. The message lists every mistake."""


class LeakError(ExpertokenError):
    """A leak: test queries that are in the train split too."""


class ResultsError(ExpertokenError):
    """Malformed benchmark results. The message names file, row and field."""


class OutOfMemoryError(ExpertokenError):
    """An error for exhausted memory. The message names settings that need less memory."""


class ExpertFailedError(ExpertokenError):
    """A failure of an expert to answer (refusal, out of memory, missing key). The next candidate answers instead."""


class RequestRefusedError(ExpertFailedError):
    """An expert's refusal of one request (too long, malformed). The expert may serve other requests."""


class NoAnswerError(ExpertokenError):
    """A failure of all candidates to answer, or to continue an answer that broke off.

    Args:
        failures: Reason of each failed candidate by its name, or one complete message.
        begun: True if a part of the answer has already been sent.
        refused: True if all candidates refused the request itself.

    Attributes:
        public: Message without the reasons, which may name paths and variables of the machine. Reasons for a refusal of
            the request are included, because they are about the request.
    """

    def __init__(self, failures: dict[str, str] | str, *, begun: bool = False, refused: bool = False) -> None:
        what = "the answer broke off and no expert could continue it" if begun else "no expert could answer"
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
    """Return the first line of an error's message that is not blank, or the error's type if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether memory ran out.

    On a CPU torch reports this only in the message of a RuntimeError.
    """
    words = ("out of memory", "can't allocate memory", "DefaultCPUAllocator")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


_MOST_SHOWN = 30


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the nearest known word, or all known words."""
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
        ImportError: The module is not installed. The message names the extra that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # the library is installed but broken, and its own message names the true cause
        message = f"{module!r} is required and not installed. Install it by: pip install 'expertoken[{extra}]'"
        raise ImportError(message) from error
