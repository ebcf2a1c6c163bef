import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from expertoken.data_prep.labels import Labelling
from expertoken.data_prep.leaks import find_leaks, find_near_duplicates
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import Supervision, build_supervision, pool_of
from expertoken.modeling.errors import ExpertokenError, LeakError, ResultsError
from expertoken.modeling.experts import Expert
from expertoken.modeling.pool import ExpertPool

nan = float("nan")


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


@pytest.mark.parametrize(
    "disguise",
    [
        "Who\u200b may\u2060 sue wh\u00adom in this case?",  # characters without width
        "Who may sue whom in this case? Answer:",
        "Question: Who may sue whom in this case?\nA:",
        "Wh\u043e m\u0430y su\u0435 whom in this c\u0430se?",  # Cyrillic letters
        "\ufeffWHO MAY SUE WHOM\nIN THIS CASE",
    ],
)
def test_a_disguise_makes_no_other_question(disguise):
    assert find_leaks([disguise], ["Who may sue whom in this case?"]) == [(0, 0)]


def test_a_question_that_stands_in_another_is_nearly_the_same():
    question = "Which of the two old ships in the harbour was built before the war and sank?"
    longer = (
        f"Read this letter of a sailor to his wife first.\n{question}\nGive your answer in one single word, please."
    )
    for train, test in (([question], [longer]), ([longer], [question])):
        [pair] = find_near_duplicates(train, test)
        assert pair == (0, 0, 1.0)
    assert find_near_duplicates(["Is it so?"], [f"Is it so? {question}"]) == []


def test_equal_questions_are_drawn_to_one_side():
    prompts = [f"What is {n // 4} plus 1{'?' * (n % 2)}" for n in range(80)]  # each question occurs four times
    frame = pd.DataFrame({"id": [f"q{n}" for n in range(80)], "prompt": prompts}).assign(
        benchmark="b", subject=None, split=None
    )
    results = BenchmarkResults(frame, ["a", "b"], np.stack([np.arange(80) % 3 > 0, np.arange(80) % 3 == 0], 1))
    supervision = build_supervision(
        results, near_duplicates="ignore"
    )  # raises a LeakError if equal questions are in both splits
    assert all(supervision.info.sizes.values())
    stated = frame.assign(split=["test"] + [None] * 79)
    drawn = BenchmarkResults(stated, ["a", "b"], results.scores).split()
    assert set(drawn.queries["split"][:4]) == {"test"}


def test_a_leak_is_refused_unless_told():
    with pytest.raises(LeakError, match="1 train or validation queries .*1 = 2"):
        build_supervision(leaky(), validation=0)
    assert build_supervision(leaky(), validation=0, leaks="drop").info.sizes["train"] == 1
    assert build_supervision(leaky(), validation=0, leaks="keep").info.sizes["train"] == 2


LONG = "A farmer keeps seven hens and three goats on a hill above the old mill by the river; how many animals has {}?"


def test_near_duplicates_are_found_by_wording_and_scaffolding_is_not_counted():
    train = [
        LONG.format("she"),
        "Name the river that runs through the capital of France and then on to the sea.",
        "5 + 3",
    ]
    test = [LONG.format("he").replace("seven", "7"), "Who wrote the book about the white whale, and when?", "5 - 3"]
    [pair] = find_near_duplicates(train, test, 0.6)
    assert (pair.train, pair.test) == (0, 0)
    assert 0.6 <= pair.similarity < 1
    # Equal examples before every question do not make two questions near-duplicates.
    shots = "Q: " + LONG.format("a") + " A: ten. Q: Which of these is the largest planet of them all? A: Jupiter. Q: "
    words = ["lemon", "stone", "cloud", "violin", "harbour", "copper", "saddle", "kettle"]
    many = [
        f"{shots}Describe how one would best {a} a {b} in the {c} with care"
        for a in words
        for b in words
        for c in words
    ]
    assert len(find_near_duplicates(many[:256], many[256:], 0.8)) == 0


def test_near_duplicates_in_chinese_are_compared_character_by_character():
    text = "下列函数中在原点处不可导的是哪一个请从四个选项里选出正确的答案并说明理由"
    assert len(find_near_duplicates([text], [text.replace("四个", "三个")], 0.6)) == 1


def test_near_duplicates_are_named_and_left_out_where_asked(tmp_path):
    frame = pd.DataFrame(
        {"id": ["a", "b", "c"], "prompt": [LONG.format("she"), LONG.format("he"), "Something else entirely."],
         "benchmark": "x", "subject": None, "split": ["train", "test", "train"]}
    )  # fmt: skip
    results = BenchmarkResults(frame, ["m", "n"], [[1, 0], [1, 0], [0, 1]])
    kept = build_supervision(results, validation=0)
    [[train, test, similarity]] = kept.info.leaks["near"]["pairs"]
    assert (train, test) == ("a", "b")
    assert 0.8 <= similarity < 1
    assert kept.info.sizes["train"] == 2
    assert build_supervision(results, validation=0, near_duplicates="drop").info.sizes["train"] == 1
    assert build_supervision(results, validation=0, near_duplicates="ignore").info.leaks["near"]["found"] == 0
    with pytest.raises(LeakError, match="1 train or validation queries are similar to .*a ~ b.*--near-duplicates drop"):
        build_supervision(results, validation=0, near_duplicates="refuse")


def test_an_expert_without_results_is_named(results):
    pool = ExpertPool([Expert("math", model="m"), Expert("physics", model="org/physics")])
    with pytest.raises(ResultsError, match="expert 'physics': no results under 'physics' or 'org/physics'"):
        build_supervision(results, pool)


def test_results_without_any_difference_teach_nothing(results):
    results.scores[:] = 1
    with pytest.raises(ResultsError, match="nothing to learn from"):
        build_supervision(results.select(["math", "law"]))


