"""Readers of public result formats: one small module each, found by name or by looking at the file.

A reader is a module (or any object) with `read(path, *, option=default) -> BenchmarkResults` and, to be found by
`--format auto`, `recognises(file, head) -> bool`, which sees one file and its first characters. Readers of other
packages join through the entry point group `expertoken.readers`:

    [project.entry-points."expertoken.readers"]
    mine = "my_package.my_reader"
"""

from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

_GROUP = "expertoken.readers"

READERS = {
    "lm-eval": "lm_eval",
    "routerdc": "routerdc",
    "routerbench": "routerbench",
    "routereval": "routereval",
    "llmrouterbench": "llmrouterbench",
    "embedllm": "embedllm",
    "routellm": "routellm",
    "routerarena": "routerarena",
    "inspect": "inspect_ai",
    "leaderboard-details": "leaderboard_details",
    "lmms-eval": "lmms_eval",
    "vlmevalkit": "vlmevalkit",
    "datasets": "hf_datasets",
    "table": "table",
}
"""Format name to module, in the order in which they are asked: `table` takes what no other reader knows."""


def formats() -> list[str]:
    """Return the names of all formats, those of other packages first; imports no reader."""
    return [*dict.fromkeys([entry.name for entry in entry_points(group=_GROUP)] + list(READERS))]


@lru_cache
def readers() -> dict[str, Any]:
    """Return all readers by format; those of other packages are asked first."""
    ours = {name: import_module(f"{__name__}.{module}") for name, module in READERS.items()}
    return {entry.name: entry.load() for entry in entry_points(group=_GROUP)} | ours
