import json

import numpy as np
import pandas as pd
import pytest

from expertoken.data_prep.labels import label, winners
from expertoken.data_prep.leaks import find_leaks
from expertoken.data_prep.results import BenchmarkResults, ResultsError
from expertoken.data_prep.supervision import LeakError, Supervision, build_supervision, pool_of
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert, ExpertPool

nan = float("nan")


def test_winners_of_a_tie_share_it_unless_self_is_among_them():
    scores = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 1], [nan, 0.5, 0.2], [nan, nan, nan]])
    np.testing.assert_array_equal(winners(scores), [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0, 1], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(
        winners(scores, self_index=2), [[0.5, 0.5, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]]
    )


def test_query_level_gives_weight_to_queries_that_tell_candidates_apart():
    scores = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, nan], [nan, nan, nan]])
    groups, train = ["g"] * 5, np.ones(5, bool)
    assert label(scores, groups, train)[1].tolist() == [1, 0, 0, 1, 0]
    # Everybody right, self too: that teaches to keep the query.
    assert label(scores, groups, train, self_index=2)[1].tolist() == [1, 0, 1, 1, 0]


def test_subject_level_labels_by_the_winner_of_the_train_side_only():
    scores = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]], dtype=float)
    groups = ["law", "law", "law", "law", "unseen"]
    train = np.array([True, True, False, False, False])
    targets, weights = label(scores, groups, train, "subject")
    assert targets.argmax(1).tolist() == [0, 0, 0, 0, 0]
    assert weights.tolist() == [1] * 5


def test_soft_labels_are_distributions_over_the_measured():
    targets, _ = label(np.array([[1, 0, nan]]), ["g"], np.ones(1, bool), "soft", temperature=0.5)
    assert targets[0, 2] == 0
    assert targets.sum() == pytest.approx(1)
    assert targets[0, 0] / targets[0, 1] == pytest.approx(np.exp(2), rel=1e-5)


def test_an_unknown_strategy_names_the_nearest():
    with pytest.raises(ExpertokenError, match="did you mean 'subject'"):
        label(np.ones((1, 1)), ["g"], np.ones(1, bool), "subjects")


def test_supervision_survives_its_folder(tmp_path, results, pool):
    built = build_supervision(results, pool)
    built.save(tmp_path / "s")
    loaded = Supervision.load(tmp_path / "s")
    assert loaded.info == built.info
    assert loaded.info.candidates == ["math", "law", "self"]
    for side in ("train", "validation", "test"):
        for one, two in zip(loaded.arrays(side), built.arrays(side), strict=True):
            np.testing.assert_array_equal(one, two)
    assert loaded.data["train"][0]["messages"][0]["role"] == "user"


def test_a_query_of_the_chats_is_for_self(results, pool):
    side = build_supervision(results, pool).data["train"]
    chats = [row["target"] for row in side if row["benchmark"] == "chats"]
    assert chats
    assert all(target == [0, 0, 1] for target in chats)


def leaky():
    frame = pd.DataFrame(
        {
            "id": ["1", "2", "3"],
            "prompt": ["What is  Law?", "what is law", "else"],
            "benchmark": "b",
            "subject": None,
            "split": ["train", "test", "train"],
        }
    )
    return BenchmarkResults(frame, ["a", "b"], [[1, 0], [0, 1], [1, 0]])


def test_leaks_are_found_after_normalising():
    assert find_leaks(["What is  Law?", "other"], ["what IS ｌaw", "else"]) == [(0, 0)]  # noqa: RUF001
    assert find_leaks(["What is 5 + 3?"], ["What is 5 - 3?"]) == []


def test_a_leak_is_refused_unless_told():
    with pytest.raises(LeakError, match="1 train or validation queries .*1 = 2"):
        build_supervision(leaky(), validation=0)
    assert build_supervision(leaky(), validation=0, leaks="drop").info.sizes["train"] == 1
    assert build_supervision(leaky(), validation=0, leaks="keep").info.sizes["train"] == 2


def test_an_expert_without_results_is_named(results):
    pool = ExpertPool([Expert("math", model="m"), Expert("physics", model="org/physics")])
    with pytest.raises(ResultsError, match="expert 'physics': no results under that name nor 'org/physics'"):
        build_supervision(results, pool)


def test_results_without_any_difference_teach_nothing(results):
    results.scores[:] = 1
    with pytest.raises(ResultsError, match="nothing to learn from"):
        build_supervision(results.select(["math", "law"]))


def test_a_pool_is_made_from_the_models_where_none_is_given(results):
    pool = pool_of(results, self_model="meta")
    assert pool.names == ["math", "law", "self"]
    assert pool["self"].find_in(results.models) == "meta"


def test_a_folder_that_is_no_supervision_is_one_line(tmp_path):
    with pytest.raises(ExpertokenError, match="not a supervision folder") as error:
        Supervision.load(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "supervision.json").write_text(json.dumps({"candidates": []}))
    with pytest.raises(ExpertokenError, match="not a supervision folder"):
        Supervision.load(tmp_path)
