"""Signals that arrive before the server runs. This module imports nothing heavy, so that it can be first."""

import signal
from threading import Event

_asked = Event()


def delay_reloads() -> None:
    """Note a reload signal (SIGHUP) until the server runs. Before that, the signal would end the process."""
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, lambda *_: _asked.set())


def reload_was_asked() -> bool:
    """Check whether a reload signal arrived since `delay_reloads`."""
    return _asked.is_set()
