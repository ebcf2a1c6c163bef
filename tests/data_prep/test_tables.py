"""Tables in real shapes: which are read, which need an option, and which errors prevent a silent misreading."""

import gzip
import json
import logging

import numpy as np
import pandas as pd
import pytest

from expertoken.data_prep.reading import detect, parse_options, read_queries, read_results
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import build_supervision
from expertoken.modeling.errors import ResultsError


def table(folder, name, text, encoding="utf-8"):
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return file


def read(file, *options):
    return read_results(file, **parse_options(detect(file), list(options)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query,model,score\nOn Monday, what?,m,1\nOn Friday, who?,m,0\n", "row 2 has 4 cells, the header 3. Quote"),
        ("query,model,score\nWhat?,m,1\nWho?,m\n", "row 3 has 2 cells, the header 3"),
        ("query,Model,score\nWhat?,m,1\n", "column 'Model': if it is the model, .*--set model=Model"),
        ("query,model_name,score\nWhat?,m,1\n", "column 'model_name': if it is the model"),
        ("query,Score\nWhat?,1\n", "column 'Score': if it is the score"),
        ("query,score\nWhat?,1\n", "a column 'score', but no column 'model'"),
        ("query,a,Benchmark\nWhat?,1,b\n", "column 'Benchmark': if it is the benchmark"),
        ("query,query_id,a\nWhat?,7,1\n", "column 'query_id': if it is the id"),
        ("query,a,a\nWhat?,1,0\n", "two columns are called 'a'"),
        ("id,query,model,score\n1,What?,m,1\n,Who?,m,0\n", "row 3, column 'id': empty"),
        ("query,model,score\nWhat?,m,85\nWho?,m,40\n", "score 85 is outside \\[0, 1\\].*--set scale=100"),
        ('query,model,score\n"He said "hi" to me",m,1\n', "line 2: not a readable table .* is written twice"),
        ('query,model,score\n"never ends,m,1\n', "not a readable table"),
    ],
)
def test_what_can_be_misread_is_one_line_that_says_what_to_do(tmp_path, text, message):
    with pytest.raises(ResultsError, match=message) as error:
        read(table(tmp_path, "t.csv", text))
    assert "\n" not in str(error.value)


LONG = "query,model,score\nWhat is 2+2?,math,1\nWhat is 2+2?,law,0.5\n"


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        ("blanks.csv", "query, model, score\nWhat is 2+2? , math, 1\nWhat is 2+2?, law, 0.5\n", "utf-8"),
        ("excel.csv", "query;model;score\r\nWhat is 2+2?;math;1,0\r\nWhat is 2+2?;law;0,5\r\n", "utf-8-sig"),
        ("utf16.csv", LONG.replace("\n", "\r\n"), "utf-16"),
        ("utf16be.csv", "\ufeff" + LONG, "utf-16-be"),
        ("utf32.csv", LONG, "utf-32"),
        ("tabs.tsv", LONG.replace(",", "\t"), "utf-8"),
        ("pipes.csv", LONG.replace(",", "|"), "utf-8"),
        ("trailing.csv", "query,model,score\nWhat is 2+2?,math,1,\nWhat is 2+2?,law,0.5\n", "utf-8"),
        ("blank-lines.csv", LONG.replace("\n", "\n\n"), "utf-8"),
        ("macintosh.csv", LONG.replace("\n", "\r"), "utf-8"),
    ],
)
def test_separators_encodings_and_line_ends_are_found_by_content(tmp_path, name, text, encoding):
    results = read(table(tmp_path, name, text, encoding))
    assert results.models == ["math", "law"]
    assert results.queries["prompt"].tolist() == ["What is 2+2?"]
    np.testing.assert_allclose(results.scores, [[1, 0.5]])


def records():
    return [{"query": "What is 2+2?", "model": name, "score": score} for name, score in (("math", 1), ("law", 0.5))]


