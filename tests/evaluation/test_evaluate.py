import json
import random
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from huggingface_hub import ModelCard
from transformers import TrainingArguments
from typer.testing import CliRunner

from expertoken.cli.app import app
from expertoken.data_prep.labels import Labelling
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import Supervision, build_supervision
from expertoken.evaluation import plots
from expertoken.evaluation.baselines import METHODS, embed
from expertoken.evaluation.evaluate import evaluate
from expertoken.evaluation.metrics import benchmark_means
from expertoken.evaluation.plots import draw_report
from expertoken.evaluation.report import Report, Result
from expertoken.evaluation.robustness import adversarial_suffix
from expertoken.inference.composite_model import CompositeModel
from expertoken.modeling.composite import load_composite, write_calibration
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.pool import RESERVED, ExpertPool
from expertoken.tests.tiny import tiny_pool, tiny_results, tiny_tokenizer
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.run import train


def test_the_report_holds_the_composite_its_experts_and_the_bounds(report, tmp_path):
    names = [row.name for row in report.results]
    assert names[0] == "composite"
    assert set(names) >= {"math", "law", "self", "best per dataset", "random", "oracle"}
    assert report.row("oracle").mean_score == 1
    assert report.row("math").mean_score == pytest.approx(1 / 3)
    assert report.composite.mean_score > 0.9
    assert sum(report.share_of_queries.values()) == pytest.approx(1)
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["name"] == "composite"


def test_the_composites_mean_is_that_of_the_candidates_it_chose(report, composite_folder):
    supervision = Supervision.load(composite_folder.parent / "supervision")
    composite = CompositeModel.from_pretrained(composite_folder, device="cpu")
    test = supervision.data["test"]
    got = []
    for row in test:
        chosen = composite.route(row["messages"]).expert
        got.append(row["scores"][supervision.info.candidates.index(chosen)])
    expected = benchmark_means(np.array(got), test["benchmark"])
    assert report.composite.score_by_benchmark == pytest.approx(expected)


def test_a_gain_is_paired_and_its_interval_holds_the_gain(report):
    for row in report.results[1:]:
        gain, (low, high) = row.composite_gain.difference, row.composite_gain.interval
        assert low <= gain <= high


def test_a_side_or_candidate_that_is_not_there_is_named(composite_folder, results):
    with pytest.raises(ExpertokenError, match="no 'dev' split, it has train"):
        evaluate(composite_folder, split="dev")
    with pytest.raises(ExpertokenError, match="has no scores of self"):
        evaluate(composite_folder, build_supervision(results.select(["math", "law"])))


@pytest.fixture(scope="module")
def priced(trained_once, base_folder):
    results = tiny_results()
    costs = np.array([0.01, 0.002, 0.0001]) * np.random.default_rng(0).uniform(0.5, 1.5, (len(results), 3))
    data = build_supervision(replace(results, costs=costs), tiny_pool(base_folder))
    return evaluate(trained_once / "composite", data, baselines=["kNN", "linear", "clusters"], robustness=10)


@pytest.fixture
def priced_report(priced):
    return deepcopy(priced)


