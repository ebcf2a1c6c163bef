from dataclasses import replace

import numpy as np
import pytest
import torch

from expertoken.modeling.logits import LogitTransform
from expertoken.modeling.states import States, state_logits
from expertoken.train import row_optimizer as module
from expertoken.train.objectives import OBJECTIVES
from expertoken.train.row_optimizer import Problem, RowLoss, RowSpace
from expertoken.train.tokens import fit_rows, mean_score

DIM = 6


def make_problem(count=200, experts=3, seed=0, with_self=False):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(count, DIM)).astype(np.float32)
    hidden[:, 0] += 3
    truth = np.random.default_rng(9).normal(size=(DIM, experts + with_self))
    noisy = hidden @ truth + 0.3 * rng.gumbel(size=(count, experts + with_self))
    noisy -= noisy.mean(0)  # no candidate wins by far: routing is worth something
    targets = np.eye(experts + with_self, dtype=np.float32)[noisy.argmax(1)]
    # Z knows a little of when self is best, as a meta LLM's does.
    log_mass = (5 + rng.normal(0, 0.3, count) + (0.5 * noisy[:, -1] if with_self else 0)).astype(np.float32)
    return Problem(States(hidden, log_mass), targets, targets, np.ones(count, np.float32), ["b"] * count)


def fit(train, validation=None, **options):
    given = {"objective": "cross_entropy", "l2": [0.1], "transform": LogitTransform(), "with_self": False} | options
    return fit_rows(train, validation, max_iterations=2000, **given)


def test_the_rows_solve_the_same_problem_as_a_reference_solver():
    sklearn = pytest.importorskip("sklearn.linear_model")
    problem, strength = make_problem(), 0.1
    found = fit(problem, l2=[strength])
    space = RowSpace(problem.states.hidden, LogitTransform())
    # The reference gets the same coordinates: states over their root mean square, and the bias direction, which it
    # must not regularise; scaled up a thousandfold it as good as doesn't.
    hidden = problem.states.hidden.astype(np.float64)
    design = np.column_stack([hidden / space.scale, 1e3 * (hidden @ space.bias.numpy())])
    share = strength / problem.targets.shape[1]  # a strength is shared by the candidates
    reference = sklearn.LogisticRegression(
        C=1 / (share * len(hidden)), fit_intercept=False, tol=1e-10, max_iter=100000
    ).fit(design, problem.targets.argmax(1))
    expected = torch.log_softmax(torch.from_numpy(design @ reference.coef_.T), 1)
    logits = state_logits(found.rows, problem.states, LogitTransform(), with_self=False)
    torch.testing.assert_close(logits.log_softmax(1).double(), expected, rtol=0, atol=5e-3)


def test_chunks_do_not_change_the_solution(monkeypatch):
    problem = make_problem(count=150)
    whole = fit(problem).rows
    monkeypatch.setattr(module, "CHUNK", 40)
    torch.testing.assert_close(fit(problem).rows, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", ["cross_entropy", "correctness", "expected_score", "contrastive"])
@pytest.mark.parametrize("with_self", [False, True])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(softcap=30.0), LogitTransform(scale=0.25)])
def test_every_objective_beats_the_best_single_candidate(objective, with_self, transform):
    train, validation = make_problem(with_self=with_self), make_problem(seed=1, with_self=with_self)
    found = fit(train, validation, objective=objective, l2=[0.1, 0.01], with_self=with_self, transform=transform)
    unseen = make_problem(seed=2, with_self=with_self)
    chosen = state_logits(found.rows, unseen.states, transform, with_self=with_self).argmax(1).numpy()
    assert mean_score(chosen, unseen.scores, unseen.benchmarks) > unseen.scores.mean(0).max() + 0.05


def test_the_strength_is_chosen_on_validation():
    train, validation = make_problem(count=40), make_problem(count=2000, seed=1)
    found = fit(train, validation, l2=[100.0, 0.1, 1e-6])
    scores = {entry["l2"]: entry["validation_score"] for entry in found.path}
    assert found.l2 == max(scores, key=scores.__getitem__)
    assert len(found.path) == 3


def test_fixed_rows_stay_and_the_new_row_is_fitted_beside_them():
    problem = make_problem()
    whole = fit(problem)
    added = fit(problem, fixed_rows=whole.rows[:2])
    assert added.rows.shape == (1, DIM)
    logits = state_logits(torch.cat([whole.rows[:2], added.rows]), problem.states, LogitTransform(), with_self=False)
    best = state_logits(whole.rows, problem.states, LogitTransform(), with_self=False)
    assert (logits.argmax(1) == best.argmax(1)).float().mean() > 0.95


def test_weightless_queries_count_for_nothing():
    problem = make_problem()
    problem.weights[100:] = 0
    half = Problem(
        States(problem.states.hidden[:100], problem.states.log_mass[:100]),
        problem.targets[:100], problem.scores[:100], problem.weights[:100], problem.benchmarks[:100],
    )  # fmt: skip
    loss = RowLoss([problem], OBJECTIVES["cross_entropy"], LogitTransform(), with_self=False, fixed_rows=None)
    same = RowLoss([half], OBJECTIVES["cross_entropy"], LogitTransform(), with_self=False, fixed_rows=None)
    rows = torch.randn(3, DIM, dtype=torch.float64)
    torch.testing.assert_close(loss(rows), same(rows))


def test_the_mean_score_is_over_benchmarks_and_unmeasured_counts_as_wrong():
    scores = np.array([[1, 0], [1, 0], [0, np.nan]])
    assert mean_score(np.array([0, 0, 1]), scores, ["a", "a", "b"]) == 0.5


def test_the_final_fit_learns_from_validation_too():
    train, validation = make_problem(count=60), make_problem(count=60, seed=1)
    final = fit(train, validation, l2=[0.05])
    both = Problem(
        States(*(np.concatenate([getattr(p.states, n) for p in (train, validation)]) for n in ("hidden", "log_mass"))),
        *(np.concatenate([getattr(p, n) for p in (train, validation)]) for n in ("targets", "scores", "weights")),
        [*train.benchmarks, *validation.benchmarks],
    )
    loss = RowLoss([both], OBJECTIVES["cross_entropy"], LogitTransform(), with_self=False, fixed_rows=None)
    assert float(loss(final.rows.double())) < float(loss(fit(train, l2=[0.05]).rows.double()))


def test_in_the_objective_correctness_an_expert_more_changes_no_other_row():
    """Each row is a problem of its own, however many there are: with the strength too."""
    problem = make_problem()
    alone = replace(problem, targets=problem.targets[:, :1], scores=problem.scores[:, :1])
    options = {"objective": "correctness", "l2": [0.1]}
    torch.testing.assert_close(fit(problem, **options).rows[:1], fit(alone, **options).rows, rtol=1e-3, atol=2e-3)
