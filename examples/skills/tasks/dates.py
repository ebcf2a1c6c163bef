"""Dates and weekdays, some days before or after another."""

import calendar
import random
import re
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
    """Make a calculation with a date or a weekday.

    Answers show their steps, because a small model that counts day by day is right far more often.
    """
    n, sign = rng.randint(2, 6), rng.choice((1, -1))
    way = "after" if sign == 1 else "before"
    if rng.random() < 0.5:
        start = date(2024, 1, 1) + timedelta(days=rng.randrange(730))
        prompt = rng.choice(_DATE_PHRASES).format(n=n, way=way, day=start.isoformat())
        return Task(prompt, _steps(start, sign * n))
    index = rng.randrange(7)
    prompt = rng.choice(_WEEKDAY_PHRASES).format(n=n, way=way, day=_WEEKDAYS[index])
    return Task(prompt, ", ".join(_WEEKDAYS[(index + sign * k) % 7] for k in range(n + 1)))


def _steps(start: date, days: int) -> str:
    """Write the sum of days, its correction at the end of a month, and the date."""
    end = start + timedelta(days=days)
    total = start.day + days
    text = f"{start.day} {'+' if days > 0 else '-'} {abs(days)} = {total}"
    if end.month != start.month:
        # Past a month's end the month's length is subtracted. Before its start the previous month's length is added.
        month = start if days > 0 else end
        length = calendar.monthrange(month.year, month.month)[1]
        text += f", {total} {'-' if days > 0 else '+'} {length} = {end.day}"
    return f"{text}, {end.isoformat()}"


def score(response: str, answer: str) -> float:
    """Return 1 if the last date or weekday of the first line is the right one, else 0."""

    def last(text: str) -> str | None:
        found = re.findall(rf"\d{{4}}-\d{{2}}-\d{{2}}|{'|'.join(_WEEKDAYS)}", first_line(text))
        return found[-1] if found else None

    return float(last(response) == last(answer))
