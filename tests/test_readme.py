import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import expertoken
from expertoken.cli.app import app
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.supervision import select_candidates
from expertoken.modeling.composite import load_composite
from expertoken.modeling.pool import ExpertPool
from expertoken.tests.test_docs import lengthened

ROOT = Path(expertoken.__file__).parent
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_manual_goes_from_a_table_to_a_plugged_in_expert(tmp_path, base_folder, monkeypatch, capsys):
    """The manual's code has at most 20 lines and imports from the root only. It runs on tiny local models."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "reference" / "python.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    assert set(re.findall(r"^(?:from|import) (\S+)", code, re.MULTILINE)) == {"expertoken"}
    assert "TrainingArguments" not in code
    code = re.sub(r'"(your-organisation|Qwen)/[^"]+"', repr(str(base_folder)), code)
    [table] = re.findall(r"```csv\n(.*?)```", README, re.DOTALL)
    table = table.replace("math-7b", "math").replace("law-8b", "law")
    (tmp_path / "results.csv").write_text(lengthened(table))
    (tmp_path / "sql.csv").write_text("query,sql\n" + "".join(f"Write SQL query {i} please,1\n" for i in range(30)))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "python.md", "exec"), {})
    told = capsys.readouterr().out
    assert "routes changed" in told
    assert load_composite(tmp_path / "composite").pool.names == ["math", "sql", "self"]


def test_the_manual_of_python_names_all_of_the_root():
    manual = (ROOT / "docs" / "reference" / "python.md").read_text()
    for name in expertoken.__all__:
        assert re.search(rf"^::: expertoken\.[\w.]+\.{name}$", manual, re.MULTILINE), name


def test_the_table_and_the_pool_of_the_readme_fit_together(tmp_path):
    for kind, name in (("csv", "results.csv"), ("yaml", "pool.yaml")):
        [text] = re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)
        (tmp_path / name).write_text(text)
    pool = ExpertPool.from_yaml(tmp_path / "pool.yaml")
    assert pool.names == ["math", "law", "self"]
    results = select_candidates(read_results(tmp_path / "results.csv"), pool)
    assert results.scores.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert not pool.missing()


def test_the_two_commands_of_the_training_manual_train_a_composite(tmp_path, base_folder, monkeypatch, capsys):
    """The commands run unchanged on the README's pool and a longer copy of its table, with a tiny meta LLM."""
    [commands] = re.findall(
        r"two commands:\n\n```bash\n(.*?)```", (ROOT / "docs" / "guides" / "training.md").read_text(), re.DOTALL
    )
    [table] = re.findall(r"```csv\n(.*?)```", README, re.DOTALL)
    [pool] = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "results.csv").write_text(lengthened(table))
    (tmp_path / "pool.yaml").write_text(pool)
    monkeypatch.chdir(tmp_path)
    prepare, training = (shlex.split(line)[1:] for line in commands.strip().splitlines())
    told = CliRunner().invoke(app, [*prepare, "--near-duplicates", "ignore"])
    assert told.exit_code == 0, told.output
    training[training.index("--meta") + 1] = str(base_folder)
    told = CliRunner().invoke(app, [*training, "--use_cpu", "true", "--report_to", "none", "--verify", "false"])
    assert told.exit_code == 0, told.output
    assert load_composite(tmp_path / "composite").pool.names == ["math", "law", "self"]


def test_the_tree_of_the_readme_names_what_is_there():
    tree = re.search(r"```\n(expertoken/.*?)```", README, re.DOTALL)[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:] if line.strip()}
    for name in named:
        assert (ROOT / name).exists(), name
    ignored = {"demo", "build", "dist", "runs"}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith((".", "__")) and p.suffix == ""}
    assert folders - ignored <= named


@pytest.mark.parametrize("target", ["demo", "test", "lint", "help"])
def test_the_make_targets_of_the_readme_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert shutil.which("make")
