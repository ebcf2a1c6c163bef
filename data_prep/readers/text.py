"""What readers share: finding files and opening them with one-line errors."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

from ...modeling.errors import ResultsError, one_line
from ..results import BenchmarkResults

SIDES = {"train": "train", "validation": "validation", "val": "validation", "dev": "validation", "test": "test"}
"""What files and splits are called to the sides that they are."""

_SIDE = re.compile(rf"(?:^|[-_])({'|'.join(SIDES)})$")


def files_of(path: Path, *suffixes: str) -> list[Path]:
    """`path` itself, or the files with one of the suffixes in the folder `path`, sorted.

    Raises:
        ResultsError: the folder holds none.
    """
    if path.is_file():
        return [path]
    found = sorted(file for suffix in suffixes for file in path.glob(f"*{suffix}"))
    if not found:
        raise ResultsError(f"{path}: empty results, no {' or '.join(suffixes)} file in the folder")
    return found


def side_of(file: Path) -> str | None:
    """The split that a file's name ends in (`_train`, `-test`, or all of the name), or None."""
    found = _SIDE.search(file.stem)
    return SIDES[found[1]] if found else None


def benchmark_of(file: Path) -> str:
    """A file's name less the split it ends in."""
    return _SIDE.sub("", file.stem) or file.stem


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        ResultsError: it can't be read, or is not UTF-8.
    """
    try:
        return file.read_text("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ResultsError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ResultsError(f"{file}: {error.strerror}") from None


def read_json(file: Path) -> Any:
    """The JSON document of a file.

    Raises:
        ResultsError: it is not JSON in UTF-8.
    """
    return parse_json(read_text(file), file)


def parse_json(text: str, file: Path, line: int = 1) -> Any:
    """A JSON document that begins on a line of a file.

    Raises:
        ResultsError: it is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}: line {line + error.lineno - 1}"
        raise ResultsError(f"{place} is not JSON ({error.msg}); is the file cut short?") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists in lists
        raise ResultsError(f"{file}: line {line} is not JSON that can be read ({one_line(error)})") from None


def header_of(head: str) -> list[str]:
    """The columns of a CSV by its beginning."""
    return next(csv.reader([head.partition("\n")[0]]), [])


def results_of(file: Path | str, *parts: Any) -> BenchmarkResults:
    """`BenchmarkResults(*parts)`; what is wrong with them is told with the file's name.

    Raises:
        ResultsError: see `BenchmarkResults`.
    """
    try:
        return BenchmarkResults(*parts)
    except ResultsError as error:
        raise ResultsError(f"{file}: {error}") from None


def number(value: Any, place: str) -> float:
    """A score as a float; null is NaN (not measured), true and false are 1 and 0.

    Raises:
        ResultsError: it is not a number, or NaN: a score that a program failed to compute is not one nobody measured.
    """
    if value is None:
        return math.nan
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if math.isnan(found):
        raise ResultsError(f"{place}: expected a number (null where not measured), got {value!r:.80}")
    return found
