"""What models of lm-evaluation-harness share here: they read conversations, not prompts. Needs the extra `collect`."""

import json
from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from .chat import Message

_CHAT = "expertoken chat: "  # before messages as JSON: what the harness hands back as a context


class ChatLM(LM):
    """A model of the harness that gets each conversation as messages.

    Args:
        name: name under which the harness caches prompts.
        max_gen_toks: longest answer in tokens, where a task sets none.
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
        """Return no template: each expert has its own."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the messages as one text, which `messages_of` reads again."""
        return _CHAT + json.dumps(chat_history)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Refuse, where a model does not give them: an answer in text has no log-likelihoods.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("no log-likelihoods of texts")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse: perplexity belongs to one model's tokenizer.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("no perplexity of texts")


def messages_of(context: str) -> list[Message]:
    """Return the conversation of a context: messages as `ChatLM.apply_chat_template` wrote them, or one prompt."""
    if context.startswith(_CHAT):
        return json.loads(context.removeprefix(_CHAT))
    return [{"role": "user", "content": context}]
