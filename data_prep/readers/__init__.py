"""Readers of public result formats: one small module each, found by name in `READERS`."""

import inspect
from pathlib import Path
from typing import Any

from ...modeling.errors import did_you_mean
from ..results import BenchmarkResults, ResultsError
from . import lm_eval, routerdc, table

READERS = {"table": table.read, "routerdc": routerdc.read, "lm-eval": lm_eval.read}
"""Format name to reader: `read(path, **options) -> BenchmarkResults`."""


def read_results(path: Path | str, format: str = "table", **options: Any) -> BenchmarkResults:  # noqa: A002
    """Read benchmark results from a file or folder.

    Args:
        path: a file, or a folder of files.
        format: a key of `READERS`.
        **options: of the reader.

    Raises:
        ResultsError: the path or the format does not exist, or a file is not of that format.
    """
    path = Path(path).expanduser()
    if format not in READERS:
        raise ResultsError(f"unknown format {format!r}, {did_you_mean(format, READERS)}")
    if not path.exists():
        raise ResultsError(f"{path}: no such file or folder; expected benchmark results")
    return READERS[format](path, **options)


def parse_options(format: str, pairs: list[str]) -> dict[str, Any]:  # noqa: A002
    """Reader options from `KEY=VALUE` texts; options that are lists take commas.

    Raises:
        ResultsError: a text has no `=`, or the reader has no such option.
    """
    if format not in READERS:
        raise ResultsError(f"unknown format {format!r}, {did_you_mean(format, READERS)}")
    known = [name for name, p in inspect.signature(READERS[format]).parameters.items() if p.kind is p.KEYWORD_ONLY]
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ResultsError(f"--set {pair}: expected KEY=VALUE")
        if key not in known:
            raise ResultsError(f"--set {pair}: format {format!r} has no option {key!r}, {did_you_mean(key, known)}")
        words = {"true": True, "false": False}
        listed = "Sequence" in str(inspect.signature(READERS[format]).parameters[key].annotation)
        options[key] = value.split(",") if listed else words.get(value.lower(), value)
    return options
