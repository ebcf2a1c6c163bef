"""API keys: the client of each, and the experts that it may use. Files hold hashes of keys, never the keys.

A key is 32 random bytes, so its plain SHA-256 can't be reversed by guessing. A slow hash is for passwords.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...modeling.errors import ExpertokenError, one_line
from ...modeling.files import atomic_file

KEYS_VARIABLE = "EXPERTOKEN_API_KEYS"

_SHORTEST = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Client:
    """Client of the server, known by its key.

    Attributes:
        name: Name in metrics and the log.
        digest: SHA-256 of the key, in hexadecimal.
        experts: Names of the candidates that may answer. None for all.
    """

    name: str
    digest: str
    experts: tuple[str, ...] | None = None


class KeyRing:
    """All keys of a server.

    Args:
        clients: Clients, one per key.
        required: If true, a request needs a key even while there is none, as with an empty key file.
    """

    def __init__(self, clients: Iterable[Client] = (), *, required: bool = False) -> None:
        self.clients, self._required = list(clients), required

    def __bool__(self) -> bool:
        return self._required or bool(self.clients)

    def find(self, key: str | None) -> Client | None:
        """Return the client of a key, or None if no client has it."""
        if key is None:
            return None
        given = hashed(key)
        # All digests are compared, each in constant time, so that the duration reveals nothing.
        found = [client for client in self.clients if secrets.compare_digest(client.digest, given)]
        return found[0] if found else None


def hashed(key: str) -> str:
    """Return the SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def ring_of(keys: Iterable[str], file: Path | None) -> KeyRing:
    """Return a ring of plain keys, which may use every expert, and of the keys in a file.

    Raises:
        ExpertokenError: The file is not a valid key file.
    """
    given = [Client(f"key-{number}", hashed(key)) for number, key in enumerate(keys, start=1)]
    return KeyRing([*given, *([] if file is None else read_keys(file))], required=file is not None)


def keys_from_environment() -> tuple[str, ...]:
    """Return the API keys of `EXPERTOKEN_API_KEYS`.

    Raises:
        ExpertokenError: A key is so short that it can be guessed.
    """
    keys = tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    if any(len(key) < _SHORTEST for key in keys):
        raise ExpertokenError(f"{KEYS_VARIABLE}: expected at least {_SHORTEST} characters in each key")
    return keys


def read_keys(file: Path) -> list[Client]:
    """Return the clients of a key file.

    Raises:
        ExpertokenError: The file can't be read, or has a mistake. The message quotes no value, which may be a key.
    """
    try:
        document = yaml.load(file.read_text("utf-8"), yaml.BaseLoader)  # noqa: S506 - it builds texts only
    except (OSError, UnicodeDecodeError) as error:
        raise ExpertokenError(f"{file}: can't be read ({one_line(error)})") from None
    except (yaml.YAMLError, RecursionError):
        raise ExpertokenError(f"{file}: is not YAML") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ExpertokenError(f"{file}: expected a mapping with a list `keys:`. `expertoken keys add` writes one.")
    clients = [_client(entry, f"{file}, keys[{place}]") for place, entry in enumerate(entries)]
    names = [client.name for client in clients]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ExpertokenError(f"{file}: the name {twice[0]!r} appears twice")
    if len({client.digest for client in clients}) < len(clients):
        raise ExpertokenError(f"{file}: two names have the same key")
    return clients


def _client(entry: Any, place: str) -> Client:
    if not isinstance(entry, dict) or set(entry) - {"name", "sha256", "experts"}:
        raise ExpertokenError(f"{place}: expected `name`, `sha256` and optionally `experts`")
    name, digest, experts = entry.get("name"), entry.get("sha256"), entry.get("experts")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ExpertokenError(f"{place}.name: expected letters, digits, '.', '_' or '-'")
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise ExpertokenError(f"{place}.sha256: expected 64 hexadecimal digits, the key's SHA-256")
    if experts is not None and not (isinstance(experts, list) and all(isinstance(one, str) for one in experts)):
        raise ExpertokenError(f"{place}.experts: expected a list of names")
    return Client(name, digest, None if experts is None else tuple(experts))


def write_keys(file: Path, clients: Iterable[Client]) -> None:
    """Write a key file that only its owner can read."""
    entries = [
        {"name": client.name, "sha256": client.digest}
        | ({} if client.experts is None else {"experts": list(client.experts)})
        for client in clients
    ]
    with atomic_file(file) as aside:
        aside.touch(mode=0o600)
        aside.write_text(yaml.safe_dump({"keys": entries}, sort_keys=False), "utf-8")


def add_key(file: Path, name: str, experts: Iterable[str] | None = None) -> str:
    """Create a key, add its hash to a file, and return the key, which is stored nowhere.

    Args:
        file: Key file. It is created if it does not exist.
        name: Name of the client that gets the key.
        experts: Names of the candidates that may answer. None for all.

    Raises:
        ExpertokenError: The file has a mistake, or the name already has a key.
    """
    clients = read_keys(file) if file.exists() else []
    if any(client.name == name for client in clients):
        raise ExpertokenError(f"{file}: {name!r} already has a key. Remove it first.")
    key = f"et-{secrets.token_urlsafe(32)}"
    entry = {"name": name, "sha256": hashed(key), "experts": None if experts is None else list(experts)}
    write_keys(file, [*clients, _client(entry, str(file))])
    return key


def remove_key(file: Path, name: str) -> None:
    """Remove a client's key from a file.

    Raises:
        ExpertokenError: The file has a mistake, or has no key of that name.
    """
    clients = read_keys(file)
    kept = [client for client in clients if client.name != name]
    if len(kept) == len(clients):
        raise ExpertokenError(f"{file}: no key has the name {name!r}")
    write_keys(file, kept)
