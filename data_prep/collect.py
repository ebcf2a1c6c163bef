"""Collection of benchmark results: the experts of a pool run on tasks of lm-evaluation-harness.

The harness evaluates. This module provides the experts, records their scores, and resumes interrupted runs.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ..modeling.cluster import ENGINES, Cluster
from ..modeling.errors import ExpertokenError, did_you_mean, one_line, require_extra
from ..modeling.experts import Expert
from ..modeling.files import atomic_file
from ..modeling.pool import ExpertPool
from ..modeling.source import Source

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

logger = logging.getLogger(__name__)

_SETTINGS_FILE = "collect.json"
_CONCURRENT = 8  # requests to an endpoint


@dataclass(frozen=True)
class Evaluation:
    """Settings of the harness, the same for every expert.

    Attributes:
        include_path: Folder with the user's own tasks (the harness's YAML).
        limit: Number of documents per task, taken from its beginning. None for all.
        num_fewshot: Number of examples in the prompt. None for the task's own number.
        chat_template: If true, local models are prompted through their chat template, as experts of a composite are.
            Endpoints always are.
        metric: Per-sample metric that becomes the score. None for the first one of `METRICS` that the task has.
        batch_size: Batch size for local models.
        meta: Meta LLM as hub id, folder or GGUF file, for `self` and for adapters without their own base.
        trust_remote_code: If true, repositories of models and tasks may run their own code.
    """

    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = True
    metric: str | None = None
    batch_size: int = 8
    meta: str | None = None
    trust_remote_code: bool = False


Pair = tuple[Expert, str]


def collect(
    pool: ExpertPool,
    tasks: Sequence[str],
    out: Path | str,
    evaluation: Evaluation | None = None,
    *,
    engine: str = "local",
    cluster: Cluster | None = None,
) -> list[Path]:
    """Run every candidate of a pool on every task, and write a file per pair in the `table` format.

    Pairs with an existing file are skipped, so an interrupted run resumes. A pair that fails is logged and does not
    stop the others.

    Args:
        pool: Experts, and self if it is a candidate.
        tasks: Names of tasks or groups of the harness.
        out: Folder for the results.
        evaluation: Settings of the harness.
        engine: `local` for pairs in turn, or `ray` for pairs on a Ray cluster.
        cluster: Ray cluster, for `ray`.

    Raises:
        ExpertokenError: A task is unknown, `out` was collected with other settings, or pairs failed.
        ImportError: The extra `collect` (or `ray`) is not installed.
    """
    if engine not in ENGINES:
        raise ExpertokenError(f"engine: unknown {engine!r}, {did_you_mean(engine, ENGINES)}")
    evaluation = evaluation or Evaluation()
    out = Path(out)
    for expert in pool.candidates:
        _check(expert, evaluation)
    _remember(out, pool, evaluation, {task: _identity(_load_task(task, evaluation)) for task in tasks})
    # Ordered by expert, so that a local model is loaded once for all its tasks.
    pairs = [(expert, task) for expert in pool.candidates for task in tasks]
    missing = [pair for pair in pairs if not _file(out, *pair).exists()]
    run = _run_on_ray(missing, evaluation, cluster or Cluster()) if engine == "ray" else _run_local(missing, evaluation)
    failed = []
    bar = tqdm(total=len(pairs), initial=len(pairs) - len(missing), desc="collect", unit="pair", disable=not missing)
    for (expert, task), rows in run:
        if isinstance(rows, Exception):
            failed.append(f"{expert.name} on {task}: {one_line(rows) or type(rows).__name__}")
            logger.warning("%s", failed[-1])
        else:
            with atomic_file(_file(out, expert, task)) as aside, aside.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        bar.update()
    bar.close()
    if failed:
        raise ExpertokenError(
            f"{len(failed)} of {len(pairs)} pairs failed (the first: {failed[0]}), the others are in {out}. Run the "
            "same command again to retry the failed pairs."
        )
    return [_file(out, *pair) for pair in pairs]


def _file(out: Path, expert: Expert, task: str) -> Path:
    return out / f"{expert.name}--{task}.jsonl"


def _task_manager(task: str, evaluation: Evaluation) -> "TaskManager":
    """Return a task manager of the harness that knows the given task.

    The harness's own tasks are thousands of files and take many seconds to read. They are read only if the task is not
    in the user's folder.
    """
    require_extra("lm_eval", "collect")
    folder = evaluation.include_path
    if folder is None:
        return _manager(None, defaults=True, written=0)
    if not Path(folder).is_dir():
        raise ExpertokenError(f"{folder}: no such folder. Expected a folder with your own tasks (YAML).")
    files = (file for pattern in ("*.yaml", "*.py") for file in sorted(Path(folder).rglob(pattern)))
    written = hash(tuple((file, file.stat().st_mtime_ns) for file in files))
    own = _manager(folder, defaults=False, written=written)
    return own if task in own.all_subtasks else _manager(folder, defaults=True, written=written)


@lru_cache(4)
def _manager(folder: str | None, *, defaults: bool, written: int) -> "TaskManager":
    """Return a cached task manager. A folder with another hash `written` of its files gets a new one."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=defaults)


