"""Agents' sessions, replayed on two gateways that share a store: `python benchmarks/agent_traces.py --traces 1000`.

Each trace is a synthetic session of a coding agent. It has a long system prompt, tools, requests with reminders in the
user's messages, and loops of tool calls with their results. The requests of one trace go to the two gateways in turn.

The benchmark counts switches of the expert inside a loop, decisions on which the gateways differ, and decisions that
reminders change. It adds up the cost at the pool's prices. Each trace is replayed with affinity (a loop keeps its
expert, and a switch costs the cached tokens) and without.

The meta LLM is SmolLM2 read at layer 8, with rows fitted on the traces' own topics. The experts are not called: the
tokens that they would read and write are computed.

Requires `redis-server` or the package fakeredis.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from expertoken import Expert, ExpertPool
from expertoken.examples.smollm2 import smollm2
from expertoken.inference.composite_model import CompositeModel
from expertoken.inference.sessions import Affinity, LastAnswer, RedisStore, SessionStore, keys_of
from expertoken.modeling.composite import Composite, Manifest, describe_base
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.policy import Policy
from expertoken.modeling.state import StateSpec
from expertoken.modeling.view import View
from expertoken.tests.inference.conftest import redis_server

TOPICS = {
    "python": (
        "Why does the test of the {0} parser fail in Python?",
        "Add a type hint to the function that reads {0}.",
    ),
    "sql": ("Write a query that counts the rows of table {0}.", "Why is the join with table {0} slow?"),
    "docs": ("Rewrite the paragraph about {0} in the manual.", "Translate the section on {0} into plain words."),
}
WORDS = ("dates", "users", "orders", "tokens", "billing", "images", "logs", "routes", "caches", "events")
SYSTEM = "You are a coding agent. " + "Read files before you change them. Run the tests. " * 40
REMINDERS = (
    "<system-reminder>\nThe TODO list is empty. {0}\n</system-reminder>\n{1}",
    "{1}\n<system-reminder>{0} was changed by the user or a linter.</system-reminder>",
    "<environment_context>\n  <cwd>/home/user/{0}</cwd>\n  <shell>bash</shell>\n</environment_context>\n\n{1}",
    "<task>\n{1}\n</task>\n<environment_details>\n# Open tabs\n{0}\n</environment_details>",
)
COST = {"input": 3.0, "output": 15.0, "cached_input": 0.3}  # USD per million tokens
TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}


@dataclass
class Count:
    """Counts over all traces.

    Attributes:
        requests: Requests for which a decision was made.
        inside: Requests inside a loop of tool calls.
        switches: Switches of the expert inside a loop.
        differing: Decisions on which the gateways differ.
        usd: Cost in USD at the pool's prices.
    """

    requests: int = 0
    inside: int = 0
    switches: int = 0
    differing: int = 0
    usd: float = 0.0
    _cached: dict[tuple[int, str], int] = field(default_factory=dict)

    def pay(self, trace: int, expert: Expert, read: int, written: int) -> None:
        """Add a request's cost. The tokens of the trace that this expert has read before are cached with it."""
        cached = self._cached.get((trace, expert.name), 0)
        self.usd += expert.price(read, written, cached) or 0.0
        self._cached[(trace, expert.name)] = read + written


def request(rng: random.Random) -> tuple[str, str]:
    """Draw a user's request and the form in which an agent sends it."""
    plain = rng.choice(TOPICS[rng.choice(list(TOPICS))]).format(rng.choice(WORDS))
    return plain, rng.choice(REMINDERS).format(rng.choice(WORDS), plain)


def trace(rng: random.Random) -> Iterator[dict[str, Any] | int]:
    """Yield a session: each message of the user, then the number of tool calls in the answer to it."""
    for _ in range(rng.randint(1, 3)):
        yield {"role": "user", "content": request(rng)[1]}
        yield rng.randint(0, 4)


