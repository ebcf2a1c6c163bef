"""The addresses of an endpoint: replicas of one model, asked by their weights; one that fails is left alone a while."""

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...modeling.experts import Expert
from ...modeling.source import is_address
from ..breaker import Breaker


@dataclass
class Address:
    """One of them.

    Attributes:
        url: the base URL.
        weight: share of the requests, beside the others' weights.
        breaker: leaves the address alone where it fails again and again.
        up: whether it answered when it was last asked; True before anybody asks.
    """

    url: str
    weight: float = 1.0
    breaker: Breaker = field(default_factory=Breaker, compare=False)
    up: bool = True


class Addresses:
    """All addresses of an expert.

    Args:
        expert: with `addresses`, with `base_url`, or with neither.
        default: the address where the expert has none.
    """

    def __init__(self, expert: Expert, default: str) -> None:
        given = expert.options.get("addresses")
        alone = [{"base_url": expert.base_url or default}]
        self.all = [Address(entry["base_url"], float(entry.get("weight", 1))) for entry in given or alone]

    def __len__(self) -> int:
        return len(self.all)

    def pick(self, tried: Collection[str] = ()) -> Address:
        """Return an address at random, by weight, of those that are well.

        Args:
            tried: what the same request was sent to already; asked again only where there is no other.
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
    """Return the addresses of an expert as messages and consent name them."""
    given = expert.options.get("addresses")
    return ", ".join(entry["base_url"] for entry in given) if given else expert.base_url or "OpenAI"


_SECRET = ("authorization", "api-key", "apikey", "token", "secret", "cookie", "password")
_TIMEOUTS = ("connect", "first", "idle")


def mistakes(entry: Mapping[str, Any], place: str) -> list[str]:
    """Return what is wrong with the addresses, timeouts and headers of a pool entry."""
    found = []
    if (addresses := entry.get("addresses")) is not None:
        if entry.get("base_url"):
            found.append(f"{place}: `addresses` takes the place of `base_url`; give one of them")
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
    """Return what is wrong with headers, never with their values: one may hold a secret."""
    if not isinstance(headers, dict) or not all(isinstance(part, str) for item in headers.items() for part in item):
        return [f"{place}.headers: expected texts by name"]
    if bad := [name for name in headers if not name.isascii() or not name.replace("-", "").isalnum()]:
        return [f"{place}.headers: {bad[0]!r} is no name of a header"]
    if any(ord(character) < 32 or ord(character) > 126 for value in headers.values() for character in value):
        return [f"{place}.headers: expected values of printable ASCII"]
    secret = [name for name in headers if any(word in name.lower() for word in _SECRET)]
    return [
        f"{place}.headers.{name}: a key itself is refused; put it into an environment variable and give the variable's "
        "name as `api_key_env`"
        for name in secret
    ]