def _load_task(name: str, evaluation: Evaluation) -> dict[str, Any]:
    """Load the harness's task of a name, or the tasks of a group.

    Raises:
        ExpertokenError: The task is unknown, its data cannot be loaded, or no metric of it scores single samples.
    """
    manager = _task_manager(name, evaluation)
    if name not in manager.all_tasks:
        raise ExpertokenError(f"no task {name!r} in the harness, {did_you_mean(name, manager.all_tasks)}")
    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:  # raised by datasets, the hub's client, the task's own code, ...
        raise ExpertokenError(f"task {name}: its data can't be loaded ({one_line(error)})") from error
    from .readers.lm_eval import METRICS

    wanted = (evaluation.metric,) if evaluation.metric else METRICS
    for found, task in tasks.items():
        there = [entry["metric"] for entry in task.config.metric_list or () if isinstance(entry["metric"], str)]
        if there and not set(wanted) & set(there):
            raise ExpertokenError(
                f"task {found}: no metric {' or '.join(wanted)}. Pass --metric with one that scores each sample: "
                f"{', '.join(there)}"
            )
    return tasks


def _identity(tasks: dict[str, Any]) -> str:
    """Hash the questions of tasks, because other wording or documents under the same name are another benchmark."""
    digest = hashlib.sha256()
    for name, task in sorted(tasks.items()):
        # Templates only, because a function has no stable text.
        wording = [getattr(task.config, key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice")]
        digest.update(json.dumps([name, [part for part in wording if isinstance(part, str | list)]]).encode())
        for document in task.eval_docs:
            digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _check(expert: Expert, evaluation: Evaluation) -> None:
    """Check that an expert has its base and its key, before other experts run for hours."""
    if expert.kind.needs_base(expert) and not evaluation.meta:
        raise ExpertokenError(f"expert {expert.name!r} runs on the meta LLM. Pass the meta LLM with --meta.")
    if expert.kind.remote:
        expert.api_key()


def _remember(out: Path, pool: ExpertPool, evaluation: Evaluation, tasks: dict[str, str]) -> None:
    """Record the settings of a folder's results, and refuse to resume with other settings or models."""
    file = out / _SETTINGS_FILE
    left_out = ("batch_size", "include_path", "trust_remote_code")  # these change no score
    settings = {key: value for key, value in asdict(evaluation).items() if key not in left_out}
    identity = ("backend", "model", "base", "revision", "base_url", "cost")
    experts = {e.name: {key: getattr(e, key) for key in identity} | dict(e.options) for e in pool.candidates}
    known: dict[str, Any] = {"harness": version("lm_eval"), "settings": settings, "experts": {}, "tasks": {}}
    if file.exists():
        try:
            known |= json.loads(file.read_text("utf-8"))
        except (ValueError, TypeError) as error:
            raise ExpertokenError(f"{file}: damaged ({one_line(error)}). Choose another --out.") from None
        if known["harness"] != version("lm_eval"):
            logger.warning(
                "%s was collected with lm_eval %s, the installed version is %s",
                out,
                known["harness"],
                version("lm_eval"),
            )
        differing = [
            f"{key} {known['settings'].get(key)!r} then, {value!r} now"
            for key, value in settings.items()
            if known["settings"].get(key) != value
        ]
        differing += [
            f"expert {name!r} was another model or had another cost"
            for name, entry in experts.items()
            if known["experts"].get(name, entry) != entry
        ]
        other = [name for name, mark in tasks.items() if known["tasks"].get(name, mark) != mark]
        differing += [f"task {name!r} had other questions" for name in other]
        if differing:
            raise ExpertokenError(f"{out} was collected otherwise ({'; '.join(differing)}). Choose another --out.")
    known["experts"] |= experts
    known["tasks"] |= tasks
    with atomic_file(file) as aside:
        aside.write_text(json.dumps(known, indent=2) + "\n", "utf-8")


def _run_local(pairs: Sequence[Pair], evaluation: Evaluation) -> Iterator[tuple[Pair, list[dict] | Exception]]:
    loaded: tuple[Expert, LM] | None = None
    for pair in pairs:
        expert, task = pair
        try:
            if loaded is None or loaded[0] is not expert:
                loaded = None  # frees the memory of the previous model first
                loaded = (expert, _model(expert, evaluation))
            yield pair, evaluate_pair(loaded[1], expert, task, evaluation)
        except Exception as error:  # the harness, tasks and models raise errors of all kinds, and other pairs must run
            yield pair, error


def _run_on_ray(
    pairs: Sequence[Pair], evaluation: Evaluation, cluster: Cluster
) -> Iterator[tuple[Pair, list[dict] | Exception]]:
    if not pairs:
        return
    with cluster.connected() as ray:
        run = ray.remote(_remote_pair)
        pending = {}
        for expert, task in pairs:
            gpus = 0 if expert.kind.remote else cluster.gpus
            future = run.options(num_cpus=cluster.cpus, num_gpus=gpus, name=f"{expert.name}--{task}").remote(
                expert, task, evaluation
            )
            pending[future] = (expert, task)
        while pending:
            [future], _ = ray.wait(list(pending), num_returns=1)
            pair = pending.pop(future)
            try:
                yield pair, ray.get(future)
            except ray.exceptions.RayTaskError as error:
                yield pair, error.cause
            except ray.exceptions.RayError as error:
                yield pair, error


def _remote_pair(expert: Expert, task: str, evaluation: Evaluation) -> list[dict]:
    return evaluate_pair(_model(expert, evaluation), expert, task, evaluation)


def _base(evaluation: Evaluation) -> Source | None:
    return Source(evaluation.meta, None, evaluation.trust_remote_code) if evaluation.meta else None


def _model(expert: Expert, evaluation: Evaluation) -> "LM":
    from .harness_models import language_model

    return language_model(
        expert,
        _base(evaluation),
        batch_size=evaluation.batch_size,
        trust_remote_code=evaluation.trust_remote_code,
    )


def _cost(lm: "LM", expert: Expert, sample: dict[str, Any]) -> float | None:
    """Return the USD of one answer at the pool's prices, or None without prices or without a generated text."""
    prompt, answer = sample["arguments"][0][0], sample["resps"][0][0]
    if expert.cost is None or not isinstance(answer, str):
        return None
    used: dict[str, tuple[int, int]] | None = getattr(lm, "used", None)
    if used is None:
        return expert.price(len(lm.tok_encode(prompt)), len(lm.tok_encode(answer)))
    return expert.price(*used[prompt]) if prompt in used else None


def evaluate_pair(lm: "LM", expert: Expert, task: str, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Evaluate an expert on a task, or on all tasks of a group, and return rows of a long table.

    Raises:
        ExpertokenError: The task needs log-probabilities that the expert does not give, or no metric of it is known.
    """
    from lm_eval import simple_evaluate

    harness_tasks = _load_task(task, evaluation)
    chat = not expert.kind.is_weights or (evaluation.chat_template and lm.tokenizer.chat_template is not None)
    try:
        found = simple_evaluate(
            lm,
            tasks=[task],
            num_fewshot=evaluation.num_fewshot,
            limit=evaluation.limit,
            apply_chat_template=chat,
            task_manager=_task_manager(task, evaluation),
            bootstrap_iters=0,
        )
    except NotImplementedError as error:
        raise ExpertokenError(
            f"the task needs log-probabilities, which this expert does not give. Use its generative form ({error})."
        ) from None
    rows = []
    for name, samples in found["samples"].items():
        chosen = samples[0]["filter"]
        for sample in samples:
            if sample["filter"] == chosen:  # the task's first of several filters (strict-match, flexible-extract)
                row = _row(sample, name, task, expert, harness_tasks[name], evaluation.metric)
                rows.append(row | {"cost": _cost(lm, expert, sample)})
    return rows


def _row(
    sample: dict[str, Any], name: str, task: str, expert: Expert, harness_task: Any, metric: str | None
) -> dict[str, Any]:
    from .readers.lm_eval import METRICS, question_of, subject_of

    key = metric or next((key for key in METRICS if key in sample), None)
    if key not in sample:
        has = ", ".join(sample["metrics"])
        raise ExpertokenError(
            f"task {name}: its samples have no metric {key or 'known here'!r}. Pass one with --metric: {has}"
        )
    # Not the prompt that was sent, which depends on each expert's chat template.
    asked = harness_task.doc_to_text(sample["doc"])
    query = question_of(sample["doc"], asked if isinstance(asked, str) else "")
    if query is None:
        # In tasks like Winogrande the text is the number of the right beginning, so the beginnings are the question.
        query = asked if isinstance(asked, str) else "\n".join(map(str, harness_task.doc_to_choice(sample["doc"])))
    answer = sample["resps"][0][0]
    return {
        "id": f"{name}/{sample['doc_id']}",
        "query": query,
        "model": expert.name,
        "score": float(sample[key]),
        "benchmark": task,
        "subject": subject_of(name, task),
        "response": answer if isinstance(answer, str) else None,
    }
