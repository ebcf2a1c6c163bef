"""Each public format, read from a file of exactly its shape, and the errors for damaged files."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from expertoken.data_prep import readers
from expertoken.data_prep.readers.lm_eval import question_of
from expertoken.data_prep.reading import detect, read_results
from expertoken.modeling.errors import ResultsError

if sys.version_info >= (3, 14):
    import zipfile as zstd_zip
else:
    from backports.zstd import zipfile as zstd_zip

DATA = Path(os.environ.get("EXPERTOKEN_DATA", "data"))
MODELS = ["org/a", "b"]
SCORES = np.array([[1.0, 0.0], [0.0, 1.0]])


def routerbench_frame():
    return pd.DataFrame(
        {
            "sample_id": ["mmlu-law.val.0", "arc.test.1"],
            "prompt": ["['Who may sue?']", "['What is rust?', 'And why?']"],
            "eval_name": ["mmlu-law", "arc-challenge"],
            "org/a": [1.0, 0.0],
            "b": [0.0, 1.0],
            "org/a|model_response": ["['A']", "['B']"],
            "b|model_response": ["['A']", "['B']"],
            "org/a|total_cost": [0.002, 0.001],
            "b|total_cost": [0.0001, 0.0002],
            "oracle_model_to_route_to": ["org/a", "b"],
        }
    )


def routerbench_csv(folder):
    routerbench_frame().to_csv(folder / "routerbench_0shot.csv")  # the published file has an unnamed index column


def routerbench_pickle(folder):
    with pd.option_context("future.infer_string", False):  # like the version of pandas that wrote the published file
        routerbench_frame().to_pickle(folder / "routerbench_0shot.pkl", protocol=4)


def routellm(folder):
    text = 'prompt,org/a,b\n"Who may sue?\nA. you\nB. me",True,False\nWhat is rust?,False,True\n'
    (folder / "mmlu_law.csv").write_text(text)


def routereval_document():
    group = {
        "data": {f"{side}_score": SCORES for side in ("train", "val", "test")} | {"train_label": np.array([0, 1])},
        "model": np.array(MODELS),
    }
    groups = {"all_strong": group, "all_weak": group, "strong_to_weak": group}
    return {
        "easy": {3: groups, 5: groups},
        "hard": {10: groups, 100: groups, 1000: groups},
        "split_index": {"train_indices": [0, 1], "val_indices": [2, 3], "test_indices": [4, 5]},
        "embedding": {f"{side}_embed": np.zeros((2, 4), np.float32) for side in ("train", "val", "test")},
        "prompt": {f"{side}_prompt": [f"{side} question {i}" for i in range(2)] for side in ("train", "val", "test")},
    }


def routereval(folder):
    (folder / "gsm8k_router_dataset.pkl").write_bytes(pickle.dumps(routereval_document()))


def leaderboard(folder):
    document = {"data": {"arc": {"correctness": SCORES}, "gsm8k": {"correctness": SCORES[:1]}}, "model": MODELS}
    (folder / "leaderboard_old.pkl").write_bytes(pickle.dumps(document, protocol=2))


def run_of(model, scores, **more):
    records = [
        {"index": i, "origin_query": f"question {i}", "prompt": f"Answer this: question {i}", "prediction": "A",
         "raw_output": "A.", "ground_truth": "A", "score": score, "prompt_tokens": 10, "completion_tokens": 2,
         "cost": 0.001 * (i + 1)}
        for i, score in enumerate(scores)
    ]  # fmt: skip
    return {"dataset_name": "aime", "split": "test", "model_name": model, "demo": False, "records": records} | more


def llmrouterbench(folder):
    for model, stamp, scores in (
        ("org/a", "20250101_000000", [0.0, 0.0]),  # an older run
        ("org/a", "20250301_120000", [1.0, 0.0]),
        ("b", "20250201_000000", [None, 1.0]),
    ):
        place = folder / "aime" / "test" / model.replace("/", "_")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"aime-test-{model.replace('/', '_')}_{stamp}.json").write_text(json.dumps(run_of(model, scores)))


def embedllm(folder):
    text = (
        "prompt_id,model_id,category_id,label,prompt,model_name,category\n"
        "7,0,3,1,Who may sue?,org/a,law\n7,1,3,0,Who may sue?,b,law\n9,0,4,0,What is rust?,org/a,chemistry\n"
        "9,1,4,1,What is rust?,b,chemistry\n7,1,3,1,Who may sue?,b,law\n"
    )
    (folder / "train.csv").write_text(text)


def routerdc(folder):
    rows = [{"question": "Who may sue?", "scores": {"org/a": 1, "b": 0.0}, "cluster_id": 3}]
    rows += [{"question": "What is rust?", "scores": {"org/a": 0.0, "b": 0.9312}}]
    (folder / "arc_test.json").write_text(json.dumps(rows))


def lm_eval(folder):
    for model, scores in (("org/a", (1.0, 0.0)), ("b", (0.0, 1.0))):
        place = folder / model.replace("/", "__")
        place.mkdir()
        (place / "results_2025-01-01T00-00-00.json").write_text(
            json.dumps({"results": {}, "configs": {"arc": {"dataset_name": "ARC"}}, "model_name": model})
        )
        lines = [
            {"doc_id": i, "doc": {"question": f"question {i}"}, "target": "A", "arguments": [["q", "A"]], "resps": [],
             "filtered_resps": [], "filter": "none", "metrics": ["acc"], "doc_hash": "x", "prompt_hash": "x",
             "target_hash": "x", "acc": score}
            for i, score in enumerate(scores)
        ]  # fmt: skip
        text = "\n".join(map(json.dumps, lines))
        (place / "samples_arc_2025-01-01T00-00-00.jsonl").write_text(text)


def table(folder):
    (folder / "t.csv").write_text("query,org/a,b\nWho may sue?,1,0\nWhat is rust?,0,1\n")


def hugging_face(folder):
    import datasets

    rows = {"query": ["Who may sue?", "What is rust?"], "org/a": [1.0, 0.0], "b": [0.0, 1.0]}
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows)}).save_to_disk(folder)


def routerarena_cached(folder):
    for model, scores in (("org/a", (1.0, 0.0)), ("b", (0.0, 1.0))):
        lines = [
            {"global_index": f"AIME_{i}", "question": f"question {i}", "llm_selected": model, "generated_answer": "7",
             "token_usage": {"input_tokens": 9, "output_tokens": 1}, "success": True, "provider": "x", "error": None,
             "evaluation_result": {"extracted_answer": "7", "ground_truth": "7", "score": score, "metric": "math_metric",
                                   "inference_cost": 0.0003}, "run_number": 1}
            for i, score in enumerate(scores)
        ]  # fmt: skip
        lines.append(lines[0] | {"global_index": "AIME_9", "question": "question 9", "success": False})
        (folder / f"{model.replace('/', '_')}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def routerarena_predictions(folder):
    rows = [
        {"global index": f"AIME_{i}", "prompt": f"question {i}", "prediction": model, "cost": 0.01,
         "generated_result": {"generated_answer": "7", "success": True, "token_usage": {}}, "accuracy": SCORES[i][k],
         "for_optimality": k > 0}
        for k, model in enumerate(MODELS) for i in range(2)
    ]  # fmt: skip
    (folder / "my-router.json").write_text(json.dumps(rows))


def inspect_document(model, scores):
    # The form of inspect_ai 0.3, without the fields that the reader ignores.
    samples = [
        {"id": i + 1, "epoch": 1, "input": f"question {i}", "target": "7", "messages": [],
         "scores": {"match": {"value": value, "answer": "7", "history": []}}}
        for i, value in enumerate(scores)
    ]  # fmt: skip
    return {"version": 2, "status": "success", "eval": {"task": "tasks/tiny", "model": model, "config": {}}, "plan": {},
            "results": {"scores": []}, "stats": {}, "samples": samples}  # fmt: skip


def inspect_json(folder):
    for model, scores in (("org/a", "CI"), ("b", "IC")):
        (folder / f"2026_{model[-1]}.json").write_text(json.dumps(inspect_document(model, scores), indent=2))


def inspect_archive(folder):
    for model, scores in (("org/a", (1, 0.0)), ("b", ("I", "C"))):
        document = inspect_document(model, scores)
        with zstd_zip.ZipFile(folder / f"{model[-1]}.eval", "w", compression=zstd_zip.ZIP_ZSTANDARD) as archive:
            for sample in document.pop("samples"):
                archive.writestr(f"samples/{sample['id']}_epoch_1.json", json.dumps(sample))
            archive.writestr("header.json", json.dumps(document))


def leaderboard_details(folder):
    for model, scores in (("org/a", (1.0, 0.0)), ("b", (0.0, 1.0))):
        place = folder / f"details_{model.replace('/', '__')}"
        place.mkdir()
        frame = pd.DataFrame(
            {"example": [f"question {i}" for i in range(2)], "full_prompt": ["shots\n\nquestion"] * 2,
             "metrics": [{"acc": 0.0, "acc_norm": score} for score in scores]}
        )  # fmt: skip
        frame.to_parquet(place / "details_harness|hendrycksTest-law|5_2023-09-01T00:00:00.000000.parquet")


def vlmevalkit(folder):
    for model, scores in zip(("org__a", "b"), SCORES.T, strict=True):
        rows = [{"index": i, "question": f"Which is {i}?", "A": "one", "B": "two", "answer": "A", "category": "numbers",
                 "prediction": "A" if score else "B. two"} for i, score in enumerate(scores)]  # fmt: skip
        (folder / model).mkdir()
        pd.DataFrame(rows).to_excel(folder / model / f"{model}_MMBench_DEV_EN.xlsx", index=False)


def lmms_eval(folder):
    for model, scores in zip(("org__a", "b"), SCORES.T, strict=True):
        rows = [{"doc_id": i, "target": "A", "filtered_resps": ["A"], "doc_hash": "x", "input": f"<image>\nWhich is {i}?",
                 "exact_match": score} for i, score in enumerate(scores)]  # fmt: skip
        (folder / model).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / model / "20261130_120000_samples_ai2d.jsonl").write_text(lines)


SHAPES = {
    "vlmevalkit": [vlmevalkit],
    "lmms-eval": [lmms_eval],
    "routerbench": [routerbench_csv, routerbench_pickle],
    "routellm": [routellm],
    "routerarena": [routerarena_cached, routerarena_predictions],
    "inspect": [inspect_json, inspect_archive],
    "leaderboard-details": [leaderboard_details],
    "routereval": [routereval, leaderboard],
    "llmrouterbench": [llmrouterbench],
    "embedllm": [embedllm],
    "routerdc": [routerdc],
    "lm-eval": [lm_eval],
    "table": [table],
    "datasets": [hugging_face],
}
ALL = [(name, write) for name, writers in SHAPES.items() for write in writers]


def test_every_reader_has_a_shape_here():
    assert set(SHAPES) == set(readers.READERS)


@pytest.mark.parametrize(("name", "write"), ALL, ids=lambda value: getattr(value, "__name__", value))
def test_a_file_of_exactly_the_published_shape_is_recognised_and_read(tmp_path, name, write):
    write(tmp_path)
    assert detect(tmp_path) == name
    results = read_results(tmp_path)
    assert sorted(results.models) == sorted(MODELS)
    first = results.scores[:2, [results.models.index(model) for model in MODELS]]
    expected = SCORES.copy()
    if name == "llmrouterbench":
        expected[0, 1] = np.nan
    if name == "embedllm":
        expected[0, 1] = 0.5  # measured twice, right once
    np.testing.assert_array_equal(first, expected)


def test_a_byte_order_mark_and_quoted_headers_are_no_obstacle(tmp_path):
    routerdc(tmp_path)
    file = tmp_path / "arc_test.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(read_results(tmp_path)) == 2
    (tmp_path / "mmlu_law.csv").write_text('"prompt","org/a","b"\nWho may sue?,True,False\n')
    assert detect(tmp_path / "mmlu_law.csv") == "routellm"


def test_ids_and_questions_that_look_like_numbers_stay_text(tmp_path):
    (tmp_path / "t.csv").write_text("id,query,model,score\n0012,007,a,1\n012,7.0,a,0\n")
    (tmp_path / "t.jsonl").write_text(
        '{"id": "0012", "query": "007", "model": "a", "score": 1}\n{"id": "012", "query": "7.0", "model": "a", "score": 0}\n'
    )
    for name in ("t.csv", "t.jsonl"):
        queries = read_results(tmp_path / name).queries
        assert queries[["id", "prompt"]].values.tolist() == [["0012", "007"], ["012", "7.0"]]


def test_a_column_of_costs_is_no_model_of_a_wide_table(tmp_path):
    (tmp_path / "t.csv").write_text("query,a,b,cost\nWho?,1,0,0.5\n")
    assert read_results(tmp_path).models == ["a", "b"]


@pytest.mark.parametrize(
    ("document", "prompt", "expected"),
    [
        ({"question": "What is 2+2?", "answer": "4"}, "Q: What is 1+1? A: 2\n\nQ: What is 2+2? A:", "What is 2+2?"),
        (
            {"question": "Which is right?", "subject": "law", "choices": ["4", "5"], "answer": 1},
            "About law.\n\nWhich is right?\nA. 4\nB. 5\nAnswer:",
            "Which is right?\nA. 4\nB. 5",
        ),
        (
            {"passage": "It was a long winter night.", "question": "When?", "label": 0},
            "<|im_start|>user\nIt was a long winter night.\nQuestion: When?<|im_end|>",
            "It was a long winter night.\nQuestion: When?",
        ),
        ({"sentence": "Ann saw Eve as _ left.", "option1": "Ann", "option2": "Eve"}, "Ann saw Eve as Ann", "Ann saw Eve as _ left.\nAnn\nEve"),
        ({"premise": "x"}, "other", None),
    ],
)  # fmt: skip
def test_of_a_harness_prompt_the_documents_own_part_is_the_question(document, prompt, expected):
    assert question_of(document, prompt) == expected


def test_harness_groups_become_benchmarks_and_mmlu_pro_is_not_mmlu(tmp_path):
    lm_eval(tmp_path)
    for folder in tmp_path.iterdir():
        sample = folder / "samples_arc_2025-01-01T00-00-00.jsonl"
        for task in ("mmlu_pro_biology", "bench_stem_physics"):
            (folder / f"samples_{task}_2025-01-01T00-00-00.jsonl").write_text(sample.read_text())
        summary = folder / "results_2025-01-01T00-00-00.json"
        groups = {"bench": ["bench_stem"], "bench_stem": ["bench_stem_physics"]}
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"group_subtasks": groups}))
    queries = read_results(tmp_path).queries
    found = set(map(tuple, queries[["benchmark", "subject"]].values.tolist()))
    assert found == {("arc", None), ("mmlu_pro", "biology"), ("bench", "stem_physics")}


def test_routerbench_costs_turns_and_subjects(tmp_path):
    routerbench_csv(tmp_path)
    results = read_results(tmp_path)
    np.testing.assert_allclose(results.costs, [[0.002, 0.0001], [0.001, 0.0002]], rtol=1e-6)
    assert results.queries["prompt"].tolist() == ["Who may sue?", "What is rust?\n\nAnd why?"]
    assert results.queries[["benchmark", "subject"]].values.tolist() == [["mmlu", "law"], ["arc-challenge", None]]


def test_one_routerbench_id_for_two_questions_stays_two_queries(tmp_path):
    frame = routerbench_frame()
    frame["sample_id"] = "same"
    frame.to_csv(tmp_path / "r.csv")
    assert len(read_results(tmp_path)) == 2


def test_routereval_sides_and_choice_of_pool(tmp_path):
    document = routereval_document()
    document["easy"][5]["all_weak"] = document["easy"][5]["all_weak"] | {"model": np.array(["x", "y"])}
    (tmp_path / "gsm8k_router_dataset.pkl").write_bytes(pickle.dumps(document))
    chosen = read_results(tmp_path, difficulty="easy", candidates="5", kind="all_weak")
    assert chosen.models == ["x", "y"]
    assert chosen.queries["split"].tolist() == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    with pytest.raises(ResultsError, match="no entry '7', available: 10, 100, 1000"):
        read_results(tmp_path, candidates="7")


def test_the_newest_run_counts_and_trial_runs_do_not(tmp_path):
    llmrouterbench(tmp_path)
    trial = tmp_path / "aime" / "aime-test-b_20260101_000000.json"
    trial.write_text(json.dumps(run_of("b", [0.0, 0.0], demo=True)))
    results = read_results(tmp_path)
    assert results.scores[1, results.models.index("b")] == 1
    np.testing.assert_allclose(results.costs[:, 0], [0.001, 0.002])


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/expertoken-was-here",))


class Getattr:
    def __reduce__(self):
        return (getattr, ("x", "upper"))


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Evil(), "posix.system"),
        (Getattr(), "builtins.getattr"),
        ({"data": Evil()}, "posix.system"),
        (pd.eval, "pandas.eval"),
        (np.load, "numpy.load"),
    ],
    ids=["system", "getattr", "nested", "pandas.eval", "numpy.load"],
)
@pytest.mark.parametrize("name_of_format", ["routerbench", "routereval"])
def test_a_pickle_that_imports_anything_else_is_refused_by_name_and_nothing_runs(tmp_path, thing, name, name_of_format):
    Path("/tmp/expertoken-was-here").unlink(missing_ok=True)
    (tmp_path / "leaderboard_old.pkl").write_bytes(pickle.dumps(thing))
    with pytest.raises(ResultsError, match=rf"leaderboard_old.pkl: this pickle tries to import {name}, .*refused"):
        read_results(tmp_path, name_of_format)
    assert not Path("/tmp/expertoken-was-here").exists()


def cut(text):
    return text[: len(text) * 2 // 3]


def changed(write, change, folder):
    """Write a good file, then change its bytes."""
    write(folder)
    file = next(file for file in sorted(folder.rglob("*")) if file.is_file() and "results_" not in file.name)
    file.write_bytes(change(file.read_bytes()))


def replaced(old, new):
    def change(data):
        assert old in data
        return data.replace(old, new, 1)

    return change


def reshaped(make, change):
    """Write a pickle of a document with one change."""

    def write(folder):
        document = make()
        change(document)
        (folder / "gsm8k_router_dataset.pkl").write_bytes(pickle.dumps(document))

    return write


def row_of(column, row, value):
    def write(folder):
        frame = routerbench_frame().astype(object)
        frame.loc[row, column] = value
        frame.to_csv(folder / "r.csv")

    return write


def group_of(document):
    return document["hard"][10]["all_strong"]


MALFORMED = {
    "routerdc, cut short": (routerdc, cut, "routerdc", r"arc_test.json: line 1 is not JSON .*cut short"),
    "routerdc, score is text": (routerdc, replaced(b"0.9312", b'"good"'), None, r"entry 1, field 'scores.b': expected a number .*, got 'good'"),
    "routerdc, no question": (routerdc, replaced(b'"question": "Who may sue?"', b'"question": 7'), None, r"entry 0, field 'question'"),
    "routerdc, outside": (routerdc, replaced(b"0.9312", b"-7"), None, r"arc_test.json: query 'arc_test/1', model 'b': score -7 is outside"),
    "routerdc, Latin-1": (routerdc, replaced(b"Who", b"Qu\xe9"), "routerdc", r"arc_test.json: byte \d+ is not UTF-8"),
    "routerdc, NaN": (routerdc, replaced(b"0.9312", b"NaN"), None, r"entry 1, field 'scores.b': expected a number \(null where not measured\), got nan"),
    "routerdc, a number too large": (routerdc, replaced(b"0.9312", b"9" * 400), None, r"entry 1, field 'scores.b': expected a number"),
    "routerdc, a number of 5,000 digits": (routerdc, replaced(b"0.9312", b"9" * 5000), None, r"arc_test.json: line 1 is not readable JSON"),
    "routerdc, nested": (routerdc, replaced(b"0.9312", b"[" * 100_000), "routerdc", r"arc_test.json: line 1 is not readable JSON"),
    "routerbench, no sample_id": (routerbench_csv, replaced(b"sample_id", b"sample"), None, r"csv: no column 'sample_id'"),
    "routerbench, score is text": (row_of("b", 1, "maybe"), None, None, r"r.csv: row 3, column 'b': expected a number, got 'maybe'"),
    "routerbench, cost is text": (row_of("b|total_cost", 0, "free"), None, None, r"r.csv: row 2, column 'b\|total_cost': expected a number"),
    "routerbench, no prompt": (row_of("prompt", 1, None), None, None, r"r.csv: row 3, column 'prompt': expected text"),
    "routerbench, same query twice": (lambda f: pd.concat([routerbench_frame()] * 2).to_csv(f / "r.csv"), None, None, r"r.csv: query id 'mmlu-law.val.0:\w+' appears twice"),
    "routerbench, score outside": (row_of("org/a", 0, 3), None, None, r"r.csv: query 'mmlu-law.val.0', model 'org/a': score 3 is outside"),
    "routerbench, pickle cut short": (routerbench_pickle, cut, None, r"pkl: not a readable pickle .*cut short"),
    "routerbench, pickle of a list": (lambda f: (f / "r.pkl").write_bytes(pickle.dumps([1])), None, None, r"r.pkl: holds a list, expected a pandas DataFrame"),
    "routellm, neither true nor false": (routellm, replaced(b"False,True", b"maybe,True"), None, r"mmlu_law.csv: row 3, column 'org/a': expected a number, got 'maybe'"),
    "routellm, no prompt": (routellm, replaced(b"What is rust?", b""), None, r"mmlu_law.csv: query 'mmlu_law/1' has no prompt"),
    "routellm, no models": (lambda f: (f / "mmlu_law.csv").write_text("prompt,a_response\nq,x\n"), None, "routellm", r"mmlu_law.csv: empty results, no column of a model"),
    "routellm, uneven rows": (routellm, replaced(b"False,True", b"False,True,1,2,3"), None, r"mmlu_law.csv: row 3 has 6 cells, the header 3. Quote"),
    "routereval, cut short": (routereval, cut, None, r"gsm8k_router_dataset.pkl: not a readable pickle"),
    "routereval, no prompts": (reshaped(routereval_document, lambda d: d.pop("prompt")), None, None, r"pkl: no entry 'prompt'"),
    "routereval, fewer prompts": (reshaped(routereval_document, lambda d: d["prompt"]["test_prompt"].pop()), None, None, r"test_score: expected \[1 prompts, 2 models\], got \[2, 2\]"),
    "routereval, scores in one row": (reshaped(routereval_document, lambda d: group_of(d)["data"].update(val_score=np.zeros(3))), None, None, r"val_score: expected a table \[queries, models\], got shape \[3\]"),
    "routereval, scores are text": (reshaped(routereval_document, lambda d: group_of(d)["data"].update(val_score=[["a", "b"]] * 2)), None, None, r"val_score: expected numbers"),
    "routereval, no models": (reshaped(routereval_document, lambda d: group_of(d).pop("model")), None, None, r"all_strong: no entry 'model'"),
    "routereval, a list where a dict should be": (reshaped(routereval_document, lambda d: d.update(hard=[1])), None, None, r"expected a dict, got a list"),
    "routereval, leaderboard of other models": (lambda f: (f / "leaderboard_new.pkl").write_bytes(pickle.dumps({"data": {"arc": {"correctness": SCORES}}, "model": ["a"]})), None, None, r"data, arc: expected 1 columns, one per model, got 2"),
    "llmrouterbench, cut short": (llmrouterbench, cut, "llmrouterbench", r"json: line 1 is not JSON"),
    "llmrouterbench, no model": (llmrouterbench, replaced(b'"model_name"', b'"model"'), None, r"json: field 'model_name' is missing"),
    "llmrouterbench, score is text": (lambda f: (f / "x_20250101_000000.json").write_text(json.dumps(run_of("a", ["A"]))), None, None, r"record 0, field 'score': expected a number .*, got 'A'"),
    "llmrouterbench, index twice": (lambda f: (f / "x_20250101_000000.json").write_text(json.dumps(run_of("a", [1.0]) | {"records": run_of("a", [1.0])["records"] * 2})), None, None, r"json: query id 'aime/test/0' appears twice"),
    "llmrouterbench, no text": (lambda f: (f / "x_20250101_000000.json").write_text(json.dumps(run_of("a", []) | {"records": [{"index": 0, "score": 1}]})), None, None, r"record 0, field 'origin_query': expected text"),
    "llmrouterbench, no records": (lambda f: (f / "x_20250101_000000.json").write_text(json.dumps(run_of("a", []))), None, None, r"json: empty results"),
    "embedllm, no label": (embedllm, replaced(b"label", b"right"), None, r"train.csv: no column 'label'"),
    "embedllm, label is text": (embedllm, replaced(b"7,0,3,1", b"7,0,3,one"), None, r"train.csv: row 2, column 'label': expected a number, got 'one'"),
    "embedllm, no model": (embedllm, replaced(b"7,1,3,0", b"7,,3,0"), None, r"train.csv: row 3, column 'model_id': empty"),
    "embedllm, label outside": (embedllm, replaced(b"9,0,4,0", b"9,0,4,5"), None, r"train.csv: query '9', model 'org/a': score 5 is outside"),
    "lm-eval, cut short": (lm_eval, cut, None, r"samples_arc_2025-01-01T00-00-00.jsonl: line 2 is not JSON"),
    "embedllm, one id for two prompts": (embedllm, replaced(b"Who may sue?,b", b"Who pays?,b"), None, r"train.csv: prompt_id '7' has different prompts"),
    "lm-eval, no doc_id": (lm_eval, replaced(b'"doc_id"', b'"id"'), None, r"line 1, field 'doc_id': missing"),
    "lm-eval, document twice": (lm_eval, replaced(b'"doc_id": 1', b'"doc_id": 0'), None, r"jsonl: query id 'arc/0' appears twice"),
    "lm-eval, score is text": (lm_eval, replaced(b'"acc": 0.0', b'"acc": "no"'), None, r"field 'acc': expected a number"),
    "table, Latin-1": (table, replaced(b"Who", b"Qu\xe9"), None, r"t.csv: byte \d+ is not UTF-8"),
    "table, score outside": (table, replaced(b"rust?,0,1", b"rust?,0,7"), None, r"t.csv: query .*, model 'b': score 7 is outside"),
    "table, NaN": (table, replaced(b"rust?,0,1", b"rust?,0,NaN"), None, r"t.csv: row 3, column 'b': expected a number, got 'NaN'"),
    "table, cost below zero": (lambda f: (f / "t.csv").write_text("query,model,score,cost\nq,a,1,-5\n"), None, None, r"t.csv: query 't/q', model 'a': cost -5 is not a price"),
    "table, no question column": (table, replaced(b"query", b"qury"), None, r"t.csv: no column 'query' with the question, did you mean 'qury'"),
    "table, question twice": (table, replaced(b"What is rust?", b"Who may sue?"), None, r"t.csv: row 3: query .* came before"),
    "datasets, damaged": (hugging_face, lambda data: b"{", "datasets", r"can't be read as a dataset"),
    "datasets, no such thing": (lambda f: None, None, "datasets", r"can't be read as a dataset"),
    "of no format": (lambda f: (f / "notes.txt").write_text("hello"), None, None, r"no format known here. Pass one with --format: lm-eval, "),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_one_line_that_names_the_place(tmp_path, case):
    write, change, name, message = MALFORMED[case]
    if change is None:
        write(tmp_path)
    else:
        changed(write, change, tmp_path)
    with pytest.raises(ResultsError, match=message) as error:
        read_results(tmp_path, name or "auto")
    assert "\n" not in str(error.value)


def test_a_reader_of_another_package_joins_by_its_entry_point(tmp_path, monkeypatch):
    class Mine:
        @staticmethod
        def recognises(file, head):
            return head.startswith("MINE")

        @staticmethod
        def read(path, *, flavour="plain"):
            return ("read by mine", path.name, flavour)

    class Entry:
        name = "mine"

        @staticmethod
        def load():
            return Mine

    monkeypatch.setattr(readers, "entry_points", lambda group: [Entry] if group == "expertoken.readers" else [])
    readers.readers.cache_clear()
    (tmp_path / "x.csv").write_text("MINE,1\n")
    assert read_results(tmp_path / "x.csv", flavour="odd") == ("read by mine", "x.csv", "odd")
    readers.readers.cache_clear()


@pytest.mark.skipif(not DATA.exists(), reason="no published results here (EXPERTOKEN_DATA)")
@pytest.mark.parametrize(
    ("name", "queries", "models"), [("routerdc", 17719, 7), ("routerbench", 2751, 11), ("routellm", 7658, 2)]
)
def test_the_published_files_are_read_whole(name, queries, models):
    assert detect(DATA / name) == name
    results = read_results(DATA / name)
    assert (len(results), len(results.models)) == (queries, models)


@pytest.mark.parametrize("given", ["auto", "table"])
def test_an_option_that_no_reader_has_is_refused_by_name(tmp_path, given):
    (tmp_path / "r.csv").write_text("q,a,b\none,1,0\n")
    with pytest.raises(ResultsError, match="format 'table' has no option 'qery', did you mean 'query'"):
        read_results(tmp_path / "r.csv", given, qery="q")
