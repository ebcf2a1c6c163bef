"""Measures of the project's language: docstrings by the syntax trees, documentation by its Markdown."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import expertoken

ROOT = Path(expertoken.__file__).parent
FOLDERS = ("modeling", "data_prep", "train", "inference", "evaluation", "cli", "configs", "benchmarks", "examples",
           "deploy")  # fmt: skip

QUESTION_WORDS = {"how", "that", "what", "when", "where", "whether", "which", "who", "whoever", "whom", "whose", "why"}
DEPENDENT_WORDS = {"as", "how", "of", "that", "what", "where", "whether", "who"}
"""First words of an argument's description that make it a clause of a sentence that nobody wrote."""

VERBS = frozenset((ROOT / "tests" / "verbs.txt").read_text().split())
"""Verbs that a function's docstring may begin with. Add one where a function does something else."""

BANNED = {
    r"\bso-manieth\b": "every n-th",
    r"\bmend(s|ed|ing)?\b": "fix, repair",
    r"\btold\b|\btells?\b|\btelling\b": "report, log, return, describe",
    r"\ball the same\b": "anyway",
    r"\bleaves? (it|them|\w+ \w+) alone\b": "does not change",
    r"\bstands? (there|here|in|beside|behind|before|at|on|under)\b": "is, lies, follows",
    r"\b(is|are|was|were) (nothing|nobody|none) (there|to)\b": "say what is missing",
    r"\bno such thing\b": "say what was expected",
    r"\bfor nothing\b": "say what is wasted",
    r"\bby and by\b": "gradually",
    r"\bone after another\b|\bone after the other\b": "in turn, sequentially",
    r"\bwhat (it|they|he|she) (is|are|was|were|has|have|does|do)\b": "name the thing",
    r"\bthose (of|that|who|which|with)\b": "repeat the noun",
    r"\bwhoever\b": "name the person or the caller",
    r"\bsomebody\b|\bnobody\b|\banybody\b": "name the person or the caller",
    r"\bless what\b": "without",
    r"\bof its own right\b|\bto its own right\b": "leave out",
    r"\bbut for\b": "except",
    r"\bsays? no\b": "reports 'not ready', rejects",
}
"""Turns of phrase that readers stumble over, as patterns, and what to write instead."""


class Docstring(NamedTuple):
    """A docstring and its place."""

    where: str
    kind: str
    text: str

    @property
    def first(self) -> str:
        """First word, in small letters and without punctuation."""
        return self.text.split()[0].strip("`*.,:;()").lower()


class Text(NamedTuple):
    """A piece of prose and its place."""

    where: str
    text: str


@cache
def modules() -> list[tuple[str, ast.Module]]:
    """Return each module's path in the project and its syntax tree."""
    files = [ROOT / "__init__.py", *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))]
    return [(file.relative_to(ROOT).as_posix(), ast.parse(file.read_text())) for file in files]


def docstrings() -> Iterator[Docstring]:
    """Yield all docstrings; their kinds are module, class, property and function."""
    for path, tree in modules():
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            text = ast.get_docstring(node)
            if not text:
                continue
            if isinstance(node, ast.Module):
                yield Docstring(path, "module", text)
            elif isinstance(node, ast.ClassDef):
                yield Docstring(f"{path}:{node.lineno} {node.name}", "class", text)
            else:
                decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
                kind = "property" if "property" in decorators else "function"
                yield Docstring(f"{path}:{node.lineno} {node.name}", kind, text)


def arguments() -> Iterator[Text]:
    """Yield the descriptions of arguments: in `Args:` sections and as `help=` of commands."""
    for entry in docstrings():
        section = re.search(r"^Args:\n((?:(?:    .*)?\n?)+)", entry.text, re.MULTILINE)
        for match in re.finditer(r"^    (\*{0,2}\w+)[^:\n]*: (.+)", section.group(1) if section else "", re.MULTILINE):
            yield Text(f"{entry.where}({match.group(1)})", match.group(2))
    yield from helps()


def helps() -> Iterator[Text]:
    """Yield the help texts of options and the descriptions of the HTTP API's fields."""
    for path, tree in modules():
        for node in ast.walk(tree):
            pairs: list[tuple[str | None, ast.expr]] = []
            if isinstance(node, ast.Call):
                pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
            elif isinstance(node, ast.Dict):
                pairs = [
                    (key.value, value)
                    for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant)
                ]
            for name, value in pairs:
                if name in ("help", "description") and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield Text(f"{path}:{value.lineno} help", value.value)


def messages() -> Iterator[Text]:
    """Yield texts of exceptions and log lines, with `{}` for what is filled in."""
    for path, tree in modules():
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call):
                continue
            logged = isinstance(call.func, ast.Attribute) and call.func.attr in ("warning", "info", "error")
            if isinstance(node, ast.Raise) or logged:
                for argument in call.args[:1]:
                    if text := _filled(argument):
                        yield Text(f"{path}:{call.lineno} message", text)


def _filled(node: ast.expr) -> str:
    """Return a string's text, with `{}` for each value in it; empty for what is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_filled(part) or "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return _filled(node.left) + _filled(node.right)
    return ""


def comments() -> Iterator[Text]:
    """Yield comments of the modules, without directives to tools."""
    for path, _ in modules():
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
            match = re.search(r"(?:^|\s\s)\s*# (?!fmt|type|noqa|ruff|pragma)(.+)", line)
            if match:
                yield Text(f"{path}:{number} comment", match.group(1))


def pages() -> list[Path]:
    """Return the documentation's Markdown files."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "RELEASE.md")]
    return top + sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "examples").rglob("README.md"))


def paragraphs(page: Path) -> Iterator[Text]:
    """Yield a page's paragraphs and list items, without code, tables, headings and directives."""
    text = re.sub(r"^---\n.*?\n---\n", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"^( *)(```|~~~).*?^\1\2 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    path = page.relative_to(ROOT).as_posix()
    for block in re.split(r"\n\s*\n|\n(?= *(?:[-*]|\d+\.) )", text):
        lines = [line for line in block.splitlines() if not re.match(r"\s*(\||#|!!!|\?\?\?|:::|<|=== )", line)]
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(lines))
        plain = re.sub(r"\s+", " ", re.sub(r"^\s*(?:[-*]|\d+\.) ", "", plain)).strip()
        if plain:
            yield Text(path, plain)


def prose_lines(page: Path) -> Iterator[str]:
    """Yield a page's lines without code, tables, headings, and lines that a link makes long."""
    text = re.sub(r"^( *)(```|~~~).*?^\1\2 *$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for line in text.splitlines():
        if not re.match(r"\s*(\||#|!\[|---)", line) and "](" not in line and "http" not in line:
            yield line


def sentences(text: str) -> list[str]:
    """Split prose into sentences; a full stop inside code, a number or an abbreviation ends none."""
    plain = re.sub(r"`[^`]*`", "code", text)
    plain = re.sub(r"\b(e\.g|i\.e|vs|etc|al|Eq|Sec|Fig|No)\.", r"\1", plain)
    return [part for part in re.split(r"(?<=[.!?:])[\"')*_]*\s+(?=[\"'(*_]*[A-Z0-9])", plain) if part.strip()]
