"""Consent of the machine's user, without which no key of this machine is sent to an address.

A composite folder names environment variables and the addresses that their values are sent to. The maker of the folder
may have named any variable (`AWS_SECRET_ACCESS_KEY`) and any address. Agreements are stored beside the caches, as pairs
of a variable's name and an address. A user who passes a pool to `build_supervision` (`expertoken prepare`) or an expert
to `add_expert` agrees to the keys that it sends.
"""

import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .errors import ExpertokenError
from .experts import Expert
from .files import atomic_file, cache_folder

logger = logging.getLogger(__name__)

Sending = tuple[str, str]
"""Name of an environment variable, and the address that its value is sent to."""


def sendings(experts: Iterable[Expert]) -> list[Sending]:
    """Return the keys that experts are sent, with their addresses."""
    return [(expert.key_variable, expert.kind.address(expert)) for expert in experts if expert.key_variable]


def _file() -> Path:
    return cache_folder("consent") / "keys.json"


def _agreed() -> set[Sending]:
    with suppress(OSError, ValueError, TypeError):  # without a readable file the user has to agree again
        return {(str(variable), str(address)) for variable, address in json.loads(_file().read_text("utf-8"))}
    return set()


def agree(experts: Iterable[Expert]) -> None:
    """Store the agreement of this machine's user to all keys that experts are sent.

    The user either wrote the pool or agreed explicitly.
    """
    known = _agreed()
    if new := set(sendings(experts)) - known:
        for variable, address in sorted(new):
            logger.info("%s may be sent to %s from now on", variable, address)
        with suppress(OSError, ExpertokenError):  # without a writable home the user has to agree again
            _file().parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(_file()) as aside:
                aside.write_text(json.dumps(sorted(known | new), indent=2) + "\n", "utf-8")


def check_agreed(experts: Iterable[Expert], folder: Path | str) -> None:
    """Check whether the user has agreed to each key in this process's environment that a composite folder sends.

    Raises:
        ExpertokenError: The user has not agreed to all of them. The message names the variables and the addresses.
    """
    known = _agreed()
    asked = [sent for sent in sendings(experts) if sent not in known and os.environ.get(sent[0])]
    if new := [f"{variable} to {address}" for variable, address in asked]:
        raise ExpertokenError(
            f"{folder}: sends keys of this machine to addresses that you have not agreed to ({'; '.join(new)}). If you "
            f"trust the folder, pass --send-keys (send_keys=True), which stores your agreement in {_file()} "
            "(--check stores nothing)"
        )
