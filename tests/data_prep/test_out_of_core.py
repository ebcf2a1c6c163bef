"""Streamed labels are those of the table in memory."""

import numpy as np
import pandas as pd
import pytest

from expertoken.data_prep.labels import Labelling, label
from expertoken.data_prep.out_of_core import label_records
from expertoken.modeling.errors import ExpertokenError, ResultsError

pytest.importorskip("duckdb")


def write(folder, seed, missing=0.2):
    """Random results as two Parquet tables, and as arrays."""
    rng = np.random.default_rng(seed)
    count, models = 60, ["a", "b", "c", "d"]
    scores = rng.choice([0.0, 0.25, 1.0], (count, len(models)))
    scores[rng.random(scores.shape) < missing] = np.nan
    scores[:2] = [[0, 0, 0, 0], [1, 1, 1, 1]]
    costs = rng.choice([0.01, 0.1, 0.2], scores.shape)  # a few values, so that costs tie too
    scores[5] = np.nan  # a query nobody was measured on
    queries = pd.DataFrame(
        {
            "id": [f"q{i:03}" for i in range(count)],
            "prompt": "?",
            "benchmark": rng.choice(["x", "y", "z"], count),
            "subject": rng.choice(["s", "t", None], count),
            "split": rng.choice(["train", "validation", "test"], count),
        }
    )
    queries.loc[queries["benchmark"] == "z", "split"] = "test"  # a benchmark the learning side does not have
    rows, columns = np.nonzero(~np.isnan(scores))
    records = pd.DataFrame(
        {
            "id": queries["id"].to_numpy()[rows],
            "model": np.array(models)[columns],
            "score": scores[rows, columns].astype(np.float32),
            "cost": costs[rows, columns],
        }
    ).sample(frac=1, random_state=seed)
    queries.to_parquet(folder / "queries.parquet")
    (folder / "records").mkdir()
    records[:50].to_parquet(folder / "records" / "one.parquet")
    records[50:].to_parquet(folder / "records" / "two.parquet")
    return queries, models, scores, costs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "labelling",
    [
        Labelling("query"),
        Labelling("query", ties="best"),
        Labelling("query", ties="cheapest"),
        Labelling("query", cost_weight=3.0),
        Labelling("subject"),
        Labelling("subject", ties="cheapest"),
        Labelling("subject", shrinkage=7.0),
        Labelling("subject", ties="best", cost_weight=2.0),
    ],
    ids=lambda labelling: f"{labelling.strategy}-{labelling.ties}-{labelling.shrinkage:g}-{labelling.cost_weight:g}",
)
def test_streamed_labels_are_those_of_the_table_in_memory(tmp_path, seed, labelling):
    queries, models, scores, costs = write(tmp_path, seed)
    learning = (queries["split"] != "test").to_numpy()
    targets, weights = label(scores, queries["benchmark"], queries["subject"], learning, labelling, costs=costs)
    done = label_records(tmp_path / "records", tmp_path / "queries.parquet", tmp_path / "labels.parquet", labelling)
    found = pd.read_parquet(tmp_path / "labels.parquet")
    assert found["id"].tolist() == queries["id"].tolist()
    measured = ~np.isnan(scores).all(1)
    np.testing.assert_array_equal(found["weight"].to_numpy(), weights)
    for row in np.flatnonzero(measured & (weights > 0)):
        expected = {models[column] for column in np.flatnonzero(targets[row] > 0)}
        assert set(found["winners"][row]) == expected, row
    assert done.models == 4
    assert done.records == (~np.isnan(scores)).sum()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda q, r: r.rename(columns={"score": "scores"}, inplace=True), "records: no column 'score', did you mean"),
        (lambda q, r: r.__setitem__("score", 3.0), "records: model 'a': score 3 is outside"),
        (lambda q, r: q.__setitem__("id", "same"), "queries.parquet: query id 'same' appears twice"),
        (lambda q, r: r.__setitem__("score", np.nan), "records: empty results, no record has a score"),
    ],
)  # fmt: skip
def test_malformed_tables_are_one_line(tmp_path, damage, message):
    queries = pd.DataFrame({"id": ["1", "2"], "benchmark": "b", "subject": None, "split": None})
    records = pd.DataFrame({"id": ["1", "2"], "model": "a", "score": [0.0, 1.0]})
    damage(queries, records)
    queries.to_parquet(tmp_path / "queries.parquet")
    (tmp_path / "records").mkdir()
    records.to_parquet(tmp_path / "records" / "r.parquet")
    with pytest.raises(ResultsError, match=message) as error:
        label_records(tmp_path / "records", tmp_path / "queries.parquet", tmp_path / "out.parquet")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.parquet").exists()


def test_what_can_not_be_streamed_or_read_is_said(tmp_path):
    with pytest.raises(ExpertokenError, match="'soft' with margin 0 are not made from a stream"):
        label_records(tmp_path, tmp_path, tmp_path / "o.parquet", "soft")
    with pytest.raises(ResultsError, match="no such file"):
        label_records(tmp_path / "none", tmp_path / "none", tmp_path / "o.parquet")
    (tmp_path / "r.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ResultsError, match="r.parquet: not a readable Parquet table"):
        label_records(tmp_path / "r.parquet", tmp_path / "r.parquet", tmp_path / "o.parquet")
