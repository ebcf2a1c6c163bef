"""Facts of one sentence as a JSON object."""

import json
import random

from .base import Task

DESCRIPTION = "extracts facts from a sentence as JSON"

_NAMES = ("Anna", "Bruno", "Chiara", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Keiko", "Liam")
_CITIES = ("Oslo", "Lisbon", "Nairobi", "Quito", "Hanoi", "Dublin", "Prague", "Tunis", "Bogota", "Perth")
_JOBS = ("nurse", "teacher", "pilot", "baker", "lawyer", "painter", "farmer", "chemist")
_SENTENCES = (
    "{name} is a {age}-year-old {job} from {city}.",
    "{name}, {age}, works as a {job} in {city}.",
    "In {city} lives {name}, a {job} aged {age}.",
    "The {job} {name} ({age}) has moved to {city}.",
)
_KEYS = (("name", "age"), ("name", "city"), ("name", "job"), ("name", "age", "city"), ("name", "job", "city"))
_PHRASES = (
    "Extract {keys} as JSON: {sentence}",
    "Return a JSON object with {keys} from this sentence: {sentence}",
    "{sentence} Give {keys} as JSON.",
)


def make_task(rng: random.Random) -> Task:
    """Make a sentence and the keys to extract from it."""
    facts = {
        "name": rng.choice(_NAMES),
        "age": rng.randint(21, 69),
        "job": rng.choice(_JOBS),
        "city": rng.choice(_CITIES),
    }
    keys = rng.choice(_KEYS)
    listed = " and ".join((", ".join(keys[:-1]), keys[-1]))
    prompt = rng.choice(_PHRASES).format(keys=listed, sentence=rng.choice(_SENTENCES).format(**facts))
    return Task(prompt, json.dumps({key: facts[key] for key in keys}))


def score(response: str, answer: str) -> float:
    """Return 1 if the response is a JSON object equal to the answer, in any order of keys, else 0."""
    try:
        return float(json.loads(response) == json.loads(answer))
    except ValueError:
        return 0.0
