"""Pictures in requests: which parts are pictures, which are refused, and that no address is fetched or opened."""

import asyncio
import base64
import io
import json
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

Image = pytest.importorskip("PIL.Image")

from expertoken.inference.batch import _digests, _keys, generate_file
from expertoken.inference.server import Settings, create_app
from expertoken.inference.terminal import TerminalChat
from expertoken.modeling.backend import Generation
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.tests.inference.conftest import composite_of, served
from expertoken.tests.seeing import picture


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def content(*urls, text="What is it?"):
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


def bomb(width=20_000, height=8_000):
    """Build a PNG of few bytes with very many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def composite(base_folder, words):
    return composite_of(base_folder, [*words, Expert("self", "self")])


@pytest.fixture(scope="module")
def url(composite):
    with served(create_app(composite, Settings(name="comp", image_hosts=("pictures.example",)))) as address:
        yield address


def ask(url, parts, path="/v1/chat/completions"):
    body = {"model": "comp", "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
    return httpx.post(f"{url}{path}", json=body, timeout=60)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
ATTACKS = {
    "two readings": ("http://evil.example\\@pictures.example/a.png", "expected the picture itself"),
    "no address": ("http://[", "expected the picture itself"),
    "path": ("/etc/passwd", "expected the picture itself"),
    "file": ("file:///etc/passwd", "expected the picture itself"),
    "http": ("http://127.0.0.1:9/a.png", "expected the picture itself"),
    "https": ("https://example.org/a.png", "expected the picture itself"),
    "userinfo": ("https://pictures.example@evil.example/a.png", "expected the picture itself"),
    "ftp": ("ftp://pictures.example/a.png", "expected the picture itself"),
    "empty": ("", "expected the picture itself"),
    "no base64": ("data:image/png;base64,%%%", "expected base64"),
    "svg": (data_url(SVG, "image/svg+xml"), "expected a picture in one of the formats PNG"),
    "text": (data_url(b"just text"), "expected a picture in one of the formats PNG"),
    "cut header": (data_url(picture(0)[:20]), "expected a picture in one of the formats PNG"),
    "bomb": (data_url(bomb()), "got 20000 x 8000"),
    "long side": (data_url(bomb(20_000, 8)), "got 20000 x 8"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_no_picture_is_one_clear_error_and_nothing_is_fetched(url, name, monkeypatch):
    given, told = ATTACKS[name]
    for path in ("/v1/chat/completions", "/v1/route"):
        response = ask(url, content(given), path)
        assert response.status_code == 400, response.text
        assert "messages[0]: picture 1" in response.json()["error"]["message"]
        assert told in response.json()["error"]["message"]


def test_a_thousand_pictures_are_refused_and_health_answers_meanwhile(url):
    small = data_url(picture(0, (4, 4)))
    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(ask, url, content(*[small] * 1000)) for _ in range(4)]
        slowest = 0.0
        while not all(one.done() for one in asked):
            begun = time.perf_counter()
            assert httpx.get(f"{url}/health").status_code == 200
            slowest = max(slowest, time.perf_counter() - begun)
    assert slowest < 1
    for one in asked:
        assert one.result().status_code == 400
        assert "up to 32 pictures" in one.result().json()["error"]["message"]


def test_a_picture_and_an_address_that_the_operator_listed_go_to_the_expert(url):
    for given in (data_url(picture(1)), "https://pictures.example/a.png"):
        response = ask(url, content(given))
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"]


def test_the_other_apis_take_pictures_alike(url):
    given = picture(1)
    encoded = base64.b64encode(given).decode()
    source = {"type": "base64", "media_type": "image/png", "data": encoded}
    asked = [{"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "hello"}]}]
    answer = httpx.post(f"{url}/v1/messages", json={"model": "comp", "max_tokens": 8, "messages": asked})
    assert answer.status_code == 200, answer.text
    parts = [{"type": "input_image", "image_url": data_url(given)}, {"type": "input_text", "text": "hello"}]
    body = {"model": "comp", "input": [{"role": "user", "content": parts}], "max_output_tokens": 8}
    answer = httpx.post(f"{url}/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    parts[0]["image_url"] = "http://127.0.0.1:9/a.png"
    assert httpx.post(f"{url}/v1/responses", json=body).status_code == 400
    source = {"type": "url", "url": "http://127.0.0.1:9/a.png"}
    asked[0]["content"][0]["source"] = source
    assert (
        httpx.post(f"{url}/v1/messages", json={"model": "comp", "max_tokens": 8, "messages": asked}).status_code == 400
    )


def test_who_can_not_see_is_no_candidate_for_a_picture(base_folder, words):
    seeing, blind = words
    composite = composite_of(
        base_folder, [Expert(**vars(blind) | {"supports": ("tools",)}), seeing, Expert("self", "self")]
    )
    asked = content(data_url(picture(1)), text="hello")
    decision = asyncio.run(composite.adecide([{"role": "user", "content": asked}]))
    assert decision.dispatch.expert == seeing.name
    assert blind.name not in decision.dispatch.probabilities


def test_a_file_of_questions_names_pictures_below_its_folder_alone(composite, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(1))
    (tmp_path / "secret.png").write_bytes(picture(2))
    source, out, root = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "pictures"
    source.write_text(json.dumps({"prompt": "hello", "image": "a.png"}) + "\n" + json.dumps({"prompt": "hello"}) + "\n")
    counts = generate_file(
        composite, source, out, generation=Generation(max_new_tokens=8), images=tmp_path / "pictures"
    )
    assert sum(counts.values()) == 2
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["image"] == "a.png"
    assert all(row["answer"] for row in rows)
    for name, told in (
        ("../secret.png", "which leads out of it"),
        ("b.png", "no picture 'b.png' below"),
        (3, "expected a path"),
    ):
        source.write_text(json.dumps({"prompt": "hello", "image": name}) + "\n")
        with pytest.raises(ExpertokenError, match=told):
            generate_file(composite, source, tmp_path / "o.jsonl", images=root)


def test_a_file_that_names_pictures_of_no_folder_is_refused(composite, tmp_path):
    """Its answers would be about the texts alone."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n{"prompt": "What is it?", "image": "a.png"}\n')
    with pytest.raises(ExpertokenError, match="conversation 2, image: expected --images"):
        generate_file(composite, tmp_path / "in.jsonl", tmp_path / "out.jsonl")


