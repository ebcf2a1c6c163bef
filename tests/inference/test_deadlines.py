"""Deadlines: no abandoned request keeps an in-flight place or a thread, or delays another decision."""

import asyncio
import json
import queue
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import pytest

from expertoken.inference import decider as deciding
from expertoken.inference.backends import models as local
from expertoken.inference.backends.models import LocalModels
from expertoken.inference.server import Settings, connections, create_app, guard
from expertoken.modeling.backend import Timeouts
from expertoken.modeling.errors import ExpertFailedError, ExpertokenError, NoAnswerError
from expertoken.modeling.experts import Expert
from expertoken.modeling.policy import Policy
from expertoken.modeling.source import Source
from expertoken.tests.inference.conftest import composite_of, mock_expert, served
from expertoken.tests.inference.test_server import HELLO, ONE, post

PATIENT = 30  # seconds until a test fails


@pytest.fixture
def composite(base_folder, words):
    return composite_of(base_folder, [*words, Expert("self", "self")], timeouts=Timeouts(decision=10 * PATIENT))


def opened(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENT)


def sent(connection, body, **more):
    data = json.dumps(body | more).encode()
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        + f"content-length: {len(data)}\r\n\r\n".encode()
        + data
    )


def until(condition):
    deadline = time.monotonic() + PATIENT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_flight(app):
    return app.state.service.metrics.in_flight._value.get()


@contextmanager
def held(composite, longer_than=0):
    """Hold forward passes over longer conversations until the end of this block, and yield a queue of their lengths."""
    going, passing, begun = threading.Event(), composite._decider._pass, queue.SimpleQueue()

    def wait(questions, started):
        longest = max(len(question.query) for question in questions)
        if longest > longer_than:
            begun.put(longest)
            going.wait(10 * PATIENT)
        return passing(questions, started)

    composite._decider._pass = wait
    try:
        yield begun
    finally:
        going.set()
        composite._decider._pass = passing


def test_a_short_conversation_is_decided_while_a_long_one_is(composite, monkeypatch):
    monkeypatch.setattr(deciding, "_LONG", 100)

    async def both(begun):
        long = asyncio.ensure_future(composite.adecide([{"role": "user", "content": "word " * 150}]))
        await asyncio.to_thread(begun.get, timeout=PATIENT)
        short = await composite.adecide(HELLO)
        assert not long.done()
        return long, short

    async def run():
        with held(composite, longer_than=100) as begun:
            long, short = await both(begun)
        return (await long), short

    long, short = asyncio.run(run())
    assert long.dispatch.expert in composite.pool.names
    assert short.dispatch.expert == "one"


@pytest.mark.parametrize("default", ["two", None, "self"])
def test_a_decision_that_does_not_come_is_the_defaults_case(base_folder, words, default):
    composite = composite_of(base_folder, [*words, Expert("self", "self")], timeouts=Timeouts(decision=0.2))
    policy = Policy(threshold=0.01, default=default) if default else Policy()
    with held(composite):
        if default == "two":
            reply = composite.chat(HELLO, policy=policy)
            assert reply.text.startswith("two0")
            assert "did not decide within 0.2 s: two answers" in reply.dispatch.reason
        else:  # self answers by the meta LLM, which is held
            with pytest.raises(NoAnswerError, match=r"did not decide within 0\.2 s"):
                composite.chat(HELLO, policy=policy)


def test_where_a_gateways_meta_llm_thinks_too_long_the_default_answers(words):
    from expertoken.inference.gateway import GatewayModel
    from expertoken.modeling.pool import ExpertPool

    with mock_expert("meta", "--fault", "hang") as (meta, _):
        gateway = GatewayModel(meta, ExpertPool([*words]), timeouts=Timeouts(decision=0.3, retries=0))
        reply = gateway.chat(HELLO, policy=Policy(threshold=0.01, default="two"))
    assert reply.text.startswith("two0")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_is_decided_frees_its_place(composite, stream):
    app = create_app(composite, Settings(name="comp", max_concurrent=1))
    with served(app) as url, held(composite) as begun:
        with opened(url) as leaving:
            sent(leaving, {"model": "comp", "messages": HELLO, "stream": stream})
            begun.get(timeout=PATIENT)
        until(lambda: in_flight(app) == 0)


def test_a_body_that_comes_byte_by_byte_frees_its_place(composite, monkeypatch):
    monkeypatch.setattr(guard, "_WHOLE", 0.6)
    app = create_app(composite, Settings(name="comp", max_concurrent=1))
    with served(app) as url, opened(url) as slow:
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n"
        )
        slow.settimeout(0.1)
        told = b""
        for _ in range(100):
            slow.sendall(b" ")
            try:
                told = slow.recv(4096)
                break
            except TimeoutError:
                continue
        assert told.startswith(b"HTTP/1.1 408")
        until(lambda: in_flight(app) == 0)
        assert post(url, {"model": "comp", "messages": HELLO})[0] == 200


