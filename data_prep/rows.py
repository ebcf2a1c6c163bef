"""Rows of a supervision: queries as conversations, and the datasets that hold them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..modeling.pictures import IMAGE
from . import SPLITS
from .leaks import IMAGES
from .results import MESSAGES

if TYPE_CHECKING:
    from datasets import DatasetDict


def messages_of(queries: "pd.DataFrame") -> list[list[dict[str, Any]]]:
    """Return each query as a conversation of content parts: its messages, or its prompt as one user message.

    Pictures come before the text of the last message.
    """
    own = queries[MESSAGES] if MESSAGES in queries else [None] * len(queries)
    conversations = [
        [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        if messages
        else [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        for prompt, messages in zip(queries["prompt"], own, strict=True)
    ]
    for conversation, images in zip(conversations, queries.get(IMAGES, ()), strict=False):
        content: Any = conversation[-1]["content"]
        content[:0] = [{"type": IMAGE, "text": None, "image": name} for name in images or ()]
    return conversations


def question_of(conversation: Sequence[dict[str, Any]]) -> tuple[str, tuple[str, ...] | None]:
    """Return the text and the pictures of a conversation's last message, as `messages_of` writes them."""
    content = conversation[-1]["content"]
    images = tuple(part["image"] for part in content if part["type"] == IMAGE)
    return "\n".join(part["text"] for part in content if part["type"] == "text"), images or None


def make_datasets(
    queries: "pd.DataFrame",
    messages: Sequence[Any],
    scores: np.ndarray,
    costs: np.ndarray | None,
    targets: np.ndarray,
    weights: np.ndarray,
) -> "DatasetDict":
    """Return the splits of a supervision, by the column `split` of `queries`. `Supervision` lists the columns."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    numbers = List(Value("float32"))
    part = {"type": Value("string"), "text": Value("string")}
    if IMAGES in queries:  # keeps the columns, and so the fingerprint, of supervisions without pictures
        part["image"] = Value("string")
    features = Features(
        {
            "id": Value("string"),
            "messages": List({"role": Value("string"), "content": List(part)}),
            "benchmark": Value("string"),
            "subject": Value("string"),
            "target": numbers,
            "weight": Value("float32"),
            "scores": numbers,
            "costs": numbers,
        }
    )
    sides = {}
    for name in SPLITS:
        rows = np.flatnonzero(queries["split"].to_numpy() == name)
        chosen = queries.iloc[rows]
        columns = {
            "id": chosen["id"].tolist(),
            "messages": [messages[int(row)] for row in rows],
            "benchmark": chosen["benchmark"].tolist(),
            "subject": chosen["subject"].tolist(),
            "target": list(targets[rows]),
            "weight": weights[rows],
            "scores": list(scores[rows]),
            "costs": [[]] * len(rows) if costs is None else list(costs[rows]),
        }
        sides[name] = Dataset.from_dict(columns, features=features)
    return DatasetDict(sides)
