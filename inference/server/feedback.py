"""Users' judgements of answers, recorded as benchmark results: `POST /v1/feedback`.

Each judgement becomes a line of a file in the `table` format (`query`, `model`, `score`, `benchmark`, `id`). A
composite learns from this file as from any other results. The file holds users' messages, so it exists only where an
operator names it.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from ...modeling.chat import Message
from ...modeling.errors import ExpertokenError
from .schema import RequestBody

_WAITING = 10_000  # most answers that can be judged
_CHARACTERS = 64 * 2**20  # most characters of their conversations together
_THUMBS = {"up": 1.0, "down": 0.0}
BENCHMARK = "feedback"


class FeedbackRequest(RequestBody):
    """Body of `POST /v1/feedback`: the answer's id, and a thumb or a score."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(max_length=200, description="Id of the answer, from its response.")
    thumb: str | None = Field(None, pattern="^(up|down)$", description="Judgement, up for 1 and down for 0.")
    score: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Judgement from 0 to 1, in place of a thumb."
    )

    @property
    def value(self) -> float:
        """Judgement as a score, 0 to 1.

        Raises:
            ExpertokenError: The request has no judgement, or has two.
        """
        if (self.thumb is None) == (self.score is None):
            raise ExpertokenError("expected either `thumb` (up or down) or `score` (0 to 1), got both or neither")
        return self.score if self.score is not None else _THUMBS[str(self.thumb)]


@dataclass(frozen=True)
class _Judged:
    """Answer that can be judged: its query, its expert, and the scope of its client."""

    query: str
    expert: str
    scope: str


class Feedback:
    """Answers that can be judged, and the file of judgements.

    Args:
        file: File that the lines are appended to. It is created if it does not exist.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: OrderedDict[str, _Judged] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def remember(self, answer: str, messages: Sequence[Message], expert: str, scope: str) -> None:
        """Store an answer, so that it can be judged. The oldest answers are dropped.

        Args:
            answer: Id of the answer.
            messages: Conversation that it answers.
            expert: Name of the expert that answered.
            scope: Scope of the client. No other client can judge the answer.
        """
        query = json.dumps(list(messages), ensure_ascii=False)
        with self._lock:
            self._known[_bare(answer)] = _Judged(query, expert, scope)
            self._size += len(query)
            while self._known and (len(self._known) > _WAITING or self._size > _CHARACTERS):
                _, old = self._known.popitem(last=False)
                self._size -= len(old.query)

    def judge(self, request: FeedbackRequest, scope: str) -> dict[str, Any]:
        """Append a judgement to the file.

        Raises:
            ExpertokenError: The answer is unknown, was judged already or was dropped, or the file can't be written.
        """
        score = request.value
        with self._lock:
            judged = self._known.get(_bare(request.id))
            if judged is None or judged.scope != scope:
                raise ExpertokenError("expected the id of a recent answer that was not judged yet")
            messages = json.loads(judged.query)
            alone = len(messages) == 1 and isinstance(messages[0].get("content"), str)
            query = messages[0]["content"] if alone else messages
            row = {
                "query": query, "model": judged.expert, "score": score, "benchmark": BENCHMARK, "id": _bare(request.id)
            }  # fmt: skip
            try:
                with self._file.open("a", encoding="utf-8", errors="replace") as stream:
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            except OSError as error:
                raise ExpertokenError(f"the feedback could not be written ({error.strerror})") from error
            del self._known[_bare(request.id)]  # an answer is judged once
            self._size -= len(judged.query)
        return {"object": "feedback", "id": request.id, "expert": judged.expert, "score": score}


def _bare(answer: str) -> str:
    """Return an answer's id without the prefix of an API."""
    return answer.rsplit("-", 1)[-1].rsplit("_", 1)[-1]