@pytest.mark.parametrize("part", [b"", b"GET /health HTTP/1.1\r\n"], ids=["nothing", "byte by byte"])
def test_headers_that_do_not_come_close_the_connection(composite, monkeypatch, part):
    monkeypatch.setattr(connections, "HEADERS", 0.5)
    with served(create_app(composite)) as url, opened(url) as slow:
        slow.sendall(part)
        slow.settimeout(0.1)
        closed = False
        for _ in range(100):
            try:
                slow.sendall(b"x" if part else b"")
                closed = slow.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                closed = True
            if closed:
                break
        assert closed


def test_a_request_that_is_answered_longer_than_headers_may_take_is_not_cut_off(composite, monkeypatch):
    monkeypatch.setattr(connections, "HEADERS", 0.2)
    app = create_app(composite, Settings(name="comp"))
    with served(app) as url, opened(url) as waiting:
        with held(composite):
            sent(waiting, {"model": "comp", "messages": HELLO})
            time.sleep(0.6)
            assert in_flight(app) == 1
        assert waiting.recv(4096).startswith(b"HTTP/1.1 200")


def test_what_nobody_waits_for_any_more_is_not_decided(composite, monkeypatch):
    """Otherwise a queue of cancelled decisions would delay the next one past its deadline too."""
    monkeypatch.setattr(deciding, "_LONG", 100)
    long = [{"role": "user", "content": "word " * 150}]

    async def run():
        with held(composite) as begun:
            first = asyncio.ensure_future(composite.adecide(long))
            await asyncio.to_thread(begun.get, timeout=PATIENT)
            given_up = [asyncio.ensure_future(composite.adecide(long)) for _ in range(5)]
            await asyncio.sleep(0.5)  # until they are encoded and queued
            for one in given_up:
                one.cancel()
            await asyncio.gather(*given_up, return_exceptions=True)
            passing, passes = composite._decider._pass, []
            composite._decider._pass = lambda *asked: passes.append(1) or passing(*asked)
        return await first, await composite.adecide(long), passes

    first, last, passes = asyncio.run(run())
    assert first.dispatch.expert == last.dispatch.expert
    assert len(passes) <= 1


@pytest.mark.parametrize("sends", [False, True])
def test_a_client_that_does_not_read_frees_its_place(base_folder, monkeypatch, sends):
    monkeypatch.setattr(connections, "UNREAD", 0.5)
    with mock_expert("one", "--words", "200000") as (one, _):
        composite = composite_of(base_folder, [one, Expert("self", "self")])
        app = create_app(composite, Settings(name="comp", max_new_tokens=200_000))
        with served(app) as url, opened(url) as lazy:
            sent(lazy, {"model": "comp/one", "messages": HELLO, "stream": True})
            until(lambda: in_flight(app) == 1)
            if sends:
                time.sleep(0.3)  # by now the server is sending, and the client does not read
                lazy.sendall(b"G")
            until(lambda: in_flight(app) == 0)
            assert post(url, {"model": "comp/one", "messages": HELLO, "max_tokens": 5})[1]["choices"][0]["message"][
                "content"
            ].startswith("one0")


def test_a_load_that_fails_fails_all_who_wait_for_it_and_is_not_repeated(monkeypatch):
    models, loads = LocalModels("cpu"), []

    def fail(source, **_):
        loads.append(source)
        until(lambda: waiting.qsize() == 8)
        time.sleep(0.1)
        raise ExpertokenError("damaged")

    monkeypatch.setattr(local, "load_causal_lm", fail)
    waiting, told = queue.SimpleQueue(), queue.SimpleQueue()

    def acquire():
        waiting.put(1)
        try:
            models.acquire(Source("/nowhere"))
        except ExpertFailedError as error:
            told.put(str(error))

    threads = [threading.Thread(target=acquire) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENT)
    assert [told.get(timeout=1) for _ in range(8)] == ["damaged"] * 8
    assert len(loads) == 1
    with pytest.raises(ExpertFailedError):  # a later caller tries again
        models.acquire(Source("/nowhere"))
    assert len(loads) == 2


@pytest.mark.slow
def test_ctrl_c_while_a_model_is_loaded_ends_within_five_seconds():
    """Loading runs in a thread, which cannot be stopped. `sleep` stands for it."""
    code = """
    import time
    from expertoken.cli import app, main
    from expertoken.inference.loop import in_thread
    @app.app.command()
    def verb():
        in_thread(time.sleep, 60)
        raise KeyboardInterrupt
    main()
    """
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "verb"], capture_output=True, text=True, timeout=PATIENT
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert time.monotonic() - started < 10  # includes Python's start


def test_an_answer_still_comes_whole(composite):
    with served(create_app(composite, Settings(name="comp"))) as url:
        body = post(url, {"model": "comp", "messages": HELLO})[1]
        assert body["choices"][0]["message"]["content"] == ONE