def write_excel(file):
    pd.DataFrame(records()).to_excel(file, index=False)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.json", lambda file: file.write_text(json.dumps(records()))),
        ("lines.json", lambda file: file.write_text("\n".join(map(json.dumps, records())))),
        ("t.csv.gz", lambda file: file.write_bytes(gzip.compress(LONG.encode()))),
        ("t.jsonl.gz", lambda file: file.write_bytes(gzip.compress("\n".join(map(json.dumps, records())).encode()))),
        ("t.xlsx", write_excel),
        ("t.parquet", lambda file: pd.DataFrame(records() * 1).to_parquet(file)),
        ("T.CSV", lambda file: file.write_text(LONG)),
    ],
)
def test_other_files_hold_the_same_table(tmp_path, name, write):
    write(tmp_path / name)
    assert detect(tmp_path / name) == "table"
    results = read_results(tmp_path / name)
    assert results.models == ["math", "law"]
    np.testing.assert_allclose(results.scores, [[1, 0.5]])


def test_settings_beside_tables_are_no_table(tmp_path):
    table(tmp_path, "a.csv", LONG)
    (tmp_path / "settings.json").write_text(json.dumps({"tasks": ["a"], "limit": None}, indent=2))
    assert read(tmp_path).models == ["math", "law"]
    with pytest.raises(ResultsError, match="no format known here"):
        detect(tmp_path / "settings.json")


def test_a_parquet_file_of_many_rows_is_looked_at_without_a_traceback(tmp_path):
    frame = pd.DataFrame({"query": [f'odd "{i}\n text' for i in range(3000)], "a": 1.0, "b": np.arange(3000) % 2})
    frame.to_parquet(tmp_path / "t.parquet")
    assert len(read(tmp_path / "t.parquet")) == 3000


def test_a_reader_that_fails_at_a_file_does_not_know_it(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'query,"a\x00\nx,1\n')
    assert detect(tmp_path / "t.csv") == "table"


def test_words_are_scores_also_beside_numbers(tmp_path):
    text = "query,a,b,c,d\nq1,yes,C,1,fail\nq2,Incorrect,I,0,pass\nq3,no,P,0.5,\n"
    results = read(table(tmp_path, "t.csv", text))
    assert results.models == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(results.scores, [[1, 1, 1, 0], [0, 0, 0, 1], [0, 0.5, 0.5, np.nan]])


def test_costs_beside_the_models_are_costs_and_a_difficulty_is_told_as_left_out(tmp_path, caplog):
    text = "query,gpt,llama,gpt_cost,llama_cost,difficulty\nA?,1,0,0.003,0.001,0.2\nB?,0,1,0.004,0.001,0.9\n"
    with caplog.at_level(logging.INFO, logger="expertoken"):
        results = read(table(tmp_path, "t.csv", text))
    assert results.models == ["gpt", "llama"]
    np.testing.assert_allclose(results.costs, [[0.003, 0.001], [0.004, 0.001]])
    assert "left out: difficulty (--set benchmark=COLUMN uses one)" in caplog.text


def test_scores_up_to_a_hundred_are_scaled_where_that_is_said(tmp_path):
    file = table(tmp_path, "t.csv", "query,model,score\nA?,m,85\nA?,n,40\n")
    np.testing.assert_allclose(read(file, "scale=100").scores, [[0.85, 0.4]])
    with pytest.raises(ResultsError, match="option scale: expected a number above 0, got 'no'"):
        read(file, "scale=no")


def test_fields_inside_of_objects_are_named_with_dots(tmp_path):
    rows = [
        {"question": f"{q}?", "llm": model, "result": {"score": score, "usd": 0.5}}
        for q, model, score in (("A", "m", 1.0), ("A", "n", 0.0))
    ]
    file = table(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)))
    results = read(file, "query=question", "model=llm", "score=result.score", "cost=result.usd")
    np.testing.assert_array_equal(results.scores, [[1, 0]])
    np.testing.assert_array_equal(results.costs, [[0.5, 0.5]])


def test_attempts_are_averaged_where_a_column_numbers_them_or_it_is_said(tmp_path):
    rows = "".join(f"A?,m,{score},{n}\n" for n, score in enumerate((1, 0, 1, 1)))
    assert read(table(tmp_path, "t.csv", f"query,model,score,sample\n{rows}")).scores.tolist() == [[0.75]]
    bare = table(tmp_path, "u.csv", "query,model,score\nA?,m,1\nA?,m,0\n")
    with pytest.raises(ResultsError, match="row 3: query .* came before. .*--set repeats=mean"):
        read(bare)
    assert read(bare, "repeats=mean").scores.tolist() == [[0.5]]


