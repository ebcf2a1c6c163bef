import json
import os
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from typer.models import OptionInfo
from typer.testing import CliRunner

from expertoken.cli.app import app
from expertoken.cli.prepare import _hold_out
from expertoken.data_prep.results import QUERY_COLUMNS
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.tests.fresh import expertoken
from expertoken.tests.inference.conftest import composite_of
from expertoken.train.checkpoints import find_checkpoint
from expertoken.train.config import make_parser, parse_arguments

VERBS = [[], ["prepare"], ["train"], ["evaluate"], ["select"], ["chat"], ["expert"], ["expert", "add"],
         ["expert", "list"], ["expert", "remove"], ["serve"], ["generate"], ["calibrate"], ["export"]]  # fmt: skip


def started(*arguments):
    """Run the command in its own Python process, imports included."""
    command = [str(Path(sys.executable).parent / "expertoken"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=550)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb) or "expertoken")
def test_help_reads_well_and_needs_no_torch(verb):
    code = (
        f"import sys; from expertoken.cli import main; sys.argv = ['expertoken', *{verb!r}, '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "usage" in shown.stdout.lower()
    assert len(shown.stdout.splitlines()) > 5


@pytest.mark.parametrize("where", ["expertoken.cli.app", "typer"])
def test_ctrl_c_during_the_imports_ends_in_one_line(where):
    """Interrupts itself when it begins to import a module."""
    code = f"""
import signal, sys
class Interrupt:
    def find_spec(self, name, *others):
        if name == {where!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from expertoken.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_in_a_verb_ends_in_one_line(tmp_path):
    code = """
import signal
from expertoken.cli import main
from expertoken.data_prep import reading
def read(*arguments, **options):
    signal.raise_signal(signal.SIGINT)
reading.read_results = read
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", "x.csv", "--out", str(tmp_path / "d")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(verb) or "expertoken")
def test_help_takes_under_two_seconds(verb):
    """Measured in processor time, because other tests run at the same time."""

    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    best = 9e9
    for _ in range(3):
        before = spent()
        assert started(*verb, "--help").returncode == 0
        best = min(best, spent() - before)
        if best < 2:
            return
    assert best < 2


def options(typer_app):
    """Yield every option of a command line with the names of its function and parameter."""
    for command in typer_app.registered_commands:
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            # Python 3.10 puts an option without a value into an Optional.
            marked = (hint, *get_args(hint))
            for information in (one for part in marked for one in getattr(part, "__metadata__", ())):
                if isinstance(information, OptionInfo):
                    yield f"{command.callback.__name__} {name}", information
    for group in typer_app.registered_groups:
        yield from options(group.typer_instance)


def listed(option):
    """Return the values that an option's help lists."""
    found = re.match(r"\[([^\]]+)\]", option.metavar or "")
    return found[1].split("|") if found else []


OPTIONS = dict(options(app))
CHOICES = [(name, value) for name, option in OPTIONS.items() for value in listed(option)]


@pytest.mark.parametrize(("name", "value"), CHOICES)
def test_every_value_that_a_help_text_lists_is_taken(name, value):
    parse = OPTIONS[name].parser
    assert parse(value) == value
    with pytest.raises(ExpertokenError, match="unknown 'no-such-value', (did you mean|available)"):
        parse("no-such-value")


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in CHOICES))
def test_a_help_text_explains_no_value_that_is_none(name):
    option = OPTIONS[name]
    explained = re.findall(r"(?:^|\. |; )([a-z_0-9]+):", option.help or "")
    assert set(explained) <= set(listed(option))


HELP_OF_RESUME = next(action.help for action in make_parser(everything=False)._actions if action.dest == "resume")


def training_choices():
    parser = make_parser(everything=False)
    return [(action.dest, value) for action in parser._actions for value in action.choices or ()]


@pytest.mark.parametrize(("name", "value"), training_choices())
def test_every_value_that_the_help_of_train_lists_is_taken(name, value):
    options, _ = parse_arguments(["--meta", "m", "--data", "d", "--out", "o", f"--{name}", value])
    assert getattr(options, name) == value


