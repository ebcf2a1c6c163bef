import numpy as np
import pytest

from expertoken.data_prep.supervision import build_supervision
from expertoken.evaluation.select import _corrected, _smooth, select
from expertoken.modeling.errors import ExpertokenError

SUMS = [f"Compute {10 + i} plus 4." for i in range(8)]


def test_the_expert_of_the_like_benchmark_comes_first(composite_folder):
    ranking = select(composite_folder, SUMS)
    assert ranking[0].name == "math"
    assert ranking[0].s1 > 0.9
    assert ranking[0].average == pytest.approx(1 / 3, abs=0.02)
    for entry in ranking:
        assert entry.s3 == pytest.approx(entry.s2 * entry.trust + (1 - entry.s2) * (1 - entry.trust))


def test_a_handful_of_labelled_examples_is_used(composite_folder):
    """On this task law is right and math is wrong, contrary to the benchmarks."""
    labelled = (SUMS[:5], np.tile([0.0, 1.0, np.nan], (5, 1)))
    before = {entry.name: entry for entry in select(composite_folder, SUMS[5:])}
    after = {entry.name: entry for entry in select(composite_folder, SUMS[5:], labelled=labelled)}
    assert after["math"].trust < before["math"].trust
    assert after["math"].s3 < before["math"].s3
    assert after["law"].s1 > before["law"].s1
    assert after["self"].trust == pytest.approx(before["self"].trust, abs=1e-12)  # not measured


def test_the_smoother_takes_the_accuracy_of_tasks_as_far_away():
    distances, accuracies = np.array([0.1, 0.2, 0.8]), np.array([[0.9], [0.9], [0.5]])
    near, far = _smooth(distances, accuracies, 0.15)[0], _smooth(distances, accuracies, 0.8)[0]
    assert near > far
    assert 0.5 <= far <= near <= 0.9
    assert _smooth(distances, accuracies, 50.0)[0] == pytest.approx(0.5, abs=1e-3)


def test_the_correction_is_a_mean_over_examples_and_prior():
    predicted, truth = np.array([[0.9], [0.1], [0.8]]), np.array([[1.0], [1.0], [np.nan]])
    assert _corrected(np.array([0.5]), predicted, truth)[0] == pytest.approx((1 + 5 * 0.5) / (2 + 5))


def test_what_can_not_be_ranked_is_said(composite_folder, results, pool, tmp_path):
    with pytest.raises(ExpertokenError, match="expected at least one query of the task"):
        select(composite_folder, [])
    results.queries["benchmark"] = "one"
    build_supervision(results, pool).save(tmp_path / "one")
    with pytest.raises(ExpertokenError, match="expected results of at least two benchmarks, found one"):
        select(composite_folder, SUMS, data=tmp_path / "one")
