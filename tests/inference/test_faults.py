"""Experts that are killed, hang, send garbage and break off: no turn may be lost, and every fallback is counted."""

import asyncio
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress

import openai
import pytest
from prometheus_client import generate_latest

from expertoken.inference.breaker import Breaker
from expertoken.inference.server import Settings, connections, create_app, guard
from expertoken.modeling.backend import Timeouts
from expertoken.modeling.experts import Expert
from expertoken.modeling.policy import Policy
from expertoken.tests.inference.conftest import composite_of, mock_expert, served
from expertoken.tests.inference.mock_expert import FAULTS

TURNS = 1000
AT_A_TIME = 20
QUICK = Timeouts(connect=1.0, first=5.0, idle=1.0, retries=0)


def counted(shown, name):
    """Parse the values of a counter by its labels."""
    found = re.findall(rf"^expertoken_{name}_total(?:{{(.*?)}})? (\S+)$", shown, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


@contextmanager
def kept_alive(name):
    """Restart a mock expert on its port whenever it dies. Yield the expert and the list of its processes."""
    with ExitStack() as stack:
        expert, first = stack.enter_context(mock_expert(name))
        port = int(re.search(r":(\d+)/", expert.base_url)[1])
        processes, over = [first], threading.Event()

        def watch():
            while not over.wait(0.05):
                if processes[-1].poll() is not None:
                    processes.append(stack.enter_context(mock_expert(name, port=port))[1])

        watcher = threading.Thread(target=watch)
        watcher.start()
        yield expert, processes
        over.set()
        watcher.join()


@pytest.mark.slow
def test_through_a_thousand_turns_with_faults_none_is_lost_and_every_fallback_is_counted(base_folder, monkeypatch):
    random.seed(0)
    monkeypatch.setattr(connections, "UNREAD", 1.0)
    monkeypatch.setattr(guard, "_WHOLE", 2.0)
    with (
        kept_alive("one") as (one, processes),
        kept_alive("two") as (two, _),
        mock_expert("three") as (three, _),
        mock_expert("endless", "--words", "1000000") as (endless, _),
    ):
        experts = [one, two, three, endless, Expert("self", "self")]
        order = Policy(threshold=1.0, default="one")  # it is always called first
        composite = composite_of(base_folder, experts, timeouts=QUICK, policy=order)
        for name in composite.pool.names:  # an open breaker would hide all but three faults
            composite._breakers[name] = Breaker(failures=TURNS)
        app = create_app(composite, Settings(max_concurrent=5 * AT_A_TIME, max_new_tokens=1_000_000))
        with served(app) as address:
            with wedges(address):
                outcomes = asyncio.run(talk(address))
            in_flight, deadline = app.state.service.metrics.in_flight._value, time.monotonic() + 60
            while in_flight.get():
                assert time.monotonic() < deadline, "a request stays in flight for ever"
                time.sleep(0.1)
        shown = generate_latest(app.state.service.metrics.registry).decode()
        died = len(processes) - 1
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert len(outcomes) == TURNS
    assert counted(shown, "turns_lost") == {"": 0}
    assert died > 3
    # Each chosen expert that did not answer is one fallback, and the reply reports it.
    told = Counter(f'chosen="{o["chosen"]}",expert="{o["expert"]}"' for o in outcomes if o["chosen"] != o["expert"])
    assert told == counted(shown, "fallbacks")
    assert sum(told.values()) > TURNS / 4
    failed = Counter(name for o in outcomes for name in o["failures"])
    by_name = Counter()
    for labels, value in counted(shown, "failures").items():
        by_name[re.search('expert="(.*?)"', labels)[1]] += value
    assert failed == by_name
    reasons = {reason for o in outcomes for reason in o["failures"].values()}
    for kind in ("answered 500", "answered 429", "answered 400", "sent nothing within", "sent nothing more for",
                 "was cut off", "could not be used", "returned an empty answer", "got something else", "answered 307",
                 "expected chunks of at most", "with 'error'", "with 'abort'"):  # fmt: skip
        assert any(kind in reason for reason in reasons), kind


@contextmanager
def wedges(address):
    """Run clients that do not read their answers, and clients that do not finish their requests."""
    endless = {"model": "composite/endless", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    body = json.dumps(endless).encode()

    def head(length):
        text = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        return f"{text}content-length: {length}\r\n\r\n".encode()

    host, port = address.removeprefix("http://").split(":")
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(4)]
        for number, connection in enumerate(opened):
            # So long that the drops never complete it, however late a busy server reads them.
            connection.sendall(head(len(body)) + body if number % 2 else head(100_000) + body[:10])
        over = threading.Event()

        def drip():
            while not over.wait(0.2):
                for connection in opened[::2]:
                    with suppress(OSError):
                        connection.sendall(b" ")

        dripping = threading.Thread(target=drip)
        dripping.start()
        yield
        over.set()
        dripping.join()
        for connection in opened[::2]:  # clients that send too slowly get a 408
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def question():
    """Make a question that causes faults of the first expert in half of all turns, and of the second in a third."""
    told = [f"{name} do: {random.choice(FAULTS)}" for name, share in (("one", 1 / 2), ("two", 1 / 3))
            if random.random() < share]  # fmt: skip
    return f"{random.random()} {' and '.join(told)}"


async def talk(address):
    """Run all turns by the official client, some at a time. Return what each reply reports, or its error."""
    client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
    slots = asyncio.Semaphore(AT_A_TIME)

    async def turn():
        async with slots:
            stream = await client.chat.completions.create(
                model="composite", messages=[{"role": "user", "content": question()}], stream=True, max_tokens=8,
                extra_body={"expertoken": {"show": True}},
            )  # fmt: skip
            text, last = "", None
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                last = chunk.model_extra.get("expertoken", last)
                finish = chunk.choices[0].finish_reason
            assert text, last
            assert finish in ("stop", "length")
            return last

    return await asyncio.gather(*(turn() for _ in range(TURNS)), return_exceptions=True)
