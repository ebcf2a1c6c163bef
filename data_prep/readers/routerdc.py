"""RouterDC's files (arXiv 2409.19886): a list of `{"question", "scores": {model: score}}`, one file per benchmark."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError
from ..results import BenchmarkResults
from .text import benchmark_of, files_of, number, read_json, results_of, side_of, stem_of, suffix_of

logger = logging.getLogger(__name__)

_FIFTH = 0.2


def recognises(file: Path, head: str) -> bool:
    """Recognise a JSON list whose entries have a question and scores."""
    listed = head.lstrip().startswith("[") and '"question"' in head
    return suffix_of(file) == ".json" and listed and '"scores"' in head


def read(path: Path, *, correct_above_zero: bool | None = None) -> BenchmarkResults:
    """Read one file or a folder of files. The file name is the benchmark, its ending `_train` or `-test` the split.

    Args:
        path: File or folder.
        correct_above_zero: If true, a score above zero becomes 1. Multiple-choice files hold the probability of the
            right option, or 0 for a wrong answer. None decides per file. It is on if the scores look like such
            probabilities: not all of two decimals, some zero, and none between zero and a fifth.
    """
    chosen: list[str] = []
    parts = [_read_file(file, correct_above_zero, chosen) for file in files_of(path, ".json")]
    if chosen:
        logger.info(
            "%s: the scores look like probabilities of the right option, so above zero is right (--set "
            "correct_above_zero=false keeps the scores)", ", ".join(chosen),
        )  # fmt: skip
    return BenchmarkResults.merge(parts)


def _read_file(file: Path, correct_above_zero: bool | None, chosen: list[str]) -> BenchmarkResults:
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
        correct_above_zero = _is_multiple_choice(scores)
        if correct_above_zero:
            chosen.append(file.name)
    if correct_above_zero:
        scores = np.where(np.isnan(scores), np.nan, scores > 0)
    stem = stem_of(file) if benchmark_of(file) in stem_of(file) else f"{benchmark_of(file)}/{stem_of(file)}"
    queries = pd.DataFrame(
        {
            # Files repeat questions, so the index in the file is the id, not the text.
            "id": [f"{stem}/{index}" for index in range(len(rows))],
            "prompt": [row["question"] for row in rows],
            "benchmark": benchmark_of(file),
            "subject": None,
            "split": side_of(file),
        }
    )
    return results_of(file, queries, list(models), scores)


def _is_multiple_choice(scores: np.ndarray) -> bool:
    """Check whether scores are probabilities of the right option of at most five, with 0 for a wrong answer."""
    there = scores[~np.isnan(scores)]
    hundredths = np.allclose(there * 100, np.round(there * 100), atol=1e-3)
    return bool(not hundredths and (there == 0).any() and (there[there > 0] >= _FIFTH).all())
