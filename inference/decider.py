"""Decisions: conversations that arrive at the same time are decided in one forward pass."""

import asyncio
import copy
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..modeling.batching import run_batches
from ..modeling.chat import Query
from ..modeling.dispatch import Dispatch, candidate_logits, dispatch_forward, pooled_logits, positions
from ..modeling.errors import ExpertokenError
from ..modeling.meta import MetaLLM
from ..modeling.state import Enough
from .loop import at_work
from .observer import Observer

if TYPE_CHECKING:
    from transformers import DynamicCache

_MOST_STARTS = 8  # caches kept for pending answers of self, which generates one at a time
_IDLE = 60.0  # seconds after which an idle thread ends. The next question starts another one
_LONG = 2048  # tokens. On a CPU a pass over so many takes seconds, which must not delay short conversations


_NOBODY = ExpertokenError("the decision was skipped because its request was cancelled")


@dataclass(frozen=True, eq=False)
class OwnStart:
    """The start of self's answer: the decision's logits give the first token, and its KV cache serves the others.

    Attributes:
        logits: Logits `[1, V]` float32, without the experts' tokens, which self must not generate.
        inputs: `input_ids` and `attention_mask` `[1, T]`, padded on the left as in the decision's batch, and
            `position_ids` `[3, 1, T]` for a model with three position dimensions.
        cache: KV cache of the row.
    """

    logits: torch.Tensor
    inputs: dict[str, torch.Tensor]
    cache: "DynamicCache"


@dataclass(frozen=True)
class Decision:
    """A decision and its by-products.

    Attributes:
        dispatch: Result of the decision.
        prompt_tokens: Number of tokens of the conversation, truncated ones included.
        seconds: Seconds from the request to the decision, waiting included.
        own: Start of self's answer, if self was chosen and can continue from the decision's pass. None otherwise.
        choose: Function from the candidates' logits `[C]` to a dispatch, for positions inside self's answer.
        whole: True if the decision read the unabridged conversation, as in `Query.whole`.
    """

    dispatch: Dispatch
    prompt_tokens: int
    seconds: float
    own: OwnStart | None = None
    choose: Callable[[torch.Tensor], Dispatch] | None = None
    whole: bool = True


@dataclass(frozen=True)
class Question:
    """A conversation to decide on.

    Attributes:
        query: Conversation as the meta LLM reads it.
        choose: Function from the candidates' logits `[C]` to a dispatch.
        answer: True if self's answer may follow, so that the KV cache is kept for it.
    """

    query: Query
    choose: Callable[[torch.Tensor], Dispatch]
    answer: bool = False


@dataclass(frozen=True)
class _Waiting:
    """A question that waits for its forward pass, with the callback that receives the outcome.

    Attributes:
        question: Question to decide.
        since: Time of its arrival, in seconds.
        gone: Function that returns true once the caller has disconnected.
    """

    question: Question
    since: float
    tell: Callable[["Decision | Exception"], None]
    gone: Callable[[], bool]