@pytest.mark.parametrize("value", re.findall(r"(auto|never) (?:continues|starts)", HELP_OF_RESUME) or ["none"])
def test_the_words_of_resume_are_taken(value):
    assert parse_arguments(["--meta", "m", "--data", "d", "--out", "o", "--resume", value])[0].resume == value
    assert find_checkpoint(value, Path("no-such-folder"), {}) is None


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.endswith(" device")])
def test_the_devices_that_help_names_are_known(name):
    named = re.match(r"(\w+), (\w+), \.\.\. Default: .*, or (\w+)\.", OPTIONS[name].help).groups()
    assert {torch.device(device).type for device in named} == {"cpu", "cuda"}


def test_the_fields_that_help_holds_out_are_those_of_results():
    named = re.findall(r"(\w+)=NAME", OPTIONS["prepare hold_out"].help)
    assert set(named) < set(QUERY_COLUMNS)
    assert [_hold_out(f"{field}=a,b") for field in named] == [(field, ["a", "b"]) for field in named]


def test_options_with_choices_are_those_of_the_registries():
    shown = {name.split()[-1] for name, _ in CHOICES}
    assert {"format", "label", "ties", "leaks", "split", "engine", "baselines", "dtype", "backend"} <= shown
    assert {name for name, _ in training_choices()} >= {"method", "objective", "dtype", "attn_implementation"}


