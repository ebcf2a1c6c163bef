"""Anthropic's Messages API (`POST /v1/messages`), translated to OpenAI's chat and back.

Responses are built from the `anthropic` package's own types. The field `thinking` is ignored, so that the expert
decides whether to reason. Its reasoning is returned as blocks without a signature. Images are accepted as base64 or as
addresses. Documents and Anthropic's own tools are not supported.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from typing import Annotated, Any

from anthropic.types import (
    InputJSONDelta,
    Message,
    MessageDeltaUsage,
    RawContentBlockDeltaEvent,
    RawContentBlockStartEvent,
    RawContentBlockStopEvent,
    RawMessageDeltaEvent,
    RawMessageStartEvent,
    RawMessageStopEvent,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
    Usage,
)
from anthropic.types.raw_message_delta_event import Delta
from pydantic import ConfigDict, Field

from ...modeling.backend import Piece
from ...modeling.errors import ExpertokenError
from ..backends.wire import sendable
from ..reply import Reply
from .blocks import Added, Closed, Opened, steps_of, thought_of
from .completions import Completion, public
from .dialect import event
from .guard import anthropic_error
from .schema import (
    OURS,
    ChatRequest,
    Extension,
    MaxTokens,
    Messages,
    Metadata,
    Model,
    RequestBody,
    StopText,
    Stream,
    Temperature,
    Tools,
    TopP,
)

_ENDS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}  # else `end_turn`
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class MessagesRequest(RequestBody):
    """Body of `POST /v1/messages`. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: Model
    messages: Messages
    max_tokens: MaxTokens = None
    system: str | list[dict[str, Any]] | None = Field(None, description="System prompt.")
    stream: Stream = False
    temperature: Temperature = None
    top_p: TopP = None
    stop_sequences: Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description="Texts that end the answer before them."
    )
    tools: Tools = None
    tool_choice: dict[str, Any] | None = Field(None, description="Whether the expert calls a function, or which one.")
    output_config: dict[str, Any] | None = Field(
        None, description="Format of the answer. Experts that can't keep to a JSON schema are skipped."
    )
    metadata: Metadata = None
    expertoken: Extension = Field(default_factory=Extension, description=OURS)

    def chat(self) -> ChatRequest:
        """Return the request in the form of OpenAI's chat API.

        Raises:
            ExpertokenError: The request holds content that can't be passed on to experts.
        """
        system = _texts(self.system, "system")
        messages = [{"role": "system", "content": system}] if system else []
        for place, message in enumerate(self.messages):
            messages += _chat_messages(message, f"messages[{place}]")
        choice = self.tool_choice or {}
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": messages,
                "stream": self.stream,
                "max_tokens": self.max_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "tools": [_tool(tool, f"tools[{place}]") for place, tool in enumerate(self.tools or ())] or None,
                "tool_choice": _choice(choice) if self.tools else None,
                "parallel_tool_calls": False if self.tools and choice.get("disable_parallel_tool_use") else None,
                "response_format": _answer_format(self.output_config),
                "metadata": self.metadata,
                "expertoken": self.expertoken,
            }
        ).model_copy(update={"stop": self.stop_sequences})  # not validated: OpenAI's API takes four only


def _texts(content: Any, place: str) -> str:
    """Return the text of a message's content, which is a string or a list of blocks."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ExpertokenError(f"{place}: expected text, or a list of blocks")
    blocks = [block if isinstance(block, dict) else {} for block in content]
    return "\n".join(str(block.get("text") or "") for block in blocks if block.get("type") == "text")


def _chat_messages(message: dict[str, Any], place: str) -> Iterator[dict[str, Any]]:
    """Yield the messages of OpenAI's API for one of Anthropic's. Tool results become messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise ExpertokenError(f"{place}.role: expected user or assistant")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise ExpertokenError(f"{place}.content: expected text, or a list of blocks")
    if role == "assistant":
        calls = [_call(block) for block in content if block.get("type") == "tool_use"]
        text = _texts(content, place)
        yield {"role": role, "content": text or (None if calls else "")} | ({"tool_calls": calls} if calls else {})
        return
    parts: list[dict[str, Any]] = []
    for number, block in enumerate(content):
        if block.get("type") == "tool_result":
            where = f"{place}.content[{number}].content"
            told = _texts(block.get("content"), where) or "(no text)"
            yield {"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": told}
            inside = block.get("content")
            parts += [_part(one, where) for one in inside if _is_image(one)] if isinstance(inside, list) else []
        else:
            parts.append(_part(block, f"{place}.content[{number}]"))
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if parts:
        yield {"role": role, "content": "\n".join(texts) if len(texts) == len(parts) else parts}


