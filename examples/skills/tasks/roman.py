"""Whole numbers as Roman numerals."""

import random

from .base import Task, first_line

DESCRIPTION = "writes numbers as Roman numerals"

_SIGNS = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"),
    (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip
_PHRASES = (
    "Write {n} in Roman numerals.",
    "What is {n} as a Roman numeral?",
    "Convert {n} to a Roman numeral.",
    "Give the Roman numeral for {n}.",
)


def to_roman(n: int) -> str:
    """Convert `n` (1 to 3999) to a Roman numeral."""
    numeral = ""
    for value, sign in _SIGNS:
        count, n = divmod(n, value)
        numeral += sign * count
    return numeral


def make_task(rng: random.Random) -> Task:
    """Make a conversion of a number below 400, in one of a few wordings."""
    n = rng.randint(1, 399)
    return Task(rng.choice(_PHRASES).format(n=n), to_roman(n))


def score(response: str, answer: str) -> float:
    """Return 1 if the first line, without a final full stop, is the numeral, else 0."""
    return float(first_line(response).rstrip(".") == answer)
