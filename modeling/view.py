"""The decision view: the part of a conversation that a decision reads.

The user's newest request is read whole, without an agent's notes around it (`reminders`). The surrounding text (system
prompt, earlier turns, tool results) is read as far as a budget allows, with the newest first. So a conversation is
never too long for a decision, even if only one expert can read all of it. Training, evaluation and serving read the
same view.
"""

import datetime
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from .chat import Message, Query, as_messages, encode_chat, encode_text, plain, prints_date, sight_of
from .errors import ExpertFailedError, ExpertokenError
from .pictures import MARK, Picture, marked, marks_in, parts_of, without_marks
from .reminders import unnoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUT = "\n[...]\n"
"""Mark at the place where a text was cut."""

_MARGIN = 8  # tokens of a message besides its text: role and control tokens
_PLACEHOLDERS = re.compile(rf"((\[\w+\]|{MARK})\n?)+")
_LEAST = 16  # tokens of a text below which nothing of it is kept
_CHARACTERS = 4  # approximate characters of a token, for omitted text whose tokens are not counted


@dataclass(frozen=True)
class View:
    """Limits on the text that a decision reads.

    Attributes:
        context_tokens: Limit on the tokens around the newest request.
        date: Date (ISO) for chat templates that print one. With the present date a composite would read other prompts
            each day than in its training.
    """

    context_tokens: int = 1024
    date: str = "2026-01-01"

    def __post_init__(self) -> None:
        try:
            datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise ExpertokenError(f"view.date: expected a date such as 2026-01-01, got {self.date!r}") from None

    def read(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        conversation: str | Sequence[Message],
        vocab_size: int,
        most: int,
    ) -> Query:
        """Return a conversation as the meta LLM reads it. `Query.cut` is the approximate number of omitted tokens.

        Args:
            tokenizer: Tokenizer with a chat template.
            conversation: Messages of the conversation.
            vocab_size: V, the number of rows in the model's own head.
            most: Limit on the tokens that the meta LLM reads.

        Raises:
            ExpertokenError: The conversation is malformed, or the template refuses even the request alone.
            ExpertFailedError: The tokenizer has no chat template, or returns ids without a row in the model's head.
        """
        messages, sight = as_messages(conversation), sight_of(tokenizer)
        pictures: list[Picture] = []
        if sight is not None:
            messages, pictures = marked(messages)
        messages, notes = unnoted(plain(messages, placeholders=True))
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        # A tool's pictures follow its result as media in a message of the user. They are no request.
        tool_media = [
            i
            for i in asked
            if i and messages[i - 1]["role"] == "tool" and _PLACEHOLDERS.fullmatch(messages[i]["content"])
        ]
        newest = max([i for i in asked if i not in tool_media] or asked, default=len(messages) - 1)
        room = most - _frame(tokenizer, vocab_size)
        refused: ExpertokenError | None = None
        today, dated = datetime.date.fromisoformat(self.date), prints_date(tokenizer)
        for shrunken in (room, room // 2, room // 4):  # a text may take more tokens in the conversation than alone
            reading = _Reading(tokenizer, messages, newest, notes, pictures)
            reading.keep(newest, shrunken, always=True)
            reading.surround(min(self.context_tokens, shrunken - reading.tokens))
            for kept, cut, folding in reading.readings():
                try:
                    ids = encode_chat(tokenizer, kept, vocab_size, today=today, pictures=pictures)
                except ExpertFailedError:
                    raise
                except ExpertokenError as error:
                    refused = error
                    continue
                if len(ids) <= most:
                    shown = (part for message in kept for part in parts_of(message["content"], pictures))
                    media = tuple(part for part in shown if isinstance(part, Picture))
                    return replace(Query.of(ids), media=media, cut=cut, folded=folding, dated=dated)
        raise refused or ExpertokenError(f"expected a newest request of at most {most} tokens, got a longer one")


_FRAMES: "WeakKeyDictionary[PreTrainedTokenizerBase, int]" = WeakKeyDictionary()


def _frame(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> int:
    """Return the number of a minimal conversation's tokens, which the template writes around any conversation."""
    if tokenizer not in _FRAMES:
        _FRAMES[tokenizer] = len(encode_chat(tokenizer, [{"role": "user", "content": "?"}], vocab_size)) - 1
    return _FRAMES[tokenizer]


class _Reading:
    """The kept part of a conversation, message by message."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: Sequence[Message],
        newest: int,
        notes: int = 0,
        pictures: Sequence[Picture] = (),
    ) -> None:
        self._tokenizer, self._messages, self._newest = tokenizer, messages, newest
        self._pictures = pictures
        self._texts: dict[int, str] = {}
        self.tokens = 0
        self.cut = notes and max(1, notes // _CHARACTERS)

    def keep(self, index: int, room: int, *, always: bool = False) -> int:
        """Keep as much of a message as fits into `room` tokens, and return its number of tokens.

        The message keeps all of its pictures, or a placeholder for each.
        """
        text = self._messages[index]["content"]
        margin = 0 if always else _MARGIN  # the frame already contains the request's margin
        taken = self._taken(text)
        if taken and room - margin - taken < _LEAST:
            text, taken, self.cut = without_marks(text), 0, self.cut + taken
        if room - margin < _LEAST and not always:
            self.cut += max(1, len(text) // _CHARACTERS)
            return 0
        kept, count, cut = self._cut(text, max(room - margin - taken, _LEAST))
        if taken and cut:
            kept = "\n".join([*(mark for mark in marks_in(text) if mark not in kept), kept])
        self._texts[index] = kept
        self.tokens += count + taken + margin
        self.cut += cut
        return count + taken + margin

    def _taken(self, text: str) -> int:
        """Return the number of tokens of a text's pictures."""
        sight = sight_of(self._tokenizer)
        if not self._pictures or sight is None:
            return 0
        return sum(sight.tokens_of(part) for part in parts_of(text, self._pictures) if isinstance(part, Picture))

    def surround(self, room: int) -> None:
        """Keep as much as fits of the messages behind the newest request, then of those before it, newest first."""
        for index in [*range(len(self._messages) - 1, self._newest, -1), *range(self._newest - 1, -1, -1)]:
            room -= self.keep(index, room)

    def _cut(self, text: str, room: int) -> tuple[str, int, int]:
        """Return a text without its middle if it exceeds `room` tokens, its number of tokens, and the number cut."""
        half = max(1, (room - len(CUT)) // 2)
        # Only the two ends of a text of megabytes are tokenised: 16 characters per token are enough for most texts.
        ends = text if len(text) <= 32 * room else text[: 16 * room] + text[-16 * room :]
        count = self._count(ends)
        if ends is text and count <= room:
            return text, count, 0
        head, tail = ends[:half], ends[-half:]  # no token is shorter than a character
        if self._tokenizer.is_fast:
            encoded = encode_text(self._tokenizer, ends, offsets=True)
            offsets = encoded["offset_mapping"]
            if len(offsets) >= 2 * half:
                head, tail = ends[: offsets[half - 1][1]], ends[offsets[len(offsets) - half][0] :]
        kept = head + CUT + tail
        left_out = (len(text) - len(ends)) // _CHARACTERS + max(1, count - 2 * half)
        return kept, self._count(kept), left_out

    def _count(self, text: str) -> int:
        return len(encode_text(self._tokenizer, text).input_ids)

    def readings(self) -> Iterator[tuple[list[Message], int, bool]]:
        """Yield the readings to try in turn: messages, the number of tokens cut, and whether roles were folded.

        They are the unchanged messages, the messages with roles that any template accepts, and the request alone.
        """
        kept = [self._messages[index] | {"content": self._texts[index]} for index in sorted(self._texts)]
        yield kept, self.cut, False
        yield folded(kept), self.cut, True
        others = sum(len(text) for index, text in self._texts.items() if index != self._newest)
        yield [{"role": "user", "content": self._texts[self._newest]}], self.cut + others // _CHARACTERS, True


def folded(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation of user and assistant in turn, which starts and ends with the user.

    Templates refuse what their model was not trained for: a system prompt, tool results, two messages of one role in a
    row. Everything except the assistant's answers becomes part of the user's next message.
    """
    found: list[Message] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" and found else "user"
        if found and found[-1]["role"] == role:
            found[-1] = {"role": role, "content": f"{found[-1]['content']}\n\n{message['content']}"}
        else:
            found.append({"role": role, "content": message["content"]})
    if found[-1]["role"] == "assistant":
        answer = found.pop()
        found[-1] = {"role": "user", "content": f"{found[-1]['content']}\n\n{answer['content']}"}
    return found
