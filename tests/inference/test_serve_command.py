"""`expertoken serve` as an operator runs it: a process, signals, environment variables."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import yaml
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from expertoken.modeling.composite import POOL_FILE
from expertoken.modeling.experts import Expert
from expertoken.tests.inference.conftest import composite_of, mock_expert, served

HELLO = [{"role": "user", "content": "hello secret word"}]


COMMAND = (str(Path(sys.executable).parent / "expertoken"),)


@contextmanager
def serve(*arguments, program=COMMAND, **environment):
    """Run the command and yield its process, its address, and the lines it prints."""
    command = [*program, "serve", *arguments, "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )
    lines, address = [], threading.Event()

    def read():
        for line in process.stdout:
            lines.append(line)
            if "running on" in line:
                address.set()

    reading = threading.Thread(target=read)
    reading.start()
    try:
        assert address.wait(120), "".join(lines)
        yield process, re.search(r"http://[0-9.:]+", next(line for line in lines if "running on" in line))[0], lines
    finally:
        process.kill()
        process.wait()
        reading.join()


def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def status(address, path):
    try:
        with urllib.request.urlopen(address + path) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def folder(base_folder, words, tmp_path):
    composite_of(base_folder, [*words, Expert("self", "self")]).save_pretrained(tmp_path / "c", verify=False)
    return tmp_path / "c"


def test_when_it_is_stopped_answers_go_on_to_their_end_and_nobody_new_is_taken(base_folder, tmp_path):
    with mock_expert("slow", "--between", "0.3", "--words", "12") as (slow, _):
        composite_of(base_folder, [slow]).save_pretrained(tmp_path / "c", verify=False)
        with serve(str(tmp_path / "c")) as (process, address, lines):
            stream = client(address).chat.completions.create(model="c", messages=HELLO, stream=True)
            told = [next(iter(stream)).choices[0].delta.content]
            process.send_signal(signal.SIGTERM)
            time.sleep(1)
            with pytest.raises(openai.APIConnectionError):
                client(address).chat.completions.create(model="c", messages=HELLO)
            told += [chunk.choices[0].delta.content or "" for chunk in stream]
            assert "".join(told).split() == [f"slow{number}" for number in range(12)]
            assert process.wait(20) == -signal.SIGTERM
    logged = [json.loads(line[line.index("{") :]) for line in lines if '"answers"' in line]
    assert [entry["answers"][0]["expert"] for entry in logged] == ["slow"]
    assert "secret" not in "".join(lines)


def test_answers_that_have_no_time_left_say_so_and_are_logged_as_stopped(base_folder, tmp_path):
    with mock_expert("slow", "--between", "0.3", "--words", "100") as (slow, _):
        composite_of(base_folder, [slow]).save_pretrained(tmp_path / "c", verify=False)
        with serve(str(tmp_path / "c"), "--shutdown", "1") as (process, address, lines):
            stream = client(address).chat.completions.create(model="c", messages=HELLO, stream=True)
            next(iter(stream))
            with ThreadPoolExecutor() as pool:
                whole = pool.submit(client(address).chat.completions.create, model="c", messages=HELLO)
                time.sleep(0.5)
                process.send_signal(signal.SIGTERM)
                with pytest.raises(openai.APIError, match="the server was stopped before the answer was complete"):
                    list(stream)
                with pytest.raises(openai.InternalServerError, match="stopped before the answer was complete"):
                    whole.result(20)
            assert process.wait(20) == -signal.SIGTERM
    assert "Traceback" not in "".join(lines)
    assert [json.loads(line[line.index("{") :])["status"] for line in lines if '"answers"' in line] == [503, 503]


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [str(Path(sys.executable).parent / "expertoken"), "serve", str(folder), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: 127.0.0.1:{port} can't be served (")
    assert "--port" in done.stderr


def test_a_balancer_sees_in_time_that_it_is_about_to_stop(folder):
    with serve(str(folder), "--drain", "2") as (process, address, _):
        assert status(address, "/ready") == 200
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert status(address, "/ready") == 503
        answer = client(address).chat.completions.create(model="c/one", messages=HELLO)
        assert answer.choices[0].message.content.startswith("one0")
        assert process.wait(20) == -signal.SIGTERM


def test_whom_a_request_comes_from_is_not_what_its_sender_says(folder):
    with serve(str(folder), "--rate", "2") as (_, address, _):
        for number in range(3):
            asked = client(address).with_options(default_headers={"x-forwarded-for": f"10.0.0.{number}"})
            if number < 2:
                asked.chat.completions.create(model="c/one", messages=HELLO)
                continue
            with pytest.raises(openai.RateLimitError):
                asked.chat.completions.create(model="c/one", messages=HELLO)


def collector(spans):
    """Create a collector of OTLP over HTTP that appends to `spans`."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    async def traces(request):
        message = ExportTraceServiceRequest.FromString(await request.body())
        for resource in message.resource_spans:
            service = {item.key: item.value.string_value for item in resource.resource.attributes}["service.name"]
            spans.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
        return Response(b"", media_type="application/x-protobuf")

    return Starlette(routes=[Route("/v1/traces", traces, methods=["POST"])])


