"""The code of the README and the manual: every block is run, loaded, or parsed by the command that it names."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer
import yaml
from markdown_it import MarkdownIt
from transformers import TrainingArguments
from typer.testing import CliRunner

import expertoken
from expertoken.cli.app import app
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.supervision import build_supervision
from expertoken.examples.smollm2 import smollm2
from expertoken.inference.composite_model import CompositeModel
from expertoken.inference.gateway import GatewayModel
from expertoken.inference.server import Settings
from expertoken.inference.server.app import create_app
from expertoken.inference.server.keys import read_keys
from expertoken.modeling.composite import load_composite
from expertoken.modeling.experts import Expert
from expertoken.modeling.policy import Policy
from expertoken.modeling.pool import ExpertPool
from expertoken.tests.inference.conftest import served
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.config import parse_arguments
from expertoken.train.launch import BESIDE
from expertoken.train.run import train_composite

ROOT = Path(expertoken.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))]
SERVER = "http://127.0.0.1:8000"
ARGUMENTS = {*ExpertokenArguments.__dataclass_fields__, *TrainingArguments.__dataclass_fields__}


def blocks(page, language):
    """Return the code blocks of a page."""
    fences = [token for token in MarkdownIt().parse(page.read_text()) if token.type == "fence"]
    return [token.content for token in fences if token.info.split()[:1] == [language]]


def pages_with(language, *without):
    """Return the pages that have such blocks, as test parameters."""
    named = {page.relative_to(ROOT).as_posix(): page for page in PAGES if blocks(page, language)}
    chosen = [page for name, page in named.items() if name not in without]
    return pytest.mark.parametrize("page", chosen, ids=lambda page: page.relative_to(ROOT).as_posix())


def commands(block):
    """Return the words of each line that runs `expertoken`, without comments and variables."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words[:1] == ["expertoken"]:
            yield words[1:]


def on_small_models(text, model):
    """Replace hub ids of models by a model that is here."""
    return re.sub(r"\b(your-organisation|your|Qwen|HuggingFaceTB)/[\w.-]+", str(model), text)


