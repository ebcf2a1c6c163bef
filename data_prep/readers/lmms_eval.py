"""lmms-eval's output (--log_samples): a folder for each model, `TIME_samples_TASK.jsonl`."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError
from ..leaks import IMAGES
from ..results import BenchmarkResults
from .text import number, read_records, results_of

_SAMPLES = re.compile(r"(?P<stamp>\d{8}_\d{6})_samples_(?P<task>.+)\.jsonl?(\.gz)?")
_OURS = ("doc_id", "doc", "target", "input", "resps", "filtered_resps", "doc_hash", "prompt_hash", "target_hash",
         "token_counts", "submission")  # fmt: skip
_RIGHT = ("score", "true_false", "correct", "acc", "accuracy", "hit", "scored")
_SAID = ("parsed_pred", "pred", "prediction", "pred_answer")
_PICTURE = re.compile(r"<image(?: \d+)?>")


def recognises(file: Path, head: str) -> bool:
    """Recognise a file of samples by its name."""
    del head
    return _SAMPLES.fullmatch(file.name) is not None


def read(path: Path, *, metric: str | None = None) -> BenchmarkResults:
    """Read the newest samples of each (model, task) below `path`.

    Pictures are not in the files. They are identified by task and document number.

    Args:
        path: The harness's `--output_path`, or one model's folder in it.
        metric: Metric that becomes the score. Defaults to the first one that scores single answers.

    Raises:
        ResultsError: There are no samples, or no metric scores single answers.
    """
    newest: dict[tuple[str, str], tuple[str, Path]] = {}
    for file in sorted(path.rglob("*_samples_*")) if path.is_dir() else [path]:
        if match := _SAMPLES.fullmatch(file.name):
            key = file.resolve().parent.name.replace("__", "/"), match["task"]
            newest[key] = max(newest.get(key, ("", file)), (match["stamp"], file))
    if not newest:
        raise ResultsError(f"{path}: empty results, no TIME_samples_TASK.jsonl below it (run with --log_samples)")
    return BenchmarkResults.merge([_read(file, model, task, metric) for (model, task), (_, file) in newest.items()])


def _read(file: Path, model: str, task: str, metric: str | None) -> BenchmarkResults:
    rows, scores = [], []
    for place, sample in read_records(file):
        if not isinstance(sample, dict) or "doc_id" not in sample or not isinstance(sample.get("input"), str):
            raise ResultsError(f"{place}: expected an object with 'doc_id' and 'input'")
        key = f"{task}/{sample['doc_id']}"
        text = _PICTURE.sub("", sample["input"]).strip() or sample["input"]
        rows.append((key, text, task, None, None, (key,)))
        scores.append(_score(sample, metric, place))
    if not rows:
        raise ResultsError(f"{file}: empty results, no samples in the file")
    queries = pd.DataFrame(rows, columns=["id", "prompt", "benchmark", "subject", "split", IMAGES])
    return results_of(file, queries, [model], np.array(scores, dtype=np.float32)[:, None])


def _score(sample: dict[str, Any], metric: str | None, place: str) -> float:
    """Return the score of an answer, by a metric that is a number or holds the prediction and the right answer."""
    names = [metric] if metric else [name for name in sample if name not in _OURS]
    for name in names:
        if (found := _value(sample.get(name))) is not None:
            return number(found, f"{place}: metric {name!r}")
    raise ResultsError(
        f"{place}: no metric {f'{metric!r} ' if metric else ''}that scores single answers, only "
        f"{', '.join(name for name in sample if name not in _OURS) or 'none'}. Pass one with --set metric=NAME."
    )


def _value(value: Any) -> Any:
    """Return a metric's value for one sample, or None if it does not score this answer alone."""
    if isinstance(value, bool | int | float):
        return value
    if not isinstance(value, dict):
        return None
    for name in _RIGHT:
        if isinstance(value.get(name), bool | int | float):
            return value[name]
    said = next((value[name] for name in _SAID if value.get(name) is not None), None)
    if said is None or value.get("answer") is None:
        return None
    right = value["answer"] if isinstance(value["answer"], list) else [value["answer"]]
    said = said if isinstance(said, list) else [said]
    return any(str(one) == str(other) for one in said for other in right)
