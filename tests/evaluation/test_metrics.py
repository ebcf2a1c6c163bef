import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from expertoken.evaluation.metrics import (
    REFERENCE_SCORES,
    Curve,
    among_the_best,
    apgr,
    bootstrap_interval,
    calibration,
    calibration_errors,
    calibration_floor,
    chosen_scores,
    confusion,
    cost_save,
    cpt,
    entropy_bits,
    holm,
    mean_over_benchmarks,
    mixed,
    oracle,
    paired_p_value,
    perf_gain,
    reference_score,
    resample_counts,
    solved_by_few,
    strong_share_curve,
    trade_off,
)

unit = st.floats(0, 1, allow_nan=False, width=32)
points = st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 1)), min_size=1, max_size=12)
pairs = st.lists(st.tuples(unit, st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=4, max_size=40)


@given(arrays(float, (9, 4), elements=st.floats(0.01, 1)))
def test_entropy_is_the_sum_of_minus_p_log_p(raw):
    p = raw / raw.sum(1, keepdims=True)
    plain = sum(-value * math.log2(value) for row in p for value in row) / len(p)
    assert entropy_bits(p) == pytest.approx(plain)
    assert entropy_bits(np.full((3, 8), 1 / 8)) == pytest.approx(3)
    assert entropy_bits(np.eye(4)) == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), unit), min_size=1, max_size=30))
def test_mean_over_benchmarks_is_the_mean_of_means(rows):
    names, values = [name for name, _ in rows], np.array([value for _, value in rows])
    plain = [np.mean([v for n, v in rows if n == name]) for name in sorted(set(names))]
    assert mean_over_benchmarks(values, names) == pytest.approx(np.mean(plain))


def test_the_partial_oracle_is_the_mean_of_its_draws():
    rng = np.random.default_rng(0)
    scores = rng.random((30, 5))
    drawn = [
        np.where(rng.random(30) < 0.3, scores.max(1), chosen_scores(scores, rng.integers(5, size=30)))
        for _ in range(4000)
    ]
    found = mixed(scores.max(1), scores.mean(1), 0.3)
    np.testing.assert_allclose(found, np.mean(drawn, axis=0), atol=0.03)
    np.testing.assert_allclose(mixed(scores.max(1), scores.mean(1), 1.0), scores.max(1))


def hull_height(given_points, cost):
    """Compute the best quality at a mean cost by mixing at most two points, directly from the definition."""
    best = max((q for c, q in given_points if c <= cost), default=None)
    for c1, q1 in given_points:
        for c2, q2 in given_points:
            if c1 <= cost < c2:
                best = max(best, q1 + (q2 - q1) * (cost - c1) / (c2 - c1))
    return best


@given(points, st.floats(0, 1))
def test_the_hull_is_the_best_mixture_of_two_points(given_points, place):
    curve = Curve(*np.array(given_points).T)
    costs, qualities = curve.hull()
    assert (np.diff(costs) > 0).all()
    assert (np.diff(qualities) > 0).all()
    low, high = min(c for c, _ in given_points), max(c for c, _ in given_points)
    cost = low + place * (high - low)
    assert np.interp(cost, costs, qualities) == pytest.approx(hull_height(given_points, cost), abs=1e-6)


@given(points)
def test_aiq_is_the_mean_height_of_the_hull(given_points):
    curve = Curve(*np.array(given_points).T)
    low, high = curve.costs.min(), curve.costs.max()
    if high - low < 1e-3:
        return
    grid = low + (high - low) * (np.arange(400) + 0.5) / 400
    plain = np.mean([hull_height(given_points, cost) for cost in grid])
    assert curve.aiq() == pytest.approx(plain, abs=5e-3)


def test_aiq_over_a_common_range_goes_on_flat_above_and_is_nothing_below():
    curve = Curve(np.array([1.0, 2.0]), np.array([0.5, 0.7]))
    assert curve.aiq(0, 4) == pytest.approx((0 + 0.6 + 0.7 * 2) / 4)
    assert curve.aiq(3, 4) == pytest.approx(0.7)
    assert curve.aiq(0, 0.5) == 0


