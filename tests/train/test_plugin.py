import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainingArguments

from expertoken.data_prep.extension import extend_supervision, known_ids
from expertoken.data_prep.labels import Labelling
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import build_supervision, supervision_of
from expertoken.evaluation.evaluate import evaluate
from expertoken.modeling.composite import ROWS_FILE, load_composite, read_manifest, write_calibration
from expertoken.modeling.errors import ExpertokenError, PoolError, ResultsError
from expertoken.modeling.experts import Expert
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.pool import ExpertPool
from expertoken.tests.tiny import tiny_folder
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.plugin import add_expert, remove_expert
from expertoken.train.run import Run, train


def make_composite(tmp_path, base_folder, results, pool):
    build_supervision(results, pool).save(tmp_path / "supervision")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "supervision"), verify=False)
    return train(options, TrainingArguments(output_dir=str(tmp_path / "composite"), use_cpu=True, report_to="none"))


def new_results(count=40):
    prompts = [f"Write an SQL query for the table t{i}." for i in range(count)]
    frame = pd.DataFrame({"id": prompts, "prompt": prompts, "benchmark": "sql", "subject": None, "split": None})
    return BenchmarkResults(frame, ["sql"], [[1.0]] * count)


def state(folder):
    composite = load_composite(folder, device="cpu")
    ids = [composite.meta.encode(text) for text in ("Compute 3 plus 4.", "Write an SQL query for the table t99.")]
    return composite.meta.rows, composite.meta.candidate_logits(ids)


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "phi-bias"])
def test_only_expert_rows_change_in_method_tokens(tmp_path, results, pool, architecture):
    base = tiny_folder(tmp_path / "base", architecture)
    build_supervision(results, pool).save(tmp_path / "supervision")
    options = ExpertokenArguments(meta=str(base), data=str(tmp_path / "supervision"), verify=False)
    run = Run(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))
    before = {name: parameter.detach().clone() for name, parameter in run.meta.model.named_parameters()}
    run.run_tokens()
    after = dict(run.meta.model.named_parameters())
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        next(name for name in before if name.endswith("expert_rows"))
    ]


def test_an_added_expert_leaves_the_others_bit_identical_and_removing_it_restores_the_file(
    composite_folder, base_folder
):
    original = (composite_folder / ROWS_FILE).read_bytes()
    rows, logits = state(composite_folder)
    change = add_expert(composite_folder, Expert("sql", model=str(base_folder)), new_results(), verify=False)
    assert change.after > change.before
    assert 0 < change.changed < change.queries
    new_rows, new_logits = state(composite_folder)
    assert torch.equal(new_rows[[0, 1, 3]], rows)
    torch.testing.assert_close(new_logits[:, [0, 1, 3]], logits, rtol=1e-6, atol=1e-5)
    assert new_logits[1].argmax() == 2
    remove_expert(composite_folder, "sql", verify=False)
    assert (composite_folder / ROWS_FILE).read_bytes() == original
    torch.testing.assert_close(state(composite_folder)[1], logits)


def test_the_supervision_may_be_given_as_it_is_in_memory(composite_folder, base_folder):
    kept = supervision_of(read_manifest(composite_folder), composite_folder)
    change = add_expert(
        composite_folder, Expert("sql", model=str(base_folder)), new_results(), data=kept, l2=[0.1], verify=False
    )
    assert change.after > change.before
    assert "sql" in supervision_of(read_manifest(composite_folder), composite_folder).info.candidates


def test_an_eleventh_expert_leaves_ten_rows_and_their_logits(tmp_path, base_folder):
    names = [f"e{i}" for i in range(10)]
    prompts = [f"subject {i % 10} asks for number {i}" for i in range(200)]
    frame = pd.DataFrame({"id": prompts, "prompt": prompts, "benchmark": "b", "subject": None, "split": None})
    scores = [[float(i % 10 == k) for k in range(10)] for i in range(200)]
    pool = ExpertPool([Expert(name, model=str(base_folder)) for name in names])
    folder = make_composite(tmp_path, base_folder, BenchmarkResults(frame, names, scores), pool)
    rows, logits = state(folder)
    add_expert(folder, Expert("sql", model=str(base_folder)), new_results(), verify=False)
    new_rows, new_logits = state(folder)
    assert torch.equal(new_rows[:10], rows)
    torch.testing.assert_close(new_logits[:, :10], logits[:, :10], rtol=1e-6, atol=1e-5)