def test_the_report_is_a_folder_with_pictures(priced_report, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = draw_report(priced_report, tmp_path / "report")
    assert {path.name for path in drawn} == {
        "scores.png", "gains.png", "experts.png", "shares.png", "reliability.png", "cost.png"
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    priced_report.save_folder(tmp_path / "report", drawn)
    text = (tmp_path / "report" / "report.md").read_text()
    for part in ("![cost](cost.png)", "| composite |", "AIQ, kNN", "## Robustness", "Better than best single", "AIQ: "):
        assert part in text
    priced_report.save_folder(tmp_path / "report")  # a report without plots replaces one with plots
    assert "cost.png" not in (tmp_path / "report" / "report.md").read_text()
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {"versions", "data_fingerprint", "seconds", "peak_memory_gib"} <= set(stored["settings"])


def test_pictures_survive_intervals_without_a_width_and_benchmarks_without_scores(priced_report, tmp_path):
    row = next(row for row in priced_report.results if row.kind == "expert")
    row.mean_score, row.mean_score_interval = 1 / 6, (1 / 6 + 1e-12, 1 / 6 - 1e-12)
    row.score_by_benchmark.popitem()
    assert len(draw_report(priced_report, tmp_path / "report")) == 6


def test_a_picture_that_fails_costs_no_report(priced_report, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plots, "draw_shares", lambda report: 1 / 0)
    drawn = draw_report(priced_report, tmp_path / "report")
    assert "shares.png" not in [path.name for path in drawn]
    assert "the picture shares.png could not be drawn" in caplog.text
    priced_report.save_folder(tmp_path / "report", drawn)
    assert (tmp_path / "report" / "report.md").exists()


def test_a_candidate_without_a_known_cost_is_told_and_left_out_of_the_curves(composite_folder, results, pool):
    costs = np.array([0.01, 0.002, np.nan]) * np.ones((len(results), 1))
    data = build_supervision(replace(results, costs=costs), pool)
    report = evaluate(composite_folder, data, baselines=["kNN"])
    assert report.settings["without_known_cost"] == ["self"]
    assert "AIQ, composite" in report.metrics
    assert report.composite.usd_per_query is None  # it chooses self on some queries, whose cost is unknown
    assert report.row("math").usd_per_query == pytest.approx(0.01)
    assert "because of unknown costs: self" in report.markdown()


@pytest.mark.parametrize("split", ["validation", "train"])
def test_baselines_are_learnt_from_one_side_where_there_is_one(composite_folder, split):
    report = evaluate(composite_folder, split=split, baselines=["kNN"])
    assert report.row("kNN").kind == "router"


def test_a_small_table_has_every_baseline(tmp_path, base_folder):
    """An MLP with early stopping needs queries for its validation, which a small table may lack."""
    texts = [f"Compute {i}" if i % 2 else f"What is the law of {i}" for i in range(12)]
    queries = pd.DataFrame({"id": map(str, range(12)), "prompt": texts, "benchmark": "b", "subject": None})
    scores = np.eye(2)[np.arange(12) % 2]
    build_supervision(BenchmarkResults(queries.assign(split=None), ["a", "b"], scores)).save(tmp_path / "s")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s"), l2=[0.1], verify=False)
    folder = train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))
    assert {row.name for row in evaluate(folder, baselines=list(METHODS)).results} > set(METHODS)


def test_learnt_routers_stand_beside_the_composite_and_solve_what_is_easy(priced_report):
    """There are three kinds of questions with one right candidate each. Every learnt router finds it."""
    for name in ("kNN", "linear", "clusters"):
        row = priced_report.row(name)
        assert row.kind == "router"
        assert row.mean_score > 0.9
        assert row.hyperparameter is not None
        assert row.usd_per_query > 0


def test_every_figure_of_the_field_is_there_and_holds_together(priced_report):
    found = priced_report.metrics
    mean, random = priced_report.composite.mean_score, priced_report.row("random").mean_score
    assert found["mean score (RouterEval mu, AvgAcc)"] == pytest.approx(mean)
    assert found["relative gain over random (Gain@R)"] == pytest.approx(mean / random - 1)
    assert 0 <= found["entropy of the predictions, bits (E_p)"] <= np.log2(3)
    assert found["recall where 1 candidate can"] == found["dispatch accuracy, where somebody can"]
    assert found["AIQ, composite"] > found["AIQ, single models"]
    for name, (low, high) in priced_report.metric_intervals.items():
        assert low - 1e-6 <= found[name] <= high + 1e-6, name
    assert {"AIQ, composite", "AIQ, kNN", "calibration error (ECE)"} <= set(priced_report.metric_intervals)
    assert any(name.startswith("AIQ, composite less ") for name in priced_report.metric_intervals)
    assert found["CostSave, composite"] > 0
    assert np.sum(priced_report.confusion_matrix) == pytest.approx(priced_report.settings["queries"])
    assert [entry["change"] for entry in priced_report.robustness][:2] == ["lower case", "upper case"]
    attack = priced_report.robustness[-1]
    assert (attack["change"], attack["queries"]) == (
        "adversarial suffix",
        5,
    )  # not measured on the queries of its search


