"""Sessions: the last expert of a conversation, and its effect on the next decision."""

import json
import time
import urllib.request
from dataclasses import replace

import pytest
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from expertoken.inference.loop import BackgroundLoop
from expertoken.inference.server import Settings, create_app
from expertoken.inference.sessions import Affinity, LastAnswer, ProcessStore, RedisStore, keys_of
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.policy import Chooser, Policy
from expertoken.modeling.pool import ExpertPool
from expertoken.tests.inference.conftest import PIXEL, composite_of, redis_server, served
from expertoken.tests.inference.mock_expert import chunk
from expertoken.tests.inference.test_server import post

HELLO = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def calling(name):
    """Create an expert that calls a tool until it has three results, then answers its name. It numbers its calls."""
    numbers = iter(range(10**6))

    async def answer(request):
        asked = (await request.json())["messages"]
        results = [message for message in asked if message["role"] == "tool"]
        if len(results) < 3:
            call = {"index": 0, "id": f"{name}-{next(numbers)}", "type": "function",
                    "function": {"name": "look", "arguments": "{}"}}  # fmt: skip
            parts = [chunk({"tool_calls": [call]}), chunk({}, "tool_calls", USAGE)]
        else:
            parts = [chunk({"content": f"{name} is done"}), chunk({}, "stop", USAGE)]
        return StreamingResponse(iter(parts), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])


USAGE = {"prompt_tokens": 1000, "completion_tokens": 10}


@pytest.fixture(scope="module")
def callers():
    with served(calling("one")) as first, served(calling("two")) as second:
        yield [Expert(name, "openai", "m", base_url=f"{url}/v1") for name, url in (("one", first), ("two", second))]


def turn(address, messages, **more):
    """Return an answer as the client sends it back, and its expert."""
    body = {"model": "composite", "messages": messages, "tools": [TOOL], "expertoken": {"show": True}} | more
    headers = more.pop("headers", None)
    status, found, _ = post(address, body, headers)
    assert status == 200, found
    return found["choices"][0]["message"], found["expertoken"][0]["expert"]


def loop(addresses, first, **more):
    """Run a tool loop over the addresses in turn, with only `first` allowed at its start. Return experts, messages."""
    messages, experts = [HELLO], []
    for number in range(8):
        policy = {"policy": {"allow": [first]}} if not number else {}
        extra = {"expertoken": {"show": True} | policy}
        said, expert = turn(addresses[number % len(addresses)], messages, **extra, **more)
        experts.append(expert)
        messages.append(said)
        if not said.get("tool_calls"):
            return experts, messages
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in said["tool_calls"]]
    raise AssertionError("it never ended")


def test_who_called_tools_reads_their_results_though_another_would_be_chosen(base_folder, callers):
    with served(create_app(composite_of(base_folder, callers))) as address:
        assert loop([address], "two")[0] == ["two"] * 4
        assert turn(address, [HELLO])[1] == "one"  # the decision without a session


@pytest.mark.parametrize("remember", [True, False])
def test_a_decision_is_kept_for_a_caller_that_asks_the_expert_itself(base_folder, callers, remember):
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    with served(create_app(composite_of(base_folder, callers))) as address:

        def route(messages, **options):
            asked = {"model": "composite", "messages": messages, "expertoken": {"remember": remember} | options}
            data = json.dumps(asked).encode()
            sent = urllib.request.Request(f"{address}/v1/route", data, {"content-type": "application/json"})
            with urllib.request.urlopen(sent) as response:
                return json.load(response)["expert"]

        assert route([HELLO], policy={"allow": ["two"]}) == "two"
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
        assert route([HELLO, said, result]) == ("two" if remember else "one")


def test_two_servers_with_one_store_agree_inside_a_loop(tmp_path, base_folder, callers):
    with redis_server(tmp_path) as url:
        settings = Settings(session_store=url)
        with (
            served(create_app(composite_of(base_folder, callers), settings)) as here,
            served(create_app(composite_of(base_folder, callers), settings)) as there,
        ):
            assert loop([here, there], "two")[0] == ["two"] * 4


def test_without_a_store_in_common_they_do_not(base_folder, callers):
    with (
        served(create_app(composite_of(base_folder, callers))) as here,
        served(create_app(composite_of(base_folder, callers))) as there,
    ):
        assert loop([here, there], "two")[0][1] == "one"


def test_after_the_loop_it_is_decided_anew(base_folder, callers):
    with served(create_app(composite_of(base_folder, callers))) as address:
        _, messages = loop([address], "two")
        assert turn(address, [*messages, HELLO])[1] == "one"


