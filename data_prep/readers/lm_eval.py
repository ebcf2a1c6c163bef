"""lm-evaluation-harness output (--log_samples): a folder per model, `results_*.json` and `samples_<task>_*.jsonl`."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError, did_you_mean
from ..results import BenchmarkResults
from .text import number, read_json, read_records, results_of

logger = logging.getLogger(__name__)

_STAMP = r"\d{4}-\d{2}-\d{2}T[\d\-.:]+"
_SAMPLES = re.compile(rf"samples_(?P<task>.+)_(?P<stamp>{_STAMP}?)\.jsonl?(\.gz)?")
_RESULTS = re.compile(rf"results_(?P<stamp>{_STAMP}?)\.json(\.gz)?")
METRICS = (
    "acc_norm", "acc", "exact_match", "pass@1", "pass_at_1", "em", "f1", "prompt_level_strict_acc", "mc2", "mc1",
)  # fmt: skip
_GROUPS = ("mmlu_pro", "mmlu")
_QUESTIONS = ("question", "query", "prompt", "problem", "instruction", "input", "sentence", "goal", "text")
_ANSWERS = ("answer", "target", "label", "gold", "solution", "output", "completion", "rationale", "explanation")
_LONG = 12  # characters


def recognises(file: Path, head: str) -> bool:
    """Recognise a file of samples or of results by its name."""
    del head
    return _SAMPLES.fullmatch(file.name) is not None or _RESULTS.fullmatch(file.name) is not None


def read(
    path: Path,
    *,
    metric: Sequence[str] | None = None,
    filter: str | None = None,  # noqa: A002
) -> BenchmarkResults:
    """Read the newest samples of each (model, task) below `path`.

    Args:
        path: The harness's `--output_path`, or one model's folder in it.
        metric: Per-sample metric that becomes the score: `NAME` for all tasks, `TASK=NAME` for one. Defaults to the
            first one of `METRICS` in the samples. A task without any is left out, with a warning.
        filter: Filter (`strict-match`, `flexible-extract`) whose samples are read. Defaults to the first one in the
            file.

    Raises:
        ResultsError: A file has another format, its model is unknown, or there are no samples.
    """
    chosen = dict(_task_and_metric(text) for text in ([metric] if isinstance(metric, str) else metric or ()))
    newest: dict[tuple[str, str], tuple[str, Path, dict[str, str]]] = {}
    runs: dict[Path, dict[str, dict[str, Any]]] = {}
    for file in sorted(path.rglob("samples_*")) if path.is_dir() else [path]:
        match = _SAMPLES.fullmatch(file.name)
        if not match:
            if path.is_dir():
                continue
            raise ResultsError(f"{file}: expected a name like samples_TASK_2025-01-31T12-00-00.jsonl")
        if file.parent not in runs:
            runs[file.parent] = _runs(file.parent)
        model, groups = _summary(file.parent, match["stamp"], runs[file.parent])
        key, found = (model, match["task"]), (match["stamp"], file, groups)
        if key not in newest or found[:2] > newest[key][:2]:
            newest[key] = found
    if not newest:
        raise ResultsError(f"{path}: empty results, no samples_*.jsonl below it (run lm_eval with --log_samples)")
    parts, without = [], []
    for (model, task), (_, file, groups) in newest.items():
        part = _read_samples(file, task, model, groups, chosen.get(task, chosen.get("")), filter)
        if isinstance(part, str):
            without.append(f"{task} ({part})")
        else:
            parts.append(part)
    if without:
        told = "no metric known here in " + ", ".join(dict.fromkeys(without))
        if not parts:
            raise ResultsError(f"{path}: {told}. Pass one with --set metric=TASK=NAME.")
        logger.warning("%s: %s: left out. Pass one with --set metric=TASK=NAME.", path, told)
    return BenchmarkResults.merge(parts)


def _task_and_metric(text: str) -> tuple[str, str]:
    """Return task and metric of `TASK=NAME`, or an empty task and the metric of `NAME`."""
    task, equals, name = text.rpartition("=")
    if not name or (equals and not task):
        raise ResultsError(f"option metric: expected NAME or TASK=NAME, got {text!r}")
    return task, name


def _runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results files of a folder, by the time of their run."""
    found = {}
    for file in sorted(folder.glob("results_*")):
        if match := _RESULTS.fullmatch(file.name):
            document = found[match["stamp"]] = read_json(file)
            if not isinstance(document, dict):
                raise ResultsError(f"{file}: expected an object, got a {type(document).__name__}")
    return found


def _summary(folder: Path, stamp: str, documents: dict[str, dict[str, Any]]) -> tuple[str, dict[str, str]]:
    """Return the model's name and the outermost group of each task, from the results file of a run.

    Args:
        folder: Folder of the samples.
        stamp: Time of the samples' run.
        documents: Results files of the folder, by the time of their run.

    Raises:
        ResultsError: No results file has that stamp, and the other results files are of several models.
    """
    names = {str(document.get("model_name")) for document in documents.values() if document.get("model_name")}
    if stamp not in documents and len(names) > 1:
        raise ResultsError(
            f"{folder}: results of {' and '.join(sorted(names))}, and none of the run of {stamp}, so the model of its "
            "samples is unknown. Put each model's files into a folder of its own."
        )
    document = documents.get(stamp) or (documents[max(documents)] if documents else {})
    name = str(document.get("model_name") or folder.name.replace("__", "/"))
    groups = document.get("group_subtasks")
    return name, benchmarks_of(groups) if isinstance(groups, dict) else {}


