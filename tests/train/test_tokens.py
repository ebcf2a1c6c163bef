from dataclasses import replace

import numpy as np
import pytest
import torch

from expertoken.data_prep.labels import label
from expertoken.modeling.logits import LogitTransform
from expertoken.modeling.states import States, state_logits
from expertoken.train import row_optimizer as module
from expertoken.train.objectives import OBJECTIVES
from expertoken.train.prior import prior_of, thinned
from expertoken.train.row_optimizer import Fixed, Problem, RowLoss, RowSpace
from expertoken.train.tokens import _folds, fit_rows, mean_score

DIM = 6


def make_problem(count=200, candidates=3, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(count, DIM)).astype(np.float32)
    hidden[:, 0] += 3
    truth = np.random.default_rng(9).normal(size=(DIM, candidates))
    noisy = hidden @ truth + 0.3 * rng.gumbel(size=(count, candidates))
    noisy -= noisy.mean(0)  # no candidate is best by far, so routing is useful
    targets = np.eye(candidates, dtype=np.float32)[noisy.argmax(1)]
    mass = np.zeros(count, np.float32)
    return Problem(States(hidden, mass), targets, targets, np.ones(count, np.float32), np.array(["b"] * count))


def fit(problem, **options):
    given = {"objective": "cross_entropy", "l2": [0.1], "transform": LogitTransform()} | options
    return fit_rows(problem, max_iterations=2000, **given)


def nothing(problem):
    """Return a prior without mass."""
    return problem.take(np.zeros(0, dtype=int))


def test_the_rows_solve_the_same_problem_as_a_reference_solver():
    sklearn = pytest.importorskip("sklearn.linear_model")
    problem, strength = make_problem(), 0.1
    found = fit(problem, l2=[strength], prior=nothing(problem))
    space = RowSpace(problem.states.hidden, LogitTransform())
    # The reference gets the same coordinates: states over their root mean square, and the bias direction. It must not
    # regularise the bias direction, and a thousandfold scale makes that penalty negligible.
    hidden = problem.states.hidden.astype(np.float64)
    design = np.column_stack([hidden / space.scale, 1e3 * (hidden @ space.bias.numpy())])
    share = strength / problem.targets.shape[1]  # a strength is shared by the candidates
    reference = sklearn.LogisticRegression(
        C=1 / (share * len(hidden)), fit_intercept=False, tol=1e-10, max_iter=100000
    ).fit(design, problem.targets.argmax(1))
    expected = torch.log_softmax(torch.from_numpy(design @ reference.coef_.T), 1)
    logits = state_logits(found.rows, problem.states, LogitTransform())
    torch.testing.assert_close(logits.log_softmax(1).double(), expected, rtol=0, atol=5e-3)