def test_the_terminal_shows_a_picture_with_the_next_question(composite, tmp_path):
    from rich.console import Console

    (tmp_path / "a.png").write_bytes(picture(1))
    told = io.StringIO()
    chat = TerminalChat(composite, Console(file=told), max_new_tokens=8)
    chat._show(str(tmp_path / "no.png"))
    chat._show(str(tmp_path / "a.png"))
    chat._answer("hello")
    assert "error:" in told.getvalue()
    assert "1 with the next message" in told.getvalue()
    assert [part["type"] for part in chat.messages[0]["content"]] == ["image_url", "text"]
    assert chat.pictures == []


def test_nothing_is_connected_to_for_a_picture(composite, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("something was fetched"))
    for given, _ in ATTACKS.values():
        composite.decide([[{"role": "user", "content": content(given)}]])


def test_many_large_pictures_are_refused_together(url):
    given = data_url(bomb(6000, 6000))
    response = ask(url, content(given, given))
    assert response.status_code == 400
    assert "64,000,000 pixels in a conversation's pictures" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "http://169.254.169.254/"}},
        {"type": "input_image", "image_url": "http://127.0.0.1:9/a.png"},
        {"type": "image", "url": "http://127.0.0.1:9/a.png"},
        {"type": "text", "text": "hi", "image_url": {"url": "http://127.0.0.1:9/a.png"}},
        {"type": "image_url", "image_url": {"url": data_url(picture(1))}, "image": "http://127.0.0.1:9/a.png"},
    ],
)
def test_other_parts_that_name_addresses_are_refused(url, part):
    response = ask(url, [part, {"type": "text", "text": "hello"}])
    assert response.status_code == 400, response.text
    assert "messages[0]" in response.json()["error"]["message"]


def test_another_picture_of_the_same_name_is_answered_anew(composite, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(picture(1))
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "hello", "image": "a.png"}) + "\n")
    generate_file(composite, source, out, generation=Generation(max_new_tokens=8), images=tmp_path)
    first = _keys(source, "".join(_digests(source, tmp_path)), pictures=True)
    (tmp_path / "a.png").write_bytes(picture(2))
    assert _keys(source, "".join(_digests(source, tmp_path)), pictures=True) != first
    (tmp_path / "a.png").write_bytes(picture(2)[:-300])
    with pytest.raises(
        ExpertokenError, match="conversation 1, image 'a.png': expected a picture in one of the formats"
    ):
        generate_file(composite, source, tmp_path / "other.jsonl", images=tmp_path)