def test_the_verdict_says_so_where_the_composite_does_not_win(composite_folder, results, pool):
    """The scores are shuffled, so the composite chooses the wrong candidates."""
    wrong = replace(results, scores=np.roll(results.scores, 1, axis=1))
    report = evaluate(composite_folder, build_supervision(wrong, pool), baselines=["kNN"])
    assert report.composite.mean_score < 0.5
    assert any(sentence.startswith("WORSE than kNN") for sentence in report.verdict())


def test_two_candidates_give_the_figures_of_routellm(tmp_path, base_folder, results, pool):
    two = ExpertPool([pool["math"], pool["law"]])
    scores = results.scores[:, :2].copy()
    scores[results.scores[:, 2] == 1, 0] = 1  # math is the strong candidate: it is right on sums and chats
    data = build_supervision(replace(results.select(["math", "law"]), scores=scores), two)
    data.save(tmp_path / "s2")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s2"), l2=[0.1], verify=False)
    folder = train(options, TrainingArguments(output_dir=str(tmp_path / "c2"), use_cpu=True, report_to="none"))
    report = evaluate(folder, data, baselines=["linear"])
    assert report.metrics["APGR, composite"] > 0.9
    assert 0 < report.metrics["CPT(50%), composite"] <= report.metrics["CPT(80%), linear"] <= 1


def test_a_composite_trained_for_correctness_is_weighed_by_its_chances_of_being_right(tmp_path, base_folder):
    """The odds between the experts are equal on all queries. The chance that only the strong one is right differs."""
    rng = np.random.default_rng(0)
    texts = [f"{('Compute', 'What is the law in case')[i % 2]} {i}, please." for i in range(400)]
    hard = np.arange(400) % 2 == 1
    scores = np.stack([rng.random(400) < np.where(hard, 0.35, 0.96), rng.random(400) < np.where(hard, 0.6, 0.985)], 1)
    queries = pd.DataFrame({"id": map(str, range(400)), "prompt": texts, "benchmark": "b", "subject": None})
    results = BenchmarkResults(queries.assign(split=None), ["weak", "strong"], scores.astype(float))
    build_supervision(results, labelling="correctness", test=0.5).save(tmp_path / "s")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s"), l2=[0.1], verify=False)
    folder = train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))
    report = evaluate(folder, baselines=[])
    assert report.settings["training"]["objective"] == "correctness"
    assert report.metrics["APGR, composite"] > 0.6
    assert report.metrics["calibration error (ECE)"] < 0.1


def test_an_encoder_is_fine_tuned_as_a_baseline(composite_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    from expertoken.tests.tiny import tiny_tokenizer

    config = transformers.BertConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=64, max_position_embeddings=512)  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    report = evaluate(composite_folder, baselines=[], encoder=str(tmp_path / "bert"))
    assert report.row("encoder").kind == "router"


def test_baselines_can_have_an_embedders_features(composite_folder, tmp_path):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=512)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    words = Transformer(str(tmp_path / "bert"))
    SentenceTransformer(modules=[words, Pooling(32)], device="cpu").save(str(tmp_path / "embedder"))
    report = evaluate(composite_folder, baselines=["linear"], embedder=str(tmp_path / "embedder"))
    assert report.settings["baselines_on"] == str(tmp_path / "embedder")
    assert report.row("linear").mean_score > report.row("random").mean_score
    assert embed(str(tmp_path / "embedder"), ["one", "two"]).shape == (2, 32)


def test_changes_of_the_text_keep_what_they_should():
    from random import Random

    from expertoken.evaluation.robustness import CHANGES, shuffled_options

    question = "Which one?\nA. red\nB. green\nC. blue\nAnswer:"
    changed = shuffled_options(question, Random(1))
    assert sorted(changed) == sorted(question)
    assert [line[:2] for line in changed.splitlines()[1:4]] == ["A.", "B.", "C."]
    assert all(change(question, Random(3)) != question for change in CHANGES.values())


