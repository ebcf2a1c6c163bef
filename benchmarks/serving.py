"""The server under load, beside its experts and beside LiteLLM's proxy: `python benchmarks/serving.py`.

Mock experts answer with a latency of their own, one answer faster than another: were they all alike, a closed loop
would fall into step and ask for two hundred answers at once, every few seconds (--spread 0 shows that). The loop of
clients streams from the experts directly, then through `expertoken serve` on them, then (with --litellm, the path of
its command) through LiteLLM's proxy. Server, experts and clients are processes of their own that share this machine.
Prints requests, errors, the time to the first word and to the end (p50, p99), what is added to the experts' own, and
the server's memory once it is warm. Each question holds a word that no other did, so that caches of words fill up.

The meta LLM is a tiny random one, so that the server is what is measured.
"""

import argparse
import asyncio
import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
import yaml

from expertoken.modeling.composite import Composite, Manifest, describe_base
from expertoken.modeling.experts import Expert
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.saving import save_composite
from expertoken.modeling.source import Source
from expertoken.tests.inference.conftest import mock_expert
from expertoken.tests.tiny import tiny_folder

WARM = 60  # seconds until memory is taken for the first time


def free_port() -> int:
    """That nobody listens on just now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextmanager
def server(command: list[str], ready: str) -> Any:
    """A server in a process of its own, from when it answers `ready`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
    process = psutil.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            if process.poll() is not None:
                said.seek(0)
                sys.exit(f"{command[0]} ended by itself:\n{said.read().decode()[-2000:]}")
            try:
                with urllib.request.urlopen(ready, timeout=1):  # noqa: S310 - http://127.0.0.1
                    break
            except OSError:
                time.sleep(0.2)
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except psutil.TimeoutExpired:
            process.kill()
        said.close()


def tiny_composite(folder: Path, experts: list[Expert]) -> Path:
    """A composite of a tiny random meta LLM on these experts."""
    base = tiny_folder(folder / "base")
    meta = MetaLLM.from_pretrained(Source(str(base)), len(experts), device="cpu")
    meta.rows = torch.randn(len(experts), meta.head.in_features, generator=torch.Generator().manual_seed(0))
    names = [expert.name for expert in experts]
    save_composite(
        Composite(meta, ExpertPool(experts), Manifest(describe_base(meta), names)), folder / "c", verify=False
    )
    return folder / "c"


