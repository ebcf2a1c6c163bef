import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from expertoken.data_prep.labels import STRATEGIES, Labelling, absent, fill_unknown, label, winners
from expertoken.modeling.errors import ExpertokenError

nan = float("nan")


def test_winners_of_a_tie_share_it_unless_self_is_among_them():
    scores = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 1], [nan, 0.5, 0.2], [nan, nan, nan]])
    np.testing.assert_array_equal(winners(scores), [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0, 1], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(
        winners(scores, self_index=2), [[0.5, 0.5, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]]
    )


def test_query_level_gives_weight_to_queries_that_tell_candidates_apart():
    scores = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, nan], [nan, nan, nan]])
    # The fourth query's third score is unknown, not wrong, so the query does not separate the candidates.
    assert label(scores, ["g"] * 5)[1].tolist() == [1, 0, 0, 0, 0]
    # All are right, self too, so the query teaches that self should answer it.
    assert label(scores, ["g"] * 5, self_index=2)[1].tolist() == [1, 0, 1, 0, 0]


def test_who_has_no_score_in_a_benchmark_is_no_candidate_there_and_tells_the_others_apart():
    scores = np.array([[1, nan], [0, nan], [1, 1], [1, nan]])
    benchmarks = ["a", "a", "b", "b"]
    assert absent(scores, benchmarks).tolist() == [[False, True], [False, True], [False, False], [False, False]]
    targets, weights = label(scores, benchmarks)
    assert weights.tolist() == [1, 0, 0, 0]
    assert targets[0].tolist() == [1, 0]


def test_an_unknown_score_counts_as_the_candidates_mean_in_the_benchmark():
    scores = np.array([[1, 0.5], [0, nan], [nan, 1], [0, nan]])
    filled = fill_unknown(scores, ["a", "a", "a", "b"])
    assert filled.tolist() == [[1, 0.5], [0, 0.75], [0.5, 1], [0, 0.75]]


def test_ties_go_to_the_cheapest_or_to_the_best_overall_where_asked():
    scores = np.array([[1.0, 1, 0], [0, 1, 0], [1, 1, 1]])
    costs = np.array([[0.1, 0.2, 0.01], [0.1, 0.2, 0.01], [nan, 0.2, 0.3]])
    cheap, _ = label(scores, ["g"] * 3, labelling=Labelling(ties="cheapest"), costs=costs)
    assert cheap.argmax(1).tolist() == [0, 1, 0]  # an unknown cost is the model's mean, 0.1
    assert (cheap.max(1) == 1).all()
    best, _ = label(scores, ["g"] * 3, labelling=Labelling(ties="best"))
    assert best.argmax(1).tolist() == [1, 1, 1]


def test_subject_level_labels_by_the_winner_of_the_learning_side_only():
    scores = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]], dtype=float)
    learning = np.array([True, True, False, False, False])
    benchmarks = ["law", "law", "law", "law", "unseen"]
    targets, weights = label(scores, benchmarks, learning=learning, labelling="subject")
    assert targets.argmax(1).tolist() == [0, 0, 0, 0, 0]
    assert weights.tolist() == [1] * 5


def test_shrinkage_keeps_a_small_subject_from_crowning_a_winner_by_chance():
    """The first candidate is right on 8 of 10 queries. One subject has a single query, on which the second is right."""
    scores = np.array([[1.0, 0]] * 8 + [[0, 0]] + [[0, 1.0]])
    subjects = ["big"] * 9 + ["tiny"]
    plain, _ = label(scores, ["b"] * 10, subjects, labelling="subject")
    assert plain[-1].tolist() == [0, 1]
    shrunken, _ = label(scores, ["b"] * 10, subjects, labelling=Labelling("subject", shrinkage=5))
    # (0 + 5 * 0.8) / 6 against (1 + 5 * 0.1) / 6
    assert shrunken[-1].tolist() == [1, 0]
    assert shrunken[0].tolist() == [1, 0]


def test_a_subject_without_learning_queries_takes_its_benchmarks_winner():
    scores = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0, 1]])
    benchmarks = ["a", "a", "b", "b", "b", "a"]
    subjects = ["x", "x", "y", "y", "y", "new"]
    learning = np.array([True] * 5 + [False])
    targets, _ = label(scores, benchmarks, subjects, learning, "subject")
    assert targets[-1].tolist() == [1, 0]


def test_mixed_labels_are_the_sum_of_both_and_the_subjects_where_a_query_tells_nothing():
    scores = np.array([[1.0, 0], [1, 0], [0, 1], [1, 1]])
    targets, weights = label(scores, ["b"] * 4, labelling=Labelling("mixed", beta=0.25))
    np.testing.assert_allclose(targets, [[1, 0], [1, 0], [0.75, 0.25], [1, 0]])
    assert weights.tolist() == [1] * 4


def test_a_mixed_label_is_the_querys_own_where_the_learning_side_measured_nobody():
    targets, _ = label(np.array([[0.3, nan]]), ["g"], learning=np.array([False]), labelling="mixed")
    assert targets.tolist() == [[1, 0]]


