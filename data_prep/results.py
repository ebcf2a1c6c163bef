"""Benchmark results: which model answered which query how well."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..modeling.errors import ExpertokenError, did_you_mean

QUERY_COLUMNS = ("id", "prompt", "benchmark", "subject", "split")
SPLITS = ("train", "validation", "test")


class ResultsError(ExpertokenError):
    """Benchmark results that are not well formed; the message names file, row and field."""


@dataclass
class BenchmarkResults:
    """N queries and an N x M table of scores.

    Attributes:
        queries: one row a query with the columns `id` (unique), `prompt` (the question as text), `benchmark`, `subject`
            and `split` (`train`, `validation`, `test` or None where the files do not say).
        models: M names.
        scores: `[N, M]` in [0, 1]; NaN where a model was not measured on a query.
        costs: `[N, M]` USD per query, or None where nothing is known.

    Raises:
        ResultsError: there are no queries or models, shapes differ, an id or a model appears twice, or a score is
            outside [0, 1].
    """

    queries: pd.DataFrame
    models: list[str]
    scores: np.ndarray
    costs: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.scores = np.asarray(self.scores, dtype=np.float32)
        self.costs = None if self.costs is None else np.asarray(self.costs, dtype=np.float32)
        shape = (len(self.queries), len(self.models))
        if 0 in shape:
            raise ResultsError(
                f"empty results: {shape[0]} queries and {shape[1]} models; expected at least one of each"
            )
        if self.scores.shape != shape or (self.costs is not None and self.costs.shape != shape):
            raise ResultsError(
                f"expected scores and costs of shape {list(shape)}, got {list(self.scores.shape)} and "
                f"{None if self.costs is None else list(self.costs.shape)}"
            )
        absent = [column for column in QUERY_COLUMNS if column not in self.queries]
        if absent:
            raise ResultsError(f"queries lack the column {absent[0]!r}; expected {', '.join(QUERY_COLUMNS)}")
        queries = self.queries.loc[:, list(QUERY_COLUMNS)].reset_index(drop=True).astype(object)
        self.queries = queries.where(queries.notna(), None)  # pandas' string columns would hold NaN
        self._check_values()

    def _check_values(self) -> None:
        repeated = self.queries["id"][self.queries["id"].duplicated()]
        if len(repeated):
            raise ResultsError(f"query id {repeated.iloc[0]!r} appears twice; ids are unique, drop or rename one")
        if len(set(self.models)) < len(self.models):
            twice = next(name for name in self.models if self.models.count(name) > 1)
            raise ResultsError(f"model {twice!r} appears twice; merge or rename its columns")
        with np.errstate(invalid="ignore"):
            wrong = np.argwhere((self.scores < 0) | (self.scores > 1) | np.isinf(self.scores))
        if len(wrong):
            row, column = wrong[0]
            raise ResultsError(
                f"query {self.queries['id'][row]!r}, model {self.models[column]!r}: score {self.scores[row, column]:g} "
                "is outside [0, 1]; scale scores first"
            )
        blank = self.queries["prompt"].isna() | (self.queries["prompt"].astype(str).str.strip() == "")
        if blank.any():
            raise ResultsError(
                f"query {self.queries['id'][blank.idxmax()]!r} has no prompt; every query needs its text"
            )

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, rows: np.ndarray | Sequence[int]) -> "BenchmarkResults":
        """The results of some queries, by index or by mask."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        costs = None if self.costs is None else self.costs[rows]
        return BenchmarkResults(self.queries.iloc[rows], list(self.models), self.scores[rows], costs)

    def select(self, models: Iterable[str]) -> "BenchmarkResults":
        """The results of some models, in the order given.

        Raises:
            ResultsError: a model is not among the results, or was measured on no query.
        """
        models = list(models)
        for name in models:
            if name not in self.models:
                raise ResultsError(f"no results of model {name!r}, {did_you_mean(name, self.models)}")
        columns = [self.models.index(name) for name in models]
        scores = self.scores[:, columns]
        for name, column in zip(models, scores.T, strict=True):
            if np.isnan(column).all():
                raise ResultsError(f"model {name!r} has no score on any query (all NaN); measure it or leave it out")
        return BenchmarkResults(self.queries, models, scores, None if self.costs is None else self.costs[:, columns])

    @classmethod
    def merge(cls, parts: Sequence["BenchmarkResults"]) -> "BenchmarkResults":
        """The union of queries (by id) and of models.

        Raises:
            ResultsError: two parts give one query different prompts, or one query and model different scores.
        """
        if len(parts) == 1:
            return parts[0]
        if not parts:
            raise ResultsError("empty results: nothing to merge")
        queries = pd.concat([part.queries for part in parts], ignore_index=True)
        stated = queries.groupby("id", sort=False)["split"].nunique()
        if (stated > 1).any():
            raise ResultsError(f"query id {stated.idxmax()!r} is on different sides in different files; keep one")
        # `first` takes each column's first value that is there: a side that only one file states is kept.
        first = queries.groupby("id", sort=False, as_index=False).first()
        first = first.astype(object).where(first.notna(), None)
        texts = queries.groupby("id", sort=False)["prompt"].nunique()
        if (texts > 1).any():
            raise ResultsError(
                f"query id {texts.idxmax()!r} stands for different prompts in different files; rename it"
            )
        models = list(dict.fromkeys(name for part in parts for name in part.models))
        row_of = pd.Series(np.arange(len(first)), index=first["id"])
        scores = np.full((len(first), len(models)), np.nan, dtype=np.float32)
        costs = np.full_like(scores, np.nan) if any(part.costs is not None for part in parts) else None
        for part in parts:
            place = np.ix_(row_of[part.queries["id"]].to_numpy(), [models.index(name) for name in part.models])
            _put(scores, place, part.scores, "score", first["id"], models)
            if costs is not None and part.costs is not None:
                _put(costs, place, part.costs, "cost", first["id"], models)
        return cls(first, models, scores, costs)

    def split(self, *, validation: float = 0.1, test: float = 0.2, seed: int = 0) -> "BenchmarkResults":
        """The same results with every query assigned to train, validation or test.

        Sides that the files state are kept. Without a stated test side, `test` of each benchmark's queries become it;
        without a stated validation side, `validation` of each benchmark's train queries.

        Args:
            validation: share of train, drawn at random within each benchmark.
            test: share of all, likewise.
            seed: of the draw.
        """
        queries = self.queries.copy()
        rng = np.random.default_rng(seed)
        given = set(queries["split"].dropna())
        if unknown := given - set(SPLITS):
            raise ResultsError(f"unknown split {min(unknown)!r}; expected {', '.join(SPLITS)}")
        queries["split"] = queries["split"].fillna("train")
        for side, share in (("test", test), ("validation", validation)):
            if side in given:
                continue
            for _, group in queries[queries["split"] == "train"].groupby("benchmark", sort=True, dropna=False):
                drawn = rng.permutation(group.index.to_numpy())[: round(share * len(group))]
                queries.loc[drawn, "split"] = side
        return BenchmarkResults(queries, list(self.models), self.scores, self.costs)

    def summary(self) -> pd.DataFrame:
        """Mean score per benchmark (rows) and model (columns), with the number of queries first."""
        frame = pd.DataFrame(self.scores, columns=self.models)
        groups = frame.groupby(self.queries["benchmark"], sort=True)
        table = groups.mean()
        table.insert(0, "queries", groups.size())
        return table


def _put(
    target: np.ndarray, place: tuple, values: np.ndarray, what: str, ids: pd.Series, models: Sequence[str]
) -> None:
    """Copy measured values into `target`; a value that is there already has to be the same."""
    there = target[place]
    clash = ~np.isnan(there) & ~np.isnan(values) & (there != values)
    if clash.any():
        row, column = np.argwhere(clash)[0]
        query, model = ids.iloc[place[0][row, 0]], models[place[1][0, column]]
        raise ResultsError(f"query {query!r}, model {model!r}: two different {what}s; keep one of the files")
    target[place] = np.where(np.isnan(values), there, values)
