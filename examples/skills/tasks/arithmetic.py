"""Addition, subtraction and multiplication of small whole numbers."""

import random

from .base import Task, last_number

DESCRIPTION = "adds, subtracts and multiplies whole numbers"

_PHRASES = {
    "+": ("What is {a} + {b}?", "Add {a} and {b}.", "Compute {a} plus {b}.", "How much is {a} plus {b}?"),
    "-": ("What is {a} - {b}?", "Subtract {b} from {a}.", "Compute {a} minus {b}.", "How much is {a} minus {b}?"),
    "*": ("What is {a} * {b}?", "Multiply {a} by {b}.", "Compute {a} times {b}.", "How much is {a} times {b}?"),
}


def make_task(rng: random.Random) -> Task:
    """Make a calculation, in one of a few wordings."""
    operator = rng.choice("+-*")
    if operator == "*":
        a, b = rng.randint(2, 12), rng.randint(2, 12)
    else:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if operator == "-" and a < b:
            a, b = b, a
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return Task(rng.choice(_PHRASES[operator]).format(a=a, b=b), f"{a} {operator} {b} = {value}")


def score(response: str, answer: str) -> float:
    """Return 1 if the last number of the response is the result, else 0."""
    return float(last_number(response) == last_number(answer))
