"""Pools of experts, read from YAML files with a report of every mistake at once."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from os.path import relpath
from pathlib import Path
from typing import Any

import yaml

from .errors import PoolError, did_you_mean, one_line
from .experts import CAPABILITIES, DEFAULT_KIND, SELF, Expert, ExpertKind, kind_names, kind_of, usable_kinds
from .files import atomic_file
from .source import is_address, is_path, local_path

RESERVED = (
    "composite", "random", "oracle", "names", "words", "kNN", "guarded-kNN", "linear", "MLP", "ensemble", "ranking",
    "clusters", "factors", "untrained", "text-only", "encoder",
)  # fmt: skip
"""Names that reports reserve for their own rows."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMON = (
    "name", "backend", "description", "revision", "cost", "results", "supports", "context_length", "max_output_tokens",
)  # fmt: skip
"""Keys that every kind has."""
_SECRETS = ("api_key", "key", "token")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


def _mistakes(entry: Any, place: str) -> list[str]:
    """Return all mistakes in one entry of `experts:`."""
    if not isinstance(entry, dict):
        return [f"{place}: expected a mapping with at least `name`, got {type(entry).__name__}"]
    name, backend = entry.get("name"), entry.get("backend", DEFAULT_KIND)
    kind = kind_of(backend) if isinstance(backend, str) and backend in kind_names() else None
    found = [mistake for key, value in entry.items() for mistake in _field_mistakes(str(key), value, kind, place)]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        found.append(f"{place}.name: expected letters, digits, '.', '_' or '-', got {name!r}")
    if name in RESERVED:
        found.append(f"{place}.name: {name!r} is reserved for a row of reports (choose another name)")
    if name == SELF and backend != SELF:
        found.append(f"{place}.name: {SELF!r} is the meta LLM itself (set `backend: self` or choose another name)")
    if kind is None:
        found.append(f"{place}.backend: unknown backend {backend!r}, {did_you_mean(str(backend), kind_names())}")
    else:
        missing = [key for key in kind.required if not entry.get(key)]
        found += [f"{place}.{key}: needed for backend {backend!r}" for key in missing]
        found += _checked(kind, "check", entry, place)
    return found + _cost_mistakes(entry.get("cost"), place)


def _field_mistakes(key: str, value: Any, kind: ExpertKind | None, place: str) -> list[str]:
    """Return the mistakes in one key of an entry, independent of its other keys."""
    if secret := _secret(key, value):
        return [
            f"{place}.{secret}: a key itself is refused (put it into an environment variable and give the variable's "
            "name as `api_key_env`)"
        ]
    attributes = [item.name for item in fields(Expert) if item.name != "options"]
    own = kind.fields if kind else ()
    if key not in attributes and key not in own:
        return [f"{place}.{key}: unknown key, {did_you_mean(key, [*attributes, *own])}"]
    if value is None or key == "cost":
        return []
    if key in ("supports", "context_length", "max_output_tokens"):
        return _capability_mistakes(key, value, place)
    if key not in attributes and not (kind and key in kind.paths):
        told = f"{place}.{key}: expected text, numbers, lists or mappings with texts as keys, got {value!r}"
        return [] if _is_plain(value) else [told]
    if key in ("api_key_env", "base_url") and (found := _address_mistakes(key, value, place)):
        return found
    if not isinstance(value, str):
        return [f"{place}.{key}: expected text, got {value!r}"]
    return _owner_mistakes(key, value, kind, place)


def _secret(key: str, value: Any) -> str | None:
    """Return the key under which an entry would hold a secret, or None."""
    if key in _SECRETS:
        return key
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_secret(str(name), one) for name, one in inside)
    return next((f"{key}.{place}" for place in found if place), None)


