import asyncio
import http.client
import json
import logging
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import openai
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from expertoken.inference.server import Settings, create_app, guard, streaming
from expertoken.modeling.backend import Timeouts
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.policy import Policy
from expertoken.tests.inference.conftest import PIXEL, composite_of, mock_expert, served
from expertoken.tests.tiny import tiny_folder

HELLO = [{"role": "user", "content": "hello"}]
ONE = "one0 one1 one2 one3 one4"
KEY = "a-key-of-enough-letters"


@pytest.fixture
def composite(base_folder, words):
    return composite_of(base_folder, [*words, Expert("self", "self")])


@pytest.fixture
def url(composite):
    with served(create_app(composite, Settings(name="comp", max_new_tokens=16))) as address:
        yield address


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def post(url, body, headers=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data, {"content-type": "application/json"} | (headers or {})
    )
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), dict(error.headers)


def get(url, path):
    with urllib.request.urlopen(url + path) as response:
        return response.read().decode()


def test_the_official_client_gets_an_answer_and_nothing_of_the_machinery(client):
    answer = client.chat.completions.create(model="comp", messages=HELLO)
    assert answer.choices[0].message.content == ONE
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 5)
    assert answer.model == "comp"
    assert "expertoken" not in answer.model_extra


def test_the_official_client_streams(client):
    chunks = list(
        client.chat.completions.create(
            model="comp", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ONE
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 5
    assert len(chunks) > 5


def test_who_answered_and_why_is_told_on_request(client):
    answer = client.chat.completions.create(model="comp", messages=HELLO, extra_body={"expertoken": {"show": True}})
    [told] = answer.model_extra["expertoken"]
    assert told["expert"] == "one"
    assert sum(told["probabilities"].values()) == pytest.approx(1)
    assert told["cost"] == pytest.approx((7 * 1 + 5 * 2) / 1e6)
    *_, last = client.chat.completions.create(
        model="comp", messages=HELLO, stream=True, extra_body={"expertoken": {"show": True}}
    )
    assert last.model_extra["expertoken"]["expert"] == "one"


def test_a_request_may_have_a_policy_of_its_own(client):
    answer = client.chat.completions.create(
        model="comp", messages=HELLO, extra_body={"expertoken": {"policy": {"deny": ["one"]}}}
    )
    assert answer.choices[0].message.content.startswith("two0")
    with pytest.raises(openai.BadRequestError, match="policy.deny: no candidate 'on'"):
        client.chat.completions.create(
            model="comp", messages=HELLO, extra_body={"expertoken": {"policy": {"deny": ["on"]}}}
        )


def test_a_request_can_narrow_what_an_operator_allows_and_not_widen_it(composite):
    composite.policy = Policy(deny=("one",))
    with served(create_app(composite, Settings(name="comp", max_new_tokens=16))) as address:
        for policy in ({"deny": []}, {"allow": ["one", "two"]}):
            body = {"model": "comp", "messages": HELLO, "expertoken": {"policy": policy, "show": True}}
            assert post(address, body)[1]["expertoken"][0]["expert"] == "two"
        assert (
            post(address, {"model": "comp", "messages": HELLO, "expertoken": {"policy": {"allow": ["one"]}}})[0] == 400
        )
        status, told, _ = post(address, {"model": "comp/one", "messages": HELLO})
        assert (status, told["error"]["code"]) == (404, "model_not_found")
        assert "comp/one" not in get(address, "/v1/models")


def test_a_policy_that_fits_nobody_does_not_start(composite):
    composite.policy = Policy(deny=("one", "two", "self"))
    with pytest.raises(ExpertokenError, match="allow and deny exclude all candidates"):
        create_app(composite)


LARGE = 3_500_000  # bytes, approximately


@pytest.mark.parametrize(
    "attack",
    [
        {"messages": [1] * (LARGE // 3)},
        {"messages": [{}] * (LARGE // 4)},
        {"messages": [{"role": "user", "content": "x" * (LARGE // 2)}] + [{"role": "assistant", "content": "y"}] * 900},
        {"messages": HELLO, "logit_bias": {str(n): "x" for n in range(LARGE // 14)}},
        {"messages": HELLO, "stop": [1] * (LARGE // 3)},
        {"messages": HELLO, "tools": [1] * (LARGE // 3)},
    ],
    ids=["no messages", "empty messages", "many answers to one long question", "biases", "stops", "tools"],
)
def test_no_body_stops_the_server_for_the_others(url, attack):
    asking = threading.Thread(target=post, args=(url, {"model": "comp"} | attack), daemon=True)
    asking.start()
    slowest = 0.0
    while asking.is_alive() and slowest < 5:
        started = time.perf_counter()
        get(url, "/health")
        slowest = max(slowest, time.perf_counter() - started)
        time.sleep(0.01)
    asking.join(30)
    assert not asking.is_alive()
    assert slowest < 2  # one second on an idle machine, but other tests may run at the same time


def test_models_are_the_composite_and_its_experts_each_of_which_can_be_addressed(client):
    assert [model.id for model in client.models.list()] == ["comp", "comp/one", "comp/two", "comp/self"]
    assert client.models.retrieve("comp/two").id == "comp/two"
    answer = client.chat.completions.create(model="comp/two", messages=HELLO)
    assert answer.choices[0].message.content.startswith("two0")
    local = client.chat.completions.create(model="comp/self", messages=HELLO, max_tokens=3)
    assert local.usage.completion_tokens == 3
    assert local.choices[0].finish_reason == "length"


def test_an_expert_that_is_addressed_alone_has_no_stand_in(client):
    with pytest.raises(openai.InternalServerError, match=r"no expert could answer \(one failed\)"):
        client.chat.completions.create(model="comp/one", messages=[{"role": "user", "content": "one do: refuse"}])


@pytest.mark.parametrize("name", ["other", "comp/", "comp/../one", "../comp", "comp/one/", "comp/%6fne", "COMP", ""])
def test_a_model_that_is_not_ours_is_not_found(client, name):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model=name, messages=HELLO)
    assert error.value.code == "model_not_found"


def test_several_answers_and_stop_texts(client):
    answer = client.chat.completions.create(model="comp", messages=HELLO, n=3, stop=["one3"])
    assert [choice.message.content for choice in answer.choices] == ["one0 one1 one2 "] * 3
    texts = {}
    for chunk in client.chat.completions.create(model="comp/self", messages=HELLO, n=2, stream=True, max_tokens=4):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts[0] == texts[1] != ""


def test_a_failing_expert_is_not_seen_and_is_counted(client, url):
    for kind in ("refuse", "busy", "garbage", "html", "empty"):
        answer = client.chat.completions.create(
            model="comp", messages=[{"role": "user", "content": f"hello one do: {kind}"}]
        )
        assert answer.choices[0].message.content.startswith("two0"), kind
    shown = get(url, "/metrics")
    assert 'expertoken_fallbacks_total{chosen="one",expert="two"}' in shown
    assert "process_resident_memory_bytes" in shown
    assert 'expertoken_decisions_total{expert="one"}' in shown


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0]"),
        ({"messages": HELLO * 600}, "at most 512"),
        ({"model": "comp/self", "messages": [{"role": "user", "content": "word " * 2000}]}, "tokens, got"),
        ({"messages": "hello"}, "messages"),
        ({"temperature": 9}, "temperature"),
        ({"n": 100}, "n:"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"expertoken": {"polici": {}}}, "expertoken.polici"),
        ({"expertoken": {"policy": {"threshold": "high"}}}, "policy.threshold"),
    ],
)
def test_a_malformed_request_is_one_line_that_names_the_field(url, change, told):
    status, body, _ = post(url, {"model": "comp", "messages": HELLO} | change)
    assert status == 400
    assert told in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"


def test_what_is_no_json_is_refused(url):
    for data in (b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"null"):
        assert post(url, data)[0] == 400


def test_curl_streams(url):
    assert shutil.which("curl")
    body = json.dumps({"model": "comp", "messages": HELLO, "stream": True})
    done = subprocess.run(
        ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "content-type: application/json", "-d", body],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events[:-1]) == ONE


def test_langchain_uses_it_unchanged(url):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="comp")
    assert chat.invoke("hello").content == ONE
    assert "".join(piece.content for piece in chat.stream("hello")) == ONE


def test_experts_get_the_conversation_as_it_is_and_tools_with_it(base_folder):
    """The endpoint answers with a tool call in several chunks, like OpenAI's."""
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    seen = []
    parts = [
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
        {},
    ]

    async def answer(request):
        seen.append(await request.json())

        def chunk(delta, finish):
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            return f"data: {json.dumps(body)}\n\n"

        lines = [chunk(part, "tool_calls" if part == {} else None) for part in parts]
        return StreamingResponse(iter([*lines, "data: [DONE]\n\n"]), media_type="text/event-stream")

    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    chat = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "add", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c0", "content": "3"},
        {"role": "user", "content": "and now?"},
    ]  # fmt: skip
    with served(Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])) as endpoint:
        expert = Expert("caller", "openai", "m", base_url=f"{endpoint}/v1")
        with served(create_app(composite_of(base_folder, [expert]), Settings(name="comp"))) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
            answer = client.chat.completions.create(model="comp", messages=chat, tools=[tool], seed=4, top_p=0.5)
            [call] = answer.choices[0].message.tool_calls
            assert (call.id, call.function.name, call.function.arguments) == ("c1", "add", '{"a": 1}')
            assert answer.choices[0].finish_reason == "tool_calls"
            assert answer.choices[0].message.content is None
    assert seen[0]["messages"] == chat
    assert (seen[0]["tools"], seen[0]["seed"], seen[0]["top_p"]) == ([tool], 4, 0.5)


def replying(*lines, status=200, end="data: [DONE]\n\n"):
    """Create an endpoint that answers every request with these chunks. Return it with the list of its requests."""
    asked = []

    async def answer(request):
        asked.append(await request.json())
        text = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + end
        return PlainTextResponse(text, status, media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])]), asked


def delta(finish=None, **fields):
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "lines",
    [
        [delta(tool_calls="abc")],
        [delta(tool_calls=["abc"])],
        [delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": {}}}])],
        [{"choices": [{"delta": {"content": "a"}, "logprobs": "zzz"}]}],
        [delta(content=5)],
        [delta(finish=5)],
        [delta(content=""), delta(finish="")],
        [{"choices": [{"delta": {"content": "a"}, "logprobs": {"content": 5}}]}],
        [delta(tool_calls=[{"index": 0, "type": 5, "function": {"name": "f", "arguments": ""}}])],
        [delta(reasoning_content={"a": 1})],
        [{"choices": "abc"}],
        [{"choices": [None]}],
        ["abc"],
    ],
)
def test_an_expert_that_gives_something_else_than_an_answer_costs_a_fallback(base_folder, words, lines, stream):
    app, _ = replying(*lines)
    with served(app) as liar:
        expert = Expert("liar", "openai", "m", base_url=f"{liar}/v1")
        with served(create_app(composite_of(base_folder, [expert, words[0]]))) as address:
            body = {"model": "composite", "messages": HELLO, "stream": stream}
            request = urllib.request.Request(
                f"{address}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request) as response:
                told = response.read().decode()
            assert "one4" in told
            assert 'expertoken_fallbacks_total{chosen="liar",expert="one"} 1.0' in get(address, "/metrics")


@pytest.mark.parametrize("stream", [False, True])
def test_what_json_can_not_say_is_left_out_of_an_experts_answer_and_what_it_adds_does_no_harm(base_folder, stream):
    """Half a character, infinite log-probabilities and unknown keys cause no 500 and no invalid JSON."""
    call = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"a": "\ud83d"}', "strict": True}}
    logprob = {"token": "\ud83d", "logprob": -float("inf"), "top_logprobs": []}
    lines = [
        {"choices": [{"delta": {"content": "smile \ud83d"}, "logprobs": {"content": [logprob]}}]},
        delta(content="\ude00", tool_calls=[call]),
        delta(finish="stop \ud83d"),
    ]
    app, _ = replying(*lines)
    with served(app) as odd, served(create_app(composite_of(base_folder, [endpoint(odd)]))) as address:
        body = {"model": "composite", "messages": HELLO, "stream": stream}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            told = response.read().decode()

    def refuse(constant):
        raise ValueError(constant)

    parts = [line.removeprefix("data: ") for line in told.splitlines() if line.startswith("data: {")] or [told]
    choices = [json.loads(part, parse_constant=refuse)["choices"][0] for part in parts]
    messages = [choice.get("delta") or choice.get("message") or {} for choice in choices]
    assert "".join(message.get("content") or "" for message in messages) == "smile 😀"
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    assert [call["function"]["name"] for call in calls] == ["f"]
    assert [p["logprob"] for choice in choices if choice.get("logprobs") for p in choice["logprobs"]["content"]] == [
        -9999
    ]


@pytest.mark.parametrize("kind", ["content", "reasoning_content", "nothing"])
def test_an_expert_that_heeds_no_limit_of_tokens_is_cut_off(base_folder, kind):
    async def answer(request):
        async def endless():
            yield f"data: {json.dumps(delta(content='word '))}\n\n"
            while True:
                yield f"data: {json.dumps(delta(**({} if kind == 'nothing' else {kind: 'word '})))}\n\n"
                await asyncio.sleep(0)

        return StreamingResponse(endless(), media_type="text/event-stream")

    endless = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
    with served(endless) as app, served(create_app(composite_of(base_folder, [endpoint(app)]))) as address:
        status, body, _ = post(address, {"model": "composite", "messages": HELLO, "max_tokens": 4})
        assert (status, body["choices"][0]["finish_reason"]) == (200, "length")
        assert len(body["choices"][0]["message"]["content"]) < 200


def test_an_end_without_a_reason_is_no_end_unless_the_server_says_that_it_is_done(base_folder):
    chunks = delta(content="half "), delta(content="an answer", finish="")
    app, _ = replying(*chunks, end="")
    with served(app) as cut, served(create_app(composite_of(base_folder, [endpoint(cut)]))) as address:
        status, body, _ = post(address, {"model": "composite", "messages": HELLO})
        assert (status, body["error"]["code"]) == (502, "no_answer")
    app, _ = replying(*chunks)
    with served(app) as done, served(create_app(composite_of(base_folder, [endpoint(done)]))) as address:
        status, body, _ = post(address, {"model": "composite", "messages": HELLO})
        assert (status, body["choices"][0]["message"]["content"]) == (200, "half an answer")
        assert body["choices"][0]["finish_reason"] == "stop"


def test_odd_counts_of_tokens_lose_no_answer(base_folder):
    for count in (-1, 2**70, "many"):
        usage = {"prompt_tokens": count, "completion_tokens": 1}
        app, _ = replying(delta(content="hello"), delta(finish="stop"), {"choices": [], "usage": usage})
        with served(app) as odd, served(create_app(composite_of(base_folder, [endpoint(odd)]))) as address:
            status, body, _ = post(address, {"model": "composite", "messages": HELLO})
            assert status == 200
            assert body["choices"][0]["message"]["content"] == "hello"
            assert body["usage"]["prompt_tokens"] > 0


def test_tool_calls_without_an_index_are_two(base_folder):
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{"}} for name in "fg"]
    more = [{"id": "g", "function": {"arguments": "}"}}]
    app, _ = replying(delta(tool_calls=calls), delta(tool_calls=more), delta(finish="tool_calls"))
    with served(app) as tools, served(create_app(composite_of(base_folder, [endpoint(tools)]))) as address:
        _, body, _ = post(address, {"model": "composite", "messages": HELLO})
        found = [call["function"] for call in body["choices"][0]["message"]["tool_calls"]]
        assert found == [{"name": "f", "arguments": "{"}, {"name": "g", "arguments": "{}"}]


def test_log_probabilities_and_refusals_of_an_expert_reach_the_client(base_folder):
    probabilities = {"content": [{"token": "no", "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
    first = {"choices": [{"delta": {"refusal": "no"}, "logprobs": probabilities}]}
    app, asked = replying(first, delta(finish="stop"))
    with served(app) as careful, served(create_app(composite_of(base_folder, [endpoint(careful)]))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        answer = client.chat.completions.create(
            model="composite", messages=HELLO, logprobs=True, top_logprobs=2
        ).choices[0]
        assert answer.message.content == "no"
        assert answer.logprobs.content[0].logprob == -0.5
        assert (asked[0]["logprobs"], asked[0]["top_logprobs"]) == (True, 2)


def endpoint(address):
    return Expert("only", "openai", "m", base_url=f"{address}/v1")


@pytest.mark.parametrize(
    "more", [{"logit_bias": {"1": 1e999}}, {"tools": [{"a": float("nan")}]}, {"tools": [{"a": "\ud800"}]}]
)
def test_a_request_that_no_endpoint_can_be_sent_is_held_against_none(base_folder, words, more):
    composite = composite_of(base_folder, words)
    with served(create_app(composite)) as address:
        for _ in range(4):
            status, body, _ = post(address, {"model": "composite", "messages": HELLO} | more)
            assert (status, body["error"]["type"]) == (400, "invalid_request_error")
        assert composite.left_alone == []
        assert 'expertoken_left_alone{expert="one"} 0.0' in get(address, "/metrics")


def test_an_expert_that_is_addressed_answers_what_the_meta_llm_can_not_read(client):
    long = [{"role": "user", "content": "word " * 3000}]
    answer = client.chat.completions.create(model="comp/one", messages=long)
    assert answer.choices[0].message.content == ONE
    decided = client.chat.completions.create(
        model="comp", messages=long
    )  # the decision reads its beginning and its end
    assert decided.choices[0].message.content == ONE
    with pytest.raises(openai.BadRequestError, match="at most 511 tokens, got"):
        client.chat.completions.create(model="comp/self", messages=long)


def test_what_is_far_too_long_is_not_encoded_whole(composite, monkeypatch):
    """Otherwise long requests, with seconds of work each, could easily overload a server."""
    encode, lengths = type(composite.meta.tokenizer).apply_chat_template, []

    def counting(tokenizer, messages, **options):
        lengths.append(sum(len(message["content"]) for message in messages))
        return encode(tokenizer, messages, **options)

    monkeypatch.setattr(type(composite.meta.tokenizer), "apply_chat_template", counting)
    with served(create_app(composite, Settings(name="comp"))) as address:
        chat = [{"role": "user", "content": "a word " * 100_000}]
        assert post(address, {"model": "comp", "messages": chat})[0] == 200
        status, body, _ = post(address, {"model": "comp/self", "messages": chat})
        assert (status, "at most" in body["error"]["message"]) == (400, True)
    assert max(lengths) < 5000


def test_why_a_request_is_refused_is_told_and_counted_as_no_failure(base_folder):
    composite = composite_of(base_folder, [Expert("local", model=str(base_folder)), Expert("self", "self")])
    sound = [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]
    with served(create_app(composite, Settings(api_keys=(KEY,)))) as address:
        headers = {"authorization": f"Bearer {KEY}"}
        status, body, _ = post(address, {"model": "composite", "messages": sound}, headers)
        told = (
            "no expert could answer: expected text in each part of a message, because models in this process read "
            "text only"
        )
        assert (status, body["error"]["message"]) == (400, told)
    counted = [line for line in composite.observer.failures.collect()[0].samples if line.name.endswith("_total")]
    assert {sample.labels["when"] for sample in counted} == {"refused"}


def test_who_cannot_serve_a_request_is_not_asked(base_folder, words):
    able, plain = (replace(expert, supports=can) for expert, can in zip(words, (("tools",), ()), strict=True))
    composite = composite_of(base_folder, [plain, able, Expert("self", "self")])
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with served(create_app(composite)) as address:
        asked = {"model": "composite", "messages": HELLO, "expertoken": {"show": True}}
        assert post(address, asked)[1]["expertoken"][0]["expert"] == "two"
        [told] = post(address, asked | {"tools": [tool]})[1]["expertoken"]
        assert (told["expert"], told["failures"]) == ("one", {})
        status, body, _ = post(address, asked | {"tools": [tool], "model": "composite/self"})
        assert (status, body["error"]["message"]) == (400, "no expert can serve this request: self can't call tools")


def test_models_tell_what_they_are_known_to_do(base_folder, words):
    first = replace(words[0], supports=("tools",), context_length=8192)
    with served(create_app(composite_of(base_folder, [first, words[1]]))) as address:
        models = {model["id"]: model for model in json.loads(get(address, "/v1/models"))["data"]}
    assert models["composite/one"]["supports"] == models["composite"]["supports"] == ["tools"]
    assert (models["composite/one"]["context_length"], models["composite"]["context_length"]) == (8192, None)
    assert models["composite/two"]["supports"] is None


def test_a_request_that_everybody_refuses_is_no_lost_turn(client, url):
    for model in ("comp/one", "comp/self"):
        content = "one do: toolong" if model == "comp/one" else "word " * 600
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}])
    assert "expertoken_turns_lost_total 0.0" in get(url, "/metrics")


def test_the_operators_limit_of_tokens_holds_whoever_is_asked(composite):
    with served(create_app(composite, Settings(name="comp", max_prompt_tokens=50))) as address:
        for model in ("comp", "comp/one"):
            status, body, _ = post(address, {"model": model, "messages": [{"role": "user", "content": "word " * 90}]})
            assert status == 400
            assert "at most 50 tokens" in body["error"]["message"]


def test_an_answer_that_may_be_the_beginning_of_a_stop_text_is_an_answer(base_folder):
    app, _ = replying(delta(content="EN"), delta(finish="stop"))
    with served(app) as short, served(create_app(composite_of(base_folder, [endpoint(short)]))) as address:
        status, body, _ = post(address, {"model": "composite", "messages": HELLO, "stop": ["END"]})
        assert (status, body["choices"][0]["message"]["content"]) == (200, "EN")


def test_an_expert_that_gives_nothing_is_the_servers_fault_and_not_the_clients(client):
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="comp/one", messages=[{"role": "user", "content": "one do: empty"}])
    assert error.value.status_code == 502


def test_null_is_what_is_not_given(url):
    nulls = dict.fromkeys(("stream", "n", "stop", "temperature", "tools", "expertoken", "max_tokens"))
    body = {"model": "comp", "messages": HELLO, "stream_options": {"include_usage": None}} | nulls
    assert post(url, body)[0] == 200


def test_thinking_that_a_client_sends_back_is_passed_on_to_the_expert(url):
    chat = [*HELLO, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]}, *HELLO]
    assert post(url, {"model": "comp/one", "messages": chat})[0] == 200


def test_while_a_model_thinks_comments_keep_the_line_open(base_folder, monkeypatch):
    monkeypatch.setattr(streaming, "_SILENCE", 0.2)
    with (
        mock_expert("slow", "--first", "1") as (slow, _),
        served(create_app(composite_of(base_folder, [slow]))) as address,
    ):
        data = json.dumps({"model": "composite", "messages": HELLO, "stream": True}).encode()
        request = urllib.request.Request(f"{address}/v1/chat/completions", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as response:
            told = response.read().decode()
        assert told.count(": keep-alive") >= 2
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        stream = client.chat.completions.create(model="composite", messages=HELLO, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).startswith("slow0")


def test_comments_keep_the_line_open_in_mid_answer_too(base_folder, monkeypatch):
    """The second expert is slow to continue the first one's answer."""
    monkeypatch.setattr(streaming, "_SILENCE", 0.2)
    with (
        mock_expert("one", "--fault", "cut") as (one, _),
        mock_expert("two", "--first", "1") as (two, _),
        served(create_app(composite_of(base_folder, [one, two]))) as address,
    ):
        data = json.dumps({"model": "composite", "messages": HELLO, "stream": True}).encode()
        request = urllib.request.Request(f"{address}/v1/chat/completions", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as response:
            told = response.read().decode()
        first, _, rest = told.partition(": keep-alive")
        assert "one1" in first
        assert rest.count(": keep-alive") >= 2
        assert "two4" in rest
        assert told.endswith("data: [DONE]\n\n")


def test_what_fails_after_a_long_silence_is_told_in_the_stream(base_folder, monkeypatch):
    monkeypatch.setattr(streaming, "_SILENCE", 0.2)
    timeouts = Timeouts(first=1, retries=0)
    with (
        mock_expert("slow", "--fault", "hang") as (slow, _),
        served(create_app(composite_of(base_folder, [slow], timeouts=timeouts))) as address,
    ):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="no expert could answer"):
            list(client.chat.completions.create(model="composite", messages=HELLO, stream=True))


def test_what_a_client_left_was_written_and_costs_all_the_same(base_folder, caplog):
    caplog.set_level(logging.INFO, "expertoken.requests")
    with (
        mock_expert("slow", "--between", "0.1", "--words", "1000") as (slow, _),
        served(create_app(composite_of(base_folder, [slow]))) as address,
    ):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        stream = client.chat.completions.create(model="composite", messages=HELLO, stream=True)
        for _ in range(5):
            next(iter(stream))
        stream.close()
        client.close()
        for _ in range(50):
            lines = [json.loads(record.message) for record in caplog.records if record.name == "expertoken.requests"]
            if lines:
                break
            time.sleep(0.1)
        assert lines[0]["status"] == 499
        assert lines[0]["answers"][0]["completion_tokens"] > 2
        assert lines[0]["answers"][0]["cost"] > 0
        assert 'expertoken_tokens_total{expert="slow",kind="written"} 0.0' not in get(address, "/metrics")


def test_a_page_of_elsewhere_can_not_ask_in_its_users_name(url):
    body = {"model": "comp", "messages": HELLO}
    assert post(url, body, {"origin": "https://evil.example"})[0] == 403
    assert post(url, body, {"origin": "null"})[0] == 403
    assert post(url, body, {"origin": "http://["})[0] == 403
    assert post(url, body, {"content-type": "text/plain"})[0] == 415
    assert post(url, body, {"origin": "http://localhost:3000"})[0] == 200


def test_pages_that_the_operator_names_may_ask(composite):
    settings = Settings(name="comp", origins=("https://chat.example",), api_keys=(KEY,))
    with served(create_app(composite, settings)) as address:
        wanted = {"origin": "https://chat.example", "access-control-request-method": "POST",
                  "access-control-request-headers": "authorization,content-type"}  # fmt: skip
        request = urllib.request.Request(f"{address}/v1/chat/completions", headers=wanted, method="OPTIONS")
        with urllib.request.urlopen(request) as response:
            assert response.headers["access-control-allow-origin"] == "https://chat.example"
        headers = {"origin": "https://chat.example", "authorization": f"Bearer {KEY}"}
        status, _, found = post(address, {"model": "comp", "messages": HELLO}, headers)
        assert (status, found["access-control-allow-origin"]) == (200, "https://chat.example")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("HEAD", "/health", 200), ("HEAD", "/ready", 200), ("HEAD", "/", 200), ("GET", "/v1/chat/completions", 405),
     ("POST", "/v1/completions", 404), ("GET", "/docs", 404)],
)  # fmt: skip
def test_what_is_asked_of_the_wrong_address_or_in_the_wrong_way_is_told_so(url, method, path, status):
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port))
    connection.request(method, path, b"{}" if method == "POST" else None, {"content-type": "application/json"})
    assert connection.getresponse().status == status
    connection.close()


