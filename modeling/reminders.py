"""What coding agents write around a user's request: it is not the user's, and a decision does not read it.

Agents send notes to their model inside the user's turns: reminders, a description of the environment, output of
commands. A decision trained on questions would read pages of such notes for a line of request. Only tags that agents
write are known here; a `<context>` of a question may be part of it, and stays.
"""

import re
from collections.abc import Sequence
from typing import Any

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
"""Tags around the request itself; what stands outside of them is the agent's."""

_NOTE = re.compile(rf"<({'|'.join(map(re.escape, _NOTES))})(?:\s[^<>]*)?>.*?</\1>", re.DOTALL)
_REQUEST = re.compile(rf"<({'|'.join(map(re.escape, _REQUESTS))})>(.*?)</\1>", re.DOTALL)
_TASK = re.compile(r"\A\s*<(task|feedback|answer|user_message)>\s*(.*?)\s*</\1>\s*\Z", re.DOTALL)
_INSTRUCTIONS = re.compile(r"# AGENTS\.md instructions[^\n]*\n+<INSTRUCTIONS>.*?</INSTRUCTIONS>", re.DOTALL)


def without_reminders(text: str) -> str:
    """Return what a user wrote, without what an agent wrote around it; empty where the agent wrote all of it.

    Args:
        text: of one message of the role user.
    """
    if "</" not in text:  # as nearly all texts
        return text
    found = [match[2].strip() for match in _REQUEST.finditer(text)]
    if found:
        return "\n\n".join(found)
    rest = _INSTRUCTIONS.sub("", _NOTE.sub("", text))
    if rest == text:
        return text
    rest = rest.strip()
    whole = _TASK.match(rest)  # Cline's tags, which are words that a question may be marked up with, too
    return whole[2] if whole else rest


def unnoted(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Return a conversation without what an agent wrote into the user's turns, and how many characters that was.

    Args:
        messages: roles and texts.
    """
    found, notes = [], 0
    for message in messages:
        text = without_reminders(message["content"]) if message["role"] == "user" else message["content"]
        notes += len(message["content"]) - len(text)
        if text or message["content"] == text:
            found.append(message | {"content": text})
    return (found, notes) if any(message["role"] == "user" for message in found) else (messages, 0)


def is_open_call(messages: Sequence[dict[str, Any]], text_of: Any) -> bool:
    """Return whether the assistant's last tool calls are open: nothing but their results has followed.

    Args:
        messages: the conversation.
        text_of: reads a message's text.
    """
    for message in reversed(messages):
        role = message.get("role")
        if role == "assistant":
            return bool(message.get("tool_calls"))
        if role == "user" and without_reminders(text_of(message)):
            return False
    return False
