"""Anthropic's Messages API and OpenAI's Responses API, called by the official clients."""

import json
import re
from contextlib import contextmanager

import anthropic
import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from expertoken.inference.server import Settings, create_app
from expertoken.inference.server.anthropic_messages import MessagesRequest
from expertoken.inference.server.blocks import Added, Blocks, Closed, Opened
from expertoken.inference.server.openai_responses import ResponsesRequest
from expertoken.modeling.backend import Piece
from expertoken.modeling.experts import Expert
from expertoken.tests.inference.conftest import composite_of, served
from expertoken.tests.inference.mock_expert import chunk

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
USAGE = {"prompt_tokens": 50, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 40},
         "completion_tokens_details": {"reasoning_tokens": 4}}  # fmt: skip


def call(index, arguments, **more):
    return {"index": index, "function": {"arguments": arguments} | more.pop("function", {})} | more


THOUGHT = [{"reasoning_content": "let me "}, {"reasoning_content": "see"}]
TEXT = [{"content": "Hel"}, {"content": "lo"}]
CALLS = [
    call(0, "", id="c1", type="function", function={"name": "read"}),
    call(0, '{"path": '),
    call(0, '"a"}'),
    call(1, '{"path": "b"}', id="c2", type="function", function={"name": "read"}),
]


@contextmanager
def serving(base_folder, deltas, finish="stop", settings=None):
    """Serve a composite whose only expert answers with these deltas. Yield the address and the expert's requests."""
    seen = []

    async def answer(request):
        seen.append(await request.json())
        parts = [*(chunk(delta) for delta in deltas), *([chunk({}, finish, USAGE)] if finish else [])]
        return StreamingResponse(iter(parts), media_type="text/event-stream")

    with served(Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])) as url:
        composite = composite_of(base_folder, [Expert("one", "openai", "m", base_url=f"{url}/v1")])
        with served(create_app(composite, settings or Settings(name="comp"))) as address:
            yield address, seen


def claude(address, key="none"):
    return anthropic.Anthropic(base_url=address, api_key=key, max_retries=0)


