"""The report as a picture."""

from pathlib import Path

from ..modeling.errors import require_extra
from ..modeling.files import atomic_file
from .evaluate import Report

_COLOURS = {"composite": "#1b6ca8", "expert": "#9fb8cc", "baseline": "#d9a441", "bound": "#c9c9c9"}


def draw_scores(report: Report, path: Path | str) -> None:
    """Mean scores with their intervals as a bar chart, as a PNG.

    Raises:
        ImportError: the `eval` extra is not installed.
    """
    matplotlib = require_extra("matplotlib", "eval")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report.rows[::-1]
    means = [100 * row.mean for row in rows]
    low = [100 * (row.mean - row.interval[0]) for row in rows]
    high = [100 * (row.interval[1] - row.mean) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1.2), layout="constrained")
    axes.barh(
        [row.name for row in rows], means, xerr=[low, high], color=[_COLOURS[row.kind] for row in rows], capsize=3
    )
    axes.axvline(100 * report.composite.mean, color=_COLOURS["composite"], linewidth=1, linestyle=":")
    axes.set_xlabel(f"mean score over {len(report.queries)} benchmarks, % (95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as aside:
        figure.savefig(aside, format="png", dpi=150)
    pyplot.close(figure)
