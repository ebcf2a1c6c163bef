"""Base of the project's models for lm-evaluation-harness, which read conversations (extra `collect`)."""

import json
from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from .chat import Message

_CHAT = "expertoken chat: "  # prefix of messages as JSON, in contexts that the harness returns


class ChatLM(LM):
    """A model of the harness that receives each conversation as messages.

    Args:
        name: Name under which the harness caches prompts.
        max_gen_toks: Default length of the longest answer in tokens, for tasks that set none.
    """

    def __init__(self, name: str, max_gen_toks: int = 256) -> None:
        super().__init__()
        self._name, self.max_gen_toks = name, max_gen_toks

    def longest(self, options: Mapping[str, Any]) -> int:
        """Return the longest answer in tokens that a task's options allow."""
        return int(options.get("max_gen_toks") or options.get("max_tokens") or self.max_gen_toks)

    @property
    def tokenizer_name(self) -> str:
        """Name under which prompts are cached."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return an empty template, because each expert has its own."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the messages as one text, which `messages_of` parses."""
        return _CHAT + json.dumps(chat_history)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Refuse log-likelihoods, which an answer in text does not have. A model that has them overrides this.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("this model answers in text and gives no log-likelihoods")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse perplexity, which depends on the tokenizer of one model.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("this model answers in text and gives no perplexity")


def messages_of(context: str) -> list[Message]:
    """Return the conversation in a context: messages that `ChatLM.apply_chat_template` wrote, or one prompt."""
    if context.startswith(_CHAT):
        return json.loads(context.removeprefix(_CHAT))
    return [{"role": "user", "content": context}]