def gpt(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


EVERYTHING = [*THOUGHT, *TEXT, *({"tool_calls": [one]} for one in CALLS)]


@pytest.mark.parametrize("streamed", [False, True])
def test_anthropics_client_gets_thought_text_and_calls(base_folder, streamed):
    with serving(base_folder, EVERYTHING, "tool_calls") as (address, seen):
        asked = {
            "model": "comp", "max_tokens": 100, "system": [{"type": "text", "text": "be brief"}], "messages": HELLO,
            "tools": [{"name": "read", "description": "reads", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "stop_sequences": ["END"],
        }  # fmt: skip
        if streamed:
            with claude(address).messages.stream(**asked) as stream:
                message = stream.get_final_message()
        else:
            message = claude(address).messages.create(**asked)
    thought, text, *calls = message.content
    assert (thought.type, thought.thinking) == ("thinking", "let me see")
    assert (text.type, text.text) == ("text", "Hello")
    assert [(one.id, one.name, one.input) for one in calls] == [
        ("c1", "read", {"path": "a"}),
        ("c2", "read", {"path": "b"}),
    ]
    assert message.stop_reason == "tool_use"
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (10, 40, 9)
    [body] = seen
    assert body["messages"] == [{"role": "system", "content": "be brief"}, *HELLO]
    assert body["tools"][0] == {
        "type": "function", "function": {"name": "read", "description": "reads", "parameters": SCHEMA}
    }  # fmt: skip
    assert (body["tool_choice"], body["parallel_tool_calls"], body["max_tokens"], body["stop"]) == (
        "required", False, 100, ["END"]
    )  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
def test_openais_client_gets_a_response_with_thought_text_and_calls(base_folder, streamed):
    with serving(base_folder, EVERYTHING, "tool_calls") as (address, seen):
        asked = {
            "model": "comp", "max_output_tokens": 100, "instructions": "be brief", "input": "hello",
            "tools": [{"type": "function", "name": "read", "parameters": SCHEMA, "strict": False},
                      {"type": "web_search"}],
            "tool_choice": "required", "reasoning": {"effort": "low"},
        }  # fmt: skip
        if streamed:
            with gpt(address).responses.stream(**asked) as stream:
                response = stream.get_final_response()
        else:
            response = gpt(address).responses.create(**asked)
    thought, message, *calls = response.output
    assert thought.content[0].text == "let me see"
    assert (message.content[0].text, response.output_text) == ("Hello", "Hello")
    assert [(one.call_id, one.name, one.arguments) for one in calls] == [
        ("c1", "read", '{"path": "a"}'), ("c2", "read", '{"path": "b"}')
    ]  # fmt: skip
    assert response.status == "completed"
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.input_tokens_details.cached_tokens) == (50, 9, 40)
    assert usage.output_tokens_details.reasoning_tokens == 4
    [body] = seen
    assert body["messages"] == [{"role": "system", "content": "be brief"}, *HELLO]
    assert [tool["function"]["name"] for tool in body["tools"]] == ["read"]
    assert (body["max_tokens"], body["reasoning_effort"]) == (100, "low")


def test_openais_chat_client_gets_the_same(base_folder):
    with serving(base_folder, EVERYTHING, "tool_calls") as (address, _):
        tool = {"type": "function", "function": {"name": "read", "parameters": SCHEMA}}
        asked = {"model": "comp", "messages": HELLO, "tools": [tool]}
        message = gpt(address).chat.completions.create(**asked).choices[0].message
        assert (message.content, message.reasoning_content) == ("Hello", "let me see")
        assert [one.function.arguments for one in message.tool_calls] == ['{"path": "a"}', '{"path": "b"}']


@pytest.mark.parametrize(
    ("finish", "stop", "status"), [("length", "max_tokens", "incomplete"), ("stop", "end_turn", "completed")]
)
def test_why_an_answer_ended_is_told_in_the_words_of_each(base_folder, finish, stop, status):
    with serving(base_folder, TEXT, finish) as (address, _):
        assert claude(address).messages.create(model="comp", max_tokens=5, messages=HELLO).stop_reason == stop
        assert gpt(address).responses.create(model="comp", input="hello").status == status
        with gpt(address).responses.stream(model="comp", input="hello") as stream:
            assert [event.type for event in stream][-1] == f"response.{status}"


def test_a_stop_text_that_ended_a_message_is_named(base_folder):
    with serving(base_folder, TEXT) as (address, _):
        asked = {"model": "comp", "max_tokens": 50, "messages": HELLO, "stop_sequences": ["zzz", "lo"]}
        message = claude(address).messages.create(**asked)
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "lo")
        with claude(address).messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", "lo")
    assert "lo" not in "".join(block.text for block in streamed.content)


@pytest.mark.parametrize("field", ["stop_reason", "matched_stop"])  # of vLLM, of SGLang
def test_a_stop_text_that_the_experts_server_applied_is_named(base_folder, field):
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", field: "END"}]}

    async def answer(request):
        parts = [chunk({"content": "one "}), f"data: {json.dumps(end)}\n\n".encode()]
        return StreamingResponse(iter(parts), media_type="text/event-stream")

    with served(Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])) as url:
        composite = composite_of(base_folder, [Expert("one", "openai", "m", base_url=f"{url}/v1")])
        with served(create_app(composite, Settings(name="comp"))) as address:
            asked = {"model": "comp", "max_tokens": 50, "messages": HELLO, "stop_sequences": ["END"]}
            message = claude(address).messages.create(**asked)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")


def test_every_event_of_a_response_has_its_number(base_folder):
    with serving(base_folder, EVERYTHING, "tool_calls") as (address, _):
        events = list(gpt(address).responses.create(model="comp", input="hello", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 4


def test_an_answer_that_breaks_off_says_so_in_each(base_folder):
    with serving(base_folder, TEXT, None) as (address, _):
        streaming = claude(address).messages.stream(model="comp", max_tokens=5, messages=HELLO)
        with pytest.raises(anthropic.APIStatusError, match="broke off"), streaming as stream:
            stream.get_final_message()
        events = list(gpt(address).responses.create(model="comp", input="hello", stream=True))
        assert (events[-1].type, events[-1].code) == ("error", "answer_broke_off")


def test_errors_have_the_form_of_their_api(base_folder):
    with serving(base_folder, TEXT, settings=Settings(name="comp", api_keys=("a" * 16,))) as (address, _):
        with pytest.raises(anthropic.AuthenticationError) as error:
            claude(address).messages.create(model="comp", max_tokens=5, messages=HELLO)
        assert error.value.body["error"]["type"] == "authentication_error"
        known = claude(address, "a" * 16)  # sent as x-api-key
        assert known.messages.create(model="comp", max_tokens=5, messages=HELLO).content[0].text == "Hello"
        with pytest.raises(anthropic.NotFoundError, match="unknown model 'other'"):
            known.messages.create(model="other", max_tokens=5, messages=HELLO)
        with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\]: expected a client tool"):
            known.messages.create(
                model="comp",
                max_tokens=5,
                messages=HELLO,
                tools=[{"type": "web_search_20250305", "name": "web_search"}],
            )


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "messages",
            {"messages": [{"role": "tool", "content": "x"}]},
            r"messages\[0\]\.role: expected user or assistant",
        ),
        ("messages", {"messages": HELLO, "temperature": "hot"}, "temperature: "),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "got 'document'"),
        ("messages", {"messages": [{"role": "user", "content": 5}]}, "expected text, or a list of blocks"),
        ("responses", {"input": "hi", "previous_response_id": "r"}, "nothing is stored here"),
        ("responses", {"input": [{"type": "computer_call"}]}, "got 'computer_call'"),
        ("responses", {"input": [{"role": "nobody", "content": "hi"}]}, r"messages\[0\]: expected `role`"),
        ("responses", {"input": []}, "input"),
        ("responses", {"input": "hi", "reasoning": {"effort": 5}, "metadata": {"user_id": 7}}, None),
    ],
)
def test_what_is_malformed_is_one_clear_error(base_folder, path, body, message):
    with serving(base_folder, TEXT) as (address, _):
        answer = httpx.post(f"{address}/v1/{path}", json={"model": "comp"} | body)
        if message is None:
            assert answer.status_code == 200
            return
        assert answer.status_code == 400
        assert re.search(message, answer.json()["error"]["message"])


