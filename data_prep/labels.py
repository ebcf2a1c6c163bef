"""Labelling strategies: a target over the candidates for each query, made from scores."""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..modeling.errors import ExpertokenError, did_you_mean
from ..modeling.utility import priced, utility

logger = logging.getLogger(__name__)

TIE = 1e-6
"""Largest difference of scores that count as equal."""
TIES = ("all", "cheapest", "best")


@dataclass(frozen=True)
class Labelling:
    """Settings that turn results into labels, the targets of training.

    Attributes:
        strategy: A key of `STRATEGIES`.
        ties: Winners of a query that get the target: `all` of them in equal shares, the `cheapest`, or the `best`
            overall (on train and validation).
        temperature: Temperature of the softmax over scores, for `soft`.
        beta: Share of the query's own winner, for `mixed`. The rest goes to the subject's winner.
        shrinkage: Number of pseudo-queries at the benchmark's mean that are added to each subject, for `subject` and
            `mixed`. They keep chance from deciding the winner of a small subject.
        margin: Lead of a winner over the best loser below which a label counts less, in proportion. 0 weighs all
            labels equally.
        cost_weight: Lambda, score per USD. `score - lambda * cost` replaces the score everywhere.

    Raises:
        ExpertokenError: The strategy or `ties` is unknown, a value is out of range, or the strategy does not use it.
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
                    f"{name}: labels by {self.strategy!r} do not depend on it. Use it with {', '.join(strategies)}"
                )


_READ_BY = {
    "temperature": ("soft",),
    "beta": ("mixed",),
    "shrinkage": ("subject", "mixed"),
    "ties": ("query", "subject", "mixed"),
    "margin": ("query", "subject", "mixed", "soft"),
}
"""Options that not every strategy uses, mapped to the strategies that use them."""


@dataclass(frozen=True)
class Measured:
    """Queries with at least one measurement, the input of strategies.

    Attributes:
        scores: Scores `[N, C]`, or utilities if costs are weighed. NaN where not measured.
        costs: USD `[N, C]`, NaN where not known.
        benchmarks: Codes `[N]` of the benchmarks.
        subjects: Codes `[N]` of (benchmark, subject).
        learning: Mask `[N]` of train and validation. The test split must not decide a winner.
        incomplete: Mask `[N]` of queries in whose benchmark some candidate is absent.
        self_index: Column of self, if it is a candidate.
        context: All queries, if these are only the queries to label. None if these are all.
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
        """All queries, which decide the best candidate of a subject or on average."""
        return self.context or self

    def take(self, rows: np.ndarray) -> "Measured":
        """Return some of the queries, with all queries as their context."""
        arrays = (self.scores, self.costs, self.benchmarks, self.subjects, self.learning, self.incomplete)
        scores, costs, benchmarks, subjects, learning, incomplete = (array[rows] for array in arrays)
        return Measured(scores, costs, benchmarks, subjects, learning, incomplete, self.self_index, self)


def absent(scores: np.ndarray, benchmarks: Iterable[str]) -> np.ndarray:
    """Return where a candidate has no score in the query's whole benchmark, `[N, C]` bool.

    Such a candidate is not a candidate in that benchmark, and counts as wrong. If it has scores in the benchmark but
    not on the query, its score is unknown, and it is left out of that query.

    Args:
        scores: `[N, C]` as measured, on all splits. NaN where not measured.
        benchmarks: N names.
    """
    names, codes = np.unique(np.asarray(list(benchmarks), dtype=str), return_inverse=True)
    present = np.zeros((len(names), scores.shape[1]), dtype=bool)
    np.logical_or.at(present, codes, ~np.isnan(scores))
    return ~present[codes]


