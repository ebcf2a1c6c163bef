import io
from dataclasses import replace

import pytest
from rich.console import Console

from expertoken.inference import terminal
from expertoken.inference.decider import Decision
from expertoken.inference.reply import Reply, ReplyStream
from expertoken.inference.terminal import TerminalChat
from expertoken.modeling.dispatch import Dispatch
from expertoken.modeling.errors import ExpertokenError


class ScriptedStream(ReplyStream):
    """Stream of scripted pieces. An interruption among them is raised in the loop over the pieces, as at a terminal."""

    def __init__(self, pieces):
        probabilities = {"math": 0.8, "law": 0.1, "self": 0.1}
        dispatch = Dispatch("math", probabilities, "math has probability 0.80", ("math", "law", "self"))
        super().__init__(Decision(dispatch, 1, 0.0))
        self.given = pieces

    def __iter__(self):
        for piece in self.given:
            if isinstance(piece, BaseException):
                raise piece
            self.reply = replace(self.reply, text=self.reply.text + piece)
            yield piece

    def close(self):
        pass


class Scripted:
    """Composite with scripted answers, because only the terminal is tested."""

    def __init__(self, pool, answers):
        self.pool, self.answers, self.heard = pool, list(answers), []

    def stream(self, messages, **_):
        self.heard.append([dict(message) for message in messages])
        return ScriptedStream(self.answers.pop(0))


@pytest.fixture
def talk(pool, monkeypatch):
    def run(lines, answers=()):
        composite = Scripted(pool, answers)
        console = Console(file=io.StringIO(), width=100)
        monkeypatch.setattr(terminal, "_lines", lambda: iter(lines))
        TerminalChat(composite, console).run()
        return composite, console.file.getvalue()

    return run


def test_the_conversation_goes_on_over_turns_until_reset(talk):
    composite, shown = talk(["one", "two", "/reset", "three"], [["a", "b"], ["c"], ["d"]])
    assert "ab" in shown
    assert [m["content"] for m in composite.heard[1]] == ["one", "ab", "two"]
    assert [m["content"] for m in composite.heard[2]] == ["three"]


def test_why_tells_who_answered_only_when_asked(talk):
    _, silent = talk(["one"], [["a"]])
    assert "math" not in silent
    _, told = talk(["/why", "one", "/why"], [["a"]])
    assert "no answer yet" in told
    assert "answered by math" in told
    assert "80.0%" in told


def test_why_tells_of_a_hand_over(pool):
    dispatch = Dispatch("self", {"self": 0.9, "math": 0.1}, "self has probability 0.90", ("self", "math"))
    called = Dispatch("math", {"self": 0.3, "math": 0.7}, "math has probability 0.70", ("math", "self"))
    console = Console(file=io.StringIO(), width=200)
    chat = TerminalChat(Scripted(pool, []), console)
    chat.last = Reply("so 4", "math", dispatch, handed_over=called, handed_over_after=3)
    chat._why()
    told = "answered by math: self began (self has probability 0.90) and after 3 characters math has probability 0.70"
    assert told in console.file.getvalue()


def test_commands_are_listed_and_unknown_ones_are_told(talk):
    _, shown = talk(["/help", "/experts", "/wy", "/quit", "never"], [])
    for part in ("/why", "capital of France", "unknown command /wy"):
        assert part in shown


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(talk):
    composite, shown = talk(["one", "two"], [["part", KeyboardInterrupt()], ["rest"]])
    assert "[stopped]" in shown
    assert [m["content"] for m in composite.heard[1]] == ["one", "part", "two"]


def test_a_failed_turn_leaves_no_trace_in_the_conversation(talk):
    composite, shown = talk(["one", "two"], [[ExpertokenError("no expert could answer")], ["fine"]])
    assert "error: no expert could answer" in shown
    assert [m["content"] for m in composite.heard[1]] == ["two"]


def test_markup_in_answers_is_text(talk):
    assert "[bold]x[/bold]" in talk(["one"], [["[bold]x[/bold]"]])[1]


def test_an_answer_can_not_steer_the_terminal_and_stays_as_it_is(talk, pool):
    _, shown = talk(["hello"], [["x[0:100:2] \x1b]52;c;aGVsbG8=\x07\x9b2J", " :100: done"]])
    assert "x[0:100:2] ]52;c;aGVsbG8=2J :100: done" in shown


def test_brackets_in_a_description_are_text(talk, pool):
    pool.experts[0] = replace(pool.experts[0], description="[/INST] [eu only]")
    _, shown = talk(["/experts"])
    assert "[/INST] [eu only]" in shown