def test_tokens_are_counted_for_clients_that_ask(base_folder):
    with serving(base_folder, TEXT) as (address, _):
        short, long = (
            claude(address)
            .messages.count_tokens(model="comp", messages=[{"role": "user", "content": text}])
            .input_tokens
            for text in ("hello", "hello " * 50)
        )
    assert 0 < short < long / 10


def test_results_of_tools_are_messages_of_their_own():
    asked = MessagesRequest(
        model="m",
        messages=[
            {"role": "user", "content": "look"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "read", "input": {"path": "a"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "42"}]},
                {"type": "text", "text": "<system-reminder>note</system-reminder>",
                 "cache_control": {"type": "ephemeral"}}]},
        ],
    ).chat()  # fmt: skip
    assert asked.messages == [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "I look.", "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}]},
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
        {"role": "user", "content": "<system-reminder>note</system-reminder>"},
    ]  # fmt: skip


def test_pictures_are_parts_in_both():
    data = "iVBORw0KGgo="
    source = {"type": "base64", "media_type": "image/png", "data": data}
    content = [{"type": "text", "text": "what?"}, {"type": "image", "source": source}]
    [message] = MessagesRequest(model="m", messages=[{"role": "user", "content": content}]).chat().messages
    url = {"url": f"data:image/png;base64,{data}"}
    assert message["content"] == [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": url}]
    parts = [{"type": "input_text", "text": "what?"}, {"type": "input_image", "image_url": url["url"]}]
    [same] = ResponsesRequest(model="m", input=[{"role": "user", "content": parts}]).chat().messages
    assert same == message


def test_text_and_calls_of_one_answer_are_one_message():
    items = [
        {"role": "user", "content": "look"},
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "read", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "read", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
    ]
    _, said, result = ResponsesRequest(model="m", input=items).chat().messages
    assert (said["content"], [one["id"] for one in said["tool_calls"]]) == ("I look.", ["c1", "c2"])
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "42"}


def test_calls_that_come_interleaved_are_told_one_after_the_other():
    blocks, steps = Blocks(), []
    for part in (call(0, "a", id="x"), call(1, "b", id="y"), call(0, "c"), call(1, "d")):
        steps += blocks.of(Piece(tool_calls=[part]))
    steps += blocks.end()
    assert steps == [
        Opened("call", "x"), Added("a"), Added("c"), Closed(), Opened("call", "y"), Added("b"), Added("d"), Closed()
    ]  # fmt: skip


def test_a_decision_can_be_asked_for_alone(base_folder):
    with serving(base_folder, TEXT) as (address, seen):
        told = httpx.post(f"{address}/v1/route", json={"model": "comp", "messages": HELLO}).json()
        assert (told["expert"], told["model"], told["ranking"]) == ("one", "comp/one", ["one"])
        assert "hello" in told["view"]
        assert seen == []


def test_headers_of_an_answer_tell_who_gave_it(base_folder):
    with serving(base_folder, TEXT) as (address, _):
        for path, body in (
            ("chat/completions", {"messages": HELLO}),
            ("messages", {"messages": HELLO}),
            ("responses", {"input": "hi"}),
        ):
            for stream in (False, True):
                answer = httpx.post(f"{address}/v1/{path}", json={"model": "comp", "stream": stream} | body)
                assert answer.headers["x-expertoken-expert"] == "one", json.dumps(answer.text)
                assert float(answer.headers["x-expertoken-decision-ms"]) >= 0


