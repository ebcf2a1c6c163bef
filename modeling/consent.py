"""Consent: a key of this machine goes to an address only where the machine's user has agreed to that.

A composite's folder names environment variables and the addresses that their values are sent to. Whoever made the
folder may have named any of them (`AWS_SECRET_ACCESS_KEY`, an address of their own). What was agreed to is remembered
beside the caches, as pairs of a variable's name and an address.
"""

import json
from contextlib import suppress
from pathlib import Path

from .errors import ExpertokenError
from .files import atomic_file, cache_folder
from .pool import ExpertPool

Sending = tuple[str, str]
"""The name of an environment variable, and the address that its value is sent to."""


def sendings(pool: ExpertPool) -> list[Sending]:
    """Return which keys the experts of a pool are sent, and where."""
    return [(expert.key_variable, expert.kind.address(expert)) for expert in pool if expert.key_variable]


def _file() -> Path:
    return cache_folder("consent") / "keys.json"


def _agreed() -> set[Sending]:
    with suppress(OSError, ValueError, TypeError):  # what can't be read is asked for again
        return {(str(variable), str(address)) for variable, address in json.loads(_file().read_text("utf-8"))}
    return set()


def agree(pool: ExpertPool) -> None:
    """Remember that the user of this machine agrees to all that the pool sends: they wrote it, or said so."""
    known = _agreed()
    if new := set(sendings(pool)) - known:
        with suppress(OSError, ExpertokenError):  # a home that can't be written to: they say so again
            _file().parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(_file()) as aside:
                aside.write_text(json.dumps(sorted(known | new), indent=2) + "\n", "utf-8")


def check_agreed(pool: ExpertPool, folder: Path | str) -> None:
    """See whether the user has agreed to what a composite's folder sends.

    Raises:
        ExpertokenError: not to all of it; the message names the variables and the addresses.
    """
    known = _agreed()
    if new := [f"{variable} to {address}" for variable, address in sendings(pool) if (variable, address) not in known]:
        raise ExpertokenError(
            f"{folder}: sends keys of this machine to addresses that you have not agreed to ({'; '.join(new)}). If you "
            f"trust it, say so once: `expertoken chat {folder} --send-keys`, or send_keys=True"
        )