def fill_unknown(scores: np.ndarray, benchmarks: Iterable[str]) -> np.ndarray:
    """Return scores `[N, C]` in which the candidate's mean in the benchmark replaces an unknown score.

    So a router that chooses such a candidate is neither punished nor rewarded for it, and every difference of two
    routers is a difference of two expectations. A candidate without scores in the benchmark gets its mean over all
    queries, and a candidate without any score gets 0.
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
    """Fill gaps in costs with the candidate's mean cost on train and validation.

    Self without any known cost is free, because its answer needs no other model. An expert without any known cost is
    as expensive as the most expensive one (see `utility.priced`), and a warning names it.

    Args:
        costs: `[N, C]` USD, NaN where not known.
        learning: `[N]` mask of train and validation.
        self_index: Column of self, if it is a candidate.
        names: Names of the candidates, for the warning.

    Raises:
        ExpertokenError: No expert's cost is known on any query.
    """
    means = _means(costs[learning])
    means = np.where(np.isnan(means), _means(costs), means)
    if self_index is not None and np.isnan(means[self_index]):
        means[self_index] = 0.0
    unknown = np.isnan(means)
    if unknown.sum() >= len(means) - (self_index is not None):
        raise ExpertokenError("cost_weight: expected costs of the candidates, found none. Add costs to the results.")
    if unknown.any():
        told = [names[index] if names is not None else f"number {index}" for index in np.flatnonzero(unknown).tolist()]
        logger.warning("no cost is known of %s, so the cost of the most expensive candidate is used", ", ".join(told))
        means = priced(means)
    return np.where(np.isnan(costs), means, costs)


def winners(scores: np.ndarray, *, self_index: int | None = None, rank: np.ndarray | None = None) -> np.ndarray:
    """Return the winners of each row, as a distribution.

    Self wins a tie that it is part of, because its answer costs nothing more while a dispatch does. Otherwise the
    winners share the target equally, or, with `rank`, the winner of lowest rank takes it. Sharing is the default:
    breaking ties by the best average would teach the average where the data do not decide.

    Args:
        scores: `[N, C]`, NaN where not measured.
        self_index: Column of self, if it is a candidate.
        rank: `[N, C]` or `[1, C]`. A lower rank is preferred, NaN comes last.

    Returns:
        Target `[N, C]`. A row without any measurement is all zero.
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
    """Return the ranks that break ties: costs per query `[N, C]`, or means per candidate `[1, C]`."""
    known = data.known
    if labelling.ties == "cheapest" and not per_query:
        return _means(known.costs)[None]
    if labelling.ties == "cheapest":
        return np.where(np.isnan(data.costs), _means(known.costs)[None], data.costs)
    if labelling.ties == "best":
        return -_means(known.scores[known.learning])[None]
    return None


def _means(values: np.ndarray) -> np.ndarray:
    """Return the mean of each column over its known values. NaN for a column without any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nanmean warns of an all-NaN column
        return np.nanmean(values, 0) if len(values) else np.full(values.shape[1], np.nan)


def _informative(data: Measured, *, self_counts: bool) -> np.ndarray:
    """Weight queries that distinguish candidates with 1 and others with 0, `[N]` float32."""
    best, worst = np.nanmax(data.scores, 1), np.nanmin(data.scores, 1)
    somebody = best > np.minimum(worst, 0) + TIE
    # An absent candidate counts as wrong, so a query that all others got right distinguishes it.
    apart = (best - worst > TIE) | data.incomplete
    if self_counts and data.self_index is not None:
        apart |= np.nan_to_num(data.scores[:, data.self_index]) > TIE
    return (somebody & apart).astype(np.float32)


def _lead(scores: np.ndarray, margin: float) -> np.ndarray:
    """Return `min(1, lead / margin)` for the winners' lead over the best loser, `[N]` float32. 1 without losers."""
    if margin <= 0:
        return np.ones(len(scores), dtype=np.float32)
    best = np.nanmax(scores, 1, keepdims=True)
    losers = np.where(scores < best - TIE, scores, -np.inf).max(1)
    return np.where(np.isfinite(losers), np.clip((best[:, 0] - losers) / margin, 0, 1), 1).astype(np.float32)