def lengthened(table):
    """Return a page's table with twenty copies of each row, under different questions: enough for splits."""
    header, *rows = table.strip().splitlines()
    return "\n".join([header, *(f"{number}. {row}" for number in range(20) for row in rows)]) + "\n"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, base_folder):
    """Make the folder that the pages' code assumes: results, a pool, a supervision, and a composite."""
    folder = tmp_path_factory.mktemp("manual")
    [table] = blocks(ROOT / "README.md", "csv")
    [pool] = blocks(ROOT / "README.md", "yaml")
    (folder / "results.csv").write_text(lengthened(table))
    (folder / "pool.yaml").write_text(on_small_models(pool, base_folder))
    (folder / "sql.csv").write_text("query,sql\n" + "".join(f"Write SQL query {i} please,1\n" for i in range(30)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTOKEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        candidates = ExpertPool.from_yaml(folder / "pool.yaml")
        supervision = build_supervision(read_results(folder / "results.csv"), candidates, near_duplicates="ignore")
        supervision.save(folder / "supervision")
        options = {"use_cpu": True, "report_to": "none", "verify": False}
        train_composite(str(base_folder), folder / "supervision", folder / "composite", **options)
    return folder


OWN_TEST = ("README.md", "docs/tutorial.md", "docs/reference/python.md")  # below, and in test_readme.py


@pages_with("python", *OWN_TEST)
def test_the_python_of_a_page_runs(page, workplace, base_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    code = [on_small_models(block, base_folder) for block in blocks(page, "python")]
    if any(SERVER in block for block in code):
        model = CompositeModel.from_pretrained("composite/")
        with served(create_app(model, Settings(name="composite"))) as address:
            run([block.replace(SERVER, address) for block in code], page)
    else:
        run(code, page)


def run(code, page):
    """Run blocks in one namespace."""
    namespace = {}
    for block in code:
        exec(compile(block, str(page), "exec"), namespace)


@pages_with("bash")
def test_the_commands_of_a_page_take_their_arguments(page):
    for block in blocks(page, "bash"):
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        for words in commands(block):
            if words[0] == "train":
                check_training(words[1:])
            elif words[0] != "lm-eval":  # all arguments go to the harness
                parse(list(words))


def parse(words):
    """Parse a command line as the command does, without running it."""
    command = typer.main.get_command(app)
    name = "expertoken"
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"no verb {name!r}"
        command = command.commands[name]
    command.make_context(name, words)


def check_training(words):
    """Parse the arguments of `expertoken train` as the command does, but for those of the launcher."""
    ours, place = [], 0
    while place < len(words):
        if words[place] in ("--accelerate_config", *BESIDE):
            place += 2
            continue
        ours.append(words[place])
        place += 1
    parse_arguments([*ours, "--use_cpu", "true", "--bf16", "false"])


@pages_with("bash")
def test_the_extras_of_a_page_exist(page):
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for block in blocks(page, "bash"):
        for extras in re.findall(r"(?:expertoken|-e '?\.)\[([\w,]+)\]", block):
            assert set(extras.split(",")) <= known


LINKED = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "RELEASE.md")]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_the_links_of_a_page_outside_of_the_site_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(#[^)]+)?\)", page.read_text())
    for target, anchor in links:
        assert (page.parent / target).exists(), target
        if anchor and target.endswith(".md"):
            headings = re.findall(r"^#+ (.+)$", (page.parent / target).read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, target + anchor


@pytest.mark.parametrize("kind", [Expert, Policy], ids=lambda kind: kind.__name__)
def test_the_configuration_page_names_every_key(kind):
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    others = {"options"}  # keys of the kinds of other packages
    missing = [item.name for item in fields(kind) if item.name not in others and f"`{item.name}`" not in page]
    assert missing == []


@pages_with("yaml")
def test_the_yaml_of_a_page_loads(page, tmp_path, monkeypatch):
    for number, block in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        document = yaml.safe_load(block)
        if isinstance(document, dict) and "meta" in document and "experts" in document:
            GatewayModel.from_yaml(file)
        elif isinstance(document, dict) and "experts" in document:
            assert ExpertPool.from_yaml(file).names
        elif isinstance(document, dict) and "keys" in document:
            assert read_keys(file)
        elif isinstance(document, dict) and set(document) <= ARGUMENTS:
            assert document  # a recipe
        else:
            known = ("services", "model_list", "providers", "policy")
            assert isinstance(document, dict), block
            assert set(document) & set(known), f"a block of no kind that this test knows: {block}"


@pages_with("csv")
def test_the_tables_of_a_page_are_results(page, tmp_path):
    for number, block in enumerate(blocks(page, "csv")):
        file = tmp_path / f"{number}.csv"
        file.write_text(block)
        assert len(read_results(file))


@pages_with("json")
def test_the_json_of_a_page_is_json(page):
    for block in blocks(page, "json"):
        json.loads(block)


@pages_with("toml")
def test_the_toml_of_a_page_is_toml(page):
    tomllib = pytest.importorskip("tomllib", reason="part of Python 3.11 and later")
    for block in blocks(page, "toml"):
        tomllib.loads(block)


@pytest.mark.slow
def test_the_tutorial_leads_from_a_table_to_a_plugged_in_expert(tmp_path, monkeypatch):
    """Word for word, on the real small model in place of all models of the hub."""
    page, small = ROOT / "docs" / "tutorial.md", smollm2()
    monkeypatch.chdir(tmp_path)
    [script] = blocks(page, "python")
    Path("table.py").write_text(script)
    subprocess.run([sys.executable, "table.py"], check=True)
    table, roman = blocks(page, "csv")
    written = Path("results.csv").read_text().splitlines()
    assert {line for line in table.splitlines() if line} <= set(written)
    [pool] = blocks(page, "yaml")
    Path("pool.yaml").write_text(on_small_models(pool, small))
    header, *rows = roman.strip().splitlines()
    more = [f"Write {number} in Roman numerals.,1" for number in range(100, 120)]
    Path("roman.csv").write_text("\n".join([header, *rows, *more]) + "\n")
    for block in blocks(page, "bash"):
        for words in commands(on_small_models(block, small)):
            if words[0] not in ("chat", "serve"):
                extra = ["--use_cpu", "true", "--report_to", "none", "--verify", "false"] if words[0] == "train" else []
                result = CliRunner().invoke(app, [*words, *extra])
                assert result.exit_code == 0, f"{words}: {result.output} {result.exception}"
    assert re.search(r"^\| names \| \d", Path("composite/report/report.md").read_text(), re.MULTILINE)
    assert load_composite("composite").pool.names == ["math", "law", "roman", "self"]
    composite = CompositeModel.from_pretrained("composite")
    assert composite.route("What is 7 times 45?").expert == "math"
    assert composite.route("May a tenant change the locks?").expert == "law"
    assert composite.chat("Hello! How are you?", max_new_tokens=8).expert == "self"


@pytest.mark.slow
def test_the_notebook_runs_and_decides_as_the_readme_shows(tmp_path, monkeypatch):
    """The README's Python is part of the notebook, so that one run on the real small model covers both."""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / "first_composite.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before you commit"
    [readme] = blocks(ROOT / "README.md", "python")
    lines = [line for line in readme.splitlines() if line.strip()]
    assert 15 <= len(lines) <= 20
    run_in_notebook = iter(line for cell in notebook.cells for line in cell.source.splitlines())
    assert all(line in run_in_notebook for line in lines), "the notebook runs the README's lines, in their order"
    for cell in notebook.cells:
        cell.source = on_small_models(cell.source, smollm2())
    monkeypatch.setenv("MPLBACKEND", "agg")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    assert outputs[-1].strip().endswith("roman")
    printed = "\n".join(outputs)
    [shown] = [block for block in blocks(ROOT / "README.md", "text") if "math" in block]
    for line in shown.splitlines():
        expert, probability, question = re.match(r"(\w+) +([\d.]+)  (.*)", line).groups()
        found = re.search(rf"^{expert} +([\d.]+)  {re.escape(question)}$", printed, re.MULTILINE)
        assert found, printed
        assert abs(float(found[1]) - float(probability)) < 0.02
