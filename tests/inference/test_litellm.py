"""LiteLLM's proxy in front of `serve`, and as an expert. The tests run if the command `litellm` is installed."""

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import openai
import pytest
import yaml

from expertoken.inference.server import Settings, create_app
from expertoken.modeling.experts import Expert
from expertoken.tests.inference.conftest import composite_of, served

LITELLM = os.environ.get("EXPERTOKEN_LITELLM") or shutil.which("litellm")
KEY = "sk-" + "a" * 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LITELLM is None, reason="no `litellm` here (pip install 'litellm[proxy]' in a venv of its own)"),
]


@contextmanager
def proxy(folder, models):
    """Run the proxy for these models (LiteLLM's parameters by name) and yield its address."""
    entries = [{"model_name": name, "litellm_params": parameters} for name, parameters in models.items()]
    document = {"model_list": entries, "general_settings": {"master_key": KEY}}
    (folder / "litellm.yaml").write_text(yaml.safe_dump(document))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [LITELLM, "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
            while not alive(address):
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.5)
            yield address
        finally:
            process.kill()
            process.wait()


def alive(address):
    try:
        with urllib.request.urlopen(f"{address}/health/liveliness", timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def spoken(address, model, **extra):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
    asked = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    whole = client.chat.completions.create(**asked, **extra).choices[0].message.content
    stream = client.chat.completions.create(**asked, **extra, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert whole == streamed
    return whole


def test_the_proxy_stands_in_front_of_a_composite(tmp_path, base_folder, words):
    composite = composite_of(base_folder, [*words, Expert("self", "self")])
    with served(create_app(composite, Settings(name="comp", api_keys=(KEY,)))) as address:
        behind = {"model": "openai/comp", "api_base": f"{address}/v1", "api_key": KEY}
        with proxy(tmp_path, {"assistant": behind}) as front:
            assert spoken(front, "assistant").startswith("one")
            extra = {"extra_body": {"expertoken": {"policy": {"deny": ["one"]}}}}
            assert spoken(front, "assistant", **extra).startswith("two")


def test_the_proxy_is_an_expert(tmp_path, base_folder, words, monkeypatch):
    monkeypatch.setenv("PROXY_KEY", KEY)
    behind = {"model": "openai/mock", "api_base": words[0].base_url, "api_key": "none"}
    with proxy(tmp_path, {"mock": behind}) as address:
        expert = Expert("far", "openai", "mock", base_url=f"{address}/v1", api_key_env="PROXY_KEY")
        with served(create_app(composite_of(base_folder, [expert, words[1]]), Settings(name="comp"))) as front:
            assert spoken(front, "comp").startswith("one0 one1")
