"""Prior of method `tokens`: pseudo-observations of each candidate at its mean in each benchmark.

Without the prior a candidate with results of one kind (right once, never wrong) has no finite optimum, and its bias
takes every query.
"""

import numpy as np

from .row_optimizer import Problem

COUNT = 10.0
"""Pseudo-observations per benchmark with many queries."""

SHARE = 0.05
"""Maximum of pseudo-observations per query of the benchmark. The skills demo's kinds have 20 questions each: ten
pseudo-observations would be half as many as the results, and the folds then chose a weaker penalty."""

FEW = 20
"""Number of results below which a candidate's row is little more than its prior. Callers warn."""

_MOST = 20_000  # queries that carry the prior, whose mass does not depend on their number


_ELSEWHERE = 0.1  # queries of other benchmarks that count the candidate as wrong, per query of its own


def thinned(scores: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """Return the mask of absent cells that the objective `correctness` does not count, `[N, C]` bool.

    A candidate without a score in a benchmark counts as wrong there, so that an expert of one subject does not take all
    others. Thousands of such queries would drown the signal of its own results about a question's difficulty. On
    synthetic data an AUC of 0.88 fell to 0.85 if they weighed as much as its own, and did not change with a tenth.

    Args:
        scores: `[N, C]`, 0 where absent.
        absent: `[N, C]` bool. See `labels.absent`.
    """
    left_out = absent.copy()
    for column in np.flatnonzero(absent.any(0)):
        own = int((~absent[:, column] & ~np.isnan(scores[:, column])).sum())
        rows = np.flatnonzero(absent[:, column])
        kept = min(len(rows), max(1, round(_ELSEWHERE * own)))
        left_out[rows[np.linspace(0, len(rows) - 1, kept).astype(int)], column] = False
    return left_out


def prior_of(problem: Problem) -> Problem:
    """Return the prior as a separate problem to fit together with `problem`.

    In each benchmark candidate k's mean is `m_k = (sum of its scores + COUNT * m) / (n_k + COUNT)`, where m is the mean
    of all candidates there. This is the posterior mean of a rate with a prior of COUNT observations (Gelman et al.,
    Bayesian Data Analysis, 2.4).

    The benchmark's queries carry `m_k` minus its standard error as scores, with a mass of COUNT per candidate, less if
    they are few. Targets are the candidates' shares of the labels, drawn towards 0. Drawn towards the others' mean
    instead, they would let a candidate with one result win wherever the others are not sure.

    Args:
        problem: Problem to fit, with the weights of the fit.
    """
    names = np.asarray(problem.benchmarks)
    known = ~np.isnan(problem.scores) & (problem.weights[:, None] > 0)
    if problem.absent is not None:
        known &= ~problem.absent
    kinds, codes = np.unique(names, return_inverse=True)
    # Queries of weight 0 are excluded, or the labels of a fold's held-out queries would leak into the prior.
    parts = [np.flatnonzero((codes == code) & (problem.weights > 0)) for code in range(len(kinds))]
    parts = [part for part in parts if len(part)]
    each = max(1, _MOST // max(1, len(parts)))
    scores, targets, weights, rows = [], [], [], []
    for inside in parts:
        chosen = inside[:: -(-len(inside) // each)]
        count = known[inside].sum(0)
        if not count.any():
            continue
        rates = _rates(problem.scores[inside], known[inside], count)
        # Minus a standard error: one lucky answer must not give a better chance than a pool that is right in 80 %.
        rates = np.clip(rates - np.sqrt(rates * (1 - rates) / (count + COUNT)), 0, 1)
        # A candidate without a usable result in the benchmark counts as the worst. An absent one counts as wrong by its
        # own cells, so the prior leaves it out.
        none = problem.absent[inside].all(0) if problem.absent is not None else np.zeros(len(rates), dtype=bool)
        rates = np.where(count > 0, rates, rates[count > 0].min())
        rates = np.where(none, np.nan, rates)
        scores.append(np.tile(rates, (len(chosen), 1)))
        mass = known[inside] * problem.weights[inside][:, None]
        won = (problem.targets[inside] * mass).sum(0) / np.maximum(mass.sum(0), 1e-9)
        shares = won * count / (count + COUNT)
        targets.append(np.tile(shares / max(shares.sum(), 1e-9), (len(chosen), 1)))
        weights.append(np.full(len(chosen), min(COUNT, SHARE * len(inside)) / len(chosen)))
        rows.append(chosen)
    if not rows:
        return problem.take(np.zeros(0, dtype=int))
    kept = problem.take(np.concatenate(rows))
    joined = [np.concatenate(part).astype(np.float32) for part in (targets, scores, weights)]
    return Problem(kept.states, joined[0], joined[1], joined[2], kept.benchmarks)


def _rates(values: np.ndarray, weights: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return each column's mean `[C]`, drawn towards the mean of all columns by `COUNT` observations."""
    mass = weights.sum(0)
    total = (np.nan_to_num(values) * weights).sum(0)
    means = total / np.maximum(mass, 1e-9)
    overall = total.sum() / max(mass.sum(), 1e-9)
    return (means * count + overall * COUNT) / (count + COUNT)
