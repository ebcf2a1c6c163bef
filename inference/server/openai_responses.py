"""OpenAI's Responses API (`POST /v1/responses`), translated to the chat API and back.

Responses are built from the client library's own types. The server stores nothing: clients send the whole input, as
agents do (`store: false`). Tools of OpenAI's servers are dropped, since no expert here has them. Functions are passed
on.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from openai.types import responses as r
from openai.types.responses.response import IncompleteDetails
from openai.types.responses.response_content_part_added_event import PartReasoningText
from openai.types.responses.response_content_part_done_event import PartReasoningText as WholeReasoningText
from openai.types.responses.response_reasoning_item import Content
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic import ConfigDict, Field

from ...modeling.backend import Piece
from ...modeling.errors import ExpertokenError
from ..backends.wire import sendable
from .blocks import Added, Closed, Opened, steps_of, thought_of
from .completions import Completion, public
from .dialect import event
from .schema import (
    OURS,
    CacheKey,
    ChatRequest,
    Extension,
    MaxTokens,
    Metadata,
    Model,
    ParallelCalls,
    RequestBody,
    Stream,
    Temperature,
    ToolChoice,
    Tools,
    TopP,
)

_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_DONE_ELSEWHERE = (
    "web_search_call",
    "file_search_call",
    "code_interpreter_call",
    "image_generation_call",
)
"""Calls of tools on OpenAI's servers, in a conversation that began there. The answer after a call has its result."""

_INCOMPLETE: dict[str, Literal["max_output_tokens", "content_filter"]] = {
    "length": "max_output_tokens",
    "content_filter": "content_filter",
}


_STORED = "Refused, because the server stores no conversations."


class ResponsesRequest(RequestBody):
    """Body of `POST /v1/responses`. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: Model
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)] = Field(
        description="Question, or the items of a conversation, with the oldest first."
    )
    instructions: str | None = Field(None, description="System prompt.")
    previous_response_id: str | None = Field(None, description=_STORED)
    conversation: Any = Field(None, description=_STORED)
    background: bool = Field(default=False, description=_STORED)
    stream: Stream = False
    max_output_tokens: MaxTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: ParallelCalls = None
    reasoning: dict[str, Any] | None = Field(None, description="`effort` is forwarded to endpoints.")
    text: dict[str, Any] | None = Field(
        None, description="Format of the answer. Experts that can't keep to a JSON schema are skipped."
    )
    metadata: Metadata = None
    prompt_cache_key: CacheKey = None
    expertoken: Extension = Field(default_factory=Extension, description=OURS)

    @property
    def functions(self) -> list[dict[str, Any]]:
        """Tools that an expert can call."""
        return [tool for tool in self.tools or () if tool.get("type") == "function"]

    def chat(self) -> ChatRequest:
        """Return the request in the form of the chat API.

        Raises:
            ExpertokenError: The request needs stored state, or holds content that can't be passed on to experts.
        """
        if self.previous_response_id or self.conversation or self.background:
            raise ExpertokenError(
                "previous_response_id, conversation, background: nothing is stored here. Send the whole input."
            )
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages += _joined(one for place, item in enumerate(items) for one in _messages(item, f"input[{place}]"))
        keys = ("name", "description", "parameters", "strict")
        tools = [
            {"type": "function", "function": {key: tool[key] for key in keys if tool.get(key) is not None}}
            for tool in self.functions
        ]
        choice: Any = self.tool_choice
        if isinstance(choice, dict):
            choice = {"type": "function", "function": {"name": choice.get("name")}} if choice.get("name") else "auto"
        effort = (self.reasoning or {}).get("effort")
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": messages,
                "stream": self.stream,
                "max_completion_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "tools": tools or None,
                "tool_choice": choice if tools else None,
                "parallel_tool_calls": self.parallel_tool_calls if tools else None,
                "response_format": _answer_format((self.text or {}).get("format")),
                "reasoning_effort": effort if isinstance(effort, str) else None,
                "metadata": self.metadata,
                "prompt_cache_key": self.prompt_cache_key,
                "expertoken": self.expertoken,
            }
        )


def _answer_format(given: Any) -> dict[str, Any] | None:
    if not isinstance(given, dict) or given.get("type") not in ("json_schema", "json_object"):
        return None
    if given["type"] == "json_object":
        return {"type": "json_object"}
    schema = {key: given[key] for key in ("name", "schema", "strict", "description") if given.get(key) is not None}
    return {"type": "json_schema", "json_schema": schema}


def _messages(item: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Return the chat messages of an item, or none if no other expert can read the item."""
    kind = str(item.get("type", "message"))
    if kind == "message":
        return [{"role": item.get("role"), "content": _content(item.get("content"), place)}]
    if kind in ("function_call", "custom_tool_call"):
        # The free text of a custom tool call becomes an argument of a function call.
        arguments = item.get("arguments") or json.dumps({"input": item["input"]} if "input" in item else {})
        function = {"name": str(item.get("name")), "arguments": str(arguments)}
        call = {"id": str(item.get("call_id")), "type": "function", "function": function}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}]
    if kind in ("function_call_output", "custom_tool_call_output"):
        told = _content(item.get("output"), place)
        parts = [] if isinstance(told, str) else told
        text = told if isinstance(told, str) else "\n".join(part["text"] for part in parts if part["type"] == "text")
        result = {"role": "tool", "tool_call_id": str(item.get("call_id")), "content": text or "(no text)"}
        # In the chat API tool results are text, so their pictures follow in a message of the user.
        shown = [part for part in parts if part["type"] != "text"]
        return [result, {"role": "user", "content": shown}] if shown else [result]
    if kind == "reasoning" or kind in _DONE_ELSEWHERE:
        return []
    raise ExpertokenError(
        f"{place}.type: expected message, function_call, function_call_output or reasoning, got {kind[:40]!r}"
    )


