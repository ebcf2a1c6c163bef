"""Tables of any kind: long (a row per query and model) or wide (a row per query, a column per model)."""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...modeling.chat import as_messages, text_of
from ...modeling.errors import ExpertokenError, ResultsError, did_you_mean, one_line
from ..leaks import IMAGES
from ..results import BenchmarkResults
from .frames import SUFFIXES, field, holds_records, load_table
from .text import SIDES, files_of, head_of, results_of, stem_of, suffix_of

logger = logging.getLogger(__name__)

REPEATS = ("refuse", "mean")
"""Ways to handle several scores of one model on one query."""

WORDS = {
    "true": 1.0, "yes": 1.0, "correct": 1.0, "right": 1.0, "pass": 1.0, "passed": 1.0,
    "false": 0.0, "no": 0.0, "incorrect": 0.0, "wrong": 0.0, "fail": 0.0, "failed": 0.0,
}  # fmt: skip
"""Scores as words, in any case."""
_LETTERS = {
    "C": 1.0,
    "P": 0.5,
    "I": 0.0,
    "N": 0.0,
}  # Inspect's letters: correct, partially correct, incorrect, no answer
_HEAD = 20_000  # characters
_PATH = 1000  # characters of a picture's path
_SAMPLES = ("sample", "attempt", "epoch", "repeat", "repetition", "trial", "run")  # columns that number attempts
_COST = re.compile(r"^(.+?)[\s_.|-](?:total[\s_.-])?costs?(?:[\s_.-]usd)?$|^costs?[\s_.-](.+)$", re.IGNORECASE)
# Columns of tables that are not models. Names are compared without case and punctuation.
_NO_MODELS = {
    "answer", "answers", "target", "label", "labels", "gold", "goldanswer", "reference", "groundtruth", "difficulty",
    "level", "category", "topic", "source", "language", "lang", "type", "index", "idx", "number", "no", "row", "tokens",
    "length", "latency", "seconds", "time", "seed", "year", "weight", "comment", "note", "notes", *_SAMPLES,
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns, and options of the reader.

    A name with dots is a field of nested objects: `evaluation_result.score`.

    Attributes:
        query: Column with the question's text, or with a list of messages.
        model: Column with the model's name, in long tables.
        score: Column with the score, in long tables.
        models: Columns with scores, in wide tables. If None, a table with a `model` column is long. In any other table
            every column of numbers or of words such as correct and incorrect is a model, except costs and columns
            with another role.
        id: Column with the id of a query. Without such a column the id is benchmark and text.
        benchmark: Column with the benchmark. Without such a column the benchmark is the file's name.
        subject: Column with the subject within the benchmark.
        image: Column with a picture of the question: its path below the folder of `--images`, or a list of paths.
        split: Column with train, validation or test, or names such as `dev`.
        cost: Column with the USD for this query, in long tables. Wide tables have a column `MODEL_cost` per model.
        contaminated: Column that is true where the model was trained on the benchmark, in long tables. One such row
            flags the pair.
        scale: Score of a perfect answer, by which scores are divided.
        repeats: Handling of several scores of one model on one query: `refuse`, or `mean`. If a column numbers the
            attempts (`sample`, `attempt`, `epoch`, ...), the mean is taken anyway.
    """

    query: str = "query"
    model: str = "model"
    score: str = "score"
    models: Sequence[str] | None = None
    id: str = "id"
    benchmark: str = "benchmark"
    subject: str = "subject"
    image: str = "image"
    split: str = "split"
    cost: str = "cost"
    contaminated: str = "contaminated"
    scale: float = 1.0
    repeats: str = "refuse"

    def __post_init__(self) -> None:
        try:
            scale = float(self.scale)
        except (TypeError, ValueError):
            scale = 0.0
        if not 0 < scale < float("inf"):
            raise ResultsError(f"option scale: expected a number above 0, got {self.scale!r}")
        object.__setattr__(self, "scale", scale)
        if self.repeats not in REPEATS:
            raise ResultsError(f"option repeats: unknown value {self.repeats!r}, {did_you_mean(self.repeats, REPEATS)}")

    @property
    def of_queries(self) -> dict[str, str]:
        """Table's name of each query column of `BenchmarkResults`."""
        found = {"id": self.id, "prompt": self.query}
        return found | {"benchmark": self.benchmark, "subject": self.subject, "split": self.split}

    @property
    def roles(self) -> dict[str, str]:
        """Column name by role."""
        names = ("query", "model", "score", "id", "benchmark", "subject", "split", "cost", "contaminated")
        return {name: getattr(self, name) for name in names}


def recognises(file: Path, head: str) -> bool:
    """Recognise any table, where JSON must be a list of objects, or one object per line."""
    return suffix_of(file) in SUFFIXES and (suffix_of(file) != ".json" or holds_records(head))


def read(path: Path, **columns: Any) -> BenchmarkResults:
    """Read one table or a folder of tables (all of one shape).

    Args:
        path: File or folder.
        **columns: Names of columns, see `Columns`.
    """
    chosen = Columns(**columns)
    texts = (*chosen.of_queries.values(), chosen.model)
    # A folder of tables may hold other JSON files, such as the settings of a collection.
    files = [f for f in files_of(path, *SUFFIXES) if f == path or recognises(f, head_of(f, _HEAD))]
    if not files:
        raise ResultsError(f"{path}: empty results, no table in the folder")
    frames = {file: load_table(file, texts=texts) for file in files}
    names = _benchmarks(frames, path, chosen)
    return BenchmarkResults.merge([from_frame(frame, str(file), names[file], chosen) for file, frame in frames.items()])


def _benchmarks(frames: dict[Path, pd.DataFrame], path: Path, columns: Columns) -> dict[Path, str]:
    """Return the benchmark of each file, for tables without a column for it: the file's name.

    If each file has one model, the model's name is removed from the file's name (`gsm8k-llama.csv`). If file names do
    not contain it and the files have the same questions, all are one benchmark with the folder's name.
    """
    names = {file: stem_of(file) for file in frames}
    needed = {columns.query, columns.model}
    if len(frames) < 2 or not all(needed <= set(f) and columns.benchmark not in f for f in frames.values()):
        return names
    models = {file: set(frame[columns.model].dropna().astype(str)) for file, frame in frames.items()}
    if any(len(found) != 1 for found in models.values()):
        return names
    bare = {file: _without(names[file], min(models[file])) for file in frames}
    if all(bare.values()):
        return {file: str(name) for file, name in bare.items()}
    texts = [set(frame[columns.query].astype(str)) for frame in frames.values()]
    single = len(set().union(*models.values())) == len(frames)
    return dict.fromkeys(frames, path.name) if single and sum(map(len, texts)) > len(set().union(*texts)) else names


def _without(stem: str, model: str) -> str | None:
    """Return a file's name without a model's name at its end or beginning, or None if it has none."""
    for name in (model, model.replace("/", "_"), model.replace("/", "__"), model.replace("/", "-"), Path(model).name):
        for pattern in (rf"(.+?)[-_. ]+{re.escape(name)}", rf"{re.escape(name)}[-_. ]+(.+)"):
            if found := re.fullmatch(pattern, stem, re.IGNORECASE):
                return found[1]
    return None


def from_frame(frame: pd.DataFrame, source: str, benchmark: str, columns: Columns) -> BenchmarkResults:
    """Return results from a table in memory.

    Args:
        frame: Long or wide table, whose index numbers the rows for errors.
        source: Name of the table in errors.
        benchmark: Name of the benchmark, if no column states it.
        columns: Names of the columns.

    Raises:
        ResultsError: A column is missing or has nearly the name of an expected one, or a row is malformed.
    """
    frame = _with_fields(frame, columns)
    _ask_about_names(frame, source, columns)
    if columns.query not in frame:
        raise ResultsError(
            f"{source}: no column {columns.query!r} with the question, {did_you_mean(columns.query, frame.columns)}. "
            "Name it with --set query=COLUMN"
        )
    queries = _queries(frame, columns, source, benchmark)
    if columns.models is None and columns.model in frame:
        return _long(frame, queries, source, columns)
    return _wide(frame, queries, source, columns)


def _with_fields(frame: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """Return the frame with a column for each field of nested objects that a column name refers to."""
    found = {}
    for name in [*columns.roles.values(), *(columns.models or ())]:
        first, dot, path = name.partition(".")
        if dot and name not in frame and first in frame:
            found[name] = [field(value, path) for value in frame[first]]
    return frame.assign(**found) if found else frame


def _plain(name: object) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _ask_about_names(frame: pd.DataFrame, source: str, columns: Columns) -> None:
    """Refuse a column with nearly the name of an expected column that is missing.

    Raises:
        ResultsError: There is such a column. It may be a model, or the expected column.
    """
    taken = {*columns.roles.values(), *(columns.models or ())}
    for role, wanted in columns.roles.items():
        if wanted in frame or (columns.models is not None and role in ("model", "score", "cost")):
            continue
        near = {_plain(wanted), f"{_plain(wanted)}s", f"{_plain(wanted)}name"}
        near |= {"queryid", "questionid", "promptid"} if role == "id" else {f"{_plain(wanted)}id"}
        for name in frame.columns:
            if name not in taken and _plain(name) in near:
                raise ResultsError(
                    f"{source}: column {name!r}: if it is the {role}, rename it to {wanted!r}, or pass "
                    f"--set {role}={name}. If it is a model, name all models: --set models={name},..."
                )
    if columns.model not in frame and columns.models is None and columns.score in frame:
        raise ResultsError(
            f"{source}: found a column {columns.score!r}, but no column {columns.model!r}. Add a column "
            f"{columns.model!r}, or pass --set model=COLUMN (for one model of that name --set models={columns.score})."
        )


def _queries(frame: pd.DataFrame, names: Columns, source: str, benchmark: str) -> pd.DataFrame:
    """Return the query columns of every row of the table, repeats included."""
    columns = names.of_queries
    found = {ours: frame.get(theirs) for ours, theirs in columns.items()}
    queries = pd.DataFrame(found, index=frame.index).astype(object)
    asked = [
        conversation_of(v, f"{source}: row {n}, column {columns['prompt']!r}") for n, v in queries["prompt"].items()
    ]
    queries["prompt"] = [text for text, _ in asked]
    if any(messages for _, messages in asked):
        queries["messages"] = [messages for _, messages in asked]
    queries["prompt"] = _texts(queries["prompt"], source, columns["prompt"])
    if columns["benchmark"] not in frame:
        queries["benchmark"] = benchmark
    if names.image in frame:
        cells = frame[names.image].items()
        images = [images_of(value, f"{source}: row {row}, column {names.image!r}") for row, value in cells]
        queries[IMAGES] = pd.Series(images, index=frame.index, dtype=object)
    if columns["id"] not in frame:
        queries["id"] = queries["benchmark"].astype(str) + "/" + queries["prompt"]
        if IMAGES in queries:  # the same text with another picture is another question
            queries["id"] += [f" [{', '.join(images)}]" if images else "" for images in queries[IMAGES]]
    queries["id"] = _texts(queries["id"], source, columns["id"])
    for name in ("benchmark", "subject", "split"):
        queries[name] = queries[name].map(lambda value: value if pd.isna(value) else str(value))
    queries["split"] = queries["split"].map(lambda value: value if pd.isna(value) else SIDES.get(value.lower(), value))
    return queries.where(queries.notna(), None)


def images_of(value: Any, place: str) -> tuple[str, ...] | None:
    """Return the paths of a query's pictures, from one path or a list of paths, or None without pictures.

    Raises:
        ResultsError: The value is neither.
    """
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise ResultsError(f"{place}: expected a path, or a JSON list of paths") from None
    if isinstance(value, np.ndarray | tuple):
        value = list(value)
    if value is None or (not isinstance(value, list | str) and pd.isna(value)):
        return None
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and 0 < len(path) <= _PATH for path in paths):
        raise ResultsError(
            f"{place}: expected a path, or a list of paths. Save a picture in the table to a file first."
        )
    return tuple(paths) or None


def conversation_of(value: Any, place: str) -> tuple[Any, list[dict[str, Any]] | None]:
    """Return a query's text, and its messages if it is a conversation.

    Raises:
        ResultsError: The value is a list, but not a list of messages.
    """
    messages = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, str) and re.match(r'\s*\[\s*\{\s*"(role|content)"', value):
        try:
            messages = json.loads(value)
        except ValueError:
            return value, None
    if not isinstance(messages, list):
        return value, None
    try:
        found = as_messages(messages)
        texts = [text_of(message) for message in found]
    except ExpertokenError as error:
        raise ResultsError(f"{place}: expected text or a list of messages ({one_line(error)})") from None
    if len(found) == 1 and found[0]["role"] == "user":
        return texts[0], None
    pairs = zip(found, texts, strict=True)
    return "\n\n".join(texts), [{"role": message["role"], "content": text} for message, text in pairs]


