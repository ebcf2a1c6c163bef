"""Reports and summaries as tables for the terminal."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from ..evaluation.report import Gain, Report


_WIDTH = 160


def wide_console() -> Console:
    """Return a console that never squeezes tables: in a narrow terminal or a pipe the lines are longer."""
    console = Console()
    return console if console.width >= _WIDTH else Console(width=_WIDTH, soft_wrap=True)


def summary_table(summary: "pd.DataFrame") -> Table:
    """Return a table of mean scores in percent, with a row per benchmark and a column per model."""
    table = Table("benchmark", "queries", *(escape(str(name)) for name in summary.columns[1:]), title="mean score, %")
    for name, row in summary.iterrows():
        cells = ("-" if value != value else f"{100 * value:.1f}" for value in row.iloc[1:])
        table.add_row(escape(str(name)), str(int(row.iloc[0])), *cells)
    return table


def report_table(report: "Report") -> Table:
    """Return an evaluation as a table with 95 % intervals: a row per router and model, a column per benchmark."""
    benchmarks = list(report.queries_by_benchmark)
    table = Table("", "mean [95 % interval]", *map(escape, benchmarks), "share", "composite's gain", title="scores, %")
    left_out = len(report.results) - len(report.shown())
    table.caption = "best single and best per dataset were chosen on the other splits" + (
        f", {left_out} more experts in report.json" if left_out else ""
    )
    for column in table.columns:
        column.no_wrap = True
    for row in report.shown():
        low, high = row.mean_score_interval
        means = row.score_by_benchmark  # no entry for an expert without a score in the benchmark
        gain = ""
        if row.composite_gain is not None:
            difference, *bounds = (f"{100 * value:+.1f}" for value in _values(row.composite_gain))
            gain = f"{difference} \\[{', '.join(bounds)}]"
        share = report.share_of_queries.get(row.name)
        table.add_row(
            escape(row.name),
            f"{100 * row.mean_score:.2f} \\[{100 * low:.1f}, {100 * high:.1f}]",
            *(f"{100 * means[name]:.1f}" if name in means else "" for name in benchmarks),
            "" if share is None else f"{100 * share:.0f} %",
            gain,
            style="bold" if row.kind == "composite" else "dim" if row.kind == "bound" else None,
        )
    return table


def chats_table(report: "Report") -> Table:
    """Return a table of the scores of the same questions in chats."""
    table = Table("context", "score", "change [95 % interval]", "same decision", title="in chats, %")
    for entry in report.chats:
        low, high = entry["interval"]
        table.add_row(
            entry["context"],
            f"{100 * entry['score']:.1f}",
            f"{100 * entry['change']:+.1f} \\[{100 * low:+.1f}, {100 * high:+.1f}]",
            f"{100 * entry['same_choice']:.0f}",
        )
    return table


def _values(gain: "Gain") -> tuple[float, float, float]:
    return gain.difference, *gain.interval