def _is_plain(value: Any) -> bool:
    """Check whether a value survives JSON unchanged, because options are hashed and recorded as JSON."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


def _address_mistakes(key: str, value: Any, place: str) -> list[str]:
    """Return the mistake in an address or in the name of its key, without the value, which may be a secret."""
    if key == "api_key_env":
        expected = "the NAME of an environment variable, such as MATH_API_KEY"
        fine = isinstance(value, str) and (not value or _VARIABLE.fullmatch(value))
    else:
        expected = "http(s)://host[:port]/path without a user name, password or query"
        fine = value == "" or is_address(value)
    return [] if fine else [f"{place}.{key}: expected {expected}"]


def _owner_mistakes(key: str, value: str, kind: ExpertKind | None, place: str) -> list[str]:
    """Return the mistake of a key that belongs to another kind, or an empty list."""
    if not value or kind is None or key in (*_COMMON, *kind.fields):
        return []
    owners = " or ".join(repr(other.name) for other in usable_kinds() if key in other.fields)
    return [f"{place}.{key}: only for backend {owners}"]


def _checked(kind: ExpertKind, name: str, entry: Mapping[str, Any], place: str) -> list[str]:
    """Return the mistakes that a kind's own check finds. A check that raises counts as a mistake too."""
    try:
        return [*getattr(kind, name)(entry, place)]
    except Exception as error:  # another package's code can fail with anything
        return [f"{place}: backend {kind.name!r} can't check the entry ({type(error).__name__}: {one_line(error)})"]


def _capability_mistakes(key: str, value: Any, place: str) -> list[str]:
    if key == "supports":
        fine = isinstance(value, list | tuple) and all(name in CAPABILITIES for name in value)
        expected = f"a list of {', '.join(CAPABILITIES)}"
    else:
        fine = isinstance(value, int) and not isinstance(value, bool) and value > 0
        expected = "a number of tokens above 0"
    return [] if fine else [f"{place}.{key}: expected {expected}, got {value!r}"]


def _cost_mistakes(cost: Any, place: str) -> list[str]:
    if cost is None:
        return []
    ok = isinstance(cost, dict) and set(cost) - {"cached_input"} == {"input", "output"}
    if ok and all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < 1e6 for v in cost.values()):
        return []
    return [
        f"{place}.cost: expected {{input: USD, output: USD}} per million tokens (optional: cached_input), got {cost!r}"
    ]