def benchmarks_of(groups: dict[str, list[str]]) -> dict[str, str]:
    """Return the outermost group of every task in a group: mmlu_astronomy is in mmlu_stem, which is in mmlu."""
    parent = {task: group for group, tasks in groups.items() for task in tasks if task != group}

    def outermost(name: str) -> str:
        seen = {name}
        while parent.get(name) not in (None, *seen):
            name = parent[name]
            seen.add(name)
        return name

    return {task: outermost(task) for task in parent}


def subject_of(task: str, benchmark: str) -> str | None:
    """Return a task's name without its benchmark's, or None if the task is the benchmark."""
    return None if task == benchmark else task.removeprefix(f"{benchmark}_")


def _read_samples(
    file: Path,
    task: str,
    model: str,
    benchmarks: dict[str, str],
    metric: str | None,
    filter: str | None,  # noqa: A002
) -> BenchmarkResults | str:
    """Return one file's results, or the names of its metrics if none of them is known and `metric` is None."""
    ids, prompts, scores = [], [], []
    seen: set[Any] = set()
    filters: dict[str, None] = {}
    for place, sample in read_records(file):
        if not isinstance(sample, dict) or "doc_id" not in sample:
            raise ResultsError(f"{place}, field 'doc_id': missing. Expected a sample written by --log_samples.")
        filters.setdefault(str(sample.get("filter", "none")))
        if str(sample.get("filter", "none")) != (filter or next(iter(filters))):
            continue
        # Older versions write the samples of several filters in consecutive blocks, without filter names.
        if "filter" not in sample and sample["doc_id"] in seen:
            continue
        seen.add(sample["doc_id"])
        name = metric or next((key for key in METRICS if isinstance(sample.get(key), int | float | str)), None)
        if name is None:
            return "it has " + ", ".join(map(str, sample.get("metrics") or sorted(sample)))
        if name not in sample:
            raise ResultsError(f"{place}: no metric {name!r}, available: {sample.get('metrics')}")
        ids.append(f"{task}/{sample['doc_id']}")
        prompts.append(_prompt(sample, place))
        scores.append(number(sample[name], f"{place}, field {name!r}"))
    if filter and filters and filter not in filters:
        raise ResultsError(f"{file}: no filter {filter!r}, {did_you_mean(filter, filters)}")
    if not ids:
        raise ResultsError(f"{file}: empty results, no samples in it")
    # Without a results file that names the groups, known groups with subjects are still recognised.
    known = next((group for group in _GROUPS if task.startswith(f"{group}_")), task)
    benchmark = benchmarks.get(task, known)
    subject = subject_of(task, benchmark)
    queries = pd.DataFrame({"id": ids, "prompt": prompts, "benchmark": benchmark, "subject": subject, "split": None})
    return results_of(file, queries, [model], np.array(scores, dtype=np.float32)[:, None])


def question_of(document: Any, prompt: str) -> str | None:
    """Extract a document's question from a prompt, without few-shot examples, instructions and chat templates.

    Those differ between models, and a user would not write them. A passage before the question and options after it
    belong to the question if the model saw them. Without them different questions have the same text ("Which of these
    is correct?"), or are no questions at all.

    Args:
        document: Document of a task, as in its dataset.
        prompt: Prompt made from the document.

    Returns:
        Part of the prompt from the document's first text to its last. If the prompt contains none of them (because its
        texts are composed differently), the document's own question and options. None if it has no question.
    """
    if not isinstance(document, dict):
        return None
    texts = {k: v.strip() for k, v in document.items() if isinstance(v, str) and v.strip() and k not in _ANSWERS}
    asked = next((texts[key] for key in _QUESTIONS if key in texts), None)
    # The last occurrence, because examples come first. Short texts (a level, a category) may occur by chance.
    shown = [text for text in texts.values() if text in prompt and (text == asked or len(text) >= _LONG)]
    options = _options(document)
    if not shown:
        return None if asked is None else "\n".join([asked, *options])
    start = min(prompt.rfind(text) for text in shown)
    end = max(prompt.rfind(text) + len(text) for text in shown)
    place = start
    for option in options:
        place = prompt.find(option, place)
        if place < 0:
            break
        place += len(option)
    return prompt[start : max(end, place)]


def _options(document: dict[str, Any]) -> list[str]:
    """Return the options: a list of texts, ARC's `{text: [...]}`, or Winogrande's `option1`, `option2`."""
    for key in ("choices", "options", "endings"):
        value = document.get(key)
        value = value.get("text") if isinstance(value, dict) else value
        if isinstance(value, list) and value and all(isinstance(option, str) for option in value):
            return [option.strip() for option in value]
    numbered = [document.get(f"option{number}") for number in (1, 2, 3, 4, 5)]
    return [option for option in numbered if isinstance(option, str)]


def _prompt(sample: dict[str, Any], place: str) -> str:
    """Return the question in the model's prompt, or the whole prompt if the document has no question."""
    arguments: Any = sample.get("arguments")
    if isinstance(arguments, dict):
        arguments = [list(entry.values()) if isinstance(entry, dict) else entry for entry in arguments.values()]
    try:
        prompt = str(arguments[0][0])
    except (TypeError, IndexError, KeyError):
        raise ResultsError(f"{place}, field 'arguments': expected the prompt given to the model") from None
    return question_of(sample.get("doc"), prompt) or prompt
