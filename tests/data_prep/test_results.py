import numpy as np
import pandas as pd
import pytest

from expertoken.data_prep.results import BenchmarkResults, with_one_name
from expertoken.data_prep.supervision import select_candidates
from expertoken.modeling.errors import ResultsError
from expertoken.modeling.experts import Expert
from expertoken.modeling.pool import ExpertPool


def make(ids, models, scores, **columns):
    count = len(ids)
    given = {"prompt": [f"p{i}" for i in ids], "benchmark": ["b"] * count, "subject": None, "split": None} | columns
    return BenchmarkResults(pd.DataFrame({"id": ids, **given}), models, scores)


def test_merging_unites_queries_and_models():
    merged = BenchmarkResults.merge([make(["1", "2"], ["a"], [[1], [0]]), make(["2", "3"], ["b"], [[1], [1]])])
    assert merged.models == ["a", "b"]
    np.testing.assert_array_equal(merged.scores, [[1, np.nan], [0, 1], [np.nan, 1]])


def test_merging_refuses_two_scores_for_one_query_and_model():
    with pytest.raises(ResultsError, match="query '1', model 'a': two different scores"):
        BenchmarkResults.merge([make(["1"], ["a"], [[1]]), make(["1"], ["a"], [[0]])])


def test_merging_refuses_one_id_for_two_prompts():
    with pytest.raises(ResultsError, match="different prompts"):
        BenchmarkResults.merge([make(["1"], ["a"], [[1]]), make(["1"], ["b"], [[1]], prompt=["other"])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["1", "1"], ["a"], [[1], [0]]), "query id '1' appears twice"),
        ((["1"], ["a", "a"], [[1, 0]]), "model 'a' appears twice"),
        ((["1"], ["a"], [[1.5]]), "score 1.5 is outside"),
        (([], ["a"], np.zeros((0, 1))), "empty results"),
    ],
)
def test_bad_results_are_refused(arguments, message):
    with pytest.raises(ResultsError, match=message):
        make(*arguments)


def test_selecting_a_model_without_any_score_is_refused():
    results = make(["1"], ["a", "b"], [[1, np.nan]])
    with pytest.raises(ResultsError, match="model 'b' has no score on any query"):
        results.select(["a", "b"])
    with pytest.raises(ResultsError, match="no results of model 'aa', did you mean 'a'|available: a, b"):
        results.select(["aa"])


def test_splits_are_stratified_repeatable_and_keep_what_files_state():
    ids = [str(i) for i in range(100)]
    results = make(ids, ["a"], np.ones((100, 1)), benchmark=["x"] * 50 + ["y"] * 50)
    one, two = results.split(seed=3), results.split(seed=3)
    assert one.queries.equals(two.queries)
    counts = one.queries.groupby(["benchmark", "split"]).size()
    assert counts["x", "test"] == counts["y", "test"] == 10
    assert counts["x", "validation"] == counts["y", "validation"] == 4
    stated = make(ids, ["a"], np.ones((100, 1)), split=["train"] * 60 + ["test"] * 40).split(validation=0.5)
    assert stated.queries["split"].value_counts().to_dict() == {"test": 40, "train": 30, "validation": 30}
    # A benchmark without stated splits is split itself, beside one whose files state them.
    both = make([*ids, *(f"n{i}" for i in range(50))], ["a"], np.ones((150, 1)), benchmark=["b"] * 100 + ["new"] * 50,
                split=["train"] * 60 + ["test"] * 40 + [None] * 50).split(test=0.2, validation=0.25)  # fmt: skip
    sizes = both.queries.groupby(["benchmark", "split"]).size().to_dict()
    assert sizes[("new", "test")] == 10
    assert (sizes[("b", "test")], sizes[("b", "train")]) == (40, 45)
    with pytest.raises(ResultsError, match="unknown split 'dev'"):
        make(["1"], ["a"], [[1]], split=["dev"]).split()


def test_the_summary_has_means_per_benchmark():
    summary = make(["1", "2", "3"], ["a"], [[1], [0], [np.nan]], benchmark=["x", "x", "y"]).summary()
    assert summary.loc["x", "a"] == 0.5
    assert summary.loc["x", "queries"] == 2
    assert np.isnan(summary.loc["y", "a"])


def test_a_side_that_only_one_file_states_is_kept_and_two_sides_are_refused():
    plain, stated = make(["1", "2"], ["a"], [[1], [0]]), make(["1", "2"], ["b"], [[1], [0]], split=["train", "test"])
    assert BenchmarkResults.merge([plain, stated]).queries["split"].tolist() == ["train", "test"]
    with pytest.raises(ResultsError, match="on different splits"):
        BenchmarkResults.merge([stated, make(["1"], ["c"], [[1]], split=["test"])])


def test_files_may_use_different_names_of_a_pool_for_one_expert():
    """As a leaderboard with hub ids and the feedback of a server with the experts' names."""
    pool = ExpertPool([Expert("law", model="org/law-8b"), Expert("math", model="org/math-7b", results="math-7b")])
    board = make(["a", "b"], ["law-8b", "math-7b"], [[1, 0], [0, 1]])
    feedback = make(["c", "d"], ["law", "math"], [[1, np.nan], [np.nan, 0]])
    merged = BenchmarkResults.merge(with_one_name([board, feedback], pool))
    chosen = select_candidates(merged, pool)
    np.testing.assert_array_equal(chosen.scores, [[1, 0], [0, 1], [1, np.nan], [np.nan, 0]])


def test_a_column_that_is_another_model_in_the_same_file_stays_so():
    pool = ExpertPool([Expert("math", model="org/math-7b", results="math-7b")])
    board = make(["a", "b"], ["math", "math-7b"], [[1, 0], [1, 1]])
    [named] = with_one_name([board], pool)
    assert named.models == ["math", "math-7b"]


def test_a_model_of_two_experts_keeps_its_column_whichever_file_comes_first():
    pool = ExpertPool([Expert("a", model="org/x"), Expert("b", model="org/x")])
    own, shared = make(["1"], ["a", "b"], [[1, 0]]), make(["2"], ["org/x"], [[1]])
    for parts in ([own, shared], [shared, own]):
        assert set(BenchmarkResults.merge(with_one_name(parts, pool)).models) == {"a", "b", "org/x"}