def test_known_queries_keep_their_states_and_sides(composite_folder, base_folder, results, monkeypatch):
    """An expert measured on the supervision's own queries needs no forward pass."""
    again = results.select(["math"])
    again.models = ["twin"]
    evaluate(composite_folder, baselines=["kNN"])  # caches the states of all splits
    monkeypatch.setattr(MetaLLM, "states", lambda *_: pytest.fail("states were computed again"))
    change = add_expert(composite_folder, Expert("twin", model=str(base_folder)), again, verify=False)
    assert change.queries == 24
    assert change.after == pytest.approx(change.before, abs=1e-6)


def test_a_composite_from_which_one_was_removed_takes_another(composite_folder, base_folder):
    remove_expert(composite_folder, "law", verify=False)
    add_expert(composite_folder, Expert("sql", model=str(base_folder)), new_results(), verify=False)
    assert load_composite(composite_folder, device="cpu").pool.names == ["math", "sql", "self"]


def test_a_calibration_that_names_who_is_taken_out_goes_with_him(composite_folder, base_folder, caplog):
    write_calibration(composite_folder, {"policy": {"threshold": 0.5}})
    add_expert(composite_folder, Expert("sql", model=str(base_folder)), new_results(), verify=False)
    assert read_manifest(composite_folder).calibration == {"policy": {"threshold": 0.5}}
    write_calibration(composite_folder, {"policy": {"threshold": 0.5, "default": "sql"}})
    remove_expert(composite_folder, "sql", verify=False)
    assert read_manifest(composite_folder).calibration is None
    assert "the calibration names sql and is dropped" in caplog.text


def test_results_of_someone_else_are_refused(composite_folder, base_folder):
    with pytest.raises(ResultsError, match="no results under 'law2'"):
        add_expert(composite_folder, Expert("law2", model=str(base_folder)), new_results())
    with pytest.raises(PoolError, match="'math' appears twice"):
        add_expert(composite_folder, Expert("math", model=str(base_folder)), new_results())
    with pytest.raises(PoolError, match="no expert 'physics'"):
        remove_expert(composite_folder, "physics")
    with pytest.raises(PoolError, match="has no token"):
        remove_expert(composite_folder, "self")


def test_an_id_that_stands_for_another_question_is_refused(composite_folder, base_folder):
    clash = new_results()
    clash.queries.loc[0, "id"] = "q0"  # of the supervision, about something else
    with pytest.raises(ResultsError, match="query id 'q0' belongs to another question"):
        add_expert(composite_folder, Expert("sql", model=str(base_folder)), clash)


def test_queries_without_the_new_expert_keep_their_targets(composite_folder, base_folder):
    from expertoken.data_prep.supervision import Supervision, supervision_of
    from expertoken.modeling.composite import read_manifest

    old = Supervision.load(composite_folder.parent / "supervision")
    add_expert(composite_folder, Expert("sql", model=str(base_folder)), new_results(), verify=False)
    new = supervision_of(read_manifest(composite_folder), composite_folder)
    before = {row["id"]: row["target"] for row in old.data["train"]}
    after = {row["id"]: row["target"] for row in new.data["train"]}
    assert new.info.candidates == ["math", "law", "sql", "self"]
    for key, target in before.items():
        assert [after[key][i] for i in (0, 1, 3)] == target


def test_costs_of_old_and_new_experts_survive_the_plug_in(tmp_path, base_folder, results, pool):
    from expertoken.data_prep.supervision import Supervision

    results = replace(results, costs=[[0.1, 0.2, 0.3]] * len(results))
    priced = replace(new_results(), costs=[[0.5]] * 40)
    extended = extend_supervision(build_supervision(results, pool), pool, Expert("sql", model=str(base_folder)), priced)
    extended.save(tmp_path / "extended")
    costs = Supervision.load(tmp_path / "extended").costs("train")
    assert {tuple(row) for row in costs.round(2).astype(str)} == {
        ("0.1", "0.2", "nan", "0.3"),
        ("nan", "nan", "0.5", "nan"),
    }


