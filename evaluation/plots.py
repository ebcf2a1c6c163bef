"""Pictures of the report: scores, gains, experts by benchmark, shares, calibration, cost against quality."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..modeling.errors import one_line, require_extra
from ..modeling.files import atomic_file
from .report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_COLOURS = {
    "composite": "#1b6ca8",
    "expert": "#9fb8cc",
    "baseline": "#d9a441",
    "router": "#7a9e6b",
    "bound": "#c9c9c9",
}
_MOST_LABELS = 40  # readable number of rows and columns in a picture


def draw_report(report: Report, folder: Path | str) -> list[Path]:
    """Draw the report as PNG files.

    Args:
        report: Report of an evaluation.
        folder: Folder to write the files to.

    Returns:
        The files. A picture without data is left out. A picture that fails is left out with a warning.

    Raises:
        ImportError: The `eval` extra is not installed.
    """
    matplotlib = require_extra("matplotlib", "eval")
    matplotlib.use("Agg")
    require_extra("matplotlib.pyplot", "eval")
    drawn = []
    for name, draw, there in (
        ("scores", draw_scores, True),
        ("gains", draw_gains, True),
        ("experts", draw_experts, len(report.queries_by_benchmark) > 1),
        ("shares", draw_shares, True),
        ("reliability", draw_reliability, bool(report.calibration_bins)),
        ("cost", draw_costs, bool(report.cost_quality_curves)),
    ):
        if not there:
            continue
        open_before = set(matplotlib.pyplot.get_fignums())  # in a notebook, the user's own figures
        try:
            drawn.append(_save(draw, report, Path(folder) / f"{name}.png"))
        except Exception as error:  # any error of matplotlib: a missing picture must not lose the report
            logger.warning("the picture %s.png could not be drawn and is left out (%s)", name, one_line(error))
        finally:
            for figure in set(matplotlib.pyplot.get_fignums()) - open_before:
                matplotlib.pyplot.close(figure)
    return drawn


def _save(draw: "Callable[[Report], Figure]", report: Report, path: Path) -> Path:
    figure = draw(report)
    with atomic_file(path) as aside:
        figure.savefig(aside, format="png", dpi=150)
    return path


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)


def draw_scores(report: Report) -> "Figure":
    """Draw mean scores with their intervals."""
    from matplotlib import pyplot

    rows = [row for row in report.results if row.kind != "expert"]
    singles = sorted((row for row in report.results if row.kind == "expert"), key=lambda row: row.mean_score)
    rows = [*rows[::-1], *singles[-_MOST_LABELS:]]
    rows.sort(key=lambda row: row.mean_score)
    means = [100 * row.mean_score for row in rows]
    # An interval of zero width (an expert that is right on a whole benchmark) may miss the mean by a rounding error.
    low = [max(0.0, 100 * (row.mean_score - row.mean_score_interval[0])) for row in rows]
    high = [max(0.0, 100 * (row.mean_score_interval[1] - row.mean_score)) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(rows) + 1.2), layout="constrained")
    axes.barh(
        [row.name for row in rows],
        means,
        xerr=[low, high],
        color=[_COLOURS[row.kind] for row in rows],
        error_kw={"elinewidth": 1, "ecolor": "#444444", "capsize": 2},
    )
    axes.axvline(100 * report.composite.mean_score, color=_COLOURS["composite"], linewidth=1, linestyle=":")
    kinds = dict.fromkeys(row.kind for row in reversed(rows))
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=_COLOURS[kind]) for kind in kinds]
    axes.legend(handles, kinds, frameon=False, fontsize=8, loc="lower right")
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row.kind == "composite" else "normal")
    axes.set_xlabel(
        f"mean score over {len(report.queries_by_benchmark)} benchmarks, %\n"
        "(95 % interval of each line alone, the paired gains of the report are more precise)"
    )
    _plain(axes)
    return figure


def draw_gains(report: Report) -> "Figure":
    """Draw the composite's gain over each other router and model, paired on the same queries."""
    from matplotlib import pyplot

    rows = [row for row in report.shown() if row.composite_gain is not None][::-1]
    gains = [row.composite_gain for row in rows if row.composite_gain is not None]
    means = np.array([100 * gain.difference for gain in gains])
    bounds = 100 * np.array([gain.interval for gain in gains])
    figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(rows) + 1.2), layout="constrained")
    axes.axvline(0, color="#444444", linewidth=1)
    axes.hlines(range(len(rows)), *bounds.T, color=[_COLOURS[row.kind] for row in rows], linewidth=2)
    axes.scatter(means, range(len(rows)), color=[_COLOURS[row.kind] for row in rows], zorder=3)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_xlabel("gain of the composite, points (95 % interval of each line alone, paired)")
    _plain(axes)
    return figure


