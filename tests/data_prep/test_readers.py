import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from expertoken.data_prep.reading import parse_options, read_results
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
        ("query,model,score\nq,a,good\n", "row 1, column 'score': expected a number, got 'good'"),
        ("query,model,score\nq,a,1\nq,a,0\n", "row 2: query .* came before"),
        ("query,a\nq,1\nq,0\n", "row 2: query .* came before"),
        ("query,model,score\n,a,1\n", "row 1, column 'query': no text"),
        ("query,a\nq,7\n", "score 7 is outside"),
        ("query,note\nq,hm\n", "no numeric column left"),
    ],
)
def test_a_malformed_table_is_one_line_that_names_the_place(tmp_path, text, message):
    with pytest.raises(ResultsError, match=message) as error:
        read_results(write(tmp_path, "r.csv", text))
    assert "\n" not in str(error.value)


def test_missing_files_and_formats_are_named(tmp_path):
    with pytest.raises(ResultsError, match="no such file or folder"):
        read_results(tmp_path / "none.csv")
    with pytest.raises(ResultsError, match="unknown format 'routerd', did you mean 'routerdc'"):
        read_results(tmp_path, "routerd")
    with pytest.raises(ResultsError, match="no format known here; say which with --format"):
        read_results(tmp_path)


def test_routerdc_multiple_choice_is_right_above_zero_and_attempts_stay_means(tmp_path):
    rows = [{"question": "q", "scores": {"a": 0.51, "b": 0}}, {"question": "q", "scores": {"a": 0, "b": 0.2}}]
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
    with pytest.raises(ResultsError, match="query id '0' stands for different questions"):
        read_results(tmp_path / "t.csv")
