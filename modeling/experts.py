"""Experts and their kinds: the LLMs that can answer, and what is known of each kind of them.

A kind has the fields of its pool entries, the rule for its key, and how it is opened. Our kinds stand beside their
backends in `inference/backends/`. Other packages add theirs through the entry point group `expertoken.backends`:

    [project.entry-points."expertoken.backends"]
    mine = "my_package.my_backend:KIND"
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .backend import Backend, Opening
from .errors import ExpertFailedError, ExpertokenError, did_you_mean, one_line
from .source import Source

logger = logging.getLogger(__name__)

SELF = "self"
"""Name of the meta LLM itself in distributions and reports, and of its kind in pools."""

CAPABILITIES = ("tools", "images", "json_schema")
"""What an expert may be able to do beyond answering in text: values of `supports` in a pool."""

DEFAULT_KIND = "transformers"
"""Kind of a pool entry without `backend`."""

_GROUP = "expertoken.backends"
# Named, not imported: a kind lives with its backend, on a higher floor, and a pool is read without any backend.
_OURS = ("expertoken.inference.backends.local_kinds", "expertoken.inference.backends.endpoint")


@dataclass(frozen=True)
class Expert:
    """One LLM that can answer.

    Attributes:
        name: name in reports and in the text form of its token, `<|expert:NAME|>`.
        backend: kind of the expert, one of `kind_names()`: a model in this process, a LoRA adapter on one, an
            endpoint, `self` (the meta LLM; at most one, without a token), or another package's.
        model: id at the endpoint, hub id or folder; for `adapter` that of the adapter. Not for `self`.
        description: what the expert is good at, for people; method `lora` starts its token there when it starts cold.
        base: for `adapter`, the model below the adapter; the meta LLM's own base where absent.
        revision: git revision of `model` on the hub.
        base_url: address of an endpoint.
        api_key_env: NAME of the environment variable that holds the endpoint's key.
        cost: USD per million tokens, `{"input": ..., "output": ...}`, and maybe `cached_input` for what the endpoint
            has cached.
        results: name in benchmark results, where that is neither `name` nor `model`.
        supports: of `CAPABILITIES`, what it can do; None where that is not known. See `capabilities`.
        context_length: tokens that it reads and writes together; None where not known.
        max_output_tokens: longest answer; None where not known.
        options: values of the fields that only its kind knows.
    """

    name: str
    backend: str = DEFAULT_KIND
    model: str | None = None
    description: str = ""
    base: str | None = None
    revision: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    cost: dict[str, float] | None = field(default=None, hash=False)
    results: str | None = None
    supports: tuple[str, ...] | None = None
    context_length: int | None = None
    max_output_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "Expert":
        """Return the expert of a pool entry, which must be free of mistakes."""
        known = {item.name for item in fields(cls)} - {"options"}
        options = {key: value for key, value in entry.items() if key not in known}
        values = {key: value for key, value in entry.items() if key in known}
        if values.get("supports") is not None:
            values["supports"] = tuple(values["supports"])
        return cls(**values, options=options)

    def entry(self) -> dict[str, Any]:
        """Return the pool entry of the expert: the inverse of `from_entry`."""
        values = asdict(self)
        options = values.pop("options")
        if values["supports"] is not None:
            values["supports"] = list(values["supports"])
        return {key: value for key, value in values.items() if value not in (None, "")} | options

    @property
    def capabilities(self) -> frozenset[str] | None:
        """What the expert can do beyond answering in text; None where nobody knows.

        A model in this process answers in text unless its entry says more.
        """
        if self.supports is None:
            return None if self.kind.remote else frozenset()
        return frozenset(self.supports)

    @property
    def kind(self) -> "ExpertKind":
        """Descriptor of the expert's kind."""
        return kind_of(self.backend)

    @property
    def is_self(self) -> bool:
        """Whether this is the meta LLM itself."""
        return self.backend == SELF

    @property
    def token(self) -> str:
        """Expert token as text: in exports and in what people read, never in what the meta LLM reads."""
        return f"<|expert:{self.name}|>"

    @property
    def key_variable(self) -> str | None:
        """Name of the environment variable whose value is sent to the endpoint, or None."""
        return self.kind.key(self)

    def api_key(self) -> str:
        """Return the key of the endpoint from the environment, or `none` where it needs none.

        Raises:
            ExpertFailedError: the variable is not set.
        """
        key = os.environ.get(self.key_variable) if self.key_variable else "none"
        if not key:
            raise ExpertFailedError(f"the environment variable {self.key_variable} with its key is not set")
        return key

    def price(self, read: int, written: int, cached: int = 0) -> float | None:
        """USD for tokens read and written, or None where the pool has no price.

        Args:
            read: tokens of the prompt.
            written: tokens of the answer.
            cached: tokens of the prompt that the endpoint had cached.
        """
        if self.cost is None:
            return None
        less = self.cost["input"] - self.cost.get("cached_input", self.cost["input"])
        return (read * self.cost["input"] - min(cached, read) * less + written * self.cost["output"]) / 1e6

    def find_in(self, models: Iterable[str]) -> str | None:
        """The one of `models` that results call this expert by, or None."""
        models = set(models)
        found = next((key for key in self._keys if key in models), None)
        if found is None and self.model:
            # `organisation/math-7b` in a pool, `math-7b` in a table: as long as just one column can be meant.
            ends = [name for name in models if name.split("/")[-1] == self.model.split("/")[-1]]
            found = ends[0] if len(ends) == 1 else None
        return found

    @property
    def called(self) -> str:
        """The names under which results are looked for, as errors say them."""
        return " or ".join(repr(key) for key in self._keys)

    @property
    def _keys(self) -> list[str]:
        return [key for key in dict.fromkeys((self.results, self.name, self.model)) if key]


