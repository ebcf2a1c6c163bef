"""API keys: whose they are, and which experts each may use. Files hold hashes of them, never the keys.

A key is 32 random bytes, so a plain SHA-256 of it can't be guessed back; a slow hash is for passwords.
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
    """Who asks, as far as a key tells.

    Attributes:
        name: in metrics and the log.
        digest: SHA-256 of the key, in hexadecimal.
        experts: names of the candidates that may answer; all where None.
    """

    name: str
    digest: str
    experts: tuple[str, ...] | None = None


class KeyRing:
    """All keys of a server.

    Args:
        clients: whose they are.
        required: whether a request needs a key though there is none yet, or no more: where a file holds them.
    """

    def __init__(self, clients: Iterable[Client] = (), *, required: bool = False) -> None:
        self.clients, self._required = list(clients), required

    def __bool__(self) -> bool:
        return self._required or bool(self.clients)

    def find(self, key: str | None) -> Client | None:
        """Return whose key it is, or None."""
        if key is None:
            return None
        given = hashed(key)
        # All of them, each in constant time: how long it takes tells nothing.
        found = [client for client in self.clients if secrets.compare_digest(client.digest, given)]
        return found[0] if found else None


def hashed(key: str) -> str:
    """Return the SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def ring_of(keys: Iterable[str], file: Path | None) -> KeyRing:
    """Return the keys that were given as they are, which may do everything, and those of a file.

    Raises:
        ExpertokenError: the file is none.
    """
    given = [Client(f"key-{number}", hashed(key)) for number, key in enumerate(keys, start=1)]
    return KeyRing([*given, *([] if file is None else read_keys(file))], required=file is not None)


def keys_from_environment() -> tuple[str, ...]:
    """Return the API keys of `EXPERTOKEN_API_KEYS`.

    Raises:
        ExpertokenError: one is so short that it can be guessed.
    """
    keys = tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    if any(len(key) < _SHORTEST for key in keys):
        raise ExpertokenError(f"{KEYS_VARIABLE}: a key needs at least {_SHORTEST} characters")
    return keys


def read_keys(file: Path) -> list[Client]:
    """Return the clients of a key file.

    Raises:
        ExpertokenError: it can't be read, or has a mistake; no value is quoted, which may be a key.
    """
    try:
        document = yaml.load(file.read_text("utf-8"), yaml.BaseLoader)  # noqa: S506 - all texts, nothing else is made
    except (OSError, UnicodeDecodeError) as error:
        raise ExpertokenError(f"{file}: can't be read ({one_line(error)})") from None
    except (yaml.YAMLError, RecursionError):
        raise ExpertokenError(f"{file}: is not YAML") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ExpertokenError(f"{file}: expected a mapping with a list `keys:`; `expertoken keys add` writes one")
    clients = [_client(entry, f"{file}, keys[{place}]") for place, entry in enumerate(entries)]
    names = [client.name for client in clients]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ExpertokenError(f"{file}: the name {twice[0]!r} appears twice")
    if len({client.digest for client in clients}) < len(clients):
        raise ExpertokenError(f"{file}: two names have the same key")
    return clients


def _client(entry: Any, place: str) -> Client:
    if not isinstance(entry, dict) or set(entry) - {"name", "sha256", "experts"}:
        raise ExpertokenError(f"{place}: expected `name`, `sha256` and maybe `experts`")
    name, digest, experts = entry.get("name"), entry.get("sha256"), entry.get("experts")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ExpertokenError(f"{place}.name: expected letters, digits, '.', '_' or '-'")
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise ExpertokenError(f"{place}.sha256: expected 64 hexadecimal digits, the key's SHA-256")
    if experts is not None and not (isinstance(experts, list) and all(isinstance(one, str) for one in experts)):
        raise ExpertokenError(f"{place}.experts: expected a list of names")
    return Client(name, digest, None if experts is None else tuple(experts))


def write_keys(file: Path, clients: Iterable[Client]) -> None:
    """Write a key file that its owner alone can read."""
    entries = [
        {"name": client.name, "sha256": client.digest}
        | ({} if client.experts is None else {"experts": list(client.experts)})
        for client in clients
    ]
    with atomic_file(file) as aside:
        aside.touch(mode=0o600)
        aside.write_text(yaml.safe_dump({"keys": entries}, sort_keys=False), "utf-8")


def add_key(file: Path, name: str, experts: Iterable[str] | None = None) -> str:
    """Make a key, put its hash into a file and return it: it stands nowhere else.

    Args:
        file: key file; made where there is none.
        name: of who gets it.
        experts: names of the candidates that may answer; all where None.

    Raises:
        ExpertokenError: the file has a mistake, or the name has a key already.
    """
    clients = read_keys(file) if file.exists() else []
    if any(client.name == name for client in clients):
        raise ExpertokenError(f"{file}: {name!r} has a key already; remove it first")
    key = f"et-{secrets.token_urlsafe(32)}"
    entry = {"name": name, "sha256": hashed(key), "experts": None if experts is None else list(experts)}
    write_keys(file, [*clients, _client(entry, str(file))])
    return key


def remove_key(file: Path, name: str) -> None:
    """Take somebody's key out of a file.

    Raises:
        ExpertokenError: the file has a mistake, or nobody of that name.
    """
    clients = read_keys(file)
    kept = [client for client in clients if client.name != name]
    if len(kept) == len(clients):
        raise ExpertokenError(f"{file}: nobody is called {name!r}")
    write_keys(file, kept)
