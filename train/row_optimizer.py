"""The optimizer of method `tokens`: L-BFGS over the expert rows, on cached states, streamed in chunks.

Memory stays bounded however many states there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..modeling.errors import require_extra
from ..modeling.logits import LogitTransform
from ..modeling.states import CHUNK, States, join_logits, tensor_of
from .objectives import OBJECTIVES, Objective

_SHAPE = 20_000  # states, at least, that the shape of all is estimated from
_CURVATURE = 0.1  # of a logistic loss at chances of 0.1 to 0.9 it is 0.09 to 0.25; steps vary little from 0.03 to 0.25


@dataclass(frozen=True)
class Problem:
    """States with their supervision.

    Attributes:
        states: states of N queries.
        targets: `[N, C]`, candidates in pool order, self last.
        scores: `[N, C]`, NaN where not measured.
        weights: `[N]`.
        benchmarks: N names; the validation score is the mean over benchmarks.
    """

    states: States
    targets: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    benchmarks: Sequence[str] | np.ndarray


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
        for start in range(0, len(hidden), CHUNK):
            chunk = hidden[start : start + CHUNK].astype(np.float64)
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


class RowLoss:
    """The mean objective over problems as a function of the rows, chunk by chunk, with gradients."""

    def __init__(
        self,
        problems: Sequence[Problem],
        objective: Objective,
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
            (problem, slice(start, start + CHUNK))
            for problem in self.problems
            for start in range(0, len(problem.weights), CHUNK)
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
        hidden, log_mass = tensor_of(problem.states.hidden[part]), tensor_of(problem.states.log_mass[part])
        fixed = None if self.fixed_rows is None else self.transform(hidden @ self.fixed_rows.float().T)
        logits = join_logits(rows, hidden, log_mass, fixed, self.transform, with_self=self.with_self)
        targets, scores, weights = (
            tensor_of(array[part]) for array in (problem.targets, problem.scores, problem.weights)
        )
        reference = log_mass if self.with_self else torch.zeros_like(log_mass)
        return self.objective(logits, targets, scores, reference, weights)


class RowOptimizer:
    """L-BFGS over expert rows, in coordinates in which the loss is about as steep in every direction.

    Args:
        train: what is fitted; its states shape the coordinates.
        objective: a key of `OBJECTIVES`.
        transform: what the model does to logits.
        with_self: whether the last candidate is self.
        fixed_rows: `[F, d]` rows of the first F candidates, which stay as they are.
        max_iterations: iterations of one fit.

    Attributes:
        space: coordinates of the rows.
        shape: of the coordinates, `[K, d + 1]`.
    """

    def __init__(
        self,
        train: Problem,
        objective: str,
        transform: LogitTransform,
        *,
        with_self: bool,
        fixed_rows: torch.Tensor | None,
        max_iterations: int,
    ) -> None:
        self.space = RowSpace(train.states.hidden, transform)
        self._candidates = train.targets.shape[1]
        count = self._candidates - (0 if fixed_rows is None else len(fixed_rows)) - int(with_self)
        self.shape = (count, train.states.hidden.shape[1] + 1)
        self._objective, self._transform = OBJECTIVES[objective], transform
        self._with_self, self._fixed_rows, self._max_iterations = with_self, fixed_rows, max_iterations

    def rows(self, coordinates: np.ndarray) -> torch.Tensor:
        """Return the rows `[K, d]` float32 of coordinates."""
        return self.space.rows(torch.from_numpy(coordinates)).float()

    def solve(self, problems: Sequence[Problem], l2: float, begin: np.ndarray) -> tuple[np.ndarray, float, int]:
        """Minimise the mean objective over problems plus the L2 penalty.

        Args:
            problems: what is fitted.
            l2: strength of the penalty.
            begin: coordinates to start from.

        Returns:
            the coordinates found, the loss there, and the number of iterations.
        """
        require_extra("scipy", "train")
        from scipy.optimize import minimize

        evaluate = RowLoss(
            problems, self._objective, self._transform, with_self=self._with_self, fixed_rows=self._fixed_rows
        )
        # By the number of candidates, as each has its share of the loss only: a strength means the same for a pool of 7
        # and of 1,000, and in the objective `correctness` every row is the solution of a problem of its own.
        penalty = l2 / 2 / self._candidates
        basis = self.space.whitened(2 * penalty, _CURVATURE / self._candidates)

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            whitened = torch.from_numpy(flat.reshape(self.shape)).requires_grad_()
            coordinates = whitened @ basis
            value = evaluate(self.space.rows(coordinates)) + penalty * coordinates[:, :-1].square().sum()
            value.backward()
            assert whitened.grad is not None
            return value.item(), whitened.grad.numpy().ravel()

        limits = {"maxiter": self._max_iterations, "maxfun": 10**6}
        start = torch.linalg.solve_triangular(basis, torch.from_numpy(begin), upper=False, left=False).numpy()
        solution: Any = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options=limits)
        found = (torch.from_numpy(solution.x.reshape(self.shape)) @ basis).numpy()
        return found, float(solution.fun), int(solution.nit)