@dataclass(frozen=True)
class Weights:
    """The model that an expert needs in this process.

    Attributes:
        source: the causal LM.
        adapter: folder or hub id, and revision, of a LoRA adapter on it; None for the model itself.
    """

    source: Source
    adapter: tuple[str, str | None] | None = None


def _no_weights(expert: Expert, base: Source | None) -> Weights | None:
    return None


def _given_key(expert: Expert) -> str | None:
    return expert.api_key_env


def _given_address(expert: Expert) -> str:
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
        is_weights: whether the expert is its weights and nothing else, so that `collect` may measure them in batches by
            itself; otherwise, as with a prompt of its own, it asks the backend.
        check: returns the mistakes of a pool entry that only this kind can see; paths may be relative.
        check_files: the same once paths are absolute.
        recognises: returns whether a new expert that is named without `backend` (`expertoken expert add`) is of this
            kind.
    """

    name: str
    open: Callable[[Expert, Opening], Backend]
    fields: tuple[str, ...] = ("model",)
    required: tuple[str, ...] = ("model",)
    paths: tuple[str, ...] = ()
    remote: bool = False
    priced: bool = False
    key: Callable[[Expert], str | None] = _given_key
    address: Callable[[Expert], str] = _given_address
    weights: Callable[[Expert, Source | None], Weights | None] = _no_weights
    needs_base: Callable[[Expert], bool] = lambda expert: False
    batches: bool = False
    scores_texts: bool = False
    is_weights: bool = False
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


def usable_kinds() -> Iterator[ExpertKind]:
    """Yield all kinds but those whose packages can't be imported: who doesn't ask for them is not stopped by them."""
    for name in kind_names():
        try:
            kind = kind_of(name)
        except ExpertokenError as error:
            logger.warning("passed over: %s", error)
            continue
        yield kind


def recognised(entry: Mapping[str, Any]) -> str:
    """Return the kind of a new expert that is named without `backend`: the first that recognises it, or the default."""
    return next((kind.name for kind in usable_kinds() if _recognises(kind, entry)), DEFAULT_KIND)


def _recognises(kind: ExpertKind, entry: Mapping[str, Any]) -> bool:
    try:
        return kind.recognises(entry)
    except Exception as error:  # another package's code can fail with anything
        logger.warning("passed over: backend %r can't read the entry (%s)", kind.name, one_line(error))
        return False
