"""Removal of notes that coding agents write around a user's request, because a decision must not read them.

Agents send notes to their model inside the user's turns: reminders, a description of the environment, output of
commands. A decision trained on questions would read pages of such notes for a line of request. Only tags that agents
write are removed. A `<context>` may be part of a question, and stays.
"""

import re
from collections.abc import Sequence
from typing import Any

from .chat import text_of

_NOTES = (
    "system-reminder", "system_reminder",  # Claude Code, OpenCode
    "local-command-stdout", "local-command-stderr", "local-command-caveat", "command-name", "command-message",
    "ide_opened_file", "ide_selection", "ide_diagnostics",
    "environment_context", "user_instructions", "turn_aborted",  # Codex
    "environment_details",  # Cline, Roo Code
    "reminderInstructions", "editorContext", "workspace_info", "environment_info",  # Copilot
    "additional_data", "open_and_recently_viewed_files", "system_notification",  # Cursor
)  # fmt: skip
_REQUESTS = ("user_query", "userRequest", "user-request")
"""Tags around the request itself. Text outside of them is the agent's."""

_OPENING = re.compile(rf"<({'|'.join(map(re.escape, (*_NOTES, *_REQUESTS)))})(?:\s[^<>]*)?>")
_TASKS = ("task", "feedback", "answer", "user_message")  # tags of Cline, which may also occur in a question
_INSTRUCTIONS = ("# AGENTS.md instructions", "</INSTRUCTIONS>")


def without_reminders(text: str) -> str:
    """Return a user's own text without an agent's notes around it, or an empty text if all of it is notes.

    Args:
        text: Text of one message of the role user.
    """
    if "</" not in text:  # the fast path for nearly all texts
        return text
    rest, requests = _without_tags(_without_instructions(text))
    if requests:
        return "\n\n".join(requests)
    if rest == text:
        return text
    rest = rest.strip()
    for tag in _TASKS:
        if rest.startswith(f"<{tag}>") and rest.endswith(f"</{tag}>"):
            return rest[len(tag) + 2 : -len(tag) - 3].strip()
    return rest


def _without_tags(text: str) -> tuple[str, list[str]]:
    """Return a text without notes, and the requests in it that have tags of their own.

    A single regular expression would scan the rest of the text for each opening tag without a closing one.
    """
    kept, requests, place = [], [], 0
    last = {tag: text.rfind(f"</{tag}>") for tag in (*_NOTES, *_REQUESTS)}
    for found in _OPENING.finditer(text):
        tag = found[1]
        if found.start() < place or last[tag] < found.end():
            continue
        end = text.index(f"</{tag}>", found.end())
        kept.append(text[place : found.start()])
        if tag in _REQUESTS:
            requests.append(text[found.end() : end].strip())
        place = end + len(tag) + 3
    return "".join([*kept, text[place:]]), requests


def _without_instructions(text: str) -> str:
    """Return a text without the instructions file that Codex puts before a request."""
    opening, closing = _INSTRUCTIONS
    start, end = text.find(opening), text.find(closing)
    return text if start < 0 or end < start else text[:start] + text[end + len(closing) :]


def unnoted(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Return a conversation without an agent's notes in the user's turns, and the number of their characters.

    Args:
        messages: Messages with roles and texts.
    """
    found, notes = [], 0
    for message in messages:
        text = without_reminders(message["content"]) if message["role"] == "user" else message["content"]
        notes += len(message["content"]) - len(text)
        if text or message["content"] == text:
            found.append(message | {"content": text})
    return (found, notes) if any(message["role"] == "user" for message in found) else (messages, 0)


def _is_picture(message: dict[str, Any]) -> bool:
    """Check whether a message consists of media alone, the form in which a tool's pictures follow its result."""
    content = message.get("content")
    return isinstance(content, list) and not any(
        part.get("type") == "text" for part in content if isinstance(part, dict)
    )


def is_open_call(messages: Sequence[dict[str, Any]]) -> bool:
    """Check whether the assistant's last tool calls are open, with nothing but their results behind them.

    Args:
        messages: Messages of the conversation.
    """
    for message in reversed(messages):
        role = message.get("role")
        if role == "assistant":
            return bool(message.get("tool_calls"))
        if role == "user" and not _is_picture(message) and without_reminders(text_of(message, placeholders=True)):
            return False
    return False