def test_with_keys_nobody_is_told_what_an_experts_failure_says_of_this_machine(base_folder, words, monkeypatch):
    monkeypatch.delenv("SOME_SECRET_NAME", raising=False)
    keyed = Expert("keyed", "openai", "m", base_url=words[0].base_url, api_key_env="SOME_SECRET_NAME")
    body = {"model": "composite", "messages": HELLO, "expertoken": {"show": True}}
    told = {}
    for keys in ((), (KEY,)):
        with served(create_app(composite_of(base_folder, [keyed, words[0]]), Settings(api_keys=keys))) as address:
            _, answer, _ = post(address, body, {"authorization": f"Bearer {KEY}"})
            told[keys] = answer["expertoken"][0]["failures"]["keyed"]
    assert "SOME_SECRET_NAME" in told[()]
    assert told[KEY,] == "could not answer"


def test_every_request_for_an_answer_has_its_line_whatever_came_of_it(url, caplog):
    caplog.set_level(logging.INFO, "expertoken.requests")
    assert post(url, b"{")[0] == 400
    assert post(url, {"model": "comp", "messages": []})[0] == 400
    assert post(url, {"model": "comp", "messages": HELLO}, {"content-type": "text/plain"})[0] == 415
    assert post(url, {"model": "no", "messages": HELLO})[0] == 404
    lines = [json.loads(record.message) for record in caplog.records if record.name == "expertoken.requests"]
    assert [line["status"] for line in lines] == [400, 400, 415, 404]