def test_repeated_questions_are_matched_one_by_one():
    def results_of(rows):
        frame = pd.DataFrame(rows, columns=["id", "prompt"]).assign(benchmark="b", subject=None, split=None)
        return BenchmarkResults(frame, ["m"], [[1.0]] * len(rows))

    known = results_of([("a", "Compute 5!"), ("b", "same"), ("c", "same"), ("d", "Compute 5?")])
    new = results_of([("x", "Compute 5?"), ("c", "same"), ("y", "same"), ("z", "same"), ("w", "Compute 5!")])
    assert known_ids(known.queries, new.queries) == ["d", "c", "b", "z", "a"]


def lucky(results, count, right=1.0):
    """Return results of a new expert on a few of the composite's own queries, on which it is always right."""
    again = results.take(np.arange(count))
    return BenchmarkResults(again.queries, ["lucky"], np.full((count, 1), right))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("labelling", ["correctness", "query"])
def test_a_few_lucky_answers_take_no_routes_from_experts_that_are_known_to_be_good(
    tmp_path, base_folder, results, pool, count, labelling, caplog
):
    build_supervision(results, pool, labelling=labelling).save(tmp_path / "supervision")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "supervision"), verify=False)
    folder = train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))
    change = add_expert(folder, Expert("lucky", model=str(base_folder)), lucky(results, count), verify=False)
    assert change.after >= change.before
    assert re.search(r"lucky was measured on \d queries to learn from, fewer than 20", caplog.text)


def test_beside_many_old_queries_a_newcomer_is_learnt_as_beside_few(tmp_path, base_folder):
    """Its chance is learnt from 60 results equally well beside 60 and 3,000 old queries."""
    rng = np.random.default_rng(0)
    prompts = [f"{('Compute', 'What is the law in case')[index % 2]} {index}, please." for index in range(60)]
    scores = (rng.random(60) < np.where(np.arange(60) % 2, 0.1, 0.9)).astype(float)
    frame = pd.DataFrame({"id": [f"n{i}" for i in range(60)], "prompt": prompts, "benchmark": "new", "subject": None})
    new = BenchmarkResults(frame.assign(split=None), ["sql"], scores[:, None])
    rows = []
    for count in (60, 3000):
        prompts = [f"Tell me something, take {index}." for index in range(count)]
        frame = pd.DataFrame({"id": prompts, "prompt": prompts, "benchmark": "old", "subject": None, "split": None})
        measured = (rng.random((count, 2)) < 0.6).astype(float)
        pool = ExpertPool([Expert(name, model=str(base_folder)) for name in ("one", "two")])
        folder = tmp_path / str(count)
        build_supervision(BenchmarkResults(frame, ["one", "two"], measured), pool, labelling="correctness").save(
            folder / "s"
        )
        options = ExpertokenArguments(meta=str(base_folder), data=str(folder / "s"), verify=False)
        made = train(options, TrainingArguments(output_dir=str(folder / "c"), use_cpu=True, report_to="none"))
        add_expert(made, Expert("sql", model=str(base_folder)), new, verify=False)
        composite = load_composite(made, device="cpu")
        asked = [composite.meta.encode(f"{kind} {n}, please.") for n in range(40, 60)
                 for kind in ("Compute", "What is the law in case")]  # fmt: skip
        chances = composite.meta.candidate_logits(asked).sigmoid()[:, 2].reshape(-1, 2).mean(0)
        assert chances[0] > 0.7
        assert chances[1] < 0.3
        rows.append(chances)
    torch.testing.assert_close(rows[0], rows[1], atol=0.1, rtol=0)


def test_an_expert_without_a_price_takes_the_others_down_with_it_no_more(tmp_path, base_folder, results, pool, caplog):
    priced = replace(results, costs=[[0.1, 0.2, 0.0]] * len(results))
    build_supervision(priced, pool, labelling=Labelling("correctness", cost_weight=0.1)).save(tmp_path / "s")
    options = ExpertokenArguments(meta=str(base_folder), data=str(tmp_path / "s"), l2=[0.1], verify=False)
    folder = train(options, TrainingArguments(output_dir=str(tmp_path / "c"), use_cpu=True, report_to="none"))
    assert read_manifest(folder).decision["policy"] == {"cost_weight": 0.1}
    unpriced = Expert("sql", "openai", "m", base_url="http://127.0.0.1:1/v1")
    add_expert(folder, unpriced, new_results(), verify=False)
    assert "no cost is known of sql" in caplog.text
    composite = load_composite(folder, device="cpu")
    logits = composite.meta.candidate_logits([composite.meta.encode("Compute 9 plus 3.")])[0]
    assert composite.chooser.choose(composite.policy, logits).expert == "math"
    assert composite.chooser.usd(10)[2] == pytest.approx(0.2)


