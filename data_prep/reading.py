"""Reading of benchmark results in any known format."""

import inspect
import logging
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from ..modeling.errors import ResultsError, did_you_mean
from ..modeling.source import local_path
from .readers import hf_datasets, readers, table
from .readers.frames import SUFFIXES, load_table, tidy
from .readers.text import head_of, lines_of, read_text, suffix_of
from .results import BenchmarkResults

logger = logging.getLogger(__name__)

_HEAD = 20_000  # characters of a file that a reader sees
_SEEN = 20  # most files of a folder that readers see
_BINARY = (".parquet", ".xlsx", ".pkl", ".arrow")  # recognised by suffix, because they hold no text


def detect(path: Path, options: Iterable[str] = ()) -> str:
    """Detect the format of a file or folder by its content.

    Args:
        path: File or folder.
        options: Names of options for the reader. If several readers recognise the file, the first one with these
            options is taken. So `--set query=question` reads any records as a table.

    Raises:
        ResultsError: No reader recognises the path.
    """
    options, found = set(options), []
    if hf_datasets.is_saved_dataset(path):
        return "datasets"
    files = [path] if path.is_file() else islice((file for file in sorted(path.rglob("*")) if file.is_file()), _SEEN)
    for file in files:
        head = "" if suffix_of(file) in _BINARY else head_of(file, _HEAD)
        for name, reader in readers().items():
            if hasattr(reader, "recognises") and _recognises(reader, file, head):
                if options <= set(_options(name)):
                    return name
                found.append(name)
    if found:
        return found[0]
    raise ResultsError(f"{path}: no format known here. Pass one with --format: {', '.join(readers())}")


def _recognises(reader: Any, file: Path, head: str) -> bool:
    """Check whether a reader recognises a file. If it raises, it does not."""
    try:
        return bool(reader.recognises(file, head))
    except Exception:  # raised by csv, by pickles, by other packages' readers
        logger.debug("%s failed on %s, so it does not recognise the file", reader, file, exc_info=True)
        return False


def _reader(format: str) -> Any:  # noqa: A002
    if format not in readers():
        raise ResultsError(f"unknown format {format!r}, {did_you_mean(format, ['auto', *readers()])}")
    return readers()[format]


def read_results(path: Path | str, format: str = "auto", **options: Any) -> BenchmarkResults:  # noqa: A002
    """Read benchmark results from a file or folder.

    Args:
        path: File, or folder of files. For the format `datasets` also a hub id.
        format: Name of a format (see `readers.formats`), or `auto`.
        **options: Options of the reader.

    Raises:
        ResultsError: The path or the format does not exist, the reader has no such option, or a file has another
            format.
    """
    if format != "auto":
        _check_options(format, options)
    if format == "datasets":
        return hf_datasets.read(path, **options)
    path = local_path(path)
    if not path.exists():
        raise ResultsError(f"{path}: no such file or folder. Expected benchmark results.")
    if format == "auto":
        format = detect(path, options)  # noqa: A001
        _check_options(format, options)
    return _reader(format).read(path, **options)


def _options(format: str) -> dict[str, str]:  # noqa: A002
    """Return the options of a reader, with their types as text."""
    known: dict[str, str] = {}
    for name, parameter in inspect.signature(_reader(format).read).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            known[name] = str(parameter.annotation)
        elif parameter.kind is parameter.VAR_KEYWORD:
            known |= {column.name: str(column.type) for column in fields(table.Columns)}
    return known


def _check_options(format: str, options: Iterable[str], place: str = "") -> None:  # noqa: A002
    known = _options(format)
    for key in options:
        if key not in known:
            raise ResultsError(f"{place}format {format!r} has no option {key!r}, {did_you_mean(key, known)}")


def parse_options(format: str, pairs: list[str]) -> dict[str, Any]:  # noqa: A002
    """Parse options of a reader from `KEY=VALUE` texts. Values of list options are separated by commas.

    Raises:
        ResultsError: A text has no `=`, or the reader has no such option.
    """
    known = _options(format)
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ResultsError(f"--set {pair}: expected KEY=VALUE")
        _check_options(format, [key], f"--set {pair}: ")
        words = {"true": True, "false": False}
        options[key] = value.split(",") if "Sequence" in known[key] else words.get(value.lower(), value)
    return options


def read_queries(path: Path) -> list[str]:
    """Read questions without scores from a text file with one per line, or from a table with a column `query`.

    Raises:
        ResultsError: The file is missing or empty, or has no such column.
    """
    if not path.exists():
        raise ResultsError(f"{path}: no such file. Expected one question per line, or a table with a column 'query'.")
    if suffix_of(path) in SUFFIXES:
        frame = load_table(path, texts=("query",))
        if "query" not in frame:
            raise ResultsError(f"{path}: no column 'query', {did_you_mean('query', map(str, frame.columns))}")
        found = frame["query"].dropna().astype(str).tolist()
    else:
        found = [tidy(line) for _, line in lines_of(read_text(path))]
    if not found:
        raise ResultsError(f"{path}: expected questions, found an empty file")
    return found
