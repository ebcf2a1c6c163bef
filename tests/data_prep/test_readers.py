import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from expertoken.data_prep.reading import detect, parse_options, read_results
from expertoken.modeling.errors import ResultsError

LONG = "query,model,score,benchmark,split\nq one,a,1,b,train\nq one,c,0,b,train\nq two,a,true,b,test\n"
WIDE = "query,benchmark,a,c\nq one,b,1,0\nq two,b,0.5,\n"


def write(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_a_long_table_has_a_row_per_query_and_model(tmp_path):
    results = read_results(write(tmp_path, "r.csv", LONG))
    assert results.models == ["a", "c"]
    np.testing.assert_array_equal(results.scores, [[1, 0], [1, np.nan]])
    assert results.queries["split"].tolist() == ["train", "test"]


def test_a_wide_table_has_a_column_per_model(tmp_path):
    results = read_results(write(tmp_path, "r.csv", WIDE))
    assert results.models == ["a", "c"]
    np.testing.assert_array_equal(results.scores, [[1, 0], [0.5, np.nan]])


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_all_kinds_of_tables_read_alike(tmp_path, suffix):
    frame = pd.read_csv(write(tmp_path, "r.txt", WIDE))
    file = tmp_path / f"r{suffix}"
    {
        ".csv": lambda: frame.to_csv(file, index=False),
        ".parquet": lambda: frame.to_parquet(file),
        ".jsonl": lambda: frame.to_json(file, orient="records", lines=True),
    }[suffix]()
    np.testing.assert_array_equal(read_results(file).scores, [[1, 0], [0.5, np.nan]])


def test_columns_have_the_names_that_options_say(tmp_path):
    file = write(tmp_path, "r.csv", "frage,a,b,laune\nx,1,0,7\n")
    options = parse_options("table", ["query=frage", "models=a,b"])
    assert read_results(file, **options).models == ["a", "b"]
    with pytest.raises(ResultsError, match="no option 'qery', did you mean 'query'"):
        parse_options("table", ["qery=frage"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty results"),
        ("query,model,score\n", "empty results"),
        ("question,model,score\nq,a,1\n", "no column 'query'.*"),
        ("query,model,points\nq,a,1\n", "no column 'score'"),
        ("query,model,score\nq,a,good\n", "row 2, column 'score': expected a number, got 'good'"),
        ("query,model,score\nq,a,1\nq,a,0\n", "row 3: query .* came before"),
        ("query,a\nq,1\nq,0\n", "row 3: query .* came before"),
        ("query,model,score\n,a,1\n", "row 2, column 'query': empty"),
        ("query,a\nq,7\n", "score 7 is outside"),
        ("query,note\nq,hm\n", "expected numeric columns with models' scores, found none"),
    ],
)
def test_a_malformed_table_is_one_line_that_names_the_place(tmp_path, text, message):
    with pytest.raises(ResultsError, match=message) as error:
        read_results(write(tmp_path, "r.csv", text))
    assert "\n" not in str(error.value)


def test_missing_files_and_formats_are_named(tmp_path):
    with pytest.raises(ResultsError, match="no such file or folder"):
        read_results(tmp_path / "none.csv")
    with pytest.raises(ResultsError, match="no such file or folder"):
        read_results("~no-such-user/results.csv")
    with pytest.raises(ResultsError, match="unknown format 'routerd', did you mean 'routerdc'"):
        read_results(tmp_path, "routerd")
    with pytest.raises(ResultsError, match="no format known here. Pass one with --format"):
        read_results(tmp_path)


def test_routerdc_multiple_choice_is_right_above_zero_and_attempts_stay_means(tmp_path):
    rows = [{"question": "q", "scores": {"a": 0.5123, "b": 0}}, {"question": "q", "scores": {"a": 0, "b": 0.2}}]
    write(tmp_path, "mmlu_train.json", json.dumps(rows))
    rows = [{"question": "g", "scores": {"a": 0.7, "b": 1.0}, "cluster_id": 3}]
    write(tmp_path, "gsm8k-test.json", json.dumps(rows))
    results = read_results(tmp_path, "routerdc")
    np.testing.assert_allclose(results.scores, [[0.7, 1], [1, 0], [0, 1]])
    assert results.queries["benchmark"].tolist() == ["gsm8k", "mmlu", "mmlu"]
    assert results.queries["split"].tolist() == ["test", "train", "train"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"question": "q", "scores": {"a": 1}', "line 1 is not JSON"),
        ("[]", "empty results"),
        ('[{"scores": {"a": 1}}]', "entry 0, field 'question'"),
        ('[{"question": "q", "scores": 1}]', "entry 0, field 'scores'"),
        ('[{"question": "q", "scores": {"a": "x"}}]', "field 'scores.a': expected a number"),
    ],
)
def test_a_malformed_routerdc_file_is_one_line(tmp_path, text, message):
    with pytest.raises(ResultsError, match=message):
        read_results(write(tmp_path, "x_train.json", text), "routerdc")


