"""Metrics of routers in the literature, on plain arrays: N queries, C candidates, scores `[N, C]`, decisions `[N]`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Names: TypeAlias = "Sequence[str] | np.ndarray[Any, Any]"
"""Names of N queries' benchmarks, as a sequence or an array of text."""

_DRAWS = 10_000_000  # numbers drawn at a time: 80 MB

REFERENCE_SCORES = {
    "arc": 0.852,
    "hellaswag": 0.953,
    "mmlu": 0.864,
    "truthfulqa": 0.669,
    "winogrande": 0.875,
    "gsm8k": 0.92,
    "ifeval": 0.7689,
    "bbh": 0.8303,
    "gpqa": 0.397,
    "math": 0.4,
    "musr": 0.699,
    "mmlu_pro": 0.637,
}
"""RouterEval's reference accuracies (arXiv 2503.10657) of GPT-4 or another strong model, per benchmark."""

_FAMILIES = (
    "hellaswag",
    "truthfulqa",
    "winogrande",
    "gsm8k",
    "ifeval",
    "mmlu_pro",
    "bbh",
    "gpqa",
    "math",
    "musr",
    "arc",
)
"""Prefixes of the names of a benchmark's parts, as in the Open LLM Leaderboard."""

_ALIASES = {
    "arc_challenge": "arc",
    "arc_c": "arc",
    "truthful_qa": "truthfulqa",
    "truthfulqa_mc": "truthfulqa",
    "truthfulqa_mc2": "truthfulqa",
    "winograde": "winogrande",
    "gpqa_diamond": "gpqa",
    "bbh_zeroshot": "bbh",
    "mmlu_generative": "mmlu",
}


def reference_score(benchmark: str) -> float | None:
    """Return RouterEval's reference accuracy on a benchmark in any spelling of its files, or None for others."""
    name = re.sub(r"[^a-z0-9]+", "_", benchmark.lower()).strip("_")
    # RouterEval's raw files have the leaderboard's names: harness_arc_challenge_25, leaderboard_bbh_navigate.
    bare, prefixes = re.subn(r"^(harness|leaderboard)_", "", name)
    if prefixes:
        bare = re.sub(r"_\d+$", "", bare)
        if bare.startswith("hendryckstest"):
            bare = "mmlu"
        bare = next((family for family in _FAMILIES if bare == family or bare.startswith(f"{family}_")), bare)
    return REFERENCE_SCORES.get(_ALIASES.get(bare, bare))


RIGHT = 0.5
"""Score above which a query counts as solved."""


def benchmark_means(values: np.ndarray, benchmarks: Names) -> dict[str, float]:
    """Return the mean of per-query values `[N]` within each benchmark, sorted by name."""
    names = np.asarray(benchmarks, dtype=str)
    return {name: float(values[names == name].mean()) for name in np.unique(names)}


def mean_over_benchmarks(values: np.ndarray, benchmarks: Names) -> float:
    """Return the mean over benchmarks of the mean value (AvgAcc, arXiv 2601.07206), so that small ones count alike."""
    return float(np.mean(list(benchmark_means(values, benchmarks).values())))