def test_soft_labels_are_distributions_over_the_measured():
    targets, _ = label(np.array([[1, 0, nan]]), ["g"], labelling=Labelling("soft", temperature=0.5))
    assert targets[0, 2] == 0
    assert targets.sum() == pytest.approx(1)
    assert targets[0, 0] / targets[0, 1] == pytest.approx(np.exp(2), rel=1e-5)


def test_correctness_and_expected_score_count_every_measured_query():
    scores = np.array([[1, 0], [0, 0], [1, 1], [nan, nan]])
    for strategy in ("correctness", "expected_score"):
        assert label(scores, ["g"] * 4, labelling=strategy)[1].tolist() == [1, 1, 1, 0]


def test_a_lead_within_the_noise_counts_less():
    scores = np.array([[0.9, 0.8], [1.0, 0.0], [0.5, 0.5]])
    weights = label(scores, ["g"] * 3, labelling=Labelling(margin=0.4))[1]
    np.testing.assert_allclose(weights, [0.25, 1, 0], rtol=1e-5)


def test_what_costs_decide_needs_costs():
    for labelling in (Labelling(ties="cheapest"), Labelling(cost_weight=1.0)):
        with pytest.raises(ExpertokenError, match="expected costs in the results, found none"):
            label(np.ones((1, 2)), ["g"], labelling=labelling)


@pytest.mark.parametrize("wrong", [{"beta": 2.0}, {"ties": "bets"}, {"temperature": 0.0}, {"strategy": "quary"}])
def test_a_parameter_out_of_range_is_named(wrong):
    with pytest.raises(ExpertokenError, match=next(iter(wrong)) if "strategy" not in wrong else "did you mean 'query'"):
        Labelling(**wrong)


@pytest.mark.parametrize(
    ("strategy", "option"),
    [("soft", "beta"), ("query", "shrinkage"), ("correctness", "margin"), ("mixed", "temperature")],
)
def test_an_option_that_a_strategy_does_not_read_is_refused(strategy, option):
    with pytest.raises(ExpertokenError, match=f"{option}: labels by '{strategy}' do not depend on it. Use it with "):
        Labelling(strategy, **{option: 0.7})


def test_an_expert_is_not_cheap_for_not_saying_what_it_costs(caplog):
    costs = np.array([[0.001, nan], [0.001, 0.02], [0.001, nan]])
    scores = np.ones((3, 2), np.float32)
    targets, _ = label(scores, ["g"] * 3, labelling=Labelling(cost_weight=10.0), costs=costs)
    assert targets.argmax(1).tolist() == [0, 0, 0]
    costs[1, 1] = nan
    targets, _ = label(scores, ["g"] * 3, labelling=Labelling(cost_weight=10.0), costs=costs, names=["a", "b"])
    assert (targets == 0.5).all()  # an unknown cost counts as the greatest known one, which is the other candidate's
    assert "no cost is known of b" in caplog.text
    with pytest.raises(ExpertokenError, match="expected costs of the candidates, found none"):
        label(scores, ["g"] * 3, labelling=Labelling(cost_weight=10.0), costs=np.full((3, 2), nan))
    self_answers, _ = label(scores, ["g"] * 3, labelling=Labelling(cost_weight=10.0), costs=costs, self_index=1)
    assert self_answers.argmax(1).tolist() == [1, 1, 1]  # self calls no other model


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    scores=arrays(np.float32, (7, 3), elements=st.sampled_from([0.0, 0.3, 1.0, nan])),
    self_index=st.sampled_from([None, 2]),
    ties=st.sampled_from(["all", "best", "cheapest"]),
    cost_weight=st.sampled_from([0.0, 2.0]),
    more=st.sampled_from([0.0, 3.0]),
)
def test_targets_are_distributions_over_measured_candidates(strategy, scores, self_index, ties, cost_weight, more):
    costs = np.tile(np.array([0.3, 0.2, 0.1], np.float32), (7, 1))
    shrinkage = more if strategy in ("subject", "mixed") else 0.0
    ties = ties if strategy in ("query", "subject", "mixed") else "all"
    labelling = Labelling(strategy, ties=ties, cost_weight=cost_weight, shrinkage=shrinkage)
    learning = np.arange(7) < 5
    targets, weights = label(
        scores, list("aaabbbc"), list("xxyzzzw"), learning, labelling, costs=costs, self_index=self_index
    )
    assert np.isfinite(targets).all()
    assert ((weights >= 0) & (weights <= 1)).all()
    np.testing.assert_allclose(targets.sum(1)[weights > 0], 1, rtol=1e-5)
    if strategy in ("query", "soft", "correctness", "expected_score"):
        assert (targets[np.isnan(scores)] == 0).all()


@pytest.mark.parametrize("strategy", ["correctness", "soft", "expected_score"])
def test_ties_are_refused_where_they_change_nothing(strategy):
    with pytest.raises(ExpertokenError, match=f"ties: labels by '{strategy}' do not depend on it. Use it with query"):
        Labelling(strategy, ties="best")
