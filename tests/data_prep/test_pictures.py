"""Results about pictures: they are read, checked, distinguished by their pixels, and kept with the supervision."""

import io
import json
import os
import zlib
from pathlib import Path
from struct import pack

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from expertoken.cli.app import app
from expertoken.data_prep.extension import extend_supervision
from expertoken.data_prep.images import digest_of, with_pictures
from expertoken.data_prep.leaks import IMAGES, questions_of
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import Supervision, build_supervision
from expertoken.modeling.errors import ResultsError
from expertoken.modeling.experts import Expert
from expertoken.modeling.pool import ExpertPool

Image = pytest.importorskip("PIL.Image")
ASK = "What is shown here?"


def drawn(seed, size=(12, 8)):
    values = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def folder(tmp_path):
    """Write 40 pictures and a table with the results of one question about each."""
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    rows = ["query,benchmark,image,one,two"]
    for number in range(40):
        drawn(number).save(tmp_path / "pictures" / "deep" / f"{number}.png")
        rows.append(f"{ASK},shapes,deep/{number}.png,{number % 2},{1 - number % 2}")
    (tmp_path / "results.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_one_question_about_many_pictures_is_many_queries(folder):
    results = read_results(folder / "results.csv")
    assert len(results) == 40
    assert results.queries["id"].iloc[3] == f"shapes/{ASK} [deep/3.png]"
    assert set(results.queries["prompt"]) == {ASK}
    supervision = build_supervision(results)
    assert sum(supervision.info.sizes.values()) == 40
    assert supervision.info.leaks["equal"]["found"] == 0


def test_the_same_question_about_the_same_picture_is_a_leak(folder):
    drawn(0).save(folder / "pictures" / "again.bmp")  # another file in another format, with equal pixels
    rows = [
        {"query": ASK, "image": "deep/0.png", "split": "train", "one": 1, "two": 0},
        {"query": ASK, "image": "deep/1.png", "split": "train", "one": 0, "two": 1},
        {"query": f"{ASK} ", "image": "again.bmp", "split": "test", "one": 1, "two": 0},
    ]
    pd.DataFrame(rows).assign(id=["a", "b", "c"]).to_csv(folder / "r.csv", index=False)
    results = with_pictures(read_results(folder / "r.csv"), folder / "pictures")
    assert len(set(questions_of(results.queries))) == 2
    found = build_supervision(results, leaks="drop", near_duplicates="drop").info.leaks
    assert found["equal"]["pairs"] == [["a", "c", 1.0]]
    assert found["near"]["found"] == 0


def test_prepare_keeps_each_picture_once_and_training_reads_where_it_stands(folder):
    arguments = [
        "prepare",
        str(folder / "results.csv"),
        "--images",
        str(folder / "pictures"),
        "--out",
        str(folder / "s"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "40 queries have pictures, 40 pictures are stored" in done.output
    supervision = Supervision.load(folder / "s")
    assert len(list((folder / "s" / "images").iterdir())) == 40
    row = supervision.data["train"][0]
    [message] = row["messages"]
    picture, text = message["content"]
    assert (picture["type"], text["text"]) == ("image_url", ASK)
    assert digest_of(supervision.pictures[picture["image"]]) == picture["image"]


def test_without_pictures_a_supervision_is_what_it_was(results, pool, tmp_path):
    supervision = build_supervision(results, pool)
    supervision.save(tmp_path / "s")
    assert not (tmp_path / "s" / "images").exists()
    part = supervision.data["train"].features["messages"].feature["content"].feature
    assert set(part) == {"type", "text"}


def test_the_text_of_a_question_about_a_picture_says_that_there_is_one(folder, base_folder):
    from expertoken.modeling.meta import MetaLLM
    from expertoken.modeling.source import Source

    supervision = build_supervision(read_results(folder / "results.csv"))
    meta = MetaLLM.from_pretrained(Source(str(base_folder)), 2, device="cpu")
    [query, *_] = supervision.queries("train", meta)
    assert f"[image_url]\n{ASK}" in meta.tokenizer.decode(query.ids)


def test_a_newcomers_results_are_matched_by_text_and_picture(folder):
    results = with_pictures(read_results(folder / "results.csv"), folder / "pictures")
    pool = ExpertPool([Expert("one", model="a"), Expert("two", model="b")])
    old = build_supervision(results, pool)
    drawn(99).save(folder / "pictures" / "new.png")
    rows = [{"query": ASK, "image": f"deep/{number}.png", "sees": 1} for number in range(6)]
    rows.append({"query": ASK, "image": "new.png", "sees": 1})
    pd.DataFrame(rows).assign(id=[f"n{i}" for i in range(7)]).to_csv(folder / "new.csv", index=False)
    new = with_pictures(read_results(folder / "new.csv"), folder / "pictures")
    extended = extend_supervision(old, pool, Expert("sees", model="c"), new)
    assert sum(extended.info.sizes.values()) == 41
    assert extended.info.candidates == ["one", "two", "sees"]
    assert digest_of(folder / "pictures" / "new.png") in extended.pictures
    measured = [not np.isnan(row[2]) for side in extended.data.values() for row in side["scores"]]
    assert sum(measured) == 7


def test_two_files_that_show_other_pictures_under_one_id_are_refused():
    def part(image, model):
        frame = pd.DataFrame({"id": ["q"], "prompt": [ASK], "benchmark": "b", "subject": None, "split": None})
        return BenchmarkResults(frame.assign(**{IMAGES: [(image,)]}), [model], [[1.0]])

    assert len(BenchmarkResults.merge([part("x.png", "one"), part("x.png", "two")])) == 1
    with pytest.raises(ResultsError, match="'q' has different pictures"):
        BenchmarkResults.merge([part("x.png", "one"), part("y.png", "two")])


def bomb(side):
    """Build a PNG of a few bytes with very many pixels."""

    def chunk(kind, data):
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    head = pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def whole():
    stream = io.BytesIO()
    drawn(1, (64, 64)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.png", None, "no picture 'none.png' below"),
        ("../secret.png", None, "which leads out of it"),
        ("/etc/hostname", None, "which leads out of it"),
        ("link.png", "link", "which leads out of it"),
        ("text.png", b"no picture", "expected a picture in one of the formats PNG"),
        ("vectors.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected a picture in one of the formats PNG"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "expected a picture in one of the formats PNG"),
        ("bomb.png", bomb(12_000), r"expected up to 64,000,000 pixels .*, got 12000 x 12000"),
        ("huge.png", bomb(60_000), r"got 60000 x 60000|expected a picture in one of the formats PNG"),
        ("cut.png", whole()[:300], "expected a picture in one of the formats PNG"),
        ("empty.png", b"", "expected a picture in one of the formats PNG"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_what_is_no_picture_of_the_folder_is_one_clear_error(tmp_path, name, content, message):
    root = tmp_path / "pictures"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(whole())
    if content == "link":
        (root / name).symlink_to(tmp_path / "secret.png")
    elif content is not None:
        (root / name).write_bytes(content)
    (tmp_path / "r.jsonl").write_text(json.dumps({"query": ASK, "image": name, "one": 1, "two": 0}) + "\n")
    with pytest.raises(ResultsError, match=message):
        with_pictures(read_results(tmp_path / "r.jsonl"), root)


def test_a_column_of_pictures_holds_paths(tmp_path):
    rows = [{"query": ASK, "image": ["a.png", "b.png"], "m": 1}, {"query": "And here?", "image": None, "m": 0}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images = read_results(tmp_path / "r.jsonl").queries[IMAGES]
    assert images.tolist() == [("a.png", "b.png"), None]
    (tmp_path / "r.jsonl").write_text(json.dumps({"query": ASK, "image": "iVBOR" * 1000, "m": 1}))
    with pytest.raises(
        ResultsError, match="row 1, column 'image': expected a path, or a list of paths. Save a picture"
    ):
        read_results(tmp_path / "r.jsonl")


def test_pictures_that_no_column_names_are_told(tmp_path):
    (tmp_path / "r.csv").write_text("query,a,b\nWho?,1,0\n")
    with pytest.raises(ResultsError, match="the results name no pictures"):
        with_pictures(read_results(tmp_path / "r.csv"), tmp_path)


def records(**more):
    rows = {"index": [0, 1, 2], "question": [ASK] * 3, "A": ["a cat"] * 3, "B": ["a dog"] * 3,
            "answer": ["A", "B", "A"],
            "category": ["animals"] * 3, "prediction": ["A", "The answer is B.", "I can't see."]}  # fmt: skip
    return pd.DataFrame(rows | more)


def test_records_of_vlmevalkit_are_read_by_the_letter_where_no_judge_was(tmp_path, caplog):
    folder = tmp_path / "sees_7b"
    folder.mkdir()
    records().to_excel(folder / "sees_7b_MMBench_DEV_EN.xlsx", index=False)
    results = read_results(tmp_path)
    assert results.models == ["sees_7b"]
    assert results.scores[:, 0].tolist() == [1, 1, 0]
    assert "1 of 3 answers name no option" in caplog.text
    row = results.queries.iloc[1]
    assert row["prompt"] == f"{ASK}\nA. a cat\nB. a dog"
    assert (row["id"], row["benchmark"], row["subject"]) == ("MMBench_DEV_EN/1", "MMBench_DEV_EN", "animals")
    assert row[IMAGES] == ("MMBench_DEV_EN/1.jpg",)


def test_what_a_judge_wrote_counts_before_our_own_reading(tmp_path):
    records(hit=[0, 0, 1]).to_csv(tmp_path / "sees_MMStar_gpt-4o_result.tsv", index=False, sep="\t")
    results = read_results(tmp_path / "sees_MMStar_gpt-4o_result.tsv")
    assert (results.models, results.scores[:, 0].tolist()) == (["sees"], [0, 0, 1])
    assert set(results.queries["benchmark"]) == {"MMStar"}


def test_free_answers_without_a_judge_are_refused(tmp_path):
    records(answer=["yes", "no", "7"]).to_excel(tmp_path / "sees_MMVet.xlsx", index=False)
    with pytest.raises(ResultsError, match="answers that are no letters, and no column 'hit' or 'score' that a judge"):
        read_results(tmp_path / "sees_MMVet.xlsx")


@pytest.mark.skipif("EXPERTOKEN_DATA" not in os.environ, reason="no published results here (EXPERTOKEN_DATA)")
def test_a_published_record_of_vlmevalkit_is_read():
    file = Path(os.environ["EXPERTOKEN_DATA"]) / "vision" / "vlmevalkit-form" / "llava_next_yi_34b_MMStar.xlsx"
    results = read_results(file)
    assert (len(results), results.models) == (1500, ["llava_next_yi_34b"])
    assert 0.3 < results.scores.mean() < 0.7


def test_samples_of_lmms_eval_are_read_whatever_their_metric_looks_like(tmp_path):
    folder = tmp_path / "org__sees-7b"
    folder.mkdir()
    ours = {"target": "A", "filtered_resps": ["A"], "doc_hash": "x"}
    tasks = {
        "ai2d": [{"exact_match": 1.0}, {"exact_match": 0.0}],
        "mme": [{"mme_perception_score": {"question_id": 1, "score": 1.0}}, {"mme_perception_score": {"score": 0}}],
        "mmmu_val": [{"mmmu_acc": {"id": "1", "answer": "A", "parsed_pred": "A"}},
                     {"mmmu_acc": {"id": "2", "answer": "A", "parsed_pred": ["B"]}}],
    }  # fmt: skip
    for task, metrics in tasks.items():
        lines = [json.dumps({"doc_id": i, "input": f"<image>\n{ASK}", **ours, **m}) for i, m in enumerate(metrics)]
        (folder / f"20261130_120000_samples_{task}.jsonl").write_text("\n".join(lines) + "\n")
    results = read_results(tmp_path)
    assert results.models == ["org/sees-7b"]
    assert results.scores[:, 0].tolist() == [1, 0] * 3
    assert set(results.queries["prompt"]) == {ASK}
    assert results.queries[IMAGES].nunique() == 6
    (folder / "20261130_120000_samples_odd.jsonl").write_text(
        json.dumps({"doc_id": 0, "input": "x", "gpt": {"n": "?"}})
    )
    with pytest.raises(ResultsError, match="no metric that scores single answers, only gpt"):
        read_results(tmp_path)
