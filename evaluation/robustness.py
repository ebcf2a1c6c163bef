"""Robustness of decisions: a changed form of the same question should go to the same candidate."""

import io
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from ..modeling.batching import run_batches
from ..modeling.meta import MetaLLM
from ..modeling.pictures import Picture, part_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPTION = re.compile(r"^(\(?[A-H][.):])(.*)$", re.MULTILINE)
_ATTACKED = 16  # questions to optimise the adversarial suffix on
_STEPS = 40  # steps of the suffix's search
_WORDS = 10  # words of the suffix


@dataclass(frozen=True)
class Robustness:
    """Effect of a change of the question.

    Attributes:
        change: Name of the change.
        share_flipped: Share of decisions that changed.
        score_lost: Mean score lost by the change (negative: gained).
        queries: Number of queries that the change affects.
    """

    change: str
    share_flipped: float
    score_lost: float
    queries: int


def typos(text: str, rng: random.Random) -> str:
    """Swap about one letter in thirty with its neighbour."""
    letters = list(text)
    for place in range(len(letters) - 1):
        if letters[place].isalpha() and letters[place + 1].isalpha() and rng.random() < 1 / 30:
            letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return "".join(letters)


def spacing(text: str, rng: random.Random) -> str:
    """Add spaces: double some of them, and surround the text with white space."""
    return "  " + re.sub(" ", lambda _: "  " if rng.random() < 0.2 else " ", text) + " \n"


def shuffled_options(text: str, rng: random.Random) -> str:
    """Shuffle the options of a multiple-choice question, and keep their letters in place."""
    found = [match[2] for match in _OPTION.finditer(text)]
    rng.shuffle(found)
    rest = iter(found)
    return _OPTION.sub(lambda match: match[1] + next(rest), text)


def suffix(text: str, rng: random.Random) -> str:
    """Append twenty random words to the question."""
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


def _redrawn(picture: Picture, change: Callable[[Any], Any]) -> Picture:
    file = io.BytesIO()
    change(picture.decoded()).save(file, "JPEG", quality=95)  # a photograph as PNG may exceed the size limit
    return Picture.of(file.getvalue())


PICTURE_CHANGES: dict[str, Callable[[Any], Any]] = {
    "shrunken picture": lambda picture: picture.reduce(2),
    "rotated picture": lambda picture: picture.rotate(90, expand=True),
}


def robustness(
    meta: MetaLLM,
    prompts: Sequence[str],
    scores: np.ndarray,
    pictures: Sequence[Sequence[Picture]] | None = None,
    *,
    seed: int = 0,
) -> list[Robustness]:
    """Compare the decisions on changed texts and pictures with the decisions on the original questions.

    Args:
        meta: Meta LLM with its rows.
        prompts: N questions.
        scores: `[N, C]` scores without gaps.
        pictures: Pictures of each question, for a meta LLM that reads pictures.
        seed: Seed of the changes.
    """
    shown = [tuple(of) for of in pictures or [()] * len(prompts)]

    def logits(texts: Sequence[str], seen: Sequence[tuple[Picture, ...]] | None = None) -> np.ndarray:
        asked = zip(texts, [()] * len(texts) if seen is None else seen, strict=True)
        queries = [meta.encode(_question(text, of)) for text, of in asked]
        found = np.empty((len(texts), len(meta.rows)), dtype=np.float32)
        batches = run_batches(
            [len(query) for query in queries],
            lambda batch: meta.candidate_logits([queries[row] for row in batch]),
            label="robustness",
        )
        for batch, part in batches:
            found[batch] = part.numpy()
        return found

    plain = logits(prompts, shown).argmax(1)

    def compare(
        name: str, changed: Sequence[str], first: int = 0, seen: Sequence[tuple[Picture, ...]] = shown
    ) -> list[Robustness]:
        """Compare on the questions that the change affects, from index `first` on."""
        touched = (i for i in range(first, len(prompts)) if changed[i] != prompts[i] or seen[i] != shown[i])
        kept = np.array([*touched], dtype=int)
        if not len(kept):
            return []
        chosen = logits([changed[i] for i in kept], [seen[i] for i in kept]).argmax(1)
        lost = (scores[kept, plain[kept]] - scores[kept, chosen]).mean()
        return [Robustness(name, float((chosen != plain[kept]).mean()), float(lost), len(kept))]

    found = []
    for name, change in tqdm(CHANGES.items(), desc="robustness", unit="change", leave=False):
        found += compare(name, [change(prompts[i], random.Random(seed + i)) for i in range(len(prompts))])
    for name, redraw in PICTURE_CHANGES.items():
        found += compare(name, prompts, seen=[tuple(_redrawn(picture, redraw) for picture in of) for of in shown])
    found += compare("another question's picture", prompts, seen=[*shown[1:], *shown[:1]])
    attacked = min(_ATTACKED, len(prompts) // 2)
    if attacked and len(meta.rows) > 1:
        seen = shown[:attacked]
        gadget = adversarial_suffix(
            lambda texts: logits(texts, seen), prompts[:attacked], plain[:attacked], meta.tokenizer, random.Random(seed)
        )
        found += compare("adversarial suffix", [f"{text} {gadget}" for text in prompts], attacked)
    return found


def _question(text: str, pictures: Sequence[Picture]) -> str | list[dict[str, Any]]:
    content = [*map(part_of, pictures), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}] if pictures else text


def adversarial_suffix(
    logits: Callable[[Sequence[str]], np.ndarray],
    prompts: Sequence[str],
    chosen: np.ndarray,
    tokenizer: "PreTrainedTokenizerBase",
    rng: random.Random,
) -> str:
    """Search for one suffix that takes decisions away from the chosen candidates on all questions.

    The search is hill climbing over single words, as for the query-independent gadgets of "Rerouting LLM Routers"
    (arXiv 2501.01818). A change is kept if the mean lead of the chosen candidates falls.

    Args:
        logits: Function from texts to the candidates' logits, `[N, C]`.
        prompts: Questions to optimise the suffix on. Measure on other questions.
        chosen: `[N]` candidates chosen for the questions.
        tokenizer: Tokenizer whose vocabulary gives the words.
        rng: Random generator of the search.
    """
    count = tokenizer.vocab_size

    def word() -> str:
        while True:
            found = str(tokenizer.decode([rng.randrange(count)], skip_special_tokens=True)).strip()
            if found.isprintable():
                return found

    def lead(words: Sequence[str]) -> float:
        values = logits([f"{text} {' '.join(words)}" for text in prompts])
        rows = np.arange(len(prompts))
        ours = values[rows, chosen].copy()
        values[rows, chosen] = -np.inf
        # Below -1 a decision is lost already: pushing it further would cost others.
        return float(np.maximum(ours - values.max(1), -1).mean())

    best = [word() for _ in range(_WORDS)]
    least = lead(best)
    for _ in tqdm(range(_STEPS), desc="adversarial suffix", unit="step", leave=False):
        trial = list(best)
        trial[rng.randrange(_WORDS)] = word()
        reached = lead(trial)
        if reached < least:
            best, least = trial, reached
    return " ".join(best)
