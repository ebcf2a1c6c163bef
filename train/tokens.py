"""Method `tokens`: the backbone is frozen, so the expert rows are the solution of a small convex problem on states.

The states come from one forward pass (`features.py`); the rows from L-BFGS over them, streamed in chunks, so that
memory stays bounded however many there are.
"""

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
from ..modeling.objectives import OBJECTIVES
from .features import Features

logger = logging.getLogger(__name__)

_CHUNK = 16384  # states per step of the stream: 16384 x 4096 float32 are 256 MiB
_SHAPE = 20_000  # states, at least, that the shape of all is read off
_CURVATURE = 0.1  # of a logistic loss at chances of 0.1 to 0.9 it is 0.09 to 0.25; steps vary little from 0.03 to 0.25
_SMALL = 2**27  # multiplications of one pass over the data, below which one thread does it in milliseconds


@dataclass(frozen=True)
class Problem:
    """States with their supervision.

    Attributes:
        features: of N queries.
        targets: `[N, C]`, candidates in pool order, self last.
        scores: `[N, C]`, NaN where not measured.
        weights: `[N]`.
        benchmarks: N names; the validation score is the mean over benchmarks.
    """

    features: Features
    targets: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    benchmarks: Sequence[str]


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


class RowSpace:
    """The coordinates in which rows are regularised: `w_k = u_k / scale + b_k * c`.

    `scale`, the states' root mean square times the model's logit scale, makes one L2 strength mean the same for every
    model. `c` is the direction with `c·h` nearest to 1 over the
    data (least squares), so `b_k` is as good as a bias and, like one, is not regularised: without it L2 would pull
    every expert towards logit 0, tens of nats below the vocabulary's Z.

    The solver sees neither `u` nor `b` but what `whitened` makes of them. States of an LLM are far from round (a few
    directions hold most of their power), and in plain coordinates L-BFGS takes ten times the steps (docs/results.md).
    """

    def __init__(self, hidden: np.ndarray, transform: LogitTransform) -> None:
        # Of a million states every fiftieth says as much about their shape, at a fiftieth of what would cost more than
        # the fit itself.
        hidden = hidden[:: max(1, len(hidden) // _SHAPE)]
        width = hidden.shape[1]
        second = np.zeros((width, width))
        first = np.zeros(width)
        for start in range(0, len(hidden), _CHUNK):
            chunk = hidden[start : start + _CHUNK].astype(np.float64)
            second += chunk.T @ chunk
            first += chunk.sum(0)
        power = np.trace(second) / width
        self.scale = float(np.sqrt(power / len(hidden))) * transform.scale
        bias = np.linalg.solve(second + 1e-6 * power * np.eye(width), first)
        self.bias = torch.from_numpy(bias / transform.scale)
        # What coordinates multiply: `coordinates @ basis` are rows, and `moment` is the mean square of `basis h`.
        self.basis = torch.cat([torch.eye(width, dtype=torch.float64) / self.scale, self.bias[None]])
        self.moment = self.basis @ torch.from_numpy(second / len(hidden)) @ self.basis.T * transform.scale**2

    def rows(self, coordinates: torch.Tensor) -> torch.Tensor:
        """`[K, d + 1]` coordinates to `[K, d]` rows, float64."""
        return coordinates @ self.basis

    def whitened(self, penalty: float, curvature: float) -> torch.Tensor:
        """A basis of the coordinates, `[d + 1, d + 1]`, in which the loss is about as steep in every direction.

        The Hessian of one row is near `curvature * moment + penalty * I` (the identity without the bias), the sum
        `A = L L'`; in `v = coordinates @ L` it is near the identity, and `coordinates = v @ inverse(L)`.
        """
        hessian = curvature * self.moment
        hessian.diagonal()[:-1] += penalty
        # The bias is as good as a direction of the states, so without this a weak penalty leaves the sum singular.
        hessian.diagonal().add_(1e-9 * hessian.trace() / len(hessian))
        lower = torch.linalg.cholesky(hessian)
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)


def all_logits(
    rows: torch.Tensor,
    hidden: torch.Tensor,
    log_mass: torch.Tensor,
    fixed: torch.Tensor | None,
    transform: LogitTransform,
    *,
    with_self: bool,
) -> torch.Tensor:
    """Logits of the candidates, `[N, C]`: fixed experts, the rows' experts, self."""
    parts = [] if fixed is None else [fixed]
    parts.append(transform(hidden @ rows.T))
    if with_self:
        parts.append(log_mass[:, None])
    return torch.cat(parts, 1)


def _on_one_thread_where_small(fit: Callable[..., Fit]) -> Callable[..., Fit]:
    """Run a fit of a small problem on one thread.

    Where others use the cores too, threads wait for each other far longer than they compute: 500 states of a 135M model
    beside a busy job took 23 s with two threads, 0.2 s with one.
    """

    @wraps(fit)
    def run(train: Problem, *arguments: Any, **options: Any) -> Fit:
        threadpoolctl = require_extra("threadpoolctl", "train")
        small = train.features.hidden.size * train.targets.shape[1] < _SMALL
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
    require_extra("scipy", "train")
    from scipy.optimize import minimize

    space = RowSpace(train.features.hidden, transform)
    fixed_count = 0 if fixed_rows is None else len(fixed_rows)
    count = train.targets.shape[1] - fixed_count - int(with_self)
    shape = (count, train.features.hidden.shape[1] + 1)
    options = {"with_self": with_self, "fixed_rows": fixed_rows}

    def solve(problems: Sequence[Problem], strength: float, begin: np.ndarray) -> tuple[np.ndarray, float, int]:
        evaluator = _Loss(problems, OBJECTIVES[objective], transform, **options)
        # By the number of candidates, as each has its share of the loss only: a strength means the same for a pool of 7
        # and of 1,000, and in the objective `correctness` every row is the solution of a problem of its own.
        penalty = strength / 2 / train.targets.shape[1]

        basis = space.whitened(2 * penalty, _CURVATURE / train.targets.shape[1])

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            whitened = torch.from_numpy(flat.reshape(shape)).requires_grad_()
            coordinates = whitened @ basis
            value = evaluator(space.rows(coordinates)) + penalty * coordinates[:, :-1].square().sum()
            value.backward()
            return value.item(), whitened.grad.numpy().ravel()

        limits = {"maxiter": max_iterations, "maxfun": 10**6}
        start = torch.linalg.solve_triangular(basis, torch.from_numpy(begin), upper=False, left=False).numpy()
        solution = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options=limits)
        found = (torch.from_numpy(solution.x.reshape(shape)) @ basis).numpy()
        return found, float(solution.fun), int(solution.nit)

    begin = np.zeros(shape)
    if objective == "expected_score":
        # Its gradient vanishes far from a solution, so every strength starts at the convex problem's.
        convex = fit_rows(
            train,
            validation,
            objective="cross_entropy",
            l2=l2,
            transform=transform,
            with_self=with_self,
            fixed_rows=fixed_rows,
            max_iterations=max_iterations,
        )
        begin = convex.coordinates
    elif with_self:
        begin[:, -1] = float(np.mean(train.features.log_mass))
    strengths = sorted(set(l2), reverse=True) if validation else [l2[0]]
    fits = []
    for strength in tqdm(strengths, desc="fit", unit="l2", leave=False, disable=len(strengths) == 1):
        found, value, iterations = solve([train], strength, begin)
        if objective != "expected_score":
            begin = found  # the next, weaker strength is solved sooner from here
        rows = space.rows(torch.from_numpy(found)).float()
        entry = {"l2": strength, "train_loss": value, "iterations": iterations}
        if validation:
            entry |= assess(rows, validation, objective, transform, **options)
        logger.debug("l2 %g: %s", strength, entry)
        fits.append(Fit(rows, strength, [entry], found))
    path = [fit.path[0] for fit in fits]
    best = max(
        fits, key=lambda fit: (fit.path[0].get("validation_score", 0.0), -fit.path[0].get("validation_loss", 0.0))
    )
    if validation is None:
        return replace(best, path=path)
    final, _, _ = solve([train, validation], best.l2, best.coordinates)
    return Fit(space.rows(torch.from_numpy(final)).float(), best.l2, path, final)


