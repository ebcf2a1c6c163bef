"""How firmly a composite decides: the same question in another dress should go to the same candidate."""

import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..modeling.meta import MetaLLM, token_batches

_OPTION = re.compile(r"^(\(?[A-H][.):])(.*)$", re.MULTILINE)
_MAX_TOKENS = 4096


@dataclass(frozen=True)
class Robustness:
    """What a change of the text did.

    Attributes:
        change: its name.
        flipped: share of decisions that changed.
        lost: mean score lost by the changes (negative: gained).
        queries: on how many.
    """

    change: str
    flipped: float
    lost: float
    queries: int


def typos(text: str, rng: random.Random) -> str:
    """One letter in thirty swapped with its neighbour."""
    letters = list(text)
    for place in range(len(letters) - 1):
        if letters[place].isalpha() and letters[place + 1].isalpha() and rng.random() < 1 / 30:
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return "".join(letters)


def spacing(text: str, rng: random.Random) -> str:
    """Some spaces doubled, white space around."""
    return "  " + re.sub(" ", lambda _: "  " if rng.random() < 0.2 else " ", text) + " \n"


def shuffled_options(text: str, rng: random.Random) -> str:
    """The options of a multiple-choice question in another order, their letters in place."""
    found = [match[2] for match in _OPTION.finditer(text)]
    rng.shuffle(found)
    rest = iter(found)
    return _OPTION.sub(lambda match: match[1] + next(rest), text)


def suffix(text: str, rng: random.Random) -> str:
    """Twenty random tokens' worth of noise behind the question, as attacks on routers append it."""
    words = ("".join(rng.choices(string.ascii_letters + string.punctuation, k=rng.randint(2, 7))) for _ in range(20))
    return f"{text} {' '.join(words)}"


CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "lower case": lambda text, _: text.lower(),
    "upper case": lambda text, _: text.upper(),
    "spacing": spacing,
    "typos": typos,
    "shuffled options": shuffled_options,
    "wrapper": lambda text, _: f"Hello! I would like your help with this, please:\n\n{text}\n\nThank you very much.",
    "noise suffix": suffix,
}


def robustness(
    meta: MetaLLM,
    prompts: Sequence[str],
    scores: np.ndarray,
    *,
    with_self: bool,
    seed: int = 0,
) -> list[Robustness]:
    """Decisions on changed texts against those on the texts as they are.

    Args:
        meta: the meta LLM with its rows.
        prompts: N questions.
        scores: `[N, C]`, 0 where not measured.
        with_self: whether self is a candidate.
        seed: of the changes.
    """

    def decide(texts: Sequence[str]) -> np.ndarray:
        encoded = [meta.encode(text) for text in texts]
        chosen = np.empty(len(texts), dtype=int)
        for batch in token_batches([len(ids) for ids in encoded], _MAX_TOKENS):
            chosen[batch] = meta.candidate_logits([encoded[i] for i in batch], with_self=with_self).argmax(1).numpy()
        return chosen

    plain = decide(prompts)
    rows = np.arange(len(prompts))
    found = []
    for name, change in CHANGES.items():
        changed = [change(text, random.Random(seed + place)) for place, text in enumerate(prompts)]
        touched = np.array([a != b for a, b in zip(changed, prompts, strict=True)])
        if not touched.any():
            continue
        kept = np.flatnonzero(touched)
        chosen = plain.copy()
        chosen[kept] = decide([changed[i] for i in kept])
        lost = (scores[rows, plain] - scores[rows, chosen])[kept].mean()
        found.append(Robustness(name, float((chosen != plain)[kept].mean()), float(lost), len(kept)))
    return found
