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
        composite: a loaded composite.
        dtype: of local experts' weights; as `load_causal_lm` chooses where None.
        policy: how a candidate is chosen where a request says nothing else; the composite's own where None.
        timeouts: of endpoints.
        observer: is told what happens.
        budget: bytes that the weights of local experts may take; the meta LLM's own base does not count. None for no
            limit.
        pinned: experts that stay in memory once they are loaded.
        quantization: of local experts: nf4, int8 or None.
        anywhere: whether self may hand over in mid-answer; where None, whether that was trained.
        send_keys: agree to what a loaded composite sends of this machine's keys; see `modeling.consent`.
        before: the model that this one takes the place of: models in memory and turns are shared, and who failed is
            known.

    Raises:
        ExpertokenError: the composite was loaded and sends keys to addresses that nobody here agreed to; a pinned
            expert is unknown or not local; the quantization or the type is unknown.
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
                f"anywhere: expected a composite whose rows read the head, found --state {self.meta.state}; positions "
                "inside an answer are decided where its tokens are written"
            )
        self._positions = self.meta.positions
        pins = {name: self._source(name) for name in pinned}
        if remote := [name for name, source in pins.items() if source is None]:
            raise ExpertokenError(f"{', '.join(remote)}: can't be pinned in memory, since others hold it")
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
        # Self gives one answer at a time, as every model here does.
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
        """Load a composite folder. Experts are opened when they are first needed.

        Args:
            path: the folder, or `owner/name` of one on the hub.
            device: where models go; the first accelerator, or the CPU, where not given.
            dtype: of the weights; as `load_composite` chooses where not given.
            revision: of a composite on the hub.
            trust_remote_code: allow the base model's repository to run its own code.
            **options: `policy`, `timeouts`, `observer`, `budget`, `pinned`, `quantization`, `anywhere` and `send_keys`,
                as the class takes them.

        Raises:
            ExpertokenError: the folder is not a whole composite, or sends keys to addresses that nobody here agreed to.
        """
        folder = local_folder(path, revision)
        if not options.get("send_keys") and (folder / POOL_FILE).exists():  # before a model is loaded for nothing
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
        """Tells composites apart that decide or answer differently."""
        rows = hashlib.sha256(self.meta.rows.numpy().tobytes()).hexdigest()[:16]
        return f"{self.meta.base_fingerprint}-{rows}-{self.manifest.training.get('validation_score')}"

    @property
    def calibrated_shares(self) -> Mapping[str, float]:
        """Share of each candidate in the prompts of the calibration; empty where there was none."""
        return (self.manifest.calibration or {}).get("shares", {})

    def count(self, text: str) -> int:
        """Tokens of a text, as the meta LLM reads it; where a backend does not count its own.

        Of a long text about: other answers wait for this one's count.
        """
        head = text[:_COUNTED]
        found = len(encode_text(self.meta.tokenizer, head).input_ids)
        return found if len(text) <= _COUNTED else found * len(text) // _COUNTED

    def view(self, messages: Sequence[Message]) -> str:
        """Return the text that a decision on a conversation reads, with the chat template's tokens."""
        return str(self.meta.tokenizer.decode(self.meta.encode(self._unnamed(messages)).ids))

    def observe(self, observer: Observer) -> None:
        """Tell another observer from now on."""
        self.observer = self._decider.observer = observer

    def reloaded(self) -> "CompositeModel":
        """Return the composite as its folder is now (experts, rows, calibration), over the weights in memory.

        Answers that are being given go on as they began.

        Raises:
            ExpertokenError: the composite was not loaded from a folder, or that is not a whole composite of the same
                base any more.
        """
        if self.composite.folder is None:
            raise ExpertokenError("this composite was not loaded from a folder")
        composite = load_composite(
            self.composite.folder,
            device=self.meta.device,
            trust_remote_code=self.meta.source.trust_remote_code,
            beside=self.meta,
        )
        pinned = [name for name in self._given["pinned"] if name in composite.pool.names]
        return CompositeModel(composite, self._dtype, before=self, **self._given | {"pinned": pinned})

    def save_pretrained(self, path: Path | str, *, verify: bool = True) -> None:
        """Write a composite folder; see `modeling.composite.save_composite`."""
        save_composite(self.composite, path, verify=verify)

    def push_to_hub(self, repo: str, *, private: bool = True, commit_message: str = "A composite of experts") -> str:
        """Upload the composite to the hub; see `modeling.hub.push`."""
        return push(self.composite, repo, private=private, message=commit_message)

    def decide(
        self,
        conversations: Sequence[Sequence[Message]],
        policy: Policy | None = None,
        generation: Generation | None = None,
    ) -> list[Decision]:
        """Decide on many, in as few forward passes as memory allows."""
        return self._decider.decide([self._question(messages, policy, generation) for messages in conversations])

    async def adecide(
        self,
        messages: Sequence[Message],
        policy: Policy | None = None,
        generation: Generation | None = None,
        affinity: Affinity | None = None,
    ) -> Decision:
        """Decide on a conversation, together with whatever else is to be decided just now.

        Where the meta LLM can't decide, or not in time, the policy's `default` answers if one is named.

        Raises:
            ExpertokenError: the conversation is too long or refused, or the policy does not fit the pool.
            NoAnswerError: the meta LLM can't decide, and nobody is named for that.
        """
        affinity = affinity or Affinity.of(messages, self.pool)
        policy, started, limit = policy or self.policy, time.perf_counter(), self._opening.timeouts.decision
        try:
            with anyio.fail_after(limit):
                # Encoding a long conversation takes milliseconds, which other answers of this loop would wait for.
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
        self.chooser.candidates(policy)  # a mistake in it is told before anything is computed
        query = self.meta.encode(self._unnamed(messages))
        tokens = len(query) + query.cut
        self._check_length(tokens, self.limit)
        unable = self._unable(messages, generation, tokens)
        self.chooser.candidates(policy, unable)
        last = affinity.last
        if answer and policy.sticky > 0 and last:  # most likely, so that its model may come while this is decided
            self.prepare(last)
        # A decision reads `[image_url]` for what it does not see; an answer must not.
        answer = answer and query.whole and sum(map(count_media, messages)) == len(query.media)
        answer = answer and not wants_tools({} if generation is None else generation.extra)  # other prompts
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
        """One candidate's answer, or what it adds to an answer that was begun."""
        # Not where something is out already, or was: self goes on from that as everybody does.
        first = name == self._self_name and name == decision.dispatch.expert and not (turn.begun or turn.handed_over)
        first = first and decision.whole  # of a view, nothing can be gone on with
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
        """Return those of them that answer in batches, in the order in which least has to be loaded.

        What is in memory comes first, and adapters of one base lie together. Self is none of them where it may call for
        an expert in mid-answer.
        """

        def load(name: str) -> tuple[bool, str, str]:
            source = self._source(name)
            return (False, "", name) if source is None else (not self.local_models.holds(source), source.model, name)

        batching = [name for name in names if self.pool[name].kind.batches]
        return sorted((name for name in batching if not (self.anywhere and name == self._self_name)), key=load)

    def backend(self, name: str) -> Backend:
        """The opened backend of a candidate.

        Raises:
            ExpertFailedError: it can't be opened.
        """
        if name not in self._backends:  # opened twice at worst: nobody waits here for another expert's loading
            expert = self.pool[name]
            return self._backends.setdefault(name, expert.kind.open(expert, self._opening))
        return self._backends[name]

    def prepare(self, name: str) -> None:
        """Begin to load a candidate that will be wanted soon, where there is room for it; nothing waits for that."""
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
        """Self's answer, up to where the meta LLM calls for an expert.

        Raises:
            HandOver: there.
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
        """Go on from the decision: its logits give the first token, its KV cache the rest. No second prefill."""
        # Without a watch by the model without expert rows, which has no ids to be masked at every token.
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
        if (placed := own.inputs.get("position_ids")) is not None:  # the prompt's end is text: its position is the last
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
