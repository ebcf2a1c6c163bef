"""RouteLLM's evaluation files (arXiv 2406.18665): CSVs of `prompt, MODEL, MODEL` with True and False."""

from pathlib import Path

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError
from ..results import BenchmarkResults
from .frames import SEPARATED, header_of, load_table
from .table import numbers
from .text import files_of, results_of, stem_of, suffix_of


def recognises(file: Path, head: str) -> bool:
    """Recognise a CSV whose first column is `prompt`, without any of the columns of other formats."""
    columns = header_of(head)
    ours = {"id", "model", "score", "label", "split", "benchmark", "subject", "model_id"}
    return suffix_of(file) in SEPARATED and columns[:1] == ["prompt"] and len(columns) > 1 and not ours & set(columns)


def read(path: Path) -> BenchmarkResults:
    """Read one file or a folder of files. `mmlu_SUBJECT.csv` is a subject of MMLU, any other file a benchmark."""
    return BenchmarkResults.merge([_read_file(file) for file in files_of(path, *SEPARATED)])


def _read_file(file: Path) -> BenchmarkResults:
    frame = load_table(file, texts=("prompt",))
    if "prompt" not in frame:
        raise ResultsError(f"{file}: no column 'prompt'. Expected `prompt, MODEL, MODEL` with True or False.")
    models = [name for name in frame.columns if name != "prompt" and not str(name).endswith("_response")]
    if not models:
        raise ResultsError(f"{file}: empty results, no column of a model besides 'prompt'")
    is_subject = stem_of(file).startswith("mmlu_")
    queries = pd.DataFrame(
        {
            # Questions repeat within a file, so the row number is the id.
            "id": [f"{stem_of(file)}/{index}" for index in range(len(frame))],
            "prompt": frame["prompt"],
            "benchmark": "mmlu" if is_subject else stem_of(file),
            "subject": stem_of(file).removeprefix("mmlu_") if is_subject else None,
            "split": None,
        }
    )
    scores = np.stack([numbers(frame[name], file, name) for name in models], axis=1)
    return results_of(file, queries, [str(name) for name in models], scores)
