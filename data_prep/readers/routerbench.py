"""RouterBench's wide table (arXiv 2403.12031): scores, `MODEL|model_response` and `MODEL|total_cost`, CSV or pickle."""

import ast
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError
from ..results import BenchmarkResults
from .frames import header_of, load_table
from .pickles import holds_mapping, read_pickle
from .table import numbers
from .text import files_of, results_of, side_of, suffix_of

_COST = "|total_cost"
_ORDINARY = ("sample_id", "prompt", "eval_name", "oracle_model_to_route_to")


def recognises(file: Path, head: str) -> bool:
    """Recognise a pickled table, or a CSV whose columns have RouterBench's names."""
    if file.suffix == ".pkl":
        return not holds_mapping(file)
    return suffix_of(file) == ".csv" and any(name.endswith(_COST) for name in header_of(head))


def read(path: Path) -> BenchmarkResults:
    """Read one file or a folder of files. A file name that ends in `_train` or `_test` names the split.

    `eval_name` is the benchmark. MMLU's subjects (`mmlu-astronomy`) become subjects of one benchmark.
    """
    files = files_of(path, ".csv", ".pkl")
    frames = [_load(file) for file in files]
    # The published table has ids with two questions. These ids get a hash of the text.
    ids = pd.concat([frame["sample_id"].astype(str) for frame in frames])
    repeated = set(ids[ids.duplicated()])
    parts = [_results(frame, file, repeated) for frame, file in zip(frames, files, strict=True)]
    return BenchmarkResults.merge(parts)


def _load(file: Path) -> pd.DataFrame:
    frame = read_pickle(file) if file.suffix == ".pkl" else load_table(file)
    if not isinstance(frame, pd.DataFrame):
        raise ResultsError(f"{file}: holds a {type(frame).__name__}, expected a pandas DataFrame")
    for column in _ORDINARY[:3]:
        if column not in frame:
            raise ResultsError(f"{file}: no column {column!r}. Expected RouterBench's table ({', '.join(_ORDINARY)}).")
    if file.suffix == ".pkl":
        frame.index = pd.RangeIndex(1, len(frame) + 1)
    return frame


def _results(frame: pd.DataFrame, file: Path, repeated: set[str]) -> BenchmarkResults:
    models = [
        str(name)
        for name in frame.columns
        if name not in _ORDINARY and "|" not in str(name) and str(name).strip() and not str(name).startswith("Unnamed")
    ]
    if not models or frame.empty:
        raise ResultsError(f"{file}: empty results, found {len(frame)} rows and {len(models)} models")
    scores = np.stack([numbers(frame[name], file, name) for name in models], axis=1)
    absent = pd.Series(np.nan, index=frame.index)
    costs = np.stack(
        [numbers(frame.get(name + _COST, absent), file, name + _COST, words=False) for name in models], axis=1
    )
    names = frame["eval_name"].astype(str)
    is_subject = names.str.startswith("mmlu-")
    queries = pd.DataFrame(
        {
            "id": [
                f"{key}:{hashlib.sha256(str(text).encode()).hexdigest()[:6]}" if key in repeated else key
                for key, text in zip(frame["sample_id"].astype(str), frame["prompt"], strict=True)
            ],
            "prompt": [_prompt(value, file, row) for row, value in frame["prompt"].items()],
            "benchmark": names.mask(is_subject, "mmlu"),
            "subject": [name.removeprefix("mmlu-") if name.startswith("mmlu-") else None for name in names],
            "split": side_of(file),
        }
    )
    return results_of(file, queries, models, scores, costs)


def _prompt(value: object, file: Path, row: object) -> str:
    """Return the question's text. The file holds a Python list of strings, one per turn, as text."""
    turns = value
    if isinstance(value, str):
        try:
            turns = ast.literal_eval(value) if value.startswith("[") else [value]
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            turns = [value]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ResultsError(f"{file}: row {row}, column 'prompt': expected text or a list of texts, got {value!r:.80}")
    return "\n\n".join(turns)