@pytest.mark.slow
def test_a_composite_is_calibrated_answers_a_file_and_is_exported_by_commands(base_folder, tmp_path, monkeypatch):
    """The calibrated policy decides on the file's prompts. The export has the original decisions."""
    experts = [Expert(name, model=str(base_folder)) for name in ("one", "two")]
    composite = composite_of(base_folder, [*experts, Expert("self", "self")])
    composite.meta.rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    composite.save_pretrained(tmp_path / "c", verify=False)
    prompts = [f"question {number} of {number * 7}" for number in range(40)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    done = expertoken("calibrate", "c", "--prompts", "prompts.txt", "--share", "0.25", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on 40 prompts: 25.0% to experts" in done.stdout
    arguments = ("--out", "out.jsonl", "--max-new-tokens", "4", "--device", "cpu")
    done = expertoken("generate", "c", "in.jsonl", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert sum(row["expert"] != "self" for row in rows) == 10
    done = expertoken("export", "c", "--out", "checkpoint", "--prompts", "prompts.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    assert "c/in.jsonl" in refused("generate", "c", "c/in.jsonl", "--out", "o.jsonl")
    assert "none: expected a composite folder (it does not exist" in refused("export", "none", "--out", "x")
    assert "no such folder" in refused("calibrate", "none", "--prompts", "prompts.txt")


def test_the_version_is_told():
    assert started("--version").stdout.strip() == f"expertoken {metadata.version('expertoken')}"


def refused(*arguments):
    """Run the command in this process and return its error's text. `main` prints it as one line (see `one_line`)."""
    error = CliRunner().invoke(app, list(arguments)).exception
    assert isinstance(error, ExpertokenError | SystemExit), error
    assert isinstance(error, ExpertokenError) or str(error).startswith("error: ")
    assert "\n" not in str(error)
    return str(error)


def one_line(result):
    assert result.returncode == 1, result.stdout + result.stderr
    [line] = [text for text in result.stderr.splitlines() if "error:" in text]
    assert "Traceback" not in result.stderr
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "none.csv", "--out", "s"], "none.csv: no such file"),
        (["prepare", "empty.csv", "--out", "s"], "empty.csv: empty results"),
        (["prepare", "r.csv", "--set", "query=qestion", "--out", "s"], "no column 'qestion' with the question"),
        (["prepare", "nan.csv", "--out", "s"], "model 'b' has no score on any query"),
        (["prepare", "twice.csv", "--out", "s"], "row 3: query 'twice/q one' came before"),
        (
            ["prepare", "r.csv", "--pool", "pool.yaml", "--out", "s"],
            "'physics': no results under 'physics' or 'y'",
        ),
        (["prepare", "r.csv", "--format", "tabel", "--out", "s"], "did you mean 'table'"),
        (["prepare", "r.csv", "--label", "quer", "--out", "s"], "did you mean 'query'"),
        (["evaluate", "none"], "none: expected a composite folder"),
        (["chat", "none"], "none: expected a composite folder"),
        (["expert", "list", "none"], "none: expected a composite folder"),
        (["expert", "remove", "none", "--name", "x"], "none: expected a composite folder"),
        (["train", "tokens", "--meta", "m"], "--data: missing; --out: missing"),
        (["train", "--meta", "m", "--data", "none", "--out", "o"], "none: expected a supervision folder, found none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_clear_line(tmp_path, monkeypatch, arguments, message):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "r.csv").write_text("query,a,b\nq one,1,0\nq two,0,1\n")
    (tmp_path / "nan.csv").write_text("query,a,b\nq one,1,\nq two,0,\n")
    (tmp_path / "twice.csv").write_text("query,a,b\nq one,1,0\nq one,0,1\n")
    (tmp_path / "pool.yaml").write_text("experts:\n- {name: a, model: x}\n- {name: physics, model: y}\n")
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)


def test_an_error_is_one_line_of_the_process(tmp_path):
    assert "none: expected a composite folder" in one_line(expertoken("chat", "none", cwd=tmp_path))


def test_the_whole_path_from_the_command_line(tmp_path, base_folder):
    """The verbs prepare, train, evaluate, expert add/list/remove and chat each run in their own process."""
    rows = ["query,benchmark,math,law,meta"]
    for i in range(90):
        text = (f"Compute {i} plus 3.", f"What is the law in case {i}?", f"Tell me something {i}.")[i % 3]
        rows.append(f"{text},{'abc'[i % 3]},{int(i % 3 == 0)},{int(i % 3 == 1)},{int(i % 3 == 2)}")
    (tmp_path / "results.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "new.csv").write_text("query,sql\n" + "".join(f"Write SQL query {i} please,1\n" for i in range(30)))
    (tmp_path / "pool.yaml").write_text(
        f"experts:\n- {{name: math, model: {base_folder}}}\n- {{name: law, model: {base_folder}}}\n"
        "- {name: self, backend: self, results: meta}\n"
    )
    environment = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "cwd": tmp_path}

    def done(*arguments, **more):
        result = expertoken(*arguments, **environment, **more)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "train 66, validation 6, test 18" in done("prepare", "results.csv", "--pool", "pool.yaml", "--out", "s")
    done("train", "tokens", "--meta", base_folder, "--data", "s", "--out", "c")
    assert list((tmp_path / "c" / "runs").glob("events*"))
    assert "composite" in done("evaluate", "c", "--data", "s", "--baselines", "names")
    rows_before = (tmp_path / "c" / "expert_tokens.safetensors").read_bytes()
    added = done("expert", "add", "c", "--name", "sql", "--model", base_folder, "--results", "new.csv", "--no-verify")
    assert "routes changed:" in added
    listed = CliRunner().invoke(app, ["expert", "list", str(tmp_path / "c")])
    assert "sql" in listed.output
    assert (tmp_path / "c" / "report" / "report.json").exists()
    done("expert", "remove", "c", "--name", "sql", "--no-verify")
    assert (tmp_path / "c" / "expert_tokens.safetensors").read_bytes() == rows_before
    shown = done("chat", "c", "--max-new-tokens", "4", input="Compute 5 plus 3.\n/why\n")
    assert "answered by math" in shown


@pytest.mark.parametrize("out", ["results", "results/../results"])
def test_prepare_does_not_write_into_the_folder_of_the_results(tmp_path, monkeypatch, out):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "t.csv").write_text("query,a,b\nWho?,1,0\nWhat?,0,1\n")
    monkeypatch.chdir(tmp_path)
    for given in ("results", "results/t.csv"):
        assert "the results are there. Choose a folder of its own" in refused("prepare", given, "--out", out)
    assert [file.name for file in folder.iterdir()] == ["t.csv"]
