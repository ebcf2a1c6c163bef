"""Splits of a supervision for evaluation, and results of routers on them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..data_prep.labels import fill_unknown
from ..data_prep.supervision import Supervision
from ..modeling.chat import Query, text_of
from ..modeling.composite import Composite
from ..modeling.errors import ExpertokenError
from ..modeling.states import cached_states, state_logits

logger = logging.getLogger(__name__)


@dataclass
class RouterResult:
    """Result of one router on the queries of a split.

    Attributes:
        kind: Kind of router, see `report.Result`.
        values: `[N]` score on each query, or its expectation for a random candidate.
        costs: `[N]` USD on each query, NaN where the chosen candidate has no known cost. None without any costs.
        predicted: `[N, C]` scores that a router expects of the candidates, for the trade-off of cost and quality.
        setting: Setting chosen on validation.
        coverage: Share of the queries on which the chosen candidate was measured. None for a router without decisions.
        seconds: Time of a learnt router for all N decisions, features excluded.
    """

    kind: str
    values: np.ndarray
    costs: np.ndarray | None = None
    predicted: np.ndarray | None = None
    setting: Any = None
    coverage: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Split:
    """One split of the supervision, in the order of the composite's candidates.

    Attributes:
        raw: Scores `[N, C]`: 0 where a candidate has none in the benchmark, NaN where its score is unknown.
        absent: Mask of candidates without a score in the benchmark, `[N, C]` bool.
        costs: `[N, C]` USD, or None.
        benchmarks: `[N]` names.
        subjects: `[N]` names, empty where a query has none.
        features: `[N, d]` states of the meta LLM.
        logits: `[N, C]` logits of the composite.
        targets: `[N, C]` targets of the labels.
        weights: `[N]` weights of the labels, 0 where a query does not show which candidate should answer.
        lengths: Tokens of each conversation, `[N]`.
        queries: Conversations in the form that the meta LLM reads. Empty without states.
        messages: Conversations.
        prompts: Last message of each conversation.
    """

    raw: np.ndarray
    absent: np.ndarray
    costs: np.ndarray | None
    benchmarks: np.ndarray
    subjects: np.ndarray
    features: np.ndarray
    logits: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    lengths: np.ndarray
    queries: list[Query]
    messages: list[list[dict[str, Any]]]
    prompts: list[str]

    @cached_property
    def scores(self) -> np.ndarray:
        """Scores without gaps: an unknown one is the candidate's mean in the benchmark, see `labels.fill_unknown`."""
        return fill_unknown(self.raw, self.benchmarks)

    @property
    def measured(self) -> np.ndarray:
        """Mask of the measured candidates, `[N, C]` bool."""
        return ~np.isnan(self.raw) & ~self.absent

    def choose(self, chosen: np.ndarray, kind: str, **more: Any) -> RouterResult:
        """Return the result of these decisions."""
        rows = np.arange(len(chosen))
        costs = None if self.costs is None else self.costs[rows, chosen]
        coverage = float(self.measured[rows, chosen].mean())
        return RouterResult(kind, self.scores[rows, chosen], costs, coverage=coverage, **more)

    def single(self, index: int) -> RouterResult:
        """Return the result of one candidate alone, NaN in benchmarks without its scores."""
        found = self.choose(np.full(len(self.raw), index), "expert")
        return replace(found, values=np.where(self.absent[:, index], np.nan, found.values))

    def take(self, rows: np.ndarray) -> "Split":
        """Return the split with the queries at these rows."""
        arrays = {key: value[rows] for key, value in vars(self).items() if isinstance(value, np.ndarray)}
        lists: dict[str, Any] = {
            key: [value[int(row)] for row in rows]
            for key, value in vars(self).items()
            if isinstance(value, list) and value
        }
        return replace(self, **arrays, **lists)


def read_split(composite: Composite, supervision: Supervision, name: str, *, states: bool = True) -> Split:
    """Read a split with the composite's logits, using cached states. Queries without any score are left out.

    Args:
        composite: Composite that gives candidates and states.
        supervision: Supervision with the split.
        name: Name of the split.
        states: If false, features and logits are empty and no states are computed.

    Raises:
        ExpertokenError: The supervision lacks the split or a candidate, or no candidate was measured on the split.
    """
    columns = supervision.columns_of(composite.pool.names)
    side = supervision.side(name)
    raw, costs = supervision.scores(name)[:, columns], supervision.costs(name)
    absent = supervision.absent(name)[:, columns]
    kept = np.flatnonzero(~np.isnan(raw).all(1))
    if not len(kept):
        raise ExpertokenError(
            f"expected scores of the composite's candidates on the {name} split, found none. Prepare the supervision "
            "with their results"
        )
    if len(kept) < len(raw):
        logger.warning("%d queries on which no candidate was measured are left out", len(raw) - len(kept))
    messages = supervision.conversations(name)
    hidden = logits = np.zeros((len(raw), 0), np.float32)
    lengths = np.zeros(len(raw), dtype=int)
    queries: list[Query] = []
    if states:
        meta = composite.meta
        queries = supervision.queries(name, meta)
        found = cached_states(meta, queries, label=f"{name} states")
        hidden, lengths = np.asarray(found.hidden), np.array([len(query) + query.cut for query in queries])
        logits = state_logits(meta.rows, found, meta.transform).numpy()
    targets, _, weights = supervision.arrays(name)
    return Split(
        np.where(absent, 0, raw)[kept],
        absent[kept],
        None if costs is None else costs[kept][:, columns],
        supervision.benchmarks(name)[kept],
        np.array([subject or "" for subject in side["subject"]], dtype=str)[kept],
        hidden[kept],
        logits[kept],
        targets[kept][:, columns],
        weights[kept],
        lengths[kept],
        [queries[int(row)] for row in kept] if states else [],
        [messages[int(row)] for row in kept],
        [text_of(messages[int(row)][-1], placeholders=True) for row in kept],
    )


def expected_costs(known: Sequence[Split], test: Split) -> np.ndarray:
    """Return the mean cost of each candidate, `[C]` USD per query, NaN if unknown.

    The costs come from the splits to learn from, since a router may know these beforehand. The test split is used only
    for candidates without a cost there.
    """
    width = test.raw.shape[1]
    sides = [side.costs for side in known if side.costs is not None]
    means = _means(np.concatenate(sides)) if sides else np.full(width, np.nan)
    return means if test.costs is None else np.where(np.isnan(means), _means(test.costs), means)


def _means(costs: np.ndarray) -> np.ndarray:
    count = (~np.isnan(costs)).sum(0)
    return np.where(count > 0, np.nansum(costs, 0) / np.maximum(count, 1), np.nan)
