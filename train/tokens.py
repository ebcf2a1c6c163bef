"""Method `tokens`: the backbone is frozen, so the expert rows solve a small convex problem on cached states."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..modeling.errors import require_extra
from ..modeling.logits import LogitTransform
from ..modeling.states import state_logits
from .objectives import OBJECTIVES
from .row_optimizer import Problem, RowLoss, RowOptimizer

logger = logging.getLogger(__name__)

_SMALL = 2**27  # multiplications of one pass over the data, below which one thread does it in milliseconds


@dataclass
class Fit:
    """Rows and how they were chosen.

    Attributes:
        rows: `[K, d]` float32.
        l2: the strength chosen.
        path: for each strength its losses and its validation score.
        coordinates: of the rows in their `RowSpace`, for a further fit that starts there.
    """

    rows: torch.Tensor
    l2: float
    path: list[dict[str, float]] = field(default_factory=list)
    coordinates: np.ndarray | None = None


def _on_one_thread_where_small(fit: Callable[..., Fit]) -> Callable[..., Fit]:
    """Run a fit of a small problem on one thread.

    Where others use the cores too, threads wait for each other far longer than they compute: 500 states of a 135M model
    beside a busy job took 23 s with two threads, 0.2 s with one.
    """

    @wraps(fit)
    def run(train: Problem, *arguments: Any, **options: Any) -> Fit:
        threadpoolctl = require_extra("threadpoolctl", "train")
        small = train.states.hidden.size * train.targets.shape[1] < _SMALL
        with threadpoolctl.threadpool_limits(1) if small else nullcontext():
            return fit(train, *arguments, **options)

    return run


@_on_one_thread_where_small
def fit_rows(
    train: Problem,
    validation: Problem | None,
    *,
    objective: str,
    l2: Sequence[float],
    transform: LogitTransform,
    with_self: bool,
    fixed_rows: torch.Tensor | None = None,
    max_iterations: int = 300,
) -> Fit:
    """Fit expert rows on cached states, for each L2 strength; fit the best one again with validation's queries too.

    The final fit wastes nothing: once the strength is chosen, the validation side is as good to learn from as any. The
    losses and scores in `Fit.path` are from before, when validation was unseen.

    Args:
        train: what is fitted.
        validation: what chooses the strength; without it, the first of `l2` is used.
        objective: a key of `OBJECTIVES`.
        l2: strengths; solved from the strongest, each starting from the one before.
        transform: what the model does to logits.
        with_self: whether the last candidate is self.
        fixed_rows: `[F, d]` rows of the first F candidates, which stay as they are.
        max_iterations: of L-BFGS, per strength.
    """
    options: dict[str, Any] = {"transform": transform, "with_self": with_self, "fixed_rows": fixed_rows}
    optimizer = RowOptimizer(train, objective, max_iterations=max_iterations, **options)
    begin = np.zeros(optimizer.shape)
    if objective == "expected_score":
        # Its gradient vanishes far from a solution, so every strength starts at the convex problem's.
        convex = fit_rows(train, validation, objective="cross_entropy", l2=l2, max_iterations=max_iterations, **options)
        assert convex.coordinates is not None
        begin = convex.coordinates
    elif with_self:
        begin[:, -1] = float(np.mean(train.states.log_mass))
    strengths = sorted(set(l2), reverse=True) if validation else [l2[0]]
    fits = []
    for strength in tqdm(strengths, desc="fit", unit="l2", leave=False, disable=len(strengths) == 1):
        found, value, iterations = optimizer.solve([train], strength, begin)
        if objective != "expected_score":
            begin = found  # the next, weaker strength is solved sooner from here
        rows = optimizer.rows(found)
        entry: dict[str, float] = {"l2": strength, "train_loss": value, "iterations": iterations}
        if validation:
            entry |= assess(rows, validation, objective, **options)
        logger.debug("l2 %g: %s", strength, entry)
        fits.append(Fit(rows, strength, [entry], found))
    path = [fit.path[0] for fit in fits]
    best = max(
        fits, key=lambda fit: (fit.path[0].get("validation_score", 0.0), -fit.path[0].get("validation_loss", 0.0))
    )
    if validation is None:
        return replace(best, path=path)
    assert best.coordinates is not None
    final, _, _ = optimizer.solve([train, validation], best.l2, best.coordinates)
    return Fit(optimizer.rows(final), best.l2, path, final)


def assess(
    rows: torch.Tensor,
    problem: Problem,
    objective: str,
    transform: LogitTransform,
    *,
    with_self: bool,
    fixed_rows: torch.Tensor | None = None,
) -> dict[str, float]:
    """Loss and score on a validation side."""
    with torch.no_grad():
        loss = RowLoss([problem], OBJECTIVES[objective], transform, with_self=with_self, fixed_rows=fixed_rows)(rows)
    every = rows if fixed_rows is None else torch.cat([fixed_rows, rows])
    logits = state_logits(every, problem.states, transform, with_self=with_self)
    return {
        "validation_loss": float(loss),
        "validation_score": mean_score(logits.argmax(-1).numpy(), problem.scores, problem.benchmarks),
    }


def mean_score(chosen: np.ndarray, scores: np.ndarray, benchmarks: Sequence[str] | np.ndarray) -> float:
    """Mean over benchmarks of the mean score (or utility) of the chosen candidates.

    One that was not measured on a query scores 0 there, or as little as the worst where utilities are negative.
    """
    got = scores[np.arange(len(chosen)), chosen]
    got = np.where(np.isnan(got), np.nan_to_num(scores).min(1), got)
    names = np.asarray(benchmarks, dtype=str)
    return float(np.mean([got[names == name].mean() for name in np.unique(names)]))
