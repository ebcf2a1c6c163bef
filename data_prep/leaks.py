"""Leaks: queries that are in the test split and in the train split too, word for word or nearly."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from ..modeling.errors import LeakError, require_extra

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

LEAKS = ("refuse", "drop", "keep")
"""Ways to handle train queries that are also in the test split. `drop` removes them from train."""

IMAGES = "images"
"""Column with the pictures of a question."""

_SPACE = re.compile(r"\s+")
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: each character counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_SHINGLE = 3  # words in a row
_PERMUTATIONS = 128
_COMMON = 0.02  # a shingle in more than this share of all texts is from few-shot examples or instructions
_WHOLE = 8  # least words of a text that another text contains
_MIN_SHINGLES = 4  # with fewer, different questions such as "Compute 5 plus 3" share most of their words


# Lower-case letters of other scripts that look like Latin letters.
_LOOKS_LIKE = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u0501\u04bb\u051b\u051d\u04cf"
    "\u03b1\u03bf\u03c1\u03bd\u03b9\u03ba\u03c5\u03c7\u0261\u0131",
    "aeopcyxijsdhqwlaopvikuxgi",
)
_LEAD = re.compile(r"^(?:question|query|problem|q)\s*[:.)]\s+")
_TAIL = re.compile(r"\s(?:answer|response|solution|a)\s*:\s*$")


def normalise(text: str) -> str:
    """Normalise a query for comparison with others.

    It unifies case, white space, compatibility forms and letters that look alike. It removes characters without width,
    punctuation at the ends, a leading "Question:" and a final "Answer:". Punctuation inside stays, because `5 + 3` and
    `5 - 3` are two questions. An exclamation mark stays, because `5!` is not `5`.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    if not folded.isascii():
        folded = "".join(c for c in folded if unicodedata.category(c) != "Cf").translate(_LOOKS_LIKE)
    plain = _SPACE.sub(" ", folded).strip()
    plain = _TAIL.sub("", _LEAD.sub("", plain)).strip() or plain
    return plain.strip(" .?:;\"'") or plain


def questions_of(queries: "pd.DataFrame") -> list[str]:
    """Return the normalised text and the pictures of each query, for comparison.

    Args:
        queries: One row per query with `prompt`, and with `images` if there are pictures.
    """
    texts = map(normalise, queries["prompt"])
    if IMAGES not in queries:
        return list(texts)
    return ["\0".join([text, *shown]) for text, shown in zip(texts, map(_shown, queries[IMAGES]), strict=True)]


def _shown(images: Any) -> tuple[str, ...]:
    """Return a query's pictures. Joined tables have NaN where one table has no such column."""
    return images if isinstance(images, tuple) else ()


def find_leaks(train: Iterable[str], test: Iterable[str]) -> list[tuple[int, int]]:
    """Return pairs (train index, test index) of texts that are equal when normalised, one pair per train text."""
    return _equal(map(normalise, train), map(normalise, test))


def _equal(train: Iterable[str], test: Iterable[str]) -> list[tuple[int, int]]:
    first: dict[str, int] = {}
    for index, key in enumerate(test):
        first.setdefault(key, index)
    return [(index, first[key]) for index, key in enumerate(train) if key in first]


class NearDuplicate(NamedTuple):
    """A train query and the most similar test query."""

    train: int
    test: int
    similarity: float


def find_near_duplicates(train: Sequence[str], test: Sequence[str], threshold: float = 0.8) -> list[NearDuplicate]:
    """Find train queries that share most of their wording with a test query without being equal to one.

    Similarity is 1 if one text contains the other (of eight words or more) completely. Otherwise it is the Jaccard
    index of three-word shingles (Broder, "On the resemblance and containment of documents", 1997). Shingles that many
    queries share are left out, so that few-shot examples and instructions don't count. MinHash finds pairs, which are
    then compared exactly.

    Args:
        train: Texts of the train queries.
        test: Texts of the test queries.
        threshold: Least similarity of a pair.

    Returns:
        Each such train query with its most similar test query, in order of falling similarity.

    Raises:
        ImportError: The extra `data` is not installed.
    """
    datasketch = require_extra("datasketch", "data")
    words = [[_WORD.findall(normalise(text)) for text in texts] for texts in (train, test)]
    sides = [[_shingles(text) for text in texts] for texts in words]
    seen = Counter(shingle for side in sides for shingles in side for shingle in shingles)
    limit = max(10, _COMMON * (len(train) + len(test)))
    common = {shingle for shingle, count in seen.items() if count > limit}
    learnt, tested = ([shingles - common for shingles in side] for side in sides)
    whole = _held(words, (learnt, tested))
    # The sketch errs by a tenth, so it gets a lower threshold. The pairs that it finds are compared exactly.
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
            best = whole.get(place) or max(alike, key=lambda pair: pair.similarity, default=None)
            if best and best.similarity >= threshold and normalise(train[place]) != normalise(test[best.test]):
                found.append(best)
    return sorted(found, key=lambda pair: -pair.similarity)


