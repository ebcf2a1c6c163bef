"""Labelling strategies: from scores to a target over the candidates, per query."""

from collections.abc import Callable, Sequence

import numpy as np

from ..modeling.errors import ExpertokenError, did_you_mean

_TIE = 1e-6


def winners(scores: np.ndarray, *, self_index: int | None = None) -> np.ndarray:
    """Who wins each row, as a distribution.

    Ties: self wins a tie that it is part of, because answering costs nothing more while a dispatch does; otherwise the
    winners share the target equally. Not broken by the best average: that would teach the average where the data are
    silent.

    Args:
        scores: `[N, C]`, NaN where not measured.
        self_index: the column of self, if it is a candidate.

    Returns:
        `[N, C]`; a row without any measurement is all zero.
    """
    known = np.where(np.isnan(scores), -np.inf, scores)
    best = known.max(1, keepdims=True)
    wins = (known >= best - _TIE) & np.isfinite(best)
    if self_index is not None:
        kept = wins[:, self_index].copy()
        wins[kept] = False
        wins[kept, self_index] = True
    return wins / np.maximum(wins.sum(1, keepdims=True), 1)


def _informative(scores: np.ndarray, self_index: int | None = None) -> np.ndarray:
    """Weight 1 for queries that tell candidates apart, 0 for the others, `[N]` float32."""
    somebody = np.nanmax(scores, 1) > _TIE
    # A candidate that was not measured stands apart from those who were and got it right.
    apart = (np.nanmax(scores, 1) - np.nanmin(scores, 1) > _TIE) | np.isnan(scores).any(1)
    if self_index is not None:
        apart |= np.nan_to_num(scores[:, self_index]) > _TIE
    return (somebody & apart).astype(np.float32)


def query_level(
    scores: np.ndarray, groups: Sequence[str], train: np.ndarray, *, self_index: int | None = None, **_: float
) -> tuple[np.ndarray, np.ndarray]:
    """Label each query by its own winner (Bench-CoE, arXiv 2412.04167, query-level).

    A query that nobody got right, or that everybody got equally right, teaches nothing about who should answer: its
    weight is 0. Where self is among those who got it right, it does teach something: no dispatch is needed.
    """
    del groups, train
    return winners(scores, self_index=self_index), _informative(scores, self_index)


def subject_level(
    scores: np.ndarray, groups: Sequence[str], train: np.ndarray, *, self_index: int | None = None, **_: float
) -> tuple[np.ndarray, np.ndarray]:
    """Label each query by the winner of its subject (Bench-CoE, arXiv 2412.04167, subject-level).

    The subject is the benchmark where results name no subject. A subject that the learning side does not have gets the
    winner over all of it.
    """
    groups = np.asarray(groups)
    overall = np.nanmean(scores[train], 0)
    targets = np.zeros(scores.shape)
    for group in np.unique(groups):
        inside = groups == group
        known = scores[inside & train]
        measured = known[:, ~np.isnan(known).all(0)] if len(known) else known
        means = overall
        if measured.size:
            means = np.full(scores.shape[1], np.nan)
            means[~np.isnan(known).all(0)] = np.nanmean(measured, 0)
        targets[inside] = winners(means[None], self_index=self_index)
    return targets, np.ones(len(scores), dtype=np.float32)


def soft(
    scores: np.ndarray, groups: Sequence[str], train: np.ndarray, *, temperature: float = 0.25, **_: float
) -> tuple[np.ndarray, np.ndarray]:
    """Label each query by `softmax(score / temperature)` over the measured candidates (as ZOOTER, arXiv 2311.08692)."""
    del groups, train
    known = np.where(np.isnan(scores), -np.inf, scores) / temperature
    raised = np.exp(known - known.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True), _informative(scores)


STRATEGIES: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "query": query_level,
    "subject": subject_level,
    "soft": soft,
}


def label(
    scores: np.ndarray,
    groups: Sequence[str],
    train: np.ndarray,
    strategy: str = "query",
    *,
    self_index: int | None = None,
    temperature: float = 0.25,
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights by a labelling strategy.

    Args:
        scores: `[N, C]` over the candidates, NaN where not measured.
        groups: N subjects (benchmark and subject in one).
        train: `[N]` mask of the learning side (train and validation); the test side must not decide who wins a subject.
        strategy: `query`, `subject` or `soft`.
        self_index: the column of self, if it is a candidate.
        temperature: of `soft`.

    Returns:
        targets `[N, C]` and weights `[N]`, float32. A query without any measurement has weight 0.

    Raises:
        ExpertokenError: there is no such strategy.
    """
    if strategy not in STRATEGIES:
        raise ExpertokenError(f"unknown labelling strategy {strategy!r}, {did_you_mean(strategy, STRATEGIES)}")
    measured = ~np.isnan(scores).all(1)
    targets = np.zeros(scores.shape, dtype=np.float32)
    weights = np.zeros(len(scores), dtype=np.float32)
    kept = np.flatnonzero(measured)
    targets[kept], weights[kept] = STRATEGIES[strategy](
        scores[kept],
        [groups[index] for index in kept],
        np.asarray(train)[kept],
        self_index=self_index,
        temperature=temperature,
    )
    return targets, weights
