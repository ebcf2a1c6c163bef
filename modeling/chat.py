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

A part is `{"type": "text", "text": ...}`, as in OpenAI's API, or a picture as `pictures.picture_of` reads it. Parts of
other types are forwarded unchanged to experts behind an endpoint.
"""

Ids = np.ndarray[Any, np.dtype[np.int32]]
"""Token ids `[T]`: Python's integers take nine times the memory."""


@dataclass(frozen=True, eq=False)
class Query:
    """A conversation as the meta LLM reads it, up to the position whose state decides.

    Attributes:
        ids: Token ids `[T]`.
        media: Pictures, in the order of their tokens in `ids`.
        cut: Approximate number of the conversation's tokens that were cut.
        folded: True if roles were changed to suit the chat template.
        dated: True if the chat template prints a date that differs from today's.
    """

    ids: Ids
    media: "tuple[Picture, ...]" = ()
    cut: int = 0
    folded: bool = False
    dated: bool = False

    @property
    def whole(self) -> bool:
        """True if the query is the unchanged conversation, so that an answer may continue from its KV cache."""
        return not (self.cut or self.folded or self.dated)

    @classmethod
    def of(cls, ids: Sequence[int]) -> "Query":
        """Return the query with these token ids."""
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
        """Hash of everything the meta LLM reads, which identifies the query in caches."""
        digest = hashlib.blake2b(self.ids.tobytes(), digest_size=16)
        for part in self.media:
            digest.update(part.key)
        return digest.digest()

    def followed_by(self, ids: Sequence[int] | Ids) -> "Query":
        """Return the query extended by further token ids, the beginning of an answer."""
        return replace(self, ids=np.concatenate([self.ids, np.asarray(ids, dtype=np.int32)]))


ROLES = ("system", "developer", "user", "assistant", "tool")


def as_messages(conversation: str | Sequence[Message]) -> list[Message]:
    """Return a conversation as a list of messages. A string becomes one user message.

    Raises:
        ExpertokenError: The conversation has no message, or a message has no known role or no content.
    """
    expected = f"expected `role` ({', '.join(ROLES)}) and `content` (text, or a list of parts with `type`)"
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    messages = list(conversation)
    if not messages:
        raise ExpertokenError("expected at least one message in a conversation, got none")
    for index, message in enumerate(messages):
        known = isinstance(message, dict) and message.get("role") in ROLES
        if not known or not (_is_content(message.get("content")) or _calls_tools(message)):
            raise ExpertokenError(f"messages[{index}]: {expected}")
        if not isinstance(message.get("tool_calls") or [], list):
            raise ExpertokenError(f"messages[{index}].tool_calls: expected a list")
    return messages


def _calls_tools(message: Message) -> bool:
    """Check whether a message is the assistant's and consists of tool calls alone."""
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
    """Return the number of a message's parts that are not text."""
    content = message.get("content")
    return sum(part["type"] not in _TEXTS for part in content) if isinstance(content, list) else 0


def text_of(message: Message, *, placeholders: bool = False) -> str:
    """Return a message's text, with each part on its own line and tool calls as `name(arguments)`.

    Args:
        message: Message to read.
        placeholders: If true, parts that are not text become placeholders such as `[image_url]`.

    Raises:
        ExpertokenError: A part is not text, or the text is not valid Unicode.
    """
    content = message.get("content") or ""
    if not isinstance(content, str):
        for part in content:
            if part["type"] not in _TEXTS and not placeholders:
                # Reasons are logged, so the type, which may be any text of a user, must not be part of this one.
                raise ExpertokenError(
                    "expected text in each part of a message, because models in this process read text only"
                )
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
        raise ExpertokenError(
            f"a message's text is not valid Unicode ({error.reason} at character {error.start})"
        ) from None
    return content


_AS = {"developer": "system"}  # chat templates don't know OpenAI's newer name


def sight_of(tokenizer: "PreTrainedTokenizerBase") -> "Sight | None":
    """Return the picture processor that a tokenizer carries, or None if its model reads text only."""
    return getattr(tokenizer, "sight", None)


