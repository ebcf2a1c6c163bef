"""LLMRouterBench's tree of JSON files: one per (dataset, split, model) and run, named by its time."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError
from ..results import BenchmarkResults
from .text import keys_of, number, read_json, results_of, suffix_of

_STAMP = re.compile(r"[-_](\d{8}_\d{6})$")
_FIELDS = ("dataset_name", "split", "model_name", "records")


def recognises(file: Path, head: str) -> bool:
    """Recognise a JSON object by fields that only these files have together."""
    return suffix_of(file) == ".json" and len(keys_of(head) & {*_FIELDS, "performance", "demo"}) >= 2


def read(path: Path) -> BenchmarkResults:
    """Read the newest file of each (dataset, split, model) below `path`, without trial runs (`demo`).

    The files' `split` is the part of the benchmark that was run, not a train or test split. It is a part of the ids
    only.

    Raises:
        ResultsError: A file has another format, or no file is of a full run.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    newest: dict[tuple[str, str, str], tuple[str, Path, list]] = {}
    for file in files:
        document = read_json(file)
        for name in _FIELDS:
            if not isinstance(document, dict) or name not in document:
                raise ResultsError(f"{file}: field {name!r} is missing. Expected {', '.join(_FIELDS)}.")
        if document.get("demo"):
            continue
        dataset, split, model = (str(document[name]) for name in _FIELDS[:3])
        key = dataset, split, model
        stamp = _STAMP.search(file.stem)
        if key not in newest or (stamp[1] if stamp else "") >= newest[key][0]:
            newest[key] = (stamp[1] if stamp else "", file, document["records"])
    if not newest:
        raise ResultsError(f"{path}: empty results, no *.json file of a full run below it")
    return BenchmarkResults.merge([_run(key, file, records) for key, (_, file, records) in newest.items()])


def _run(key: tuple[str, str, str], file: Path, records: Any) -> BenchmarkResults:
    dataset, split, model = key
    if not isinstance(records, list) or not records:
        raise ResultsError(f"{file}: empty results, expected a list of records")
    rows, scores, costs = [], [], []
    for place, record in enumerate(records):
        where = f"{file}: record {place}"
        if not isinstance(record, dict) or "index" not in record:
            raise ResultsError(f"{where}, field 'index': missing. Expected a record with its query's index.")
        prompt = record.get("origin_query") or record.get("prompt")
        if not isinstance(prompt, str):
            raise ResultsError(f"{where}, field 'origin_query': expected text, got {prompt!r:.80}")
        rows.append((f"{dataset}/{split}/{record['index']}", prompt, dataset, None, None))
        scores.append(number(record.get("score"), f"{where}, field 'score'"))
        costs.append(number(record.get("cost"), f"{where}, field 'cost'"))
    queries = pd.DataFrame(rows, columns=["id", "prompt", "benchmark", "subject", "split"])
    return results_of(file, queries, [model], np.array(scores)[:, None], np.array(costs)[:, None])