def test_a_pool_is_made_from_the_models_where_none_is_given(results):
    pool = pool_of(results, self_model="meta")
    assert pool.names == ["math", "law", "self"]
    assert pool["self"].find_in(results.models) == "meta"


def test_a_side_without_queries_is_kept_as_such_and_told_where_it_is_needed(tmp_path, results, pool):
    build_supervision(results, pool, validation=0.0, test=0.0).save(tmp_path / "s")
    loaded = Supervision.load(tmp_path / "s")
    assert [len(loaded.data[side]) for side in ("validation", "test")] == [0, 0]
    assert len(loaded.side("train")) > 0
    with pytest.raises(ExpertokenError, match="no 'validation' split.*larger share"):
        loaded.side("validation")


def test_a_folder_that_is_no_supervision_is_one_line(tmp_path):
    with pytest.raises(ExpertokenError, match="not a supervision folder") as error:
        Supervision.load(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "supervision.json").write_text(json.dumps({"candidates": []}))
    with pytest.raises(ExpertokenError, match="not a supervision folder"):
        Supervision.load(tmp_path)


def test_costs_count_in_what_is_learnt_and_not_in_what_is_measured(results, pool):
    priced = replace(results, costs=np.tile([2.0, 0.1, 0.0], (len(results), 1)))
    built = build_supervision(priced, pool, labelling=Labelling("query", cost_weight=0.6))
    targets, utilities, _ = built.arrays("train")
    scores = built.scores("train")
    np.testing.assert_allclose(utilities, scores - 0.6 * np.array([2.0, 0.1, 0.0]), rtol=1e-6)
    # math costs more than a right answer is worth, so its questions stay with self
    assert targets[:, 0].sum() == 0
    assert targets[scores[:, 1] == 1, 1].all()


def test_a_contaminated_pair_is_left_out_of_labels_and_kept_in_scores(tmp_path, results, pool):
    flagged = results.flag([("math", "sums")])
    built = build_supervision(flagged, pool)
    built.save(tmp_path / "s")
    loaded = Supervision.load(tmp_path / "s")
    sums = np.asarray(loaded.side("train")["benchmark"]) == "sums"
    targets, utilities, _ = loaded.arrays("train")
    assert targets[sums, 0].sum() == 0
    assert np.isnan(utilities[sums, 0]).all()
    assert (loaded.scores("train")[sums, 0] == 1).all()
    with pytest.raises(ResultsError, match="contaminated: no benchmark 'sum', did you mean 'sums'"):
        results.flag([("math", "sum")])


def test_what_is_held_out_is_the_test_side_and_nothing_else_is(results, pool):
    results.queries.loc[results.queries["benchmark"] == "sums", "split"] = "test"
    built = build_supervision(results, pool, hold_out=("benchmark", ["cases"]))
    assert set(built.data["test"]["benchmark"]) == {"cases"}
    assert set(built.data["train"]["benchmark"]) == {"chats"}  # a stated test split is not used for training
    with pytest.raises(ResultsError, match="hold out: no benchmark 'case', did you mean 'cases'"):
        build_supervision(results, pool, hold_out=("benchmark", ["case"]))


def test_what_somebody_else_put_into_a_folder_stays(tmp_path, results, pool):
    supervision = build_supervision(results, pool)
    supervision.save(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    supervision.save(tmp_path / "s")
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"
    assert Supervision.load(tmp_path / "s").info == supervision.info


def test_a_supervision_is_not_written_over_a_composite_or_a_file(tmp_path, results, pool):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "expertoken.json").write_text("{}")
    (tmp_path / "f").write_text("")
    supervision = build_supervision(results, pool)
    for name, message in (
        ("c", "c: holds a composite. Choose another folder"),
        ("f", "f: expected a folder to write the supervision to, got a file"),
    ):
        with pytest.raises(ExpertokenError, match=message):
            supervision.save(tmp_path / name)


def test_a_pool_finds_results_that_leave_the_organisation_out(results):
    pool = ExpertPool([Expert("maths", model="org/math"), Expert("law", model="law")])
    assert build_supervision(results, pool).info.candidates == ["maths", "law"]
    with pytest.raises(ResultsError, match="no results under 'x' or 'org/y'"):
        build_supervision(results, ExpertPool([Expert("x", model="org/y")]))


def test_chat_data_for_other_trainers_answers_each_query_with_its_experts_token(tmp_path, results, pool):
    import datasets

    from expertoken.data_prep.sft import export_sft

    supervision = build_supervision(results, pool)
    counts = export_sft(supervision, tmp_path / "sft")
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "sft" / "train.jsonl"), split="train")
    assert len(loaded) == counts["train.jsonl"]
    for row in loaded:
        question, answer = row["messages"]
        wanted = "math" if question["content"].startswith("Compute") else "law"
        assert answer == {"role": "assistant", "content": f"<|expert:{wanted}|>"}
    described = json.loads((tmp_path / "sft" / "dataset_info.json").read_text())
    assert all((tmp_path / "sft" / entry["file_name"]).exists() for entry in described.values())


def test_chat_data_is_not_written_over_a_supervision(tmp_path, results, pool):
    from expertoken.data_prep.sft import export_sft

    supervision = build_supervision(results, pool)
    supervision.save(tmp_path / "s")
    with pytest.raises(ExpertokenError, match="holds a supervision"):
        export_sft(supervision, tmp_path / "s")
    Supervision.load(tmp_path / "s")


def test_a_path_is_no_results(tmp_path):
    with pytest.raises(ExpertokenError, match=r"expected BenchmarkResults \(see `read_results`\), got str"):
        build_supervision("results.csv", None)
