"""Tools for local models: their chat template writes the calls, and transformers parses them."""

import json
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ...modeling.backend import Piece
from ...modeling.chat import Message, apart, as_messages, control_tokens, plain
from ...modeling.errors import ExpertFailedError, RequestRefusedError, one_line
from ...modeling.locks import exclusive

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_with_tools(
    tokenizer: "PreTrainedTokenizerBase", conversation: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> list[int]:
    """Return the token ids of a conversation whose answer may call tools.

    No text becomes a control token of the template: message texts, names, descriptions and arguments are sanitised.

    Args:
        tokenizer: Tokenizer with a chat template that supports tools, and a `response_template`.
        conversation: Messages, with earlier calls and their results.
        tools: Tools in the form of OpenAI's API.

    Raises:
        ExpertFailedError: The tokenizer does not support tools.
        RequestRefusedError: The template refuses the conversation.
    """
    if "tools" not in str(tokenizer.chat_template) or getattr(tokenizer, "response_template", None) is None:
        raise ExpertFailedError(
            f"{tokenizer.name_or_path}: expected a chat template with tools and a `response_template` "
            "in its tokenizer, found none. Remove `tools` from the expert's `supports`."
        )
    control = control_tokens(tokenizer)
    given = as_messages(conversation)
    messages = [_with_calls(text, message, control) for text, message in zip(plain(given), given, strict=True)]
    known: Any = tokenizer
    known.chat_control_tokens = control
    try:
        with exclusive(tokenizer):
            ids: Any = known.apply_chat_template(
                messages,
                tools=_sane(list(tools), control),
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=True,
            )
    except Exception as error:  # a template's own errors, of any kind
        raise RequestRefusedError(f"its chat template refuses this conversation ({one_line(error)})") from error
    return list(ids)


def _with_calls(text: Message, message: Message, control: Sequence[str]) -> Message:
    """Return a message with its calls in the form of chat templates, in which arguments are objects."""
    if message.get("tool_call_id"):
        return text | {"tool_call_id": apart(str(message["tool_call_id"]), control)}
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return text
    found = []
    for call in calls:
        function = call.get("function") or {} if isinstance(call, dict) else {}
        try:
            arguments = json.loads(function.get("arguments") or "{}")
        except ValueError:
            arguments = {}
        found.append({"type": "function", "function": {"name": function.get("name"), "arguments": arguments}})
    content = message.get("content")
    return {"role": "assistant", "content": text["content"] if content else "", "tool_calls": _sane(found, control)}


def _sane(thing: Any, control: Sequence[str]) -> Any:
    """Return JSON in which no text is a control token."""
    if isinstance(thing, dict):
        return {apart(str(key), control): _sane(value, control) for key, value in thing.items()}
    if isinstance(thing, list):
        return [_sane(value, control) for value in thing]
    return apart(thing, control) if isinstance(thing, str) else thing


async def read_calls(
    pieces: AsyncGenerator[Piece, None],
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Sequence[int],
    tools: Sequence[Mapping[str, Any]],
) -> AsyncGenerator[Piece, None]:
    """Yield an answer with its thought and its calls separated.

    The answer is parsed once it is complete.

    Args:
        pieces: Pieces of the answer, special tokens included.
        tokenizer: Tokenizer that encoded the prompt.
        prompt: Token ids of the prompt.
        tools: Tools that may be called.
    """
    text, last = "", Piece(finish="stop")
    async with aclosing(pieces):
        async for piece in pieces:
            text += piece.text
            if piece.finish is not None:
                last = piece
    known: Any = tokenizer
    try:
        message = known.parse_response(text, prefix=known.decode(list(prompt)), tools=list(tools))
    except Exception as error:  # for example, a call that is no JSON
        raise ExpertFailedError(f"the calls in its answer can't be parsed ({one_line(error)})") from error
    thought = message.get("reasoning_content") or message.get("thinking") or message.get("reasoning")
    if thought:
        yield Piece(thought={"reasoning_content": str(thought)})
    if content := message.get("content"):
        yield Piece(str(content))
    calls = [
        {
            "index": index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": str(call["function"]["name"]),
                "arguments": json.dumps(call["function"].get("arguments") or {}),
            },
        }
        for index, call in enumerate(message.get("tool_calls") or ())
    ]
    if calls:
        yield Piece(tool_calls=calls)
    yield Piece(finish="tool_calls" if calls else last.finish, usage=last.usage)