@given(pairs)
def test_apgr_is_the_mean_recovered_gap_over_shares(rows):
    preference, weak, strong = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    if abs(strong.mean() - weak.mean()) < 1e-6 or len(np.unique(preference)) < len(preference):
        return
    order = sorted(range(len(rows)), key=lambda i: -preference[i])
    recovered = []
    for calls in range(len(rows) + 1):
        to_strong = set(order[:calls])
        quality = np.mean([strong[i] if i in to_strong else weak[i] for i in range(len(rows))])
        recovered.append((quality - weak.mean()) / (strong.mean() - weak.mean()))
    plain = np.mean([(a + b) / 2 for a, b in zip(recovered, recovered[1:])])  # noqa: B905, RUF007
    assert apgr(preference, weak, strong) == pytest.approx(plain, abs=1e-9)
    for share in (0.5, 0.8):
        first = next((calls for calls, value in enumerate(recovered) if value >= share - 1e-12), None)
        expected = float("nan") if first is None else first / len(rows)
        assert cpt(preference, weak, strong, share) == pytest.approx(expected, nan_ok=True)


def test_a_router_without_preference_recovers_half_the_gap():
    rng = np.random.default_rng(1)
    weak, strong = rng.integers(0, 2, 500).astype(float), np.ones(500)
    assert apgr(np.zeros(500), weak, strong) == pytest.approx(0.5)
    assert cpt(np.zeros(500), weak, strong, 0.5) == pytest.approx(0.5, abs=0.01)
    assert apgr(strong - weak, weak, strong) > 0.7
    shares, qualities = strong_share_curve(np.zeros(500), weak, strong)
    np.testing.assert_allclose(qualities, weak.mean() + shares * (1 - weak.mean()))


def test_gains_over_the_best_single_model():
    curve = Curve(np.array([1.0, 2.0, 4.0]), np.array([0.5, 0.6, 0.66]))
    assert perf_gain(curve, 0.6) == pytest.approx(0.1)
    assert cost_save(curve, 0.6, 5.0) == pytest.approx(0.6)
    assert math.isnan(cost_save(curve, 0.7, 5.0))


def test_the_trade_off_goes_from_the_best_expected_to_the_cheapest():
    scores = np.array([[1.0, 0.0], [1.0, 1.0]])
    costs = np.array([[4.0, 1.0], [4.0, 1.0]])
    outcomes = trade_off(np.array([[0.9, 0.2], [0.9, 0.8]]), scores, costs, np.array([4.0, 1.0]), [0.0, 0.1, 10.0])
    curve = outcomes.curve()
    np.testing.assert_allclose(curve.costs, [4, 2.5, 1])
    np.testing.assert_allclose(curve.qualities, [1, 1, 0.5])


def test_recall_counts_queries_that_few_candidates_solve():
    scores = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=float)
    found = {count: rows.tolist() for count, rows in solved_by_few(scores).items()}
    assert found == {1: [0, 1], 2: [2], 3: [3]}


def test_of_several_best_candidates_the_oracle_takes_the_cheapest_whatever_their_order():
    scores, costs = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]), np.array([[3.0, 1.0, 0.1], [0.1, 2.0, np.nan]])
    assert oracle(scores, costs).tolist() == [1, 1]
    assert oracle(scores[:, ::-1], costs[:, ::-1]).tolist() == [1, 1]
    assert oracle(scores).tolist() == [0, 1]


def test_resamples_draw_as_many_queries_of_each_benchmark_as_there_are():
    names = np.array(["a"] * 30 + ["b"] * 10)
    counts = resample_counts(names, 200)
    assert (counts[:, :30].sum(1) == 30).all()
    assert (counts[:, 30:].sum(1) == 10).all()
    assert counts.std() == pytest.approx(1, abs=0.05)


