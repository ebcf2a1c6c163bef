"""Labelling strategies: from scores to a target over the candidates, per query."""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..modeling.errors import ExpertokenError, did_you_mean
from ..modeling.utility import priced, utility

logger = logging.getLogger(__name__)

TIE = 1e-6
"""Scores this near are equal."""
TIES = ("all", "cheapest", "best")


@dataclass(frozen=True)
class Labelling:
    """How results become labels.

    Attributes:
        strategy: a key of `STRATEGIES`.
        ties: who of a query's winners gets the target: `all` of them in equal shares, the `cheapest`, or the `best`
            overall (on the learning side).
        temperature: `soft`: of the softmax over scores.
        beta: `mixed`: share of the query's own winner; the rest is the subject's.
        shrinkage: `subject` and `mixed`: how many queries of its benchmark's mean each subject is topped up with, so
            that small subjects don't crown a winner by chance.
        margin: lead of a winner over the best loser below which a label counts less, in proportion; 0 counts all alike.
        cost_weight: lambda, score per USD: everything sees `score - lambda * cost` instead of the score.

    Raises:
        ExpertokenError: the strategy or `ties` is unknown, a value is out of range, or the strategy does not read it.
    """

    strategy: str = "query"
    ties: str = "all"
    temperature: float = 0.25
    beta: float = 0.5
    shrinkage: float = 0.0
    margin: float = 0.0
    cost_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ExpertokenError(
                f"unknown labelling strategy {self.strategy!r}, {did_you_mean(self.strategy, STRATEGIES)}"
            )
        if self.ties not in TIES:
            raise ExpertokenError(f"ties: unknown {self.ties!r}, {did_you_mean(self.ties, TIES)}")
        for name, low, high in (
            ("temperature", 1e-6, np.inf),
            ("beta", 0, 1),
            ("shrinkage", 0, np.inf),
            ("margin", 0, np.inf),
            ("cost_weight", 0, np.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ExpertokenError(f"{name}: expected {low:g} to {high:g}, got {value:g}")
        for name, strategies in _READ_BY.items():
            default = next(field.default for field in fields(self) if field.name == name)
            if getattr(self, name) != default and self.strategy not in strategies:
                raise ExpertokenError(
                    f"{name}: labels by {self.strategy!r} do not depend on it; it is for {', '.join(strategies)}"
                )


_READ_BY = {
    "temperature": ("soft",),
    "beta": ("mixed",),
    "shrinkage": ("subject", "mixed"),
    "ties": ("query", "subject", "mixed"),
    "margin": ("query", "subject", "mixed", "soft"),
}
"""Options that not every strategy reads, to those that do."""


@dataclass(frozen=True)
class Measured:
    """What strategies see: queries with at least one measurement.

    Attributes:
        scores: `[N, C]` scores, or utilities where costs count; NaN where not measured.
        costs: `[N, C]` USD, NaN where not known.
        benchmarks: `[N]` codes.
        subjects: `[N]` codes of (benchmark, subject).
        learning: `[N]` mask of the learning side (train and validation): the test side must not decide who wins.
        incomplete: `[N]` mask of queries in whose benchmark some candidate is absent.
        self_index: the column of self, if it is a candidate.
        context: all queries, where these are only those to be labelled; None where these are all.
    """

    scores: np.ndarray
    costs: np.ndarray
    benchmarks: np.ndarray
    subjects: np.ndarray
    learning: np.ndarray
    incomplete: np.ndarray
    self_index: int | None = None
    context: "Measured | None" = None

    @property
    def known(self) -> "Measured":
        """All queries: what says who is best in a subject or on average."""
        return self.context or self

    def take(self, rows: np.ndarray) -> "Measured":
        """Return some of the queries, with all of them as their context."""
        arrays = (self.scores, self.costs, self.benchmarks, self.subjects, self.learning, self.incomplete)
        scores, costs, benchmarks, subjects, learning, incomplete = (array[rows] for array in arrays)
        return Measured(scores, costs, benchmarks, subjects, learning, incomplete, self.self_index, self)


def absent(scores: np.ndarray, benchmarks: Iterable[str]) -> np.ndarray:
    """Return where a candidate has no score in the query's whole benchmark, `[N, C]` bool.

    Such a candidate is none there, and counts as wrong. Where it has scores in the benchmark and merely not on the
    query, its score is unknown, and it is left out of that query.

    Args:
        scores: `[N, C]` as measured, on all sides: NaN where not.
        benchmarks: N names.
    """
    names, codes = np.unique(np.asarray(list(benchmarks), dtype=str), return_inverse=True)
    present = np.zeros((len(names), scores.shape[1]), dtype=bool)
    np.logical_or.at(present, codes, ~np.isnan(scores))
    return ~present[codes]


def fill_unknown(scores: np.ndarray, benchmarks: Iterable[str]) -> np.ndarray:
    """Return scores `[N, C]` in which an unknown one is the candidate's mean in the benchmark.

    So a router that chooses such a candidate is neither punished nor rewarded for it, and every difference of two
    routers is of two expectations. Where a candidate has no score in the benchmark, its mean over all queries stands
    in; where it has none at all, 0.
    """
    if not np.isnan(scores).any():
        return scores
    names = np.asarray(list(benchmarks), dtype=str)
    filled = scores.copy()
    overall = np.nan_to_num(_means(scores))
    for name in np.unique(names):
        inside = names == name
        means = _means(scores[inside])
        filled[inside] = np.where(np.isnan(scores[inside]), np.where(np.isnan(means), overall, means), scores[inside])
    return filled


def filled_costs(
    costs: np.ndarray, learning: np.ndarray, *, self_index: int | None = None, names: Sequence[str] | None = None
) -> np.ndarray:
    """Costs without gaps: a candidate's mean on the learning side where a query's own cost is not known.

    Self without any known cost is free, as answering asks for no other model. An expert without any is as dear as the
    dearest, see `utility.priced`; a warning names it.

    Args:
        costs: `[N, C]` USD, NaN where not known.
        learning: `[N]` mask of train and validation.
        self_index: the column of self, if it is a candidate.
        names: names of the candidates, for the warning.

    Raises:
        ExpertokenError: no expert's cost is known on any query.
    """
    means = _means(costs[learning])
    means = np.where(np.isnan(means), _means(costs), means)
    if self_index is not None and np.isnan(means[self_index]):
        means[self_index] = 0.0
    unknown = np.isnan(means)
    if unknown.sum() >= len(means) - (self_index is not None):
        raise ExpertokenError("cost_weight: expected costs of the candidates, found none; add them to the results")
    if unknown.any():
        told = [names[index] if names is not None else f"number {index}" for index in np.flatnonzero(unknown).tolist()]
        logger.warning("no cost is known of %s: counted as the dearest candidate's", ", ".join(told))
        means = priced(means)
    return np.where(np.isnan(costs), means, costs)


def winners(scores: np.ndarray, *, self_index: int | None = None, rank: np.ndarray | None = None) -> np.ndarray:
    """Who wins each row, as a distribution.

    Ties: self wins a tie that it is part of, because answering costs nothing more while a dispatch does. Otherwise the
    winners share the target equally, or, with `rank`, the one of lowest rank takes it. Sharing is the default: breaking
    ties by the best average would teach the average where the data are silent.

    Args:
        scores: `[N, C]`, NaN where not measured.
        self_index: the column of self, if it is a candidate.
        rank: `[N, C]` or `[1, C]`, lower is preferred; NaN comes last.

    Returns:
        `[N, C]`; a row without any measurement is all zero.
    """
    known = np.where(np.isnan(scores), -np.inf, scores)
    best = known.max(1, keepdims=True)
    wins = (known >= best - TIE) & np.isfinite(best)
    if self_index is not None:
        kept = wins[:, self_index].copy()
        wins[kept] = False
        wins[kept, self_index] = True
    if rank is not None:
        order = np.where(
            wins,
            np.nan_to_num(np.broadcast_to(rank, wins.shape).astype(np.float64), nan=np.finfo(np.float64).max),
            np.inf,
        )
        wins &= order <= order.min(1, keepdims=True)
    return wins / np.maximum(wins.sum(1, keepdims=True), 1)


def _rank(data: Measured, labelling: Labelling, *, per_query: bool = True) -> np.ndarray | None:
    """What breaks ties, `[N, C]` or `[1, C]`; costs of each query, or each candidate's mean."""
    known = data.known
    if labelling.ties == "cheapest" and not per_query:
        return _means(known.costs)[None]
    if labelling.ties == "cheapest":
        return np.where(np.isnan(data.costs), _means(known.costs)[None], data.costs)
    if labelling.ties == "best":
        return -_means(known.scores[known.learning])[None]
    return None


def _means(values: np.ndarray) -> np.ndarray:
    """Mean of each column over what is known; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an all-NaN column
        return np.nanmean(values, 0) if len(values) else np.full(values.shape[1], np.nan)


def _informative(data: Measured, *, self_counts: bool) -> np.ndarray:
    """Weight 1 for queries that tell candidates apart, 0 for the others, `[N]` float32."""
    best, worst = np.nanmax(data.scores, 1), np.nanmin(data.scores, 1)
    somebody = best > np.minimum(worst, 0) + TIE
    # Who is no candidate in a benchmark stands apart from those who got its query right.
    apart = (best - worst > TIE) | data.incomplete
    if self_counts and data.self_index is not None:
        apart |= np.nan_to_num(data.scores[:, data.self_index]) > TIE
    return (somebody & apart).astype(np.float32)


def _lead(scores: np.ndarray, margin: float) -> np.ndarray:
    """`min(1, lead / margin)` of the winners over the best loser, `[N]` float32; 1 where nobody loses."""
    if margin <= 0:
        return np.ones(len(scores), dtype=np.float32)
    best = np.nanmax(scores, 1, keepdims=True)
    losers = np.where(scores < best - TIE, scores, -np.inf).max(1)
    return np.where(np.isfinite(losers), np.clip((best[:, 0] - losers) / margin, 0, 1), 1).astype(np.float32)


def query_level(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Label each query by its own winner (Bench-CoE, arXiv 2412.04167, query-level).

    A query that nobody got right, or that everybody got equally right, teaches nothing about who should answer: its
    weight is 0. Where self is among those who got it right, it does teach something: no dispatch is needed.
    """
    targets = winners(data.scores, self_index=data.self_index, rank=_rank(data, labelling))
    return targets, _informative(data, self_counts=True) * _lead(data.scores, labelling.margin)


def subject_means(data: Measured, shrinkage: float) -> np.ndarray:
    """Mean score of each subject on the learning side, shrunken, one row a query `[N, C]`.

    `(n * mean(subject) + shrinkage * mean(benchmark)) / (n + shrinkage)`, n being the model's measured queries of the
    subject: the posterior mean with the benchmark's mean as the prior (Gelman et al., Bayesian Data Analysis, 2.4). A
    subject that the learning side does not have gets its benchmark's means, a benchmark it does not have the overall.
    """
    known = data.known
    means = np.full(data.scores.shape, np.nan)
    overall = _means(known.scores[known.learning])
    for benchmark in np.unique(data.benchmarks):
        learnt = known.scores[(known.benchmarks == benchmark) & known.learning]
        prior = _means(learnt) if len(learnt) else overall
        for subject in np.unique(data.subjects[data.benchmarks == benchmark]):
            rows = data.subjects == subject
            own = known.scores[(known.subjects == subject) & known.learning]
            if not len(own):
                means[rows] = prior
                continue
            count = (~np.isnan(own)).sum(0)
            with np.errstate(invalid="ignore", divide="ignore"):
                shrunken = (np.nan_to_num(own).sum(0) + np.nan_to_num(prior) * shrinkage) / (count + shrinkage)
            # Without shrinkage a model that was not measured on a subject is not a candidate there.
            means[rows] = np.where((count > 0) | ((shrinkage > 0) & ~np.isnan(prior)), shrunken, np.nan)
    return means


def subject_level(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Label each query by the winner of its subject (Bench-CoE, arXiv 2412.04167, subject-level).

    The subject is the benchmark where results name no subject.
    """
    means = subject_means(data, labelling.shrinkage)
    targets = winners(means, self_index=data.self_index, rank=_rank(data, labelling, per_query=False))
    return targets, _lead(means, labelling.margin)


def mixed(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """`beta * query-level + (1 - beta) * subject-level`; the subject alone where the query tells nothing."""
    own, weights = query_level(data, labelling)
    subject, _ = subject_level(data, labelling)
    # A subject in which the learning side measured nobody says nothing either; there the query alone does.
    share = np.where(subject.any(1, keepdims=True), labelling.beta * weights[:, None], 1.0)
    return share * own + (1 - share) * subject, np.ones(len(own), dtype=np.float32)


def soft(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Label each query by `softmax(score / temperature)` over the measured candidates (as ZOOTER, arXiv 2311.08692)."""
    known = np.where(np.isnan(data.scores), -np.inf, data.scores) / labelling.temperature
    raised = np.exp(known - known.max(1, keepdims=True))
    weights = _informative(data, self_counts=False) * _lead(data.scores, labelling.margin)
    return raised / raised.sum(1, keepdims=True), weights


def correctness(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Every measured query counts alike, for the objective `correctness` (Shnitzer et al., arXiv 2309.15789).

    Whether a candidate is right is a problem of its own: queries that all got right, or none, teach that too.
    """
    targets = winners(data.scores, self_index=data.self_index, rank=_rank(data, labelling))
    return targets, np.ones(len(targets), dtype=np.float32)


def expected_score(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Query-level winners with weight 1, for the objective `expected_score`: the scores themselves say what counts."""
    return correctness(data, labelling)


STRATEGIES: dict[str, Callable[[Measured, Labelling], tuple[np.ndarray, np.ndarray]]] = {
    "query": query_level,
    "subject": subject_level,
    "mixed": mixed,
    "soft": soft,
    "correctness": correctness,
    "expected_score": expected_score,
}

OBJECTIVE_OF = {"correctness": "correctness", "expected_score": "expected_score"}
"""The training objective that a strategy is made for, where it is not cross-entropy."""


def label(
    scores: np.ndarray,
    benchmarks: Iterable[str],
    subjects: Iterable[str | None] | None = None,
    learning: np.ndarray | None = None,
    labelling: Labelling | str = "query",
    *,
    costs: np.ndarray | None = None,
    self_index: int | None = None,
    names: Sequence[str] | None = None,
    rows: np.ndarray | None = None,
    missing: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return targets and weights by a labelling strategy.

    Args:
        scores: `[N, C]` over the candidates, NaN where not measured.
        benchmarks: N names.
        subjects: N names within the benchmarks; None where there are none.
        learning: `[N]` mask of train and validation; the test side must not decide who wins a subject. Default: all.
        labelling: strategy and parameters, or a strategy's name.
        costs: `[N, C]` USD, NaN where not known.
        self_index: the column of self, if it is a candidate.
        names: of the candidates, for errors.
        rows: `[N]` mask of the queries to label, R of them; the others only say who is best in a subject or on average.
            Default: all.
        missing: `[N, C]` mask of candidates that are none in the query's benchmark, as `absent` finds it in all scores
            where None. A query that others got right sets them apart; one whose score is unknown it does not.

    Returns:
        targets `[R, C]` and weights `[R]`, float32. A query without any measurement has weight 0.

    Raises:
        ExpertokenError: there is no such strategy, or costs are needed and not there.
    """
    labelling = Labelling(labelling) if isinstance(labelling, str) else labelling
    learning = np.ones(len(scores), dtype=bool) if learning is None else np.asarray(learning)
    benchmarks = np.asarray(list(benchmarks), dtype=str)
    incomplete = np.asarray(absent(scores, benchmarks) if missing is None else missing).any(axis=1)
    if costs is None and (labelling.cost_weight > 0 or labelling.ties == "cheapest"):
        need = "cost_weight" if labelling.cost_weight > 0 else "ties: cheapest"
        raise ExpertokenError(f"{need}: needs costs, and the results have none")
    measured = ~np.isnan(scores).all(1)
    targets = np.zeros(scores.shape, dtype=np.float32)
    weights = np.zeros(len(scores), dtype=np.float32)
    rows = np.ones(len(scores), dtype=bool) if rows is None else rows
    if not (measured & rows).any():
        return targets[rows], weights[rows]
    paid = costs
    if costs is not None and labelling.cost_weight > 0:
        paid = filled_costs(costs, learning, self_index=self_index, names=names)
    subjects = [None] * len(scores) if subjects is None else subjects
    pairs = np.array([f"{benchmark}\0{subject or ''}" for benchmark, subject in zip(benchmarks, subjects, strict=True)])
    data = Measured(
        utility(scores, paid, labelling.cost_weight)[measured],
        np.full(scores.shape, np.nan)[measured] if costs is None else costs[measured],
        np.unique(benchmarks, return_inverse=True)[1][measured],
        np.unique(pairs, return_inverse=True)[1][measured],
        learning[measured],
        np.atleast_1d(incomplete)[measured],
        self_index,
    )
    asked = measured & rows
    if not rows.all():
        data = data.take(rows[measured])
    targets[asked], weights[asked] = STRATEGIES[labelling.strategy](data, labelling)
    return targets[rows], (weights * (targets.sum(1) > 0))[rows]
