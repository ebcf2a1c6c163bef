"""Conversations as token ids, safe against users who type control tokens."""

import datetime
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from .errors import ExpertFailedError, ExpertokenError, one_line
from .locks import exclusive
from .pictures import marked

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from .pictures import Picture
    from .sight import Sight

Message = dict[str, Any]
"""One chat message: `role` (system, user, assistant or tool) and `content`, a text or a list of parts.

A part is `{"type": "text", "text": ...}`, as OpenAI's API has it, or a picture as `pictures.picture_of` reads it; other
types reach experts behind an endpoint as they are.
"""

Ids = np.ndarray[Any, np.dtype[np.int32]]
"""Token ids `[T]`: Python's integers take nine times the memory."""


@dataclass(frozen=True, eq=False)
class Query:
    """A conversation as the meta LLM reads it, up to the position whose state decides.

    Attributes:
        ids: token ids `[T]`.
        media: pictures, in the order of their tokens in `ids`.
        cut: tokens of the conversation that were left out, about.
        folded: whether roles were changed for the chat template's sake.
        dated: whether the chat template prints a date, which is another one than today.
    """

    ids: Ids
    media: "tuple[Picture, ...]" = ()
    cut: int = 0
    folded: bool = False
    dated: bool = False

    @property
    def whole(self) -> bool:
        """Whether this is the conversation as it is, so that an answer may go on from it."""
        return not (self.cut or self.folded or self.dated)

    @classmethod
    def of(cls, ids: Sequence[int]) -> "Query":
        """Return the query of these token ids."""
        return cls(np.asarray(ids, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Query) and (self.key, self.cut) == (other.key, other.cut)

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> bytes:
        """Hash of all that the meta LLM reads, by which caches know the query."""
        digest = hashlib.blake2b(self.ids.tobytes(), digest_size=16)
        for part in self.media:
            digest.update(part.key)
        return digest.digest()

    def followed_by(self, ids: Sequence[int] | Ids) -> "Query":
        """Return the query whose state lies behind further tokens: the beginning of an answer."""
        return replace(self, ids=np.concatenate([self.ids, np.asarray(ids, dtype=np.int32)]))


ROLES = ("system", "developer", "user", "assistant", "tool")


def as_messages(conversation: str | Sequence[Message]) -> list[Message]:
    """A conversation as a list of messages; a string is one user message.

    Raises:
        ExpertokenError: there is no message, or one has no known role or no content.
    """
    expected = f"expected `role` ({', '.join(ROLES)}) and `content` (text, or a list of parts with `type`)"
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    messages = list(conversation)
    if not messages:
        raise ExpertokenError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        known = isinstance(message, dict) and message.get("role") in ROLES
        if not known or not (_is_content(message.get("content")) or _calls_tools(message)):
            raise ExpertokenError(f"messages[{index}]: {expected}")
        if not isinstance(message.get("tool_calls") or [], list):
            raise ExpertokenError(f"messages[{index}].tool_calls: expected a list")
    return messages


def _calls_tools(message: Message) -> bool:
    """An assistant's message may consist of tool calls alone."""
    return message["role"] == "assistant" and message.get("content") is None and bool(message.get("tool_calls"))


def _is_content(content: Any) -> bool:
    if not isinstance(content, list):
        return isinstance(content, str)
    parts = [part if isinstance(part, dict) else {} for part in content]
    return bool(parts) and all(
        isinstance(part.get("type"), str) and (part["type"] != "text" or isinstance(part.get("text"), str))
        for part in parts
    )


_TEXTS = ("text", "refusal")


def count_media(message: Message) -> int:
    """Return how many parts of a message are no text."""
    content = message.get("content")
    return sum(part["type"] not in _TEXTS for part in content) if isinstance(content, list) else 0


def text_of(message: Message, *, placeholders: bool = False) -> str:
    """A message's text, its parts on lines of their own; tool calls as `name(arguments)`.

    Args:
        message: the message.
        placeholders: let `[image_url]` and the like stand for parts that are no text.

    Raises:
        ExpertokenError: a part is something else than text, or the text is no Unicode.
    """
    content = message.get("content") or ""
    if not isinstance(content, str):
        for part in content:
            if part["type"] not in _TEXTS and not placeholders:
                # Not the type itself, which is whatever a user wrote: reasons are logged.
                raise ExpertokenError("a message has a part that is no text; models that run here read text only")
        content = "\n".join(
            str(part.get(part["type"])) if part["type"] in _TEXTS else f"[{part['type']}]" for part in content
        )
    calls = message.get("tool_calls")
    if not content and isinstance(calls, list):
        functions = [call.get("function") for call in calls if isinstance(call, dict)]
        content = "\n".join(f"{f.get('name')}({f.get('arguments')})" for f in functions if isinstance(f, dict))
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ExpertokenError(f"a message's text is no Unicode ({error.reason} at character {error.start})") from None
    return content


_AS = {"developer": "system"}  # OpenAI's newer name for it, which templates don't know


def sight_of(tokenizer: "PreTrainedTokenizerBase") -> "Sight | None":
    """Return what sees for the model of a tokenizer; None where it reads text only."""
    return getattr(tokenizer, "sight", None)


_CONTROL: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, list[str]]]" = WeakKeyDictionary()


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return what in a text would be one of the tokenizer's added tokens, and not what is written there."""
    size = len(tokenizer)
    known = _CONTROL.get(tokenizer)
    if known is None or known[0] != size:  # building the list takes milliseconds where there are thousands
        found = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        _CONTROL[tokenizer] = known = (size, found)
    return known[1]