def test_a_benchmark_is_known_to_its_reference_however_it_is_spelt():
    assert reference_score("ARC-Challenge") == reference_score("arc_challenge") == 0.852
    assert reference_score("truthfulqa_mc2") == 0.669
    assert reference_score("mmlu_pro") == 0.637
    assert reference_score("legal") is None


def test_a_choice_among_the_best_counts_and_confusion_adds_up():
    scores = np.array([[1, 1, 0], [0, 1, 0.0]])
    assert among_the_best(scores, np.array([1, 0])).tolist() == [True, False]
    table = confusion(np.array([[0.5, 0.5, 0], [0, 1, 0]]), np.array([1, 0]))
    np.testing.assert_array_equal(table, [[0, 0.5, 0], [1, 0.5, 0], [0, 0, 0]])


def test_calibration_error_is_the_gap_between_sureness_and_outcome():
    sure = np.array([0.9] * 10 + [0.5] * 10)
    right = np.array([1.0] * 7 + [0.0] * 3 + [1.0] * 5 + [0.0] * 5)
    assert [count for *_, count in calibration(sure, right)] == [10, 10]
    once, one_bin = np.ones(20, int), np.repeat([1, 0], 10)
    np.testing.assert_allclose(calibration_errors(sure, right, np.stack([once, one_bin])), [0.1, 0.2])
    assert calibration_errors(np.array([1.0]), np.array([1.0]), np.ones((1, 1)))[0] == 0


def test_a_p_value_is_small_for_a_real_difference_and_large_for_none():
    rng = np.random.default_rng(2)
    names = np.array(["a", "b"] * 200)
    assert paired_p_value(rng.normal(0.3, 1, 400), names) < 0.01
    assert paired_p_value(rng.choice([-1.0, 1.0], 400), names) > 0.05
    assert paired_p_value(np.zeros(400), names) == 1


@pytest.mark.parametrize("same", [1, 6, 8])
def test_a_p_value_on_few_queries_is_that_of_the_exact_test(same):
    """All differences have one sign, so that two of the 2^n flips are as extreme."""
    difference = np.array([1.0] * same + [0.0] * 2)
    found = paired_p_value(difference, np.array(["a"] * len(difference)), resamples=20_000)
    assert found == pytest.approx(2 / 2**same, abs=0.01, rel=0.3)


def test_the_bootstrap_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, 400).astype(float)
    names = np.array(["a"] * 300 + ["b"] * 100)
    low, high = bootstrap_interval(values, names)
    error = np.sqrt(sum(values[names == n].var() / (names == n).sum() for n in "ab")) / 2
    middle = mean_over_benchmarks(values, names)
    assert low == pytest.approx(middle - 1.96 * error, abs=0.006)
    assert high == pytest.approx(middle + 1.96 * error, abs=0.006)


def test_the_names_of_routerevals_own_files_have_their_reference():
    names = {
        "harness_arc_challenge_25": "arc", "harness_hellaswag_10": "hellaswag", "harness_gsm8k_5": "gsm8k",
        "harness_hendrycksTest_college_physics_5": "mmlu", "harness_truthfulqa_mc_0": "truthfulqa",
        "leaderboard_bbh_boolean_expressions": "bbh", "leaderboard_math_algebra_hard": "math",
        "leaderboard_musr_murder_mysteries": "musr", "leaderboard_gpqa_main": "gpqa",
        "leaderboard_mmlu_pro": "mmlu_pro", "harness|winogrande|5": "winogrande",
        "leaderboard_ifeval": "ifeval", "bbh": "bbh",
    }  # fmt: skip
    assert {name: reference_score(name) for name in names} == {
        name: REFERENCE_SCORES[reference] for name, reference in names.items()
    }
    assert reference_score("harness_mathematics_tutor") is None


def test_p_values_are_adjusted_for_their_number():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_perfect_probabilities_show_an_error_by_chance_that_falls_with_the_queries():
    rng = np.random.default_rng(0)
    few, many = (calibration_floor(rng.random(count)) for count in (50, 5000))
    assert 0.08 < few < 0.25
    assert 0 < many < 0.03
    assert calibration_floor(np.ones(100)) == 0