_CONTROL: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, list[str]]]" = WeakKeyDictionary()


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the texts of the tokenizer's added tokens, which a user's text must not produce."""
    size = len(tokenizer)
    known = _CONTROL.get(tokenizer)
    if known is None or known[0] != size:  # building the list of thousands of tokens takes milliseconds
        found = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        _CONTROL[tokenizer] = known = (size, found)
    return known[1]


_EXPERT = "<|expert:"


def apart(text: str, control: Sequence[str] = ()) -> str:
    """Break up expert tokens in a text with a space, for tokenizers of other servers that know these tokens.

    Args:
        text: Text of a user.
        control: Further tokens that the text must not contain.
    """
    longest_first = sorted({_EXPERT, *control}, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda found: f"{found[0][:1]} {found[0][1:]}", text)


def plain(messages: Sequence[Message], *, placeholders: bool = False) -> list[Message]:
    """Return messages with roles and texts alone.

    A chat template may print any other field of a message, and only texts are sanitised.
    """
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
    """Return the token ids of a conversation up to the dispatch position, the end of the template's generation prompt.

    Text of the messages never becomes a control token of the template. Expert ids start at `vocab_size`, so no text
    can produce them. The ids are checked anyway.

    Args:
        tokenizer: Tokenizer with a chat template.
        conversation: Messages of the conversation.
        vocab_size: V, the number of rows in the model's own head.
        begun: Beginning of an answer to continue. The ids then end behind it.
        placeholders: If true, parts that are not text become placeholders. See `text_of`.
        most: Limit on the number of tokens. None for no limit.
        today: Date for a template that prints one. None for the present date.
        pictures: Pictures of the marks in the texts, for a model that reads pictures. See `pictures.marked`.

    Raises:
        ExpertokenError: The template refuses the conversation, or the conversation is longer than `most`.
        ExpertFailedError: The tokenizer has no chat template, or returns ids without a row in the model's head.
    """
    if not tokenizer.chat_template:
        raise ExpertFailedError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template. Use an instruction-tuned model, or add a "
            "chat_template.jinja to its folder"
        )
    from jinja2 import TemplateError

    # The default of transformers searches the template's text for control tokens, and so misses tokens that a template
    # builds from pieces (Phi-4-mini: '<|' + role + '|>'). Hence the explicit list.
    tokenizer.chat_control_tokens = control_tokens(tokenizer)
    messages = plain(as_messages(conversation), placeholders=placeholders)
    dated: dict[str, Any] = (
        {} if today is None or not prints_date(tokenizer) else {"chat_template": _dated(tokenizer, today)}
    )
    characters = sum(len(message["content"]) for message in messages)
    if most is not None and characters > most * _longest_token(tokenizer):  # saves seconds of tokenising in vain
        raise ExpertokenError(
            f"expected a conversation of at most {most} tokens, got {characters} characters, which are more than "
            f"{most} tokens"
        )
    sight = sight_of(tokenizer)
    if sight is not None:
        # A user's text that looks like a picture's token must stay text, even if the processor searches for the token.
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
    if begun.strip():  # an answer of blanks alone can't be continued
        ids = [*ids, *_begun_ids(tokenizer, messages, str(tokenizer.decode(ids[-_TAIL:])), begun)]
    if most is not None and len(ids) > most:
        raise ExpertokenError(f"expected a conversation of at most {most} tokens, got {len(ids)}")
    if max(ids) >= vocab_size:
        raise ExpertFailedError(
            f"{tokenizer.name_or_path}: expected token ids below the model's {vocab_size} rows, got {max(ids)}. Use "
            "the tokenizer that belongs to the model"
        )
    return ids


def read_chat(
    tokenizer: "PreTrainedTokenizerBase", conversation: str | Sequence[Message], vocab_size: int, **options: Any
) -> Query:
    """Return the query of a whole conversation, with its pictures if the model reads pictures.

    Args:
        tokenizer: Tokenizer with a chat template.
        conversation: Messages of the conversation.
        vocab_size: V, the number of rows in the model's own head.
        **options: Further options of `encode_chat`, whose errors this function raises too.
    """
    messages = as_messages(conversation)
    pictures: list[Picture] = []
    if sight_of(tokenizer) is not None:
        messages, pictures = marked(messages)
    ids = encode_chat(tokenizer, messages, vocab_size, pictures=pictures, **options)
    return replace(Query.of(ids), media=tuple(pictures))


_THOUGHT = ("<think>", "</think>")
_TAIL = 16  # tokens at the end of a prompt, which may contain the beginning of a thought


def _without_control(text: str, control: Sequence[str]) -> Iterator[str]:
    """Yield a text in parts without control tokens, including tokens that the tokenizer does not call special."""
    found = re.search("|".join(map(re.escape, sorted(control, key=len, reverse=True))), text) if control else None
    while found is not None:
        cut = found.start() + 1
        yield text[:cut] if len(found[0]) > 1 else text[: cut - 1]  # a one-character token can't be cut: it is dropped
        text = text[cut:]
        found = found.re.search(text)
    yield text


def _begun_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], prompt: str, begun: str
) -> Iterator[int]:
    """Yield the ids of the beginning of an answer, behind a prompt that ends with `prompt`.

    The template is not applied to the beginning as a message, because templates strip thoughts and blanks from it.
    """
    told = _behind(prompt, begun)
    control = control_tokens(tokenizer)
    if told == begun and not any(mark in begun for mark in _THOUGHT):
        with exclusive(tokenizer):
            yield from tokenizer(_header(tokenizer, messages), add_special_tokens=False).input_ids
    # Some tokenizers have single tokens for the beginning and the end of a thought.
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
    """Return the text that a template puts between its generation prompt and an answer, such as a channel's name."""
    from jinja2 import TemplateError

    render = partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        bare = str(render(list(messages), add_generation_prompt=True))
        parts = isinstance(messages[-1]["content"], list)  # for a model that reads pictures
        content = [{"type": "text", "text": _SENTINEL}] if parts else _SENTINEL
        answer: Message = {"role": "assistant", "content": content}
        whole = str(render([*messages, answer], continue_final_message=True))
    except (TemplateError, ValueError):
        return ""
    before = whole.removesuffix(_SENTINEL)
    return before[len(bare) :] if before.startswith(bare) and whole.endswith(_SENTINEL) else ""