def test_a_collector_gets_the_request_its_decision_and_who_answered_and_nothing_of_what_was_said(folder):
    spans = []
    with (
        served(collector(spans)) as traces,
        serve(str(folder), "--otel", OTEL_EXPORTER_OTLP_ENDPOINT=traces) as (process, address, _),
    ):
        for stream in (False, True):
            answer = client(address).chat.completions.create(model="c/two", messages=HELLO, stream=stream)
            list(answer)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    assert {service for service, _ in spans} == {"expertoken"}
    requests = [span for _, span in spans if span.name == "POST /v1/chat/completions"]
    decisions = [span for _, span in spans if span.name == "decide"]
    assert sorted(span.span_id for span in requests) == sorted(span.parent_span_id for span in decisions)
    assert len(requests) == 2
    for span in requests:
        told = {item.key: item.value for item in span.attributes}
        assert told["expertoken.expert"].string_value == "two"
        assert told["expertoken.completion_tokens"].int_value == 5
    assert "secret" not in str(spans)


def test_a_gateways_file_is_served_by_the_name_of_the_file(words, tmp_path):
    experts = [{"name": e.name, "backend": "openai", "model": "mock", "base_url": e.base_url} for e in words]
    document = {"meta": {"model": "m", "base_url": "http://127.0.0.1:9/v1"}, "experts": experts}
    (tmp_path / "gate.yaml").write_text(yaml.safe_dump(document))
    with serve(str(tmp_path / "gate.yaml")) as (_, address, _):
        assert [model.id for model in client(address).models.list()] == ["gate", "gate/one", "gate/two"]
        # An addressed expert answers without the meta LLM, because it needs no decision.
        answer = client(address).chat.completions.create(model="gate/two", messages=HELLO)
        assert answer.choices[0].message.content.startswith("two0")
        with pytest.raises(openai.InternalServerError, match="the meta LLM is unavailable"):
            client(address).chat.completions.create(model="gate", messages=HELLO)


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_reload_takes_in_what_changed_and_loses_no_stream(base_folder, words, tmp_path):
    """The reload replaces an expert and does not interrupt its long answer."""
    with mock_expert("slow", "--between", "0.2", "--words", "20") as (slow, _):
        composite_of(base_folder, [slow, words[0]]).save_pretrained(tmp_path / "c", verify=False)
        with serve(str(tmp_path / "c")) as (process, address, lines):
            stream = client(address).chat.completions.create(model="c/slow", messages=HELLO, stream=True)
            told = [next(iter(stream)).choices[0].delta.content]
            composite_of(base_folder, [words[1], words[0]]).save_pretrained(tmp_path / "c", verify=False)
            process.send_signal(signal.SIGHUP)
            until(lambda: any("reloaded: two, one may answer" in line for line in lines))
            assert [model.id for model in client(address).models.list()] == ["c", "c/two", "c/one"]
            asked = [{"role": "user", "content": "hello"}]
            answer = client(address).chat.completions.create(model="c", messages=asked)
            assert answer.choices[0].message.content.startswith("two")
            told += [chunk.choices[0].delta.content or "" for chunk in stream]
            assert "".join(told).split() == [f"slow{number}" for number in range(20)]
            (tmp_path / "c" / POOL_FILE).write_text("experts: nonsense")
            process.send_signal(signal.SIGHUP)
            until(lambda: any("reload failed, keeping pool and keys: " in line for line in lines))
            assert client(address).chat.completions.create(model="c", messages=HELLO)


def test_a_reload_that_is_asked_for_while_the_server_loads_follows_its_start(folder):
    """The signal arrives when loading begins."""
    code = """
import os, signal
from expertoken.cli import main
from expertoken.inference import factory
load = factory.open_model
def open_model(*arguments, **options):
    os.kill(os.getpid(), signal.SIGHUP)
    return load(*arguments, **options)
factory.open_model = open_model
main()
"""
    # A library's own thread must not receive the signal in place of the main one.
    with serve(str(folder), program=(sys.executable, "-c", code), OMP_NUM_THREADS="2") as (_, address, lines):
        until(lambda: any("reloaded: " in line for line in lines))
        assert status(address, "/health") == 200


def test_a_gateway_reads_its_file_again(words, tmp_path):
    def write(*experts):
        entries = [expert.entry() for expert in experts]
        meta = {"model": "m", "base_url": "http://127.0.0.1:9/v1"}
        (tmp_path / "gate.yaml").write_text(yaml.safe_dump({"meta": meta, "experts": entries}))

    write(words[0])
    with serve(str(tmp_path / "gate.yaml")) as (process, address, lines):
        assert client(address).chat.completions.create(model="gate", messages=HELLO).choices[0].message.content
        write(words[1])
        process.send_signal(signal.SIGHUP)
        until(lambda: any("reloaded: two may answer" in line for line in lines))
        answer = client(address).chat.completions.create(model="gate", messages=HELLO)
        assert answer.choices[0].message.content.startswith("two")


def checked(*arguments, **environment):
    command = [str(Path(sys.executable).parent / "expertoken"), "serve", *arguments, "--check"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def test_a_check_tells_who_would_answer_and_what_is_wrong(base_folder, words, tmp_path):
    composite_of(base_folder, [*words, Expert("self", "self")]).save_pretrained(tmp_path / "fine", verify=False)
    fine = checked(str(tmp_path / "fine"))
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert words[0].base_url in fine.stdout
    bad = [
        Expert("down", "openai", "m", base_url="http://127.0.0.1:9/v1"),
        Expert("keyless", "openai", "m", base_url=words[0].base_url, api_key_env="NOT_SET_KEY"),
    ]
    composite_of(base_folder, [words[0]]).save_pretrained(tmp_path / "bad", verify=False)
    pool = [expert.entry() for expert in (*bad, words[0])]
    (tmp_path / "bad" / POOL_FILE).write_text(yaml.safe_dump({"experts": pool}))
    told = checked(str(tmp_path / "bad"))
    assert told.returncode == 1
    assert "NOT_SET_KEY is not set" in told.stdout
    assert "127.0.0.1:9" in told.stdout
