"""Means over benchmarks, and bootstrap intervals of them."""

from collections.abc import Sequence

import numpy as np

_DRAWS = 10_000_000  # numbers drawn at a time: 80 MB


def benchmark_means(values: np.ndarray, benchmarks: Sequence[str]) -> dict[str, float]:
    """Mean of per-query values `[N]` within each benchmark, sorted by name."""
    names = np.asarray(benchmarks, dtype=str)
    return {name: float(values[names == name].mean()) for name in np.unique(names)}


def bootstrap_interval(
    values: np.ndarray, benchmarks: Sequence[str], *, resamples: int = 5000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over benchmarks of the mean value.

    Queries are drawn with replacement within each benchmark: the benchmarks are given, their questions are a sample.

    Args:
        values: `[N]` per query; the difference of two routers' scores gives a paired interval.
        benchmarks: N names.
        resamples: how often to draw.
        seed: of the draws.
        level: share of the resampled means inside.
    """
    rng = np.random.default_rng(seed)
    names = np.asarray(benchmarks, dtype=str)
    means = np.zeros(resamples)
    groups = [values[names == name] for name in np.unique(names)]
    for group in groups:
        # Scores take few distinct values, so drawing how often each value comes is exact and far cheaper than
        # drawing queries.
        kinds, counts = np.unique(group, return_counts=True)
        step = max(1, _DRAWS // len(kinds))  # graded scores have as many values as queries
        for start in range(0, resamples, step):
            size = min(step, resamples - start)
            draws = rng.multinomial(len(group), counts / len(group), size=size)
            means[start : start + size] += draws @ kinds / len(group)
    low, high = np.quantile(means / len(groups), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
