"""`CompositeModel`: many LLMs that answer as one."""

import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..modeling.chat import Message, as_messages
from ..modeling.composite import Composite, load_composite, save_composite
from ..modeling.dispatch import Dispatch, dispatch_distribution, dispatch_forward
from ..modeling.errors import ExpertokenError, one_line
from ..modeling.experts import SELF
from ..modeling.meta import token_batches
from .backends import Backend, Generation, LocalModels, open_backend
from .backends.local import first_token, stream_generate

logger = logging.getLogger(__name__)

_MAX_TOKENS = 4096  # padded tokens of one batch of decisions


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: what was answered.
        expert: who answered.
        dispatch: the decision behind it.
        failures: experts that were asked before and failed, with the reason.
    """

    text: str
    expert: str
    dispatch: Dispatch
    failures: dict[str, str] = field(default_factory=dict)


class ReplyStream:
    """An answer that is being given: iterate over its pieces of text.

    Attributes:
        dispatch: the decision; known from the start.
        expert: who answers; final once the first piece is there.
        failures: experts that failed before it, with the reason.
    """

    def __init__(self, dispatch: Dispatch) -> None:
        self.dispatch = dispatch
        self.expert = dispatch.expert
        self.failures: dict[str, str] = {}
        self._text: list[str] = []
        self._pieces: Iterator[str] = iter(())

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self._text.append(piece)
            yield piece

    def close(self) -> None:
        """Stop generating."""
        if isinstance(self._pieces, Generator):
            self._pieces.close()

    @property
    def reply(self) -> Reply:
        """What was answered so far."""
        return Reply("".join(self._text), self.expert, self.dispatch, dict(self.failures))


class CompositeModel:
    """Meta LLM and experts as one model.

    Args:
        composite: a loaded composite.
        dtype: of local experts' weights; as `load_causal_lm` chooses where None.
    """

    def __init__(self, composite: Composite, dtype: torch.dtype | str | None = None) -> None:
        self.meta, self.pool, self.manifest = composite.meta, composite.pool, composite.manifest
        self._models = LocalModels(self.meta.device, dtype)
        self._models.add(self.meta.source, self.meta.plain, self.meta.tokenizer)
        self._backends: dict[str, Backend] = {}
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
    ) -> "CompositeModel":
        """Load a composite folder. Experts are opened when they are first needed.

        Args:
            path: the folder.
            device: where models go; the first accelerator, or the CPU, where not given.
            dtype: of the weights; as `load_composite` chooses where not given.
            trust_remote_code: allow the base model's repository to run its own code.

        Raises:
            ExpertokenError: the folder is not a whole composite.
        """
        composite = load_composite(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(composite, dtype)

    def save_pretrained(self, path: Path | str, *, verify: bool = True) -> None:
        """Write a composite folder; see `modeling.composite.save_composite`."""
        save_composite(Composite(self.meta, self.pool, self.manifest), path, verify=verify)

    def route(self, conversations: str | Sequence[Any]) -> Dispatch | list[Dispatch]:
        """Decide who would answer, without answering.

        Args:
            conversations: one conversation (a string, or a list of messages), or a list of conversations.

        Returns:
            one `Dispatch`, or a list of them in the same order.
        """
        many = not isinstance(conversations, str) and not (
            len(conversations) > 0 and isinstance(conversations[0], dict)
        )
        encoded = [self.meta.encode(c) for c in (conversations if many else [conversations])]
        found: list[Dispatch | None] = [None] * len(encoded)
        for batch in token_batches([len(ids) for ids in encoded], _MAX_TOKENS):
            logits = self.meta.candidate_logits([encoded[i] for i in batch], with_self=self.pool.has_self)
            for index, row in zip(batch, logits.softmax(-1), strict=True):
                found[index] = Dispatch.from_probabilities(self.pool.names, row)
        return found if many else found[0]

    def chat(self, conversation: str | Sequence[Message], **generation: Any) -> Reply:
        """Answer a conversation.

        Args:
            conversation: a string, or messages with `role` and `content`; the decision reads all of it.
            **generation: see `Generation` (`max_new_tokens`, `temperature`, `top_p`, `seed`).

        Raises:
            ExpertokenError: the conversation is not well formed, or nobody could answer.
        """
        stream = self.stream(conversation, **generation)
        for _ in stream:
            pass
        return stream.reply

    def stream(self, conversation: str | Sequence[Message], **generation: Any) -> ReplyStream:
        """Answer a conversation in pieces. Arguments and errors as in `chat`."""
        try:
            options = Generation(**generation)
        except TypeError as error:
            raise ExpertokenError(f"unknown generation argument ({error})") from None
        messages = as_messages(conversation)
        with self._lock:
            logits, inputs = self._decide(self.meta.encode(messages))
        probabilities = dispatch_distribution(logits, self.meta.vocab_size, with_self=self.pool.has_self)[0]
        dispatch = Dispatch.from_probabilities(self.pool.names, probabilities.cpu())
        stream = ReplyStream(dispatch)
        stream._pieces = self._answer(messages, options, stream, logits, inputs)
        return stream

    @torch.inference_mode()
    def _decide(self, ids: list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        """The decision's logits `[1, V + K]`, and its input with the KV cache, for the case that self answers."""
        from transformers import DynamicCache

        inputs = self.meta.pad([ids])
        # Made from the config, so that sliding-window layers get the cache they need.
        cache = DynamicCache(config=self.meta.plain.config)
        logits, _ = dispatch_forward(self.meta.model, **inputs, past_key_values=cache, use_cache=True)
        return logits.float(), inputs | {"past_key_values": cache}

    def _answer(
        self,
        messages: list[Message],
        generation: Generation,
        stream: ReplyStream,
        logits: torch.Tensor,
        inputs: dict[str, Any],
    ) -> Iterator[str]:
        """Ask the candidates from the most probable on until one answers."""
        for name in stream.dispatch.ranking:
            stream.expert = name
            begun = False
            try:
                for piece in self._pieces(name, messages, generation, logits, inputs):
                    begun = True
                    yield piece
                if begun or self.pool[name].backend == SELF:
                    return
                reason = "gave an empty answer"
            except Exception as error:  # whatever an expert fails with, the user has a next best one
                reason = one_line(error)
                if begun:
                    raise ExpertokenError(f"expert {name!r} broke off in its answer: {reason}") from error
            stream.failures[name] = reason
            logger.warning("expert %r failed, the next one is asked: %s", name, reason)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in stream.failures.items())
        raise ExpertokenError(f"no expert could answer ({reasons})")

    def _pieces(
        self,
        name: str,
        messages: list[Message],
        generation: Generation,
        logits: torch.Tensor,
        inputs: dict[str, Any],
    ) -> Iterator[str]:
        # Where LoRA was trained for dispatching, self is the model without it: the one that benchmarks measured. The
        # decision's cache is not that model's, so there it costs a prefill of its own.
        if self.pool[name].backend == SELF and not self.meta.adapted:
            yield from self._self_answer(logits, inputs, generation)
        else:
            yield from self.backend(name).stream(messages, generation)

    def backend(self, name: str) -> Backend:
        """The opened backend of a candidate.

        Raises:
            ExpertFailedError: it can't be opened.
        """
        with self._lock:
            if name not in self._backends:
                self._backends[name] = open_backend(self.pool[name], self._models, self.meta.source)
            return self._backends[name]

    def _self_answer(self, logits: torch.Tensor, inputs: dict[str, Any], generation: Generation) -> Iterator[str]:
        """Go on from the decision: its logits give the first token, its KV cache the rest. No second prefill."""
        model, tokenizer = self.meta.model, self.meta.tokenizer
        token = first_token(model, inputs["input_ids"], logits[:, : self.meta.vocab_size], generation)
        ends = self.meta.plain.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        if token.item() in ends:
            return
        if generation.max_new_tokens == 1:
            yield tokenizer.decode(token[0], skip_special_tokens=True)
            return
        experts = list(range(self.meta.vocab_size, logits.shape[1]))
        ids = torch.cat([inputs["input_ids"], token], 1)
        rest = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "past_key_values": inputs["past_key_values"],
            "suppress_tokens": experts,
            "max_new_tokens": generation.max_new_tokens - 1,
        }
        yield from stream_generate(model, tokenizer, rest, generation, first=token[0], ready=self._lock)
