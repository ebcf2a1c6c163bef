"""Queries of the test side that stand in the train side as well."""

import re
import unicodedata
from collections.abc import Sequence

_SPACE = re.compile(r"\s+")


def normalise(text: str) -> str:
    """A query less what does not change it: case, white space, compatibility forms, punctuation at its ends.

    Punctuation inside stays, `5 + 3` and `5 - 3` are two questions, and so does an exclamation mark: `5!` is not `5`.
    """
    plain = _SPACE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return plain.strip(" .?:;\"'") or plain


def find_leaks(train: Sequence[str], test: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs (train index, test index) of queries that are equal after normalising, one pair a train query."""
    first: dict[str, int] = {}
    for index, text in enumerate(test):
        first.setdefault(normalise(text), index)
    keys = (normalise(text) for text in train)
    return [(index, first[key]) for index, key in enumerate(keys) if key in first]
