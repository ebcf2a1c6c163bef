"""Details of the first Open LLM Leaderboard: a Parquet file per model, task and run."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError
from ..results import BenchmarkResults
from .frames import field, load_table
from .lm_eval import METRICS
from .text import number, results_of

_NAME = re.compile(
    r"details_(?P<suite>[^|]+)\|(?P<task>.+?)\|(?P<shots>\d+)(\|\d+)?_(?P<stamp>\d{4}-\d{2}-\d{2}T.+)\.parquet"
)
_SUBJECT = re.compile(r"(?:hendrycksTest-|mmlu[:_])(.+)")


def recognises(file: Path, head: str) -> bool:
    """Recognise a file of details by its name."""
    del head
    return _NAME.fullmatch(file.name) is not None


def read(path: Path, *, metric: str | None = None) -> BenchmarkResults:
    """Read the newest file of each (model, task) below `path`.

    The model is in the name of the dataset's folder, `details_ORG__MODEL`. Questions are the documents themselves
    (`example`), which do not depend on the few-shot examples of a run.

    Args:
        path: File or folder.
        metric: Metric that becomes the score. Defaults to the first known metric of lm-evaluation-harness.

    Raises:
        ResultsError: A folder's name contains no model, or a file has no question or no metric.
    """
    newest: dict[tuple[str, str], tuple[str, Path]] = {}
    for file in sorted(path.rglob("details_*.parquet")) if path.is_dir() else [path]:
        match = _NAME.fullmatch(file.name)
        if match is None:
            continue
        key = _model_of(file), match["task"]
        newest[key] = max(newest.get(key, ("", file)), (match["stamp"], file))
    if not newest:
        raise ResultsError(f"{path}: empty results, no file called details_SUITE|TASK|SHOTS_STAMP.parquet below it")
    return BenchmarkResults.merge([_read(file, model, task, metric) for (model, task), (_, file) in newest.items()])


def _model_of(file: Path) -> str:
    for folder in file.resolve().parents:
        if folder.name.startswith("details_"):
            return folder.name.removeprefix("details_").replace("__", "/")
    raise ResultsError(f"{file}: no folder name with the model. Put the file into a folder called details_ORG__MODEL.")


def _read(file: Path, model: str, task: str, metric: str | None) -> BenchmarkResults:
    frame = load_table(file)
    text = next((name for name in ("example", "full_prompt") if name in frame), None)
    if text is None:
        raise ResultsError(f"{file}: no column 'example' or 'full_prompt' with the question")

    def value(row: Any, name: str) -> Any:
        return row[name] if name in frame else field(row.get("metrics"), name)

    records = frame.to_dict("records")
    names = [metric] if metric else METRICS
    chosen = next((name for name in names if value(records[0], name) is not None), None)
    if chosen is None:
        raise ResultsError(f"{file}: no metric {metric or 'known here'!r}. Pass one with --set metric=NAME.")
    subject = _SUBJECT.fullmatch(task)
    benchmark = "mmlu" if subject else task.partition(":")[0] if task.startswith("bigbench") else task
    rows = [
        (f"{task}/{index}", record[text], benchmark, subject[1] if subject else None, None)
        for index, record in enumerate(records)
    ]
    scores = [number(value(r, chosen), f"{file}: row {n}, metric {chosen!r}") for n, r in enumerate(records, 1)]
    queries = pd.DataFrame(rows, columns=["id", "prompt", "benchmark", "subject", "split"])
    return results_of(file, queries, [model], np.array(scores, dtype=np.float32)[:, None])