def _texts(column: pd.Series, source: str | Path, name: str) -> pd.Series:
    missing = column.isna()
    if missing.any():
        row = column.index[int(missing.to_numpy().argmax())]
        raise ResultsError(f"{source}: row {row}, column {name!r}: empty, expected text")
    return column.astype(str)


def numbers(column: pd.Series, source: str | Path, name: str, *, words: bool = True) -> np.ndarray:
    """Return a column of scores as float32 `[N]`, with NaN for empty cells.

    Args:
        column: Column whose index numbers the rows for errors.
        source: Name of the table in errors.
        name: Name of the column.
        words: If true, words such as correct and incorrect count as 1 and 0.

    Raises:
        ResultsError: A cell is not a number.
    """
    spelled = column.map(score_of) if words else column
    numbers = pd.to_numeric(spelled, errors="coerce").astype(float)
    wrong = (numbers.isna() & column.notna()) if len(column) else numbers.isna()
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        more = f". Words such as {', '.join(list(WORDS)[:4])} are scores too." if words else ""
        raise ResultsError(
            f"{source}: row {column.index[row]}, column {name!r}: expected a number, got {column.iloc[row]!r}{more}"
        )
    return numbers.to_numpy(np.float32)


def score_of(value: Any) -> Any:
    """Return the score of a word, and other values unchanged."""
    if isinstance(value, bool | np.bool_):
        return float(value)
    if not isinstance(value, str):
        return value
    return _LETTERS.get(value.strip(), WORDS.get(value.strip().lower(), value))