def sample(doc, score, **more):
    return json.dumps({"doc_id": doc, "doc": {"question": f"question {doc}"}, "arguments": [["p", "c"]],
                       "filter": "none", "metrics": ["acc"], "acc": score, **more})  # fmt: skip


def harness(tmp_path, model, scores, stamp="2026-01-02T03-04-05.6", task="mmlu_law"):
    folder = tmp_path / model.replace("/", "__")
    lines = "\n".join(sample(index, score) for index, score in enumerate(scores))
    write(folder, f"samples_{task}_{stamp}.jsonl", lines)
    write(folder, f"results_{stamp}.json", json.dumps({"model_name": model}))


def test_harness_output_of_several_models_becomes_one_table(tmp_path):
    harness(tmp_path, "org/a", [1.0, 0.0])
    harness(tmp_path, "org/b", [0.0, "1.0"])
    results = read_results(tmp_path, "lm-eval")
    assert results.models == ["org/a", "org/b"]
    np.testing.assert_array_equal(results.scores, [[1, 0], [0, 1]])
    assert results.queries["prompt"].tolist() == ["question 0", "question 1"]
    assert results.queries["subject"].tolist() == ["law", "law"]


def test_the_newest_harness_run_counts(tmp_path):
    harness(tmp_path, "a", [0.0], stamp="2026-01-02T03-04-05.6")
    harness(tmp_path, "a", [1.0], stamp="2026-02-02T03-04-05.6")
    assert read_results(tmp_path, "lm-eval").scores.tolist() == [[1.0]]


STAMP = "2026-01-02T03-04-05.6"


def test_harness_lines_end_at_line_feeds_alone(tmp_path):
    line = json.dumps(json.loads(sample(0, 1.0)) | {"doc": {"question": "one\u2028two"}}, ensure_ascii=False)
    write(tmp_path / "a", f"samples_t_{STAMP}.jsonl", line + "\n")
    assert read_results(tmp_path, "lm-eval").queries["prompt"].tolist() == ["one\u2028two"]


@pytest.mark.parametrize("form", ["lines", "list"])
def test_older_harness_samples_are_json(tmp_path, form):
    rows = [json.loads(sample(index, float(index))) for index in range(2)]
    text = "\n".join(map(json.dumps, rows)) if form == "lines" else json.dumps(rows, indent=2)
    write(tmp_path / "a", f"samples_t_{STAMP}.json", text)
    assert detect(tmp_path) == "lm-eval"
    assert read_results(tmp_path).scores.tolist() == [[0.0], [1.0]]


def test_of_unnamed_filters_the_first_block_counts_and_named_ones_are_chosen(tmp_path):
    bare = [{k: v for k, v in json.loads(sample(d, s)).items() if k != "filter"} for s in (0.0, 1.0) for d in (0, 1)]
    write(tmp_path / "a", f"samples_t_{STAMP}.jsonl", "\n".join(map(json.dumps, bare)))
    assert read_results(tmp_path / "a", "lm-eval").scores.tolist() == [[0.0], [0.0]]
    named = [sample(0, score, filter=name) for name, score in (("strict", 0.0), ("flexible", 1.0))]
    write(tmp_path / "b", f"samples_t_{STAMP}.jsonl", "\n".join(named))
    assert read_results(tmp_path / "b", "lm-eval").scores.tolist() == [[0.0]]
    assert read_results(tmp_path / "b", "lm-eval", filter="flexible").scores.tolist() == [[1.0]]
    with pytest.raises(ResultsError, match="no filter 'flexibel', did you mean 'flexible'"):
        read_results(tmp_path / "b", "lm-eval", filter="flexibel")


