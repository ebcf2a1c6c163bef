"""RouterArena (arXiv 2510.00202): cached answers of single models (JSONL), and predictions of routers (JSON)."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError
from ..results import BenchmarkResults
from .frames import field
from .text import files_of, number, read_records, results_of, suffix_of

_INDEX = re.compile(r'"global[ _]index"\s*:')


def recognises(file: Path, head: str) -> bool:
    """Recognise JSON whose records have a global index and the selected model."""
    named = '"llm_selected"' in head or '"prediction"' in head
    return suffix_of(file) in (".json", ".jsonl") and named and _INDEX.search(head) is not None


def read(path: Path) -> BenchmarkResults:
    """Read one file or a folder of files. A record is one model's answer to one question.

    The benchmark is the global index without its number (`AIME_112`). A router's predictions count as scores of the
    chosen models. Answers that failed or were not judged count as not measured. The mean over several runs is the
    score.

    Raises:
        ResultsError: A record has no global index, question or model, or no record has a score.
    """
    rows: list[tuple[str, str, str]] = []
    values: list[tuple[float, float]] = []
    for file in files_of(path, ".json", ".jsonl"):
        for place, record in read_records(file):
            rows.append(_whose(record, place))
            values.append(_what(record, place))
    if not rows:
        raise ResultsError(f"{path}: empty results, no record in it")
    frame = pd.DataFrame(rows, columns=["id", "prompt", "model"]).assign(
        score=[score for score, _ in values], cost=[cost for _, cost in values]
    )
    texts = frame.groupby("id", sort=False)["prompt"].nunique()
    if (texts > 1).any():
        raise ResultsError(f"{path}: global index {texts.idxmax()!r} has different questions")
    ids, models = list(dict.fromkeys(frame["id"])), list(dict.fromkeys(frame["model"]))
    means = frame.groupby(["id", "model"])[["score", "cost"]].mean()
    grids = [means[name].unstack("model").reindex(index=ids, columns=models) for name in ("score", "cost")]
    first = frame.drop_duplicates("id")
    queries = pd.DataFrame(
        {
            "id": ids,
            "prompt": first["prompt"].tolist(),
            "benchmark": [re.sub(r"_[^_]*$", "", key) for key in ids],
            "subject": None,
            "split": None,
        }
    )
    return results_of(path, queries, models, *(grid.to_numpy(np.float32) for grid in grids))


def _whose(record: Any, place: str) -> tuple[str, str, str]:
    """Return a record's id, question and model."""
    if not isinstance(record, dict):
        raise ResultsError(f"{place}: expected an object, got a {type(record).__name__}")
    found = []
    for names in (("global_index", "global index"), ("question", "prompt"), ("llm_selected", "prediction")):
        value = next((record[name] for name in names if isinstance(record.get(name), str) and record[name]), None)
        if value is None:
            raise ResultsError(f"{place}, field {names[0]!r}: missing. Expected one of RouterArena's records.")
        found.append(value)
    return found[0], found[1], found[2]


def _what(record: dict[str, Any], place: str) -> tuple[float, float]:
    """Return a record's score and cost in USD, NaN where missing."""
    judged = "evaluation_result" in record
    score = field(record, "evaluation_result.score") if judged else record.get("accuracy")
    cost = field(record, "evaluation_result.inference_cost") if judged else record.get("cost")
    answered = record.get("success", field(record, "generated_result.success")) is not False
    name = "evaluation_result.score" if judged else "accuracy"
    return number(score if answered else None, f"{place}, field {name!r}"), number(cost, f"{place}, field 'cost'")
