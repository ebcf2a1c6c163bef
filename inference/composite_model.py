"""`CompositeModel`: many LLMs that answer as one."""

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import torch

from ..modeling.backend import Backend, Generation, Opening, Piece, Timeouts
from ..modeling.capabilities import wants_tools
from ..modeling.chat import Message, count_media, encode_text
from ..modeling.composite import POOL_FILE, Composite, load_composite
from ..modeling.consent import agree, check_agreed
from ..modeling.errors import ExpertokenError, OutOfMemoryError, one_line
from ..modeling.files import local_folder
from ..modeling.hub import push
from ..modeling.loading import end_ids
from ..modeling.policy import Policy
from ..modeling.pool import ExpertPool
from ..modeling.saving import save_composite
from ..modeling.source import Source
from .answering import AnsweringModel
from .backends.local import first_token, stream_generate, turn_of, within
from .backends.models import LocalModels
from .decider import Decider, Decision, OwnStart, Question
from .handover import HandOver, Watch
from .loop import in_thread
from .observer import Observer
from .reply import Turn
from .sessions import Affinity

logger = logging.getLogger(__name__)

_COUNTED = 65_536  # characters


class CompositeModel(AnsweringModel):
    """Meta LLM and experts as one model.

    Args:
        composite: Loaded composite.
        dtype: Type of local experts' weights. Defaults to the one that `load_causal_lm` chooses.
        policy: Default policy for requests that set none. Defaults to the composite's own.
        timeouts: Timeouts of endpoints.
        observer: Observer that is notified of decisions, answers and failures.
        budget: Limit in bytes on the weights of local experts, the meta LLM's own base not included. Defaults to no
            limit.
        pinned: Experts that stay in memory once they are loaded.
        quantization: Quantization of local experts: nf4, int8 or None.
        anywhere: If true, self may hand over inside its answer. Defaults to true if the composite was trained for it.
        send_keys: Consent to sending this machine's keys to the addresses of the composite (`modeling.consent`).
        before: Model that this one replaces. The new model shares its models in memory, its locks and its record of
            failures.

    Raises:
        ExpertokenError: The composite sends keys to addresses without consent, a pinned expert is unknown or not local,
            or the quantization or the type is unknown.
    """

    local_models: LocalModels

    def __init__(
        self,
        composite: Composite,
        dtype: torch.dtype | str | None = None,
        *,
        policy: Policy | None = None,
        timeouts: Timeouts | None = None,
        observer: Observer | None = None,
        budget: int | None = None,
        pinned: Sequence[str] = (),
        quantization: str | None = None,
        anywhere: bool | None = None,
        send_keys: bool = False,
        before: "CompositeModel | None" = None,
    ) -> None:
        if send_keys:
            agree(composite.pool)
        if composite.folder is not None:
            check_agreed(composite.pool, composite.folder)
            if asked := [f"{e.name} at {_hosts(e.kind.address(e))}" for e in composite.pool if e.kind.remote]:
                logger.info("conversations can go to %s", ", ".join(asked))
        self.composite = composite
        self.meta, self.manifest = composite.meta, composite.manifest
        super().__init__(composite.chooser, policy or composite.policy, observer)
        trained = self.manifest.training.get("dispatch") == "anywhere"
        self.anywhere = self.pool.has_self and (trained if anywhere is None else anywhere)
        if self.anywhere and self.meta.state.layer is not None:
            raise ExpertokenError(
                f"anywhere: expected a composite whose rows read the head, found --state {self.meta.state}. Positions "
                "inside an answer are decided where its tokens are written."
            )
        self._positions = self.meta.positions
        pins = {name: self._source(name) for name in pinned}
        if remote := [name for name, source in pins.items() if source is None]:
            raise ExpertokenError(f"{', '.join(remote)}: expected local experts to pin in memory, got remote ones")
        given: dict[str, Any] = {
            "policy": policy, "timeouts": timeouts, "budget": budget, "pinned": tuple(pinned),
            "quantization": quantization, "anywhere": anywhere,
        }  # fmt: skip
        self._dtype, self._given = dtype, given
        if before is None:
            self.local_models = LocalModels(
                self.meta.device,
                dtype,
                budget=budget,
                pinned=tuple(filter(None, pins.values())),
                quantization=quantization,
            )
            self.local_models.add(self.meta.source, self.meta.plain, self.meta.tokenizer)
        else:
            self.local_models = before.local_models
            self._breakers |= {name: known for name, known in before._breakers.items() if name in self._breakers}
        self._opening = Opening(self.meta.source, self.local_models, timeouts or Timeouts())
        # Self generates one answer at a time, as every local model does.
        self._own_turn: Any = partial(turn_of, threading.RLock()) if before is None else before._own_turn
        self._self_name = self.pool.self_name
        self._decider = Decider(self.meta, self._self_name, self.observer)

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> "CompositeModel":
        """Load a composite folder. Experts are opened on first use.

        Args:
            path: Composite folder, or `owner/name` of a composite on the hub.
            device: Device to load models on. Defaults to the first accelerator, or the CPU.
            dtype: Type of the weights. Defaults to the one that `load_composite` chooses.
            revision: Revision of a composite on the hub.
            trust_remote_code: If true, the base model's repository may run its own code.
            **options: Further arguments of the class: `policy`, `timeouts`, `observer`, `budget`, `pinned`,
                `quantization`, `anywhere` and `send_keys`.

        Raises:
            ExpertokenError: The folder is no complete composite, or sends keys to addresses without consent.
        """
        folder = local_folder(path, revision)
        if not options.get("send_keys") and (folder / POOL_FILE).exists():  # before a model is loaded in vain
            check_agreed(ExpertPool.from_yaml(folder / POOL_FILE), folder)
        composite = load_composite(
            path,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        return cls(composite, dtype, **options)

    @property
    def identity(self) -> str:
        """Fingerprint that differs between composites that decide or answer differently."""
        rows = hashlib.sha256(self.meta.rows.numpy().tobytes()).hexdigest()[:16]
        return f"{self.meta.base_fingerprint}-{rows}-{self.manifest.training.get('validation_score')}"

    @property
    def calibrated_shares(self) -> Mapping[str, float]:
        """Share of each candidate in the calibration prompts, 0 to 1. Empty without a calibration."""
        return (self.manifest.calibration or {}).get("shares", {})

    def count(self, text: str) -> int:
        """Count the tokens of a text as the meta LLM reads it, for backends that report no counts.

        The count of a long text is estimated, because other answers wait during the count.
        """
        head = text[:_COUNTED]
        found = len(encode_text(self.meta.tokenizer, head).input_ids)
        return found if len(text) <= _COUNTED else found * len(text) // _COUNTED

    def view(self, messages: Sequence[Message]) -> str:
        """Return the text that a decision on a conversation reads, with the chat template's tokens."""
        return str(self.meta.tokenizer.decode(self.meta.encode(self._unnamed(messages)).ids))

    def observe(self, observer: Observer) -> None:
        """Replace the observer."""
        self.observer = self._decider.observer = observer

    def reloaded(self) -> "CompositeModel":
        """Return a composite from the current folder (experts, rows, calibration) that reuses the weights in memory.

        In-flight answers continue unchanged.

        Raises:
            ExpertokenError: The composite was not loaded from a folder, or the folder is no longer a complete composite
                of the same base.
        """
        if self.composite.folder is None:
            raise ExpertokenError("expected a composite loaded from a folder, got one built in memory")
        composite = load_composite(
            self.composite.folder,
            device=self.meta.device,
            trust_remote_code=self.meta.source.trust_remote_code,
            beside=self.meta,
        )
        pinned = [name for name in self._given["pinned"] if name in composite.pool.names]
        return CompositeModel(composite, self._dtype, before=self, **self._given | {"pinned": pinned})

    def save_pretrained(self, path: Path | str, *, verify: bool = True) -> None:
        """Write a composite folder as in `modeling.composite.save_composite`."""
        save_composite(self.composite, path, verify=verify)

    def push_to_hub(self, repo: str, *, private: bool = True, commit_message: str = "A composite of experts") -> str:
        """Upload the composite to the hub as in `modeling.hub.push`."""
        return push(self.composite, repo, private=private, message=commit_message)

    def decide(
        self,
        conversations: Sequence[Sequence[Message]],
        policy: Policy | None = None,
        generation: Generation | None = None,
    ) -> list[Decision]:
        """Decide on several conversations, in as few forward passes as memory allows."""
        return self._decider.decide([self._question(messages, policy, generation) for messages in conversations])

    async def adecide(
        self,
        messages: Sequence[Message],
        policy: Policy | None = None,
        generation: Generation | None = None,
        affinity: Affinity | None = None,
    ) -> Decision:
        """Decide on a conversation, batched with other conversations that are pending.

        The policy's `default` answers if the meta LLM can't decide within the timeout.

        Raises:
            ExpertokenError: The conversation is too long or refused, or the policy does not fit the pool.
            NoAnswerError: The meta LLM can't decide, and the policy names no default.
        """
        affinity = affinity or Affinity.of(messages, self.pool)
        policy, started, limit = policy or self.policy, time.perf_counter(), self._opening.timeouts.decision
        try:
            with anyio.fail_after(limit):
                # Encoding a long conversation takes milliseconds, which would delay other answers of this loop.
                question = await asyncio.to_thread(self._question_or_decision, messages, policy, generation, affinity)
                return question if isinstance(question, Decision) else await self._decider.adecide(question)
        except TimeoutError:
            reason = f"the meta LLM did not decide within {limit or 0:g} s"
        except Exception as error:
            if isinstance(error, ExpertokenError) and not isinstance(error, OutOfMemoryError):
                raise
            reason = f"the meta LLM can't decide: {one_line(error)}"
        logger.warning("%s", reason)
        return self._undecided(messages, policy, reason, started, generation)

    def _question(
        self,
        messages: Sequence[Message],
        policy: Policy | None,
        generation: Generation | None = None,
        affinity: Affinity | None = None,
        *,
        answer: bool = False,
    ) -> Question:
        policy, affinity = policy or self.policy, affinity or Affinity.of(messages, self.pool)
        self.chooser.candidates(policy)  # so that an invalid policy raises before anything is computed
        query = self.meta.encode(self._unnamed(messages))
        tokens = len(query) + query.cut
        self._check_length(tokens, self.limit)
        unable = self._unable(messages, generation, tokens)
        self.chooser.candidates(policy, unable)
        last = affinity.last
        if answer and policy.sticky > 0 and last:  # the likeliest candidate: its model loads during the decision
            self.prepare(last)
        # A decision reads `[image_url]` in place of a picture it can't see. An answer must not.
        answer = answer and query.whole and sum(map(count_media, messages)) == len(query.media)
        answer = answer and not wants_tools({} if generation is None else generation.extra)  # tools change the prompt
        choose = partial(
            self.chooser.choose, policy, prompt_tokens=tokens, last=last, cached=affinity.cached, unable=unable
        )
        return Question(query, choose, answer)

    def _question_or_decision(
        self, messages: Sequence[Message], policy: Policy, generation: Generation | None, affinity: Affinity
    ) -> Question | Decision:
        unable = self._unable(messages, generation)
        names = self.chooser.candidates(policy, unable)
        if (bound := self._bound(messages, policy, affinity, unable)) is not None:
            return bound
        if len(names) == 1 and names[0] != self._self_name:  # self needs the forward pass for its answer
            return self._undisputed(messages, names[0])
        return self._question(messages, policy, generation, affinity, answer=True)

    async def _ask(
        self, name: str, messages: list[Message], generation: Generation, decision: Decision, turn: Turn
    ) -> AsyncGenerator[Piece, None]:
        """Yield one candidate's answer, or its continuation of a partial answer."""
        # Only at the start of the turn: self continues a partial answer as every candidate does.
        first = name == self._self_name and name == decision.dispatch.expert and not (turn.begun or turn.handed_over)
        first = first and decision.whole  # a cache of a shortened view can't be continued
        first = first and not wants_tools(generation.extra)
        if first:
            generation = within(generation, self._positions - decision.prompt_tokens)
        if first and self.anywhere and decision.choose is not None and not any(map(count_media, messages)):
            source = self._watched_answer(messages, decision, generation)
        elif first and decision.own is not None:
            source = self._self_answer(decision.own, generation)
        else:
            source = super()._ask(name, messages, generation, decision, turn)
        async with aclosing(source) as pieces:
            async for piece in pieces:
                yield piece

    def batched(self, names: Iterable[str]) -> list[str]:
        """Return the candidates that answer in batches, sorted so that as few models as possible are loaded.

        Candidates in memory come first, and adapters of one base are adjacent. Self is excluded where it may hand over
        inside its answer.
        """

        def load(name: str) -> tuple[bool, str, str]:
            source = self._source(name)
            return (False, "", name) if source is None else (not self.local_models.holds(source), source.model, name)

        batching = [name for name in names if self.pool[name].kind.batches]
        return sorted((name for name in batching if not (self.anywhere and name == self._self_name)), key=load)

    def backend(self, name: str) -> Backend:
        """Return the opened backend of a candidate.

        Raises:
            ExpertFailedError: The backend can't be opened.
        """
        if name not in self._backends:  # opened twice at worst: a lock would wait for another expert's loading
            expert = self.pool[name]
            return self._backends.setdefault(name, expert.kind.open(expert, self._opening))
        return self._backends[name]

    def prepare(self, name: str) -> None:
        """Start to load a candidate that is needed soon, if there is room for it.

        The call returns immediately.
        """
        if (source := self._source(name)) is not None:
            in_thread(self.local_models.prefetch, source)

    def _source(self, name: str) -> Source | None:
        """Return the model that has to be in memory for a candidate to answer, or None."""
        expert = self.pool[name]
        weights = expert.kind.weights(expert, self.meta.source)
        return None if weights is None else weights.source

    async def _watched_answer(
        self, messages: list[Message], decision: Decision, generation: Generation
    ) -> AsyncGenerator[Piece, None]:
        """Yield self's answer up to the position at which the meta LLM calls for an expert.

        Raises:
            HandOver: The meta LLM calls for an expert.
        """
        query = await asyncio.to_thread(self.meta.encode, messages)
        end = min(end_ids(self.meta.plain, self.meta.tokenizer))
        assert self._self_name is not None
        assert decision.choose is not None
        watch = Watch(self.meta, self._self_name, decision.choose, end, len(query))
        source: AsyncGenerator[Piece, None]
        if decision.own is not None:
            source = self._self_answer(decision.own, generation, watch)
        else:
            # Where LoRA decides, self is the model without it.
            model = self.meta.plain if self.meta.adapted else self.meta.model
            inputs = self.meta.pad([query])
            source = stream_generate(model, self.meta.tokenizer, inputs, generation, ready=self._own_turn, watch=watch)
        async with aclosing(source) as pieces:
            async for piece in pieces:
                if watch.dispatch is None or piece.finish is None:
                    yield piece
        if watch.dispatch is not None:
            raise HandOver(watch.dispatch)

    async def _self_answer(
        self, own: OwnStart, generation: Generation, watch: Watch | None = None
    ) -> AsyncGenerator[Piece, None]:
        """Yield self's answer, continuing from the decision without a second prefill.

        The decision's logits give the first token, and its KV cache serves the others.
        """
        # Without a watch, the model without expert rows generates: it has no ids to mask at every token.
        model, tokenizer = self.meta.model if watch else self.meta.plain, self.meta.tokenizer
        prompt = own.inputs["input_ids"]
        read = int(own.inputs["attention_mask"].sum())
        token, state = await asyncio.to_thread(first_token, self.meta.plain, prompt, own.logits, generation)
        if token.item() in end_ids(self.meta.plain, tokenizer):
            yield Piece(finish="stop", usage=(read, 1))
            return
        assert generation.max_new_tokens is not None  # see `_ask`
        if generation.max_new_tokens == 1:
            yield Piece(str(tokenizer.decode(token[0], skip_special_tokens=True)), finish="length", usage=(read, 1))
            return
        mask = own.inputs["attention_mask"]
        rest = {
            "input_ids": torch.cat([prompt, token], 1),
            "attention_mask": torch.cat([mask, torch.ones_like(token, dtype=mask.dtype)], 1),
            "past_key_values": own.cache,
            "max_new_tokens": generation.max_new_tokens - 1,
        }
        if (placed := own.inputs.get("position_ids")) is not None:
            # The prompt ends in text, so its position is the last.
            rest["position_ids"] = torch.cat([placed, placed[..., -1:] + 1], -1)
        source = stream_generate(
            model,
            tokenizer,
            rest,
            generation,
            first=token[0],
            state=state,
            ready=self._own_turn,
            watch=watch,
        )
        async with aclosing(source) as pieces:
            async for piece in pieces:
                yield piece if piece.usage is None else replace(piece, usage=(read, piece.usage[1]))


def _hosts(addresses: str) -> str:
    """Return hosts and ports of addresses."""
    return " and ".join(urlsplit(address).netloc or address for address in addresses.split(", "))
