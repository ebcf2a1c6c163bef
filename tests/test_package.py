import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import expertoken

ROOT = Path(expertoken.__file__).parent


def python(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_importing_expertoken_outside_the_checkout_needs_no_torch(tmp_path):
    code = (
        "import sys, expertoken; assert expertoken.__all__; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert python(code, tmp_path).returncode == 0


@pytest.mark.parametrize("folder", ["train", "modeling", "data_prep", "inference", "evaluation", "cli", "configs"])
def test_the_folders_are_no_packages_of_their_own_outside_the_checkout(tmp_path, folder):
    assert "ModuleNotFoundError" in python(f"import {folder}", tmp_path).stderr


def test_every_public_name_is_there():
    for name in expertoken.__all__:
        assert getattr(expertoken, name).__doc__, name


def test_the_version_is_that_of_the_changelog():
    assert f"## {expertoken.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_holds_the_package_only(tmp_path):
    pytest.importorskip("build")
    # The wheel is built from a copy, because an old build folder in the checkout would add deleted modules to it.
    leave = shutil.ignore_patterns(".*", "build", "dist", "demo", "runs", "*.egg-info", "__pycache__", "adapters")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=leave)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"expertoken"}
    inside = {name.split("/")[1] for name in names if name.startswith("expertoken/")}
    assert inside == {"__init__.py", "py.typed", "cli", "configs", "data_prep", "evaluation", "inference", "modeling",
                      "train"}  # fmt: skip
    for module in ROOT.glob("*/**/*.py"):
        parts = module.relative_to(ROOT).parts
        if parts[0] in inside and "build" not in parts:
            assert f"expertoken/{'/'.join(parts)}" in names
    for data in (ROOT / "configs").rglob("*.yaml"):
        assert f"expertoken/{data.relative_to(ROOT).as_posix()}" in names


FLOORS = {"modeling": 1, "data_prep": 2, "train": 3, "inference": 3, "evaluation": 3, "cli": 4}


@pytest.mark.parametrize("folder", FLOORS)
def test_dependencies_point_down_the_floors(folder):
    for file in (ROOT / folder).rglob("*.py"):
        depth = len(file.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth + 1 and node.module:
                other = node.module.split(".")[0]
                forbidden = folder == "inference" and other == "data_prep"
                lower = FLOORS.get(other, 0) < FLOORS[folder] and not forbidden
                assert lower or other == folder, f"{file} imports {node.module}"


def imports_of(file):
    """Yield the package's modules that a module imports, for types too."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ROOT.joinpath(*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            for candidate in (base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)):
                if candidate.is_file():
                    yield candidate


def test_no_modules_import_each_other_in_a_circle():
    graph = {file: set(imports_of(file)) for folder in FLOORS for file in (ROOT / folder).rglob("*.py")}
    done, path = set(), []

    def visit(file):
        assert file not in path, " -> ".join(f.relative_to(ROOT).as_posix() for f in [*path[path.index(file) :], file])
        if file in done:
            return
        path.append(file)
        for other in graph[file]:
            visit(other)
        done.add(path.pop())

    for file in graph:
        visit(file)


def test_modules_of_higher_floors_are_named_in_one_place_only():
    """They are named as text, which the test above cannot detect, where kinds of experts are registered."""
    higher = {folder: [other for other, floor in FLOORS.items() if floor > FLOORS[folder]] for folder in FLOORS}
    named = [
        file.relative_to(ROOT).as_posix()
        for folder, others in higher.items()
        for file in (ROOT / folder).rglob("*.py")
        if others and re.search(rf"expertoken\.({'|'.join(others)})\b", code_of(file))
    ]
    assert named == ["modeling/experts.py"]


def test_an_extra_that_is_missing_names_itself():
    from expertoken.modeling.errors import require_extra

    with pytest.raises(ImportError, match=r"pip install 'expertoken\[train\]'"):
        require_extra("no_such_module_here", "train")


FOLDERS = ("modeling", "data_prep", "train", "evaluation", "inference", "benchmarks", "examples")


def modules():
    return [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if not file.name.startswith("__")]


def test_a_name_of_a_module_stands_once():
    """The command's verbs are an exception, because they have the names of the modules that they run."""
    names = Counter(file.name for file in modules())
    assert [name for name, count in names.items() if count > 1] == []


def test_a_name_of_a_public_class_stands_once():
    files = [file for file in modules() if file.relative_to(ROOT).parts[0] not in ("benchmarks", "examples")]
    classes = Counter(
        node.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in classes.items() if count > 1] == []


def code_of(file):
    """Return a module's code without docstrings, because they may contain examples."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body[0].value.value = ""
    return ast.unparse(tree)


def test_one_module_spells_the_kind_of_endpoints():
    files = [file for folder in (*FOLDERS[:5], "cli") for file in (ROOT / folder).rglob("*.py")]
    codes = {
        file: re.sub(r"from openai\.types\S* import", "", code_of(file)) for file in files
    }  # imports of the library's types are allowed
    spelt = [file.relative_to(ROOT).as_posix() for file, code in codes.items() if re.search(r"\bopenai\b", code)]
    assert spelt == ["inference/backends/endpoint.py"]


def test_no_file_is_longer_than_500_lines_and_few_functions_than_30():
    lengths = []
    for file in [*modules(), *(ROOT / "cli").glob("*.py")]:
        text = file.read_text()
        assert len(text.splitlines()) <= 500, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
    assert sorted(lengths)[int(0.9 * len(lengths))] <= 30


def test_every_entry_sets_how_long_openmp_waits_before_torch_is_loaded():
    code = "import expertoken, os, sys; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    for given, told in (({}, "1000 False"), ({"GOMP_SPINCOUNT": "7"}, "7 False")):
        environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | given
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == told