_EXPERT = "<|expert:"


def apart(text: str, control: Sequence[str] = ()) -> str:
    """A text for tokenizers elsewhere that know the experts' tokens: what is written as one is none any more.

    Args:
        text: that somebody wrote.
        control: further tokens that it must not contain.
    """
    longest_first = sorted({_EXPERT, *control}, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: f"{found[0][:1]} {found[0][1:]}", text)


def plain(messages: Sequence[Message], *, placeholders: bool = False) -> list[Message]:
    """Roles and texts alone: what else a message holds a template may print, and only texts are sanitised."""
    return [{"role": _AS.get(m["role"], m["role"]), "content": text_of(m, placeholders=placeholders)} for m in messages]


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    conversation: str | Sequence[Message],
    vocab_size: int,
    *,
    begun: str = "",
    placeholders: bool = False,
    most: int | None = None,
    today: datetime.date | None = None,
    pictures: "Sequence[Picture]" = (),
) -> list[int]:
    """Token ids of a conversation up to the dispatch position: the end of the template's generation prompt.

    Text of the messages never becomes a control token of the template. Expert ids start at `vocab_size`, so no text
    can name them; that is checked all the same.

    Args:
        tokenizer: with a chat template.
        conversation: the messages.
        vocab_size: V.
        begun: an answer that is to be continued; the ids end behind it then.
        placeholders: see `text_of`.
        most: tokens; None for no limit.
        today: what the template prints where it prints the date; None for the present.
        pictures: that marks in the texts stand for, where the model sees; see `pictures.marked`.

    Raises:
        ExpertokenError: the template refuses the conversation, or it is longer than `most`.
        ExpertFailedError: the tokenizer has no chat template, or ids that the model has no row for.
    """
    if not tokenizer.chat_template:
        raise ExpertFailedError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; use an instruction-tuned model, or put a "
            "chat_template.jinja beside its tokenizer"
        )
    from jinja2 import TemplateError

    # Named ones and not transformers' default, which looks for them in the template's text and so misses those that a
    # template puts together from pieces (Phi-4-mini: '<|' + role + '|>').
    tokenizer.chat_control_tokens = control_tokens(tokenizer)
    messages = plain(as_messages(conversation), placeholders=placeholders)
    dated: dict[str, Any] = (
        {} if today is None or not prints_date(tokenizer) else {"chat_template": _dated(tokenizer, today)}
    )
    characters = sum(len(message["content"]) for message in messages)
    if most is not None and characters > most * _longest_token(tokenizer):  # seconds of work, only to be refused
        raise ExpertokenError(
            f"the conversation has {characters} characters, and so more than {most} tokens; at most {most} are read"
        )
    sight = sight_of(tokenizer)
    if sight is not None:
        # What is written as the token of a picture is none, also where the processor looks for it in the text.
        texts = [message | {"content": apart(message["content"], sight.tokens)} for message in messages]
        messages = sight.conversation(texts, pictures)
    try:
        ids: Any
        if sight is not None:
            ids = sight.ids(messages, **dated)
        else:
            with exclusive(tokenizer):
                ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True, **dated
                )
    except (TemplateError, ValueError) as error:
        # Templates refuse what their model was not trained for: a system message, two user messages in a row.
        raise ExpertokenError(
            f"{Path(tokenizer.name_or_path).name}: its chat template refuses this conversation ({one_line(error)})"
        ) from error
    if begun.strip():  # blanks alone are nothing to go on from
        ids = [*ids, *_begun_ids(tokenizer, messages, str(tokenizer.decode(ids[-_TAIL:])), begun)]
    if most is not None and len(ids) > most:
        raise ExpertokenError(f"the conversation has {len(ids)} tokens; at most {most} are read")
    if max(ids) >= vocab_size:
        raise ExpertFailedError(
            f"{tokenizer.name_or_path}: the tokenizer gives id {max(ids)}, but the model has {vocab_size} rows; they "
            "do not belong together"
        )
    return ids


