"""A backend of another package, in one file, is a kind of expert like ours: everything works with it by its name."""

import json
import os
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from expertoken.modeling import kinds as module
from expertoken.modeling.errors import ExpertokenError, PoolError
from expertoken.modeling.experts import Expert, ExpertPool
from expertoken.modeling.kinds import ExpertKind, kinds

BACKEND = '''
"""An expert that answers with its motto and the last word it was asked."""

from expertoken.modeling.backend import Backend, Piece
from expertoken.modeling.chat import text_of
from expertoken.modeling.kinds import ExpertKind


class Parrot(Backend):
    def __init__(self, expert):
        self.expert, self.key = expert, expert.api_key()

    async def stream(self, messages, generation, *, begun=""):
        words = text_of(messages[-1]).split()
        yield Piece(self.expert.options["motto"])
        yield Piece(f" {words[-1]}", finish="stop", usage=(len(words), 2))


def key(expert):
    return "PARROT_KEY"


def check(entry, place):
    return [] if entry.get("motto") else [f"{place}.motto: expected what the parrot says"]


KIND = ExpertKind(
    "parrot",
    lambda expert, opening: Parrot(expert),
    fields=("model", "motto"),
    remote=True,
    priced=True,
    key=key,
    check=check,
)
'''
POOL = """
experts:
- {name: bird, backend: parrot, model: grey, motto: ahoy, cost: {input: 1, output: 2}, description: repeats}
- {name: law, model: BASE}
- {name: self, backend: self, results: meta}
"""


@pytest.fixture
def run(tmp_path, base_folder):
    """Run `expertoken` with the foreign package installed beside it."""
    site = tmp_path / "site"
    info = site / "parrots-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "parrots.py").write_text(BACKEND)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrots\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[expertoken.backends]\nparrot = parrots:KIND\n")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PARROT_KEY": "very-secret", "OMP_NUM_THREADS": "1"}
    (tmp_path / "pool.yaml").write_text(POOL.replace("BASE", str(base_folder)))

    def expertoken(*arguments, **options):
        command = [str(Path(sys.executable).parent / "expertoken"), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, **options
        )
        assert "very-secret" not in done.stdout + done.stderr
        return done

    expertoken.environment = environment
    return expertoken


@pytest.fixture
def composite(run, tmp_path, base_folder):
    rows = ["query,benchmark,bird,law,meta"]
    for i in range(90):
        text = (f"Compute {i} plus 3.", f"What is the law in case {i}?", f"Tell me something {i}.")[i % 3]
        rows.append(f"{text},{'abc'[i % 3]},{int(i % 3 == 0)},{int(i % 3 == 1)},{int(i % 3 == 2)}")
    (tmp_path / "results.csv").write_text("\n".join(rows) + "\n")
    done = run("prepare", "results.csv", "--pool", "pool.yaml", "--out", "s")
    assert done.returncode == 0, done.stderr
    done = run("train", "tokens", "--meta", base_folder, "--data", "s", "--out", "c", "--report_to", "none")
    assert done.returncode == 0, done.stderr
    return tmp_path / "c"


