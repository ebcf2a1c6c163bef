"""The project's language, measured: see CONTRIBUTING.md, "Language"."""

import re
import statistics

import pytest

from . import prose

DOCSTRINGS = list(prose.docstrings())
FUNCTIONS = [entry for entry in DOCSTRINGS if entry.kind == "function"]


def test_no_docstring_of_a_function_begins_with_a_question_word():
    assert [entry for entry in FUNCTIONS if entry.first in prose.QUESTION_WORDS] == []


def test_docstrings_of_functions_begin_with_a_verb():
    fragments = [entry for entry in FUNCTIONS if entry.first not in prose.VERBS]
    assert len(fragments) / len(FUNCTIONS) < 0.05, fragments


def test_descriptions_of_arguments_stand_alone():
    arguments = list(prose.arguments())
    dependent = [entry for entry in arguments if entry.text.split()[0].lower() in prose.DEPENDENT_WORDS]
    assert len(arguments) > 300
    assert len(dependent) / len(arguments) < 0.12, dependent


@pytest.mark.parametrize("source", ["docstrings", "helps", "messages", "comments"])
def test_no_banned_turn_in_the_code(source):
    found = [
        f"{entry.where}: {match.group()!r}: {instead}"
        for entry in getattr(prose, source)()
        for pattern, instead in prose.BANNED.items()
        for match in re.finditer(pattern, entry.text, re.IGNORECASE)
    ]
    assert found == []


@pytest.mark.parametrize("page", prose.pages(), ids=lambda page: page.relative_to(prose.ROOT).as_posix())
def test_a_page_is_written_in_short_sentences(page):
    paragraphs = list(prose.paragraphs(page))
    sentences = [sentence for paragraph in paragraphs for sentence in prose.sentences(paragraph.text)]
    lengths = sorted(len(sentence.split()) for sentence in sentences)
    long = [paragraph.text for paragraph in paragraphs if len(paragraph.text.split()) > 70]
    banned = [
        f"{match.group()!r}: {instead}: {paragraph.text[:80]}"
        for paragraph in paragraphs
        for pattern, instead in prose.BANNED.items()
        for match in re.finditer(pattern, paragraph.text, re.IGNORECASE)
    ]
    wide = [line for line in prose.prose_lines(page) if len(line) > 110]
    assert wide == [], "lines are wrapped at 100 to 110 characters"
    assert long == [], "paragraphs of at most 70 words"
    assert banned == []
    assert sum(sentence.count(";") for sentence in sentences) <= max(1, 0.05 * len(sentences))
    if len(lengths) >= 10:
        assert statistics.quantiles(lengths, n=10)[-1] <= 25, [s for s in sentences if len(s.split()) > 25]