def draw_experts(report: Report) -> "Figure":
    """Draw the scores of every candidate and of the composite on every benchmark."""
    from matplotlib import pyplot

    rows = [report.composite, *(row for row in report.shown() if row.kind == "expert")]
    names = list(report.queries_by_benchmark)[:_MOST_LABELS]
    values = 100 * np.array([[row.score_by_benchmark.get(name, np.nan) for name in names] for row in rows])
    figure, axes = pyplot.subplots(figsize=(0.75 * len(names) + 3.2, 0.36 * len(rows) + 1.6), layout="constrained")
    image = axes.imshow(values, cmap="YlGnBu", aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    best = np.nan_to_num(values[1:], nan=-1.0).argmax(0) + 1
    dark = (np.nanmin(values) + np.nanmax(values)) / 2
    for (y, x), value in np.ndenumerate(values):
        if np.isnan(value):  # not measured
            continue
        weight = "bold" if y in (0, best[x]) else "normal"
        axes.text(
            x, y, f"{value:.0f}", ha="center", va="center", color="white" if value > dark else "black",
            fontsize=8, fontweight=weight,
        )  # fmt: skip
    axes.axhline(0.5, color="white", linewidth=3)
    figure.colorbar(image, ax=axes, label="score, %", shrink=0.8)
    return figure


def draw_shares(report: Report) -> "Figure":
    """Draw each candidate's share of decisions beside its share of labels."""
    from matplotlib import pyplot

    names = sorted(report.share_of_queries, key=report.share_of_queries.__getitem__)[-_MOST_LABELS:]
    places = np.arange(len(names))
    figure, axes = pyplot.subplots(figsize=(7, 0.42 * len(names) + 1.2), layout="constrained")
    axes.barh(
        places + 0.2,
        [100 * report.share_of_queries[name] for name in names],
        0.4,
        label="chosen",
        color=_COLOURS["composite"],
    )
    if report.confusion_matrix:
        labels = np.array(report.confusion_matrix).sum(1)
        share = dict(zip(report.share_of_queries, 100 * labels / max(labels.sum(), 1e-9), strict=True))
        axes.barh(
            places - 0.2, [share[name] for name in names], 0.4, label="labelled as best", color=_COLOURS["baseline"]
        )
        axes.legend(frameon=False)
    axes.set_yticks(places, names)
    axes.set_xlabel("queries, %")
    _plain(axes)
    return figure


def draw_reliability(report: Report) -> "Figure":
    """Draw the outcome against the confidence of the dispatch, with the number of queries as the size."""
    from matplotlib import pyplot

    bins = [(part.mean_confidence, part.mean_outcome, part.queries) for part in report.calibration_bins]
    sure, right, count = np.array(bins, dtype=float).T
    figure, axes = pyplot.subplots(figsize=(4.6, 4.4), layout="constrained")
    axes.plot([0, 1], [0, 1], color=_COLOURS["bound"], linestyle="--", label="calibrated")
    axes.plot(sure, right, color=_COLOURS["composite"], linewidth=1)
    axes.scatter(sure, right, 20 + 400 * count / count.sum(), color=_COLOURS["composite"], alpha=0.8)
    error = report.metrics.get("calibration error (ECE)")
    axes.set_title("" if error is None else f"calibration error {error:.3f}", fontsize=10)
    axes.set_xlabel(report.settings.get("confidence", "confidence"))
    axes.set_ylabel(report.settings.get("outcome", "outcome"))
    axes.set_xlim(-0.03, 1.06)
    axes.set_ylim(-0.03, 1.06)
    axes.legend(frameon=False, loc="upper left")
    _plain(axes)
    return figure


def _between(costs: np.ndarray, points: int = 50) -> np.ndarray:
    """Insert points between each cost and the next."""
    parts = [np.linspace(low, high, points) for low, high in itertools.pairwise(costs)]
    return np.concatenate([*parts, costs[-1:]])


def draw_costs(report: Report) -> "Figure":
    """Draw quality against cost: single models, and the hull of each router."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    named = {row.name for row in report.shown()}
    experts = [row for row in report.results if row.kind == "expert"]
    priced = [(row, 1000 * row.usd_per_query) for row in experts if row.usd_per_query is not None]
    for row, cost in priced:
        counts = [report.queries_by_benchmark[name] for name in row.score_by_benchmark]
        quality = 100 * np.average(list(row.score_by_benchmark.values()), weights=counts)
        axes.scatter(cost, quality, color=_COLOURS["expert"], zorder=3)
        if row.name in named:
            axes.annotate(row.name, (cost, quality), fontsize=7, xytext=(4, -7), textcoords="offset points")
    palette: Any = pyplot.get_cmap("Dark2")
    others = iter(palette.colors)
    for name, curve in report.cost_quality_curves.items():
        ours = name == "composite"
        colour = _COLOURS["composite"] if ours else "#999999" if name == "single models" else next(others, "#777777")
        # Between two vertices a router mixes them. This line is straight in cost and bent on a logarithmic axis.
        costs = _between(np.array(curve["usd_per_query"]))
        axes.plot(
            1000 * costs,
            100 * np.interp(costs, curve["usd_per_query"], curve["mean_score"]),
            color=colour,
            linewidth=2.5 if ours else 1.2,
            linestyle=":" if name == "single models" else "-",
            label=f"{name}, AIQ {report.metrics.get(f'AIQ, {name}', float('nan')):.3f}",
            zorder=2 if ours else 1,
        )
    paid = [cost for _, cost in priced if cost > 0]
    if paid:
        # Logarithmic except near zero, so that models without a cost can be drawn.
        axes.set_xscale("symlog", linthresh=min(paid) / 2, linscale=0.3)
    axes.set_xlim(left=0 if any(cost == 0 for _, cost in priced) or not paid else 0.7 * min(paid))
    axes.set_xlabel("USD per 1000 queries")
    axes.set_ylabel("mean score over queries, %")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return figure