def _long(frame: pd.DataFrame, queries: pd.DataFrame, source: str, columns: Columns) -> BenchmarkResults:
    model, score, cost = columns.model, columns.score, columns.cost
    if score not in frame:
        raise ResultsError(f"{source}: no column {score!r} with the score, {did_you_mean(score, frame.columns)}")
    names = _texts(frame[model], source, model)
    numbered = next((name for name in frame.columns if _plain(name) in _SAMPLES), None)
    twice = pd.DataFrame({"id": queries["id"], "model": names}).duplicated()
    if twice.any() and columns.repeats == "refuse" and numbered is None:
        row = int(twice.to_numpy().argmax())
        raise ResultsError(
            f"{source}: row {frame.index[row]}: query {queries['id'].iloc[row][:80]!r} and model {names.iloc[row]!r} "
            "came before. Drop the duplicate, pass --set repeats=mean if these are several attempts, or give "
            "repeated queries an 'id' column."
        )
    rows, ids = pd.factorize(queries["id"])
    places, models = pd.factorize(names)
    words = (("prompt", "questions"), ("benchmark", "benchmarks"), ("split", "splits"), (IMAGES, "pictures"))
    for column, word in (pair for pair in words if pair[0] in queries):
        different = queries.groupby("id", sort=False)[column].nunique(dropna=False) > 1
        if different.any():
            raise ResultsError(
                f"{source}: query id {different.idxmax()!r} has different {word}. Give each query its own id."
            )

    def grid(column: str, *, words: bool) -> np.ndarray:
        cells = pd.DataFrame(
            {"row": rows, "place": places, "value": numbers(frame[column], source, column, words=words)}
        )
        means = cells.groupby(["row", "place"], sort=False)["value"].mean()  # over attempts with a value
        values = np.full((len(ids), len(models)), np.nan, dtype=np.float32)
        values[means.index.get_level_values(0), means.index.get_level_values(1)] = means.to_numpy()
        return values

    if twice.any():
        logger.info("%s: %d rows are further attempts at a query, so the mean is the score", source, int(twice.sum()))
    _tell_left_out(frame, source, {*columns.roles.values(), columns.image, numbered}, columns)
    first = queries.drop_duplicates("id")
    flagged: frozenset[tuple[str, str]] = frozenset()
    if columns.contaminated in frame:
        marked = numbers(frame[columns.contaminated], source, columns.contaminated) > 0
        flagged = frozenset(zip(names[marked], queries["benchmark"][marked], strict=True))
    costs = grid(cost, words=False) if cost in frame else None
    return results_of(source, first, list(models), _scaled(grid(score, words=True), columns), costs, flagged)


