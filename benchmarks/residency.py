"""Six local experts with room for two, beside loading for every request: `python benchmarks/residency.py`.

Six copies of SmolLM2-135M-Instruct as experts; requests with a skewed choice of expert come some at a time. Three ways
over the same requests: loading the expert for each of them (room for one, nothing kept); the memory budget as
`expertoken serve --expert-memory` has it; and the same requests as a file, whose order `expertoken generate` arranges.
Prints requests a second, loads, and the ratios.
"""

import argparse
import asyncio
import shutil
import tempfile
import time
from itertools import zip_longest
from pathlib import Path

import numpy as np

from expertoken.examples.smollm2 import smollm2
from expertoken.inference.backends import LOADERS, Generation, LocalBackend, LocalModels
from expertoken.modeling.gguf import converted
from expertoken.modeling.meta import Source

EXPERTS, ROOM = 6, 2


async def stream_all(models: LocalModels, sources: list[Source], wanted: np.ndarray, tokens: int, streams: int) -> None:
    """All requests, `streams` at a time, as they come."""
    backends = [LocalBackend(models, source) for source in sources]
    slots = asyncio.Semaphore(streams)

    async def one(expert: int, number: int) -> None:
        async with slots:
            backend = backends[expert]
            messages = [{"role": "user", "content": f"Tell me about the number {number}."}]
            async for _ in backend.stream(messages, Generation(max_new_tokens=tokens)):
                pass

    await asyncio.gather(*(one(int(expert), number) for number, expert in enumerate(wanted)))


def load_each(sources: list[Source], wanted: np.ndarray, tokens: int) -> int:
    """A model for every request, and nothing after it."""
    loads = 0
    for number, expert in enumerate(wanted):
        models = LocalModels()
        messages = [{"role": "user", "content": f"Tell me about the number {number}."}]
        LocalBackend(models, sources[expert]).complete([messages], Generation(max_new_tokens=tokens))
        loads += models.loads
    return loads


def as_file(models: LocalModels, sources: list[Source], wanted: np.ndarray, tokens: int) -> None:
    """Expert by expert, in batches, the next one loaded meanwhile: what `expertoken generate` does."""
    experts = np.unique(wanted).tolist()
    for expert, following in zip_longest(experts, experts[1:]):
        chats = [
            [{"role": "user", "content": f"Tell me about the number {n}."}] for n in np.flatnonzero(wanted == expert)
        ]
        with models.lease(sources[expert]):
            if following is not None:
                LOADERS.submit(models.prefetch, sources[following])
            LocalBackend(models, sources[expert]).complete(chats, Generation(max_new_tokens=tokens))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=8, help="at a time (default: %(default)s)")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, EXPERTS + 1)
    wanted = rng.choice(EXPERTS, options.requests, p=shares / shares.sum())
    with tempfile.TemporaryDirectory() as name:
        sources = []
        for expert in range(EXPERTS):
            folder = Path(name) / str(expert)
            shutil.copytree(converted(Path(smollm2())), folder)
            sources.append(Source(str(folder)))
        probe = LocalModels()
        with probe.lease(sources[0]) as resident:
            size = resident.size
        del probe, resident
        print(f"{EXPERTS} experts of {size / 2**30:.2f} GiB, room for {ROOM}, {options.requests} requests\n")
        print("| | seconds | requests/s | loads | against loading each time |\n|---|---|---|---|---|")
        base = None
        for way in ("loaded for every request", "memory budget, as they come", "memory budget, as a file"):
            models = LocalModels(budget=int((ROOM + 0.5) * size))
            started = time.perf_counter()
            if way.startswith("loaded"):
                loads = load_each(sources, wanted, options.tokens)
            elif way.endswith("come"):
                asyncio.run(stream_all(models, sources, wanted, options.tokens, options.streams))
                loads = models.loads
            else:
                as_file(models, sources, wanted, options.tokens)
                loads = models.loads
            seconds = time.perf_counter() - started
            base = base or seconds
            rate = options.requests / seconds
            print(f"| {way} | {seconds:.1f} | {rate:.2f} | {loads} | {base / seconds:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
