"""Origins of models, and the forms in which they can be loaded. This module does not import torch."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""Types of weights by name. `auto` is the type that the model was saved in."""

QUANTIZATIONS = ("nf4", "int8")
"""Quantizations of linear layers by bitsandbytes: 4 bits with double quantization, or 8 bits."""

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations of attention in transformers."""

_PATH = re.compile(r"[./~]|[^/]*/[^/]*/")


@dataclass(frozen=True)
class Source:
    """Origin of a model.

    Attributes:
        model: Hub id, folder or GGUF file.
        revision: Git revision on the hub.
        trust_remote_code: If true, the repository may run its own code.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False

    def resolved(self) -> "Source":
        """Return the same source with a local path made absolute."""
        path = local_path(self.model)
        return Source(str(path.resolve()), self.revision, self.trust_remote_code) if path.exists() else self


def local_path(name: str | Path) -> Path:
    """Return the path that a name may mean, with `~` replaced by the user's home.

    `~NAME` of an unknown user stays as it is: such a path does not exist, and the caller reports that.
    """
    return Path(os.path.expanduser(name))  # noqa: PTH111 - pathlib raises RuntimeError for an unknown user


def is_address(value: object) -> bool:
    """Check whether a value is a web address without possible secrets: a user's name, a password, a query."""
    web = isinstance(value, str) and value.startswith(("http://", "https://"))
    return web and not {"@", "?"} & set(str(value))


def is_path(model: str) -> bool:
    """Check whether the name of a model or composite can only be a path. A hub id is `owner/name`."""
    return _PATH.match(model) is not None


def same_model(one: str, other: str) -> bool:
    """Check whether two names (hub ids, or paths in any spelling) mean the same model."""
    return Source(one).resolved() == Source(other).resolved()