def test_an_expert_without_scores_in_a_benchmark_has_an_empty_cell(tmp_path, base_folder):
    build_supervision(missing_results(0.5), labelling="correctness").save(tmp_path / "s")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s"), l2=[0.1], verify=False)
    folder = train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))
    result = CliRunner().invoke(app, ["evaluate", str(folder), "--baselines", "names, kNN", "--no-plot"])
    assert result.exit_code == 0, result.output
    assert "half" in result.output
    scores = {
        result.dataset_name: result.metric_value for result in ModelCard.load(folder / "README.md").data.eval_results
    }
    report = json.loads((folder / "report" / "report.json").read_text())
    assert scores["mean over benchmarks"] == round(report["results"][0]["mean_score"], 4)
    assert {"cases", "sums"} <= set(scores)


def test_of_a_large_pool_the_tables_show_the_best_experts_only():
    rows = [Result("composite", "composite", 0.9, (0.8, 1.0), {"b": 0.9})]
    rows += [Result(f"e{i}", "expert", i / 100, (0.0, 1.0), {"b": i / 100}) for i in range(100)]
    shares, confusion = {row.name: 0.01 for row in rows[1:]}, [[0.0] * 100] * 100
    report = Report(rows, shares, {"b": 5}, confusion_matrix=confusion)
    assert [row.name for row in report.shown()] == ["composite", *(f"e{i}" for i in range(70, 100))]
    assert len(report.markdown().splitlines()) < 80


def test_the_adversarial_suffix_finds_what_turns_a_router():
    tokenizer = tiny_tokenizer("chatml")

    def logits(texts):
        weak = np.array([text.count("a") for text in texts], dtype=float)
        return np.stack([3 - weak, np.zeros(len(texts))], 1)

    found = adversarial_suffix(logits, ["Why?", "How?"], np.array([0, 0]), tokenizer, random.Random(0))
    words = random.Random(0)
    noise = " ".join(tokenizer.decode([words.randrange(tokenizer.vocab_size)]) for _ in range(10))
    assert found.count("a") > noise.count("a")


def test_queries_nobody_was_measured_on_are_left_out(composite_folder, results, pool, caplog):
    gaps = build_supervision(results, pool)
    side = gaps.data["test"]
    blank = side.map(lambda row, i: {"scores": [float("nan")] * 3} if i < 4 else {}, with_indices=True)
    gaps.data["test"] = blank.cast(side.features)
    report = evaluate(composite_folder, gaps, baselines=[])
    assert report.settings["queries"] == len(side) - 4
    assert report.row("oracle").mean_score == 1


def test_a_supervision_that_was_replaced_is_refused_unless_named(composite_folder, results, pool):
    other = composite_folder.parent / "supervision"
    build_supervision(results, pool, seed=9).save(other)
    with pytest.raises(ExpertokenError, match="holds a different supervision from the one that the composite"):
        evaluate(composite_folder, baselines=[])
    assert evaluate(composite_folder, other, baselines=[]).composite.mean_score > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trian"}, "no 'trian' split, it has train"),
        ({"baselines": ["knn"]}, "did you mean 'kNN'"),
        ({"baselines": "knn"}, "did you mean 'kNN'"),
        ({"encoder": "./nowhere"}, "./nowhere: expected the hub id or the folder of an encoder, found none"),
        ({"embedder": "./nowhere"}, "./nowhere: expected the hub id or the folder of an encoder, found none"),
    ],
)
def test_misspelt_names_are_told_before_anything_is_loaded(composite_folder, monkeypatch, options, message):
    monkeypatch.setattr("expertoken.evaluation.evaluate.load_composite", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ExpertokenError, match=message):
        evaluate(composite_folder, **options)


def test_a_model_that_chats_is_refused_with_what_to_give():
    with pytest.raises(ExpertokenError, match="expected a folder or a `Composite`.*got NoComposite"):
        evaluate(type("NoComposite", (), {})())


