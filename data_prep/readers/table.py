"""CSV, Parquet and JSONL tables: long (a row per query and model) or wide (a row per query, a column per model)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...modeling.errors import ResultsError, did_you_mean, one_line
from ..results import BenchmarkResults
from .text import files_of, results_of

SUFFIXES = (".csv", ".parquet", ".jsonl")


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called.

    Attributes:
        query: the question's text.
        model: long tables: the model's name.
        score: long tables: its score.
        models: wide tables: the score columns. Where not given, a table with a `model` column is long, and in any other
            every numeric column without another meaning is a model.
        id: identity of a query; benchmark and text where there is no such column.
        benchmark: the benchmark; the file's name where there is no such column.
        subject: the subject within the benchmark.
        split: train, validation or test.
        cost: long tables: USD for this query.
        contaminated: long tables: true where the model was trained on the benchmark; one such row flags the pair.
    """

    query: str = "query"
    model: str = "model"
    score: str = "score"
    models: Sequence[str] | None = None
    id: str = "id"
    benchmark: str = "benchmark"
    subject: str = "subject"
    split: str = "split"
    cost: str = "cost"
    contaminated: str = "contaminated"

    @property
    def of_queries(self) -> dict[str, str]:
        """Our names of the query columns to the table's."""
        found = {"id": self.id, "prompt": self.query}
        return found | {"benchmark": self.benchmark, "subject": self.subject, "split": self.split}


def recognises(file: Path, head: str) -> bool:
    """Any table."""
    del head
    return file.suffix in SUFFIXES


def read(path: Path, **columns: Any) -> BenchmarkResults:
    """Read one table or a folder of tables (all of one shape).

    Args:
        path: file or folder.
        **columns: names of columns, see `Columns`.
    """
    chosen = Columns(**columns)
    texts = (*chosen.of_queries.values(), chosen.model)
    frames = {file: load_table(file, texts=texts) for file in files_of(path, *SUFFIXES)}
    names = {file: file.stem for file in frames}
    if len(frames) > 1 and _one_file_a_model(list(frames.values()), chosen):
        names = dict.fromkeys(frames, path.name)
    return BenchmarkResults.merge([from_frame(frame, str(file), names[file], chosen) for file, frame in frames.items()])


def _one_file_a_model(frames: list[pd.DataFrame], columns: Columns) -> bool:
    """Whether the files of a folder are one model's each, about the same questions: then they are one benchmark."""
    if not all({columns.query, columns.model} <= set(frame) and columns.benchmark not in frame for frame in frames):
        return False
    models = [set(frame[columns.model]) for frame in frames]
    if sum(map(len, models)) > len(set().union(*models)):
        return False
    texts = [set(frame[columns.query]) for frame in frames]
    return sum(map(len, texts)) > len(set().union(*texts))


def from_frame(frame: pd.DataFrame, source: str, benchmark: str, columns: Columns) -> BenchmarkResults:
    """Results from a table in memory.

    Args:
        frame: long or wide.
        source: how errors call it.
        benchmark: its name, where no column tells.
        columns: what its columns are called.

    Raises:
        ResultsError: a column is missing, or a row of the table is not well formed.
    """
    if columns.query not in frame:
        raise ResultsError(
            f"{source}: no column {columns.query!r} with the question, {did_you_mean(columns.query, frame.columns)}"
        )
    queries = _queries(frame, columns.of_queries, source, benchmark)
    if columns.models is None and columns.model in frame:
        return _long(frame, queries, source, columns)
    # Costs and flags belong to one model, so in a wide table they belong to nobody; at least they are no model.
    reserved = {*columns.of_queries.values(), columns.cost, columns.contaminated}
    return _wide(frame, queries, source, columns.models, reserved)


