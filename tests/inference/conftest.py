import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from expertoken.inference.composite_model import CompositeModel
from expertoken.modeling.composite import Composite, Manifest, describe_base
from expertoken.modeling.experts import Expert
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.source import Source
from expertoken.tests.inference.mock_expert import FAULTS

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5Erk"
    "Jggg=="
)
"""A picture of one pixel."""

PROMPTS = ("hello", "hello there", *(f"hello one do: {fault}" for fault in FAULTS))


@contextmanager
def mock_expert(name, *options, port=0):
    """Run a mock expert as a process, and yield the `Expert` and the process."""
    command = [sys.executable, "-m", "expertoken.tests.inference.mock_expert", "--name", name, "--port", str(port)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline())
        yield (
            Expert(name, "openai", "mock", base_url=f"http://127.0.0.1:{port}/v1", cost={"input": 1, "output": 2}),
            process,
        )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def served(app):
    """Run an application under uvicorn in a thread, on the connections of `expertoken serve`. Yield its address."""
    import uvicorn

    from expertoken.inference.server.connections import Connection

    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="error", access_log=False, http=Connection))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@contextmanager
def redis_server(tmp_path):
    """Run a Redis server, or fakeredis' server for the same protocol if none is installed, and yield its address."""
    if (program := shutil.which("redis-server")) is not None:
        socket = tmp_path / "redis.sock"
        given = [program, "--port", "0", "--unixsocket", str(socket), "--save", ""]
        process = subprocess.Popen(given, stdout=subprocess.DEVNULL)
        while not socket.exists():
            time.sleep(0.01)
        try:
            yield f"unix://{socket}"
        finally:
            process.kill()
            process.wait()
        return
    from fakeredis import TcpFakeServer

    server = TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
    finally:
        server.shutdown()
        server.server_close()


def composite_of(base_folder, experts, **options):
    """Build a composite that ranks its experts in their order on `PROMPTS`, with self last."""
    pool = ExpertPool(experts)
    meta = MetaLLM.from_pretrained(Source(str(base_folder)), len(pool.names), device="cpu")
    hidden, _ = meta.states([meta.encode(prompt) for prompt in PROMPTS])
    one = torch.linalg.lstsq(hidden, torch.ones(len(hidden), 1)).solution[:, 0]
    lifts = [40 - 10 * index for index in range(len(pool))] + [0] * pool.has_self
    meta.rows = torch.stack([lift * one for lift in lifts])
    manifest = Manifest(describe_base(meta), [expert.name for expert in pool])
    return CompositeModel(Composite(meta, pool, manifest), **options)


@pytest.fixture(scope="module")
def words():
    """Run two mock experts without faults, `one` and `two`."""
    with mock_expert("one") as (first, _), mock_expert("two") as (second, _):
        yield [first, second]
