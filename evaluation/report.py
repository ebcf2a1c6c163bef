"""Report of an evaluation, as an object, as JSON and as Markdown with pictures."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.errors import ExpertokenError, did_you_mean, one_line
from ..modeling.files import atomic_file
from ..modeling.model_card import BROKEN, add_scores

logger = logging.getLogger(__name__)

BLIND = "blind mixture"
"""Name of the line that sends the composite's share of queries to each candidate, independent of the query."""

WITHOUT_PICTURES = "without pictures"
"""Name of the line of the composite's own decisions on the same questions without their pictures."""

_TRIVIAL = ("names", "words", "untrained", "text-only", BLIND, WITHOUT_PICTURES)
_SURE = 0.05
_FEW = 30  # queries: a bootstrap of fewer is too narrow
_BOUNDS = (_SURE / 2, 1 - _SURE / 2)
_MOST_EXPERTS = 30  # readable number of lines in a table


@dataclass(frozen=True)
class Gain:
    """Gain of the composite over a router or a model, paired on the same queries.

    Attributes:
        difference: Difference of the mean scores.
        interval: 95 % interval of the difference, bootstrap within benchmarks.
        p_value: Two-sided p-value that the difference is zero.
        p_holm: The p-value adjusted for the number of baselines and routers in the comparison (Holm). None for experts
            alone and bounds.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    p_holm: float | None = None

    @property
    def p(self) -> float:
        """P-value to judge by: the adjusted one if there is one."""
        return self.p_value if self.p_holm is None else self.p_holm


@dataclass
class Result:
    """Result of one router or model: a line of the report.

    Attributes:
        name: Name of the router or the model.
        kind: `composite`, `expert`, `baseline`, `router` (a learnt one) or `bound` (which needs the answers).
        mean_score: Mean over benchmarks of the mean score.
        mean_score_interval: 95 % interval of the mean score, bootstrap within benchmarks.
        score_by_benchmark: Mean score on each benchmark.
        usd_per_query: Mean cost, None if unknown.
        composite_gain: Gain of the composite over this result. None for the composite.
        hyperparameter: Setting of a learnt router, chosen on validation.
        coverage: Share of the queries on which the chosen candidate was measured. None for results without decisions.
        milliseconds: Time of a learnt router per query, features excluded.
    """

    name: str
    kind: str
    mean_score: float
    mean_score_interval: tuple[float, float]
    score_by_benchmark: dict[str, float]
    usd_per_query: float | None = None
    composite_gain: Gain | None = None
    hyperparameter: Any = None
    coverage: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class CalibrationBin:
    """Queries with similar confidence.

    Attributes:
        mean_confidence: Mean confidence of the composite.
        mean_outcome: Mean of the outcome that `settings` names.
        queries: Number of queries.
    """

    mean_confidence: float
    mean_outcome: float
    queries: int


@dataclass
class Report:
    """Results of an evaluation, with the fields of `report.json`.

    Attributes:
        results: Result of the composite, then the results that it is compared with.
        share_of_queries: Share of the queries that the composite sends to each candidate.
        queries_by_benchmark: Number of queries of each benchmark.
        metrics: Metrics from the literature by name. Only finite values are kept.
        metric_intervals: 95 % intervals of metrics, where computed, bootstrap within benchmarks.
        findings: Sentences about metrics other than the mean score.
        confusion_matrix: Queries by label (rows) and decision (columns), in the order of `share_of_queries`.
        calibration_bins: Confidence and outcome of queries with similar confidence.
        cost_quality_curves: Hull of each router's trade-off: `usd_per_query` and `mean_score`.
        robustness: Share of decisions flipped, score lost and number of queries for each change of the text.
        chats: Score, change against the bare question and share of equal decisions for each context of a chat.
        settings: Composite, data, versions and duration of the evaluation.
    """

    results: list[Result]
    share_of_queries: dict[str, float]
    queries_by_benchmark: dict[str, int]
    metrics: dict[str, float] = field(default_factory=dict)
    metric_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    confusion_matrix: list[list[float]] = field(default_factory=list)
    calibration_bins: list[CalibrationBin] = field(default_factory=list)
    cost_quality_curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    robustness: list[dict[str, Any]] = field(default_factory=list)
    chats: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def composite(self) -> Result:
        """Result of the composite."""
        return self.results[0]

    def row(self, name: str) -> Result:
        """Return a result by name.

        Raises:
            ExpertokenError: The report has no result of that name.
        """
        found = {row.name: row for row in self.results}
        if name not in found:
            raise ExpertokenError(f"the report has no line {name!r}, {did_you_mean(name, found)}")
        return found[name]

    def add(self, name: str, value: float, resampled: np.ndarray | None = None) -> None:
        """Add a metric with the interval of its resampled values. A metric that is not finite is skipped."""
        if not math.isfinite(value):
            return
        self.metrics[name] = float(value)
        draws = resampled[np.isfinite(resampled)] if resampled is not None else ()
        if len(draws):
            low, high = np.quantile(draws, _BOUNDS)
            self.metric_intervals[name] = (float(low), float(high))

    def shown(self) -> list[Result]:
        """Return the results that tables show. Of a large pool these are the best experts, `report.json` has all."""
        experts = sorted((row for row in self.results if row.kind == "expert"), key=lambda row: -row.mean_score)
        left_out = {row.name for row in experts[_MOST_EXPERTS:]}
        return [row for row in self.results if row.kind != "expert" or row.name not in left_out]

    def verdict(self) -> list[str]:
        """Return sentences that compare the composite with best single, best per dataset, trivial and best routers."""
        rivals = [row for row in self.results if row.name.startswith("best ") or row.name in _TRIVIAL]
        routers = [row for row in self.results if row.kind == "router" and row.name not in _TRIVIAL]
        if routers:
            rivals.append(max(routers, key=lambda row: row.mean_score))
        return [_sentence(row) for row in rivals] + self.findings

    def save(self, path: Path | str) -> None:
        """Write `report.json`."""
        with atomic_file(path) as aside:
            aside.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    def save_folder(self, folder: Path | str, pictures: Sequence[Path] = ()) -> None:
        """Write `report.json`, and `report.md` with links to the pictures drawn by `plots.draw_report`."""
        folder = Path(folder)
        self.save(folder / "report.json")
        with atomic_file(folder / "report.md") as aside:
            aside.write_text(self.markdown([file.name for file in pictures]), "utf-8")

    def add_to_card(self, composite: Path | str) -> None:
        """Write the composite's scores into the model card in its folder, where the Hugging Face Hub reads them."""
        scores = {"mean over benchmarks": self.composite.mean_score, **self.composite.score_by_benchmark}
        try:
            add_scores(Path(composite), scores, self.settings["split"])
        except BROKEN as error:  # a card that can't be written must not cost the report
            logger.warning("The scores are not in the model card of %s: %s", composite, one_line(error))

    def markdown(self, pictures: list[str] | None = None) -> str:
        """Return the report as Markdown, with links to the pictures beside it."""
        lines = ["# Evaluation", "", *(f"- {sentence}" for sentence in self.verdict()), ""]
        lines += [f"![{name.removesuffix('.png')}]({name})" for name in pictures or ()] + [""]
        lines += self._scores() + self._metrics() + self._confusion() + self._chats() + self._robustness()
        lines += ["## Settings", "", "```json", json.dumps(self.settings, indent=2), "```", ""]
        return "\n".join(lines)

    def _scores(self) -> list[str]:
        priced = any(row.usd_per_query is not None for row in self.results)
        gaps = any(row.coverage is not None and row.coverage < 1 for row in self.results)
        timed = any(row.milliseconds is not None for row in self.results)
        head = [
            "",
            "mean",
            "95 % interval",
            *(f"{name} (n = {count})" for name, count in self.queries_by_benchmark.items()),
            *(["measured"] if gaps else []),
            *(["USD per 1000"] if priced else []),
            "share",
            "gain",
            "p",
            *(["ms"] if timed else []),
        ]
        body = []
        for row in self.shown():
            cells = [
                row.name,
                f"{100 * row.mean_score:.2f}",
                "{:.1f} to {:.1f}".format(*(100 * v for v in row.mean_score_interval)),
            ]
            means = (row.score_by_benchmark.get(name) for name in self.queries_by_benchmark)
            cells += ["" if mean is None else f"{100 * mean:.1f}" for mean in means]
            if gaps:
                cells.append("" if row.coverage is None else f"{100 * row.coverage:.0f} %")
            if priced:
                cells.append("" if row.usd_per_query is None else f"{1000 * row.usd_per_query:.3f}")
            share = self.share_of_queries.get(row.name)
            cells.append("" if share is None else f"{100 * share:.0f} %")
            gain = row.composite_gain
            cells.append("" if gain is None else "{} ({})".format(*_points(gain, 1)))
            cells.append("" if gain is None else _p(gain.p).removeprefix("p = ").removeprefix("p "))
            if timed:
                cells.append("" if row.milliseconds is None else f"{row.milliseconds:.2f}")
            body.append(cells)
        text = (
            "Scores are in percent, and n is the number of queries. The mean is over benchmarks with equal weights. "
            "Best single and best per dataset were chosen on train and validation. The half oracle is an expectation: "
            "the best candidate with probability 1/2, else one at random. Share is the share of queries that the "
            "composite sends to a candidate. Gain is the gain of the composite over the line, paired on the same "
            "queries, with an interval for this line alone. The p-value is adjusted for the number of baselines and "
            "routers (Holm). The blind mixture sends as many queries to each candidate as the composite, independent "
            "of the query. `names` sees only the names of benchmark and subject, `words` only the words of the "
            "question."
        )
        if few := [f"{name} ({count})" for name, count in self.queries_by_benchmark.items() if count < _FEW]:
            text += f" Intervals are too narrow on few queries, fewer than {_FEW}: {', '.join(few)}."
        if timed:
            text += " Milliseconds are a learnt router's time per query, features excluded."
        if gaps:
            text += (
                " Measured is the share of the queries on which the chosen candidate has a score. On other queries "
                "its mean in the benchmark counts. A benchmark without scores of a model is left out of the model's "
                "own line. If a router chooses the model there, it counts as wrong."
            )
        return ["## Scores", "", text, "", *_table(head, body), ""]

    def _metrics(self) -> list[str]:
        rows = []
        for name, value in self.metrics.items():
            interval = self.metric_intervals.get(name)
            rows.append([name, f"{value:.4f}", "" if interval is None else "{:.4f} to {:.4f}".format(*interval)])
        text = (
            ["PerfGain and CostSave are measured at the curve's best point, chosen on these queries."]
            if self.cost_quality_curves
            else []
        )
        if absent := self.settings.get("without_known_cost") if self.cost_quality_curves else None:
            text.append(f"Left out of the curves of cost and quality, because of unknown costs: {', '.join(absent)}.")
        head = ["metric", "value", "95 % interval"]
        told = [" ".join(text), ""] if text else []
        return ["## Metrics", "", *told, *_table(head, rows), ""] if rows else []

    def _confusion(self) -> list[str]:
        if not self.confusion_matrix or len(self.share_of_queries) > _MOST_EXPERTS:
            return []
        names = list(self.share_of_queries)
        rows = [[name, *(f"{v:.0f}" for v in row)] for name, row in zip(names, self.confusion_matrix, strict=True)]
        return ["## Queries by label (rows) and decision (columns)", "", *_table(["", *names], rows), ""]

    def _chats(self) -> list[str]:
        rows = [
            [
                entry["context"],
                f"{100 * entry['score']:.1f}",
                f"{100 * entry['change']:+.1f}",
                "{:+.1f} to {:+.1f}".format(*(100 * bound for bound in entry["interval"])),
                f"{100 * entry['same_choice']:.0f} %",
                str(entry["queries"]),
            ]
            for entry in self.chats
        ]
        head = ["context", "score", "change", "95 % interval", "same decision", "queries"]
        text = (
            "The same questions in a chat. A follow-up has no content of its own and refers to the question before it."
        )
        return ["## In chats", "", text, "", *_table(head, rows), ""] if rows else []

    def _robustness(self) -> list[str]:
        rows = [
            [
                entry["change"],
                f"{100 * entry['share_flipped']:.1f}",
                f"{100 * entry['score_lost']:+.1f}",
                str(entry["queries"]),
            ]
            for entry in self.robustness
        ]
        head = ["change of the query", "decisions flipped, %", "score lost, points", "queries"]
        return ["## Robustness", "", *_table(head, rows), ""] if rows else []


def _points(gain: Gain, interval_digits: int) -> tuple[str, str]:
    """Return a gain and its interval as text, in percentage points."""
    low, high = (f"{100 * bound:+.{interval_digits}f}" for bound in gain.interval)
    return f"{100 * gain.difference:+.2f}", f"{low} to {high}"


def _sentence(row: Result) -> str:
    gain = row.composite_gain
    assert gain is not None
    points, interval = _points(gain, 2)
    told = f"{points} points ({interval}, {_p(gain.p)})"
    if row.coverage is not None and row.coverage < 1:
        told += f". It was measured on {100 * row.coverage:.0f} % of the queries, and counts as wrong on the others"
    if gain.p >= _SURE:
        return f"Not significantly different from {row.name}: {told}."
    return f"{'Better' if gain.difference > 0 else 'WORSE'} than {row.name}: {told}."


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
