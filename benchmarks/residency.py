"""Six local experts with room for two, beside loading for every request: `python benchmarks/residency.py`.

The experts are six copies of SmolLM2-135M-Instruct. Several requests run at a time, with a skewed distribution over the
experts. The same requests are answered in three ways.

1. The expert is loaded for each request and evicted after it.
2. The experts share a memory budget, as under `expertoken serve --expert-memory`.
3. The requests are a file, which `expertoken generate` reorders by expert.

Prints requests a second, loads, and the ratios.
"""

import argparse
import asyncio
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expertoken.examples.smollm2 import smollm2
from expertoken.inference.backends.local import LocalBackend
from expertoken.inference.backends.models import LocalModels
from expertoken.inference.batch import answer_all
from expertoken.inference.composite_model import CompositeModel
from expertoken.inference.decider import Decision
from expertoken.modeling.backend import Generation
from expertoken.modeling.chat import Message
from expertoken.modeling.composite import Composite, Manifest, describe_base
from expertoken.modeling.dispatch import Dispatch
from expertoken.modeling.experts import Expert
from expertoken.modeling.from_gguf import converted
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.policy import Policy
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.source import Source

EXPERTS, ROOM = 6, 2


def question(number: int) -> Message:
    """Return the message of a request."""
    return {"role": "user", "content": f"Tell me about the number {number}."}


async def stream_all(models: LocalModels, sources: list[Source], wanted: np.ndarray, tokens: int, streams: int) -> None:
    """Answer all requests in their order, `streams` at a time."""
    backends = [LocalBackend(models, source) for source in sources]
    slots = asyncio.Semaphore(streams)

    async def one(expert: int, number: int) -> None:
        async with slots:
            backend = backends[expert]
            async for _ in backend.stream([question(number)], Generation(max_new_tokens=tokens)):
                pass

    await asyncio.gather(*(one(int(expert), number) for number, expert in enumerate(wanted)))


def load_each(sources: list[Source], wanted: np.ndarray, tokens: int) -> int:
    """Load a model for every request, drop it after the answer, and return the number of loads."""
    loads = 0
    for number, expert in enumerate(wanted):
        models = LocalModels()
        LocalBackend(models, sources[expert]).complete([[question(number)]], Generation(max_new_tokens=tokens))
        loads += models.loads
    return loads


class Decided(CompositeModel):
    """Composite with fixed decisions, because only the work after them is measured."""

    wanted: np.ndarray

    def decide(
        self,
        conversations: Sequence[Sequence[Message]],
        policy: Policy | None = None,
        generation: Generation | None = None,
    ) -> list[Decision]:
        """Return the fixed decisions."""
        names = [self.pool.names[expert] for expert in self.wanted]
        return [Decision(Dispatch(name, {name: 1.0}, "given", (name,)), 1, 0.0) for name in names]


def composite_of(sources: list[Source], budget: int) -> Decided:
    """Build a composite of the experts, on a meta LLM that is not used."""
    experts = [Expert(f"expert-{place}", model=source.model) for place, source in enumerate(sources)]
    meta = MetaLLM.from_pretrained(str(smollm2()), len(experts))
    manifest = Manifest(describe_base(meta), [expert.name for expert in experts])
    return Decided(Composite(meta, ExpertPool(experts), manifest), budget=budget)


def main() -> None:
    """Parse the command line, answer the same requests in the three ways, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60, help="Number of requests. Default: %(default)s.")
    parser.add_argument("--tokens", type=int, default=16, help="Tokens of an answer. Default: %(default)s.")
    parser.add_argument("--streams", type=int, default=8, help="Requests at a time. Default: %(default)s.")
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
            composite = composite_of(sources, int((ROOM + 0.5) * size))
            started = time.perf_counter()
            if way.startswith("loaded"):
                loads = load_each(sources, wanted, options.tokens)
            elif way.endswith("come"):
                asyncio.run(stream_all(models, sources, wanted, options.tokens, options.streams))
                loads = models.loads
            else:
                composite.wanted = wanted
                chats = [[question(number)] for number in range(len(wanted))]
                answer_all(composite, chats, Generation(max_new_tokens=options.tokens))
                loads = composite.local_models.loads
            seconds = time.perf_counter() - started
            base = base or seconds
            rate = options.requests / seconds
            print(f"| {way} | {seconds:.1f} | {rate:.2f} | {loads} | {base / seconds:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