async def one(session: aiohttp.ClientSession, url: str, model: str, number: int) -> tuple[float, float, int]:
    """A turn: seconds to the first word and to the end, and how many pieces came."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": f"question {number}: say words"}]}
    started, first, pieces, done = time.perf_counter(), None, 0, False
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: ") and b'"content": "' in line.replace(b'"content":"', b'"content": "'):
                if b'"error"' in line:
                    raise RuntimeError(line.decode())
                if b'"content": ""' not in line and b'"content":""' not in line:
                    pieces += 1
                    first = first or time.perf_counter()
    if not done or first is None:
        raise RuntimeError("the stream was cut off")
    return first - started, time.perf_counter() - started, pieces


async def load(
    url: str,
    models: list[str],
    streams: int,
    duration: float,
    process: Any = None,
    key: str = "none",
    reload: float = 0,
    stop: bool = False,
) -> dict[str, Any]:
    """A closed loop of `streams` clients.

    Args:
        url: of the server.
        models: asked for in turn.
        streams: number of clients.
        duration: seconds for which new requests are sent.
        process: the server's, whose memory is watched.
        key: of the server.
        reload: seconds between two SIGHUPs to the server; 0 for none.
        stop: whether the server gets SIGTERM at the end, while the last answers are being given.
    """
    ends = time.perf_counter() + duration
    found, errors, memory, asked = [], [], [], itertools.count()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        await asyncio.sleep(number / streams * 2)  # not all at once
        while time.perf_counter() < ends:
            try:
                found.append(await one(session, url, models[number % len(models)], next(asked)))
            except Exception as error:
                errors.append(repr(error))

    async def watch() -> None:
        await asyncio.sleep(min(WARM, duration / 2))
        while time.perf_counter() < ends:
            memory.append(process.memory_info().rss)
            await asyncio.sleep(5)

    async def disturb() -> None:
        while reload and time.perf_counter() < ends - reload:
            await asyncio.sleep(reload)
            process.send_signal(signal.SIGHUP)
        await asyncio.sleep(ends - time.perf_counter() + 0.1)
        if stop:
            process.send_signal(signal.SIGTERM)

    timeout = aiohttp.ClientTimeout(total=120)
    headers = {"authorization": f"Bearer {key}"}
    pool = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=pool, timeout=timeout, headers=headers) as session:
        jobs = [client(session, number) for number in range(streams)]
        await asyncio.gather(*jobs, *([watch(), disturb()] if process else []))
    if not found:
        sys.exit(f"no request came through at {url}: {errors[:1]}")
    first, whole, pieces = (np.array(column) for column in zip(*found, strict=True))
    return {
        "requests": len(found),
        "errors": errors,
        "first": first,
        "whole": whole,
        "pieces": pieces,
        "memory": memory,
    }


def tell(name: str, outcome: dict[str, Any], duration: float, own: dict[str, Any] | None) -> None:
    """A row of the table."""
    cells = [name, f"{outcome['requests']:,}", f"{outcome['requests'] / duration:.1f}", str(len(outcome["errors"]))]
    for key in ("first", "whole"):
        p50, p99 = np.percentile(outcome[key], (50, 99))
        cells.append(f"{1000 * p50:.0f} / {1000 * p99:.0f}")
        if own is None:
            cells.append("")
        else:
            base = np.percentile(own[key], (50, 99))
            cells.append(f"{1000 * (p50 - base[0]):+.0f} / {1000 * (p99 - base[1]):+.0f}")
    print(f"| {' | '.join(cells)} |", flush=True)
    for error in sorted(set(outcome["errors"]))[:3]:
        print(f"  {error[:200]}", file=sys.stderr)


def litellm_config(folder: Path, experts: list[Expert], key: str) -> Path:
    """LiteLLM's proxy on the same experts. It does not start without a key."""
    models = [
        {"model_name": e.name, "litellm_params": {"model": "openai/mock", "api_base": e.base_url, "api_key": "none"}}
        for e in experts
    ]
    file = folder / "litellm.yaml"
    file.write_text(yaml.safe_dump({"model_list": models, "general_settings": {"master_key": key}}))
    return file


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, help="at a time (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="through the server (default: %(default)s)")
    parser.add_argument("--beside", type=float, default=1.0, help="minutes for the others (default: %(default)s)")
    parser.add_argument("--words", type=int, default=20, help="of an answer (default: %(default)s)")
    parser.add_argument(
        "--first", type=float, default=0.5, help="an expert's seconds to the first (default: %(default)s)"
    )
    parser.add_argument("--between", type=float, default=0.25, help="and between two (default: %(default)s)")
    parser.add_argument(
        "--spread", type=float, default=0.5, help="share by which an answer is slower or faster (default: %(default)s)"
    )
    parser.add_argument("--reload", type=float, default=0, help="seconds between SIGHUPs to the server; 0 for none")
    parser.add_argument("--stop", action="store_true", help="SIGTERM to the server while the last answers come")
    parser.add_argument("--litellm", help="the command of LiteLLM's proxy, where it is installed")
    options = parser.parse_args()
    latency = [f"--{key}={getattr(options, key)}" for key in ("words", "first", "between", "spread")]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        experts = [stack.enter_context(mock_expert(word, *latency))[0] for word in ("one", "two")]
        print("| | requests | a second | errors | first word, ms, p50 / p99 | added | whole answer, ms | added |")
        print("|---|---|---|---|---|---|---|---|")
        beside = 60 * options.beside
        urls = [expert.base_url.removesuffix("/v1") for expert in experts]
        own = asyncio.run(load(urls[0], ["mock"], options.streams, beside))
        tell("the expert itself", own, beside, None)
        composite = tiny_composite(folder, experts)
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        command = [str(Path(sys.executable).parent / "expertoken"), "serve", str(composite), "--port", str(port),
                   "--max-concurrent", str(2 * options.streams)]  # fmt: skip
        with server(command, f"{address}/ready") as process:
            duration = 60 * options.minutes
            disturbed = {"reload": options.reload, "stop": options.stop}
            outcome = asyncio.run(load(address, ["c"], options.streams, duration, process, **disturbed))
        tell("expertoken serve", outcome, duration, own)
        memory = np.array(outcome["memory"]) / 2**20
        quarters = ", ".join(f"{memory[round(q * (len(memory) - 1))]:.1f}" for q in (0, 0.25, 0.5, 0.75, 1))
        since = min(WARM, duration / 2)
        growth = f"memory of the server, MiB, from {since:.0f} s on to the end, in quarters: {quarters}"
        print(f"{growth} ({memory[-1] / memory[0] - 1:+.2%})", file=sys.stderr, flush=True)
        if options.litellm:
            port = free_port()
            address = f"http://127.0.0.1:{port}"
            key = f"sk-{secrets.token_hex(16)}"
            command = [options.litellm, "--config", str(litellm_config(folder, experts, key)), "--port", str(port)]
            with server(command, f"{address}/health/liveliness"):
                models = [expert.name for expert in experts]
                other = asyncio.run(load(address, models, options.streams, beside, key=key))
                tell("LiteLLM's proxy", other, beside, own)
        pieces = json.dumps(
            {str(k): int(v) for k, v in zip(*np.unique(outcome["pieces"], return_counts=True), strict=True)}
        )
        print(f"pieces of an answer: {pieces}")


if __name__ == "__main__":
    main()
