"""Results about pictures: read, checked, told apart by what they show, kept with the supervision."""

import io
import json
import zlib
from struct import pack

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from expertoken.cli import app
from expertoken.data_prep.extension import extend_supervision
from expertoken.data_prep.leaks import IMAGES, questions_of
from expertoken.data_prep.pictures import digest_of, with_pictures
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
    """One question about 40 pictures, and a table of who answered it."""
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
    drawn(0).save(folder / "pictures" / "again.bmp")  # another file, another format, and nothing else to see
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
    assert "40 queries are about pictures; 40 pictures are kept" in done.output
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
    with pytest.raises(ResultsError, match="'q' stands for different pictures"):
        BenchmarkResults.merge([part("x.png", "one"), part("y.png", "two")])


def bomb(side):
    """A PNG of a few bytes with very many pixels."""

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
        ("../secret.png", None, "lies outside of"),
        ("/etc/hostname", None, "lies outside of"),
        ("link.png", "link", "lies outside of"),
        ("text.png", b"no picture", "no picture of PNG"),
        ("vectors.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture of PNG"),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "no picture of PNG"),
        ("bomb.png", bomb(12_000), r"12000 x 12000 pixels; up to 64,000,000"),
        ("huge.png", bomb(60_000), r"60000 x 60000 pixels|no picture of PNG"),
        ("cut.png", whole()[:300], "no picture of PNG"),
        ("empty.png", b"", "no picture of PNG"),
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
        ResultsError, match="row 1, column 'image': expected a path, or a list of paths; a picture within"
    ):
        read_results(tmp_path / "r.jsonl")


def test_pictures_that_no_column_names_are_told(tmp_path):
    (tmp_path / "r.csv").write_text("query,a,b\nWho?,1,0\n")
    with pytest.raises(ResultsError, match="the results name no pictures"):
        with_pictures(read_results(tmp_path / "r.csv"), tmp_path)
