"""Metrics of a composite and its rivals in a report, with bootstrap intervals from one set of resamples."""

import math

import numpy as np

from . import metrics
from .report import Report
from .splits import RouterResult, Split

_LAMBDAS = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 61)])
_SHARES = (0.5, 0.8)


def add_scores(
    report: Report, routers: dict[str, RouterResult], test: Split, chosen: np.ndarray, probabilities: np.ndarray,
    counts: np.ndarray,
) -> None:  # fmt: skip
    """Add RouterEval's and LLMRouterBench's metrics of the composite to a report.

    Args:
        report: Report to add the metrics to.
        routers: Results by name: the composite, the experts, random, oracle.
        test: Split that is evaluated.
        chosen: `[N]` decisions of the composite.
        probabilities: `[N, C]` dispatch probabilities of the composite.
        counts: `[R, N]` resamples, see `metrics.resample_counts`.
    """
    # One row per resample. The first row is the data without resampling.
    counts = np.concatenate([np.ones((1, counts.shape[1]), counts.dtype), counts])
    weights = metrics.benchmark_weights(counts, test.benchmarks)
    ours = weights @ routers["composite"].values
    single = int((weights[0] @ test.scores).argmax())  # fixed, or each resample would have another best single
    best = weights @ test.scores[:, single]
    kinds = np.unique(test.benchmarks)
    inside = [np.flatnonzero(test.benchmarks == kind) for kind in kinds]

    def ratio(values: np.ndarray) -> np.ndarray:
        """Return the composite's mean relative to another's, averaged over benchmarks in which the other's is not 0."""
        both = (routers["composite"].values, values)
        ours, theirs = (np.stack([_mean(counts[:, rows], v[rows]) for rows in inside]) for v in both)
        there = theirs > 0
        ratios = np.divide(ours, theirs, out=np.zeros_like(ours), where=there)
        return ratios.sum(0) / np.maximum(there.sum(0), 1)

    named = {
        "mean score (RouterEval mu, AvgAcc)": ours,
        "over the best single, mu / best (V_B)": ours / best,
        "entropy of the predictions, bits (E_p)": _mean(counts, metrics.entropies_bits(probabilities)),
        "relative gain over random (Gain@R)": ratio(routers["random"].values) - 1,
        "relative gain over the best single (Gain@B)": ratio(test.scores[:, single]) - 1,
        "relative gap to the oracle (Gap@O)": 1 - ratio(routers["oracle"].values),
    }
    references = {name: metrics.reference_score(name) for name in report.queries_by_benchmark}
    within = {name: _mean(counts[:, test.benchmarks == name], routers["composite"].values[test.benchmarks == name])
              for name, reference in references.items() if reference}  # fmt: skip
    if len(within) == len(references):
        named["over the reference, mu / reference (V_R)"] = ours / float(np.mean(list(references.values())))
    if len(references) > 1:
        for name, means in within.items():
            named[f"over the reference on {name} (V_R)"] = means / references[name]
    solved = test.scores.max(1) > 0
    hit = metrics.among_the_best(test.scores, chosen)
    named["dispatch accuracy, where somebody can"] = _mean(counts[:, solved], hit[solved])
    for number, rows in metrics.solved_by_few(test.scores).items():
        name = f"recall where {number} candidate{'s' if number > 1 else ''} can"
        named[name] = _mean(counts[:, rows], test.scores[rows, chosen[rows]] > metrics.RIGHT)
    for name, values in named.items():
        report.add(name, values[0], values[1:])


def add_calibration(report: Report, confidence: np.ndarray, outcome: np.ndarray, counts: np.ndarray) -> None:
    """Add the calibration error between confidences and outcomes `[N]` to a report. `counts` `[R, N]` are resamples."""
    counts = counts[counts.sum(1) > 0]
    once = np.ones((1, len(outcome)), counts.dtype)
    errors = metrics.calibration_errors(confidence, outcome, np.concatenate([once, counts]))
    report.add("calibration error (ECE)", errors[0], errors[1:])
    if np.isin(outcome, (0, 1)).all():  # graded outcomes vary less, by an unknown amount
        report.add("calibration error of perfect probabilities, by chance", metrics.calibration_floor(confidence))


