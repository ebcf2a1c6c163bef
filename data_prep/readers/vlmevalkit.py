"""VLMEvalKit's records: a workbook or table for each model and dataset, `MODEL/MODEL_DATASET.xlsx`.

Records hold a model's answer (`prediction`), and a judge's score if there was a judge (`hit`). Without a judge,
multiple-choice answers are compared by their letter.
"""

import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError
from ..leaks import IMAGES
from ..results import BenchmarkResults
from .frames import header_of, load_table
from .table import numbers
from .text import head_of, results_of, stem_of, suffix_of

logger = logging.getLogger(__name__)

_SUFFIXES = (".xlsx", ".tsv", ".csv")
_NEEDED = ("index", "question", "answer", "prediction")
_JUDGED = ("hit", "score")
_OPTIONS = "ABCDEFGH"
_HEAD = 20_000  # characters
_JUDGES = re.compile(r"_(?:gpt|chatgpt|qwen|exact_matching)[\w.-]*?_(?:result|score)s?$|_result$", re.IGNORECASE)
_LETTER = re.compile(r"^[\s(\[*]*([A-H])(?=[\s.,:;)\]*]|$)|\b(?:answer|option|choice)(?: is|:)?\s*[(\[*]*([A-H])\b")


def recognises(file: Path, head: str) -> bool:
    """Recognise a table with the columns of VLMEvalKit's records."""
    if suffix_of(file) == ".xlsx":
        import openpyxl

        sheet = openpyxl.load_workbook(file, read_only=True).worksheets[0]
        columns = {str(cell) for cell in next(sheet.iter_rows(values_only=True), ())}
    else:
        columns = set(header_of(head)) if suffix_of(file) in _SUFFIXES else set()
    return set(_NEEDED) <= columns


def read(path: Path, *, model: str | None = None, dataset: str | None = None) -> BenchmarkResults:
    """Read one file of records, or all files of records below a folder.

    Pictures are named as the kit stores them, `DATASET/INDEX.jpg` below its `images` folder, which `--images` takes.

    Args:
        path: File or folder.
        model: Model of the records. Defaults to the folder's name if the file's name begins with it, otherwise to the
            part of the file's name before the last underscore.
        dataset: Benchmark of the records. Defaults to the rest of the file's name.

    Raises:
        ResultsError: A file has another format, or its answers cannot be scored.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [file for file in files if suffix_of(file) in _SUFFIXES and (file == path or recognises(file, _head(file)))]
    if not found:
        raise ResultsError(f"{path}: empty results, no records of VLMEvalKit below it ({', '.join(_NEEDED)})")
    return BenchmarkResults.merge([_read(file, *_named(file, model, dataset)) for file in found])


def _head(file: Path) -> str:
    return "" if suffix_of(file) == ".xlsx" else head_of(file, _HEAD)


def _named(file: Path, model: str | None, dataset: str | None) -> tuple[str, str]:
    """Return model and dataset of a file."""
    stem, folder = _JUDGES.sub("", stem_of(file)), file.resolve().parent.name
    if stem.startswith(f"{folder}_"):
        found = folder, stem.removeprefix(f"{folder}_")
    else:
        before, _, behind = stem.rpartition("_")
        found = (before, behind) if before else (stem, stem)
    return model or found[0].replace("__", "/"), dataset or found[1]


def _read(file: Path, model: str, dataset: str) -> BenchmarkResults:
    frame = load_table(file, texts=("index", "question", "answer", "prediction", *_OPTIONS))
    if absent := [name for name in _NEEDED if name not in frame]:
        raise ResultsError(f"{file}: no column {absent[0]!r}. Expected {', '.join(_NEEDED)}.")
    options = [letter for letter in _OPTIONS if letter in frame]
    rows = frame.to_dict("records")
    queries = pd.DataFrame(
        {
            "id": [f"{dataset}/{row['index']}" for row in rows],
            "prompt": [_asked(row, options) for row in rows],
            "benchmark": dataset,
            "subject": [row.get("category") for row in rows],
            "split": None,
            IMAGES: [(f"{dataset}/{row['index']}.jpg",) for row in rows],
        }
    )
    return results_of(file, queries, [model], _scores(frame, file)[:, None])


def _asked(row: dict, options: list[str]) -> str:
    """Return a question with its options, if the table has columns for them."""
    told = [f"{letter}. {row[letter]}" for letter in options if row[letter] is not None]
    return "\n".join([str(row["question"]), *told])


def _scores(frame: pd.DataFrame, file: Path) -> np.ndarray:
    judged = next((name for name in _JUDGED if name in frame), None)
    if judged is not None:
        return numbers(frame[judged], file, judged)
    if not frame["answer"].map(lambda value: isinstance(value, str) and value in _OPTIONS).all():
        raise ResultsError(
            f"{file}: answers that are no letters, and no column {' or '.join(map(repr, _JUDGED))} that a judge wrote. "
            "Pass the file that the kit's evaluation wrote."
        )
    said = frame["prediction"].map(_letter)
    if unread := int(said.isna().sum()):
        logger.warning("%s: %d of %d answers name no option, so they count as wrong", file, unread, len(frame))
    return (said == frame["answer"]).to_numpy(np.float32)


def _letter(said: object) -> str | None:
    """Return the option that an answer names: alone, before its text, or as "the answer is"."""
    found = _LETTER.search(said) if isinstance(said, str) else None
    return None if found is None else found[1] or found[2]
