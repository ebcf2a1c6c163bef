"""Optimizer of method `tokens`: L-BFGS over the expert rows, on cached states, streamed in chunks.

Memory stays bounded for any number of states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..modeling.errors import require_extra
from ..modeling.logits import LogitTransform
from ..modeling.state_cache import tensor_of
from ..modeling.states import CHUNK, States
from .objectives import OBJECTIVES, Objective

_SHAPE = 20_000  # least number of states to estimate the shape of all states from
_LEAST_SHARE = 0.05  # least share of the queries that scales a candidate's penalty: few results must not run wild
_PRECISION = 1e-7  # of the loss: a sum in float32 resolves no smaller step, and a line search would fail to find one
_CURVATURE = 0.1  # a logistic loss at chances of 0.1 to 0.9 has 0.09 to 0.25: from 0.03 to 0.25 steps vary little


@dataclass(frozen=True)
class Problem:
    """States with their supervision.

    Attributes:
        states: States of N queries.
        targets: `[N, C]`, candidates in pool order, self last.
        scores: `[N, C]`, NaN where unknown.
        weights: `[N]` weights of the queries.
        benchmarks: N names. The validation score is the mean over benchmarks.
        groups: `[N]` ids. Queries of one id are in one fold. None: each query is a group.
        absent: `[N, C]` mask of candidates that have no score in the query's benchmark and count as wrong. None: no
            cell is absent.
        left_out: `[N, C]` mask of absent cells that the loss does not count, see `prior.thinned`. None: no cell is left
            out.
    """

    states: States
    targets: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    benchmarks: Sequence[str] | np.ndarray
    groups: np.ndarray | None = None
    absent: np.ndarray | None = None
    left_out: np.ndarray | None = None

    def learnt_in(self, part: slice) -> np.ndarray:
        """Return the scores of a part that the loss counts, NaN where they are unknown or left out."""
        scores = self.scores[part]
        return scores if self.left_out is None else np.where(self.left_out[part], np.float32(np.nan), scores)

    def take(self, rows: np.ndarray) -> "Problem":
        """Return the problem of the queries at these rows."""
        return Problem(
            States(self.states.hidden[rows], self.states.log_mass[rows]),
            self.targets[rows],
            self.scores[rows],
            self.weights[rows],
            np.asarray(self.benchmarks)[rows],
            *(None if array is None else array[rows] for array in (self.groups, self.absent, self.left_out)),
        )

    def __add__(self, other: "Problem") -> "Problem":
        """Return the problem of the queries of both. A field that is None in one of them is None in the sum."""

        def joined(name: str) -> np.ndarray | None:
            parts = [getattr(self, name), getattr(other, name)]
            return None if any(part is None for part in parts) else np.concatenate(parts)

        return Problem(
            States(
                np.concatenate([self.states.hidden, other.states.hidden]),
                np.concatenate([self.states.log_mass, other.states.log_mass]),
            ),
            np.concatenate([self.targets, other.targets]),
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.weights, other.weights]),
            np.concatenate([self.benchmarks, other.benchmarks]),
            *map(joined, ("groups", "absent", "left_out")),
        )

    def columns(self, chosen: Sequence[int]) -> "Problem":
        """Return the problem of the candidates in these columns."""
        names = ("targets", "scores", "absent", "left_out")
        return replace(self, **{n: a[:, chosen] for n in names if (a := getattr(self, n)) is not None})


@dataclass(frozen=True)
class Fixed:
    """Rows that do not change while others are fitted.

    Attributes:
        rows: `[C, d]` rows of all candidates. The rows at `free` are ignored.
        free: Columns of the candidates whose rows are fitted.
    """

    rows: torch.Tensor
    free: Sequence[int]


class RowSpace:
    """Coordinates in which rows are regularised: `w_k = u_k / scale + b_k * c`.

    The scale is the states' root mean square times the model's logit scale. It makes one L2 strength mean the same for
    every model. The direction `c` has `c·h` nearest to 1 over the data (least squares). So `b_k` is as good as a bias
    and, like a bias, is not regularised. Without it L2 would pull every expert towards a chance of 1/2.

    The solver works in the coordinates of `whitened` instead of `u` and `b`. States of an LLM are far from round: a few
    directions hold most of their power. In plain coordinates L-BFGS takes ten times the steps (docs/results.md).
    """

    def __init__(self, hidden: np.ndarray, transform: LogitTransform) -> None:
        # Every fiftieth of a million states gives the same shape at a fiftieth of the cost. On all states the estimate
        # would cost more than the fit itself.
        hidden = hidden[:: max(1, len(hidden) // _SHAPE)]
        width = hidden.shape[1]
        second = np.zeros((width, width))
        first = np.zeros(width)
        for start in range(0, len(hidden), CHUNK):
            chunk = hidden[start : start + CHUNK].astype(np.float64)
            second += chunk.T @ chunk
            first += chunk.sum(0)
        power = np.trace(second) / width
        self.scale = float(np.sqrt(power / len(hidden))) * transform.scale
        bias = np.linalg.solve(second + 1e-6 * power * np.eye(width), first)
        self.bias = torch.from_numpy(bias / transform.scale)
        # `coordinates @ basis` are rows, and `moment` is the mean square of `basis h`.
        self.basis = torch.cat([torch.eye(width, dtype=torch.float64) / self.scale, self.bias[None]])
        self.moment = self.basis @ torch.from_numpy(second / len(hidden)) @ self.basis.T * transform.scale**2

    def rows(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Return the rows `[K, d]` float64 of coordinates `[K, d + 1]`."""
        return coordinates @ self.basis

    def regularised(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the part `u` of rows `[K, d]` that L2 penalises, `[K, d]` float64: the rows without their bias."""
        rows = rows.double()
        share = (rows @ self.bias) / self.bias.square().sum()
        return (rows - share[:, None] * self.bias) * self.scale

    def whitened(self, penalty: float, curvature: float) -> torch.Tensor:
        """Return a basis of the coordinates, `[d + 1, d + 1]`, in which the loss is about as steep in every direction.

        The Hessian of one row is near `A = curvature * moment + penalty * I`, where `I` is the identity without the
        bias. With `A = L L'` the Hessian in `v = coordinates @ L` is near the identity, and
        `coordinates = v @ inverse(L)`.
        """
        hessian = curvature * self.moment
        hessian.diagonal()[:-1] += penalty
        # The bias is nearly a direction of the states, so without this a weak penalty leaves the sum singular.
        hessian.diagonal().add_(1e-9 * hessian.trace() / len(hessian))
        lower = torch.linalg.cholesky(hessian)
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)


class RowLoss:
    """Mean objective over problems as a function of the rows, chunk by chunk, with gradients."""

    def __init__(
        self,
        problems: Sequence[Problem],
        objective: Objective,
        transform: LogitTransform,
        fixed: Fixed | None = None,
    ) -> None:
        self.problems, self.objective, self.transform, self.fixed = problems, objective, transform, fixed

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean loss. Its backward pass reaches `rows` once, for any number of chunks."""
        total, mass, gradient = self.sums(rows)
        mass = mass or 1.0  # the loss of a split without any weight is 0
        # A linear function of `rows` with the value and the gradient of the sum: one graph instead of one per chunk.
        linear = ((rows - rows.detach()) * (gradient.double() / mass)).sum()
        return linear + total / mass

    def sums(self, rows: torch.Tensor) -> tuple[float, float, torch.Tensor]:
        """Return the objective's sum, its mass, and the sum's gradient at `rows`."""
        leaf = rows.detach().float().requires_grad_()
        total, mass = 0.0, 0.0
        parts = [
            (problem, slice(start, start + CHUNK))
            for problem in self.problems
            for start in range(0, len(problem.weights), CHUNK)
        ]
        for problem, part in parts:
            chunk_sum, chunk_mass = self._chunk(leaf, problem, part)
            if chunk_sum.requires_grad:
                chunk_sum.backward()
            total += chunk_sum.item()
            mass += chunk_mass.item()
        return total, mass, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def _chunk(self, rows: torch.Tensor, problem: Problem, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = tensor_of(problem.states.hidden[part])
        logits = self.transform(hidden @ rows.T)
        if self.fixed is not None:
            others = self.transform(hidden @ self.fixed.rows.float().T)
            logits = others.index_copy(1, torch.tensor(self.fixed.free), logits)
        targets, scores, weights = (
            tensor_of(array) for array in (problem.targets[part], problem.learnt_in(part), problem.weights[part])
        )
        return self.objective(logits, targets, scores, weights)


class RowOptimizer:
    """L-BFGS over candidates' rows, in coordinates in which the loss is about as steep in every direction.

    The penalty is `sum_k s_k |u_k - m|^2`. `s_k` is the share of the queries on which candidate k was measured. Its
    loss has that share too, so a strength means the same for a candidate measured on all queries or on a tenth.

    If all rows are fitted, `m` is 0. A row that joins others is drawn towards their mean (mean-regularised multi-task
    learning, Evgeniou and Pontil 2004). Hard queries are hard for all candidates, and a new candidate with few results
    follows the others. With the same chance on every query it would win where the others are bad.

    Args:
        train: Problem to fit. Its states shape the coordinates.
        objective: Key of `OBJECTIVES`.
        transform: Cap and scale that the model applies to logits.
        fixed: Rows that are not fitted, or None.
        company: `[F, d]` rows of other candidates, whose mean is `m`. Defaults to the fixed rows.
        max_iterations: Iterations of one fit.

    Attributes:
        space: Coordinates of the rows.
        shape: Shape of the coordinates, `[K, d + 1]`.
    """

    def __init__(
        self,
        train: Problem,
        objective: str,
        transform: LogitTransform,
        *,
        fixed: Fixed | None = None,
        company: torch.Tensor | None = None,
        max_iterations: int = 300,
    ) -> None:
        self.space = RowSpace(train.states.hidden, transform)
        self._candidates = train.targets.shape[1]
        self.shape = (self._candidates if fixed is None else len(fixed.free), train.states.hidden.shape[1] + 1)
        self._objective, self._transform, self._fixed = OBJECTIVES[objective], transform, fixed
        self._max_iterations = max_iterations
        if fixed is not None and company is None:
            company = fixed.rows[[column for column in range(len(fixed.rows)) if column not in fixed.free]]
        known = (~np.isnan(train.learnt_in(slice(None))) & (train.weights[:, None] > 0)).sum(0)
        shares = np.maximum(known / max(known.max(), 1), _LEAST_SHARE)
        self._shares = torch.from_numpy(shares if fixed is None else shares[list(fixed.free)])[:, None]
        self._centre = None if company is None else self.space.regularised(company).mean(0)

    def rows(self, coordinates: np.ndarray) -> torch.Tensor:
        """Return the rows `[K, d]` float32 of coordinates."""
        return self.space.rows(torch.from_numpy(coordinates)).float()

    def _penalty(self, coordinates: torch.Tensor) -> torch.Tensor:
        regularised = coordinates[:, :-1]
        moved = regularised if self._centre is None else regularised - self._centre
        return (self._shares * moved.square()).sum()

    def solve(self, problems: Sequence[Problem], l2: float, begin: np.ndarray) -> tuple[np.ndarray, float, int]:
        """Minimise the mean objective over problems plus the L2 penalty.

        Args:
            problems: Problems to fit together.
            l2: Strength of the penalty.
            begin: Coordinates to start from.

        Returns:
            The coordinates of the minimum, the loss there, and the number of iterations.
        """
        require_extra("scipy", "train")
        from scipy.optimize import minimize

        evaluate = RowLoss(problems, self._objective, self._transform, self._fixed)
        # Divided by the number of candidates, since each has only its share of the loss: a strength means the same for
        # pools of 7 and of 1,000, and under `correctness` every row solves an independent problem.
        penalty = l2 / 2 / self._candidates
        basis = self.space.whitened(2 * penalty, _CURVATURE / self._candidates)

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            whitened = torch.from_numpy(flat.reshape(self.shape)).requires_grad_()
            coordinates = whitened @ basis
            value = evaluate(self.space.rows(coordinates)) + penalty * self._penalty(coordinates)
            value.backward()
            assert whitened.grad is not None
            return value.item(), whitened.grad.numpy().ravel()

        limits = {"maxiter": self._max_iterations, "maxfun": 10**6, "ftol": _PRECISION}
        start = torch.linalg.solve_triangular(basis, torch.from_numpy(begin), upper=False, left=False).numpy()
        solution: Any = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options=limits)
        found = (torch.from_numpy(solution.x.reshape(self.shape)) @ basis).numpy()
        return found, float(solution.fun), int(solution.nit)
