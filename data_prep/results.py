"""Benchmark results: the score of each model on each query."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..modeling.errors import ResultsError, did_you_mean
from . import SPLITS
from .leaks import IMAGES, questions_of

if TYPE_CHECKING:
    from ..modeling.pool import ExpertPool

logger = logging.getLogger(__name__)

QUERY_COLUMNS = ("id", "prompt", "benchmark", "subject", "split")
MESSAGES = "messages"
HoldOut = tuple[str, Sequence[str]]
"""Held-out test split: `("benchmark", names)` or `("subject", names)`."""


@dataclass
class BenchmarkResults:
    """N queries and an N x M table of scores.

    Attributes:
        queries: One row per query with the columns `id` (unique), `prompt` (the question as text), `benchmark`,
            `subject` and `split` (`train`, `validation`, `test`, or None where the files state none). If some queries
            are conversations, a column `messages` holds them, and None for queries of one user message. If some queries
            have pictures, a column `images` holds tuples of texts that identify them, and None for queries without.
        models: M names.
        scores: `[N, M]` in [0, 1]. NaN where a model was not measured on a query.
        costs: `[N, M]` USD per query, or None if no cost is known.
        contaminated: Pairs (model, benchmark) where the model was trained on the benchmark's own train split. Its
            scores there are unreliable, so labels leave them out.
        pictures: File of each picture that `images` names, as far as available (see `images.with_pictures`).

    Raises:
        ResultsError: There are no queries or models, shapes differ, an id or a model appears twice, a score is outside
            [0, 1], or a cost is negative or infinite.
    """

    queries: pd.DataFrame
    models: list[str]
    scores: np.ndarray
    costs: np.ndarray | None = None
    contaminated: frozenset[tuple[str, str]] = frozenset()
    pictures: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scores = np.asarray(self.scores, dtype=np.float32)
        self.costs = None if self.costs is None else np.asarray(self.costs, dtype=np.float32)
        if self.costs is not None and self.costs.size and np.isnan(self.costs).all():
            self.costs = None
        shape = (len(self.queries), len(self.models))
        if 0 in shape:
            raise ResultsError(
                f"empty results: expected at least one query and model, found {shape[0]} queries and {shape[1]} models"
            )
        if self.scores.shape != shape or (self.costs is not None and self.costs.shape != shape):
            raise ResultsError(
                f"expected scores and costs of shape {list(shape)}, got {list(self.scores.shape)} and "
                f"{None if self.costs is None else list(self.costs.shape)}"
            )
        absent = [column for column in QUERY_COLUMNS if column not in self.queries]
        if absent:
            raise ResultsError(f"queries lack the column {absent[0]!r}. Expected {', '.join(QUERY_COLUMNS)}")
        more = [name for name in (MESSAGES, IMAGES) if name in self.queries]
        queries = self.queries.loc[:, [*QUERY_COLUMNS, *more]].reset_index(drop=True).astype(object)
        self.queries = queries.where(queries.notna(), None)  # pandas' string columns hold NaN instead of None
        self._check_values()

    def _check_values(self) -> None:
        repeated = self.queries["id"][self.queries["id"].duplicated()]
        if len(repeated):
            raise ResultsError(f"query id {repeated.iloc[0]!r} appears twice. Ids must be unique: drop or rename one.")
        if len(set(self.models)) < len(self.models):
            twice = next(name for name in self.models if self.models.count(name) > 1)
            raise ResultsError(f"model {twice!r} appears twice. Merge or rename its columns.")
        with np.errstate(invalid="ignore"):
            wrong = np.argwhere((self.scores < 0) | (self.scores > 1) | np.isinf(self.scores))
        if len(wrong):
            row, column = wrong[0]
            raise ResultsError(
                f"query {self.queries['id'][row]!r}, model {self.models[column]!r}: score {self.scores[row, column]:g} "
                "is outside [0, 1]. For a table with scores up to 100 pass --set scale=100."
            )
        if self.costs is not None:
            with np.errstate(invalid="ignore"):
                wrong = np.argwhere((self.costs < 0) | np.isinf(self.costs))
            if len(wrong):
                row, column = wrong[0]
                raise ResultsError(
                    f"query {self.queries['id'][row]!r}, model {self.models[column]!r}: cost "
                    f"{self.costs[row, column]:g} is not a price. Expected USD per query, 0 or more."
                )
        blank = self.queries["prompt"].isna() | (self.queries["prompt"].astype(str).str.strip() == "")
        if blank.any():
            identity = self.queries["id"].to_numpy()[int(blank.to_numpy().argmax())]
            raise ResultsError(f"query {identity!r} has no prompt. Every query needs its text.")

    def __len__(self) -> int:
        return len(self.queries)

    def take(self, rows: np.ndarray | Sequence[int]) -> "BenchmarkResults":
        """Return the results of some queries, by index or by mask."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        costs = None if self.costs is None else self.costs[rows]
        return replace(self, queries=self.queries.iloc[rows], scores=self.scores[rows], costs=costs)

    def select(self, models: Iterable[str]) -> "BenchmarkResults":
        """Return the results of some models, in the order of `models`.

        Raises:
            ResultsError: A model is not among the results, or was measured on no query.
        """
        models = list(models)
        for name in models:
            if name not in self.models:
                raise ResultsError(f"no results of model {name!r}, {did_you_mean(name, self.models)}")
        columns = [self.models.index(name) for name in models]
        scores = self.scores[:, columns]
        for name, column in zip(models, scores.T, strict=True):
            if np.isnan(column).all():
                raise ResultsError(f"model {name!r} has no score on any query (all NaN). Measure it or leave it out.")
        costs = None if self.costs is None else self.costs[:, columns]
        return replace(self, models=models, scores=scores, costs=costs)

    def columns_of(self, pool: "ExpertPool") -> np.ndarray:
        """Return the scores `[N, C]` of a pool's candidates in its order. NaN for candidates without results."""
        found = [candidate.find_in(self.models) for candidate in pool.candidates]
        blank = np.full(len(self), np.nan, dtype=np.float32)
        return np.stack([blank if name is None else self.scores[:, self.models.index(name)] for name in found], axis=1)

    def flag(self, pairs: Iterable[tuple[str, str]]) -> "BenchmarkResults":
        """Return the results with more (model, benchmark) pairs flagged as contaminated.

        Raises:
            ResultsError: The results have no such model or benchmark.
        """
        pairs = list(pairs)
        benchmarks = set(self.queries["benchmark"])
        for model, benchmark in pairs:
            if model not in self.models:
                raise ResultsError(f"contaminated: no results of model {model!r}, {did_you_mean(model, self.models)}")
            if benchmark not in benchmarks:
                known = sorted(map(str, benchmarks))
                raise ResultsError(f"contaminated: no benchmark {benchmark!r}, {did_you_mean(benchmark, known)}")
        return replace(self, contaminated=self.contaminated | frozenset(pairs))

    @property
    def clean_scores(self) -> np.ndarray:
        """Scores `[N, M]` with NaN where the model is contaminated with the query's benchmark."""
        return blank_contaminated(self.scores, self.queries["benchmark"], self.models, self.contaminated)

    @classmethod
    def merge(cls, parts: Sequence["BenchmarkResults"]) -> "BenchmarkResults":
        """Merge results into the union of their queries (by id) and of their models.

        Raises:
            ResultsError: Two parts give one query different prompts, or one query and model different scores.
        """
        if len(parts) == 1:
            return parts[0]
        if not parts:
            raise ResultsError("empty results: expected at least one part to merge, found none")
        queries = pd.concat([part.queries for part in parts], ignore_index=True)
        stated = queries.groupby("id", sort=False)["split"].nunique()
        if (stated > 1).any():
            raise ResultsError(
                f"query id {stated.idxmax()!r} is on different splits in different files. Keep one of them."
            )
        # `first` takes each column's first value that is not None, so that a split that only one file states is kept.
        first = queries.groupby("id", sort=False, as_index=False).first()
        first = first.astype(object).where(first.notna(), None)
        texts = queries.groupby("id", sort=False)["prompt"].nunique()
        if (texts > 1).any():
            raise ResultsError(
                f"query id {texts.idxmax()!r} has different prompts in different files. Rename it in one of them."
            )
        if IMAGES in queries:
            shown = queries.groupby("id", sort=False)[IMAGES].nunique()
            if (shown > 1).any():
                raise ResultsError(
                    f"query id {shown.idxmax()!r} has different pictures in different files. Rename it in one of them."
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
        flagged = frozenset().union(*(part.contaminated for part in parts))
        pictures = {name: file for part in parts for name, file in part.pictures.items()}
        return cls(first, models, scores, costs, flagged, pictures)

    def split(
        self, *, validation: float = 0.1, test: float = 0.2, seed: int = 0, hold_out: HoldOut | None = None
    ) -> "BenchmarkResults":
        """Assign every query to train, validation or test, and return the results.

        Splits that the files state are kept. If no file states a test split, a share of each benchmark's queries
        becomes the test split. If some files do, only benchmarks without any stated split give a share. Validation is
        drawn from train by the same rule. Queries of the same text and pictures go to one split, unless files state
        otherwise.

        Args:
            validation: Share of train, drawn at random within each benchmark, with subjects in proportion.
            test: Share of all queries, drawn likewise.
            seed: Seed of the draws.
            hold_out: Benchmarks or subjects whose queries are the test split instead. Other queries that the files put
                into test are left out, so that they can still serve as a test later.

        Raises:
            ResultsError: The files state an unknown split, or no query is of the benchmarks or subjects to hold out.
        """
        if hold_out:
            return self._without(hold_out).split(validation=validation, test=0, seed=seed)
        queries = self.queries.copy()
        rng = np.random.default_rng(seed)
        given = set(queries["split"].dropna())
        if unknown := given - set(SPLITS):
            raise ResultsError(f"unknown split {min(unknown)!r}. Expected {', '.join(SPLITS)}")
        silent = {name for name, sides in queries.groupby("benchmark")["split"] if sides.isna().all()}
        queries["split"] = queries["split"].fillna("train")
        for side, share in (("test", test), ("validation", validation)):
            for name, group in queries[queries["split"] == "train"].groupby("benchmark", sort=True, dropna=False):
                if side not in given or name in silent:
                    queries.loc[_draw(group["subject"], share, rng), "split"] = side
        _unite(queries, self.queries["split"].isna().to_numpy())
        return replace(self, queries=queries)

    def without_lone_side(self) -> "BenchmarkResults":
        """Return the results without their splits if the files state the same split for all queries.

        Published results often have a test split alone, which would leave nothing to train on.
        """
        sides = self.queries["split"]
        if sides.isna().any() or sides.nunique() != 1:
            return self
        logger.info("the files call all queries %s, so train, validation and test are drawn at random", sides.iloc[0])
        return replace(self, queries=self.queries.assign(split=None))

    def _without(self, hold_out: HoldOut) -> "BenchmarkResults":
        """Return the results with the named benchmarks or subjects as the test split, without other test queries."""
        field, names = hold_out
        known = sorted(set(self.queries[field].dropna()))
        for name in names:
            if name not in known:
                raise ResultsError(f"hold out: no {field} {name!r}, {did_you_mean(name, known)}")
        held = self.queries[field].isin(names).to_numpy()
        kept = self.take(held | (self.queries["split"] != "test").to_numpy())
        queries = kept.queries.copy()
        queries.loc[queries[field].isin(names), "split"] = "test"
        return replace(kept, queries=queries)

    def shared(self) -> np.ndarray:
        """Return the number of queries that each two models were both measured on, `[M, M]`.

        The diagonal holds the number of queries of each model.
        """
        known = (~np.isnan(self.scores)).astype(np.float32)
        return (known.T @ known).astype(int)

    def coverage(self) -> pd.DataFrame:
        """Return the share of each benchmark's queries (rows) that each model (columns) was measured on."""
        known = pd.DataFrame(~np.isnan(self.scores), columns=self.models)
        return known.groupby(self.queries["benchmark"].to_numpy(), sort=True).mean()

    def summary(self) -> pd.DataFrame:
        """Return the mean score per benchmark (rows) and model (columns), with the number of queries first."""
        frame = pd.DataFrame(self.scores, columns=self.models)
        groups = frame.groupby(self.queries["benchmark"], sort=True)
        table = groups.mean()
        table.insert(0, "queries", groups.size())
        return table


def blank_contaminated(
    scores: np.ndarray, benchmarks: Iterable[str], models: Sequence[str], contaminated: Iterable[tuple[str, str]]
) -> np.ndarray:
    """Return scores `[N, M]` with NaN where a (model, benchmark) pair is contaminated."""
    scores, names = scores.copy(), np.asarray(list(benchmarks), dtype=object)
    for model, benchmark in contaminated:
        if model in models:
            scores[names == benchmark, models.index(model)] = np.nan
    return scores


def _unite(queries: pd.DataFrame, drawn: np.ndarray) -> None:
    """Put queries with the same question on one split, in place.

    It is the split of a query whose split is stated, otherwise the split of the first query.

    Args:
        queries: Table of queries with their splits.
        drawn: `[N]` bool, true where no file states the query's split.
    """
    texts = pd.Series(questions_of(queries), index=queries.index)
    for _, group in queries[texts.duplicated(keep=False).to_numpy()].groupby(texts, sort=False):
        free = drawn[group.index]
        side = group["split"].to_numpy()
        if free.any() and len(set(side)) > 1:
            queries.loc[group.index[free], "split"] = side[0] if free.all() else side[~free][0]


def _draw(subjects: pd.Series, share: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a share of the queries, each subject in proportion, and return their index labels.

    The draw is systematic sampling: queries are in random order within each subject, subjects follow in turn, and every
    n-th query is drawn. So small subjects together get their share. Rounding in each subject would give them none.
    """
    order = pd.Series(rng.permutation(len(subjects)), index=subjects.index)
    line = pd.DataFrame({"subject": subjects.fillna(""), "order": order}).sort_values(["subject", "order"]).index
    count = round(share * len(line))
    if not count:
        return line[:0].to_numpy()
    step = len(line) / count
    places = np.floor((np.arange(count) + rng.random()) * step).astype(int)
    return line[np.minimum(places, len(line) - 1)].to_numpy()


def _put(
    target: np.ndarray, place: tuple, values: np.ndarray, what: str, ids: pd.Series, models: Sequence[str]
) -> None:
    """Copy measured values into `target`, where an existing value must be the same."""
    there = target[place]
    clash = ~np.isnan(there) & ~np.isnan(values) & (there != values)
    if clash.any():
        row, column = np.argwhere(clash)[0]
        query, model = ids.iloc[place[0][row, 0]], models[place[1][0, column]]
        raise ResultsError(f"query {query!r}, model {model!r}: two different {what}s. Keep one of the files.")
    target[place] = np.where(np.isnan(values), there, values)


def with_one_name(parts: Sequence[BenchmarkResults], pool: "ExpertPool") -> list[BenchmarkResults]:
    """Return results in which each candidate has the name of its first part.

    A benchmark's table may name a model by its hub id and a feedback file by its expert. Under two names, one of the
    columns would be ignored.

    Args:
        parts: Results of several files.
        pool: Candidates, with the names that results may have for them.
    """
    known: dict[str, str] = {}
    named = []
    for part in parts:
        found = {candidate.name: candidate.find_in(part.models) for candidate in pool.candidates}
        shared = {name for name, count in Counter(found.values()).items() if count > 1}
        changed: dict[str, str] = {}
        for name, column in found.items():
            # A column that means several candidates, such as two experts of one model, keeps its name.
            if column is None or column in shared:
                continue
            other = known.setdefault(name, column)
            if other not in part.models and other not in changed.values():
                changed[column] = other
            elif other != column:
                logger.warning("results name expert %r both %s and %s: %s is used", name, other, column, column)
        models = [changed.get(name, name) for name in part.models]
        contaminated = frozenset((changed.get(name, name), benchmark) for name, benchmark in part.contaminated)
        named.append(replace(part, models=models, contaminated=contaminated))
    return named
