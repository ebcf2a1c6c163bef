"""Seeded task generators with exact scorers, one small module per skill.

A skill module has three names: `DESCRIPTION`, `make_task(rng) -> Task` and `score(response, answer) -> float`.
"""

import hashlib
import random
from collections.abc import Iterator
from types import ModuleType

from . import arithmetic, dates, general, json_extraction, roman, sql, units
from .base import Task

SKILLS: dict[str, ModuleType] = {
    "arithmetic": arithmetic,
    "units": units,
    "sql": sql,
    "json": json_extraction,
    "dates": dates,
    "roman": roman,
}
"""The skills that have an expert, in pool order."""

BENCHMARKS: dict[str, ModuleType] = {**SKILLS, "general": general}
"""All benchmarks. `general` has no expert, so that self is the best candidate somewhere."""

__all__ = ["BENCHMARKS", "SKILLS", "Task", "side_of", "tasks"]


def side_of(prompt: str) -> str:
    """Return the part that a prompt belongs to: `held_in`, `held_out` (a fifth each) or `expert` (the rest).

    The prompt's hash makes the three parts disjoint, which different seeds would not. No expert is scored on a question
    that it was trained on.
    """
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 5
    return {0: "held_in", 1: "held_out"}.get(bucket, "expert")


def tasks(benchmark: str, side: str, seed: int = 0) -> Iterator[Task]:
    """Yield distinct tasks of one benchmark and part, in an order fixed by `seed`.

    The iterator ends after 2,000 draws in a row without a new task.
    """
    rng = random.Random(f"{benchmark}/{side}/{seed}")
    seen: set[str] = set()
    misses = 0
    while misses < 2000:
        task = BENCHMARKS[benchmark].make_task(rng)
        if task.prompt in seen or side_of(task.prompt) != side:
            misses += 1
            continue
        misses = 0
        seen.add(task.prompt)
        yield task
