"""Checks before a composite is served, without loading a model or requesting an answer."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..modeling.composite import POOL_FILE, Composite, read_manifest
from ..modeling.consent import check_agreed
from ..modeling.errors import ExpertokenError, one_line
from ..modeling.experts import Expert
from ..modeling.files import local_folder
from ..modeling.policy import Chooser, Policy
from ..modeling.pool import ExpertPool
from .gateway import GatewayModel

_PATIENCE = 5.0  # seconds to connect to an address


@dataclass(frozen=True)
class Row:
    """Findings on one candidate.

    Attributes:
        name: Name of the candidate.
        kind: Backend of the candidate.
        where: Addresses of the endpoint, or name of the model.
        key: Environment variable whose value is sent, and a note if it is not set.
        price: USD per million tokens.
        may_answer: True if the policy allows the candidate.
        wrong: Problem that keeps the candidate from answering, or None.
    """

    name: str
    kind: str
    where: str
    key: str
    price: str
    may_answer: bool
    wrong: str | None


def check(path: Path | str) -> tuple[list[Row], list[str]]:
    """Check the candidates and the policy that would be served.

    Args:
        path: Composite folder, `owner/name` of a composite on the hub, or YAML file of a gateway.

    Returns:
        The candidates, and the problems of the whole.

    Raises:
        ExpertokenError: The files are not well formed.
    """
    experts, chooser, policy, wrong = _opened(path)
    try:
        allowed = chooser.candidates(policy)
    except ExpertokenError as error:
        wrong, allowed = [*wrong, str(error)], []
    reached = asyncio.run(_reached(experts))
    rows = [_row(expert, expert.name in allowed, reached) for expert in experts]
    if allowed and all(row.wrong for row in rows if row.may_answer):
        wrong.append("none of the allowed candidates is usable")
    return rows, wrong


def _opened(path: Path | str) -> tuple[list[Expert], Chooser, Policy, list[str]]:
    """Return the candidates, the chooser, the policy and the problems found so far."""
    if str(path).endswith((".yaml", ".yml")):
        gateway = GatewayModel.from_yaml(path)
        return [gateway.meta, *gateway.pool.candidates], gateway.chooser, gateway.policy, []
    folder = local_folder(path)
    manifest, pool = read_manifest(folder), ExpertPool.from_yaml(folder / POOL_FILE)
    nothing: Any = None
    composite = Composite(nothing, pool, manifest, folder)
    wrong = pool.missing()
    try:
        check_agreed(pool, folder)
    except ExpertokenError as error:
        wrong.append(str(error))
    return pool.candidates, composite.chooser, composite.policy, wrong


async def _reached(experts: list[Expert]) -> dict[str, str]:
    """Return the unreachable addresses, each with the reason.

    Connections are opened only: no key and no request is sent.
    """
    addresses = {url for expert in experts if expert.kind.remote for url in _urls(expert)}

    async def reach(url: str) -> tuple[str, str]:
        parts = urlsplit(url)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            opening = asyncio.open_connection(parts.hostname, port, ssl=parts.scheme == "https" or None)
            _, writer = await asyncio.wait_for(opening, _PATIENCE)
            writer.close()
        except (OSError, ValueError, TimeoutError, asyncio.TimeoutError) as error:
            return url, one_line(error)
        return url, ""

    return {url: why for url, why in await asyncio.gather(*map(reach, addresses)) if why}


def _urls(expert: Expert) -> list[str]:
    return [url for url in expert.kind.address(expert).split(", ") if "://" in url]


def _row(expert: Expert, allowed: bool, reached: dict[str, str]) -> Row:
    urls, variable = _urls(expert), expert.key_variable
    unset = variable is not None and not os.environ.get(variable)
    key = "" if variable is None else f"{variable} is not set" if unset else variable
    lost = [f"{url}: {reached[url]}" for url in urls if url in reached]
    wrong = f"{variable} is not set" if unset else "; ".join(lost) if urls and len(lost) == len(urls) else None
    where = expert.kind.address(expert) if expert.kind.remote else expert.model or ""
    cost = expert.cost
    price = f"{cost['input']:g} / {cost['output']:g}" if cost else "unknown" if expert.kind.priced else "none"
    return Row(expert.name, expert.backend, where, key, price, allowed, wrong)
