"""RouterDC's files (arXiv 2409.19886): a list of `{"question", "scores": {model: score}}`, one file a benchmark."""

from pathlib import Path

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError
from ..results import BenchmarkResults
from .text import benchmark_of, files_of, number, read_json, results_of, side_of


def recognises(file: Path, head: str) -> bool:
    """A JSON list whose entries have a question and scores."""
    listed = head.lstrip().startswith("[") and '"question"' in head
    return file.suffix == ".json" and listed and '"scores"' in head


def read(path: Path, *, correct_above_zero: bool | None = None) -> BenchmarkResults:
    """Read one file or a folder of them; the file's name is the benchmark, its ending `_train` or `-test` the split.

    Args:
        path: file or folder.
        correct_above_zero: score 1 where the file's score is above zero. Multiple-choice files hold the probability of
            the right choice, 0 where the answer was wrong. None: per file, on where scores are not all tenths (means
            of ten attempts).
    """
    return BenchmarkResults.merge([_read_file(file, correct_above_zero) for file in files_of(path, ".json")])


def _read_file(file: Path, correct_above_zero: bool | None) -> BenchmarkResults:
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise ResultsError(f"{file}: empty results, expected a JSON list of {{question, scores}}")
    models: dict[str, int] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise ResultsError(f"{file}: entry {index}, field 'question': expected text")
        if not isinstance(row.get("scores"), dict):
            raise ResultsError(f"{file}: entry {index}, field 'scores': expected {{model: score}}")
        for name in row["scores"]:
            models.setdefault(name, len(models))
    scores = np.full((len(rows), len(models)), np.nan, dtype=np.float32)
    for index, row in enumerate(rows):
        for name, score in row["scores"].items():
            scores[index, models[name]] = number(score, f"{file}: entry {index}, field 'scores.{name}'")
    if correct_above_zero is None:
        correct_above_zero = not np.allclose(
            np.nan_to_num(scores) * 10, np.round(np.nan_to_num(scores) * 10), atol=1e-4
        )
    if correct_above_zero:
        scores = np.where(np.isnan(scores), np.nan, scores > 0)
    queries = pd.DataFrame(
        {
            # Files repeat questions, so the place in the file is the identity, not the text.
            "id": [f"{file.stem}/{index}" for index in range(len(rows))],
            "prompt": [row["question"] for row in rows],
            "benchmark": benchmark_of(file),
            "subject": None,
            "split": side_of(file),
        }
    )
    return results_of(file, queries, list(models), scores)