def read_chat(
    tokenizer: "PreTrainedTokenizerBase", conversation: str | Sequence[Message], vocab_size: int, **options: Any
) -> Query:
    """Return a conversation as a model answers it, with its pictures where the model sees.

    Args:
        tokenizer: tokenizer with a chat template.
        conversation: the messages.
        vocab_size: V.
        **options: of `encode_chat`, as its errors are.
    """
    messages = as_messages(conversation)
    pictures: list[Picture] = []
    if sight_of(tokenizer) is not None:
        messages, pictures = marked(messages)
    ids = encode_chat(tokenizer, messages, vocab_size, pictures=pictures, **options)
    return replace(Query.of(ids), media=tuple(pictures))


_THOUGHT = ("<think>", "</think>")
_TAIL = 16  # tokens at the end of a prompt, in which it may begin a thought


def _without_control(text: str, control: Sequence[str]) -> Iterator[str]:
    """Yield a text in parts that hold no control token, also none that the tokenizer does not call special."""
    found = re.search("|".join(map(re.escape, sorted(control, key=len, reverse=True))), text) if control else None
    while found is not None:
        cut = found.start() + 1
        yield text[:cut] if len(found[0]) > 1 else text[: cut - 1]  # a token of one character can't be cut: it goes
        text = text[cut:]
        found = found.re.search(text)
    yield text


def _begun_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], prompt: str, begun: str
) -> Iterator[int]:
    """Yield the ids of an answer that was begun, behind a prompt that ends with `prompt`.

    Not of it as a message, of which templates strip thoughts and blanks.
    """
    told = _behind(prompt, begun)
    control = control_tokens(tokenizer)
    if told == begun and not any(mark in begun for mark in _THOUGHT):
        with exclusive(tokenizer):
            yield from tokenizer(_header(tokenizer, messages), add_special_tokens=False).input_ids
    # A thought begins and ends with tokens of their own, where the tokenizer has them.
    known: Any = tokenizer
    marks = {mark: int(known.convert_tokens_to_ids(mark)) for mark in _THOUGHT if mark in control}
    for part in re.split(f"({'|'.join(map(re.escape, marks))})", told) if marks else [told]:
        if part in marks:
            yield marks[part]
            continue
        for text in _without_control(part, control):
            yield from encode_text(tokenizer, text).input_ids


_SENTINEL = "sentinel"


def _header(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> str:
    """Return what a template puts between its generation prompt and an answer, such as the name of a channel."""
    from jinja2 import TemplateError

    render = partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        bare = str(render(list(messages), add_generation_prompt=True))
        parts = isinstance(messages[-1]["content"], list)  # of a model that sees
        content = [{"type": "text", "text": _SENTINEL}] if parts else _SENTINEL
        answer: Message = {"role": "assistant", "content": content}
        whole = str(render([*messages, answer], continue_final_message=True))
    except (TemplateError, ValueError):
        return ""
    before = whole.removesuffix(_SENTINEL)
    return before[len(bare) :] if before.startswith(bare) and whole.endswith(_SENTINEL) else ""


def _behind(prompt: str, begun: str) -> str:
    """Return an answer that was begun as it goes on behind a prompt, which may have begun a thought already."""
    opening, closing = _THOUGHT
    if not prompt.rstrip().endswith(opening):
        return begun
    if begun.lstrip().startswith(opening):
        return begun.lstrip().removeprefix(opening)
    return begun if closing in begun else f"\n{closing}\n\n{begun}"


_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def _dated(tokenizer: "PreTrainedTokenizerBase", today: datetime.date) -> str:
    """Return the chat template with a date in place of the present one. The function itself can't be given to it."""
    return _NOW.sub(lambda call: repr(today.strftime(call[2])), str(tokenizer.chat_template))


def prints_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether the chat template prints the date."""
    return "strftime_now" in str(tokenizer.chat_template)


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, offsets: bool = False) -> "BatchEncoding":
    """Return a text's `input_ids`, without control tokens: what looks like one is text, as in `encode_chat`.

    Args:
        tokenizer: fast, where offsets are asked for.
        text: what a user wrote, or part of it.
        offsets: whether to return each token's `offset_mapping` too, in characters.
    """
    with exclusive(tokenizer):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=offsets)


_LONGEST: "WeakKeyDictionary[PreTrainedTokenizerBase, int]" = WeakKeyDictionary()


def _longest_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Characters of the longest entry of the vocabulary: no text has fewer tokens than its length by that."""
    if tokenizer not in _LONGEST:
        _LONGEST[tokenizer] = max(map(len, tokenizer.get_vocab()))
    return _LONGEST[tokenizer]
