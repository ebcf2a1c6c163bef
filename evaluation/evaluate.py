"""The composite on one side of a supervision, beside everything it has to beat."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data_prep.supervision import Supervision, supervision_of
from ..modeling.composite import Composite, load_composite, read_manifest
from ..modeling.errors import ExpertokenError
from ..modeling.files import atomic_file
from ..modeling.meta import library_versions
from ..train.features import cached_features
from ..train.tokens import problem_logits
from .metrics import benchmark_means, bootstrap_interval

logger = logging.getLogger(__name__)


@dataclass
class Row:
    """One line of the report.

    Attributes:
        name: of the router or the model.
        kind: composite, expert, baseline or bound (what no router can do without knowing the answers).
        mean: over benchmarks.
        interval: 95 %, bootstrap within benchmarks.
        benchmarks: mean per benchmark.
        gain: of the composite over this row, with its paired 95 % interval; None for the composite.
    """

    name: str
    kind: str
    mean: float
    interval: tuple[float, float]
    benchmarks: dict[str, float]
    gain: tuple[float, float, float] | None = None


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        rows: the composite first.
        shares: share of queries per candidate.
        queries: per benchmark.
        settings: what was evaluated, on what, how long it took.
    """

    rows: list[Row]
    shares: dict[str, float]
    queries: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def composite(self) -> Row:
        """The composite's row."""
        return self.rows[0]

    def row(self, name: str) -> Row:
        """A row by name."""
        return next(row for row in self.rows if row.name == name)

    def save(self, path: Path | str) -> None:
        """Write `report.json`."""
        with atomic_file(path) as aside:
            aside.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


def composite_logits(composite: Composite, supervision: Supervision, split: str) -> np.ndarray:
    """Logits of the composite's candidates on a side, `[N, C]`, by way of the feature cache."""
    features = cached_features(composite.meta, supervision.side(split)["messages"], label=f"{split} features")
    logits = problem_logits(composite.meta.rows, features, composite.meta.transform, with_self=composite.pool.has_self)
    return logits.numpy()


def candidate_scores(composite: Composite, supervision: Supervision, split: str) -> np.ndarray:
    """Scores `[N, C]` in the order of the composite's candidates.

    Raises:
        ExpertokenError: the supervision lacks a candidate.
    """
    absent = [name for name in composite.pool.names if name not in supervision.info.candidates]
    if absent:
        raise ExpertokenError(
            f"the supervision has no scores of {', '.join(absent)}; it has {', '.join(supervision.info.candidates)}"
        )
    columns = [supervision.info.candidates.index(name) for name in composite.pool.names]
    return supervision.scores(split)[:, columns]


def evaluate(
    composite: Composite | Path | str,
    data: Supervision | Path | str | None = None,
    split: str = "test",
    *,
    resamples: int = 5000,
    trust_remote_code: bool = False,
) -> Report:
    """Score a composite against every single candidate, simple baselines and the per-query oracle.

    A candidate that was not measured on a query scores 0 there; queries that nobody was measured on are left out.

    Args:
        composite: a folder, or a loaded one.
        data: a supervision folder, or a loaded one; the one it was trained on where not given (folders only).
        split: which side.
        resamples: of the bootstrap.
        trust_remote_code: allow the base model's repository to run its own code.

    Raises:
        ExpertokenError: the supervision lacks the side, or a candidate of the composite.
    """
    started = time.perf_counter()
    folder = None if isinstance(composite, Composite) else Path(composite)
    if isinstance(data, Supervision):
        supervision = data
    else:
        if folder is None and data is None:
            raise ExpertokenError("a composite in memory does not know its supervision; say which with `data`")
        supervision = supervision_of(read_manifest(folder), folder, data) if folder else Supervision.load(data)
    if folder is not None:
        composite = load_composite(folder, trust_remote_code=trust_remote_code)
    names = composite.pool.names
    raw = candidate_scores(composite, supervision, split)
    measured = ~np.isnan(raw).all(1)
    if not measured.any():
        raise ExpertokenError(f"no candidate of the composite was measured on the {split} side; nothing to compare")
    if not measured.all():
        logger.warning("%d queries that no candidate was measured on are left out", (~measured).sum())
    benchmarks = np.asarray(supervision.side(split)["benchmark"], dtype=str)[measured]
    scores = np.nan_to_num(raw[measured])
    chosen = composite_logits(composite, supervision, split)[measured].argmax(1)
    policies = {"composite": ("composite", scores[np.arange(len(scores)), chosen])}
    policies |= {name: ("expert", scores[:, index]) for index, name in enumerate(names)}
    policies |= _baselines(composite, supervision, scores, benchmarks)
    ours = policies["composite"][1]
    rows = []
    for name, (kind, values) in policies.items():
        means = benchmark_means(values, benchmarks)
        row = Row(
            name,
            kind,
            float(np.mean(list(means.values()))),
            bootstrap_interval(values, benchmarks, resamples=resamples),
            means,
        )
        if name != "composite":
            difference = ours - values
            gain = float(np.mean(list(benchmark_means(difference, benchmarks).values())))
            row.gain = (gain, *bootstrap_interval(difference, benchmarks, resamples=resamples))
        rows.append(row)
    shares = {name: float((chosen == index).mean()) for index, name in enumerate(names)}
    settings = {
        "split": split,
        "queries": len(scores),
        "resamples": resamples,
        "data_fingerprint": supervision.info.fingerprint,
        "base": composite.manifest.base,
        "training": composite.manifest.training,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": library_versions(),
    }
    queries = {str(name): int(count) for name, count in zip(*np.unique(benchmarks, return_counts=True), strict=True)}
    return Report(rows, shares, queries, settings)


def _baselines(
    composite: Composite, supervision: Supervision, scores: np.ndarray, benchmarks: np.ndarray
) -> Mapping[str, tuple[str, np.ndarray]]:
    """Best single and best per dataset (both chosen on train and validation), random, and the oracle."""
    sides = [name for name in ("train", "validation") if len(supervision.data[name])]
    learnt = np.nan_to_num(np.concatenate([candidate_scores(composite, supervision, name) for name in sides]))
    learnt_benchmarks = np.concatenate([np.asarray(supervision.side(name)["benchmark"], dtype=str) for name in sides])
    known = np.unique(learnt_benchmarks)
    means = np.stack([learnt[learnt_benchmarks == name].mean(0) for name in known])
    single = int(means.mean(0).argmax())
    best_of = {name: int(row.argmax()) for name, row in zip(known, means, strict=True)}
    per_dataset = np.array([best_of.get(name, single) for name in benchmarks])
    return {
        f"best single ({composite.pool.names[single]})": ("baseline", scores[:, single]),
        "best per dataset": ("baseline", scores[np.arange(len(scores)), per_dataset]),
        "random": ("baseline", scores.mean(1)),
        "oracle": ("bound", scores.max(1)),
    }
