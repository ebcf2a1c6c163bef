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
"""Everything that is asked; `general` has no expert, so that self has something to win."""

__all__ = ["BENCHMARKS", "SKILLS", "Task", "side_of", "tasks"]


def side_of(prompt: str) -> str:
    """Which side a prompt belongs to: `held_in`, `held_out` (a fifth each) or `expert` (the rest).

    Hashing the prompt, rather than drawing with different seeds, makes the three sides disjoint by construction: no
    expert was trained on a question that it is later scored on.
    """
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 5
    return {0: "held_in", 1: "held_out"}.get(bucket, "expert")


def tasks(benchmark: str, side: str, seed: int = 0) -> Iterator[Task]:
    """Distinct tasks of one benchmark and side, in an order fixed by `seed`; ends when nothing new turns up."""
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