def _mean(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean of per-query values in each resample, `[R]`, NaN for a resample without queries."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts @ values.astype(float) / counts.sum(1)


def add_trade_offs(
    report: Report,
    routers: dict[str, RouterResult],
    test: Split,
    expected: np.ndarray,
    served: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Add AIQ, PerfGain and CostSave over the candidates with known costs, and their curves, to a report.

    Args:
        report: Report to add the metrics to.
        routers: Results by name. A result with `predicted` has a trade-off.
        test: Split that is evaluated. Its costs have no gaps for candidates with a known cost.
        expected: `[C]` USD per query, NaN where unknown.
        served: `[N, C]` USD that the composite expects when it serves. See `Chooser.usd`.
        counts: `[R, N]` resamples.
    """
    priced = np.flatnonzero(~np.isnan(expected))
    if len(priced) < 2 or test.costs is None:
        return
    scores, costs, expected = test.scores[:, priced], test.costs[:, priced], expected[priced]
    low, high = float(expected.min()), float(expected.max())
    best = int(scores.mean(0).argmax())
    singles = metrics.Outcomes(costs.T.astype(float), scores.T.astype(float))
    outcomes = {"single models": singles}
    for name, router in routers.items():
        if router.predicted is not None:
            predicted = router.predicted[:, priced]
            spread = predicted.std() / max(high - low, 1e-12)
            usd = served[:, priced] if name == "composite" else expected
            outcomes[name] = metrics.trade_off(predicted, scores, costs, usd, _LAMBDAS * spread)
    resampled = {}
    for name, found in outcomes.items():
        curve = found.curve()
        hull = curve.hull()
        report.cost_quality_curves[name] = {"usd_per_query": hull[0].tolist(), "mean_score": hull[1].tolist()}
        resampled[name] = np.array([found.curve(row).aiq(low, high) for row in counts])
        report.add(f"AIQ, {name}", curve.aiq(low, high), resampled[name])
        if name != "single models":
            report.add(f"PerfGain, {name}", metrics.perf_gain(curve, scores[:, best].mean()))
            report.add(f"CostSave, {name}", metrics.cost_save(curve, scores[:, best].mean(), costs[:, best].mean()))
    _add_gain(report, "AIQ", routers, resampled)


def add_pair(
    report: Report, routers: dict[str, RouterResult], known: list[Split], test: Split, counts: np.ndarray
) -> None:
    """Add RouteLLM's metrics of two candidates to a report: APGR, and CPT for half and four fifths of the gap.

    Pools of another size and a strong model that is not better than the weak one are skipped.
    """
    if test.raw.shape[1] != 2:
        return
    scores = test.scores
    weak, strong = np.concatenate([side.scores for side in known]).mean(0).argsort()
    if scores[:, strong].mean() <= scores[:, weak].mean():
        return
    drawn = [np.repeat(np.arange(len(scores)), row) for row in counts]
    resampled = {}
    for name, router in routers.items():
        if router.predicted is None:
            continue
        preference = router.predicted[:, strong] - router.predicted[:, weak]
        parts = (preference, scores[:, weak], scores[:, strong])
        resampled[name] = np.array([metrics.apgr(*_drawn(parts, rows)) for rows in drawn])
        report.add(f"APGR, {name}", metrics.apgr(*parts), resampled[name])
        for share in _SHARES:
            draws = np.array([metrics.cpt(*_drawn(parts, rows), share) for rows in drawn])
            report.add(f"CPT({share:.0%}), {name}", metrics.cpt(*parts, share), draws)
    _add_gain(report, "APGR", routers, resampled)


def _drawn(
    parts: tuple[np.ndarray, np.ndarray, np.ndarray], rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the drawn rows of three arrays."""
    first, second, third = parts
    return first[rows], second[rows], third[rows]


def _add_gain(report: Report, figure: str, routers: dict[str, RouterResult], resampled: dict[str, np.ndarray]) -> None:
    """Add the composite's gain over the best learnt router to a report, with its paired interval on the resamples."""
    learnt = [name for name in resampled if name in routers and routers[name].kind == "router"]
    if not learnt:
        return
    rival = max(learnt, key=lambda name: report.metrics[f"{figure}, {name}"])
    gain = report.metrics[f"{figure}, composite"] - report.metrics[f"{figure}, {rival}"]
    report.add(f"{figure}, composite less {rival}", gain, resampled["composite"] - resampled[rival])
    low, high = report.metric_intervals.get(f"{figure}, composite less {rival}", (math.nan, math.nan))
    word = "Better" if low > 0 else "WORSE" if high < 0 else "Not significantly different"
    preposition = "from" if word == "Not significantly different" else "than"
    report.findings.append(f"{figure}: {word} {preposition} {rival}: {gain:+.4f} ({low:+.4f} to {high:+.4f}).")
