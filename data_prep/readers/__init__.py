"""Readers of public result formats: one small module each, selected by name or by the content of a file.

A reader is a module (or any object) with `read(path, *, option=default) -> BenchmarkResults`. For `--format auto` it
also has `recognises(file, head) -> bool`, which gets one file and its first characters. Other packages add readers
through the entry point group `expertoken.readers`:

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
"""Module by format name, in the order of recognition: `table` takes files that no other reader recognises."""


def formats() -> list[str]:
    """Return the names of all formats, formats of other packages first, without importing a reader."""
    return [*dict.fromkeys([entry.name for entry in entry_points(group=_GROUP)] + list(READERS))]


@lru_cache
def readers() -> dict[str, Any]:
    """Return all readers by format, readers of other packages first."""
    ours = {name: import_module(f"{__name__}.{module}") for name, module in READERS.items()}
    return {entry.name: entry.load() for entry in entry_points(group=_GROUP)} | ours