def test_a_harness_task_without_a_known_metric_is_left_out_and_named(tmp_path, caplog):
    harness(tmp_path, "a", [1.0, 0.0], task="arc")
    other = {"metrics": ["word_perplexity"], "word_perplexity": [-10.0, 20], "quality": 0.5}
    rows = [{k: v for k, v in (json.loads(sample(d, 1.0)) | other).items() if k != "acc"} for d in range(2)]
    write(tmp_path / "a", f"samples_wikitext_{STAMP}.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_results(tmp_path, "lm-eval").queries["benchmark"].unique().tolist() == ["arc"]
    assert "no metric known here in wikitext (it has word_perplexity): left out" in caplog.text
    options = parse_options("lm-eval", ["metric=wikitext=quality"])
    assert read_results(tmp_path, "lm-eval", **options).scores.tolist() == [[1.0], [0.0], [0.5], [0.5]]


def test_two_harness_runs_in_one_folder_are_told_apart_by_their_time(tmp_path):
    for model, stamp, task in (("org/a", "2026-01-01T00-00-00.0", "arc"), ("org/b", "2026-02-01T00-00-00.0", "gsm8k")):
        write(tmp_path, f"results_{stamp}.json", json.dumps({"model_name": model}))
        write(tmp_path, f"samples_{task}_{stamp}.jsonl", sample(0, 1.0))
    results = read_results(tmp_path, "lm-eval")
    assert results.models == ["org/a", "org/b"]
    assert np.isnan(results.scores).sum() == 2
    write(tmp_path, "samples_hellaswag_2026-03-01T00-00-00.0.jsonl", sample(0, 1.0))
    with pytest.raises(ResultsError, match="results of org/a and org/b, and none of the run of 2026-03.*folder of its"):
        read_results(tmp_path, "lm-eval")


def test_graded_scores_stay_and_the_folder_is_the_benchmark_of_a_bare_side(tmp_path):
    rows = [{"question": "Who?", "scores": {"a": 0.3, "b": 0.96, "c": 0.0}}]
    write(tmp_path / "qa", "train.json", json.dumps(rows))
    write(tmp_path / "qa", "test.json", json.dumps([rows[0] | {"question": "Why?"}]))
    results = read_results(tmp_path / "qa")
    np.testing.assert_allclose(results.scores, [[0.3, 0.96, 0.0]] * 2)
    assert set(results.queries["benchmark"]) == {"qa"}
    assert sorted(results.queries["split"]) == ["test", "train"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"doc_id": 0', "line 1 is not JSON"),
        ('{"doc": {}}', "field 'doc_id': missing"),
        ('{"doc_id": 0, "metrics": ["bleu"], "bleu": 1}', "no metric"),
        ('{"doc_id": 0, "acc": 1}', "field 'arguments'"),
        ("", "empty results"),
    ],
)
def test_malformed_harness_samples_are_one_line(tmp_path, line, message):
    file = write(tmp_path, "samples_task_2026-01-02T03-04-05.6.jsonl", line + "\n")
    with pytest.raises(ResultsError, match=message):
        read_results(file, "lm-eval")


DATA = Path(os.environ.get("EXPERTOKEN_DATA", "data"))


@pytest.mark.skipif(not DATA.exists(), reason="no published results here (EXPERTOKEN_DATA)")
def test_the_published_routerdc_files_give_the_published_means():
    names = ("mmlu_test", "gsm8k-test", "cmmlu_test", "arc_challenge_test", "humaneval_test")
    means = np.mean([read_results(DATA / "routerdc" / f"{n}.json", "routerdc").scores.mean(0) for n in names], 0)
    assert 100 * means.max() == pytest.approx(54.56, abs=0.01)


def test_truth_values_with_a_gap_are_scores_and_words_like_none_are_text(tmp_path):
    results = read_results(write(tmp_path, "r.csv", "query,a,b\nNone,True,False\nNA,,True\n"))
    assert results.models == ["a", "b"]
    np.testing.assert_array_equal(results.scores, [[1, 0], [np.nan, 1]])
    assert results.queries["prompt"].tolist() == ["None", "NA"]


def test_one_model_may_be_named(tmp_path):
    file = write(tmp_path, "r.csv", "query,law,x\nq,1,0\n")
    assert read_results(file, **parse_options("table", ["models=law"])).models == ["law"]


def test_a_folder_of_one_file_a_model_is_one_benchmark(tmp_path):
    folder = tmp_path / "trivia"
    folder.mkdir()
    (folder / "gpt.csv").write_text("query,model,score\nq1,gpt,1\nq2,gpt,0\n")
    (folder / "llama.csv").write_text("query,model,score\nq1,llama,0\nq2,llama,1\n")
    results = read_results(folder)
    assert results.scores.tolist() == [[1, 0], [0, 1]]
    assert set(results.queries["benchmark"]) == {"trivia"}


def test_one_id_for_two_questions_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("id,query,model,score\n0,what is 2+2,a,1\n0,name a river,b,0\n")
    with pytest.raises(ResultsError, match="query id '0' has different questions"):
        read_results(tmp_path / "t.csv")
