"""Chat in the terminal: streaming, line editing, a history, and commands that show which expert answered."""

import re
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..modeling.errors import ExpertokenError
from ..modeling.files import cache_folder
from ..modeling.pictures import url_part
from ..modeling.source import local_path
from .answering import AnsweringModel
from .reply import Reply

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_HELP = """/why      the expert of the last answer, and the dispatch probabilities
/experts  the experts of this composite
/image P  send the picture in the file P with the next message
/reset    clear the conversation
/help     this list
/quit     leave (also Ctrl-D)
Ctrl-C stops an answer."""


class TerminalChat:
    """A conversation with a composite.

    Args:
        composite: Model that answers.
        console: Console to print on. Defaults to standard output.
        generation: Arguments of `AnsweringModel.stream`.
    """

    def __init__(self, composite: AnsweringModel, console: Console | None = None, **generation: Any) -> None:
        self.composite, self.generation = composite, generation
        self.console = console or Console(highlight=False)
        self.messages: list[dict[str, Any]] = []
        self.pictures: list[dict[str, Any]] = []
        self.last: Reply | None = None
        self.commands = {
            "/why": self._why,
            "/experts": self._experts,
            "/reset": self._reset,
            "/help": lambda: self.console.print(_HELP),
        }

    def run(self) -> None:
        """Read lines until the user leaves."""
        self.console.print(f"{len(self.composite.pool.candidates)} models answer as one. /help lists the commands.")
        for line in _lines():
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            if text in self.commands:
                self.commands[text]()
            elif text.startswith("/image "):
                self._show(text.removeprefix("/image ").strip())
            elif text.startswith("/") and " " not in text:
                self.console.print(f"unknown command {text}, /help lists the commands", markup=False)
            elif text:
                self._answer(text)

    def _answer(self, text: str) -> None:
        content: Any = [*self.pictures, {"type": "text", "text": text}] if self.pictures else text
        self.messages.append({"role": "user", "content": content})
        stream = None
        try:
            stream = self.composite.stream(self.messages, **self.generation)
            for piece in stream:
                self.console.print(printable(piece), end="", markup=False, emoji=False, soft_wrap=True)
        except KeyboardInterrupt:
            self.console.print(" [stopped]", markup=False, end="")
        except ExpertokenError as error:
            self.console.print(f"\nerror: {error}", markup=False, end="")
        finally:
            if stream is not None:
                stream.close()
        self.console.print()
        if stream is None or not stream.reply.text:
            self.messages.pop()  # without an answer, two user messages would follow each other
            return
        self.last, self.pictures = stream.reply, []
        self.messages.append({"role": "assistant", "content": self.last.text, "name": self.last.expert})

    def _show(self, name: str) -> None:
        try:
            self.pictures.append(url_part(local_path(name), name))
        except (ExpertokenError, ImportError) as error:
            self.console.print(f"error: {error}", markup=False)
            return
        self.console.print(f"{len(self.pictures)} with the next message", markup=False)

    def _why(self) -> None:
        if self.last is None:
            self.console.print("no answer yet")
            return
        for name in self.last.skipped:
            self.console.print(f"{name} was skipped because it failed too often recently", markup=False)
        for name, reason in self.last.failures.items():
            self.console.print(f"{name} failed: {reason}", markup=False)
        if (handed := self.last.handed_over) is not None:
            begun = f"{self.last.dispatch.expert} began ({self.last.dispatch.reason}) and after "
            why = f"answered by {self.last.expert}: {begun}{self.last.handed_over_after} characters {handed.reason}"
        else:
            why = f"answered by {self.last.expert} ({self.last.dispatch.reason})"
        self.console.print(why, markup=False)
        cost = "" if self.last.cost is None else f", {self.last.cost:.6f} USD"
        self.console.print(
            f"decided in {self.last.decided:.2f} s, first piece after {self.last.first:.2f} s, "
            f"{self.last.completion_tokens} tokens in {self.last.seconds:.2f} s{cost}",
            markup=False,
        )
        width = max(map(len, self.last.dispatch.probabilities))
        probabilities, chances = self.last.dispatch.probabilities, self.last.dispatch.chances
        for name in sorted(probabilities, key=probabilities.__getitem__, reverse=True):
            probability = probabilities[name]
            bar = "█" * round(30 * probability)
            chance = f"  right: {chances[name]:.0%}" if chances else ""
            self.console.print(f"  {name:<{width}}  {probability:6.1%}  {bar}{chance}", markup=False)

    def _experts(self) -> None:
        table = Table("name", "backend", "model", "good at")
        for expert in self.composite.pool.candidates:
            cells = (expert.name, expert.backend, expert.model or "(meta LLM)", expert.description)
            table.add_row(*(Text(printable(cell)) for cell in cells))
        self.console.print(table)

    def _reset(self) -> None:
        self.messages.clear()
        self.pictures.clear()
        self.last = None
        self.console.print("the conversation was cleared")


def printable(text: str) -> str:
    """Remove control characters from a text, except line ends and tabs.

    An answer must not control the user's terminal.
    """
    return _CONTROL.sub("", text)


def _lines() -> Iterator[str]:
    """Yield lines of input.

    A terminal gets line editing and a history. Lines of a pipe are read as they are.
    """
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    folder = cache_folder("history")
    folder.mkdir(parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(history=FileHistory(str(folder / "chat")))
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