def bootstrap_interval(
    values: np.ndarray, benchmarks: Names, *, resamples: int = 5000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of the mean over benchmarks of the mean value.

    Queries are drawn with replacement within each benchmark: the benchmarks are fixed, their questions are a sample.

    Args:
        values: `[N]` values per query. The difference of two routers' scores gives a paired interval.
        benchmarks: N names.
        resamples: Number of resamples.
        seed: Seed of the draws.
        level: Share of the resampled means inside the interval.
    """
    low, high = np.quantile(_resampled(values, benchmarks, resamples, seed), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_p_value(difference: np.ndarray, benchmarks: Names, *, resamples: int = 5000, seed: int = 0) -> float:
    """Return the two-sided p-value that two routers are alike, by flips of the signs of their paired differences.

    If the routers are alike, each query's difference may as well be the opposite (Fisher's randomisation test for
    pairs). On few queries it stays honest: 6 differences of one sign give 0.03, where a bootstrap gives 0.0002.

    Args:
        difference: `[N]` differences of the two routers' scores.
        benchmarks: N names. The statistic is the mean over benchmarks.
        resamples: Number of random flips. The least value is `1 / (resamples + 1)`.
        seed: Seed of the flips.
    """
    weights = benchmark_weights(np.ones((1, len(difference))), benchmarks)[0]
    # Differences of equal size are interchangeable, so drawing the number of flips among them is exact and cheap.
    sizes, counts = np.unique(np.abs(weights * difference), return_counts=True)
    rng, observed = np.random.default_rng(seed), abs(float(weights @ difference))
    step, beyond = max(1, _DRAWS // len(sizes)), 0
    for start in range(0, resamples, step):
        kept = rng.binomial(counts, 0.5, size=(min(step, resamples - start), len(sizes)))
        beyond += int((np.abs((2 * kept - counts) @ sizes) >= observed * (1 - 1e-9)).sum())
    return (1 + beyond) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), so that each rejection holds for all of them together."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(order))
    scaled = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted.tolist()


def _resampled(values: np.ndarray, benchmarks: Names, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    names = np.asarray(benchmarks, dtype=str)
    means = np.zeros(resamples)
    groups = [values[names == name] for name in np.unique(names)]
    for group in groups:
        # Scores take few distinct values, so drawing the count of each value is exact and far cheaper than drawing
        # queries.
        kinds, counts = np.unique(group, return_counts=True)
        step = max(1, _DRAWS // len(kinds))  # graded scores have as many values as queries
        for start in range(0, resamples, step):
            size = min(step, resamples - start)
            draws = rng.multinomial(len(group), counts / len(group), size=size)
            means[start : start + size] += draws @ kinds / len(group)
    return means / len(groups)


def resample_counts(benchmarks: Names, resamples: int, seed: int = 0) -> np.ndarray:
    """Draw resamples with replacement within each benchmark, and return the count of each query in each, `[R, N]`."""
    names = np.asarray(benchmarks, dtype=str)
    rng = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(names)), dtype=np.int32)
    for name in np.unique(names):
        rows = np.flatnonzero(names == name)
        counts[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples)
    return counts


def benchmark_weights(counts: np.ndarray, benchmarks: Names) -> np.ndarray:
    """Return weights `[R, N]` that make `weights @ values` the mean over benchmarks of the mean value, per resample."""
    names, index, sizes = np.unique(np.asarray(benchmarks, dtype=str), return_inverse=True, return_counts=True)
    return counts / (sizes[index] * len(names))


def chosen_scores(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the score of each query's chosen candidate, `[N]`."""
    return scores[np.arange(len(scores)), chosen]


def entropy_bits(probabilities: np.ndarray) -> float:
    """Return RouterEval's E_p: mean entropy of a router's predictions over candidates, in bits (arXiv 2503.10657)."""
    return float(entropies_bits(probabilities).mean())


def entropies_bits(probabilities: np.ndarray) -> np.ndarray:
    """Return the entropy of each row, `[N]` bits."""
    logs = np.log2(probabilities, out=np.zeros_like(probabilities, dtype=float), where=probabilities > 0)
    return -(probabilities * logs).sum(1)


def oracle(scores: np.ndarray, costs: np.ndarray | None = None) -> np.ndarray:
    """Return each query's best candidate, the cheapest if several tie, `[N]` (RouterBench, arXiv 2403.12031)."""
    if costs is None:
        return scores.argmax(1)
    best = scores >= scores.max(1, keepdims=True) - 1e-6
    paid = np.where(np.isnan(costs), np.finfo(np.float64).max, costs)
    return np.where(best, paid, np.inf).argmin(1)


def mixed(oracle: np.ndarray, random: np.ndarray, p: float) -> np.ndarray:
    """Return the expectation of RouterEval's r_o(p): the oracle with probability p, else a candidate at random.

    Args:
        oracle: `[N]` scores (or costs) of the oracle.
        random: `[N]` means over the candidates.
        p: Probability of the oracle.
    """
    return p * oracle + (1 - p) * random


