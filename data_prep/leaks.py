"""Queries of the test side that stand in the train side as well, word for word or nearly."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ..modeling.errors import require_extra

LEAKS = ("refuse", "drop", "keep")
"""Ways to handle train queries that stand in the test side: `drop` takes them from train."""

_SPACE = re.compile(r"\s+")
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: each character counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_SHINGLE = 3  # words in a row
_PERMUTATIONS = 128
_COMMON = 0.02  # a shingle in more than this share of all texts is scaffolding: few-shot examples, instructions
_MIN_SHINGLES = 4  # fewer say nothing: "Compute 5 plus 3" shares most of its words with a question of its own right


def normalise(text: str) -> str:
    """A query less what does not change it: case, white space, compatibility forms, punctuation at its ends.

    Punctuation inside stays, `5 + 3` and `5 - 3` are two questions, and so does an exclamation mark: `5!` is not `5`.
    """
    plain = _SPACE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return plain.strip(" .?:;\"'") or plain


def find_leaks(train: Iterable[str], test: Iterable[str]) -> list[tuple[int, int]]:
    """Pairs (train index, test index) of queries that are equal after normalising, one pair a train query."""
    first: dict[str, int] = {}
    for index, text in enumerate(test):
        first.setdefault(normalise(text), index)
    keys = (normalise(text) for text in train)
    return [(index, first[key]) for index, key in enumerate(keys) if key in first]


class NearDuplicate(NamedTuple):
    """A train query and the test query most like it."""

    train: int
    test: int
    similarity: float


def find_near_duplicates(train: Sequence[str], test: Sequence[str], threshold: float = 0.8) -> list[NearDuplicate]:
    """Train queries that share most of their wording with a test query, and are not equal to one.

    Similarity is the Jaccard index of three-word shingles (Broder, "On the resemblance and containment of documents",
    1997), less the shingles that many queries have, so that few-shot examples and instructions don't count. MinHash
    finds candidates; each is then compared exactly.

    Args:
        train: texts.
        test: texts.
        threshold: least similarity.

    Returns:
        for each such train query the most similar test query, most similar first.

    Raises:
        ImportError: the extra `data` is not installed.
    """
    datasketch = require_extra("datasketch", "data")
    sides = [[_shingles(text) for text in texts] for texts in (train, test)]
    seen = Counter(shingle for side in sides for shingles in side for shingle in shingles)
    limit = max(10, _COMMON * (len(train) + len(test)))
    common = {shingle for shingle, count in seen.items() if count > limit}
    learnt, tested = ([shingles - common for shingles in side] for side in sides)
    # A lower threshold for candidates, because the sketch errs by a tenth; what it finds is compared exactly.
    index = datasketch.MinHashLSH(threshold=max(0.1, threshold - 0.15), num_perm=_PERMUTATIONS)
    bar = tqdm(total=len(train) + len(test), desc="near-duplicates", unit="query", leave=False)
    with bar:
        for place, sketch in _sketches(datasketch, tested, bar):
            index.insert(place, sketch)
        found = []
        for place, sketch in _sketches(datasketch, learnt, bar):
            alike = [
                NearDuplicate(place, other, _jaccard(learnt[place], tested[other])) for other in index.query(sketch)
            ]
            best = max(alike, key=lambda pair: pair.similarity, default=None)
            if best and best.similarity >= threshold and normalise(train[place]) != normalise(test[best.test]):
                found.append(best)
    return sorted(found, key=lambda pair: -pair.similarity)


def _shingles(text: str) -> set[str]:
    words = _WORD.findall(normalise(text))
    return {" ".join(words[start : start + _SHINGLE]) for start in range(max(1, len(words) - _SHINGLE + 1))}


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def _sketches(datasketch: Any, sides: list[set[str]], bar: tqdm) -> Iterator[tuple[int, Any]]:
    """MinHash of each text that has enough shingles of its own, with its place."""
    for place, shingles in enumerate(sides):
        bar.update()
        if len(shingles) >= _MIN_SHINGLES:
            sketch = datasketch.MinHash(num_perm=_PERMUTATIONS)
            sketch.update_batch([shingle.encode() for shingle in shingles])
            yield place, sketch
