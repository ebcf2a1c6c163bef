"""Experts and pools: who can answer, and how they are reached."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from os.path import relpath
from pathlib import Path
from typing import Any

import yaml

from .errors import ExpertFailedError, ExpertokenError, did_you_mean
from .files import atomic_file

BACKENDS = ("openai", "transformers", "adapter", "self")
SELF = "self"
"""The name under which the meta LLM itself stands in distributions and reports."""

RESERVED = ("composite", "random", "oracle", "kNN", "linear", "MLP", "clusters", "factors", "encoder")
"""Names that reports use themselves."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_PATH = re.compile(r"[./~]|[^/]*/[^/]*/")  # what cannot be a hub id, `owner/name`


class PoolError(ExpertokenError):
    """A pool that is not well formed; the message lists every mistake."""


@dataclass(frozen=True)
class Expert:
    """One LLM that can answer.

    Attributes:
        name: how it is called, in reports and in the text form of its token, `<|expert:NAME|>`.
        backend: `openai` (a compatible endpoint), `transformers` (a local model), `adapter` (a LoRA on a base), or
            `self` (the meta LLM; at most one, and it has no token).
        model: the model's id at the endpoint, its hub id or its folder; for `adapter` the adapter's. Not for `self`.
        description: what it is good at: what people read, and where its token starts when method `lora` starts cold.
        base: for `adapter`, the model the adapter sits on; the meta LLM's own base where absent.
        revision: git revision of `model` on the hub.
        base_url: address of the endpoint, for `openai`.
        api_key_env: NAME of the environment variable that holds the endpoint's key.
        cost: USD per million tokens, `{"input": ..., "output": ...}`.
        results: how benchmark results call it, where that is neither `name` nor `model`.
    """

    name: str
    backend: str = "transformers"
    model: str | None = None
    description: str = ""
    base: str | None = None
    revision: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    cost: dict[str, float] | None = None
    results: str | None = None

    @property
    def token(self) -> str:
        """The expert token as text: in exports and in what people read, never in what the meta LLM reads."""
        return f"<|expert:{self.name}|>"

    @property
    def key_variable(self) -> str | None:
        """The environment variable whose value is sent to the endpoint, or None."""
        if self.backend != "openai" or self.api_key_env:
            return self.api_key_env
        # OPENAI_API_KEY belongs to the client's default address; an endpoint elsewhere must not be sent it.
        return None if self.base_url else "OPENAI_API_KEY"

    def api_key(self) -> str:
        """The key of the endpoint, from the environment.

        Raises:
            ExpertFailedError: the variable is not set.
        """
        key = os.environ.get(self.key_variable) if self.key_variable else "none"
        if not key:
            raise ExpertFailedError(f"the environment variable {self.key_variable} with its key is not set")
        return key

    def price(self, read: int, written: int) -> float | None:
        """USD for tokens read and written, or None where the pool has no price."""
        if self.cost is None:
            return None
        return (read * self.cost["input"] + written * self.cost["output"]) / 1e6

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


def _mistakes(entry: Any, place: str) -> list[str]:  # noqa: C901 - one flat list of checks reads best in one place
    """Everything that is wrong with one entry of `experts:`."""
    if not isinstance(entry, dict):
        return [f"{place}: expected a mapping with at least `name`, got {type(entry).__name__}"]
    known = [field.name for field in fields(Expert)]
    found = []
    for key in entry:
        if key in ("api_key", "key", "token"):
            found.append(
                f"{place}.{key}: a key itself is refused; put it into an environment variable and give the variable's "
                "name as `api_key_env`"
            )
        elif key not in known:
            found.append(f"{place}.{key}: unknown key, {did_you_mean(str(key), known)}")
        elif key != "cost" and entry[key] is not None and not isinstance(entry[key], str):
            found.append(f"{place}.{key}: expected text, got {entry[key]!r}")
    name, backend = entry.get("name"), entry.get("backend", "transformers")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        found.append(f"{place}.name: expected letters, digits, '.', '_' or '-', got {name!r}")
    if backend not in BACKENDS:
        found.append(f"{place}.backend: unknown backend {backend!r}, {did_you_mean(str(backend), BACKENDS)}")
    if backend in ("openai", "transformers", "adapter") and not entry.get("model"):
        found.append(f"{place}.model: needed for backend {backend!r}")
    if name in RESERVED:
        found.append(f"{place}.name: {name!r} is a line of its own in reports; choose another")
    if name == SELF and backend != SELF:
        found.append(f"{place}.name: {SELF!r} is the meta LLM itself; give it `backend: self` or another name")
    if backend == SELF and entry.get("model"):
        found.append(
            f"{place}.model: not for backend 'self', which is always the meta LLM (`results` names its scores)"
        )
    for key, owner in (("base_url", "openai"), ("api_key_env", "openai"), ("base", "adapter")):
        if entry.get(key) and backend in BACKENDS and backend != owner:
            found.append(f"{place}.{key}: only for backend {owner!r}")
    variable = entry.get("api_key_env")
    if isinstance(variable, str) and not _VARIABLE.fullmatch(variable):
        # The value is not repeated: it may well be the key itself.
        found.append(f"{place}.api_key_env: expected the NAME of an environment variable, such as MATH_API_KEY")
    url = entry.get("base_url")
    if isinstance(url, str) and (not url.startswith(("http://", "https://")) or "@" in url or "?" in url):
        found.append(f"{place}.base_url: expected http(s)://host[:port]/path without a user name, password or query")
    return found + _cost_mistakes(entry.get("cost"), place)


