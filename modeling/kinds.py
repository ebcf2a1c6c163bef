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
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from .errors import ExpertokenError, did_you_mean, one_line
from .source import Source

if TYPE_CHECKING:
    from .backend import Backend, Opening
    from .experts import Expert

DEFAULT = "transformers"
"""Kind of a pool entry without `backend`."""

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
        batches: whether its backend's `complete` answers many conversations at once.
        scores_texts: whether its backend has `log_likelihood`.
        check: returns the mistakes of a pool entry that only this kind can see; paths may be relative.
        check_files: the same once paths are absolute.
        recognises: returns whether a new expert that is named without `backend` (`expertoken expert add`) is of this
            kind.
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
    batches: bool = False
    scores_texts: bool = False
    check: Callable[[Mapping[str, Any], str], list[str]] = _no_mistakes
    check_files: Callable[[Mapping[str, Any], str], list[str]] = _no_mistakes
    recognises: Callable[[Mapping[str, Any]], bool] = _never


@lru_cache
def _ours() -> dict[str, ExpertKind]:
    return {kind.name: kind for module in _OURS for kind in import_module(module).KINDS}


@lru_cache
def _others() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


@lru_cache
def _load(name: str) -> ExpertKind:
    entry = _others()[name]
    try:
        kind = entry.load()
    except Exception as error:  # another package's import can fail with anything
        raise ExpertokenError(f"backend {name!r}: {entry.value} can't be imported ({one_line(error)})") from error
    if not isinstance(kind, ExpertKind) or kind.name != name:
        found = f"an ExpertKind named {kind.name!r}" if isinstance(kind, ExpertKind) else type(kind).__name__
        raise ExpertokenError(f"backend {name!r}: expected {entry.value} to be an ExpertKind of that name, got {found}")
    return kind


def kind_names() -> list[str]:
    """Return the names of all kinds, ours first; imports no other package."""
    return [*dict.fromkeys([*_ours(), *_others()])]


def kind_of(name: str) -> ExpertKind:
    """Return a kind by its name; a name of ours is never another package's.

    Raises:
        ExpertokenError: there is no such kind, or its package can't be imported or names something else.
    """
    if name in _ours():
        return _ours()[name]
    if name not in _others():
        raise ExpertokenError(f"unknown backend {name!r}, {did_you_mean(name, kind_names())}")
    return _load(name)


def recognised(entry: Mapping[str, Any]) -> str:
    """Return the kind of a new expert that is named without `backend`: the first that recognises it, or the default.

    Raises:
        ExpertokenError: another package's kind can't be imported.
    """
    return next((name for name in kind_names() if kind_of(name).recognises(entry)), DEFAULT)
