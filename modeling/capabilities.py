"""Capabilities that a request needs, and the candidates that can't serve it.

An expert's pool entry declares its capabilities: `supports` (a subset of `CAPABILITIES`), `context_length` and
`max_output_tokens`. An endpoint without these fields may receive any request. A model in this process answers in text
only, unless its entry declares more.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .experts import CAPABILITIES, Expert

if TYPE_CHECKING:  # reading a pool must not import numpy
    from .backend import Generation
    from .chat import Message

_PARTS = {"image_url": "images", "input_image": "images", "image": "images"}  # types of content parts
_FORMATS = ("json_schema", "json_object")  # values of `response_format.type`
_VERBS = {"tools": "call tools", "images": "read images", "json_schema": "hold to a JSON schema"}


@dataclass(frozen=True)
class Needs:
    """Requirements of a request.

    Attributes:
        capabilities: Subset of `CAPABILITIES`.
        tokens: Approximate tokens of the conversation. 0 if they were not counted.
    """

    capabilities: frozenset[str] = frozenset()
    tokens: int = 0

    @classmethod
    def of(cls, messages: "Sequence[Message]", generation: "Generation | None" = None, tokens: int = 0) -> "Needs":
        """Return the requirements of a conversation and of the form of its answer.

        Args:
            messages: Messages of the conversation.
            generation: Options of the answer, or None for a request of the decision alone.
            tokens: Approximate tokens of the conversation.
        """
        extra = {} if generation is None else generation.extra
        found = {_PARTS[kind] for message in messages for kind in _parts(message) if kind in _PARTS}
        if wants_tools(extra):
            found.add("tools")
        answer_format = extra.get("response_format")
        if isinstance(answer_format, dict) and answer_format.get("type") in _FORMATS:
            found.add("json_schema")
        return cls(frozenset(found), tokens)


def wants_tools(extra: Mapping[str, Any]) -> bool:
    """Check whether a request's further parameters let the model call tools."""
    return bool(extra.get("tools")) and extra.get("tool_choice") != "none"


def _parts(message: "Message") -> list[Any]:
    content = message.get("content")
    return [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def why_unable(expert: Expert, needs: Needs) -> str | None:
    """Return the reason why an expert can't serve a request, in one line without its name, or None if it may."""
    known = expert.capabilities
    for name in CAPABILITIES:  # a fixed order, so that the same request gives the same reason
        if known is not None and name in needs.capabilities and name not in known:
            return f"can't {_VERBS[name]}"
    if expert.context_length is not None and needs.tokens >= expert.context_length:
        return f"reads {expert.context_length} tokens, and the conversation has about {needs.tokens}"
    return None


def unable(experts: Iterable[Expert], needs: Needs) -> dict[str, str]:
    """Return the reasons, by expert name, why experts can't serve a request."""
    reasons = ((expert.name, why_unable(expert, needs)) for expert in experts)
    return {name: reason for name, reason in reasons if reason is not None}
