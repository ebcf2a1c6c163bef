"""Shared functions of readers: they find files, and open them with one-line errors."""

import codecs
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...modeling.errors import ResultsError, one_line
from ..results import BenchmarkResults

SIDES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Split by the name of a file or split, in lower case."""

_SIDE = re.compile(rf"(?:^|[-_])({'|'.join(SIDES)})$", re.IGNORECASE)
# UTF-32 before UTF-16, because its mark begins with the mark of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_GZIP = b"\x1f\x8b"


def suffix_of(file: Path) -> str:
    """Return a file's suffix in lower case, without `.gz`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")


def stem_of(file: Path) -> str:
    """Return a file's name without its suffix, and without `.gz`."""
    return Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem


def files_of(path: Path, *suffixes: str) -> list[Path]:
    """Return `path` itself, or the sorted files with one of the suffixes in the folder `path`, also compressed ones.

    Raises:
        ResultsError: The folder holds no such file.
    """
    if path.is_file():
        return [path]
    files = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    found = sorted(file for file in files if suffix_of(file) in suffixes)
    if not found:
        raise ResultsError(f"{path}: empty results, no {' or '.join(suffixes)} file in the folder")
    return found


def side_of(file: Path) -> str | None:
    """Return the split at the end of a file's name (`_train`, `-test`, or the whole name), or None."""
    found = _SIDE.search(stem_of(file))
    return SIDES[found[1].lower()] if found else None


def benchmark_of(file: Path) -> str:
    """Return a file's name without the split at its end, or the folder's name if nothing is left."""
    return _SIDE.sub("", stem_of(file)) or file.resolve().parent.name


def read_bytes(file: Path, most: int = -1) -> bytes:
    """Read a file's content, and decompress it if it is gzip.

    Args:
        file: File to read.
        most: Maximum number of bytes to read. -1 for all.

    Raises:
        ResultsError: The file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            compressed = stream.read(len(_GZIP)) == _GZIP
        with gzip.open(file) if compressed else file.open("rb") as stream:
            return stream.read(most)
    except OSError as error:
        raise ResultsError(f"{file}: {error.strerror or one_line(error)}") from None
    except (EOFError, zlib.error) as error:
        raise ResultsError(f"{file}: incomplete gzip file ({one_line(error)}). The file may be cut short.") from None


def _encoding(data: bytes) -> str:
    return next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")


def head_of(file: Path, most: int) -> str:
    """Return the beginning of a file as text, with invalid bytes replaced."""
    data = read_bytes(file, most)
    return data.decode(_encoding(data), "replace").removeprefix("\ufeff")


def read_text(file: Path) -> str:
    """Return the text of a file, in UTF-8 or the encoding of its byte order mark. Line ends become LF.

    Raises:
        ResultsError: The file cannot be read, or is not UTF-8.
    """
    data = read_bytes(file)
    try:
        text = data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        raise ResultsError(f"{file}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Yield each line that is not blank, with its number from 1.

    Only LF ends a line. `splitlines` would cut a text at separators such as U+2028, which JSON allows in strings.
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def read_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the records of a JSON file, each with its place: the lines of JSONL, or the entries of one list.

    Raises:
        ResultsError: The file is not JSON in UTF-8.
    """
    text = read_text(file)
    if text.lstrip().startswith("["):
        entries = parse_json(text, file)
        yield from ((f"{file}: entry {number}", entry) for number, entry in enumerate(entries))
        return
    for number, line in lines_of(text):
        yield f"{file}: line {number}", parse_json(line, file, number)


def read_json(file: Path) -> Any:
    """Read the JSON document of a file.

    Raises:
        ResultsError: The file is not JSON in UTF-8.
    """
    return parse_json(read_text(file), file)


def parse_json(text: str, file: Path, line: int = 1) -> Any:
    """Parse a JSON document that begins on a line of a file.

    Raises:
        ResultsError: The text is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}: line {line + error.lineno - 1}"
        raise ResultsError(f"{place} is not JSON ({error.msg}). The file may be cut short.") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists in lists
        raise ResultsError(f"{file}: line {line} is not readable JSON ({one_line(error)})") from None


_KEY = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(:?)|[{}\[\]]')


def keys_of(head: str) -> set[str]:
    """Return the top-level keys of a JSON object, as far as its beginning shows them."""
    depth = 0
    found: set[str] = set()
    if not head.lstrip().startswith("{"):
        return found
    for match in _KEY.finditer(head):
        if match[0] in "{[":
            depth += 1
        elif match[0] in "}]":
            depth -= 1
        elif match[2] and depth == 1:
            found.add(match[1])
    return found


def results_of(file: Path | str, *parts: Any) -> BenchmarkResults:
    """Return `BenchmarkResults(*parts)`, and add the file's name to its errors.

    Raises:
        ResultsError: See `BenchmarkResults`.
    """
    try:
        return BenchmarkResults(*parts)
    except ResultsError as error:
        raise ResultsError(f"{file}: {error}") from None


def number(value: Any, place: str) -> float:
    """Convert a score to a float. Null becomes NaN (not measured), true and false become 1 and 0.

    Raises:
        ResultsError: The value is not a number, or is NaN, because a failed computation is not a missing measurement.
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