def query_level(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Label each query by its own winner (Bench-CoE, arXiv 2412.04167, query-level).

    A query that no candidate got right, or that all got equally right, teaches nothing about the best candidate, so
    its weight is 0. If self got it right, the query does teach something: no dispatch is needed.
    """
    targets = winners(data.scores, self_index=data.self_index, rank=_rank(data, labelling))
    return targets, _informative(data, self_counts=True) * _lead(data.scores, labelling.margin)


def subject_means(data: Measured, shrinkage: float) -> np.ndarray:
    """Return the shrunken mean score of each query's subject on train and validation, `[N, C]`.

    It is `(n * mean(subject) + shrinkage * mean(benchmark)) / (n + shrinkage)`. The model was measured on n queries of
    the subject. This is the posterior mean with the benchmark's mean as the prior (Gelman et al., Bayesian Data
    Analysis, 2.4). A subject without queries on train and validation gets its benchmark's means. A
    benchmark without any gets the overall means.
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
            # Without shrinkage a model without measurements on a subject is not a candidate in it.
            means[rows] = np.where((count > 0) | ((shrinkage > 0) & ~np.isnan(prior)), shrunken, np.nan)
    return means


def subject_level(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Label each query by the winner of its subject (Bench-CoE, arXiv 2412.04167, subject-level).

    If results name no subject, the benchmark is the subject.
    """
    means = subject_means(data, labelling.shrinkage)
    targets = winners(means, self_index=data.self_index, rank=_rank(data, labelling, per_query=False))
    return targets, _lead(means, labelling.margin)


def mixed(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Mix labels: `beta * query-level + (1 - beta) * subject-level`.

    The subject decides alone where the query does not distinguish candidates.
    """
    own, weights = query_level(data, labelling)
    subject, _ = subject_level(data, labelling)
    # A subject without measurements on train and validation decides nothing, so the query decides alone.
    share = np.where(subject.any(1, keepdims=True), labelling.beta * weights[:, None], 1.0)
    return share * own + (1 - share) * subject, np.ones(len(own), dtype=np.float32)


def soft(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Label each query by `softmax(score / temperature)` over the measured candidates (as ZOOTER, arXiv 2311.08692)."""
    known = np.where(np.isnan(data.scores), -np.inf, data.scores) / labelling.temperature
    raised = np.exp(known - known.max(1, keepdims=True))
    weights = _informative(data, self_counts=False) * _lead(data.scores, labelling.margin)
    return raised / raised.sum(1, keepdims=True), weights


def correctness(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Weight all measured queries equally, for the objective `correctness` (Shnitzer et al., arXiv 2309.15789).

    Each candidate is a binary problem, so queries that all candidates got right, or none, count too.
    """
    targets = winners(data.scores, self_index=data.self_index, rank=_rank(data, labelling))
    return targets, np.ones(len(targets), dtype=np.float32)


def expected_score(data: Measured, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Label by query-level winners of weight 1, for the objective `expected_score`, which reads the scores."""
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
"""Training objective of a strategy, if it is not cross-entropy."""


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
        subjects: N names within the benchmarks, or None.
        learning: `[N]` mask of train and validation, because the test split must not decide a subject's winner.
            Default: all.
        labelling: Strategy and parameters, or a strategy's name.
        costs: `[N, C]` USD, NaN where not known.
        self_index: Column of self, if it is a candidate.
        names: Names of the candidates, for errors.
        rows: `[N]` mask of the R queries to label. The others only decide the best candidate in a subject or on
            average. Default: all.
        missing: `[N, C]` mask of candidates that are absent from the query's benchmark. A query that others got right
            distinguishes an absent candidate, but not one whose score is unknown. Default: `absent` of the scores.

    Returns:
        Targets `[R, C]` and weights `[R]`, float32. A query without any measurement has weight 0.

    Raises:
        ExpertokenError: The strategy is unknown, or costs are needed and missing.
    """
    labelling = Labelling(labelling) if isinstance(labelling, str) else labelling
    learning = np.ones(len(scores), dtype=bool) if learning is None else np.asarray(learning)
    benchmarks = np.asarray(list(benchmarks), dtype=str)
    incomplete = np.asarray(absent(scores, benchmarks) if missing is None else missing).any(axis=1)
    if costs is None and (labelling.cost_weight > 0 or labelling.ties == "cheapest"):
        need = "cost_weight" if labelling.cost_weight > 0 else "ties: cheapest"
        raise ExpertokenError(f"{need}: expected costs in the results, found none. Add costs, or drop the option.")
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
