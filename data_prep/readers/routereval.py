"""RouterEval's pickles (arXiv 2503.10657): `BENCHMARK_router_dataset.pkl` with pools, and the raw leaderboards."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError, did_you_mean
from ..results import BenchmarkResults
from .pickles import holds_mapping, read_pickle
from .text import files_of, results_of

logger = logging.getLogger(__name__)

_SUFFIX = "_router_dataset"
_SIDES = {"train": "train", "val": "validation", "test": "test"}


def recognises(file: Path, head: str) -> bool:
    """Recognise a pickle whose outermost object is a dict."""
    del head
    return file.suffix == ".pkl" and holds_mapping(file)


def read(path: Path, *, difficulty: str = "hard", candidates: str = "10", kind: str = "all_strong") -> BenchmarkResults:
    """Read one file or a folder of files, one benchmark each, with the file's own three splits.

    A raw leaderboard (`leaderboard_*.pkl`) has no question texts. Ids replace them, which is enough for labels by
    subject and for metrics, but not for training on texts.

    Args:
        path: File or folder.
        difficulty: `easy` (3 or 5 candidates) or `hard` (10, 100 or 1000).
        candidates: Number of candidates.
        kind: `all_strong`, `all_weak` or `strong_to_weak`.
    """
    parts = []
    for file in files_of(path, ".pkl"):
        document = _mapping(read_pickle(file), str(file))
        if "split_index" in document or difficulty in document:
            parts.append(_router_dataset(document, file, (difficulty, candidates, kind)))
        else:
            parts += _leaderboard(document, file)
    return BenchmarkResults.merge(parts)


def _mapping(value: Any, place: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise ResultsError(f"{place}: expected a dict, got a {type(value).__name__}")
    return value


def _entry(mapping: Any, key: Any, place: str) -> Any:
    """Return `mapping[key]`, where keys may be numbers too."""
    for form in (key, int(key)) if isinstance(key, str) and key.isdecimal() else (key,):
        if form in _mapping(mapping, place):
            return mapping[form]
    raise ResultsError(f"{place}: no entry {key!r}, {did_you_mean(str(key), [str(name) for name in mapping])}")


def _matrix(value: Any, place: str) -> np.ndarray:
    try:
        scores = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise ResultsError(f"{place}: expected numbers, got a {type(value).__name__} of other values") from None
    if scores.ndim != 2:
        raise ResultsError(f"{place}: expected a table [queries, models], got shape {list(scores.shape)}")
    return scores


def _router_dataset(document: Mapping, file: Path, keys: tuple[str, str, str]) -> BenchmarkResults:
    group, place = document, str(file)
    for key in keys:
        group = _entry(group, key, place)
        place += f", {key}"
    models = [str(name) for name in _entry(group, "model", place)]
    benchmark = file.stem.removesuffix(_SUFFIX)
    parts = []
    for theirs, ours in _SIDES.items():
        scores = _matrix(
            _entry(_entry(group, "data", place), f"{theirs}_score", f"{place}, data"), f"{place}, {theirs}_score"
        )
        prompts = list(_entry(_entry(document, "prompt", str(file)), f"{theirs}_prompt", f"{file}, prompt"))
        if len(prompts) != len(scores) or scores.shape[1] != len(models):
            raise ResultsError(
                f"{place}, {theirs}_score: expected [{len(prompts)} prompts, {len(models)} models], got "
                f"{list(scores.shape)}"
            )
        queries = pd.DataFrame(
            {
                "id": [f"{benchmark}/{theirs}/{index}" for index in range(len(prompts))],
                "prompt": prompts,
                "benchmark": benchmark,
                "subject": None,
                "split": ours,
            }
        )
        if len(queries):
            parts.append(results_of(file, queries, models, scores))
    return BenchmarkResults.merge(parts)


def _leaderboard(document: Mapping, file: Path) -> list[BenchmarkResults]:
    models = [str(name) for name in _entry(document, "model", str(file))]
    logger.warning(
        "%s has no question texts, so ids replace them: enough for labels and metrics, not for training on texts", file
    )
    parts = []
    for subset, entry in _mapping(_entry(document, "data", str(file)), f"{file}, data").items():
        place = f"{file}, data, {subset}"
        scores = _matrix(_entry(entry, "correctness", place), f"{place}, correctness")
        if scores.shape[1] != len(models):
            raise ResultsError(f"{place}: expected {len(models)} columns, one per model, got {scores.shape[1]}")
        ids = [f"{subset}/{index}" for index in range(len(scores))]
        queries = pd.DataFrame({"id": ids, "prompt": ids, "benchmark": str(subset), "subject": None, "split": None})
        parts.append(results_of(file, queries, models, scores))
    return parts