def test_a_session_that_the_client_names_is_known_whatever_became_of_its_messages(base_folder, callers):
    """Agents shorten their messages, so the request and the call may differ from the earlier ones."""
    for given in ({"metadata": {"user_id": "u1"}}, {"prompt_cache_key": "k1"}):
        with served(create_app(composite_of(base_folder, callers))) as address:
            said, _ = turn(address, [HELLO], expertoken={"show": True, "policy": {"allow": ["two"]}}, **given)
            short = [{"role": "user", "content": "hello there"}, said]
            result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "ok"}
            assert turn(address, [*short, result], **given)[1] == "two"
            assert turn(address, [*short, result])[1] == "one"


def test_what_goes_on_beside_a_loop_under_the_same_id_does_not_end_it(base_folder, callers):
    """Agents request titles and run subagents under the same id."""
    given = {"metadata": {"user_id": "u1"}}
    with served(create_app(composite_of(base_folder, callers))) as address:
        said, _ = turn(address, [HELLO], expertoken={"show": True, "policy": {"allow": ["two"]}}, **given)
        title = {"role": "user", "content": "hello there"}
        assert turn(address, [title], **given)[1] == "one"
        result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "ok"}
        assert turn(address, [HELLO, said, result], **given)[1] == "two"


def test_a_picture_behind_a_tools_result_ends_no_loop(base_folder, callers):
    with served(create_app(composite_of(base_folder, callers))) as address:
        said, _ = turn(address, [HELLO], expertoken={"show": True, "policy": {"allow": ["two"]}})
        result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "ok"}
        shown = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}
        assert turn(address, [HELLO, said, result, shown])[1] == "two"


def test_where_the_expert_of_a_loop_fails_another_one_goes_on(base_folder, callers):
    gone = replace(callers[1], base_url="http://127.0.0.1:9/v1")
    with served(create_app(composite_of(base_folder, [callers[0], gone]))) as address:
        call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        chat = [HELLO, {"role": "assistant", "content": None, "tool_calls": [call], "name": "two"},
                {"role": "tool", "tool_call_id": "c", "content": "ok"}]  # fmt: skip
        assert turn(address, chat)[1] == "one"


def test_other_clients_find_no_session_by_its_id():
    messages = [HELLO, {"role": "assistant", "content": "hi"}]
    assert keys_of(messages, session="s", scope="a") != keys_of(messages, session="s", scope="b")
    assert keys_of(messages, scope="a") != keys_of(messages, scope="b")


def test_of_more_sessions_than_are_remembered_the_one_used_longest_ago_is_forgotten():
    async def known():
        store = ProcessStore(most=2)
        for key in ("first", "second", "first", "third"):
            await store.put(key, LastAnswer("two"))
        return [await store.get(key) is not None for key in ("first", "second", "third")]

    assert BackgroundLoop.call(known()) == [True, False, True]


def test_a_store_that_cannot_be_reached_costs_the_memory_and_no_request(base_folder, callers):
    settings = Settings(session_store="redis://127.0.0.1:9/0")
    with served(create_app(composite_of(base_folder, callers), settings)) as address:
        said, _ = turn(address, [HELLO])
        result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "ok"}
        assert turn(address, [HELLO, said, result])[1] == "one"


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ExpertokenError, match="expected redis://"):
        RedisStore("localhost:6379")


def priced(name, **cost):
    return Expert(name, "openai", "m", base_url="http://127.0.0.1:9/v1", cost={"input": 1, "output": 0} | cost)


def test_a_switch_costs_what_the_last_expert_has_cached():
    import torch

    chooser = Chooser(ExpertPool([priced("one"), priced("two", cached_input=0.1)]), chances=True)
    logits = torch.logit(torch.tensor([0.61, 0.60]))
    policy = Policy(cost_weight=1.0)  # 100,000 tokens cost 0.1 USD
    asked = {"prompt_tokens": 100_000, "last": "two"}
    assert chooser.choose(policy, logits, **asked).expert == "one"
    assert chooser.choose(policy, logits, **asked, cached=90_000).expert == "two"
    assert chooser.choose(policy, logits, **asked | {"last": "one"}, cached=90_000).expert == "one"


def test_what_was_cached_is_paid_for_as_that():
    assert priced("one", cached_input=0.1).price(1000, 0, cached=900) == pytest.approx(190e-6)
    assert priced("one").price(1000, 0, cached=900) == pytest.approx(1000e-6)
    assert priced("one", cached_input=0.1).price(1000, 0, cached=10**9) == pytest.approx(100e-6)


def test_what_is_cached_is_forgotten_after_some_minutes():
    pool = ExpertPool([priced("one")])
    messages = [HELLO, {"role": "assistant", "content": "hi"}, HELLO]
    now = time.time()
    assert Affinity.of(messages, pool, LastAnswer("one", 500, now)) == Affinity("one", 500)
    assert Affinity.of(messages, pool, LastAnswer("one", 500, now - 1000)) == Affinity("one", 0)
    assert Affinity.of(messages, pool, LastAnswer("gone", 500, now)) == Affinity(None, 0)
