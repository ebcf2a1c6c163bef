"""What an evaluation found, as an object and as a folder that a person would rather look at than read."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.files import atomic_file

_SURE = 0.05
_BOUNDS = (_SURE / 2, 1 - _SURE / 2)
_MOST_EXPERTS = 30  # lines that a table has room for


@dataclass
class Row:
    """One line of the report.

    Attributes:
        name: of the router or the model.
        kind: composite, expert, baseline, router (a learnt one) or bound (what nobody can do without the answers).
        mean: over benchmarks.
        interval: 95 %, bootstrap within benchmarks.
        benchmarks: mean per benchmark.
        cost: mean USD per query, None where not known.
        gain: of the composite over this row, with its paired 95 % interval; None for the composite.
        p_value: that the gain is zero, paired, two-sided.
        setting: what a learnt router chose on validation.
    """

    name: str
    kind: str
    mean: float
    interval: tuple[float, float]
    benchmarks: dict[str, float]
    cost: float | None = None
    gain: tuple[float, float, float] | None = None
    p_value: float | None = None
    setting: Any = None


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        rows: the composite first.
        shares: share of queries per candidate.
        queries: per benchmark.
        metrics: the field's figures by name; NaN-free, what can't be had is left out.
        intervals: of the figures that have one, 95 %, bootstrap within benchmarks.
        told: sentences of the verdict about figures that are no mean score.
        confusion: label (rows) against choice (columns), queries, in the order of `shares`.
        reliability: per bin of confidence: mean confidence, mean score, queries.
        curves: per router its hull of cost and quality.
        robustness: per change of the text: decisions flipped, score lost.
        settings: what was evaluated, on what, how long it took.
    """

    rows: list[Row]
    shares: dict[str, float]
    queries: dict[str, int]
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    confusion: list[list[float]] = field(default_factory=list)
    reliability: list[tuple[float, float, int]] = field(default_factory=list)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    robustness: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def composite(self) -> Row:
        """The composite's row."""
        return self.rows[0]

    def row(self, name: str) -> Row:
        """A row by name."""
        return next(row for row in self.rows if row.name == name)

    def add(self, name: str, value: float, resampled: np.ndarray | None = None) -> None:
        """A figure, with the interval that its resampled values give; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self.metrics[name] = float(value)
        draws = resampled[np.isfinite(resampled)] if resampled is not None else ()
        if len(draws):
            self.intervals[name] = tuple(float(bound) for bound in np.quantile(draws, _BOUNDS))

    def shown(self) -> list[Row]:
        """The rows that tables show: of a large pool only the best experts; `report.json` has them all."""
        experts = sorted((row for row in self.rows if row.kind == "expert"), key=lambda row: -row.mean)
        left_out = {row.name for row in experts[_MOST_EXPERTS:]}
        return [row for row in self.rows if row.kind != "expert" or row.name not in left_out]

    def verdict(self) -> list[str]:
        """Where the composite wins and where it does not, in sentences: best single, best per dataset, best router."""
        rivals = [row for row in self.rows if row.name.startswith("best ")]
        routers = [row for row in self.rows if row.kind == "router"]
        if routers:
            rivals.append(max(routers, key=lambda row: row.mean))
        return [_sentence(row) for row in rivals] + self.told

    def save(self, path: Path | str) -> None:
        """Write `report.json`."""
        with atomic_file(path) as aside:
            aside.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    def save_folder(self, folder: Path | str, pictures: Sequence[Path] = ()) -> None:
        """Write `report.json`, and `report.md` with links to the pictures that `plots.draw_report` drew of it."""
        folder = Path(folder)
        self.save(folder / "report.json")
        with atomic_file(folder / "report.md") as aside:
            aside.write_text(self.markdown([file.name for file in pictures]), "utf-8")

    def markdown(self, pictures: list[str] | None = None) -> str:
        """The report as Markdown, with links to the pictures beside it."""
        lines = ["# Evaluation", "", *(f"- {sentence}" for sentence in self.verdict()), ""]
        lines += [f"![{name.removesuffix('.png')}]({name})" for name in pictures or ()] + [""]
        lines += self._scores() + self._metrics() + self._confusion() + self._robustness()
        lines += ["## Settings", "", "```json", json.dumps(self.settings, indent=2), "```", ""]
        return "\n".join(lines)

    def _scores(self) -> list[str]:
        priced = any(row.cost is not None for row in self.rows)
        head = ["", "mean", "95 % interval", *self.queries, *(["USD per 1000"] if priced else []), "share", "gain", "p"]
        body = []
        for row in self.shown():
            cells = [row.name, f"{100 * row.mean:.2f}", "{:.1f} to {:.1f}".format(*(100 * v for v in row.interval))]
            cells += [f"{100 * row.benchmarks[name]:.1f}" for name in self.queries]
            if priced:
                cells.append("" if row.cost is None else f"{1000 * row.cost:.3f}")
            share = self.shares.get(row.name)
            cells.append("" if share is None else f"{100 * share:.0f} %")
            gain = row.gain
            cells.append("" if gain is None else "{:+.2f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in gain)))
            cells.append("" if row.p_value is None else _p(row.p_value).removeprefix("p = ").removeprefix("p "))
            body.append(cells)
        count = ", ".join(f"{name} {size}" for name, size in self.queries.items())
        text = (
            f"Percent; queries: {count}. The mean is over benchmarks, each counting alike. Best single and best per "
            "dataset were chosen on train and validation; the half oracle knows the best candidate of every other "
            "query. The share is of queries the composite sends there; the gain is the composite's over the line, "
            "paired on the same queries."
        )
        return ["## Scores", "", text, "", *_table(head, body), ""]

    def _metrics(self) -> list[str]:
        rows = []
        for name, value in self.metrics.items():
            interval = self.intervals.get(name)
            rows.append([name, f"{value:.4f}", "" if interval is None else "{:.4f} to {:.4f}".format(*interval)])
        text = ["PerfGain and CostSave are of the curve's best point, chosen on these queries."] if self.curves else []
        if absent := self.settings.get("without_known_cost") if self.curves else None:
            text.append(f"Not in the curves of cost and quality, because no cost is known: {', '.join(absent)}.")
        head = ["metric", "value", "95 % interval"]
        told = [" ".join(text), ""] if text else []
        return ["## Metrics", "", *told, *_table(head, rows), ""] if rows else []

    def _confusion(self) -> list[str]:
        if not self.confusion or len(self.shares) > _MOST_EXPERTS:
            return []
        names = list(self.shares)
        rows = [[name, *(f"{v:.0f}" for v in row)] for name, row in zip(names, self.confusion, strict=True)]
        return ["## Labels (down) and choices (across), queries", "", *_table(["", *names], rows), ""]

    def _robustness(self) -> list[str]:
        rows = [
            [entry["change"], f"{100 * entry['flipped']:.1f}", f"{100 * entry['lost']:+.1f}", str(entry["queries"])]
            for entry in self.robustness
        ]
        head = ["change of the text", "decisions flipped, %", "score lost, points", "queries"]
        return ["## Robustness", "", *_table(head, rows), ""] if rows else []


def _sentence(row: Row) -> str:
    gain, low, high = (100 * value for value in row.gain)
    told = f"{gain:+.2f} points ({low:+.2f} to {high:+.2f}, {_p(row.p_value)})"
    if row.p_value >= _SURE:
        return f"Not told apart from {row.name}: {told}."
    return f"{'Better' if gain > 0 else 'WORSE'} than {row.name}: {told}."


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