class ExpertPool:
    """The ordered set of experts of one composite, in which expert k has the token id `V + k`.

    An entry with `backend: self` makes the meta LLM itself a candidate ("no expert"). It has no token, but its own row
    in the decision.

    Args:
        experts: Experts in order, at most one of them with backend `self`.

    Raises:
        PoolError: The pool has mistakes, all of which are named: in an entry, a name that appears twice, no expert,
            more than one self.
    """

    def __init__(self, experts: Iterable[Expert]) -> None:
        entries = list(experts)
        selves = [expert for expert in entries if expert.is_self]
        self.experts = [expert for expert in entries if not expert.is_self]
        self.self_expert = selves[0] if selves else None
        names = [expert.name for expert in entries]
        mistakes = [
            mistake
            for index, expert in enumerate(entries)
            for mistake in _mistakes(expert.entry(), f"experts[{index}]")
        ]
        mistakes += [f"the name {name!r} appears twice" for name in sorted({n for n in names if names.count(n) > 1})]
        if len(selves) > 1:
            mistakes.append("more than one expert has `backend: self`")
        if not self.experts:
            mistakes.append("there is no expert besides self")
        if mistakes:
            raise PoolError("pool: " + "; ".join(mistakes))

    def __repr__(self) -> str:
        return f"ExpertPool({', '.join(self.names)})"

    def __len__(self) -> int:
        return len(self.experts)

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.experts)

    @property
    def self_name(self) -> str | None:
        """Name of self, or None if it is no candidate."""
        return self.self_expert.name if self.self_expert else None

    @property
    def has_self(self) -> bool:
        """True if the meta LLM is a candidate."""
        return self.self_expert is not None

    @property
    def candidates(self) -> list[Expert]:
        """Experts in token order, then self if it is a candidate. Every distribution has this order."""
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
        """Return the index of an expert in token order.

        Raises:
            PoolError: The pool has no such expert, or it is self, which has no token.
        """
        expert = self[name]
        if expert.is_self:
            raise PoolError(f"{name!r} is the meta LLM itself and has no token")
        return self.experts.index(expert)

    def with_expert(self, expert: Expert) -> "ExpertPool":
        """Return a pool with one more expert, whose token comes last."""
        return ExpertPool([*self.candidates, expert])

    def without(self, name: str) -> "ExpertPool":
        """Return a pool without one expert. The token ids of the experts behind it decrease by one."""
        self.index(name)
        return ExpertPool([expert for expert in self.candidates if expert.name != name])

    def missing(self) -> list[str]:
        """Return a sentence for each local model that is missing on this machine. Another machine may have it."""
        return [
            f"expert {expert.name!r}: {path} does not exist on this machine"
            for expert in self.experts
            for path in (expert.entry().get(key) for key in expert.kind.paths)
            if path and is_path(path) and not local_path(path).exists()
        ]

    @classmethod
    def parse(cls, document: Any, source: str = "pool", folder: Path | None = None) -> "ExpertPool":
        """Build a pool from the content of a YAML file.

        Args:
            document: Mapping with the key `experts`.
            source: Name of the document in errors.
            folder: Folder that relative paths of models start from.

        Raises:
            PoolError: The entries have mistakes, all of which are named. If the entries have none, their files are
                checked, and then the pool as a whole.
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
        mistakes = [
            mistake
            for index, entry in enumerate(entries)
            for mistake in _checked(kind_of(_backend(entry)), "check_files", entry, f"experts[{index}]")
        ]
        if mistakes:
            raise PoolError(f"{source}: " + "; ".join(mistakes))
        try:
            return cls(Expert.from_entry(entry) for entry in entries)
        except PoolError as error:
            raise PoolError(f"{source}: {error}") from None

    @classmethod
    def from_yaml(cls, path: Path | str) -> "ExpertPool":
        """Read a pool file. Paths of local models in it are relative to the file.

        Raises:
            PoolError: The file is missing, is not YAML, or has mistakes (see `parse`).
        """
        path = Path(path)
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PoolError(f"{path}: expected a pool file (YAML with `experts:`). {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise PoolError(
                f"{path}: expected UTF-8, found another byte at offset {error.start}. Save the file as UTF-8"
            ) from None
        except yaml.YAMLError as error:
            # PyYAML's own message quotes the line, which may hold a key.
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}" if mark else "the file"
            raise PoolError(
                f"{path}: expected YAML, which {where} is not ({getattr(error, 'problem', None) or 'unreadable'})"
            ) from None
        return cls.parse(document, str(path), path.parent.absolute())

    def to_yaml(self, path: Path | str) -> None:
        """Write the pool. Local paths become relative to the file's folder, so that a tree can move."""
        folder = Path(path).parent.resolve()
        entries = []
        for expert in self.candidates:
            entry = expert.entry()
            for key in expert.kind.paths:
                if key in entry and Path(entry[key]).exists():
                    entry[key] = relpath(Path(entry[key]).resolve(), folder)
            entries.append(entry)
        with atomic_file(path) as aside:
            aside.write_text(yaml.safe_dump({"experts": entries}, sort_keys=False, allow_unicode=True), "utf-8")


def _backend(entry: Mapping[str, Any]) -> str:
    return entry.get("backend", DEFAULT_KIND)


def _absolute(entry: Mapping[str, Any], folder: Path | None) -> dict[str, str]:
    """Return the local paths in one entry that exist under `folder`, made absolute. Hub ids are not returned."""
    if folder is None:
        return {}
    found = {key: folder / entry[key] for key in kind_of(_backend(entry)).paths if entry.get(key)}
    return {key: str(path.resolve()) for key, path in found.items() if path.exists()}