def test_who_sends_a_body_too_slowly_gives_up_its_place(composite, monkeypatch):
    monkeypatch.setattr(guard, "_PATIENCE", 0.3)
    with served(create_app(composite, Settings(max_concurrent=1))) as address:
        host, port = address.removeprefix("http://").split(":")
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head)
            time.sleep(0.1)
            assert post(address, {"model": "composite", "messages": HELLO})[0] == 503
            assert connection.recv(65536).split()[1] == b"408"
            assert post(address, {"model": "composite", "messages": HELLO})[0] == 200


def test_images_reach_the_expert_and_the_decision_reads_the_text_beside_them(client):
    """The mock expert reads the texts of the parts."""
    parts = [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    answer = client.chat.completions.create(model="comp/two", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content.startswith("two0")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="comp/self", messages=[{"role": "user", "content": parts}])
    developer = [{"role": "developer", "content": "be brief"}, *HELLO]
    assert client.chat.completions.create(model="comp/self", messages=developer, max_tokens=2).choices


def test_an_address_that_others_reach_needs_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
        with pytest.raises(ExpertokenError, match="EXPERTOKEN_API_KEYS"):
            Settings(host=host)
    Settings(host="0.0.0.0", api_keys=(KEY,))
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        Settings(host=host)


def test_a_key_that_can_be_guessed_is_refused(monkeypatch):
    from expertoken.inference.server.keys import keys_from_environment

    monkeypatch.setenv("EXPERTOKEN_API_KEYS", f"{KEY}, short")
    with pytest.raises(ExpertokenError, match="at least 16") as error:
        keys_from_environment()
    assert "short" not in str(error.value)
    monkeypatch.setenv("EXPERTOKEN_API_KEYS", f" {KEY} ,")
    assert keys_from_environment() == (KEY,)


def test_with_keys_nothing_but_health_and_page_is_open(composite, caplog):
    caplog.set_level(logging.DEBUG)
    with served(create_app(composite, Settings(name="comp", api_keys=("other-key-of-others", KEY)))) as address:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"},
                      {"authorization": f"Bearer {KEY}x"}, {"authorization": "Bearer "}):  # fmt: skip
            status, body, _ = post(address, {"model": "comp", "messages": HELLO}, given)
            assert status == 401
            assert body["error"]["code"] == "invalid_api_key"
        for path in ("/metrics", "/v1/models", "/docs", "/openapi.json", "/v1/models/comp"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                get(address, path)
        for path in ("/health", "/ready", "/"):
            get(address, path)
        assert post(address, {"model": "comp", "messages": HELLO}, {"authorization": f"Bearer {KEY}"})[0] == 200
    assert KEY not in caplog.text


def test_a_body_over_the_limit_is_not_read_whole(composite):
    with served(create_app(composite, Settings(max_body=2000))) as address:
        large = {"model": "composite", "messages": [{"role": "user", "content": "x" * 3000}]}
        assert post(address, large)[0] == 413

        # A chunked body does not state its length.
        chunks = b"".join(b"64\r\n" + b"x" * 100 + b"\r\n" for _ in range(50)) + b"0\r\n\r\n"
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
            assert connection.recv(65536).split()[1] == b"413"


def test_who_sends_far_too_much_is_told_so_and_does_not_see_a_broken_connection(composite):
    with served(create_app(composite, Settings(max_body=2**20))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIStatusError, match="at most 1048576 bytes") as error:
            client.chat.completions.create(model="composite", messages=[{"role": "user", "content": "x" * 3 * 2**20}])
        assert error.value.status_code == 413


def test_requests_over_the_rate_are_told_to_come_again(composite):
    with served(create_app(composite, Settings(rate=2))) as address:
        body = {"model": "composite", "messages": HELLO}
        # The server has no keys, so different keys are still one client.
        found = [post(address, body, {"authorization": f"Bearer {number}"}) for number in range(3)]
        assert [status for status, _, _ in found] == [200, 200, 429]
        assert 50 < int(found[2][2]["retry-after"]) <= 60
        assert 'expertoken_requests_total{status="429"} 1.0' in get(address, "/metrics")


def test_requests_over_the_concurrency_are_told_to_come_again(base_folder):
    async def both(address):
        client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        asks = [client.chat.completions.create(model="composite", messages=HELLO) for _ in range(2)]
        return await asyncio.gather(*asks, return_exceptions=True)

    with (
        mock_expert("slow", "--between", "0.2") as (slow, _),
        served(create_app(composite_of(base_folder, [slow]), Settings(max_concurrent=1))) as address,
    ):
        found = asyncio.run(both(address))
    assert sorted(type(outcome).__name__ for outcome in found) == ["ChatCompletion", "InternalServerError"]


def test_the_log_has_a_line_for_each_request_and_nothing_of_what_was_said(url, caplog):
    secret = "the patient has a rare disease"
    alone = {"expertoken": {"policy": {"deny": ["self"]}}}
    with caplog.at_level(logging.INFO):
        post(url, {"model": "comp", "messages": [{"role": "user", "content": f"{secret} one do: refuse"}]} | alone)
        post(url, {"model": "comp/two", "messages": [{"role": "user", "content": f"{secret} two do: refuse"}]})
        post(url, {"model": secret, "messages": HELLO})
        post(url, {"model": "comp", "messages": [{"role": secret, "content": secret}]})
    assert secret not in caplog.text
    lines = [json.loads(record.message) for record in caplog.records if record.name == "expertoken.requests"]
    assert [line["status"] for line in lines] == [200, 502, 404, 400]
    assert lines[0]["answers"][0]["expert"] == "two"
    assert lines[1]["answers"][0]["failed"] == ["two"]


def test_a_chat_that_goes_on_stays_with_its_expert_though_the_client_does_not_say_who_it_was(composite):
    """`two` answers once. With a bonus for the last expert it is chosen again: its answer identifies it."""
    with served(create_app(composite, Settings(name="comp"))) as address:
        extra = {"expertoken": {"policy": {"deny": ["one"]}}}
        _, first, _ = post(address, {"model": "comp", "messages": HELLO} | extra)
        answer = first["choices"][0]["message"]
        chat = [*HELLO, answer, {"role": "user", "content": "hello"}]
        for sticky, expert in ((0, "one"), (1000, "two")):
            extra = {"expertoken": {"policy": {"sticky": sticky}}}
            _, body, _ = post(address, {"model": "comp", "messages": chat} | extra)
            assert body["choices"][0]["message"]["content"].startswith(expert)
        # A user cannot claim this by `name`.
        forged = [{"role": "user", "content": "hello", "name": "two"}]
        _, body, _ = post(address, {"model": "comp", "messages": forged} | extra)
        assert body["choices"][0]["message"]["content"].startswith("one")


def test_what_local_experts_take_is_told(base_folder, tmp_path):
    local = Expert("local", model=str(tiny_folder(tmp_path / "other", seed=1)))
    with served(create_app(composite_of(base_folder, [local]))) as address:
        assert "expertoken_local_bytes 0.0" in get(address, "/metrics")
        assert post(address, {"model": "composite", "messages": HELLO, "max_tokens": 2})[0] == 200
        told = get(address, "/metrics")
        assert "expertoken_local_loads_total 1.0" in told
        assert "expertoken_local_bytes 0.0" not in told


def test_an_answer_that_breaks_off_for_good_says_so_in_the_stream(base_folder):
    told = []
    with (
        mock_expert("half", "--fault", "cut") as (half, _),
        served(create_app(composite_of(base_folder, [half]), Settings())) as address,
    ):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        stream = client.chat.completions.create(model="composite", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="the answer broke off"):
            told.extend(chunk.choices[0].delta.content or "" for chunk in stream)
        assert "expertoken_turns_lost_total 1.0" in get(address, "/metrics")
    assert "".join(told) == "half0 half1"


@pytest.mark.parametrize(("stream", "latency"), [(True, 0), (True, 100), (False, 0)])
def test_a_client_that_goes_away_stops_the_generation(base_folder, stream, latency):
    with (
        mock_expert("slow", "--between", "0.1", "--words", "1000", "--first", str(latency)) as (slow, _),
        served(create_app(composite_of(base_folder, [slow]), Settings())) as address,
    ):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=0.6, max_retries=0)
        ask = {"model": "composite", "messages": HELLO, "stream": stream}
        if stream and not latency:
            answer = client.chat.completions.create(**ask)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.chat.completions.create(**ask)
        client.close()
        for _ in range(40):
            if get(slow.base_url.removesuffix("/v1"), "/open") == "0":
                break
            time.sleep(0.1)
        assert get(slow.base_url.removesuffix("/v1"), "/open") == "0"
        for _ in range(40):
            if "expertoken_in_flight 0.0" in get(address, "/metrics"):
                break
            time.sleep(0.1)
        assert "expertoken_in_flight 0.0" in get(address, "/metrics")