def test_no_expert_can_have_the_name_of_a_line_of_the_report():
    assert {*METHODS, "composite", "random", "oracle", "encoder"} == set(RESERVED)


def kinds_table(count, seed, learnable):
    """Draw scores of two candidates that depend on the benchmark, and words that name it if `learnable`."""
    rng = np.random.default_rng(seed)
    names = np.array(["sums", "laws"])[np.arange(count) % 2]
    words = names if learnable else rng.permutation(names)
    right = np.where((names == "sums")[:, None] == np.array([True, False]), 0.9, 0.2)
    frame = pd.DataFrame(
        {"id": map(str, range(count)), "prompt": [f"{w} number {i}" for i, w in enumerate(words)], "benchmark": names}
    ).assign(subject=None, split=None)
    return BenchmarkResults(frame, ["a", "b"], (rng.random((count, 2)) < right).astype(float))


def test_what_the_name_of_a_benchmark_explains_is_seen_as_such(tmp_path, base_folder):
    build_supervision(kinds_table(300, 0, learnable=True)).save(tmp_path / "s")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s"), l2=[0.1], verify=False)
    folder = train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))
    report = evaluate(folder, baselines=["names", "words", "guarded-kNN", "ranking", "ensemble"])
    assert report.row("names").mean_score == report.row("best per dataset").mean_score
    assert report.row("words").mean_score == pytest.approx(report.row("names").mean_score, abs=0.05)
    told = " ".join(report.verdict())
    assert "Not significantly different from names" in told
    assert "Better than blind mixture" in told
    for name in ("guarded-kNN", "ranking", "ensemble"):
        assert report.row(name).mean_score > report.row("random").mean_score
        assert report.row(name).milliseconds > 0
    assert report.row("names").composite_gain.p >= report.row("names").composite_gain.p_value
    assert report.row("oracle").composite_gain.p_holm is None


def test_words_that_say_nothing_of_the_name_are_worth_no_more_than_the_best_single(tmp_path, base_folder):
    build_supervision(kinds_table(300, 0, learnable=False)).save(tmp_path / "s")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s"), l2=[0.1], verify=False)
    folder = train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))
    report = evaluate(folder, baselines=["names", "words", "untrained", "guarded-kNN"])
    for name in ("composite", "words", "untrained", "guarded-kNN"):
        assert report.row("names").mean_score > report.row(name).mean_score + 0.1


def correct_composite(tmp_path, base_folder, scores, labelling="correctness", costs=None, pool=None):
    """Train a composite on questions of two kinds to predict each candidate's chance of being right."""
    count = len(scores)
    texts = [f"{('Compute', 'What is the law in case')[i % 2]} {i}, please." for i in range(count)]
    queries = pd.DataFrame({"id": map(str, range(count)), "prompt": texts, "benchmark": "b", "subject": None})
    names = pool.names if pool else ["one", "two"]
    results = BenchmarkResults(queries.assign(split=None), names, np.asarray(scores, float), costs)
    build_supervision(results, pool, labelling=labelling, test=0.5).save(tmp_path / "s")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s"), l2=[0.1], verify=False)
    return train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))


def test_costs_are_taken_off_chances_and_not_off_what_is_learnt(tmp_path, base_folder):
    """Chances of 0.8 and 0.5 less costs of 0.6 and 0.2 are utilities of 0.20 and 0.30. The second is better."""
    rng = np.random.default_rng(0)
    scores = rng.random((600, 2)) < [0.8, 0.5]
    labelling = Labelling("correctness", cost_weight=10.0)
    folder = correct_composite(tmp_path, base_folder, scores, labelling, np.tile([0.06, 0.02], (600, 1)))
    report = evaluate(folder, baselines=[])
    assert report.share_of_queries["two"] >= 0.95
    chances = load_composite(folder, device="cpu").meta
    found = chances.candidate_logits([chances.encode("Compute 7, please.")]).sigmoid()[0].tolist()
    assert found == pytest.approx([0.8, 0.5], abs=0.1)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0, 20.0])
