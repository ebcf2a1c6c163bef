"""Inspect AI's logs: `.json`, or `.eval`, a ZIP archive of the same documents."""

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError, did_you_mean, one_line, require_extra
from ..results import BenchmarkResults
from .frames import field
from .table import conversation_of, score_of
from .text import files_of, keys_of, number, read_json, results_of, suffix_of


def recognises(file: Path, head: str) -> bool:
    """Recognise an archive of samples, or a JSON object with an evaluation and its status."""
    if suffix_of(file) == ".eval":
        return zipfile.is_zipfile(file)
    return suffix_of(file) == ".json" and {"version", "status", "eval"} <= keys_of(head)


def read(path: Path, *, scorer: str | None = None) -> BenchmarkResults:
    """Read one log or a folder of logs. The task is the benchmark, and the mean over epochs is the score.

    Args:
        path: File or folder.
        scorer: Scorer to read. Defaults to the first scorer of each log.

    Raises:
        ResultsError: A file is not a log, a log has no samples, or a log has no such scorer.
    """
    return BenchmarkResults.merge([_read_file(file, scorer) for file in files_of(path, ".json", ".eval")])


def _read_file(file: Path, scorer: str | None) -> BenchmarkResults:
    header, samples = _archive(file) if suffix_of(file) == ".eval" else _document(file)
    task, model = (field(header, f"eval.{name}") for name in ("task", "model"))
    for name, value in (("task", task), ("model", model)):
        if not isinstance(value, str) or not value:
            raise ResultsError(f"{file}: field 'eval.{name}': missing. Expected a log of Inspect.")
    benchmark = str(task).rpartition("/")[2]
    found: dict[str, tuple[str, Any, list[float]]] = {}
    for number_of, sample in enumerate(samples):
        place = f"{file}: sample {number_of}"
        if not isinstance(sample, dict) or "id" not in sample or "input" not in sample:
            raise ResultsError(f"{place}: expected an object with 'id' and 'input'")
        text, messages = conversation_of(sample["input"], f"{place}, field 'input'")
        key = f"{benchmark}/{sample['id']}"
        found.setdefault(key, (str(text), messages, []))[2].append(_score(sample, scorer, place))
    if not found:
        raise ResultsError(f"{file}: empty results, no samples in the log")
    queries = pd.DataFrame(
        {
            "id": list(found),
            "prompt": [text for text, _, _ in found.values()],
            "benchmark": benchmark,
            "subject": None,
            "split": None,
        }
    )
    if any(messages for _, messages, _ in found.values()):
        queries["messages"] = [messages for _, messages, _ in found.values()]
    scores = [np.mean(known) if (known := [v for v in values if v == v]) else np.nan for _, _, values in found.values()]
    return results_of(file, queries, [str(model)], np.array(scores, dtype=np.float32)[:, None])


def _document(file: Path) -> tuple[Any, list[Any]]:
    document = read_json(file)
    samples = document.get("samples") if isinstance(document, dict) else None
    return document, samples if isinstance(samples, list) else []


def _archive(file: Path) -> tuple[Any, Iterator[Any]]:
    """Return the header of an archive and an iterator over its samples, which Zstandard compresses."""
    archives = zipfile if sys.version_info >= (3, 14) else require_extra("backports.zstd.zipfile", "data")
    try:
        archive = archives.ZipFile(file)
        names = sorted(name for name in archive.namelist() if name.startswith("samples/") and name.endswith(".json"))
        header = json.loads(
            archive.read("header.json" if "header.json" in archive.namelist() else "_journal/start.json")
        )
    except (OSError, KeyError, ValueError, NotImplementedError, archives.BadZipFile) as error:
        raise ResultsError(f"{file}: not a readable log of Inspect ({one_line(error)})") from None

    def samples() -> Iterator[Any]:
        for name in names:
            try:
                yield json.loads(archive.read(name))
            except (OSError, ValueError, NotImplementedError, archives.BadZipFile) as error:
                raise ResultsError(f"{file}: {name} can't be read ({one_line(error)})") from None

    return header, samples()


def _score(sample: dict[str, Any], scorer: str | None, place: str) -> float:
    """Return a sample's score, NaN where it was not scored."""
    scores = sample.get("scores")
    if not isinstance(scores, dict) or not scores:
        return np.nan
    if scorer is not None and scorer not in scores:
        raise ResultsError(f"{place}: no scorer {scorer!r}, {did_you_mean(scorer, scores)}")
    name = scorer or next(iter(scores))
    return number(score_of(field(scores[name], "value")), f"{place}, field 'scores.{name}.value'")
