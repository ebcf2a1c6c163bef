"""The server under load, beside its experts and beside LiteLLM's proxy: `python benchmarks/serving.py`.

Mock experts answer with a random latency. With equal latencies a closed loop of clients synchronises and sends two
hundred requests at once, every few seconds (`--spread 0` shows that). The clients stream first from an expert directly,
then through `expertoken serve`, then (with `--litellm`) through LiteLLM's proxy. The server, the experts and the
clients are separate processes on this machine.

Prints requests, errors, the time to the first word and to the end (p50, p99), and the time added to the expert's own.
It also prints the server's memory after its warm-up. Each question contains a new word, so that caches of words fill.

The meta LLM is a tiny random one, so that only the server is measured.
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

WARM = 60  # seconds until the first measurement of memory


def free_port() -> int:
    """Return a TCP port that is currently free."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextmanager
def server(command: list[str], ready: str) -> Any:
    """Run a server in its own process and yield the process as soon as the address `ready` answers."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
    process = psutil.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            if process.poll() is not None:
                said.seek(0)
                sys.exit(
                    f"{command[0]} exited before it was ready. Its output ends with:\n{said.read().decode()[-2000:]}"
                )
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
    """Save a composite of a tiny random meta LLM and these experts, and return its folder."""
    base = tiny_folder(folder / "base")
    meta = MetaLLM.from_pretrained(Source(str(base)), len(experts), device="cpu")
    meta.rows = torch.randn(len(experts), meta.head.in_features, generator=torch.Generator().manual_seed(0))
    names = [expert.name for expert in experts]
    save_composite(
        Composite(meta, ExpertPool(experts), Manifest(describe_base(meta), names)), folder / "c", verify=False
    )
    return folder / "c"


async def one(session: aiohttp.ClientSession, url: str, model: str, number: int) -> tuple[float, float, int]:
    """Run a turn and return the seconds to the first word, the seconds to the end, and the number of chunks."""
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
        raise RuntimeError("The stream ended without a word or without [DONE].")
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
    """Run a closed loop of `streams` clients and return its measurements.

    Args:
        url: Address of the server.
        models: Models to request, in turn.
        streams: Number of clients.
        duration: Seconds for which new requests are sent.
        process: Process of the server, to measure its memory. Defaults to no measurement.
        key: API key of the server.
        reload: Seconds between two SIGHUPs to the server. 0 sends none.
        stop: If true, the server receives SIGTERM at the end, while it streams the last answers.
    """
    ends = time.perf_counter() + duration
    found, errors, memory, asked = [], [], [], itertools.count()

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        await asyncio.sleep(number / streams * 2)  # spreads the first requests over two seconds
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
        sys.exit(f"Every request to {url} failed. The first error: {errors[:1]}.")
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
    """Print a row of the table, and the first three distinct errors to stderr."""
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
    """Write the configuration of LiteLLM's proxy on the same experts. The proxy does not start without a key."""
    models = [
        {"model_name": e.name, "litellm_params": {"model": "openai/mock", "api_base": e.base_url, "api_key": "none"}}
        for e in experts
    ]
    file = folder / "litellm.yaml"
    file.write_text(yaml.safe_dump({"model_list": models, "general_settings": {"master_key": key}}))
    return file


def main() -> None:
    """Parse the command line, put each server under load and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, help="Number of clients. Default: %(default)s.")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="Minutes of load on the server. Default: %(default)s."
    )
    parser.add_argument(
        "--beside", type=float, default=1.0, help="Minutes of load on the expert and on LiteLLM. Default: %(default)s."
    )
    parser.add_argument("--words", type=int, default=20, help="Words of an answer. Default: %(default)s.")
    parser.add_argument(
        "--first", type=float, default=0.5, help="Mean seconds to a mock expert's first word. Default: %(default)s."
    )
    parser.add_argument(
        "--between", type=float, default=0.25, help="Mean seconds between its words. Default: %(default)s."
    )
    parser.add_argument(
        "--spread",
        type=float,
        default=0.5,
        help="Largest share by which an answer is slower or faster. Default: %(default)s.",
    )
    parser.add_argument("--reload", type=float, default=0, help="Seconds between SIGHUPs to the server. 0 sends none.")
    parser.add_argument(
        "--stop", action="store_true", help="Send SIGTERM to the server while it streams the last answers."
    )
    parser.add_argument("--litellm", help="Path of the command of LiteLLM's proxy. Default: LiteLLM is skipped.")
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
        growth = f"memory of the server in MiB, from {since:.0f} s to the end, at each quarter: {quarters}"
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
        print(f"answers by their number of chunks: {pieces}")


if __name__ == "__main__":
    main()
