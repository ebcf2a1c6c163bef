"""Questions in the contexts of chats: after system prompts, after earlier turns, with follow-ups.

Benchmarks are bare questions, chats are not. Copies of questions in a context teach rows which parts to ignore, and
that "try again" refers to the question before. A report measures with other phrases than the trained ones.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..modeling.errors import ExpertokenError

CONTEXTS = ("system prompt", "another kind before", "the same kind before", "follow-up")


@dataclass(frozen=True)
class Phrases:
    """Texts of the added turns.

    Attributes:
        systems: System prompts.
        answers: Earlier answers, which results rarely have.
        follow_ups: Requests without a meaning unless the turn before is read.
    """

    systems: tuple[str, ...]
    answers: tuple[str, ...]
    follow_ups: tuple[str, ...]


LEARNT = Phrases(
    (
        "You are a helpful AI assistant.",
        "Reply in plain English.",
        "Be concise. If you do not know something, say so.",
        "You work for a support desk. Stay friendly, never share private data, and keep to the topic.",
    ),
    ("Here you are.", "I see.", "That is done.", "Sure, see above."),
    ("Please redo this.", "Is that right? Look again.", "Give me just the answer.", "Explain how you got there.",
     "And now in other words.", "That does not look right to me."),
)  # fmt: skip
ASKED = Phrases(
    (
        "You are a helpful assistant.",
        "Answer briefly and politely. Today is Monday.",
        "You are a coding agent. Use the tools you have, and think step by step before you answer.",
    ),
    ("Done.",),
    ("Try again, please.", "Are you sure? Please check that.", "Once more, and only the result."),
)


_COPY = re.compile(rf" \(({'|'.join(CONTEXTS)})\)$")


def origin_of(key: str) -> str:
    """Return the id of a copy's question, or the id itself."""
    return _COPY.sub("", key)


def in_context(
    context: str,
    rows: Sequence[int],
    messages: Sequence[list[dict[str, Any]]],
    benchmarks: Sequence[str] | np.ndarray,
    phrases: Phrases,
    rng: np.random.Generator,
) -> list[list[dict[str, Any]] | None]:
    """Return the conversations of some questions in a context. None where no other question fits.

    Args:
        context: One of `CONTEXTS`.
        rows: Indices of the questions.
        messages: Conversations of all N questions, from which earlier turns are drawn.
        benchmarks: N names, the kinds of the questions.
        phrases: Texts of the added turns.
        rng: Generator of the draws.
    """
    names = np.asarray(benchmarks, dtype=str)
    same = {name: np.flatnonzero(names == name) for name in np.unique(names)}
    others = {name: np.flatnonzero(names != name) for name in same}

    def one(row: int) -> list[dict[str, Any]] | None:
        own = messages[row]
        if context == "system prompt":
            return [_turn("system", rng.choice(phrases.systems)), *own]
        answer = _turn("assistant", rng.choice(phrases.answers))
        if context == "follow-up":
            return [*own, answer, _turn("user", rng.choice(phrases.follow_ups))]
        pool = same if context == "the same kind before" else others
        drawn = [int(other) for other in rng.permutation(pool[names[row]])[:2] if other != row]
        return [*messages[drawn[0]], answer, *own] if drawn else None

    return [one(row) for row in rows]


def copies(
    queries: pd.DataFrame,
    messages: Sequence[list[dict[str, Any]]],
    share: float,
    seed: int,
    *,
    only: np.ndarray | None = None,
) -> tuple[np.ndarray, pd.DataFrame, list[list[dict[str, Any]]]]:
    """Return copies of train and validation questions in contexts, each context in turn.

    Args:
        queries: N questions with `id`, `benchmark` and `split`.
        messages: Conversations of the questions.
        share: Share of the questions that get a copy.
        seed: Seed of the draws.
        only: `[N]` mask of the questions that may get a copy. The others only serve as earlier turns. Default: all.

    Returns:
        Index of the question of each copy `[M]`, the copies' rows of `queries`, and their conversations.

    Raises:
        ExpertokenError: The share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ExpertokenError(f"contexts: expected a share from 0 to 1, got {share:g}")
    rng = np.random.default_rng(seed)
    only = np.ones(len(queries), dtype=bool) if only is None else only
    rows: list[int] = []
    found, ids = [], []
    for side in ("train", "validation"):
        inside = np.flatnonzero((queries["split"] == side).to_numpy())
        free = np.flatnonzero(only[inside])  # indices within the split
        chosen = rng.permutation(free)[: round(share * len(free))]
        asked, kinds = [messages[int(row)] for row in inside], queries["benchmark"].to_numpy()[inside]
        for number, context in enumerate(CONTEXTS):
            places = chosen[number :: len(CONTEXTS)].tolist()
            for place, conversation in zip(places, in_context(context, places, asked, kinds, LEARNT, rng), strict=True):
                if conversation is not None:
                    rows.append(int(inside[place]))
                    found.append(conversation)
                    ids.append(f"{queries['id'].iloc[rows[-1]]} ({context})")
    return np.array(rows, dtype=int), queries.iloc[rows].assign(id=ids), found


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": str(text)}]}