def test_one_question_is_one_question_whatever_editor_saved_it(tmp_path):
    for name, text, model in (("a.csv", "Caf\u00e9?\nA. no", "a"), ("b.csv", "Cafe\u0301?\r\nA. no ", "b")):
        (tmp_path / name).write_bytes(f'query,model,score,benchmark\n"{text}",{model},1,x\n'.encode())
    results = read(tmp_path)
    assert len(results) == 1
    assert results.models == ["a", "b"]


def test_messages_are_a_chat(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    rows = [{"query": chat, "a": 1, "b": 0}, {"query": [{"role": "user", "content": "Why?"}], "a": 0, "b": 1}]
    rows += [{"query": f"Question {n}?", "a": n % 2, "b": 1 - n % 2} for n in range(8)]
    results = read(table(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows))))
    assert results.queries["prompt"].tolist()[:2] == ["Be brief.\n\nWho?", "Why?"]
    supervision = build_supervision(results, validation=0, test=0, near_duplicates="ignore")
    kept = {part[0]["content"][0]["text"]: [m["role"] for m in part] for part in supervision.side("train")["messages"]}
    assert kept["Be brief."] == ["system", "user"]
    assert kept["Why?"] == ["user"]
    bad = table(tmp_path, "u.jsonl", json.dumps({"query": [{"role": "king", "content": "x"}], "a": 1}))
    with pytest.raises(ResultsError, match="row 1, column 'query': expected text or a list of messages"):
        read(bad)


def test_lines_end_at_line_feeds_alone(tmp_path):
    row = {"query": "one\u2028two\u0085three", "a": 1}
    assert len(read(table(tmp_path, "t.jsonl", json.dumps(row, ensure_ascii=False)))) == 1
    assert read_queries(table(tmp_path, "q.txt", "one\u2028two\nthree\n")) == ["one\u2028two", "three"]


@pytest.mark.parametrize("side", ["Train", "TEST", "dev", "Val", "validation"])
def test_sides_have_the_names_that_people_give_them(tmp_path, side):
    expected = {"train": "train", "test": "test"}.get(side.lower(), "validation")
    text = f"query,a,split\nq1,1,{side}\n"
    assert read(table(tmp_path, "t.csv", text)).queries["split"].tolist() == [expected]


def results_of(sides):
    frame = pd.DataFrame(
        {"id": [f"q{i}" for i in range(len(sides))], "prompt": [f"Question {i} about it" for i in range(len(sides))]}
    ).assign(benchmark="b", subject=None, split=sides)
    scores = np.stack([np.arange(len(sides)) % 2, 1 - np.arange(len(sides)) % 2], 1)
    return BenchmarkResults(frame, ["a", "b"], scores)


def test_results_of_one_side_alone_are_split_anew(caplog):
    with caplog.at_level(logging.INFO, logger="expertoken"):
        supervision = build_supervision(results_of(["test"] * 40), near_duplicates="ignore")
    assert supervision.info.sizes == {"train": 29, "validation": 3, "test": 8}
    assert "the files call all queries test" in caplog.text


def test_files_called_after_benchmark_and_model_are_one_benchmark_a_name(tmp_path):
    for benchmark in ("gsm8k", "arc"):
        for model in ("org/a", "b"):
            text = "query,model,score\n" + "".join(f"{benchmark} {n}?,{model},{n % 2}\n" for n in range(3))
            (tmp_path / f"{benchmark}-{model.replace('/', '_')}.csv").write_text(text)
    results = read(tmp_path)
    assert len(results) == 6
    assert sorted(set(results.queries["benchmark"])) == ["arc", "gsm8k"]
    assert not np.isnan(results.scores).any()


def test_models_that_share_no_question_are_refused(tmp_path, caplog):
    for model in ("a", "b"):
        (tmp_path / f"{model}.csv").write_text(f"query,model,score,benchmark\nOnly {model}?,{model},1,of-{model}\n")
    with pytest.raises(ResultsError, match="share no query with any other .*results cannot compare them"):
        build_supervision(read(tmp_path))
    both = "".join(f"Both {n}?,{m},{(n + (m == 'c')) % 2},b\n" for n in range(20) for m in ("b", "c"))
    (tmp_path / "c.csv").write_text(f"query,model,score,benchmark\n{both}")
    build_supervision(read(tmp_path), near_duplicates="ignore")
    assert "no query was answered by a and by another candidate (a on of-a)" in caplog.text