def _held(words: Sequence[list[list[str]]], shingles_of: Sequence[list[set[str]]]) -> dict[int, NearDuplicate]:
    """Return the train texts that contain a whole test text, or are contained in one, each with one such text.

    A text shares its rarest shingle with any text that contains it, so only such pairs are compared.

    Args:
        words: Words of the train texts and of the test texts.
        shingles_of: Shingles of the same texts, without the common ones.
    """
    where: tuple[dict[str, list[int]], ...] = ({}, {})
    for index, side in zip(where, shingles_of, strict=True):
        for place, shingles in enumerate(side):
            for shingle in shingles:
                index.setdefault(shingle, []).append(place)
    lines = [[f" {' '.join(text)} " for text in texts] for texts in words]
    found: dict[int, NearDuplicate] = {}
    for inner, outer in ((0, 1), (1, 0)):
        for place, shingles in enumerate(shingles_of[inner]):
            if len(shingles) < _MIN_SHINGLES or len(words[inner][place]) < _WHOLE:
                continue
            rarest = min(shingles, key=lambda shingle: len(where[outer].get(shingle, ())))
            for other in where[outer].get(rarest, ()):
                pair = (place, other) if inner == 0 else (other, place)
                if lines[inner][place] in lines[outer][other] and pair[0] not in found:
                    found[pair[0]] = NearDuplicate(*pair, 1.0)
    return found


def _shingles(words: Sequence[str]) -> set[str]:
    return {" ".join(words[start : start + _SHINGLE]) for start in range(max(1, len(words) - _SHINGLE + 1))}


def _jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def _sketches(datasketch: Any, sides: list[set[str]], bar: tqdm) -> Iterator[tuple[int, Any]]:
    """Yield the index and the MinHash of each text that has enough shingles."""
    for place, shingles in enumerate(sides):
        bar.update()
        if len(shingles) >= _MIN_SHINGLES:
            sketch = datasketch.MinHash(num_perm=_PERMUTATIONS)
            sketch.update_batch([shingle.encode() for shingle in shingles])
            yield place, sketch


def _near(queries: "pd.DataFrame", learnt: np.ndarray, tested: np.ndarray) -> list[NearDuplicate]:
    """Return near-duplicates as `find_near_duplicates` does, among questions with the same pictures only."""
    prompts = queries["prompt"].to_numpy()
    if IMAGES not in queries:
        return find_near_duplicates(prompts[learnt].tolist(), prompts[tested].tolist())
    shown = ["\0".join(_shown(images)) for images in queries[IMAGES]]
    found = []
    for key in {shown[row] for row in learnt} & {shown[row] for row in tested}:
        sides = [[place for place, row in enumerate(side) if shown[row] == key] for side in (learnt, tested)]
        texts = [prompts[side[places]].tolist() for side, places in zip((learnt, tested), sides, strict=True)]
        found += [
            NearDuplicate(sides[0][pair.train], sides[1][pair.test], pair.similarity)
            for pair in find_near_duplicates(*texts)
        ]
    return sorted(found, key=lambda pair: -pair.similarity)


def handle_leaks(queries: "pd.DataFrame", leaks: str, near: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Find train queries that are equal or nearly equal to a test query, and handle them.

    Args:
        queries: One row per query with `id`, `prompt` and `split`, and with `images` if there are pictures.
        leaks: Handling of equal queries, a value of `LEAKS`.
        near: Handling of similar queries, a value of `LEAKS` or `ignore`, which does not search for them.

    Returns:
        Mask of the queries to keep, `[N]`, and the record of all pairs.

    Raises:
        LeakError: There are such queries, and their handling is `refuse`.
        ImportError: Similar queries are searched for, and the extra `data` is not installed.
    """
    side = queries["split"].to_numpy()
    ids = queries["id"].to_numpy()
    learnt, tested = np.flatnonzero(side != "test"), np.flatnonzero(side == "test")
    asked = np.array(questions_of(queries), dtype=object)
    equal = [(i, j, 1.0) for i, j in _equal(asked[learnt], asked[tested])]
    alike = [] if near == "ignore" else _near(queries, learnt, tested)
    kept = np.ones(len(queries), dtype=bool)
    record = {}
    for name, pairs, handled, option in (
        ("equal", equal, leaks, "--leaks"),
        ("near", alike, near, "--near-duplicates"),
    ):
        named = [[ids[learnt[i]], ids[tested[j]], round(similarity, 3)] for i, j, similarity in pairs]
        record[name] = {"found": len(pairs), "handled": handled, "pairs": named}
        if not pairs:
            continue
        word = "are also in the test split" if name == "equal" else "are similar to queries of the test split"
        first = f"{named[0][0]} {'=' if name == 'equal' else '~'} {named[0][1]}"
        if handled == "refuse":
            raise LeakError(
                f"{len(pairs)} train or validation queries {word} (the first: {first}). Remove them, or pass "
                f"`{option} drop` (from train) or `{option} keep`."
            )
        logger.warning("%d train queries %s (%s, ...): %s", len(pairs), word, first, handled)
        if handled == "drop":
            kept[learnt[[pair[0] for pair in pairs]]] = False
    return kept, record
