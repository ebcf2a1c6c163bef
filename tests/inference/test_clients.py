"""Whole requests in the formats of real clients. Each client is answered in the form that it reads.

The requests are written by hand after the clients' own requests. Their texts are ours.
"""

import json

import httpx
import pytest

from expertoken.tests.inference.test_dialects import CALLS, TEXT, THOUGHT, serving

ASK = "Why does the build of the parser fail?"
PATH = {
    "type": "object",
    "properties": {"path": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
CACHED = {"cache_control": {"type": "ephemeral"}}


def told_to_claude_code(ask):
    """Make Claude Code's request: reminders as blocks of the user's message, cache marks, thoughts and tool results."""
    reminder = "<system-reminder>\nThe list of tasks is empty. Do not mention this.\n</system-reminder>"
    tools = ("Read", "Bash", "Edit")
    return {
        "model": "comp",
        "max_tokens": 32000,
        "stream": True,
        "temperature": 1,
        "system": [
            {"type": "text", "text": "x-billing: cli; version=2"},
            {"type": "text", "text": "You are a coding agent in a terminal. " * 200, **CACHED},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": reminder}, {"type": "text", "text": ask, **CACHED}]},
        ],
        "tools": [{"name": name, "description": f"{name}s.", "input_schema": PATH} for name in tools],
        "metadata": {"user_id": "user_0a1b_account__session_5f0c3a52-6a57-4c25-9a5e-2f4d2b0f3a11"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    }  # fmt: skip


def claude_codes_next_turn(ask):
    """Make Claude Code's request within a tool loop, with a signed thought, a result as blocks and a failed call."""
    body = told_to_claude_code(ask)
    body["messages"] += [
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "I should look.", "signature": "c2lnbmVk"},
            {"type": "redacted_thinking", "data": "aGlkZGVu"},
            {"type": "text", "text": "I look at both files."},
            {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "parser.py"}},
            {"type": "tool_use", "id": "toolu_2", "name": "Read", "input": {"path": "gone.py"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "1→import re"}]},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such file", "is_error": True, **CACHED},
            {"type": "text", "text": "<system-reminder>\nplan mode is off\n</system-reminder>"},
        ]},
    ]  # fmt: skip
    return body


def told_to_codex(ask):
    """Make Codex's request: a developer message, environment and instructions as user messages, and built-in tools."""
    shell = {"type": "object", "properties": {"command": {"type": "array", "items": {"type": "string"}}}}
    rules = "# AGENTS.md instructions for /home/me\n\n<INSTRUCTIONS>\nBe brief.\n</INSTRUCTIONS>"
    context = "<environment_context>\n  <cwd>/home/me/parser</cwd>\n  <shell>bash</shell>\n</environment_context>"
    return {
        "model": "comp",
        "instructions": "You are a coding agent that runs in a terminal. " * 200,
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Read only."}]},
            {"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": rules},
                {"type": "input_text", "text": context},
            ]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": ask}]},
        ],
        "tools": [
            {"type": "function", "name": "shell", "description": "Runs.", "strict": False, "parameters": shell},
            {"type": "custom", "name": "apply_patch", "description": "Edits.",
             "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "text": {"verbosity": "medium"},
        "include": ["reasoning.encrypted_content"],
        "store": False,
        "stream": True,
        "prompt_cache_key": "019abc32-6a57-7c25-9a5e-2f4d2b0f3a11",
    }  # fmt: skip


def codexs_next_turn(ask):
    """Make Codex's request after a call: an encrypted thought, the call, and its output."""
    body = told_to_codex(ask)
    body["input"] += [
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "looking"}],
         "content": None, "encrypted_content": "gAAAA"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "call_1", "name": "shell", "arguments": '{"command": ["ls"]}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "parser.py"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "re"}},
        {"type": "custom_tool_call", "call_id": "call_2", "name": "apply_patch", "input": "*** Begin Patch"},
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": "done"},
    ]  # fmt: skip
    return body


def told_to_open_webui(ask):
    """Make Open WebUI's request: a chat with a system prompt, a request for usage, and options that are null."""
    return {
        "model": "comp",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "User Context:\n\nbe kind"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "Hello! How can I help?"},
            {"role": "user", "content": [{"type": "text", "text": ask}]},
        ],
        "temperature": 0.7, "top_p": 0.9, "seed": 7, "frequency_penalty": 0, "stop": None, "max_tokens": None,
    }  # fmt: skip


