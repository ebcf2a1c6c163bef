"""A date some days before or after another, and the weekday so many days on."""

import random
from datetime import date, timedelta

from .base import Task, first_line

DESCRIPTION = "reckons with calendar dates and weekdays"

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DATE_PHRASES = (
    "What date is {n} days {way} {day}?",
    "Which date comes {n} days {way} {day}?",
    "Give the date {n} days {way} {day}.",
)
_WEEKDAY_PHRASES = (
    "Which weekday is {n} days {way} {day}?",
    "What day of the week comes {n} days {way} {day}?",
)


def make_task(rng: random.Random) -> Task:
    """One reckoning, by date or by weekday."""
    n, sign = rng.randint(2, 9), rng.choice((1, -1))
    way = "after" if sign == 1 else "before"
    if rng.random() < 0.5:
        start = date(2024, 1, 1) + timedelta(days=rng.randrange(730))
        prompt = rng.choice(_DATE_PHRASES).format(n=n, way=way, day=start.isoformat())
        return Task(prompt, (start + timedelta(days=sign * n)).isoformat())
    index = rng.randrange(7)
    prompt = rng.choice(_WEEKDAY_PHRASES).format(n=n, way=way, day=_WEEKDAYS[index])
    return Task(prompt, _WEEKDAYS[(index + sign * n) % 7])


def score(response: str, answer: str) -> float:
    """1 when the first line, less a closing full stop, is the date or the weekday."""
    return float(first_line(response).rstrip(".") == answer)