def test_a_requests_id_and_its_trace_reach_the_expert(base_folder):
    headers = []

    async def answer(request):
        headers.append(request.headers)
        return StreamingResponse(iter([chunk({"content": "hi"}), chunk({}, "stop")]), media_type="text/event-stream")

    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with served(Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])) as url:
        composite = composite_of(base_folder, [Expert("one", "openai", "m", base_url=f"{url}/v1")])
        with served(create_app(composite, Settings(name="comp"))) as address:
            for stream in (False, True):
                asked = {"model": "comp", "messages": HELLO, "stream": stream}
                given = {"x-request-id": "my-id.1", "traceparent": trace}
                answer_of = httpx.post(f"{address}/v1/chat/completions", json=asked, headers=given)
                assert answer_of.headers["x-request-id"] == headers[-1]["x-request-id"] == "my-id.1"
                assert headers[-1]["traceparent"] == trace
            forged = httpx.post(f"{address}/v1/chat/completions", json=asked, headers={"x-request-id": "a b"})
            assert forged.headers["x-request-id"] == headers[-1]["x-request-id"] != "a b"


def test_a_call_that_goes_on_behind_text_stays_one():
    blocks, steps = Blocks(), []
    for piece in (Piece(tool_calls=[call(0, '{"a"', id="x")]), Piece("so "), Piece(tool_calls=[call(0, ":1}")])):
        steps += blocks.of(piece)
    steps += blocks.end()
    assert steps == [
        Opened("call", "x"), Added('{"a"'), Added(":1}"), Closed(), Opened("text"), Added("so "), Closed()
    ]  # fmt: skip


def test_thought_under_two_names_is_told_once():
    blocks = Blocks()
    assert blocks.of(Piece(thought={"reasoning_content": "a", "reasoning": "a"})) == [Opened("thought"), Added("a")]


def test_calls_text_and_results_of_one_answer_come_in_an_order_that_servers_take():
    items = [
        {"role": "user", "content": "look"},
        {"type": "function_call", "call_id": "c1", "name": "read", "arguments": "{}"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call_output", "call_id": "c1", "output": [
            {"type": "input_text", "text": "a picture"}, {"type": "input_image", "image_url": "data:,x"}]},
    ]  # fmt: skip
    _, said, result, shown = ResponsesRequest(model="m", input=items).chat().messages
    assert (said["content"], [one["id"] for one in said["tool_calls"]]) == ("I look.", ["c1"])
    assert result == {"role": "tool", "tool_call_id": "c1", "content": "a picture"}
    assert shown == {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}


def test_a_call_that_was_forced_ends_as_a_call_though_the_server_says_stop(base_folder):
    with serving(base_folder, [{"tool_calls": [one]} for one in CALLS], "stop") as (address, _):
        tool = {"name": "read", "input_schema": SCHEMA}
        asked = {"model": "comp", "max_tokens": 100, "messages": HELLO, "tools": [tool]}
        assert claude(address).messages.create(**asked).stop_reason == "tool_use"
        with claude(address).messages.stream(**asked) as stream:
            assert stream.get_final_message().stop_reason == "tool_use"


@pytest.mark.parametrize("arguments", ['{"a": "\\ud83d"}', '{"a": NaN}', '{"a": ' + "[" * 5000 + "}"])
def test_arguments_that_no_json_can_hold_are_no_error_of_the_server(base_folder, arguments):
    with serving(base_folder, [{"tool_calls": [call(0, arguments, id="c", function={"name": "f"})]}]) as (address, _):
        answer = httpx.post(f"{address}/v1/messages", json={"model": "comp", "max_tokens": 5, "messages": HELLO})
        assert answer.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_client_sends_along_breaks_no_response(base_folder, stream):
    deep = json.loads("[" * 400 + "]" * 400)
    tool = {"type": "function", "name": "f", "parameters": {"a": deep}}
    body = json.dumps({"model": "comp", "input": "hello", "stream": stream, "tools": [tool],
                       "metadata": {"a": "\ud83d"}})  # fmt: skip
    with serving(base_folder, TEXT) as (address, _):
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{address}/v1/responses", content=body, headers=headers)
        assert answer.status_code == 200
        assert "completed" in answer.text


@pytest.mark.parametrize("calls", [5, True, "x", {"a": 1}])
def test_tool_calls_are_a_list(base_folder, calls):
    chat = [*HELLO, {"role": "assistant", "content": "x", "tool_calls": calls}, *HELLO]
    with serving(base_folder, TEXT) as (address, _):
        for path in ("chat/completions", "route"):
            answer = httpx.post(f"{address}/v1/{path}", json={"model": "comp", "messages": chat})
            assert (answer.status_code, "tool_calls: expected a list" in answer.text) == (400, True)


def test_odd_trace_headers_go_to_nobody(base_folder):
    with serving(base_folder, TEXT) as (address, _):
        for value in (b"\xff", b"x" * 30_000):
            answer = httpx.post(
                f"{address}/v1/chat/completions",
                json={"model": "comp", "messages": HELLO},
                headers=[(b"traceparent", value)],
            )
            assert answer.headers["x-expertoken-expert"] == "one"
