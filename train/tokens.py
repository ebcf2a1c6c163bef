"""Method `tokens`: the backbone is frozen, so the candidates' rows solve a small convex problem on cached states."""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data_prep.labels import fill_unknown
from ..modeling.errors import require_extra
from ..modeling.logits import LogitTransform
from ..modeling.states import state_logits
from .objectives import OBJECTIVES
from .prior import prior_of
from .row_optimizer import Fixed, Problem, RowLoss, RowOptimizer

logger = logging.getLogger(__name__)

FOLDS = 5
_SMALL = 2**27  # multiplications in one pass over the data: one thread does fewer of them in milliseconds
_SEED = 0


@dataclass
class Fit:
    """Fitted rows with the result of cross-validation.

    Attributes:
        rows: `[K, d]` float32.
        l2: Strength chosen.
        path: Loss and score of each strength on held-out queries, which the fold's rows were not fitted on. Empty
            without folds.
        at_edge: True if the strength chosen is the strongest or the weakest of several.
        fold_losses: `[F]`, loss on each fold's held-out queries at the strength chosen. Empty without folds.
        loss: Loss of the final fit, with its penalty.
        iterations: Iterations of the final fit.
    """

    rows: torch.Tensor
    l2: float
    path: list[dict[str, float]] = field(default_factory=list)
    at_edge: bool = False
    fold_losses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    loss: float = float("nan")
    iterations: int = 0

    def edge(self) -> str | None:
        """Return a warning if the strength chosen is at the edge of the grid, else None."""
        if not self.at_edge:
            return None
        strengths = [entry["l2"] for entry in self.path]
        which, other = ("strongest", "stronger") if self.l2 == max(strengths) else ("weakest", "weaker")
        return f"--l2: {self.l2:g}, the {which} strength tried, has the least loss. Try {other} ones as well"

    @property
    def chosen(self) -> dict[str, float]:
        """Entry of `path` for the strength chosen."""
        return next((entry for entry in self.path if entry["l2"] == self.l2), {})


def _on_one_thread_where_small(fit: Callable[..., Fit]) -> Callable[..., Fit]:
    """Run a fit of a small problem on one thread, and of a large one on all cores if `all_cores` is set.

    If other processes use the cores too, threads wait for each other far longer than they compute. A fit on 500 states
    of a 135M model beside a busy job took 23 s with two threads and 0.2 s with one.
    """

    @wraps(fit)
    def run(problem: Problem, *arguments: Any, all_cores: bool = False, **options: Any) -> Fit:
        threadpoolctl = require_extra("threadpoolctl", "train")
        small = problem.states.hidden.size * problem.targets.shape[1] < _SMALL
        threads = 1 if small else _cores() if all_cores else None  # launchers limit a process to one core
        with threadpoolctl.threadpool_limits(threads) if threads else nullcontext():
            return fit(problem, *arguments, **options)

    return run


def _cores() -> int:
    """Return the number of cores that this process may use."""
    known = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(known(0)) if known else os.cpu_count() or 1


@_on_one_thread_where_small
def fit_rows(
    problem: Problem,
    *,
    objective: str,
    l2: Sequence[float],
    transform: LogitTransform,
    fixed: Fixed | None = None,
    company: torch.Tensor | None = None,
    prior: Problem | None = None,
    folds: int = FOLDS,
    max_iterations: int = 300,
) -> Fit:
    """Fit rows on cached states with the L2 strength that cross-validation chooses.

    Strengths are compared by the objective's loss on held-out queries, not by the score of the decisions. A score moves
    in steps of one query. Under `correctness` the candidate with the greatest chance may be right though all chances
    are wrong. The final fit is on all queries.

    Args:
        problem: Problem to fit.
        objective: Key of `OBJECTIVES`.
        l2: Strengths to try. They are solved from the strongest, each starting from the solution before it.
        transform: Cap and scale that the model applies to logits.
        fixed: Rows that are not fitted, or None.
        company: `[F, d]` rows outside the problem that new rows are drawn towards, or None.
        prior: Prior to fit together with the problem. Defaults to `prior.prior_of`.
        folds: Number of parts to hold out in turn. With 0, or with fewer queries than folds, the first of `l2` is used.
        max_iterations: Iterations of L-BFGS per strength.
        all_cores: If true, a large problem may use all cores, not only this process's share of them.
    """
    solver = _Solver(problem, objective, transform, fixed, company, prior, max_iterations)
    parts = _folds(problem, folds)
    if parts is None:
        [solved] = solver.path(problem.weights, [l2[0]])
        return Fit(solver.rows(solved[0]), l2[0], loss=solved[1], iterations=solved[2])
    strengths = sorted(set(l2), reverse=True)
    path, losses = _cross_validated(solver, strengths, parts)
    best = min(path, key=lambda entry: entry["validation_loss"])["l2"]
    at_edge = len(strengths) > 1 and best in (strengths[0], strengths[-1])
    found = solver.path(problem.weights, [strength for strength in strengths if strength >= best])[-1]
    return Fit(solver.rows(found[0]), best, path, at_edge, losses[strengths.index(best)], found[1], found[2])


