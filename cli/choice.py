"""Options that several verbs have, and options with a fixed set of values out of the library's registries."""

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from ..modeling.errors import ExpertokenError, did_you_mean

RayAddress = Annotated[str | None, typer.Option(help="ray: address of the cluster. Default: a local one is started.")]


def one_of(name: str, values: Iterable[str], *, several: bool = False) -> dict[str, Any]:
    """Return arguments of `typer.Option` for a value out of a registry.

    Args:
        name: what the value is, for errors.
        values: the values.
        several: whether several values may be given, separated by commas.
    """
    known = list(values)

    def parse(text: str) -> str:
        parts = [part.strip() for part in text.split(",")] if several else [text]
        for part in parts:
            if part not in known:
                raise ExpertokenError(f"{name}: unknown {part!r}, {did_you_mean(part, known)}")
        return ",".join(parts)

    return {"parser": parse, "metavar": f"[{'|'.join(known)}]{',...' if several else ''}"}
