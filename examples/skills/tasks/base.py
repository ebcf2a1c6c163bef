"""Code that all skills share."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A question and the answer that its skill's scorer expects."""

    prompt: str
    answer: str


def first_line(response: str) -> str:
    """Return the first line. Experts answer in one line, and later lines are not scored."""
    return response.strip().split("\n", 1)[0].strip()


def last_number(response: str) -> str | None:
    """Return the last whole number of the first line, so that `12 + 5 = 17` and `17` have the same score."""
    found = re.findall(r"-?\d+", first_line(response).replace(",", ""))
    return found[-1] if found else None
