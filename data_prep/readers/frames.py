"""Tables in files as pandas frames: CSV, TSV, Excel, JSON, JSONL and Parquet, also compressed.

Nothing is guessed silently. A row of another length than the header raises an error instead of a shift. Only an empty
cell is missing. The index of a frame is the row's number in a spreadsheet or an editor.
"""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from ...modeling.errors import ResultsError, one_line, require_extra
from .text import read_bytes, read_records, read_text, suffix_of

SUFFIXES = (".csv", ".tsv", ".xlsx", ".parquet", ".jsonl", ".json")
SEPARATED = (".csv", ".tsv")
_MARKS = ",;\t|"
_SAMPLE = 200  # rows that decide the separator
_HEAD = 65_536  # characters that hold these rows
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)")
_CELL = 2**27  # characters, because a cell may hold a long text

csv.field_size_limit(_CELL)


def load_table(file: Path, *, texts: Sequence[str] = ()) -> pd.DataFrame:
    """Load a table unchanged, except that texts lose outer blanks, get LF as line ends, and are composed (NFC).

    Args:
        file: File of the table.
        texts: Columns that are always text, because the id 0012 is not 12.

    Returns:
        Frame whose index is the number of each row in the file. Cells of CSV, TSV and Excel are text, empty ones NaN.

    Raises:
        ResultsError: The file cannot be read, a row does not fit the header, a column's name appears twice, or there
            are no rows.
    """
    suffix = suffix_of(file)
    if suffix in SEPARATED:
        frame = _from_rows(file, _separated(file), texts)
    elif suffix == ".xlsx":
        frame = _from_rows(file, _excel(file), texts)
    elif suffix in (".jsonl", ".json"):
        frame = _from_records(file)
    elif suffix == ".parquet":
        frame = _from_parquet(file)
    else:
        raise ResultsError(f"{file}: expected {', '.join(SUFFIXES)}, with or without .gz")
    if frame.empty:
        raise ResultsError(f"{file}: empty results, the table has no rows")
    for name in frame.columns:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            frame[name] = frame[name].map(tidy).astype(object)
    return frame


def tidy(value: Any) -> Any:
    """Normalise a text for comparison, and return other values unchanged.

    A question in two files is the same question, whatever editor saved them: with CRLF, with trailing blanks, or with
    accents as separate marks. An empty text becomes None.
    """
    if not isinstance(value, str):
        return value
    plain = value.replace("\r\n", "\n").replace("\r", "\n").strip().strip("\ufeff")
    return unicodedata.normalize("NFC", plain) or None


def header_of(head: str) -> list[str]:
    """Return the column names of a CSV from its beginning."""
    try:
        return [name.strip() for name in next(csv.reader([head.partition("\n")[0]], delimiter=_separator(head)), [])]
    except csv.Error:
        return []


def _separator(text: str) -> str:
    """Return the separator: the character by which most rows have as many cells as the first row."""
    best, found = (0.0, 1), ","
    for mark in _MARKS:
        try:
            rows = list(islice(csv.reader(io.StringIO(text), delimiter=mark), _SAMPLE))
        except csv.Error:
            continue
        width = len(rows[0]) if rows else 0
        if width < 2:
            continue
        below = [row for row in rows[1:] if row]
        agreeing = sum(len(row) == width for row in below) / max(1, len(below))
        if (agreeing, width) > best:
            best, found = (agreeing, width), mark
    return found


def _separated(file: Path) -> list[tuple[int, list[Any]]]:
    """Return the rows of a CSV or TSV with their numbers, the header first."""
    text = read_text(file)
    mark = "\t" if suffix_of(file) == ".tsv" and "\t" in text.partition("\n")[0] else _separator(text[:_HEAD])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    rows: list[list[str]] = []
    try:
        rows.extend(reader)
    except csv.Error as error:
        raise ResultsError(
            f"{file}: line {reader.line_num}: not a readable table ({one_line(error)}). A quote inside a quoted "
            "text is written twice."
        ) from None
    found = [(number, row) for number, row in enumerate(rows, 1) if any(cell.strip() for cell in row)]
    if not found:
        raise ResultsError(f"{file}: empty results, the file has no header and no rows")
    width = len(found[0][1])
    for number, row in found[1:]:
        if len(row) < width or any(cell.strip() for cell in row[width:]):
            name = {"\t": "a tab"}.get(mark, f"{mark!r}")
            raise ResultsError(
                f"{file}: row {number} has {len(row)} cells, the header {width}. Quote texts that contain {name}."
            )
    return [(number, row[:width]) for number, row in found]


