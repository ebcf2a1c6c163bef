import time

import pytest

from expertoken.modeling.reminders import is_open_call, without_reminders
from expertoken.modeling.view import View
from expertoken.tests.tiny import tiny_tokenizer

ASK = "Why does the test of the parser fail?"
SHAPES = {
    "claude code": f"<system-reminder>\nAs you answer, use <b>this</b>:\n# claudeMd\n</system-reminder>\n{ASK}",
    "behind it": f"{ASK}\n<system-reminder>The TODO list is empty.</system-reminder>",
    "codex": f"<environment_context>\n  <cwd>/home/user</cwd>\n</environment_context>\n\n{ASK}",
    "codex instructions": f"# AGENTS.md instructions for /srv\n\n<INSTRUCTIONS>\nbe brief\n</INSTRUCTIONS>\n\n{ASK}",
    "cline": f"<task>\n{ASK}\n</task>\n<environment_details>\n# VSCode Visible Files\n</environment_details>",
    "copilot": f"<reminderInstructions>do it</reminderInstructions>\n<userRequest>\n{ASK}\n</userRequest>",
    "cursor": f"<additional_data>files</additional_data>\n<user_query>\n{ASK}\n</user_query>",
}


@pytest.mark.parametrize("text", SHAPES.values(), ids=SHAPES)
def test_what_an_agent_wrote_around_a_request_is_no_part_of_it(text):
    assert without_reminders(text) == ASK


@pytest.mark.parametrize(
    "text",
    [
        ASK,
        "<context>The text.</context>\nWhat does it say?",
        "<task>Sort the list</task>",
        "What does </system-reminder> mean?",
        "Close it: <system-reminder>",
        "  blanks stay\n",
    ],
)
def test_what_a_user_wrote_stays_as_it_is(text):
    assert without_reminders(text) == text


def read(*messages):
    return View().read(tiny_tokenizer(), list(messages), 512, 512)


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("text", SHAPES.values(), ids=SHAPES)
def test_a_decision_on_a_request_with_reminders_reads_the_request_alone(text):
    assert read(user(text)).ids.tolist() == read(user(ASK)).ids.tolist()
    assert not read(user(text)).whole


def test_a_turn_of_reminders_alone_is_passed_over():
    noted = [user(ASK), user("<system-reminder>note</system-reminder>")]
    assert read(*noted).ids.tolist() == read(user(ASK)).ids.tolist()


def test_where_there_is_nothing_but_reminders_they_are_read():
    assert len(read(user("<system-reminder>note</system-reminder>"))) > 5


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "42"}


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([user(ASK), CALL], True),
        ([user(ASK), CALL, RESULT], True),
        ([user(ASK), CALL, RESULT, user("<system-reminder>note</system-reminder>")], True),
        ([user(ASK), CALL, RESULT, user("and now?")], False),
        ([user(ASK), CALL, RESULT, {"role": "assistant", "content": "42"}], False),
        ([user(ASK)], False),
    ],
)
def test_tool_calls_are_open_until_somebody_says_something_new(messages, found):
    assert is_open_call(messages) is found


@pytest.mark.parametrize(
    "text",
    [
        "<system-reminder>" * 60_000 + "</x",
        "<user_query>" * 80_000 + "</x",
        "# AGENTS.md instructions\n<INSTRUCTIONS>" * 25_000 + "</x",
        "<system-reminder></system-reminder><task>" + " " * 1_000_000 + "x",
        "<system-reminder></system-reminder>" * 25_000,
    ],
    ids=["openings", "requests", "instructions", "blanks", "pairs"],
)
def test_a_megabyte_that_is_made_to_be_slow_takes_no_longer_than_another(text):
    started = time.process_time()
    without_reminders(text)
    assert time.process_time() - started < 2