def composite(meta: MetaLLM, experts: list[Expert]) -> CompositeModel:
    """Build a composite with one expert per topic, on rows fitted to separate the topics. Logits are chances."""
    questions = [
        (text.format(word), place) for place, texts in enumerate(TOPICS.values()) for text in texts for word in WORDS
    ]
    hidden, _ = meta.states([meta.encode(text) for text, _ in questions])
    hidden = hidden[:, hidden.shape[1] // 2 :]  # the mean, which follows the last token's state
    hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    right = torch.tensor([[0.8 if place == k else 0.55 for k in range(len(TOPICS))] for _, place in questions]).double()
    gram = hidden.T @ hidden + 1.0 * torch.eye(hidden.shape[1], dtype=torch.double)
    meta.rows = torch.linalg.solve(gram, hidden.T @ right.logit()).T[:, :-1].float()
    names = [expert.name for expert in experts]
    manifest = Manifest(describe_base(meta), names, {"objective": "correctness"})
    return CompositeModel(Composite(meta, ExpertPool(experts), manifest), policy=Policy(cost_weight=10.0))


async def replay(gateways: list[CompositeModel], stores: list[SessionStore], traces: int, *, affinity: bool) -> Count:
    """Replay the traces. The gateways answer the requests in turn, and both decide each one for comparison."""
    count = Count()
    for number in range(traces):
        rng, turn = random.Random(number), 0
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
        for step in trace(rng):
            if isinstance(step, dict):
                messages.append(step)
                continue
            last = None
            for call in range(step + 1):
                bound = [Affinity() for _ in gateways]
                if affinity and any(m["role"] == "assistant" for m in messages):
                    end = max(place for place, m in enumerate(messages) if m["role"] == "assistant")
                    [key] = keys_of(messages[: end + 1], tools=[TOOL])
                    known = [await store.get(key) for store in stores]
                    bound = [Affinity.of(messages, g.pool, k) for g, k in zip(gateways, known, strict=True)]
                decisions = [
                    await gateway.adecide(messages, None, None, one)
                    for gateway, one in zip(gateways, bound, strict=True)
                ]
                decided = decisions[turn % len(decisions)]
                chosen = decided.dispatch.expert
                count.requests += 1
                count.differing += len({one.dispatch.expert for one in decisions}) > 1
                if last is not None:
                    count.inside += 1
                    count.switches += chosen != last
                last = chosen
                read = gateways[0].about(messages)
                count.pay(number, gateways[0].pool[chosen], read, 60)
                calls = [
                    {"id": f"{number}-{turn}", "type": "function", "function": {"name": "read", "arguments": "{}"}}
                ]
                done = call == step
                said = {"role": "assistant", "content": "It is done." if done else None} | (
                    {} if done else {"tool_calls": calls}
                )
                messages.append(said)
                if affinity:
                    store = stores[turn % len(stores)]
                    await store.put(keys_of(messages, tools=[TOOL])[0], LastAnswer(chosen, read + 60, time.time()))
                if not done:
                    text = "line of a file\n" * rng.randint(5, 300)
                    messages.append({"role": "tool", "tool_call_id": calls[0]["id"], "content": text})
                turn += 1
    return count


def reminded(gateway: CompositeModel, count: int) -> int:
    """Count the requests whose decision stays the same when an agent writes reminders around them."""
    rng = random.Random(0)
    pairs = [request(rng) for _ in range(count)]
    plain, sent = (gateway.route([pair[side] for pair in pairs]) for side in (0, 1))
    return sum(one.expert == other.expert for one, other in zip(plain, sent, strict=True))


def main() -> None:
    """Parse the command line, replay the traces and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=1000, help="Number of traces. Default: %(default)s.")
    parser.add_argument(
        "--decisions",
        type=int,
        default=500,
        help="Number of requests decided with and without reminders. Default: %(default)s.",
    )
    options = parser.parse_args()
    experts = [Expert(name, "openai", "m", base_url="http://127.0.0.1:9/v1", cost=COST) for name in TOPICS]
    meta = MetaLLM.from_pretrained(str(smollm2()), len(experts), state=StateSpec.parse("8:mean"))
    meta.view = View(context_tokens=64)
    gateway = composite(meta, experts)
    twin = CompositeModel(gateway.composite, policy=gateway.policy, before=gateway)
    print("| | requests | inside a loop | switches inside | gateways differ | USD |\n|---|---|---|---|---|---|")
    found = {}
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as url:
        for name, affinity in (("with affinity", True), ("without", False)):
            stores: list[SessionStore] = [RedisStore(url), RedisStore(url)]
            found[name] = one = asyncio.run(replay([gateway, twin], stores, options.traces, affinity=affinity))
            print(
                f"| {name} | {one.requests} | {one.inside} | {one.switches} | {one.differing} | {one.usd:.2f} |",
                flush=True,
            )
    ratio = found["with affinity"].usd / found["without"].usd
    print(f"\ncost with affinity: {ratio:.3f} of the cost without")
    same = reminded(gateway, options.decisions)
    print(f"decisions unchanged by reminders: {same} of {options.decisions}")


if __name__ == "__main__":
    main()
