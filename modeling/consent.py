"""Consent: a key of this machine goes to an address only where the machine's user has agreed to that.

A composite's folder names environment variables and the addresses that their values are sent to. Whoever made the
folder may have named any of them (`AWS_SECRET_ACCESS_KEY`, an address of their own). What was agreed to is remembered
beside the caches, as pairs of a variable's name and an address. Who gives a pool to `build_supervision` (`expertoken
prepare`) or an expert to `add_expert` has agreed to what it sends.
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
"""The name of an environment variable, and the address that its value is sent to."""


def sendings(experts: Iterable[Expert]) -> list[Sending]:
    """Return which keys experts are sent, and where."""
    return [(expert.key_variable, expert.kind.address(expert)) for expert in experts if expert.key_variable]


def _file() -> Path:
    return cache_folder("consent") / "keys.json"


def _agreed() -> set[Sending]:
    with suppress(OSError, ValueError, TypeError):  # what can't be read is asked for again
        return {(str(variable), str(address)) for variable, address in json.loads(_file().read_text("utf-8"))}
    return set()


def agree(experts: Iterable[Expert]) -> None:
    """Remember that the user of this machine agrees to all that experts are sent: they wrote it, or said so."""
    known = _agreed()
    if new := set(sendings(experts)) - known:
        for variable, address in sorted(new):
            logger.info("%s may be sent to %s from now on", variable, address)
        with suppress(OSError, ExpertokenError):  # a home that can't be written to: they say so again
            _file().parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(_file()) as aside:
                aside.write_text(json.dumps(sorted(known | new), indent=2) + "\n", "utf-8")


def check_agreed(experts: Iterable[Expert], folder: Path | str) -> None:
    """See whether the user has agreed to what a composite's folder sends of the keys that this process has.

    Raises:
        ExpertokenError: not to all of it; the message names the variables and the addresses.
    """
    known = _agreed()
    asked = [sent for sent in sendings(experts) if sent not in known and os.environ.get(sent[0])]
    if new := [f"{variable} to {address}" for variable, address in asked]:
        raise ExpertokenError(
            f"{folder}: sends keys of this machine to addresses that you have not agreed to ({'; '.join(new)}). If you "
            f"trust it, pass --send-keys (send_keys=True); what you agree to is kept in {_file()}"
        )