def test_chunks_do_not_change_the_solution(monkeypatch):
    problem = make_problem(count=150)
    whole = fit(problem).rows
    monkeypatch.setattr(module, "CHUNK", 40)
    torch.testing.assert_close(fit(problem).rows, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", ["cross_entropy", "correctness", "expected_score", "contrastive"])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(softcap=30.0), LogitTransform(scale=0.25)])
def test_every_objective_beats_the_best_single_candidate(objective, transform):
    found = fit(make_problem(400), objective=objective, l2=[0.1, 0.01], transform=transform)
    unseen = make_problem(seed=2)
    chosen = state_logits(found.rows, unseen.states, transform).argmax(1).numpy()
    assert mean_score(chosen, unseen.scores, unseen.benchmarks) > unseen.scores.mean(0).max() + 0.05


def test_the_strength_is_chosen_by_the_loss_on_queries_left_out():
    found = fit(make_problem(count=40), l2=[100.0, 0.1, 1e-6])
    losses = {entry["l2"]: entry["validation_loss"] for entry in found.path}
    assert found.l2 == min(losses, key=losses.__getitem__)
    assert len(found.path) == 3
    assert found.chosen["l2"] == found.l2


def test_a_choice_at_the_edge_of_the_grid_is_told():
    problem = make_problem(count=30)
    assert fit(problem, l2=[100.0, 30.0]).at_edge
    assert not fit(problem, l2=[100.0, 0.01, 1e-12], prior=nothing(problem)).at_edge
    assert not fit(problem, l2=[100.0]).at_edge


def test_random_labels_reach_the_score_of_chance_on_queries_left_out():
    """The reported score of a fit is on unseen queries."""
    problem = make_problem(300)
    shuffled = np.random.default_rng(0).permutation(300)
    problem = replace(problem, targets=problem.targets[shuffled], scores=problem.scores[shuffled])
    found = fit(problem, l2=[10.0, 1.0, 0.1, 0.01])
    assert found.chosen["validation_score"] < problem.scores.mean(0).max() + 0.05


def test_what_a_fold_leaves_out_is_not_told_by_its_benchmark_either():
    """Each label has its own benchmark, whose name would reveal the labels of the unseen queries."""
    problem = make_problem(300)
    shuffled = np.random.default_rng(0).permutation(300)
    targets = problem.targets[shuffled]
    told = replace(problem, targets=targets, scores=targets, benchmarks=targets.argmax(1).astype(str))
    assert fit(told, l2=[10.0, 0.1]).chosen["validation_score"] < 0.45


def test_queries_of_one_group_fall_into_one_fold():
    """Otherwise rows would be tested on positions of an answer whose other positions they were fitted on."""
    problem = make_problem(30)
    twice = replace(problem.take(np.repeat(np.arange(30), 2)), groups=np.repeat(np.arange(30), 2))
    for rows in _folds(twice, 5):
        assert set(np.bincount(twice.groups[rows])) <= {0, 2}
    assert sorted(np.concatenate(_folds(twice, 5))) == list(range(60))


def test_fixed_rows_stay_and_the_new_row_is_fitted_beside_them():
    problem = make_problem()
    whole = fit(problem)
    rows = whole.rows.clone()
    rows[1] = 0
    added = fit(problem, fixed=Fixed(rows, [1]))
    assert added.rows.shape == (1, DIM)
    rows[1] = added.rows[0]
    logits, best = (state_logits(found, problem.states, LogitTransform()) for found in (rows, whole.rows))
    assert (logits.argmax(1) == best.argmax(1)).float().mean() > 0.95


def correct(chances, count, seed=0):
    """Draw states without information, and candidates that are right with these chances."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(count, DIM)).astype(np.float32)
    hidden[:, 0] += 3
    scores = (rng.random((count, len(chances))) < np.array(chances)).astype(np.float32)
    targets, weights = label(scores, ["b"] * count, labelling="correctness")
    return Problem(States(hidden, np.zeros(count, np.float32)), targets, scores, weights, np.array(["b"] * count))


def test_self_has_a_chance_of_its_own():
    """The experts are right on 60 and 55 % of the queries and self on 95 %, so self is chosen."""
    found = fit(correct([0.60, 0.55, 0.95], 400), objective="correctness", l2=[10.0, 1.0, 0.1])
    unseen = correct([0.60, 0.55, 0.95], 1000, seed=1)
    chances = state_logits(found.rows, unseen.states, LogitTransform()).sigmoid()
    assert (chances.argmax(1) == 2).float().mean() > 0.98
    assert chances.mean(0).tolist() == pytest.approx([0.60, 0.55, 0.95], abs=0.06)


@pytest.mark.parametrize(("share", "least"), [(0.5, 0.9), (0.1, 0.8)])
@pytest.mark.parametrize(("strategy", "objective"), [("query", "cross_entropy"), ("correctness", "correctness")])
def test_the_best_expert_gets_its_questions_though_few_of_them_were_measured(share, least, strategy, objective):
    rng = np.random.default_rng(0)

    def drawn(count):
        topic = rng.integers(0, 4, count)
        hidden = np.eye(DIM, dtype=np.float32)[topic] * 3 + rng.normal(size=(count, DIM)).astype(np.float32)
        scores = rng.random((count, 4)) < np.where(np.arange(4) == topic[:, None], 0.9, 0.3)
        return topic, States(hidden.astype(np.float32), np.zeros(count, np.float32)), scores.astype(np.float32)

    _, states, scores = drawn(800)
    scores[rng.random(800) > share, 0] = np.nan
    targets, weights = label(scores, ["b"] * 800, labelling=strategy)
    problem = Problem(states, targets, scores, weights, np.array(["b"] * 800))
    found = fit(problem, objective=objective, l2=[10.0, 3.0, 1.0, 0.3, 0.1, 0.03])
    topic, states, _ = drawn(1000)
    chosen = state_logits(found.rows, states, LogitTransform()).argmax(1).numpy()
    assert (chosen[topic == 0] == 0).mean() >= least
    assert (chosen[topic != 0] == 0).mean() < 0.1


@pytest.mark.parametrize("lucky", [1, 5, 20])
def test_a_column_of_one_class_has_an_optimum_that_lucky_answers_move_little(lucky):
    """One candidate is right on each of its few queries, the other on 80 % of many."""
    problem = correct([0.8, 1.0], 300)
    problem.scores[lucky:, 1] = np.nan
    found = fit(problem, objective="correctness", l2=[1.0])
    chances = state_logits(found.rows, problem.states, LogitTransform()).sigmoid().mean(0)
    assert float(chances[1]) < {1: 0.85, 5: 0.9, 20: 0.97}[lucky]
    assert float(chances[0]) == pytest.approx(0.8, abs=0.05)


def test_weightless_queries_count_for_nothing():
    problem = make_problem()
    problem.weights[100:] = 0
    half = Problem(
        States(problem.states.hidden[:100], problem.states.log_mass[:100]),
        problem.targets[:100], problem.scores[:100], problem.weights[:100], problem.benchmarks[:100],
    )  # fmt: skip
    loss = RowLoss([problem], OBJECTIVES["cross_entropy"], LogitTransform())
    same = RowLoss([half], OBJECTIVES["cross_entropy"], LogitTransform())
    rows = torch.randn(3, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(rows).float(), same(rows).float())  # the products with the states are float32


def test_who_has_no_usable_result_takes_no_routes():
    """This happens if its only benchmark is contaminated. A chance of 1/2 beside one of 0.3 would always be chosen."""
    problem = correct([0.3, 0.5], 300)
    problem.scores[:, 1] = np.nan
    found = fit(problem, objective="correctness", l2=[1.0])
    chances = state_logits(found.rows, problem.states, LogitTransform()).sigmoid().mean(0)
    assert float(chances[1]) < float(chances[0]) + 0.02


def test_an_expert_of_one_benchmark_is_told_no_score_in_the_others():
    """Most of its cells in the others are left out of the loss, but they still count as wrong."""
    problem = correct([0.0, 1.0], 400)
    names = np.array([f"b{index % 20}" for index in range(400)])
    absent = np.zeros((400, 2), dtype=bool)
    absent[names != "b0", 1] = True
    problem.scores[absent] = 0
    left_out = thinned(problem.scores, absent)
    assert left_out.sum() == absent.sum() - 2  # a tenth of its own 20 results is kept
    problem = replace(problem, benchmarks=names, absent=absent, left_out=left_out)
    found = fit(problem, objective="correctness", l2=[1.0])
    assert found.chosen["validation_score"] < 0.06  # one of twenty benchmarks
    prior = prior_of(problem)
    assert np.isnan(prior.scores[np.asarray(prior.benchmarks) != "b0", 1]).all()


def test_the_mean_score_is_over_benchmarks_and_an_unknown_score_counts_as_the_candidates_mean():
    scores = np.array([[1, 0], [1, 0], [0, np.nan], [0, 0.5]])
    assert mean_score(np.array([0, 0, 1, 1]), scores, ["a", "a", "b", "b"]) == 0.75


def test_in_the_objective_correctness_an_expert_more_changes_no_other_row():
    """Each row is its own problem, and the strength does not depend on the number of rows."""
    problem = make_problem()
    alone = replace(problem, targets=problem.targets[:, :1], scores=problem.scores[:, :1])
    options = {"objective": "correctness", "l2": [0.1]}
    torch.testing.assert_close(fit(problem, **options).rows[:1], fit(alone, **options).rows, rtol=1e-3, atol=2e-3)