def test_an_expert_without_results_to_learn_from_is_refused(composite_folder, base_folder):
    only_test = new_results(4)
    only_test.queries["split"] = "test"
    with pytest.raises(ExpertokenError, match="expert 'sql': expected results to learn from, found none"):
        add_expert(composite_folder, Expert("sql", model=str(base_folder)), only_test, verify=False)


def test_the_change_says_how_many_queries_only_the_newcomer_was_measured_on(composite_folder, base_folder):
    change = add_expert(composite_folder, Expert("sql", model=str(base_folder)), new_results(), verify=False)
    assert change.unmeasured == 8
    assert "on 8 of them no other candidate was measured" in str(change)


def test_what_a_supervision_says_beyond_the_new_expert_stays(results, pool):
    """Whole conversations, targets, weights and costs stay unchanged."""
    old = build_supervision(replace(results, costs=[[0.1, 0.2, 0.3]] * len(results)), pool)
    talk = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
    ]
    first = old.data["train"][0]["id"]
    old.data["train"] = old.data["train"].map(lambda row: {"messages": talk} if row["id"] == first else {})
    extended = extend_supervision(old, pool, Expert("sql", model="x"), new_results())
    for side in ("train", "validation", "test"):
        known = {row["id"]: row for row in extended.data[side]}
        for row in old.data[side]:
            now = known[row["id"]]
            assert now["messages"] == row["messages"]
            assert now["weight"] == row["weight"]
            for key in ("target", "scores", "costs"):
                np.testing.assert_equal([now[key][i] for i in (0, 1, 3)], row[key])


def test_new_queries_of_what_is_held_out_join_the_test_side(results, pool):
    results.queries["subject"] = [f"s{i % 3}" for i in range(len(results))]
    old = build_supervision(results, pool, hold_out=("subject", ["s1"]))
    new = new_results()
    new.queries["subject"] = [f"s{i % 3}" for i in range(len(new))]
    extended = extend_supervision(old, pool, Expert("sql", model="x"), new)
    assert set(extended.data["test"]["subject"]) == {"s1"}
    assert "s1" not in extended.data["train"]["subject"]
    assert len(extended.data["test"]) == len(old.data["test"]) + sum(new.queries["subject"] == "s1")


def test_queries_without_a_subject_stay_without_one(results, pool):
    assert results.queries["subject"].isna().all()
    old = build_supervision(results, pool, labelling="subject")
    extended = extend_supervision(old, pool, Expert("sql", model="x"), new_results())
    for side in ("train", "validation", "test"):
        assert set(extended.data[side]["subject"]) == {None}


def test_new_queries_of_a_test_side_that_is_not_held_out_are_left_out(results, pool):
    results.queries["subject"] = [f"s{i % 3}" for i in range(len(results))]
    old = build_supervision(results, pool, hold_out=("subject", ["s1"]))
    new = new_results()
    new.queries["subject"], new.queries["split"] = "s2", "test"
    extended = extend_supervision(old, pool, Expert("sql", model="x"), new)
    assert extended.info.sizes == old.info.sizes


def test_a_new_train_query_that_stands_in_the_test_side_is_dropped_with_a_warning(results, pool, caplog):
    old = build_supervision(results, pool)
    new = new_results(4)
    new.queries.loc[1:, "prompt"] = new.queries["prompt"][0]
    new.queries["split"] = ["test", "train", "train", "validation"]
    extended = extend_supervision(old, pool, Expert("sql", model="x"), new)
    assert extended.info.leaks["equal"]["found"] == 3
    assert len(extended.data["train"]) == len(old.data["train"])
    assert "3 train queries are also in the test split" in caplog.text