def _excel(file: Path) -> list[tuple[int, list[Any]]]:
    """Return the rows of a workbook's first sheet with their numbers, the header first."""
    require_extra("openpyxl", "data")
    try:
        sheet = pd.read_excel(io.BytesIO(read_bytes(file)), header=None, dtype=object, keep_default_na=False)
    except Exception as error:  # raised by zipfile, the XML parser, openpyxl
        raise ResultsError(f"{file}: not a readable workbook ({one_line(error)})") from None
    rows = [(number, list(row)) for number, row in enumerate(sheet.itertuples(index=False, name=None), 1)]
    found = [(number, row) for number, row in rows if any(str(cell).strip() for cell in row)]
    if not found:
        raise ResultsError(f"{file}: empty results, the first sheet has no rows")
    return found


def _from_rows(file: Path, rows: list[tuple[int, list[Any]]], texts: Sequence[str]) -> pd.DataFrame:
    """Return a frame of rows, of which the first is the header. Decimal commas become points."""
    names = [str(tidy(str(cell)) or "") for cell in rows[0][1]]
    _check_names(file, names)
    numbers, cells = [number for number, _ in rows[1:]], [row for _, row in rows[1:]]
    columns = {}
    for place, name in enumerate(names):
        values = [row[place] for row in cells]
        if not name:  # pandas writes its index as a column without a name
            continue
        values = [None if isinstance(value, str) and not value.strip() else value for value in values]
        columns[name] = values if name in texts else _with_points(values)
    return pd.DataFrame(columns, index=pd.Index(numbers), dtype=object)


def _check_names(file: Path, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name and name in seen:
            raise ResultsError(f"{file}: two columns are called {name!r}. Rename one.")
        seen.add(name)


def _with_points(values: list[Any]) -> list[Any]:
    """Return numbers with points instead of decimal commas, if all cells of a column are numbers."""
    there = [value.strip() for value in values if isinstance(value, str)]
    if not any(map(_DECIMAL_COMMA.fullmatch, there)) or not all(map(_NUMBER.fullmatch, there)):
        return values
    return [value.strip().replace(",", ".") if isinstance(value, str) else value for value in values]


def _from_records(file: Path) -> pd.DataFrame:
    """Return a frame of JSON objects."""
    rows = []
    for place, record in read_records(file):
        if not isinstance(record, dict):
            raise ResultsError(f"{place}: expected an object with the row's fields, got a {type(record).__name__}")
        rows.append({str(name).strip(): value for name, value in record.items()})
    # Values are kept unchanged, because pandas would turn integers beside a gap into floats.
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return pd.DataFrame(columns, index=pd.RangeIndex(1, len(rows) + 1), dtype=object)


def _from_parquet(file: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(io.BytesIO(read_bytes(file)) if file.suffix.lower() == ".gz" else file)
    except (ValueError, OverflowError, OSError) as error:  # raised by Arrow
        raise ResultsError(f"{file}: not a readable Parquet file ({one_line(error)})") from None
    frame.columns = [str(name).strip() for name in frame.columns]
    _check_names(file, frame.columns)
    frame.index = pd.RangeIndex(1, len(frame) + 1)
    return frame


def holds_records(head: str) -> bool:
    """Check by its beginning whether a JSON file is a list of objects, or has one object per line."""
    if re.match(r"\s*\[\s*\{", head):
        return True
    line, end, _ = head.lstrip().partition("\n")
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:  # one object over several lines, or a line that is longer than the beginning
        return not end and line.startswith("{")


def field(record: Any, path: str) -> Any:
    """Return a field of nested objects, such as `evaluation_result.score`, or None if it is missing."""
    if isinstance(record, str) and record[:1] == "{":  # an object in a cell
        try:
            record = json.loads(record)
        except ValueError:
            return None
    for name in path.split("."):
        if not isinstance(record, dict):
            return None
        record = record.get(name)
    return record