@pytest.mark.slow
def test_pools_chat_generate_serve_and_export_work_with_it(run, composite, tmp_path):
    assert "motto: ahoy" in (composite / "experts.yaml").read_text()
    assert "parrot" in run("expert", "list", "c").stdout
    shown = run("chat", "c", "--max-new-tokens", "4", input="Compute 5 plus 3.\n/why\n").stdout
    assert "ahoy 3." in shown
    assert "answered by bird" in shown
    (tmp_path / "in.jsonl").write_text('{"query": "Compute 8 plus 3."}\n')
    done = run("generate", "c", "in.jsonl", "--out", "out.jsonl", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (row["expert"], row["answer"]) == ("bird", "ahoy 3.")
    assert row["cost"] == pytest.approx((4 * 1 + 2 * 2) / 1e6)
    done = run("export", "c", "--out", "checkpoint")
    assert done.returncode == 0, done.stderr
    assert "motto: ahoy" in (tmp_path / "checkpoint" / "gateway.example.yaml").read_text()
    done = run("expert", "remove", "c", "--name", "law")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_it_is_served(run, composite, tmp_path):
    command = [str(Path(sys.executable).parent / "expertoken"), "serve", "c", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, cwd=tmp_path, env=run.environment, stderr=subprocess.PIPE, text=True)
    try:
        address = next(line for line in server.stderr if "running on" in line).split("running on ")[1].split()[0]
        body = {"model": "c", "messages": [{"role": "user", "content": "Compute 6 plus 3."}]}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert answer["choices"][0]["message"]["content"] == "ahoy 3."
        time.sleep(0.1)
        metrics = urllib.request.urlopen(f"{address}/metrics", timeout=60).read().decode()
        assert 'expertoken_answers_total{expert="bird"} 1.0' in metrics
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.mark.slow
def test_its_results_are_collected(run, tmp_path, base_folder):
    pytest.importorskip("lm_eval")
    from expertoken.tests.data_prep.test_collect import GENERATED

    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"question": f"say {word}", "answer": f"ahoy {word}"}) + "\n" for word in ("yes", "no"))
    )
    (tmp_path / "sums.yaml").write_text(GENERATED.replace("FOLDER", str(tmp_path)))
    (tmp_path / "birds.yaml").write_text(
        textwrap.dedent("""
        experts:
        - {name: bird, backend: parrot, model: grey, motto: ahoy, cost: {input: 1, output: 2}}
        """)
    )
    done = run("collect", "birds.yaml", "--tasks", "sums", "--include-path", tmp_path, "--out", "results")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results" / "bird--sums.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [1.0, 1.0]
    assert rows[0]["cost"] == pytest.approx((2 * 1 + 2 * 2) / 1e6)


def test_its_fields_are_checked_like_ours(run):
    done = run("prepare", "none.csv", "--pool", "wrong.yaml", "--out", "s")
    assert done.returncode == 1
    (Path(run.environment["PYTHONPATH"].split(os.pathsep)[0]).parent / "wrong.yaml").write_text(
        "experts:\n- {name: bird, backend: parrot, model: grey, mottto: ahoy}\n- {name: x, model: m, motto: ahoy}\n"
    )
    told = run("prepare", "none.csv", "--pool", "wrong.yaml", "--out", "s").stderr
    assert "experts[0].mottto: unknown key, did you mean 'motto'?" in told
    assert "experts[0].motto: expected what the parrot says" in told
    assert "experts[1].motto: unknown key" in told


class Entry:
    name = "mine"
    kind: object = None

    @classmethod
    def load(cls):
        return cls.kind


@pytest.fixture
def entry(monkeypatch):
    monkeypatch.setattr(module, "entry_points", lambda group: [Entry] if group == "expertoken.backends" else [])
    kinds.cache_clear()
    yield Entry
    kinds.cache_clear()


def test_an_entry_point_that_is_no_kind_or_takes_a_name_of_ours_is_refused(entry):
    entry.kind = "a text"
    with pytest.raises(ExpertokenError, match="'mine' of expertoken.backends: expected an ExpertKind, got str"):
        kinds()
    entry.kind = ExpertKind("transformers", lambda expert, opening: None)
    with pytest.raises(ExpertokenError, match="the kind 'transformers' exists already"):
        kinds()


def test_a_key_is_refused_whatever_the_kind_calls_its_fields(entry):
    entry.kind = ExpertKind("mine", lambda expert, opening: None, fields=("model", "token"))
    with pytest.raises(PoolError, match=r"experts\[0\].token: a key itself is refused") as error:
        ExpertPool.parse({"experts": [{"name": "a", "backend": "mine", "model": "m", "token": "sk-secret"}]})
    assert "sk-secret" not in str(error.value)


def test_fields_that_only_the_kind_knows_survive_the_pools_file(entry, tmp_path):
    entry.kind = ExpertKind("mine", lambda expert, opening: None, fields=("model", "region", "file"), paths=("file",))
    (tmp_path / "weights").write_text("")
    document = {"name": "a", "backend": "mine", "model": "m", "region": {"name": "eu"}, "file": "weights"}
    pool = ExpertPool.parse({"experts": [document]}, folder=tmp_path)
    assert pool["a"].options == {"region": {"name": "eu"}, "file": str(tmp_path / "weights")}
    pool.to_yaml(tmp_path / "pool.yaml")
    assert "file: weights" in (tmp_path / "pool.yaml").read_text()
    assert ExpertPool.from_yaml(tmp_path / "pool.yaml").candidates == pool.candidates
    assert Expert.from_entry(pool["a"].entry()) == pool["a"]