class _Solver:
    """Solver of one problem, for several strengths of L2 and several weights of its queries.

    Weight 0 leaves a query out, for cross-validation.
    """

    def __init__(
        self,
        problem: Problem,
        objective: str,
        transform: LogitTransform,
        fixed: Fixed | None,
        company: torch.Tensor | None,
        prior: Problem | None,
        max_iterations: int,
    ) -> None:
        self.problem, self.objective, self.transform, self.fixed = problem, objective, transform, fixed
        self._prior = prior
        options: dict[str, Any] = {"fixed": fixed, "company": company, "max_iterations": max_iterations}
        self._optimizer = RowOptimizer(problem, objective, transform, **options)
        # The gradient of expected_score vanishes far from a solution, so every strength starts at the convex solution.
        convex = objective == "expected_score"
        self._begin = RowOptimizer(problem, "cross_entropy", transform, **options) if convex else None

    def rows(self, coordinates: np.ndarray) -> torch.Tensor:
        """Return the rows `[K, d]` of coordinates."""
        return self._optimizer.rows(coordinates)

    def path(self, weights: np.ndarray, strengths: Sequence[float]) -> list[tuple[np.ndarray, float, int]]:
        """Return coordinates, loss and iterations for each strength, with these weights of the queries."""
        weighted = replace(self.problem, weights=weights)
        problems = [weighted, prior_of(weighted) if self._prior is None else self._prior]
        begin = np.zeros(self._optimizer.shape)
        found = []
        for strength in strengths:
            if self._begin is not None:
                begin = self._begin.solve(problems, strength, begin)[0]
            solved = self._optimizer.solve(problems, strength, begin)
            logger.debug("l2 %g: loss %g after %d iterations", strength, *solved[1:])
            if self._begin is None:
                begin = solved[0]  # a start near its solution saves the next, weaker strength iterations
            found.append(solved)
        return found

    def logits(self, rows: torch.Tensor, part: Problem) -> torch.Tensor:
        """Return the logits of all candidates on a part of the problem, `[N, C]`."""
        if self.fixed is not None:
            rows = self.fixed.rows.float().index_copy(0, torch.tensor(self.fixed.free), rows)
        return state_logits(rows, part.states, self.transform)


def _folds(problem: Problem, count: int) -> list[np.ndarray] | None:
    """Return the rows of each fold, or None if there are too few queries."""
    groups = np.arange(len(problem.weights)) if problem.groups is None else problem.groups
    ids, codes = np.unique(groups, return_inverse=True)
    if count < 2 or len(ids) < count:
        return None
    fold = np.random.default_rng(_SEED).permutation(len(ids)) % count
    return [np.flatnonzero(fold[codes] == number) for number in range(count)]


def _cross_validated(
    solver: _Solver, strengths: Sequence[float], folds: list[np.ndarray]
) -> tuple[list[dict[str, float]], np.ndarray]:
    """Return loss and score of each strength on held-out queries, and the loss in each fold `[S, F]`."""
    problem = solver.problem
    sums = np.zeros((len(strengths), len(folds), 2))
    chosen = np.zeros((len(strengths), len(problem.weights)), dtype=int)
    for number, rows in enumerate(tqdm(folds, desc="fit", unit="fold", leave=False, delay=2)):
        weights = problem.weights.copy()
        weights[rows] = 0
        held = problem.take(rows)
        loss = RowLoss([held], OBJECTIVES[solver.objective], solver.transform, solver.fixed)
        for place, (coordinates, _, _) in enumerate(solver.path(weights, strengths)):
            found = solver.rows(coordinates)
            sums[place, number] = loss.sums(found)[:2]
            chosen[place, rows] = solver.logits(found, held).argmax(-1).numpy()
    path = [
        {
            "l2": strength,
            "validation_loss": float(total / (mass or 1.0)),
            "validation_score": mean_score(choice, problem.scores, problem.benchmarks),
        }
        for strength, (total, mass), choice in zip(strengths, sums.sum(1), chosen, strict=True)
    ]
    return path, sums[..., 0] / np.maximum(sums[..., 1], 1e-9)


def mean_score(chosen: np.ndarray, scores: np.ndarray, benchmarks: Sequence[str] | np.ndarray) -> float:
    """Return the mean over benchmarks of the mean score (or utility) of the chosen candidates.

    An unknown score counts as the candidate's mean in the benchmark. See `labels.fill_unknown`.
    """
    names = np.asarray(benchmarks, dtype=str)
    got = fill_unknown(scores, names)[np.arange(len(chosen)), chosen]
    return float(np.mean([got[names == name].mean() for name in np.unique(names)]))