class _Loss:
    """The mean objective over problems as a function of the rows, chunk by chunk, with gradients."""

    def __init__(
        self,
        problems: Sequence[Problem],
        objective: object,
        transform: LogitTransform,
        *,
        with_self: bool,
        fixed_rows: torch.Tensor | None,
    ) -> None:
        self.problems, self.objective, self.transform = problems, objective, transform
        self.with_self, self.fixed_rows = with_self, fixed_rows

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Mean loss; its backward pass reaches `rows` once, however many chunks there were."""
        leaf = rows.detach().float().requires_grad_()
        total, mass = 0.0, 0.0  # a validation side may have no weight at all; its loss is 0 then
        parts = [
            (problem, slice(start, start + _CHUNK))
            for problem in self.problems
            for start in range(0, len(problem.weights), _CHUNK)
        ]
        for problem, part in parts:
            chunk_sum, chunk_mass = self._chunk(leaf, problem, part)
            if leaf.requires_grad and chunk_sum.requires_grad:
                chunk_sum.backward()
            total += chunk_sum.item()
            mass += chunk_mass.item()
        mass = mass or 1.0
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        # A linear function of `rows` with the value and the gradient of the sum: one graph instead of one per chunk.
        linear = ((rows - rows.detach()) * (gradient.double() / mass)).sum()
        return linear + total / mass

    def _chunk(self, rows: torch.Tensor, problem: Problem, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, log_mass = _tensor(problem.features.hidden[part]), _tensor(problem.features.log_mass[part])
        fixed = None if self.fixed_rows is None else self.transform(hidden @ self.fixed_rows.float().T)
        logits = all_logits(rows, hidden, log_mass, fixed, self.transform, with_self=self.with_self)
        targets, scores, weights = (
            _tensor(array[part]) for array in (problem.targets, problem.scores, problem.weights)
        )
        reference = log_mass if self.with_self else torch.zeros_like(log_mass)
        return self.objective(logits, targets, scores, reference, weights)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over an array's own memory: a pass over mapped states need not copy them. Nothing writes to it."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


@torch.no_grad()
def problem_logits(
    rows: torch.Tensor, features: Features, transform: LogitTransform, *, with_self: bool
) -> torch.Tensor:
    """Logits of the candidates on cached states, `[N, C]` float32, streamed."""
    parts = []
    for start in range(0, len(features), _CHUNK):
        hidden, log_mass = (_tensor(a[start : start + _CHUNK]) for a in (features.hidden, features.log_mass))
        parts.append(all_logits(rows, hidden, log_mass, None, transform, with_self=with_self))
    return torch.cat(parts)


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
        loss = _Loss([problem], OBJECTIVES[objective], transform, with_self=with_self, fixed_rows=fixed_rows)(rows)
    every = rows if fixed_rows is None else torch.cat([fixed_rows, rows])
    logits = problem_logits(every, problem.features, transform, with_self=with_self)
    return {
        "validation_loss": float(loss),
        "validation_score": mean_score(logits.argmax(-1).numpy(), problem.scores, problem.benchmarks),
    }


def mean_score(chosen: np.ndarray, scores: np.ndarray, benchmarks: Sequence[str]) -> float:
    """Mean over benchmarks of the mean score (or utility) of the chosen candidates.

    One that was not measured on a query scores 0 there, or as little as the worst where utilities are negative.
    """
    got = scores[np.arange(len(chosen)), chosen]
    got = np.where(np.isnan(got), np.nan_to_num(scores).min(1), got)
    names = np.asarray(benchmarks, dtype=str)
    return float(np.mean([got[names == name].mean() for name in np.unique(names)]))
