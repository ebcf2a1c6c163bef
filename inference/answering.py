"""Answering a conversation: candidates are tried in order until one completes the answer."""

import asyncio
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Any, overload

from ..modeling.backend import Backend, Generation, Piece
from ..modeling.capabilities import Needs, unable
from ..modeling.chat import Message, as_messages, plain, text_of
from ..modeling.dispatch import Dispatch
from ..modeling.errors import (
    ExpertFailedError,
    ExpertokenError,
    NoAnswerError,
    RequestRefusedError,
    did_you_mean,
    one_line,
)
from ..modeling.policy import Chooser, Policy
from ..modeling.reminders import unnoted
from .backends.models import LocalModels
from .breaker import Breaker
from .decider import Decision
from .handover import HandOver
from .loop import BackgroundLoop, in_thread
from .observer import Answered, Observer, Spent
from .reply import Attempt, Failed, HandedOver, Reply, ReplyStream, Turn, Whole
from .sessions import Affinity

logger = logging.getLogger(__name__)

_COUNTED = 100_000  # characters: counting the tokens of longer texts takes seconds


class AnsweringModel(ABC):
    """Many LLMs that answer as one, wherever the decision is made.

    Each method that answers exists twice: for ordinary code, and with an `a` before its name for code in an event loop.

    Attributes:
        limit: Longest conversation in tokens that the operator allows, for every candidate. None if the operator sets
            no limit.
        local_models: Models held in this process, or None.

    Args:
        chooser: Chooser among the candidates.
        policy: Default policy for requests that set none.
        observer: Observer that is notified of decisions, answers and failures.
    """

    limit: int | None = None
    local_models: LocalModels | None = None

    def __init__(self, chooser: Chooser, policy: Policy | None, observer: Observer | None) -> None:
        self.chooser, self.policy, self.observer = chooser, policy or Policy(), observer or Observer()
        self.pool = pool = chooser.pool
        self._backends: dict[str, Backend] = {}
        self._breakers = {name: Breaker() for name in pool.names}

    @property
    @abstractmethod
    def identity(self) -> str:
        """Fingerprint that differs between models that decide or answer differently."""

    @abstractmethod
    def count(self, text: str) -> int:
        """Count the tokens of a text as the meta LLM reads it, for backends that report no counts."""

    @abstractmethod
    async def adecide(
        self,
        messages: Sequence[Message],
        policy: Policy | None = None,
        generation: Generation | None = None,
        affinity: Affinity | None = None,
    ) -> Decision:
        """Decide on a conversation, batched with other conversations that are pending.

        Args:
            messages: Conversation to decide on.
            policy: Policy for choosing a candidate. Defaults to the model's own.
            generation: Options of the answer. Experts that can't serve them are no candidates.
            affinity: Binding of the conversation to the expert of its last answer. Defaults to the one that the
                messages imply.
        """

    @abstractmethod
    def decide(
        self,
        conversations: Sequence[Sequence[Message]],
        policy: Policy | None = None,
        generation: Generation | None = None,
    ) -> list[Decision]:
        """Decide on several conversations without answering them. Arguments as in `adecide`."""

    @abstractmethod
    def backend(self, name: str) -> Backend:
        """Return the opened backend of a candidate.

        Raises:
            ExpertFailedError: The backend can't be opened.
        """

    @abstractmethod
    def reloaded(self) -> "AnsweringModel":
        """Return a model from the current files that reuses the weights in memory.

        This model continues its in-flight answers.

        Raises:
            ExpertokenError: The files are no longer well formed.
        """

    def batched(self, names: Iterable[str]) -> list[str]:
        """Return the candidates that run in this process and answer in batches.

        They are sorted so that as few models as possible are loaded.
        """
        return []

    def prepare(self, name: str) -> None:  # noqa: B027 - an endpoint needs no preparation
        """Start to load a candidate that is needed soon, if there is room for it.

        The call returns immediately.
        """

    @property
    def calibrated_shares(self) -> Mapping[str, float]:
        """Share of each candidate in the calibration prompts, 0 to 1. Empty without a calibration."""
        return {}

    @property
    def left_alone(self) -> list[str]:
        """Candidates that are skipped because they failed too often recently."""
        return [name for name, breaker in self._breakers.items() if breaker.is_open]

    @property
    def opened(self) -> dict[str, Backend]:
        """Backends opened so far, by candidate."""
        return dict(self._backends)

    def observe(self, observer: Observer) -> None:
        """Replace the observer."""
        self.observer = observer

    @overload
    def route(  # type: ignore[overload-overlap]  # a text is a sequence of texts too
        self, conversations: str | Sequence[Message], *, policy: Policy | None = None
    ) -> Dispatch: ...

    @overload
    def route(
        self, conversations: Sequence[str | Sequence[Message]], *, policy: Policy | None = None
    ) -> list[Dispatch]: ...

    def route(self, conversations: str | Sequence[Any], *, policy: Policy | None = None) -> Dispatch | list[Dispatch]:
        """Decide which candidate would answer, without answering.

        Args:
            conversations: One conversation (a string, or a list of messages), or a list of conversations.
            policy: Policy for choosing a candidate. Defaults to the composite's own.

        Returns:
            One `Dispatch`, or a list of them in the same order.
        """
        many = not isinstance(conversations, str) and not (
            len(conversations) > 0 and isinstance(conversations[0], dict)
        )
        given = [as_messages(c) for c in (conversations if many else [conversations])]
        found = [decision.dispatch for decision in self.decide(given, policy)]
        return found if many else found[0]

    def chat(self, conversation: str | Sequence[Message], *, policy: Policy | None = None, **generation: Any) -> Reply:
        """Answer a conversation.

        Args:
            conversation: A string, or messages with `role` and `content`. The decision reads its view of it.
            policy: Policy for choosing a candidate. Defaults to the composite's own.
            **generation: Options of `Generation` (`max_new_tokens`, `temperature`, `top_p`, `seed`, `stop`, ...).

        Raises:
            ExpertokenError: The conversation is not well formed, or no candidate could answer.
        """
        return BackgroundLoop.call(self.achat(conversation, policy=policy, **generation))

    def stream(
        self, conversation: str | Sequence[Message], *, policy: Policy | None = None, **generation: Any
    ) -> ReplyStream:
        """Answer a conversation in pieces. Arguments and errors as in `chat`."""
        return BackgroundLoop.call(self.astream(conversation, policy=policy, **generation))

    async def achat(
        self, conversation: str | Sequence[Message], *, policy: Policy | None = None, **generation: Any
    ) -> Reply:
        """Answer a conversation as in `chat`."""
        stream = await self.astream(conversation, policy=policy, **generation)
        async for _ in stream.pieces():
            pass
        return stream.reply

    async def astream(
        self, conversation: str | Sequence[Message], *, policy: Policy | None = None, **generation: Any
    ) -> ReplyStream:
        """Answer a conversation in pieces, as in `stream`."""
        options = _generation(generation)
        messages = as_messages(conversation)
        return self.answer(messages, await self.adecide(messages, policy, options), options)

    def about(self, messages: Sequence[Message]) -> int:
        """Count the tokens of a conversation's texts, without the tokens that a template adds.

        The count is estimated for very long texts.
        """
        return self._estimated("\n".join(text_of(message, placeholders=True) for message in messages))

    def _estimated(self, text: str) -> int:
        counted = text[:_COUNTED]
        return math.ceil(self.count(counted) * len(text) / max(1, len(counted)))

    def about_tools(self, tools: Any) -> int:
        """Estimate the tokens that a request's tools take in a prompt. Return 0 without tools."""
        return self._estimated(json.dumps(tools)) if tools else 0

    def view(self, messages: Sequence[Message]) -> str:
        """Return the text that a decision on a conversation reads."""
        kept, _ = unnoted(plain(messages, placeholders=True))
        return "\n".join(f"{message['role']}: {message['content']}" for message in kept)

    def _unable(
        self, messages: Sequence[Message], generation: Generation | None, tokens: int | None = None
    ) -> dict[str, str]:
        """Return the candidates that can't serve a request, with the reasons.

        Args:
            messages: Conversation of the request.
            generation: Options of the answer.
            tokens: Number of tokens of the conversation, if it is already known.
        """
        candidates = self.pool.candidates
        if any(expert.context_length is not None for expert in candidates):
            tools = None if generation is None else generation.extra.get("tools")
            tokens = (self.about(messages) if tokens is None else tokens) + self.about_tools(tools)
        return unable(candidates, Needs.of(messages, generation, tokens or 0))

    def _undisputed(self, messages: Sequence[Message], name: str) -> Decision:
        """Return the decision for the only candidate that may answer.

        The meta LLM reads nothing, so its context length does not matter.

        Raises:
            ExpertokenError: The conversation is longer than the operator allows.
        """
        tokens = self.about(messages)
        self._check_length(tokens, self.limit)
        return Decision(Dispatch(name, {name: 1.0}, "no other candidate may answer", (name,)), tokens, 0.0)

    def _bound(
        self, messages: Sequence[Message], policy: Policy, affinity: Affinity, unable: Mapping[str, str]
    ) -> Decision | None:
        """Return the decision for the expert whose tool calls are open.

        The result is None if there is no such expert, or if the policy excludes it. Another expert would read calls
        that it did not make, under ids that its server does not know.
        """
        names = self.chooser.candidates(policy, unable)
        if not affinity.open_calls or affinity.last not in names:
            return None
        tokens = self.about(messages)
        self._check_length(tokens, self.limit)
        ranking = _first(affinity.last, names, policy)
        dispatch = Dispatch(affinity.last, {affinity.last: 1.0}, "its tool calls are open", ranking)
        return Decision(dispatch, tokens, 0.0, whole=False)

    def _undecided(
        self,
        messages: Sequence[Message],
        policy: Policy,
        reason: str,
        started: float,
        generation: Generation | None = None,
    ) -> Decision:
        """Let the policy's `default` answer because the meta LLM can't decide.

        Self can't be this fallback, because the meta LLM itself is unavailable.

        Raises:
            NoAnswerError: The policy names no usable default.
        """
        names = self.chooser.candidates(policy, self._unable(messages, generation))
        if policy.default not in names or policy.default == self.pool.self_name:
            self.observer.lost()
            raise NoAnswerError(reason)
        ranking = _first(policy.default, names, policy)
        dispatch = Dispatch(policy.default, {policy.default: 1.0}, f"{reason}: {policy.default} answers", ranking)
        return Decision(dispatch, self.about(messages), time.perf_counter() - started, whole=False)

    @staticmethod
    def _check_length(tokens: int, most: int | None) -> None:
        if most is not None and tokens > most:
            raise ExpertokenError(
                f"expected a conversation of at most {most} tokens, got {tokens}. Shorten it, or start a new chat."
            )

    def answer(self, messages: Sequence[Message], decision: Decision, generation: Generation) -> ReplyStream:
        """Return the stream of the answer that follows a decision.

        No request is sent before the stream is iterated over.

        Args:
            messages: Conversation to answer.
            decision: Decision on the conversation.
            generation: Options of the answer.
        """
        stream = ReplyStream(decision)
        stream._pieces = self._answer(self._unnamed(messages), decision, generation, stream)
        return stream

    def _unnamed(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages without a `name` that holds a candidate.

        Which expert answered is information for the user, not for the models.
        """

        def is_ours(message: Message) -> bool:
            return message["role"] == "assistant" and message.get("name") in self.pool.names

        return [{k: v for k, v in m.items() if k != "name"} if is_ours(m) else m for m in messages]

    async def _answer(
        self, messages: list[Message], decision: Decision, generation: Generation, stream: ReplyStream
    ) -> AsyncGenerator[Piece, None]:
        """Yield pieces of the answer, trying candidates in order until one completes it.

        The next candidate continues a partial answer.
        """
        turn = Turn(stream, generation)
        order, chosen = self._order(decision.dispatch.ranking, stream), decision.dispatch.expert
        while (name := next(order, None)) is not None:
            attempt = Attempt(name)
            async with aclosing(self._attempt(attempt, messages, decision, turn)) as pieces:
                async for piece in pieces:
                    yield piece
            outcome = attempt.outcome
            if isinstance(outcome, Whole):
                yield self._finish(name, chosen, decision, turn)
                return
            if isinstance(outcome, HandedOver):
                chosen = outcome.dispatch.expert
                order = self._hand_over(name, outcome.dispatch, decision, turn)
                continue
            assert outcome is not None
            self._fail(name, outcome, decision, turn)
            if turn.calls:  # a partial tool call can't be continued
                break
        if not turn.refused:  # a request that all candidates refuse is no fault of the server
            self.observer.lost()
        raise NoAnswerError(stream.failures, begun=turn.begun, refused=turn.refused)

    def _within_means(self, name: str, decision: Decision, turn: Turn) -> Generation:
        """Return the options for the rest of an answer, within the limits of the candidate's pool entry."""
        expert, generation = self.pool[name], turn.left(self.count)
        if generation.max_new_tokens is None:
            return generation
        left = None
        if expert.context_length is not None:
            read = decision.prompt_tokens + self.about_tools(generation.extra.get("tools"))
            left = max(1, expert.context_length - read)
        limits = (generation.max_new_tokens, expert.max_output_tokens, left)
        return replace(generation, max_new_tokens=min(limit for limit in limits if limit is not None))

    async def _attempt(
        self, attempt: Attempt, messages: list[Message], decision: Decision, turn: Turn
    ) -> AsyncGenerator[Piece, None]:
        """Yield the pieces that one candidate adds to the turn, and set the outcome of the attempt."""
        name = attempt.name
        turn.begin(name)
        try:
            generation = self._within_means(name, decision, turn)
            async with aclosing(self._ask(name, messages, generation, decision, turn)) as pieces:
                async for piece in pieces:
                    for passed in turn.take(piece):
                        yield passed
                    if turn.stops.reached:
                        break
        except HandOver as handed:
            attempt.outcome = HandedOver(handed.dispatch)
        except Exception as error:  # any failure of an expert leads to the next candidate
            # A failure after the end of an answer does not invalidate it.
            whole = turn.finished and not turn.is_empty
            failed = Failed(one_line(error), refused=isinstance(error, RequestRefusedError))
            attempt.outcome = Whole() if whole else failed
        except BaseException:  # the user disconnected: the tokens so far still count
            self._breakers[name].left()
            self._tell_spent(name, decision, turn)
            raise
        else:
            empty = turn.is_empty and not self.pool[name].is_self
            attempt.outcome = Failed("returned an empty answer") if empty else Whole()

    def _finish(self, name: str, chosen: str, decision: Decision, turn: Turn) -> Piece:
        """Record a whole answer and return its last piece."""
        self._breakers[name].succeeded()
        last = turn.end()
        self._tell_spent(name, decision, turn)
        turn.stream.reply = replace(turn.stream.reply, seconds=turn.elapsed)
        self.observer.answered(Answered(name, chosen, turn.stream.reply.first, turn.elapsed))
        return last

    def _hand_over(self, name: str, dispatch: Dispatch, decision: Decision, turn: Turn) -> Iterator[str]:
        """Record that self called for an expert, and return the candidates to try from here on."""
        stream = turn.stream
        self._breakers[name].succeeded()
        self._tell_spent(name, decision, turn)
        self.observer.handed_over(dispatch.expert)
        stream.reply = replace(stream.reply, handed_over=dispatch, handed_over_after=len(turn.text))
        # Self continues if no expert can. A candidate that failed in this turn is not tried again.
        experts = [one for one in dispatch.ranking if one != name and one not in stream.failures]
        return self._order([*experts, name], stream)

    def _fail(self, name: str, failed: Failed, decision: Decision, turn: Turn) -> None:
        """Record that a candidate could not answer, or could not finish."""
        stream, breaker = turn.stream, self._breakers[name]
        turn.refused = turn.refused and failed.refused
        breaker.left() if failed.refused else breaker.failed()
        self._tell_spent(name, decision, turn)
        self.observer.failed(name, failed.reason, begun=turn.begun, refused=failed.refused)
        stream.reply = replace(stream.reply, failures=stream.failures | {name: failed.reason})
        logger.warning("expert %r failed, falling back to the next candidate: %s", name, failed.reason)

    def _order(self, ranking: Sequence[str], stream: ReplyStream) -> Iterator[str]:
        """Yield the ranked candidates, skipping candidates that failed too often recently.

        Skipped candidates come last, as a last resort.
        """
        skipped = []
        for name in ranking:
            if self._breakers[name].admits():
                yield name
            else:
                self.observer.skipped(name)
                skipped.append(name)
                stream.reply = replace(stream.reply, skipped=tuple(dict.fromkeys([*stream.reply.skipped, name])))
        yield from skipped

    async def _ask(
        self, name: str, messages: list[Message], generation: Generation, decision: Decision, turn: Turn
    ) -> AsyncGenerator[Piece, None]:
        """Yield one candidate's answer, or its continuation of a partial answer."""
        backend = self._backends.get(name)
        if backend is None:  # an adapter may have to wait until memory is free
            backend = await asyncio.wrap_future(in_thread(self.backend, name))
        try:
            async with aclosing(backend.stream(messages, generation, begun=turn.text)) as pieces:
                async for piece in pieces:
                    yield piece
        except SystemExit as error:
            raise ExpertFailedError("its backend raised SystemExit, which was stopped") from error

    def _tell_spent(self, name: str, decision: Decision, turn: Turn) -> None:
        """Record the tokens and the cost of a candidate's part of the turn, complete or not."""
        if not turn.part and turn.usage is None and not turn.finished:
            return
        read, written = turn.usage or (decision.prompt_tokens, self.count(turn.part))
        cost = self.pool[name].price(read, written, turn.cached)
        reply = turn.stream.reply
        turn.stream.reply = replace(
            reply,
            prompt_tokens=max(reply.prompt_tokens, read),
            completion_tokens=reply.completion_tokens + written,
            cost=reply.cost if cost is None else (reply.cost or 0.0) + cost,
        )
        self.observer.spent(Spent(name, read, written, cost))


def _first(name: str, names: Sequence[str], policy: Policy) -> tuple[str, ...]:
    """Return a ranking without a decision: one candidate, then the others in order, as many as `fallbacks` allows."""
    ranking = (name, *(other for other in names if other != name))
    return ranking if policy.fallbacks is None else ranking[: 1 + policy.fallbacks]


def _generation(options: dict[str, Any]) -> Generation:
    known = [item.name for item in fields(Generation)]
    if unknown := [name for name in options if name not in known]:
        raise ExpertokenError(f"unknown generation argument {unknown[0]!r}, {did_you_mean(unknown[0], known)}")
    try:
        return Generation(**options)
    except TypeError:
        raise ExpertokenError(f"stop: expected a text or a list of texts, got {options['stop']!r}") from None