def _scaled(scores: np.ndarray, columns: Columns) -> np.ndarray:
    return scores if columns.scale == 1 else (scores / np.float32(columns.scale)).astype(np.float32)


def _tell_left_out(frame: pd.DataFrame, source: str, taken: Iterable[Any], columns: Columns) -> None:
    left = [str(name) for name in frame.columns if name not in set(taken)]
    if left:
        hint = "" if columns.benchmark in frame else " (--set benchmark=COLUMN uses one)"
        logger.info("%s: left out: %s%s", source, ", ".join(left), hint)


def _is_score(column: pd.Series) -> bool:
    """Check whether a column holds numbers, or mostly scores and their words, so that other cells raise an error.

    A column of empty cells counts too, so that a model without any score raises an error.
    """
    if pd.api.types.is_numeric_dtype(column):
        return True
    found = pd.to_numeric(column.dropna().map(score_of), errors="coerce")
    return bool(found.notna().all()) or bool(found.between(0, 1).mean() >= 0.5)


def _wide(frame: pd.DataFrame, queries: pd.DataFrame, source: str, columns: Columns) -> BenchmarkResults:
    # A flag belongs to one model, so a wide table cannot use it. The column is left out, and is not a model.
    taken = {*columns.of_queries.values(), columns.image, columns.cost, columns.contaminated}
    costs = {name: found[1] or found[2] for name in frame.columns if (found := _COST.match(str(name)))}
    models = columns.models
    if models is None:
        likely = [
            str(name)
            for name in frame.columns
            if name not in taken and name not in costs and _plain(name) not in _NO_MODELS and _is_score(frame[name])
        ]
        models = [name for name in likely if not name.startswith("Unnamed")]
        if not models:
            raise ResultsError(
                f"{source}: expected numeric columns with models' scores, found none. Name the models' columns with "
                "--set models=NAME,NAME."
            )
    for name in models:
        if name not in frame:
            raise ResultsError(f"{source}: no column {name!r}, {did_you_mean(name, frame.columns)}")
    repeated = queries["id"].duplicated()
    if repeated.any():
        row = int(repeated.to_numpy().argmax())
        raise ResultsError(
            f"{source}: row {frame.index[row]}: query {queries['id'].iloc[row][:80]!r} came before. Drop the "
            "duplicate, or give repeated queries an 'id' column. For questions about pictures: --set image=COLUMN."
        )
    paid = {model: name for name, model in costs.items() if model in models}
    _tell_left_out(frame, source, {*taken, *models, *paid.values()}, columns)
    scores = np.stack([numbers(frame[name], source, name) for name in models], axis=1)
    blank = np.full(len(frame), np.nan, dtype=np.float32)
    prices = [numbers(frame[paid[m]], source, paid[m], words=False) if m in paid else blank for m in models]
    return results_of(
        source,
        queries,
        [str(name) for name in models],
        _scaled(scores, columns),
        np.stack(prices, axis=1) if paid else None,
    )