def told_to_continue(ask):
    """Make Continue's request: rules in the system message, files in the request, and tools of agent mode."""
    tool = {"name": "read_file", "description": "Reads.", "parameters": PATH}
    return {
        "model": "comp",
        "stream": True,
        "max_tokens": 8192,
        "parallel_tool_calls": False,
        "messages": [
            {"role": "system", "content": "<important_rules>\nYou are in agent mode.\n</important_rules>"},
            {"role": "user", "content": ask},
        ],
        "tools": [{"type": "function", "function": tool}],
    }  # fmt: skip


REQUESTS = {
    "Claude Code": ("/v1/messages?beta=true", told_to_claude_code),
    "Claude Code, within a loop": ("/v1/messages?beta=true", claude_codes_next_turn),
    "Codex": ("/v1/responses", told_to_codex),
    "Codex, within a loop": ("/v1/responses", codexs_next_turn),
    "Open WebUI": ("/v1/chat/completions", told_to_open_webui),
    "Continue": ("/v1/chat/completions", told_to_continue),
}


def events(response):
    """Parse the JSON of each event of a stream."""
    lines = [line.removeprefix("data:").strip() for line in response.text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def text_of(found):
    """Return the text that the client shows, for any of the APIs."""
    if "choices" in found:
        return "".join(choice["delta"].get("content") or "" for choice in found["choices"])
    if found["type"] == "content_block_delta":
        return found["delta"].get("text", "")
    return found["delta"] if found["type"] == "response.output_text.delta" else ""


@pytest.mark.parametrize("client", REQUESTS)
def test_each_client_is_streamed_its_answer_in_its_form(base_folder, client):
    path, request = REQUESTS[client]
    with serving(base_folder, [*THOUGHT, *TEXT]) as (address, [*_]):
        response = httpx.post(f"{address}{path}", json=request(ASK), headers={"anthropic-version": "2023-06-01"})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "".join(map(text_of, events(response))) == "Hello"


@pytest.mark.parametrize("client", [name for name in REQUESTS if name != "Open WebUI"])
def test_each_agent_gets_the_calls_of_its_tools(base_folder, client):
    path, request = REQUESTS[client]
    with serving(base_folder, [{"tool_calls": [one]} for one in CALLS], "tool_calls") as (address, seen):
        response = httpx.post(f"{address}{path}", json=request(ASK))
    assert response.status_code == 200, response.text
    assert response.text.count('"read"') >= 2
    assert all(tool["type"] == "function" for tool in seen[0]["tools"])


@pytest.mark.parametrize("client", REQUESTS)
def test_a_decision_on_a_clients_turn_reads_what_the_user_asked(base_folder, client):
    """The whole request reaches the expert. The decision does not read the agent's text around the question."""
    path, request = REQUESTS[client]
    with serving(base_folder, TEXT) as (address, seen):
        assert httpx.post(f"{address}{path}", json=request(ASK)).status_code == 200
        view = httpx.post(f"{address}/v1/route", json={"model": "comp", "messages": seen[0]["messages"]}).json()["view"]
    assert ASK in json.dumps(seen[0]["messages"])
    assert ASK in json.dumps(view)
    assert "system-reminder" not in json.dumps(view)
    assert "environment_context" not in json.dumps(view)


def test_what_clients_ask_beside_is_answered(base_folder):
    with serving(base_folder, TEXT) as (address, _):
        assert httpx.head(address).status_code == 200  # Claude Code's check of the connection
        counted = httpx.post(f"{address}/v1/messages/count_tokens?beta=true", json=told_to_claude_code(ASK))
        assert counted.json()["input_tokens"] > 1000
        listed = httpx.get(f"{address}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["comp", "comp/one"]
        title = {"model": "comp", "stream": False, "max_completion_tokens": 1000, "metadata": {"task": "title"},
                 "messages": [{"role": "user", "content": "### Task:\nA title for this chat, as JSON."}]}  # fmt: skip
        assert httpx.post(f"{address}/v1/chat/completions", json=title).json()["choices"][0]["message"]["content"]