def load_table(file: Path, *, texts: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV, Parquet or JSONL file as it is.

    Args:
        file: the table.
        texts: columns that are text whatever they look like: the id 0012 is not 12.

    Raises:
        ResultsError: it can't be read, or has no rows.
    """
    try:
        if file.suffix == ".csv":
            # Only an empty cell is missing: "None" and "NA" are answers and questions like any other.
            types = dict.fromkeys(texts, str)
            frame = pd.read_csv(file, keep_default_na=False, na_values=[""], dtype=types)
        elif file.suffix == ".parquet":
            frame = pd.read_parquet(file)
        elif file.suffix == ".jsonl":
            frame = pd.read_json(file, lines=True, precise_float=True, dtype=False, convert_dates=False)
        else:
            raise ResultsError(f"{file}: expected {', '.join(SUFFIXES)}")
    except pd.errors.EmptyDataError:
        raise ResultsError(f"{file}: empty results, the file has no header and no rows") from None
    except UnicodeDecodeError as error:
        raise ResultsError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, OverflowError, RecursionError, OSError) as error:  # as pandas and Arrow raise parse errors
        raise ResultsError(f"{file}: not a readable {file.suffix} table ({one_line(error)})") from None
    if frame.empty:
        raise ResultsError(f"{file}: empty results, the table has no rows")
    return frame


def _queries(frame: pd.DataFrame, columns: dict[str, str], source: str, benchmark: str) -> pd.DataFrame:
    """The query columns of every row of the table, repeats included."""
    found = {ours: frame.get(theirs) for ours, theirs in columns.items()}
    queries = pd.DataFrame(found, index=frame.index).astype(object)
    queries["prompt"] = _texts(queries["prompt"], source, columns["prompt"])
    if columns["benchmark"] not in frame:
        queries["benchmark"] = benchmark
    if columns["id"] not in frame:
        queries["id"] = queries["benchmark"].astype(str) + "/" + queries["prompt"]
    queries["id"] = queries["id"].astype(str)
    for name in ("benchmark", "subject"):
        queries[name] = queries[name].map(lambda value: value if pd.isna(value) else str(value))
    return queries.where(queries.notna(), None)


def _texts(column: pd.Series, source: str | Path, name: str) -> pd.Series:
    missing = column.isna()
    if missing.any():
        raise ResultsError(f"{source}: row {int(missing.to_numpy().argmax()) + 1}, column {name!r}: no text")
    return column.astype(str)


def numbers(column: pd.Series, source: str | Path, name: str) -> np.ndarray:
    """A column of scores; booleans (also spelled out) become 0 and 1, empty cells NaN.

    Raises:
        ResultsError: a cell is not a number.
    """
    spelled = column.map(lambda v: {"true": 1.0, "false": 0.0}.get(str(v).lower(), v))
    numbers = pd.to_numeric(spelled, errors="coerce")
    wrong = numbers.isna() & column.notna()
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise ResultsError(f"{source}: row {row + 1}, column {name!r}: expected a number, got {column.iloc[row]!r}")
    return numbers.to_numpy(np.float32)


def _long(frame: pd.DataFrame, queries: pd.DataFrame, source: str, columns: Columns) -> BenchmarkResults:
    model, score, cost = columns.model, columns.score, columns.cost
    if score not in frame:
        raise ResultsError(f"{source}: no column {score!r} with the score, {did_you_mean(score, frame.columns)}")
    names = _texts(frame[model], source, model)
    twice = pd.DataFrame({"id": queries["id"], "model": names}).duplicated()
    if twice.any():
        row = int(twice.to_numpy().argmax())
        raise ResultsError(
            f"{source}: row {row + 1}: query {queries['id'].iloc[row][:80]!r} and model {names.iloc[row]!r} came "
            "before; drop the duplicate, or give repeated queries an 'id' column"
        )
    rows, ids = pd.factorize(queries["id"])
    places, models = pd.factorize(names)

    for column, word in (("prompt", "questions"), ("benchmark", "benchmarks"), ("split", "splits")):
        different = queries.groupby("id", sort=False)[column].nunique(dropna=False) > 1
        if different.any():
            raise ResultsError(
                f"{source}: query id {different.idxmax()!r} stands for different {word}; give each query its own"
            )

    def grid(column: str) -> np.ndarray:
        values = np.full((len(ids), len(models)), np.nan, dtype=np.float32)
        values[rows, places] = numbers(frame[column], source, column)
        return values

    first = queries.drop_duplicates("id")
    flagged: frozenset[tuple[str, str]] = frozenset()
    if columns.contaminated in frame:
        marked = numbers(frame[columns.contaminated], source, columns.contaminated) > 0
        flagged = frozenset(zip(names[marked], queries["benchmark"][marked], strict=True))
    return results_of(source, first, list(models), grid(score), grid(cost) if cost in frame else None, flagged)


def _is_score(column: pd.Series) -> bool:
    """Whether a column holds numbers, or mostly scores and truth values: a cell that is neither is then told."""
    if pd.api.types.is_numeric_dtype(column):
        return True
    spelled = column.dropna().astype(str).str.lower().replace({"true": "1", "false": "0"})
    return len(spelled) > 0 and pd.to_numeric(spelled, errors="coerce").between(0, 1).mean() >= 0.5


def _wide(
    frame: pd.DataFrame, queries: pd.DataFrame, source: str | Path, models: Sequence[str] | None, taken: set[str]
) -> BenchmarkResults:
    if models is None:
        models = [
            str(name)
            for name in frame
            if name not in taken and not str(name).startswith("Unnamed") and _is_score(frame[name])
        ]
        if not models:
            raise ResultsError(f"{source}: no numeric column left to be a model's scores; name them with `models`")
    for name in models:
        if name not in frame:
            raise ResultsError(f"{source}: no column {name!r}, {did_you_mean(name, frame.columns)}")
    repeated = queries["id"].duplicated()
    if repeated.any():
        row = int(repeated.to_numpy().argmax())
        raise ResultsError(
            f"{source}: row {row + 1}: query {queries['id'].iloc[row][:80]!r} came before; drop the duplicate, or give "
            "repeated queries an 'id' column"
        )
    scores = np.stack([numbers(frame[name], source, name) for name in models], axis=1)
    return results_of(source, queries, [str(name) for name in models], scores)
