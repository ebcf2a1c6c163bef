"""Options that several verbs share, and options with a fixed set of values from the library's registries."""

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from ..modeling.errors import ExpertokenError, did_you_mean

RayAddress = Annotated[str | None, typer.Option(help="ray: address of the cluster. Default: a new local cluster.")]


def one_of(name: str, values: Iterable[str], *, several: bool = False) -> dict[str, Any]:
    """Return arguments of `typer.Option` for a value from a registry.

    Args:
        name: Name of the option, for errors.
        values: Allowed values.
        several: If true, the option takes several values, separated by commas.
    """
    known = list(values)

    def parse(text: str) -> str:
        parts = [part.strip() for part in text.split(",")] if several else [text]
        for part in parts:
            if part not in known:
                raise ExpertokenError(f"{name}: unknown {part!r}, {did_you_mean(part, known)}")
        return ",".join(parts)

    return {"parser": parse, "metavar": f"[{'|'.join(known)}]{',...' if several else ''}"}
