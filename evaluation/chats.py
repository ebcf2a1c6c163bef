"""Questions asked in a chat: how far decisions hold where something stands before the question, or after it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data_prep.contexts import ASKED, CONTEXTS, in_context
from ..modeling.composite import Composite
from ..modeling.states import cached_states, encode_all, state_logits
from . import metrics
from .splits import Split

ALONE = "alone"
_SEED = 0


@dataclass(frozen=True)
class Chat:
    """What the composite reaches in one context.

    Attributes:
        context: name of the context; `alone` is the bare question.
        queries: number of questions.
        score: mean over benchmarks of the mean score.
        change: that score less the same questions' score alone.
        interval: 95 % interval of the change, bootstrap within benchmarks.
        same_choice: share of the questions on which the choice is that of the bare question.
    """

    context: str
    queries: int
    score: float
    change: float
    interval: tuple[float, float]
    same_choice: float


def in_chats(composite: Composite, test: Split, messages: list[list[dict[str, Any]]], count: int) -> list[Chat]:
    """Ask a side's questions in contexts, and score the choices by the bare questions' results.

    A follow-up ("try again") is about the question before it, whose best candidate is the right choice.

    Args:
        composite: what decides, by its own policy.
        test: the side.
        messages: conversations of its queries.
        count: questions to ask, drawn evenly.
    """
    rows = np.unique(np.linspace(0, len(messages) - 1, min(count, len(messages))).astype(int))
    rng = np.random.default_rng(_SEED)
    alone = [messages[int(row)] for row in rows]
    made: dict[str, list[list[dict[str, Any]] | None]] = {ALONE: [*alone]}
    for context in CONTEXTS:
        made[context] = in_context(context, rows.tolist(), messages, test.benchmarks, ASKED, rng)
    plain = _choices(composite, alone)
    found = []
    for context, conversations in made.items():
        asked = np.array([index for index, chat in enumerate(conversations) if chat is not None], dtype=int)
        if not len(asked):
            continue
        chosen = _choices(composite, [chat for chat in conversations if chat is not None])
        inside, kinds = rows[asked], test.benchmarks[rows[asked]]
        got, before = test.scores[inside, chosen], test.scores[inside, plain[asked]]
        found.append(
            Chat(
                context,
                len(asked),
                metrics.mean_over_benchmarks(got, kinds),
                metrics.mean_over_benchmarks(got - before, kinds),
                metrics.bootstrap_interval(got - before, kinds),
                float((chosen == plain[asked]).mean()),
            )
        )
    return found


def _choices(composite: Composite, conversations: list[list[dict[str, Any]]]) -> np.ndarray:
    meta = composite.meta
    queries = encode_all(meta, conversations, "chats")
    logits = state_logits(meta.rows, cached_states(meta, queries, label="chats"), meta.transform)
    return composite.chosen(logits, [len(query) + query.cut for query in queries])