def test_what_is_served_at_a_weight_of_costs_is_the_reports_point(tmp_path, base_folder, weight):
    """Report and server decide equally on 500 queries, so they share one formula for utility."""
    rng = np.random.default_rng(1)
    hard = np.arange(1000) % 2 == 1
    scores = np.stack([rng.random(1000) < np.where(hard, 0.4, 0.9), rng.random(1000) < np.where(hard, 0.7, 0.95)], 1)
    priced = {"cost": {"input": 10.0, "output": 30.0}}
    pool = ExpertPool(
        [
            Expert("one", model=str(base_folder)),
            Expert("two", "openai", "m", base_url="http://127.0.0.1:1/v1", **priced),
        ]
    )
    folder = correct_composite(tmp_path, base_folder, scores, pool=pool)
    write_calibration(folder, {"policy": {"cost_weight": weight}})
    supervision = Supervision.load(tmp_path / "s")
    report = evaluate(folder, baselines=[])
    model = CompositeModel.from_pretrained(folder, device="cpu")
    served = [dispatch.expert for dispatch in model.route(list(supervision.side("test")["messages"]))]
    assert len(served) == 500
    table = supervision.scores("test")
    reported = report.composite.score_by_benchmark["b"]
    assert np.mean([table[i, model.pool.names.index(name)] for i, name in enumerate(served)]) == pytest.approx(reported)
    assert {n: served.count(n) / 500 for n in model.pool.names} == pytest.approx(report.share_of_queries)


def missing_results(share):
    """Draw results of three equally good models. `half` is measured on a share of one benchmark only."""
    rng = np.random.default_rng(0)
    count = 400
    texts = [f"Compute {i} plus 3." if i % 2 else f"What is the law in case {i}?" for i in range(count)]
    kinds = np.where(np.arange(count) % 2, "sums", "cases")
    queries = pd.DataFrame({"id": map(str, range(count)), "prompt": texts, "benchmark": kinds, "subject": None})
    scores = (rng.random((count, 3)) < 0.9).astype(float)
    scores[(kinds == "cases") | (rng.random(count) > share), 2] = np.nan
    return BenchmarkResults(queries.assign(split=None), ["one", "two", "half"], scores)


def test_where_all_are_alike_missing_scores_make_nobody_better(tmp_path, base_folder, caplog):
    """With zeros for one row and means for the other, the gain was "+30.8 points, p < 0.001"."""
    build_supervision(missing_results(0.3), labelling="correctness").save(tmp_path / "s")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s"), l2=[0.1], verify=False)
    folder = train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))
    report = evaluate(folder, baselines=["kNN", "linear"])
    half = report.row("half")
    assert half.mean_score == pytest.approx(0.9, abs=0.12)
    assert set(half.score_by_benchmark) == {"sums"}
    assert half.coverage < 0.3
    assert "| measured |" in report.markdown()
    assert draw_report(report, tmp_path / "report")
    assert "could not be drawn" not in caplog.text
    for row in report.results[1:]:
        if row.kind != "bound" and row.name != "random":
            assert row.composite_gain.p_value > 0.01, row.name
    # It is no candidate in the benchmark without its scores, so it is not chosen there.
    assert report.share_of_queries["half"] < 0.5


def test_shuffled_scores_bring_no_line_of_the_report_a_gain(tmp_path, base_folder, results, pool):
    """Each query has another query's scores, so a router has nothing to learn."""
    order = np.random.default_rng(0).permutation(len(results))
    shuffled = replace(results, scores=results.scores[order])
    build_supervision(shuffled, pool, test=0.5).save(tmp_path / "s")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s"), verify=False)
    folder = train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))
    report = evaluate(folder)
    for row in report.results[1:]:
        if row.kind != "bound":
            assert row.composite_gain.interval[0] <= 0.02, row.name


def test_the_half_oracle_is_an_expectation(priced_report):
    oracle, random = (priced_report.row(name).mean_score for name in ("oracle", "random"))
    assert priced_report.row("half oracle, r_o(0.5)").mean_score == pytest.approx((oracle + random) / 2)