@dataclass(frozen=True)
class Curve:
    """Quality over cost of a router, a point for each setting of its trade-off.

    Attributes:
        costs: Mean USD per query, `[P]`.
        qualities: Mean scores, `[P]`.
    """

    costs: np.ndarray
    qualities: np.ndarray

    def hull(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the non-decreasing upper convex hull (RouterBench, arXiv 2403.12031, section 3.3), by cost.

        Points between two vertices are reached by a random choice between the two. A point that costs more and is worse
        than another is never chosen.
        """
        points = sorted({(float(c), float(q)) for c, q in zip(self.costs, self.qualities, strict=True)})
        kept: list[tuple[float, float]] = []
        for cost, quality in points:
            if kept and quality <= max(q for _, q in kept):
                continue
            if kept and kept[-1][0] == cost:
                kept.pop()
            while len(kept) >= 2 and _below(kept[-2], kept[-1], (cost, quality)):
                kept.pop()
            kept.append((cost, quality))
        return np.array([c for c, _ in kept]), np.array([q for _, q in kept])

    def aiq(self, low: float | None = None, high: float | None = None) -> float:
        """Return the average improvement in quality: mean height of the hull over a range of costs.

        See RouterBench, section 3.3. Beyond its dearest vertex the hull is flat. Below its cheapest vertex no candidate
        is affordable, and the quality is 0.

        Args:
            low: Lowest cost of the range. Defaults to the curve's own. Routers are compared over one range.
            high: Highest cost of the range. Defaults to the curve's own.
        """
        costs, qualities = self.hull()
        low = float(np.min(self.costs)) if low is None else low
        high = float(np.max(self.costs)) if high is None else high
        if high <= low:
            return float(qualities.max())
        inside = np.unique(np.concatenate([costs[(costs > low) & (costs < high)], [max(low, costs[0]), high]]))
        inside = inside[inside >= costs[0]]
        if not len(inside) or costs[0] > high:
            return 0.0
        return float(np.trapezoid(np.interp(inside, costs, qualities), inside) / (high - low))


def _below(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Check whether b lies on or under the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


@dataclass(frozen=True)
class Outcomes:
    """Cost and score of each setting of a trade-off on each query.

    Attributes:
        paid: `[P, N]` USD.
        got: `[P, N]` scores.
    """

    paid: np.ndarray
    got: np.ndarray

    def curve(self, counts: np.ndarray | None = None) -> Curve:
        """Return the means over the queries, each query weighted by its count in `counts` `[N]`."""
        if counts is None:
            return Curve(self.paid.mean(1), self.got.mean(1))
        return Curve(self.paid @ counts / counts.sum(), self.got @ counts / counts.sum())


def trade_off(
    predicted: np.ndarray, scores: np.ndarray, costs: np.ndarray, expected: np.ndarray, weights: Sequence[float]
) -> Outcomes:
    """Choose for each lambda the candidate with the best `predicted score - lambda * expected cost` on each query.

    Args:
        predicted: `[N, C]` scores that the router expects.
        scores: `[N, C]` measured scores.
        costs: `[N, C]` measured USD.
        expected: `[C]` or `[N, C]` USD that a router may know beforehand.
        weights: Lambdas, score per USD.

    Returns:
        Costs and scores of the decisions, for each lambda.
    """
    rows = np.arange(len(scores))
    choices = [(predicted - weight * expected).argmax(1) for weight in weights]
    paid, got = (np.stack([values[rows, c] for c in choices]).astype(float) for values in (costs, scores))
    return Outcomes(paid, got)


def strong_share_curve(preference: np.ndarray, weak: np.ndarray, strong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the quality for each share of queries sent to the strong model, the highest preference first.

    Args:
        preference: `[N]` preferences. A higher value favours the strong model.
        weak: `[N]` scores of the weak model.
        strong: `[N]` scores of the strong model.

    Returns:
        Shares `[N + 1]` from 0 to 1, and mean scores `[N + 1]`. Queries of equal preference each add their average
        gain, which is the mean over random orders.
    """
    order = np.argsort(-preference, kind="stable")
    gains = (strong - weak)[order].astype(float)
    _, groups = np.unique(-preference[order], return_inverse=True)
    gains = (np.bincount(groups, gains) / np.bincount(groups))[groups]
    count = len(gains)
    return np.arange(count + 1) / count, weak.mean() + np.concatenate([[0.0], np.cumsum(gains)]) / count


def apgr(preference: np.ndarray, weak: np.ndarray, strong: np.ndarray) -> float:
    """Return the average performance gap recovered (RouteLLM, arXiv 2406.18665, eq. 6).

    It is the mean over shares of strong calls of `(quality - weak) / (strong - weak)`. A value of 0.5 is random, 1 is
    the strong model's quality without any strong call.
    """
    shares, qualities = strong_share_curve(preference, weak, strong)
    gap = strong.mean() - weak.mean()
    return float(np.trapezoid((qualities - weak.mean()) / gap, shares))


def cpt(preference: np.ndarray, weak: np.ndarray, strong: np.ndarray, share: float) -> float:
    """Return RouteLLM's CPT: the least share of strong calls that recovers `share` of the gap, NaN if none does.

    CPT is the call-performance threshold.
    """
    shares, qualities = strong_share_curve(preference, weak, strong)
    reached = (qualities - weak.mean()) / (strong.mean() - weak.mean()) >= share - 1e-12
    return float(shares[reached.argmax()]) if reached.any() else float("nan")


def perf_gain(curve: Curve, best_quality: float) -> float:
    """Return the greatest relative gain of a curve over the best single model (PerfGain, arXiv 2601.07206)."""
    return float(curve.qualities.max() / best_quality - 1) if best_quality > 0 else float("nan")


def cost_save(curve: Curve, best_quality: float, best_cost: float) -> float:
    """Return the greatest saving at no less than the best single model's quality, NaN if no point reaches it.

    This is CostSave of arXiv 2601.07206.
    """
    enough = curve.qualities >= best_quality - 1e-12
    return float(1 - curve.costs[enough].min() / best_cost) if enough.any() and best_cost > 0 else float("nan")


def among_the_best(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Check whether each query's chosen candidate is one of the best, `[N]` bool."""
    return chosen_scores(scores, chosen) >= scores.max(1) - 1e-6


def confusion(targets: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Count queries by label (rows) and decision (columns), `[C, C]`. A label shared by several counts in parts."""
    return targets.T @ np.eye(targets.shape[1])[chosen]


def solved_by_few(scores: np.ndarray, most: int = 3) -> dict[int, np.ndarray]:
    """Return the rows of the queries that exactly k candidates solve, for k = 1 to `most`.

    On these queries routers lose most to the oracle (arXiv 2601.07206).
    """
    solvers = (scores > RIGHT).sum(1)
    return {count: np.flatnonzero(solvers == count) for count in range(1, most + 1)}


def calibration(confidence: np.ndarray, outcome: np.ndarray, bins: int = 15) -> list[tuple[float, float, int]]:
    """Return the mean confidence, mean outcome and count of each bin of confidence."""
    return [
        (float(confidence[rows].mean()), float(outcome[rows].mean()), len(rows)) for rows in _bins(confidence, bins)
    ]


def calibration_errors(confidence: np.ndarray, outcome: np.ndarray, counts: np.ndarray, bins: int = 15) -> np.ndarray:
    """Return the expected calibration error (arXiv 1706.04599) in each resample, `[R]`. See `resample_counts`."""
    gaps = [np.abs(counts[:, rows] @ (confidence - outcome)[rows]) for rows in _bins(confidence, bins)]
    return np.sum(gaps, axis=0) / counts.sum(1)


def calibration_floor(confidence: np.ndarray, bins: int = 15, draws: int = 200, seed: int = 0) -> float:
    """Return the calibration error that perfect probabilities would have on as many queries, by chance alone.

    Outcomes are drawn from the confidences themselves. The error is a mean of absolute values and is never 0.
    """
    once, rng = np.ones((1, len(confidence))), np.random.default_rng(seed)
    found = [
        calibration_errors(confidence, (rng.random(len(confidence)) < confidence).astype(float), once, bins)[0]
        for _ in range(draws)
    ]
    return float(np.mean(found))


def _bins(confidence: np.ndarray, bins: int) -> Iterator[np.ndarray]:
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    for place in np.unique(places):
        yield np.flatnonzero(places == place)