def _cost_mistakes(cost: Any, place: str) -> list[str]:
    if cost is None:
        return []
    ok = isinstance(cost, dict) and set(cost) == {"input", "output"}
    if ok and all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1e6 for v in cost.values()):
        return []
    return [f"{place}.cost: expected {{input: USD, output: USD}} per million tokens, got {cost!r}"]


class ExpertPool:
    """The ordered set of experts of one composite; expert k has the token id `V + k`.

    An entry with `backend: self` makes the meta LLM a candidate of its own ("no expert"). It has no token: its
    probability is the mass of the ordinary vocabulary.

    Args:
        experts: experts in order, at most one of them with backend `self`.

    Raises:
        PoolError: with every mistake: of an entry, a name that appears twice, no expert, more than one self.
    """

    def __init__(self, experts: Iterable[Expert]) -> None:
        entries = list(experts)
        selves = [expert for expert in entries if expert.backend == SELF]
        self.experts = [expert for expert in entries if expert.backend != SELF]
        self.self_expert = selves[0] if selves else None
        names = [expert.name for expert in entries]
        mistakes = [
            mistake
            for index, expert in enumerate(entries)
            for mistake in _mistakes(asdict(expert), f"experts[{index}]")
        ]
        mistakes += [f"the name {name!r} appears twice" for name in sorted({n for n in names if names.count(n) > 1})]
        if len(selves) > 1:
            mistakes.append("more than one expert has `backend: self`")
        if not self.experts:
            mistakes.append("there is no expert besides self")
        if mistakes:
            raise PoolError("pool: " + "; ".join(mistakes))

    def __len__(self) -> int:
        return len(self.experts)

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.experts)

    @property
    def self_name(self) -> str | None:
        """How self is called, or None where it is no candidate."""
        return self.self_expert.name if self.self_expert else None

    @property
    def has_self(self) -> bool:
        """Whether the meta LLM is a candidate."""
        return self.self_expert is not None

    @property
    def candidates(self) -> list[Expert]:
        """The experts in token order, then self where it is a candidate: the order of every distribution."""
        return [*self.experts, *([self.self_expert] if self.self_expert else [])]

    @property
    def names(self) -> list[str]:
        """Names of the candidates."""
        return [expert.name for expert in self.candidates]

    def __getitem__(self, name: str) -> Expert:
        for expert in self.candidates:
            if expert.name == name:
                return expert
        raise PoolError(f"no expert {name!r} in the pool, {did_you_mean(name, self.names)}")

    def index(self, name: str) -> int:
        """Which row of the head stands for `name`.

        Raises:
            PoolError: there is no such expert, or it is self, which has no row.
        """
        expert = self[name]
        if expert.backend == SELF:
            raise PoolError(f"{name!r} is the meta LLM itself and has no token")
        return self.experts.index(expert)

    def with_expert(self, expert: Expert) -> "ExpertPool":
        """A pool with one more expert, its token after the others."""
        return ExpertPool([*self.candidates, expert])

    def without(self, name: str) -> "ExpertPool":
        """A pool without one expert; those behind it move one token id down."""
        self.index(name)
        return ExpertPool([expert for expert in self.candidates if expert.name != name])

    def missing(self) -> list[str]:
        """Local models that are not on this machine: no mistake where they will answer on another one."""
        local = [expert for expert in self.experts if expert.backend in ("transformers", "adapter")]
        return [
            f"expert {expert.name!r}: there is nothing at {path} on this machine"
            for expert in local
            for path in (expert.model, expert.base)
            if path and _PATH.match(path) and not Path(path).exists()
        ]

    @classmethod
    def parse(cls, document: Any, source: str = "pool", folder: Path | None = None) -> "ExpertPool":
        """Build a pool from what a YAML file holds.

        Args:
            document: a mapping with the key `experts`.
            source: how errors call it.
            folder: where relative paths of models start.

        Raises:
            PoolError: with every mistake of the document.
        """
        if not isinstance(document, dict) or not isinstance(document.get("experts"), list):
            raise PoolError(f"{source}: expected a mapping with a list `experts:`")
        mistakes = [
            f"{key}: unknown key, {did_you_mean(str(key), ['experts'])}" for key in document if key != "experts"
        ]
        for index, entry in enumerate(document["experts"]):
            mistakes += _mistakes(entry, f"experts[{index}]")
        if mistakes:
            raise PoolError(f"{source}: " + "; ".join(mistakes))
        entries = [{**entry, **_absolute(entry, folder)} for entry in document["experts"]]
        mistakes = [m for index, entry in enumerate(entries) for m in _kind_mistakes(entry, f"experts[{index}]")]
        if mistakes:
            raise PoolError(f"{source}: " + "; ".join(mistakes))
        try:
            return cls(Expert(**entry) for entry in entries)
        except PoolError as error:
            raise PoolError(f"{source}: {error}") from None

    @classmethod
    def from_yaml(cls, path: Path | str) -> "ExpertPool":
        """Read a pool file; paths of local models in it are relative to the file.

        Raises:
            PoolError: the file is missing, is no YAML, or has mistakes (all of them are listed).
        """
        path = Path(path)
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PoolError(f"{path}: {error.strerror}; expected a pool file (YAML with `experts:`)") from None
        except UnicodeDecodeError as error:
            raise PoolError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
        except yaml.YAMLError as error:
            # Where and what, but not the line itself, which PyYAML would quote: it may hold a key.
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}" if mark else "the file"
            raise PoolError(
                f"{path}: {where} is not YAML ({getattr(error, 'problem', None) or 'unreadable'})"
            ) from None
        return cls.parse(document, str(path), path.parent.absolute())

    def to_yaml(self, path: Path | str) -> None:
        """Write the pool; local paths become relative to the file's folder, so that a tree can move."""
        folder = Path(path).parent.resolve()
        entries = []
        for expert in self.candidates:
            entry = {key: value for key, value in asdict(expert).items() if value not in (None, "")}
            for key in ("model", "base"):
                if key in entry and expert.backend != "openai" and Path(entry[key]).exists():
                    entry[key] = relpath(Path(entry[key]).resolve(), folder)
            entries.append(entry)
        with atomic_file(path) as aside:
            aside.write_text(yaml.safe_dump({"experts": entries}, sort_keys=False, allow_unicode=True), "utf-8")


def is_adapter(model: str) -> bool:
    """Whether a local folder holds a LoRA adapter."""
    return (Path(model) / "adapter_config.json").exists()


def _kind_mistakes(entry: dict, place: str) -> list[str]:
    """A local folder under a backend that cannot read it."""
    backend, model = entry.get("backend", "transformers"), entry.get("model", "")
    if backend == "transformers" and is_adapter(model):
        return [f"{place}.backend: {model} is a LoRA adapter; expected `backend: adapter`"]
    if backend == "adapter" and (Path(model) / "config.json").exists() and not is_adapter(model):
        return [f"{place}.backend: {model} is a whole model, not an adapter; expected `backend: transformers`"]
    return []


def _absolute(entry: dict, folder: Path | None) -> dict[str, str]:
    """Model paths of one entry that exist under `folder`, made absolute; hub ids are left alone."""
    if folder is None or entry.get("backend") == "openai":
        return {}
    found = {key: folder / entry[key] for key in ("model", "base") if entry.get(key)}
    return {key: str(path.resolve()) for key, path in found.items() if path.exists()}
