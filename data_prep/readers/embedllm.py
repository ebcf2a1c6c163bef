"""EmbedLLM's long CSV (arXiv 2410.02223): `prompt_id, model_id, category_id, label, prompt, model_name, category`."""

from pathlib import Path

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError
from ..results import BenchmarkResults
from .frames import SEPARATED, header_of, load_table
from .table import numbers
from .text import files_of, results_of, side_of, suffix_of


def recognises(file: Path, head: str) -> bool:
    """Recognise a CSV with the columns prompt_id and model_id."""
    return suffix_of(file) in SEPARATED and {"prompt_id", "model_id"} <= set(header_of(head))


def read(path: Path) -> BenchmarkResults:
    """Read one file or a folder of files. A file name that is or ends in `train`, `val` or `test` names the split.

    The authors' files repeat some (model, prompt) pairs. Their mean is the score.
    """
    return BenchmarkResults.merge([_read_file(file) for file in files_of(path, *SEPARATED)])


def _read_file(file: Path) -> BenchmarkResults:
    frame = load_table(file, texts=("prompt_id", "model_id", "model_name", "prompt"))
    for column in ("prompt_id", "model_id", "label", "prompt"):
        if column not in frame:
            raise ResultsError(f"{file}: no column {column!r}. Expected prompt_id, model_id, label and prompt.")
        if frame[column].isna().any() and column != "label":
            row = frame.index[int(frame[column].isna().to_numpy().argmax())]
            raise ResultsError(f"{file}: row {row}, column {column!r}: empty. Every record needs a value.")
    texts = frame.groupby("prompt_id", sort=False)["prompt"].nunique()
    if (texts > 1).any():
        raise ResultsError(f"{file}: prompt_id {texts.idxmax()!r} has different prompts. Give each prompt its own id.")
    label = numbers(frame["label"], file, "label")
    rows, ids = pd.factorize(frame["prompt_id"].astype(str))
    names = frame["model_name"] if "model_name" in frame else frame["model_id"]
    columns, models = pd.factorize(names.astype(str))
    means = pd.DataFrame({"row": rows, "column": columns, "label": label}).groupby(["row", "column"])["label"].mean()
    scores = np.full((len(ids), len(models)), np.nan, dtype=np.float32)
    scores[means.index.get_level_values(0), means.index.get_level_values(1)] = means.to_numpy()
    first = frame.loc[~frame["prompt_id"].duplicated()]
    category = next((name for name in ("category", "category_id") if name in frame), None)
    queries = pd.DataFrame(
        {
            "id": list(ids),
            "prompt": first["prompt"].astype(str).tolist(),
            "benchmark": first[category].astype(str).tolist() if category else "embedllm",
            "subject": None,
            "split": side_of(file),
        }
    )
    return results_of(file, queries, list(models), scores)
