"""Conversion between everyday units, always to a whole number."""

import random

from .base import Task, last_number

DESCRIPTION = "converts lengths, weights, volumes and times between units"

_FACTORS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("tonnes", "kilograms", 1000),
    ("litres", "millilitres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("years", "months", 12),
)
_PHRASES = (
    "Convert {n} {a} to {b}.",
    "How many {b} are {n} {a}?",
    "{n} {a} in {b}?",
    "Express {n} {a} in {b}.",
)


def make_task(rng: random.Random) -> Task:
    """Make a conversion from a larger unit to a smaller one."""
    large, small, factor = rng.choice(_FACTORS)
    n = rng.randint(2, 20 if factor in (60, 24, 7, 12) else 60)
    return Task(rng.choice(_PHRASES).format(n=n, a=large, b=small), f"{n} {large} = {n * factor} {small}")


def score(response: str, answer: str) -> float:
    """Return 1 if the last number of the response is the converted value, else 0."""
    return float(last_number(response) == last_number(answer))
