"""Decisions: conversations that come at the same time are decided in one forward pass."""

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

_MOST_STARTS = 8  # caches that wait for self's turn: it gives one answer at a time
_IDLE = 60.0  # seconds after which a thread without questions ends; the next question begins another one
_LONG = 2048  # tokens; on a CPU a pass over so many takes seconds, which short conversations do not wait for


_NOBODY = ExpertokenError("nobody waits for this decision any more")


@dataclass(frozen=True, eq=False)
class OwnStart:
    """What self goes on from: the decision's logits give its first token, the KV cache the rest.

    Attributes:
        logits: `[1, V]` float32, without the experts' tokens, which self must not write.
        inputs: `input_ids` and `attention_mask` `[1, T]`, padded on the left as the decision's batch was, and
            `position_ids` `[3, 1, T]` of a model that has three dimensions of them.
        cache: of the row.
    """

    logits: torch.Tensor
    inputs: dict[str, torch.Tensor]
    cache: "DynamicCache"


@dataclass(frozen=True)
class Decision:
    """A decision and what came with it.

    Attributes:
        dispatch: who is asked.
        prompt_tokens: of the conversation, also those that the decision did not read.
        seconds: from the question to the decision, waiting included.
        own: where self was chosen and can go on from here.
        choose: from the candidates' logits `[C]`, as it was decided; for positions inside self's answer.
        whole: whether the decision read the conversation as it is, see `Query.whole`.
    """

    dispatch: Dispatch
    prompt_tokens: int
    seconds: float
    own: OwnStart | None = None
    choose: Callable[[torch.Tensor], Dispatch] | None = None
    whole: bool = True


@dataclass(frozen=True)
class Question:
    """A conversation to decide.

    Attributes:
        query: the conversation as the meta LLM reads it.
        choose: from the candidates' logits `[C]`.
        answer: whether self's answer may follow, so that the KV cache is kept for it.
    """

    query: Query
    choose: Callable[[torch.Tensor], Dispatch]
    answer: bool = False


@dataclass(frozen=True)
class _Waiting:
    """A question that waits for its pass.

    Attributes:
        question: to decide.
        since: when it came.
        tell: whoever waits.
        gone: whether nobody waits any more.
    """

    question: Question
    since: float
    tell: Callable[["Decision | Exception"], None]
    gone: Callable[[], bool]


class Decider:
    """Decides with a meta LLM.

    Args:
        meta: that decides.
        self_name: how self is called, or None where it is no candidate.
        observer: is told of every decision.
    """

    def __init__(self, meta: MetaLLM, self_name: str | None, observer: Observer | None = None) -> None:
        self.meta, self.self_name = meta, self_name
        self.observer = observer or Observer()
        self._lanes: dict[bool, queue.SimpleQueue[_Waiting]] = {}
        self._lock = threading.Lock()
        self._starts: weakref.WeakSet[OwnStart] = weakref.WeakSet()

    def decide(self, questions: Sequence[Question]) -> list[Decision]:
        """Decide many at once, in this thread.

        Raises:
            Exception: what the first question that can't be decided failed with.
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
        """Decide one, together with whatever else is waiting when the model is free.

        There is no time that a decision waits for company: while one pass runs, the next batch gathers. Long
        conversations are decided in a thread of their own, so that short ones do not wait for them.
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
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, outcome)

        waiting = _Waiting(question, time.perf_counter(), tell, future.cancelled)
        self._enqueue(waiting, long=len(question.query) > _LONG)
        return await future

    def _enqueue(self, waiting: _Waiting, *, long: bool) -> None:
        """Put a question into the queue for its length, which a thread decides what has gathered in."""
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
                with self._lock:  # a decider that another one has replaced must not stay for its threads' sake
                    if lane.empty():
                        del self._lanes[long]
                        return
                continue
            self._decide_waiting([first, *_drain(lane)])
            del first

    def _decide_waiting(self, waiting: list[_Waiting]) -> None:
        # A function of its own, so that an idle thread holds no decision and no cache.
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
        """Decide in batches; `tell` gets each question's outcome, so that one failure fails no other question.

        Nothing is computed for who is `gone` when the batch begins: one pass may take as long as somebody waits.
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
        """Decide in one forward pass; a question whose policy fails gets the error."""
        chosen: list[Dispatch | Exception] = []

        def choose(candidates: torch.Tensor) -> bool:
            """Choose for each question; return whether self goes on from this pass for one of them."""
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
        """Whether self's answer begins with what the decision has computed."""
        return question.answer and isinstance(choice, Dispatch) and choice.expert == self.self_name

    def _own_start(self, logits: torch.Tensor, inputs: dict[str, Any], cache: Any, row: int) -> OwnStart | None:
        """None where many wait for their turn already, each with a cache: those read the conversation again."""
        with self._lock:  # lanes come here at the same time
            if len(self._starts) >= _MOST_STARTS:
                return None
        # Not what it has seen, which lies in the cache, and has no dimension for the batch in some families.
        chosen = {key: inputs[key][row : row + 1] for key in ("input_ids", "attention_mask")}
        if inputs["position_ids"].dim() > chosen["input_ids"].dim():
            chosen["position_ids"] = inputs["position_ids"][:, row : row + 1]
        single = _row_of(cache, row, len(logits), logits.device)
        own = logits[row : row + 1, : self.meta.vocab_size].float().clone()  # no view of the whole batch's
        start = OwnStart(own, chosen, single)
        with self._lock:
            self._starts.add(start)
        return start

    def _forward(
        self, questions: Sequence[Question], inputs: dict[str, Any], choose: Callable[[torch.Tensor], bool]
    ) -> tuple[torch.Tensor, Any] | None:
        """Run the pass that decides; return its logits and KV cache where self may go on from them.

        Args:
            questions: N questions.
            inputs: their batch.
            choose: is given the candidates' logits `[N, C]`, and returns whether self goes on.
        """
        from transformers import DynamicCache

        meta = self.meta
        # Where LoRA was trained for dispatching, self is the model without it, and this cache is of no use to it.
        kept = self.self_name is not None and not meta.adapted and any(q.answer for q in questions)
        # Made from the config, so that sliding-window layers get the cache they need.
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
    """One row of a batch's cache; the batch's own stays as it is."""
    if count == 1:
        return cache
    single = copy.copy(cache)
    single.layers = [_copied(layer) for layer in cache.layers]
    # Not `batch_select_indices`, which linear attention does not have; this gives every layer new tensors.
    rows: Any = torch.tensor([row], device=device)
    single.reorder_cache(rows)
    return single


def _copied(layer: Any) -> Any:
    """A layer whose tensors can be exchanged; linear attention keeps its own in dicts."""
    copied = copy.copy(layer)
    for key, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(copied, key, dict(value))
    return copied