class Decider:
    """Batched decisions of a meta LLM.

    Args:
        meta: Meta LLM that decides.
        self_name: Name of self, or None if self is no candidate.
        observer: Observer that is notified of every decision.
    """

    def __init__(self, meta: MetaLLM, self_name: str | None, observer: Observer | None = None) -> None:
        self.meta, self.self_name = meta, self_name
        self.observer = observer or Observer()
        self._lanes: dict[bool, queue.SimpleQueue[_Waiting]] = {}
        self._lock = threading.Lock()
        self._starts: weakref.WeakSet[OwnStart] = weakref.WeakSet()

    def decide(self, questions: Sequence[Question]) -> list[Decision]:
        """Decide on several questions in this thread.

        Raises:
            Exception: The error of the first question that can't be decided.
        """
        outcomes: dict[int, Decision | Exception] = {}
        self._run(questions, [time.perf_counter()] * len(questions), outcomes.__setitem__)
        decisions = []
        for index in range(len(questions)):
            outcome = outcomes[index]
            if isinstance(outcome, Exception):
                raise outcome
            decisions.append(outcome)
        return decisions

    async def adecide(self, question: Question) -> Decision:
        """Decide on one question, batched with the others that are pending when the model is free.

        A decision never waits for a batch to fill: while one pass runs, the next batch gathers. Long conversations are
        decided in a second thread, so that they do not delay short ones.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Decision] = loop.create_future()

        def settle(outcome: Decision | Exception) -> None:
            if future.cancelled():
                return
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        def tell(outcome: Decision | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed, and with it all its requests
                loop.call_soon_threadsafe(settle, outcome)

        waiting = _Waiting(question, time.perf_counter(), tell, future.cancelled)
        self._enqueue(waiting, long=len(question.query) > _LONG)
        return await future

    def _enqueue(self, waiting: _Waiting, *, long: bool) -> None:
        """Queue a question by its length. Each queue has a thread that decides pending questions in batches."""
        with self._lock:
            if long not in self._lanes:
                lane: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
                self._lanes[long] = lane
                name = "decider-long" if long else "decider"
                threading.Thread(target=self._work, args=(lane, long), name=name, daemon=True).start()
            self._lanes[long].put(waiting)

    def _work(self, lane: "queue.SimpleQueue[_Waiting]", long: bool) -> None:
        while True:
            try:
                first = lane.get(timeout=_IDLE)
            except queue.Empty:
                with self._lock:  # idle threads must not keep a replaced decider alive
                    if lane.empty():
                        del self._lanes[long]
                        return
                continue
            self._decide_waiting([first, *_drain(lane)])
            del first

    def _decide_waiting(self, waiting: list[_Waiting]) -> None:
        # A separate function, so that an idle thread holds no decision and no cache.
        questions, since = [one.question for one in waiting], [one.since for one in waiting]
        with at_work():
            self._run(
                questions,
                since,
                lambda index, outcome: waiting[index].tell(outcome),
                lambda index: waiting[index].gone(),
            )

    def _run(
        self,
        questions: Sequence[Question],
        started: Sequence[float],
        tell: Callable[[int, "Decision | Exception"], None],
        gone: Callable[[int], bool] = lambda index: False,
    ) -> None:
        """Decide in batches, and pass each outcome to the callback, so that the failure of one question fails no other.

        Questions that are `gone` when their batch begins are skipped, because a pass may take as long as a caller
        waits.
        """

        def decide(batch: list[int]) -> list[Decision | Exception]:
            wanted = [index for index in batch if not gone(index)]
            found = self._pass([questions[i] for i in wanted], [started[i] for i in wanted]) if wanted else []
            outcomes = dict(zip(wanted, found, strict=True))
            return [outcomes.get(index, _NOBODY) for index in batch]

        batches = run_batches(
            [len(question.query) for question in questions],
            decide,
            label="decision",
            on_error=tell,
        )
        for batch, outcomes in batches:
            for index, outcome in zip(batch, outcomes, strict=True):
                tell(index, outcome)

    @torch.inference_mode()
    def _pass(self, questions: Sequence[Question], started: Sequence[float]) -> list[Decision | Exception]:
        """Decide in one forward pass. A question whose policy fails gets the error."""
        chosen: list[Dispatch | Exception] = []

        def choose(candidates: torch.Tensor) -> bool:
            """Choose for each question. Return whether self continues from this pass for one of them."""
            for row, question in enumerate(questions):
                try:
                    chosen.append(question.choose(candidates[row]))
                except Exception as error:
                    chosen.append(error)
            return any(self._goes_on(question, choice) for question, choice in zip(questions, chosen, strict=True))

        inputs = self.meta.pad([question.query for question in questions])
        inputs["position_ids"] = positions(self.meta.plain, inputs)
        start = self._forward(questions, inputs, choose)
        found: list[Decision | Exception] = []
        for row, (question, dispatch) in enumerate(zip(questions, chosen, strict=True)):
            if isinstance(dispatch, Exception):
                found.append(dispatch)
                continue
            try:
                own = None
                if start is not None and self._goes_on(question, dispatch):
                    own = self._own_start(start[0], inputs, start[1], row)
                seconds = time.perf_counter() - started[row]
                self.observer.decided(dispatch, seconds, len(questions))
                query = question.query
                read = len(query) + query.cut
                found.append(Decision(dispatch, read, seconds, own, question.choose, query.whole))
            except Exception as error:
                found.append(error)
        return found

    def _goes_on(self, question: Question, choice: Dispatch | Exception) -> bool:
        """Check whether self's answer starts from the decision's pass."""
        return question.answer and isinstance(choice, Dispatch) and choice.expert == self.self_name

    def _own_start(self, logits: torch.Tensor, inputs: dict[str, Any], cache: Any, row: int) -> OwnStart | None:
        """Return the start of self's answer from a row of the batch, or None if too many are pending.

        Each pending start holds a cache. Without a start, self reads the conversation again.
        """
        with self._lock:  # both lanes run this concurrently
            if len(self._starts) >= _MOST_STARTS:
                return None
        # Pictures are left out: the cache holds them, and in some families they have no batch dimension.
        chosen = {key: inputs[key][row : row + 1] for key in ("input_ids", "attention_mask")}
        if inputs["position_ids"].dim() > chosen["input_ids"].dim():
            chosen["position_ids"] = inputs["position_ids"][:, row : row + 1]
        single = _row_of(cache, row, len(logits), logits.device)
        # A copy, so that the batch's logits are freed.
        own = logits[row : row + 1, : self.meta.vocab_size].float().clone()
        start = OwnStart(own, chosen, single)
        with self._lock:
            self._starts.add(start)
        return start

    def _forward(
        self, questions: Sequence[Question], inputs: dict[str, Any], choose: Callable[[torch.Tensor], bool]
    ) -> tuple[torch.Tensor, Any] | None:
        """Run the pass that decides. Return its logits and KV cache if self may continue from them.

        Args:
            questions: N questions.
            inputs: Batch of the questions.
            choose: Function of the candidates' logits `[N, C]`, true if self continues for one of them.
        """
        from transformers import DynamicCache

        meta = self.meta
        # With LoRA trained for decisions, self is the model without it and can't use this cache.
        kept = self.self_name is not None and not meta.adapted and any(q.answer for q in questions)
        # Built from the config, so that sliding-window layers get the right cache.
        cache = DynamicCache(config=meta.plain.config) if kept else None
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True} if kept else {}
        if not kept or meta.state.layer is None:
            logits, _ = dispatch_forward(meta.model, **inputs, pooling=meta.state.pooling, **options)
            choose(candidate_logits(logits, meta.first_candidate).cpu())
            return (logits, cache) if kept else None

        def decide(_layer: int, hidden: torch.Tensor) -> None:
            logits = pooled_logits(meta.head(hidden), inputs["attention_mask"], meta.state.pooling)
            if not choose(candidate_logits(logits, meta.first_candidate).cpu()):
                raise Enough

        output = None
        with meta.reader.reading([meta.state.layer], decide):
            output, _ = dispatch_forward(meta.plain, **inputs, **options)
        return None if output is None else (output, cache)


def _drain(waiting: queue.SimpleQueue) -> Iterator[Any]:
    while True:
        try:
            yield waiting.get_nowait()
        except queue.Empty:
            return


def _row_of(cache: "DynamicCache", row: int, count: int, device: torch.device) -> "DynamicCache":
    """Return one row of a batch's cache. The batch's own cache is not changed."""
    if count == 1:
        return cache
    single = copy.copy(cache)
    single.layers = [_copied(layer) for layer in cache.layers]
    # Not `batch_select_indices`, which linear attention lacks. This call gives every layer new tensors.
    rows: Any = torch.tensor([row], device=device)
    single.reorder_cache(rows)
    return single


def _copied(layer: Any) -> Any:
    """Copy a layer so that its tensors can be replaced.

    Layers with linear attention hold their tensors in dicts.
    """
    copied = copy.copy(layer)
    for key, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(copied, key, dict(value))
    return copied
