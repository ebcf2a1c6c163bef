"""Experts, the LLMs that can answer, and descriptors of their kinds.

A kind defines the fields of its pool entries, the rule for its key, and the function that opens it. The project's own
kinds are beside their backends in `inference/backends/`. Other packages add kinds through the entry point group
`expertoken.backends`:

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
"""Capabilities of an expert beyond answers in text: values of `supports` in a pool."""

DEFAULT_KIND = "transformers"
"""Kind of a pool entry without `backend`."""

_GROUP = "expertoken.backends"
# As text, not imported: a kind is defined beside its backend, on a higher floor, and reading a pool loads no backend.
_OURS = ("expertoken.inference.backends.local_kinds", "expertoken.inference.backends.endpoint")


@dataclass(frozen=True)
class Expert:
    """One LLM that can answer.

    Attributes:
        name: Name in reports and in the text form of the expert token, `<|expert:NAME|>`.
        backend: Kind of the expert, one of `kind_names()`: a model in this process, a LoRA adapter on one, an
            endpoint, `self`, or another package's kind. At most one expert is `self`, the meta LLM, without a token.
        model: Id at the endpoint, hub id or folder. For `adapter` the id or folder of the adapter. None for `self`.
        description: Strengths of the expert, for people. Method `lora` initialises the expert row from it when it
            starts cold.
        base: Model below the adapter, for `adapter` only. Defaults to the meta LLM's own base.
        revision: Git revision of `model` on the hub.
        base_url: Address of an endpoint.
        api_key_env: NAME of the environment variable that holds the endpoint's key.
        cost: USD per million tokens, `{"input": ..., "output": ...}`, with an optional `cached_input` for tokens that
            the endpoint has cached.
        results: Name in benchmark results, if it is neither `name` nor `model`.
        supports: Subset of `CAPABILITIES`, or None if unknown. See `capabilities`.
        context_length: Limit on the tokens of prompt and answer together, or None if unknown.
        max_output_tokens: Longest answer in tokens, or None if unknown.
        options: Values of the fields that only the expert's kind defines.
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
        """Return the expert of a valid pool entry."""
        known = {item.name for item in fields(cls)} - {"options"}
        options = {key: value for key, value in entry.items() if key not in known}
        values = {key: value for key, value in entry.items() if key in known}
        if values.get("supports") is not None:
            values["supports"] = tuple(values["supports"])
        return cls(**values, options=options)

    def entry(self) -> dict[str, Any]:
        """Return the expert's pool entry, the inverse of `from_entry`."""
        values = asdict(self)
        options = values.pop("options")
        if values["supports"] is not None:
            values["supports"] = list(values["supports"])
        return {key: value for key, value in values.items() if value not in (None, "")} | options

    @property
    def capabilities(self) -> frozenset[str] | None:
        """Capabilities of the expert beyond answers in text, or None if unknown.

        A model in this process answers in text only, unless its entry declares more.
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
        """True if this expert is self, the meta LLM."""
        return self.backend == SELF

    @property
    def token(self) -> str:
        """Expert token as text, for exports and for people. The meta LLM never reads it."""
        return f"<|expert:{self.name}|>"

    @property
    def key_variable(self) -> str | None:
        """Name of the environment variable with the key that is sent to the endpoint, or None."""
        return self.kind.key(self)

    def api_key(self) -> str:
        """Return the endpoint's key from the environment, or `none` for an endpoint without a key.

        Raises:
            ExpertFailedError: The variable is not set.
        """
        key = os.environ.get(self.key_variable) if self.key_variable else "none"
        if not key:
            raise ExpertFailedError(
                f"expected its key in the environment variable {self.key_variable}, which is not set"
            )
        return key

    def price(self, read: int, written: int, cached: int = 0) -> float | None:
        """Return the price in USD of a request, or None if the pool has no price.

        Args:
            read: Tokens of the prompt.
            written: Tokens of the answer.
            cached: Tokens of the prompt that the endpoint had cached.
        """
        if self.cost is None:
            return None
        less = self.cost["input"] - self.cost.get("cached_input", self.cost["input"])
        return (read * self.cost["input"] - min(cached, read) * less + written * self.cost["output"]) / 1e6

    def find_in(self, models: Iterable[str]) -> str | None:
        """Return the name in `models` that means this expert in results, or None."""
        models = set(models)
        found = next((key for key in self._keys if key in models), None)
        if found is None and self.model:
            # `organisation/math-7b` in a pool matches `math-7b` in a table if no other column matches too.
            ends = [name for name in models if name.split("/")[-1] == self.model.split("/")[-1]]
            found = ends[0] if len(ends) == 1 else None
        return found

    @property
    def called(self) -> str:
        """Names to look for in results, in the form of error messages."""
        return " or ".join(repr(key) for key in self._keys)

    @property
    def _keys(self) -> list[str]:
        return [key for key in dict.fromkeys((self.results, self.name, self.model)) if key]


@dataclass(frozen=True)
class Weights:
    """Model that an expert needs in this process.

    Attributes:
        source: Source of the causal LM.
        adapter: Folder or hub id, and revision, of a LoRA adapter on the model. None for the model itself.
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
    """Descriptor of one kind of expert. Its module must be light, because reading a pool opens no backend.

    Attributes:
        name: Value of `backend` in a pool.
        open: Function that opens the backend of an expert. It raises `ExpertFailedError` on failure.
        fields: Keys of a pool entry that this kind reads beside the common keys. A key without an attribute of `Expert`
            is kept in `Expert.options`.
        required: Required keys.
        paths: Keys whose values may be local paths. In a pool file they are relative to the file.
        remote: True if the expert answers outside this process, so that this process loads no model for it.
        priced: True if each request costs money, so that a missing `cost` is unknown rather than 0.
        key: Function that returns the NAME of the environment variable whose value is sent, or None.
        address: Function that returns the address that this value is sent to, for messages.
        weights: Function that returns the model that must be in memory in this process, from the meta LLM's base. It
            returns None for an expert without such a model.
        needs_base: Function that returns True if the expert runs on the meta LLM's base.
        batches: True if its backend's `complete` answers many conversations at once.
        scores_texts: True if its backend implements `log_likelihood`.
        is_weights: True if the expert is its weights and nothing else, so that `collect` may measure them in batches
            itself. Otherwise, for instance with a system prompt, `collect` calls the backend.
        check: Function that returns the mistakes of a pool entry that only this kind can detect. Paths may be relative.
        check_files: Function like `check`, called once paths are absolute.
        recognises: Function that returns True if a new expert without `backend` (`expertoken expert add`) is of this
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
        raise ExpertokenError(
            f"backend {name!r}: {entry.value} can't be imported ({one_line(error)}). Repair or remove its package"
        ) from error
    if not isinstance(kind, ExpertKind) or kind.name != name:
        found = f"an ExpertKind named {kind.name!r}" if isinstance(kind, ExpertKind) else type(kind).__name__
        raise ExpertokenError(f"backend {name!r}: expected {entry.value} to be an ExpertKind of that name, got {found}")
    return kind


def kind_names() -> list[str]:
    """Return the names of all kinds, with the project's own first, without importing any other package."""
    return [*dict.fromkeys([*_ours(), *_others()])]


