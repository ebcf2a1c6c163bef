"""One side of a supervision as an evaluation sees it, and ways to choose on it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data_prep.supervision import Supervision
from ..modeling.chat import text_of
from ..modeling.composite import Composite
from ..modeling.errors import ExpertokenError
from ..modeling.states import state_logits, states_of

logger = logging.getLogger(__name__)


@dataclass
class RouterResult:
    """What one way to choose reaches on the queries of a split.

    Attributes:
        kind: see `report.Result`.
        values: `[N]` score on each query; of a random choice its expectation.
        costs: `[N]` USD on each query, NaN where a candidate without a known cost was chosen; None without any costs.
        predicted: `[N, C]` what a router expects of the candidates, for the trade-off of cost and quality.
        setting: what was chosen on validation.
    """

    kind: str
    values: np.ndarray
    costs: np.ndarray | None = None
    predicted: np.ndarray | None = None
    setting: Any = None


@dataclass(frozen=True)
class Split:
    """One side of the supervision, in the order of the composite's candidates.

    Attributes:
        raw: scores `[N, C]`, NaN where not measured.
        costs: `[N, C]` USD, or None.
        benchmarks: `[N]` names.
        features: `[N, d]` of the meta LLM.
        logits: `[N, C]` of the composite.
        targets: `[N, C]` of the labels.
        weights: `[N]` of the labels; 0 where a query says nothing about who should answer.
        prompts: the last message of each conversation.
    """

    raw: np.ndarray
    costs: np.ndarray | None
    benchmarks: np.ndarray
    features: np.ndarray
    logits: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    prompts: list[str]

    @property
    def scores(self) -> np.ndarray:
        """Scores with 0 where not measured."""
        return np.nan_to_num(self.raw)

    def choose(self, chosen: np.ndarray, kind: str, **more: Any) -> RouterResult:
        """Return the result of these choices."""
        rows = np.arange(len(chosen))
        return RouterResult(
            kind, self.scores[rows, chosen], None if self.costs is None else self.costs[rows, chosen], **more
        )

    def take(self, rows: np.ndarray) -> "Split":
        """Some of its queries."""
        arrays = {key: value[rows] for key, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **arrays, prompts=[self.prompts[int(row)] for row in rows])


def read_split(composite: Composite, supervision: Supervision, name: str, *, states: bool = True) -> Split:
    """A side with the composite's logits, by way of the cache of states. Queries nobody was measured on are left out.

    Args:
        composite: whose candidates and states.
        supervision: that has the side.
        name: of the side.
        states: whether features and logits are needed; without them they are empty.

    Raises:
        ExpertokenError: the supervision lacks the side or a candidate, or nobody was measured on it.
    """
    columns = supervision.columns_of(composite.pool.names)
    side = supervision.side(name)
    raw, costs = supervision.scores(name)[:, columns], supervision.costs(name)
    kept = np.flatnonzero(~np.isnan(raw).all(1))
    if not len(kept):
        raise ExpertokenError(f"no candidate of the composite was measured on the {name} side; nothing to compare")
    if len(kept) < len(raw):
        logger.warning("%d queries that no candidate was measured on are left out", len(raw) - len(kept))
    messages = side["messages"]
    hidden = logits = np.zeros((len(raw), 0), np.float32)
    if states:
        meta = composite.meta
        found = states_of(meta, messages, label=f"{name} states")
        hidden = np.asarray(found.hidden)
        logits = state_logits(meta.rows, found, meta.transform, with_self=composite.pool.has_self).numpy()
    targets, _, weights = supervision.arrays(name)
    return Split(
        raw[kept],
        None if costs is None else costs[kept][:, columns],
        supervision.benchmarks(name)[kept],
        hidden[kept],
        logits[kept],
        targets[kept][:, columns],
        weights[kept],
        [text_of(messages[int(row)][-1]) for row in kept],
    )


def expected_costs(known: Sequence[Split], test: Split) -> np.ndarray:
    """What each candidate costs on average, `[C]` USD per query, NaN where nothing is known.

    From the learning sides, as a router may know beforehand; from the test side only where those say nothing.
    """
    width = test.raw.shape[1]
    sides = [side.costs for side in known if side.costs is not None]
    means = _means(np.concatenate(sides)) if sides else np.full(width, np.nan)
    return means if test.costs is None else np.where(np.isnan(means), _means(test.costs), means)


def _means(costs: np.ndarray) -> np.ndarray:
    count = (~np.isnan(costs)).sum(0)
    return np.where(count > 0, np.nansum(costs, 0) / np.maximum(count, 1), np.nan)
