import json

import numpy as np
import pytest

from expertoken.data_prep.supervision import Supervision, build_supervision
from expertoken.evaluation.evaluate import evaluate
from expertoken.evaluation.metrics import benchmark_means, bootstrap_interval
from expertoken.evaluation.plots import draw_scores
from expertoken.modeling.errors import ExpertokenError
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.run import train


@pytest.fixture
def composite_folder(tmp_path, base_folder, results, pool):
    from transformers import TrainingArguments

    build_supervision(results, pool).save(tmp_path / "supervision")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "supervision"), verify=False)
    return train(options, TrainingArguments(output_dir=str(tmp_path / "composite"), use_cpu=True, report_to="none"))


def test_the_report_holds_the_composite_its_experts_and_the_bounds(composite_folder, tmp_path):
    report = evaluate(composite_folder)
    names = [row.name for row in report.rows]
    assert names[0] == "composite"
    assert set(names) >= {"math", "law", "self", "best per dataset", "random", "oracle"}
    assert report.row("oracle").mean == 1
    assert report.row("math").mean == pytest.approx(1 / 3)
    assert report.composite.mean > 0.9
    assert sum(report.shares.values()) == pytest.approx(1)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["name"] == "composite"


def test_the_composites_mean_is_that_of_the_candidates_it_chose(composite_folder):
    report = evaluate(composite_folder)
    supervision = Supervision.load(composite_folder.parent / "supervision")
    from expertoken.inference.composite import CompositeModel

    composite = CompositeModel.from_pretrained(composite_folder, device="cpu")
    test = supervision.data["test"]
    got = []
    for row in test:
        chosen = composite.route(row["messages"]).expert
        got.append(row["scores"][supervision.info.candidates.index(chosen)])
    expected = benchmark_means(np.array(got), test["benchmark"])
    assert report.composite.benchmarks == pytest.approx(expected)


def test_a_gain_is_paired_and_its_interval_holds_the_gain(composite_folder):
    for row in evaluate(composite_folder).rows[1:]:
        gain, low, high = row.gain
        assert low <= gain <= high


def test_a_side_or_candidate_that_is_not_there_is_named(composite_folder, results):
    with pytest.raises(ExpertokenError, match="no 'dev' side; it has train"):
        evaluate(composite_folder, split="dev")
    with pytest.raises(ExpertokenError, match="has no scores of self"):
        evaluate(composite_folder, build_supervision(results.select(["math", "law"])))


def test_the_bootstrap_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(0)
    values = (rng.random(400) < 0.7).astype(float)
    benchmarks = ["a"] * 200 + ["b"] * 200
    low, high = bootstrap_interval(values, benchmarks)
    mean = np.mean(list(benchmark_means(values, benchmarks).values()))
    half = 1.96 * np.sqrt(sum(values[part].var() / 200 for part in (slice(0, 200), slice(200, 400)))) / 2
    assert low == pytest.approx(mean - half, abs=0.006)
    assert high == pytest.approx(mean + half, abs=0.006)
    assert bootstrap_interval(values, benchmarks) == (low, high)


def test_the_plot_is_a_png(composite_folder, tmp_path):
    pytest.importorskip("matplotlib")
    draw_scores(evaluate(composite_folder), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_queries_nobody_was_measured_on_are_left_out(composite_folder, results, pool, caplog):
    gaps = build_supervision(results, pool)
    side = gaps.data["test"]
    blank = side.map(lambda row, i: {"scores": [float("nan")] * 3} if i < 4 else {}, with_indices=True)
    gaps.data["test"] = blank.cast(side.features)
    report = evaluate(composite_folder, gaps)
    assert report.settings["queries"] == len(side) - 4
    assert report.row("oracle").mean == 1
