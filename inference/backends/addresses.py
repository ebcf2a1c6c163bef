"""The addresses of an endpoint: weighted replicas of one model, skipped for a while after failures."""

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...modeling.experts import Expert
from ...modeling.source import is_address
from ..breaker import Breaker


@dataclass
class Address:
    """One address of an expert.

    Attributes:
        url: Base URL.
        weight: Weight of the address among the others in the distribution of requests.
        breaker: Circuit breaker that skips the address after repeated failures.
        up: True if the address responded to its last check. True before the first one.
    """

    url: str
    weight: float = 1.0
    breaker: Breaker = field(default_factory=Breaker, compare=False)
    up: bool = True


class Addresses:
    """All addresses of an expert.

    Args:
        expert: Expert with `addresses`, with `base_url`, or with neither.
        default: Address for an expert with neither.
    """

    def __init__(self, expert: Expert, default: str) -> None:
        given = expert.options.get("addresses")
        alone = [{"base_url": expert.base_url or default}]
        self.all = [Address(entry["base_url"], float(entry.get("weight", 1))) for entry in given or alone]

    def __len__(self) -> int:
        return len(self.all)

    def pick(self, tried: Collection[str] = ()) -> Address:
        """Return a healthy address at random, by weight.

        Args:
            tried: URLs that the same request was already sent to. They are reused only if there are no others.
        """
        if len(self.all) == 1:
            return self.all[0]
        fresh = [address for address in self.all if address.url not in tried] or self.all
        well = [address for address in fresh if address.up and not address.breaker.is_open]
        while well:
            [found] = random.choices(well, [address.weight for address in well])
            if found.breaker.admits():
                return found
            well.remove(found)
        return random.choice(fresh)


def told(expert: Expert) -> str:
    """Return the addresses of an expert in the form used by messages and consent."""
    given = expert.options.get("addresses")
    return ", ".join(entry["base_url"] for entry in given) if given else expert.base_url or "OpenAI"


_SECRET = ("authorization", "api-key", "apikey", "token", "secret", "cookie", "password")
_TIMEOUTS = ("connect", "first", "idle")


def mistakes(entry: Mapping[str, Any], place: str) -> list[str]:
    """Return the errors in the addresses, timeouts and headers of a pool entry."""
    found = []
    if (addresses := entry.get("addresses")) is not None:
        if entry.get("base_url"):
            found.append(f"{place}: expected one of `addresses` and `base_url`, got both")
        if not isinstance(addresses, list) or not addresses or not all(map(_is_address, addresses)):
            found.append(
                f"{place}.addresses: expected a list of {{base_url: http(s)://host[:port]/path, weight: a number above "
                "0 (optional)}, without a user name, password or query"
            )
    timeouts = entry.get("timeouts")
    if timeouts is not None and not (isinstance(timeouts, dict) and all(map(_is_timeout, timeouts.items()))):
        found.append(f"{place}.timeouts: expected seconds above 0 for {', '.join(_TIMEOUTS)}, got {timeouts!r}")
    headers = entry.get("headers")
    if headers is not None:
        found += _header_mistakes(headers, place)
    return found


def _is_address(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) - {"base_url", "weight"}:
        return False
    weight = entry.get("weight", 1)
    return (
        is_address(entry.get("base_url"))
        and isinstance(weight, int | float)
        and not isinstance(weight, bool)
        and 0 < weight < float("inf")
    )


def _is_timeout(item: tuple[Any, Any]) -> bool:
    key, value = item
    return key in _TIMEOUTS and isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _header_mistakes(headers: Any, place: str) -> list[str]:
    """Return the errors in headers.

    Header values are never shown, because one may hold a secret.
    """
    if not isinstance(headers, dict) or not all(isinstance(part, str) for item in headers.items() for part in item):
        return [f"{place}.headers: expected texts by name"]
    if bad := [name for name in headers if not name.isascii() or not name.replace("-", "").isalnum()]:
        return [f"{place}.headers: expected names of letters, digits and `-`, got {bad[0]!r}"]
    if any(ord(character) < 32 or ord(character) > 126 for value in headers.values() for character in value):
        return [f"{place}.headers: expected values of printable ASCII, got other characters"]
    secret = [name for name in headers if any(word in name.lower() for word in _SECRET)]
    return [
        f"{place}.headers.{name}: expected no key in the pool, got one. Put it into an environment variable and set "
        "the variable's name as `api_key_env`."
        for name in secret
    ]