def _content(content: Any, place: str) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ExpertokenError(f"{place}.content: expected text, or a list of parts")
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        if part.get("type") in _TEXTS:
            parts.append({"type": "text", "text": str(part.get("text") or "")})
        elif part.get("type") == "refusal":
            parts.append({"type": "text", "text": str(part.get("refusal") or "")})
        elif part.get("type") == "input_image" and isinstance(part.get("image_url"), str):
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
        else:
            kind = str(part.get("type"))[:40]
            raise ExpertokenError(
                f"{place}.content[{number}]: expected input_text, output_text or input_image, got {kind!r}"
            )
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(texts) if len(texts) == len(parts) else parts


def _joined(messages: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge the text and the calls of each answer into one message, as the chat API has them."""
    found: list[dict[str, Any]] = []
    for message in messages:
        last = found[-1] if found else {}
        if message["role"] == "assistant" == last.get("role") and not isinstance(last.get("content"), list):
            if message.get("tool_calls"):
                last.setdefault("tool_calls", []).extend(message["tool_calls"])
            elif message["content"]:
                last["content"] = (
                    f"{last['content']}\n{message['content']}" if last.get("content") else message["content"]
                )
        else:
            found.append(message)
    return found


@dataclass
class _Item:
    """Item of the output while it streams.

    Attributes:
        id: Id of the item.
        kind: Kind of its block.
        call: Id of a call, which the client's result refers to.
        name: Name of the function.
        text: Text so far.
    """

    id: str
    kind: str
    call: str = ""
    name: str = ""
    text: str = ""

    def model(self, status: Literal["in_progress", "completed", "incomplete"]) -> Any:
        """Return the item in the library's type."""
        if self.kind == "call":
            return r.ResponseFunctionToolCall(
                id=self.id, type="function_call", call_id=self.call, name=self.name, arguments=self.text, status=status
            )
        if self.kind == "thought":
            content = [Content(type="reasoning_text", text=self.text)] if self.text else []
            return r.ResponseReasoningItem(id=self.id, type="reasoning", summary=[], content=content, status=status)
        text = [self.part()] if self.text or status != "in_progress" else []
        return r.ResponseOutputMessage(id=self.id, type="message", role="assistant", content=text, status=status)

    def part(self) -> Any:
        """Return the text of an item in the library's type."""
        return r.ResponseOutputText(type="output_text", text=self.text, annotations=[])


@dataclass
class _Output:
    """Output while it streams.

    Attributes:
        completion: Answers to the request.
        items: Items so far.
    """

    completion: Completion
    items: list[_Item] = field(default_factory=list)
    _sent: int = -1

    @property
    def number(self) -> int:
        """Number of the next event. Each read increments it."""
        self._sent += 1
        return self._sent

    def add(self, opened: Opened) -> _Item:
        """Add an item for a block and return it."""
        prefix = {"text": "msg", "thought": "rs", "call": "fc"}[opened.kind]
        name = f"{prefix}_{self.completion.id.removeprefix('chatcmpl-')}_{len(self.items)}"
        self.items.append(_Item(name, opened.kind, opened.id, opened.name))
        return self.items[-1]

    def response(self, finish: str | None = None, *, done: bool = False) -> r.Response:
        """Return the response so far."""
        request, cut = self.completion.request, _INCOMPLETE.get(finish or "")
        status: Any = "in_progress" if not done else "incomplete" if cut else "completed"
        # Names only: the other fields are the client's and may hold anything.
        names = [str((tool.get("function") or {}).get("name")) for tool in request.tools or ()]
        tools = [{"type": "function", "name": sendable(n), "strict": None, "parameters": None} for n in names]
        response = r.Response.construct(
            id=self.completion.id.replace("chatcmpl-", "resp_"),
            object="response",
            created_at=self.completion.created,
            model=request.model,
            status=status,
            error=None,
            incomplete_details=IncompleteDetails(reason=cut) if cut and done else None,
            instructions=None,
            metadata={sendable(n): sendable(v) for n, v in (request.metadata or {}).items() if isinstance(v, str)},
            output=[item.model("completed") for item in self.items] if done else [],
            parallel_tool_calls=request.parallel_tool_calls is not False,
            temperature=request.temperature,
            top_p=request.top_p,
            max_output_tokens=request.max_completion_tokens,
            previous_response_id=None,
            tool_choice=request.tool_choice or "auto",
            tools=tools,
            usage=_usage(self.completion) if done else None,
        )
        if done and request.expertoken.show:
            response = response.model_copy(update={"expertoken": [self.completion.shown(self.completion.replies[0])]})
        return response


def _usage(completion: Completion) -> r.ResponseUsage:
    usage = completion.usage()
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    thought = usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return r.ResponseUsage(
        input_tokens=usage["prompt_tokens"],
        input_tokens_details=InputTokensDetails.construct(cached_tokens=cached),
        output_tokens=usage["completion_tokens"],
        output_tokens_details=OutputTokensDetails.construct(reasoning_tokens=thought),
        total_tokens=usage["total_tokens"],
    )


class ResponsesDialect:
    """Form of the answers of OpenAI's Responses API."""

    def whole(self, completion: Completion, body: dict[str, Any]) -> dict[str, Any]:
        """Return the response, not streamed."""
        [choice] = body["choices"]
        told, output = choice["message"], _Output(completion)
        if thought := thought_of(told):
            output.add(Opened("thought")).text = thought
        if told["content"]:
            output.add(Opened("text")).text = told["content"]
        for call in told.get("tool_calls", ()):
            output.add(Opened("call", call["id"], call["function"]["name"])).text = call["function"]["arguments"]
        return output.response(choice["finish_reason"], done=True).model_dump(exclude_unset=True)

    async def events(
        self, completion: Completion, pieces: AsyncGenerator[tuple[int, Piece], None]
    ) -> AsyncGenerator[str, None]:
        """Yield the response as server-sent events."""
        output = _Output(completion)
        begun = output.response()
        yield event(
            r.ResponseCreatedEvent.construct(type="response.created", response=begun, sequence_number=output.number)
        )
        yield event(
            r.ResponseInProgressEvent.construct(
                type="response.in_progress", response=begun, sequence_number=output.number
            )
        )
        try:
            async for step in steps_of(pieces):
                item = output.add(step) if isinstance(step, Opened) else output.items[-1]
                where = {"item_id": item.id, "output_index": len(output.items) - 1}
                for told in _told(step, item, where):
                    yield event(told.model_copy(update={"sequence_number": output.number}))
        except ExpertokenError as error:
            for text in self.broken(public(error)):
                yield text
            return
        finish = completion.replies[0].finish
        last, kind = output.response(finish, done=True), "incomplete" if finish in _INCOMPLETE else "completed"
        ended = r.ResponseIncompleteEvent if kind == "incomplete" else r.ResponseCompletedEvent
        yield event(ended.construct(type=f"response.{kind}", response=last, sequence_number=output.number))

    def broken(self, message: str) -> list[str]:
        """Return the events that end a stream whose answer can't continue."""
        error = r.ResponseErrorEvent(
            type="error", code="answer_broke_off", message=message, param=None, sequence_number=0
        )
        return [event(error)]


def _told(step: Opened | Added | Closed, item: _Item, where: dict[str, Any]) -> list[Any]:
    """Return the events of a step. Their numbers are set later."""
    index = {"output_index": where["output_index"]}
    inside = where | {"content_index": 0}
    if isinstance(step, Opened):
        model = item.model("in_progress")
        events: list[Any] = [
            r.ResponseOutputItemAddedEvent.construct(type="response.output_item.added", item=model, **index)
        ]
        if item.kind != "call":
            part = item.part() if item.kind == "text" else PartReasoningText(type="reasoning_text", text="")
            events.append(
                r.ResponseContentPartAddedEvent.construct(type="response.content_part.added", part=part, **inside)
            )
        return events
    if isinstance(step, Added):
        item.text += step.text
        if item.kind == "call":
            kind = "response.function_call_arguments.delta"
            return [r.ResponseFunctionCallArgumentsDeltaEvent.construct(type=kind, delta=step.text, **where)]
        if item.kind == "thought":
            kind = "response.reasoning_text.delta"
            return [r.ResponseReasoningTextDeltaEvent.construct(type=kind, delta=step.text, **inside)]
        kind = "response.output_text.delta"
        return [r.ResponseTextDeltaEvent.construct(type=kind, delta=step.text, logprobs=[], **inside)]
    return [*_ended(item, where, inside), _item_done(item, index)]


def _ended(item: _Item, where: dict[str, Any], inside: dict[str, Any]) -> list[Any]:
    if item.kind == "call":
        kind = "response.function_call_arguments.done"
        return [
            r.ResponseFunctionCallArgumentsDoneEvent.construct(type=kind, arguments=item.text, name=item.name, **where)
        ]
    if item.kind == "thought":
        part: Any = WholeReasoningText(type="reasoning_text", text=item.text)
        kind = "response.reasoning_text.done"
        first: Any = r.ResponseReasoningTextDoneEvent.construct(type=kind, text=item.text, **inside)
    else:
        part, kind = item.part(), "response.output_text.done"
        first = r.ResponseTextDoneEvent.construct(type=kind, text=item.text, logprobs=[], **inside)
    return [first, r.ResponseContentPartDoneEvent.construct(type="response.content_part.done", part=part, **inside)]


def _item_done(item: _Item, index: dict[str, Any]) -> Any:
    return r.ResponseOutputItemDoneEvent.construct(
        type="response.output_item.done", item=item.model("completed"), **index
    )


RESPONSES = ResponsesDialect()