def kind_of(name: str) -> ExpertKind:
    """Return a kind by its name. Other packages can't override the project's own kinds.

    Raises:
        ExpertokenError: The kind is unknown, or its package can't be imported or names something else.
    """
    if name in _ours():
        return _ours()[name]
    if name not in _others():
        raise ExpertokenError(f"unknown backend {name!r}, {did_you_mean(name, kind_names())}")
    return _load(name)


def usable_kinds() -> Iterator[ExpertKind]:
    """Yield all kinds whose packages can be imported, so that a broken package does not affect other kinds."""
    for name in kind_names():
        try:
            kind = kind_of(name)
        except ExpertokenError as error:
            logger.warning("skipped a kind of experts: %s", error)
            continue
        yield kind


def recognised(entry: Mapping[str, Any]) -> str:
    """Return the kind of a new expert without `backend`: the first that recognises it, or the default."""
    return next((kind.name for kind in usable_kinds() if _recognises(kind, entry)), DEFAULT_KIND)


def _recognises(kind: ExpertKind, entry: Mapping[str, Any]) -> bool:
    try:
        return kind.recognises(entry)
    except Exception as error:  # another package's code can fail with anything
        logger.warning("skipped backend %r, which can't read the entry (%s)", kind.name, one_line(error))
        return False