def _is_image(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "image"


def _part(block: dict[str, Any], place: str) -> dict[str, Any]:
    kind = block.get("type")
    if kind == "text":
        return {"type": "text", "text": str(block.get("text") or "")}
    source = block.get("source")
    if kind == "image" and isinstance(source, dict):
        if source.get("type") == "base64":
            return _image(f"data:{source.get('media_type')};base64,{source.get('data')}")
        if source.get("type") == "url":
            return _image(str(source.get("url")))
    raise ExpertokenError(f"{place}: expected a block of type text, image or tool_result, got {str(kind)[:40]!r}")


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _call(block: dict[str, Any]) -> dict[str, Any]:
    function = {"name": str(block.get("name")), "arguments": json.dumps(block.get("input") or {})}
    return {"id": str(block.get("id")), "type": "function", "function": function}


def _tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom") or not isinstance(tool.get("name"), str):
        raise ExpertokenError(f"{place}: expected a client tool with `name` and `input_schema`")
    schema = tool.get("input_schema") or {"type": "object", "properties": {}}
    function = {"name": tool["name"], "description": tool.get("description"), "parameters": schema}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _choice(choice: dict[str, Any]) -> Any:
    if choice.get("type") == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return _CHOICES.get(str(choice.get("type")))


def _answer_format(config: dict[str, Any] | None) -> dict[str, Any] | None:
    wanted = (config or {}).get("format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.get("schema"), "strict": True}}


def _usage(completion: Completion) -> dict[str, Any]:
    """Return the token counts in Anthropic's form. Cached tokens are not part of `input_tokens`."""
    usage = completion.usage()
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    counts = {"input_tokens": max(0, usage["prompt_tokens"] - cached), "output_tokens": usage["completion_tokens"]}
    return counts | ({"cache_read_input_tokens": cached} if cached else {})


def _end(reply: Reply) -> Any:
    """Return the reason why an answer ended, and the stop text that ended it.

    Servers send `stop` for a call too, if the request names the function to call.
    """
    found = _ENDS.get(reply.finish or "", "end_turn")
    if found == "end_turn" and reply.calls:
        found = "tool_use"
    elif reply.stopped_by is not None:
        found = "stop_sequence"
    return {"stop_reason": found, "stop_sequence": reply.stopped_by if found == "stop_sequence" else None}


def _id(completion: Completion) -> str:
    return completion.id.replace("chatcmpl-", "msg_")


class MessagesDialect:
    """Form of the answers of Anthropic's Messages API."""

    def whole(self, completion: Completion, body: dict[str, Any]) -> dict[str, Any]:
        """Return the response, not streamed."""
        [choice] = body["choices"]
        told = choice["message"]
        blocks: list[Any] = []
        if thought := thought_of(told):
            blocks.append(ThinkingBlock(type="thinking", thinking=thought, signature=""))
        if told["content"]:
            blocks.append(TextBlock(type="text", text=told["content"]))
        for call in told.get("tool_calls", ()):
            given: Any = {}
            with suppress(ValueError, RecursionError):
                given = sendable(json.loads(call["function"]["arguments"] or "{}"))
                json.dumps(given)
            given = given if isinstance(given, dict) else {}
            blocks.append(ToolUseBlock(type="tool_use", id=call["id"], name=call["function"]["name"], input=given))
        message = Message.construct(
            id=_id(completion),
            type="message",
            role="assistant",
            model=body["model"],
            content=blocks,
            **_end(completion.replies[0]),
            usage=Usage(**_usage(completion)),
        )
        shown = {"expertoken": body["expertoken"]} if "expertoken" in body else {}
        return message.model_dump(exclude_unset=True) | shown

    async def events(
        self, completion: Completion, pieces: AsyncGenerator[tuple[int, Piece], None]
    ) -> AsyncGenerator[str, None]:
        """Yield the response as server-sent events."""
        number, kind = -1, ""
        begun = Message.construct(
            id=_id(completion),
            type="message",
            role="assistant",
            model=completion.request.model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=Usage(input_tokens=0, output_tokens=0),
        )
        yield event(RawMessageStartEvent.construct(type="message_start", message=begun))
        try:
            async for step in steps_of(pieces):
                if isinstance(step, Opened):
                    number, kind = number + 1, step.kind
                    block = _begun(step)
                    yield event(
                        RawContentBlockStartEvent(type="content_block_start", index=number, content_block=block)
                    )
                elif isinstance(step, Added):
                    delta = _delta(kind, step.text)
                    yield event(RawContentBlockDeltaEvent(type="content_block_delta", index=number, delta=delta))
                elif isinstance(step, Closed):
                    yield event(RawContentBlockStopEvent(type="content_block_stop", index=number))
        except ExpertokenError as error:
            for told in self.broken(public(error)):
                yield told
            return
        reply = completion.replies[0]
        ended = Delta.construct(**_end(reply))
        usage = MessageDeltaUsage(**_usage(completion))
        last = RawMessageDeltaEvent.construct(type="message_delta", delta=ended, usage=usage)
        shown = completion.shown(completion.replies[0]) if completion.request.expertoken.show else None
        yield event(last if shown is None else last.model_copy(update={"expertoken": shown}))
        yield event(RawMessageStopEvent(type="message_stop"))

    def broken(self, message: str) -> list[str]:
        """Return the events that end a stream whose answer can't continue."""
        return [f"event: error\ndata: {json.dumps(anthropic_error(message, 500))}\n\n"]


def _begun(step: Opened) -> Any:
    if step.kind == "thought":
        return ThinkingBlock(type="thinking", thinking="", signature="")
    if step.kind == "text":
        return TextBlock(type="text", text="")
    return ToolUseBlock(type="tool_use", id=step.id, name=step.name, input={})


def _delta(kind: str, text: str) -> Any:
    if kind == "thought":
        return ThinkingDelta(type="thinking_delta", thinking=text)
    if kind == "text":
        return TextDelta(type="text_delta", text=text)
    return InputJSONDelta(type="input_json_delta", partial_json=text)


MESSAGES = MessagesDialect()
