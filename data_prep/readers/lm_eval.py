"""lm-evaluation-harness output (--log_samples): a folder per model, `results_*.json` and `samples_<task>_*.jsonl`."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..results import BenchmarkResults, ResultsError
from .files import number, read_json, read_text

_STAMP = r"\d{4}-\d{2}-\d{2}T[\d\-.:]+"
_SAMPLES = re.compile(rf"samples_(?P<task>.+)_(?P<stamp>{_STAMP})\.jsonl")
_RESULTS = re.compile(rf"results_{_STAMP}\.json")
METRICS = ("acc_norm", "acc", "exact_match", "pass@1", "f1")


def recognises(file: Path, head: str) -> bool:
    """A file of samples or of results, by its name."""
    del head
    return _SAMPLES.fullmatch(file.name) is not None or _RESULTS.fullmatch(file.name) is not None


def read(path: Path, *, metric: str | None = None) -> BenchmarkResults:
    """Read every model's folder below `path`; the newest samples of each (model, task) count.

    Args:
        path: the harness's `--output_path`, or one model's folder in it.
        metric: which per-sample metric is the score; where not given the first there is of acc_norm, acc, exact_match,
            pass@1 and f1. With several filters (`strict-match`, `flexible-extract`) the first one in the file counts.
    """
    newest: dict[tuple[Path, str], Path] = {}
    for file in sorted(path.rglob("samples_*.jsonl") if path.is_dir() else [path]):
        match = _SAMPLES.fullmatch(file.name)
        if not match:
            raise ResultsError(f"{file}: expected a name like samples_TASK_2025-01-31T12-00-00.jsonl")
        newest[file.parent, match["task"]] = file  # sorted by time stamp, so the last one wins
    if not newest:
        raise ResultsError(f"{path}: empty results, no samples_*.jsonl below it (run lm_eval with --log_samples)")
    names = {folder: _model_name(folder) for folder in {folder for folder, _ in newest}}
    parts = [_read_samples(file, task, names[folder], metric) for (folder, task), file in newest.items()]
    return BenchmarkResults.merge(parts)


def _model_name(folder: Path) -> str:
    """The model as the results file beside the samples names it, or the folder's name."""
    results = sorted(folder.glob("results_*.json"))
    if not results:
        return folder.name.replace("__", "/")
    document = read_json(results[-1])
    name = document.get("model_name") if isinstance(document, dict) else None
    return str(name or folder.name.replace("__", "/"))


def _read_samples(file: Path, task: str, model: str, metric: str | None) -> BenchmarkResults:
    ids, prompts, scores = [], [], []
    chosen_filter = None
    for line_number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{file}: line {line_number}"
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise ResultsError(f"{place}: not JSON ({error.msg}); is the file cut short?") from None
        if not isinstance(sample, dict) or "doc_id" not in sample:
            raise ResultsError(f"{place}, field 'doc_id': missing; expected a sample written by --log_samples")
        chosen_filter = chosen_filter or sample.get("filter", "none")
        if sample.get("filter", "none") != chosen_filter:
            continue
        name = metric or next((key for key in METRICS if key in sample), None)
        if name not in sample:
            raise ResultsError(f"{place}: no metric {name or 'known here'!r}; available: {sample.get('metrics')}")
        ids.append(f"{task}/{sample['doc_id']}")
        prompts.append(_prompt(sample, place))
        scores.append(number(sample[name], f"{place}, field {name!r}"))
    if not ids:
        raise ResultsError(f"{file}: empty results, no samples in it")
    # The harness writes the tasks of a group as GROUP_SUBJECT; mmlu is the one whose subjects people train on.
    subject = task.removeprefix("mmlu_") if task.startswith("mmlu_") else None
    benchmark = "mmlu" if subject else task
    queries = pd.DataFrame({"id": ids, "prompt": prompts, "benchmark": benchmark, "subject": subject, "split": None})
    return BenchmarkResults(queries, [model], np.array(scores, dtype=np.float32)[:, None])


def question_of(document: Any) -> str | None:
    """The question as a document of a task has it, or None."""
    if not isinstance(document, dict):
        return None
    for key in ("question", "query", "prompt", "problem", "instruction", "input", "text"):
        if isinstance(document.get(key), str) and document[key].strip():
            return document[key]
    return None


def _prompt(sample: dict[str, Any], place: str) -> str:
    """The question: a field of the document where it has one, else the prompt that the model was given."""
    if found := question_of(sample.get("doc")):
        return found
    arguments = sample.get("arguments")
    if isinstance(arguments, dict):
        arguments = [list(entry.values()) if isinstance(entry, dict) else entry for entry in arguments.values()]
    try:
        return str(arguments[0][0])
    except (TypeError, IndexError, KeyError):
        raise ResultsError(f"{place}, field 'arguments': expected the prompt given to the model") from None
