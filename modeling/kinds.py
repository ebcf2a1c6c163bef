"""Kinds of experts: the fields of their pool entries, their keys, and how they are opened.

Our kinds stand beside their backends in `inference/backends/`. Other packages add theirs through the entry point group
`expertoken.backends`:

    [project.entry-points."expertoken.backends"]
    mine = "my_package.my_backend:KIND"
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from .errors import ExpertokenError, did_you_mean
from .source import Source

if TYPE_CHECKING:
    from .backend import Backend, Opening
    from .experts import Expert

_GROUP = "expertoken.backends"
# Named, not imported: a kind lives with its backend, on a higher floor, and a pool is read without any backend.
_OURS = ("expertoken.inference.backends.local_kinds", "expertoken.inference.backends.endpoint")


@dataclass(frozen=True)
class Weights:
    """The model that an expert needs in this process.

    Attributes:
        source: the causal LM.
        adapter: folder or hub id, and revision, of a LoRA adapter on it; None for the model itself.
    """

    source: Source
    adapter: tuple[str, str | None] | None = None


def _no_weights(expert: "Expert", base: Source | None) -> Weights | None:
    return None


def _given_key(expert: "Expert") -> str | None:
    return expert.api_key_env


def _given_address(expert: "Expert") -> str:
    return expert.base_url or f"backend {expert.backend!r}"


def _no_mistakes(entry: Mapping[str, Any], place: str) -> list[str]:
    return []


def _never(entry: Mapping[str, Any]) -> bool:
    return False


@dataclass(frozen=True)
class ExpertKind:
    """Descriptor of one kind of expert. Its module must be light: a pool is read without opening any backend.

    Attributes:
        name: value of `backend` in a pool.
        open: opens the backend of an expert; raises `ExpertFailedError` where that fails.
        fields: keys of a pool entry that this kind reads, besides those that every kind has. A key that `Expert` has no
            attribute for is kept in `Expert.options`.
        required: keys that must be given.
        paths: keys whose values may be local paths; in a pool file they are relative to the file.
        remote: whether the expert answers outside this process, so that nothing is loaded here.
        priced: whether each request costs money, so that a missing `cost` is unknown rather than 0.
        key: returns the NAME of the environment variable whose value is sent, or None.
        address: returns where that value is sent, for messages.
        weights: returns the model that has to be in memory here, given the meta LLM's base; None where there is none.
        needs_base: returns whether the expert runs on the meta LLM's base.
        check: returns the mistakes of a pool entry that only this kind can see; paths may be relative.
        check_files: the same once paths are absolute.
        recognises: returns whether an entry without `backend` is of this kind.
    """

    name: str
    open: "Callable[[Expert, Opening], Backend]"
    fields: tuple[str, ...] = ("model",)
    required: tuple[str, ...] = ("model",)
    paths: tuple[str, ...] = ()
    remote: bool = False
    priced: bool = False
    key: "Callable[[Expert], str | None]" = _given_key
    address: "Callable[[Expert], str]" = _given_address
    weights: "Callable[[Expert, Source | None], Weights | None]" = _no_weights
    needs_base: "Callable[[Expert], bool]" = lambda expert: False
    check: Callable[[Mapping[str, Any], str], list[str]] = _no_mistakes
    check_files: Callable[[Mapping[str, Any], str], list[str]] = _no_mistakes
    recognises: Callable[[Mapping[str, Any]], bool] = _never


@lru_cache
def kinds() -> dict[str, ExpertKind]:
    """Return every kind by name: those of other packages first, which are asked first.

    Raises:
        ExpertokenError: an entry point names something else than an `ExpertKind`, or a name is taken.
    """
    ours = [kind for module in _OURS for kind in import_module(module).KINDS]
    found: dict[str, ExpertKind] = {}
    for entry in entry_points(group=_GROUP):
        kind = entry.load()
        if not isinstance(kind, ExpertKind):
            raise ExpertokenError(
                f"entry point {entry.name!r} of {_GROUP}: expected an ExpertKind, got {type(kind).__name__}"
            )
        if kind.name in found or kind.name in {one.name for one in ours}:
            raise ExpertokenError(f"entry point {entry.name!r} of {_GROUP}: the kind {kind.name!r} exists already")
        found[kind.name] = kind
    return found | {kind.name: kind for kind in ours}


def kind_of(name: str) -> ExpertKind:
    """Return a kind by its name.

    Raises:
        ExpertokenError: there is no such kind.
    """
    if name not in kinds():
        raise ExpertokenError(f"unknown backend {name!r}, {did_you_mean(name, kinds())}")
    return kinds()[name]


def recognised(entry: Mapping[str, Any]) -> str:
    """Return the kind of an entry that names no backend: the first that recognises it, else the first of ours."""
    ours: list[ExpertKind] = list(import_module(_OURS[0]).KINDS)
    return next((name for name, kind in kinds().items() if kind.recognises(entry)), ours[0].name)
