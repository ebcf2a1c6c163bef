"""Pages of the manual that are generated when it is built: the command line, the HTTP API and llms.txt.

MkDocs calls the functions by their names (`hooks` in mkdocs.yml).
"""

import contextlib
import io
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_GATEWAY = """
meta: {model: meta, base_url: "http://127.0.0.1:1/v1", top_logprobs: 20}
experts:
  - {name: math, backend: openai, model: math, base_url: "http://127.0.0.1:2/v1"}
  - {name: self, backend: self}
"""


def on_startup(command: str, dirty: bool) -> None:
    """Copy the package to the place where the Python reference is read from.

    The checkout itself is no such place: it holds a virtual environment, and its folder has any name. griffe would scan
    it too, because the package is installed in editable mode.
    """
    finder: Any = griffe.ModuleFinder
    finder._extend_from_pth_files = lambda _: None
    root = Path(__file__).parents[2]
    package = root / "build" / "api" / "expertoken"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    shutil.copy(root / "__init__.py", package)
    for module in root.glob("*/__init__.py"):
        ignore = shutil.ignore_patterns("__pycache__", "page")
        shutil.copytree(module.parent, package / module.parent.name, ignore=ignore)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, content in {"reference/cli.md": command_line(), "reference/http.md": http_api()}.items():
        files.append(File.generated(config, name, content=content))
    files.append(File.generated(config, "llms.txt", content=_llms(files, config)))
    return files


def command_line() -> str:
    """Return the page of the commands, from their own help."""
    import typer
    from typer.cli import get_docs_for_click

    from expertoken.cli.app import app
    from expertoken.train.config import parse_arguments

    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="expertoken")
    text = get_docs_for_click(obj=group, ctx=context, name="expertoken", title="Command line")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        parse_arguments(["--help"])
    note = "Arguments of `train`, as `expertoken train --help` prints them:"
    return f"{text}\n## `expertoken train`: arguments\n\n{note}\n\n```text\n{printed.getvalue()}```\n"


def http_api() -> str:
    """Return the page of the HTTP API, from the server's OpenAPI document."""
    document = openapi()
    lines = [
        "# HTTP API",
        "",
        "`expertoken serve` answers these routes. The same description is at `/openapi.json` of a running server.",
        "[Serving](../guides/serving.md) and [Agents](../guides/agents.md) show how to use them.",
        "A field without a meaning here has the meaning of the API that the route follows.",
        "",
    ]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            lines += [f"## `{method.upper()} {path}`", "", route.get("description") or route.get("summary", ""), ""]
            lines += _fields(route, document)
    return "\n".join(lines)


def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of a server. It does not depend on the composite."""
    from expertoken import GatewayModel
    from expertoken.inference.server import Settings
    from expertoken.inference.server.app import create_app

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gateway.yaml"
        file.write_text(_GATEWAY)
        settings = Settings(feedback=Path(folder) / "feedback.jsonl")
        return json.loads(json.dumps(create_app(GatewayModel.from_yaml(file), settings).openapi()))


def _fields(route: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """Return a table of a route's request body."""
    content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    schema = document.get("components", {}).get("schemas", {}).get(name)
    if not schema:
        return []
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field, entry in schema.get("properties", {}).items():
        required = field in schema.get("required", ())
        default = "required" if required else f"`{json.dumps(entry.get('default'))}`"
        meaning = re.sub(r"\s+", " ", entry.get("description", "")).replace("|", "\\|")
        lines.append(f"| `{field}` | {_type(entry)} | {default} | {meaning} |")
    return [*lines, ""]


def _type(entry: dict[str, Any]) -> str:
    """Return the type of a field in words."""
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(_type(option) for option in entry["anyOf"]))
    if "$ref" in entry:
        return entry["$ref"].rpartition("/")[2]
    if "const" in entry:
        return f"`{json.dumps(entry['const'])}`"
    if "enum" in entry:
        return " or ".join(f"`{json.dumps(value)}`" for value in entry["enum"])
    kind = entry.get("type", "any")
    if kind == "array":
        return f"list of {_type(entry.get('items', {}))}"
    return str(kind)


def _llms(files: Files, config: MkDocsConfig) -> str:
    """Return an index of the manual for language models (llmstxt.org)."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Manual", ""]
    for file in sorted(files.documentation_pages(), key=lambda file: file.src_uri):
        title = re.search(r"^# (.+)$", file.content_string, re.MULTILINE)
        text = re.search(r"\n\n(?!#|!\[|<|`{3}|\s|\|)((?:.+\n?)+)", file.content_string)
        summary = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(text[1].split())) if text else ""
        lines.append(f"- [{title[1] if title else file.src_uri}]({file.url}): {summary}")
    return "\n".join([*lines, ""])