def _behind(prompt: str, begun: str) -> str:
    """Return the beginning of an answer as it must follow a prompt, which may already open a thought."""
    opening, closing = _THOUGHT
    if not prompt.rstrip().endswith(opening):
        return begun
    if begun.lstrip().startswith(opening):
        return begun.lstrip().removeprefix(opening)
    return begun if closing in begun else f"\n{closing}\n\n{begun}"


_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def _dated(tokenizer: "PreTrainedTokenizerBase", today: datetime.date) -> str:
    """Return the chat template with a fixed date in place of the present one.

    A replacement for its function `strftime_now` can't be passed to the template.
    """
    return _NOW.sub(lambda call: repr(today.strftime(call[2])), str(tokenizer.chat_template))


def prints_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Check whether the chat template prints the date."""
    return "strftime_now" in str(tokenizer.chat_template)


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, offsets: bool = False) -> "BatchEncoding":
    """Return a text's `input_ids`, without control tokens. Text that looks like a control token stays text.

    Args:
        tokenizer: Tokenizer of the model. It must be a fast one for `offsets`.
        text: Text of a user, or a part of it.
        offsets: If true, each token's `offset_mapping`, in characters, is returned too.
    """
    with exclusive(tokenizer):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=offsets)


_LONGEST: "WeakKeyDictionary[PreTrainedTokenizerBase, int]" = WeakKeyDictionary()


def _longest_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the length of the vocabulary's longest entry, in characters.

    No text has fewer tokens than its own length divided by this length.
    """
    if tokenizer not in _LONGEST:
        _LONGEST[tokenizer] = max(map(len, tokenizer.get_vocab()))
    return _LONGEST[tokenizer]
