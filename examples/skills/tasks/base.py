"""What every skill shares."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One question and the answer that its skill's scorer expects."""

    prompt: str
    answer: str


def first_line(response: str) -> str:
    """The answer proper: experts answer in one line, and what follows is not scored."""
    return response.strip().split("\n", 1)[0].strip()


def last_number(response: str) -> str | None:
    """The last whole number of the first line, so that `12 + 5 = 17` and `17` score alike."""
    found = re.findall(r"-?\d+", first_line(response).replace(",", ""))
    return found[-1] if found else None
