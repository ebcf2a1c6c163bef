"""Options with a fixed set of values, which come from the registries of the library."""

from collections.abc import Iterable
from typing import Any

from ..modeling.errors import ExpertokenError, did_you_mean


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
