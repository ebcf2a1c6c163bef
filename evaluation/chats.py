"""Decisions on questions inside a chat, with other messages before or after the question."""

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
    """Result of the composite in one context.

    Attributes:
        context: Name of the context. `alone` is the bare question.
        queries: Number of questions.
        score: Mean over benchmarks of the mean score.
        change: Score minus the score of the same bare questions.
        interval: 95 % interval of the change, bootstrap within benchmarks.
        same_choice: Share of the questions with the same decision as the bare question.
    """

    context: str
    queries: int
    score: float
    change: float
    interval: tuple[float, float]
    same_choice: float


def in_chats(composite: Composite, test: Split, messages: list[list[dict[str, Any]]], count: int) -> list[Chat]:
    """Evaluate decisions on a split's questions in contexts, scored by the bare questions' results.

    A follow-up ("try again") refers to the question before it, whose best candidate is the right decision.

    Args:
        composite: Composite that decides, by its own policy.
        test: Split with the questions.
        messages: Conversations of the split's queries.
        count: Number of questions to use, drawn evenly.
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
