"""A backend of another package, in one file: everything works with it by its name, as with our own kinds."""

import datetime
import json
import os
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from expertoken.inference.batch import answer_all
from expertoken.modeling import experts as module
from expertoken.modeling.backend import Backend, Generation, Piece
from expertoken.modeling.errors import ExpertokenError, NoAnswerError, PoolError
from expertoken.modeling.experts import Expert, ExpertKind, Weights, kind_of, recognised
from expertoken.modeling.policy import Policy
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.source import Source
from expertoken.tests import fresh
from expertoken.tests.inference.conftest import composite_of

BACKEND = '''
"""An expert that answers with its motto and the last word it was asked."""

from expertoken.modeling.backend import Backend, Piece
from expertoken.modeling.chat import text_of
from expertoken.modeling.experts import ExpertKind


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


class Mirror(Backend):
    """In this process: answers many at once, and only so."""

    async def stream(self, messages, generation, *, begun=""):
        raise AssertionError("asked one by one")
        yield

    def complete(self, conversations, generation, *, held=None, batch_size=32):
        return [Piece(text_of(c[-1])[::-1], finish="stop", usage=(1, 1)) for c in conversations]

    def log_likelihood(self, messages, continuation):
        return -float(len(continuation)), True


MIRROR = ExpertKind("mirror", lambda expert, opening: Mirror(), batches=True, scores_texts=True)
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
    """Run `expertoken` with the foreign package installed."""
    site = tmp_path / "site"
    info = site / "parrots-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "parrots.py").write_text(BACKEND)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrots\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[expertoken.backends]\nparrot = parrots:KIND\nmirror = parrots:MIRROR\n")
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PARROT_KEY": "very-secret", "OMP_NUM_THREADS": "1"}
    (tmp_path / "pool.yaml").write_text(POOL.replace("BASE", str(base_folder)))

    def expertoken(*arguments, **options):
        done = fresh.expertoken(*arguments, cwd=tmp_path, env=environment, **options)
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
    done = run("expert", "remove", "c", "--name", "law", "--no-verify")
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


@pytest.mark.slow
def test_one_in_this_process_answers_in_batches_and_scores_texts(run, tmp_path, base_folder):
    from expertoken.tests.data_prep.test_collect import CHOSEN

    pool = f"experts:\n- {{name: glass, backend: mirror, model: m}}\n- {{name: law, model: {base_folder}}}\n"
    (tmp_path / "pool.yaml").write_text(pool)
    rows = "".join(f"say {i},{i % 2},{1 - i % 2}\n" for i in range(60))
    (tmp_path / "results.csv").write_text("query,glass,law\n" + rows)
    for arguments in (
        ("prepare", "results.csv", "--pool", "pool.yaml", "--out", "s"),
        ("train", "tokens", "--meta", base_folder, "--data", "s", "--out", "c", "--report_to", "none", "--no_verify"),
    ):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"query": f"say {i}"}) + "\n" for i in range(60)))
    done = run("generate", "c", "in.jsonl", "--out", "out.jsonl", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    ours = [row for row in answers if row["chosen"] == "glass"]
    assert ours
    assert all((row["expert"], row["answer"]) == ("glass", row["query"][::-1]) for row in ours)
    pytest.importorskip("lm_eval")
    choices = [{"stem": f"Which is {i}?", "options": ["no", "yes"], "label": 0} for i in range(3)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    (tmp_path / "choices.yaml").write_text(CHOSEN.replace("FOLDER", str(tmp_path)))
    (tmp_path / "glass.yaml").write_text(pool.rpartition("- {name: law")[0])
    done = run("collect", "glass.yaml", "--tasks", "choices", "--include-path", tmp_path, "--out", "results")
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line)["score"] for line in (tmp_path / "results" / "glass--choices.jsonl").open()]
    assert scores == [1.0] * 3  # the shorter option is likelier


def test_a_package_that_is_broken_stops_only_who_asks_for_it(run, tmp_path):
    (tmp_path / "site" / "parrots.py").write_text("import no_such_module_here\n")
    assert run("--help").returncode == 0
    assert "parrot" in run("expert", "add", "--help").stdout
    (tmp_path / "results.csv").write_text("query,a,b\none,1,0\ntwo,0,1\n")
    (tmp_path / "ours.yaml").write_text("experts:\n- {name: a, model: x}\n- {name: b, model: y}\n")
    (tmp_path / "theirs.yaml").write_text("experts:\n- {name: a, backend: parrot, model: x}\n")
    assert run("prepare", "results.csv", "--pool", "ours.yaml", "--out", "s", "--test", "0").returncode == 0
    (tmp_path / "mixed.yaml").write_text("experts:\n- {name: a, model: x, base_url: 'http://127.0.0.1:9/v1'}\n")
    told = run("prepare", "results.csv", "--pool", "mixed.yaml", "--out", "t").stderr
    assert "experts[0].base_url: only for backend 'openai'" in told
    told = run("prepare", "results.csv", "--pool", "theirs.yaml", "--out", "t").stderr
    assert "error: backend 'parrot': parrots:KIND can't be imported (No module named 'no_such_module_here')" in told
    assert "Traceback" not in told


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
    name, value = "mine", "a_package:KIND"
    kind: object = None

    @classmethod
    def load(cls):
        return cls.kind


@pytest.fixture
def entry(monkeypatch):
    def forget():
        module._others.cache_clear()
        module._load.cache_clear()

    monkeypatch.setattr(module, "entry_points", lambda group: [Entry] if group == "expertoken.backends" else [])
    forget()
    yield Entry
    forget()


def test_an_entry_point_that_is_no_kind_or_another_is_refused_and_ours_can_not_be_replaced(entry):
    entry.kind = "a text"
    with pytest.raises(
        ExpertokenError, match="'mine': expected a_package:KIND to be an ExpertKind of that name, got str"
    ):
        kind_of("mine")
    entry.kind = ExpertKind("other", lambda expert, opening: None)
    with pytest.raises(ExpertokenError, match="got an ExpertKind named 'other'"):
        kind_of("mine")
    entry.name = "adapter"
    try:
        assert kind_of("adapter").weights is not None
        assert kind_of("adapter") is not entry.kind
    finally:
        entry.name = "mine"


def test_a_key_is_refused_whatever_the_kind_calls_its_fields(entry):
    entry.kind = ExpertKind("mine", lambda expert, opening: None, fields=("model", "token"))
    with pytest.raises(PoolError, match=r"experts\[0\].token: a key itself is refused") as error:
        ExpertPool.parse({"experts": [{"name": "a", "backend": "mine", "model": "m", "token": "sk-secret"}]})
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"api_key_env": "sk-secret"}, r"api_key_env: expected the NAME of an environment variable"),
        ({"api_key_env": ["sk-secret"]}, r"api_key_env: expected the NAME of an environment variable"),
        ({"base_url": "http://user:sk-secret@host/v1"}, r"base_url: expected http\(s\)://host"),
        ({"mode": {"inner": [{"api_key": "sk-secret"}]}}, r"mode.inner.0.api_key: a key itself is refused"),
    ],
)
def test_no_kinds_entry_holds_a_secret(entry, given, message):
    names = ("model", "base_url", "api_key_env", "mode")
    entry.kind = ExpertKind("mine", lambda expert, opening: None, fields=names)
    with pytest.raises(PoolError, match=message) as error:
        ExpertPool.parse({"experts": [{"name": "a", "backend": "mine", "model": "m", **given}]})
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"file": 3}, r"experts\[0\].file: expected text, got 3"),
        ({"mode": {1: "x"}}, r"experts\[0\].mode: expected text, numbers, lists or mappings with texts as keys"),
        ({"mode": datetime.date(2024, 1, 1)}, r"experts\[0\].mode: expected text, numbers"),
        ({"mode": "odd"}, r"experts\[0\]: backend 'mine' can't check the entry \(KeyError: 'nothing'\)"),
    ],
)
def test_values_that_a_kind_can_not_take_are_mistakes_of_the_entry(entry, tmp_path, given, message):
    def check(entry, place):
        return [entry["nothing"]] if entry.get("mode") == "odd" else []

    fields = ("model", "file", "mode")
    entry.kind = ExpertKind("mine", lambda expert, opening: None, fields=fields, paths=("file",), check=check)
    with pytest.raises(PoolError, match=message):
        ExpertPool.parse({"experts": [{"name": "a", "backend": "mine", "model": "m", **given}]}, folder=tmp_path)


def test_a_kind_that_can_not_be_imported_or_fails_is_passed_over_by_who_does_not_name_it(entry):
    entry.kind = "a text"
    assert recognised({"model": "owner/name"}) == "transformers"

    def fails(entry):
        raise KeyError("nothing")

    entry.kind = ExpertKind("mine", lambda expert, opening: None, recognises=fails)
    module._load.cache_clear()
    assert recognised({"model": "owner/name"}) == "transformers"


ONLY = Policy(allow=("a",))


class Wrong(Backend):
    def __init__(self, answers):
        self.answers = answers

    async def stream(self, messages, generation, *, begun=""):
        if self.answers == "exit":
            raise SystemExit(3)
        yield Piece("one ST")
        yield Piece("OP two", finish="stop", usage=(None, 1))

    def complete(self, conversations, generation, *, held=None, batch_size=32):
        return self.answers


@pytest.fixture
def wrong(entry, base_folder):
    """Make a composite whose only expert is of a kind that returns `answers`."""

    def made(answers):
        entry.kind = ExpertKind("mine", lambda expert, opening: Wrong(answers), batches=True)
        module._load.cache_clear()
        return composite_of(base_folder, [Expert("a", "mine", "m", cost={"input": 1, "output": 1})])

    return made


@pytest.mark.parametrize("answers", [[], None, ["a text"], [Piece("x"), Piece("y")]])
def test_a_batch_that_is_no_list_of_answers_is_asked_one_by_one(wrong, answers):
    [told] = answer_all(wrong(answers), [[{"role": "user", "content": "hi"}]], Generation(4), policy=ONLY)
    assert (told["expert"], told["answer"]) == ("a", "one STOP two")


def test_a_count_that_is_none_loses_no_answer_and_an_exit_ends_nothing(wrong):
    reply = wrong([]).chat("hi", policy=ONLY, stop="STOP")
    assert (reply.text, reply.expert) == ("one ", "a")
    with pytest.raises(NoAnswerError, match="raised SystemExit"):
        wrong("exit").chat("hi", policy=ONLY)


def test_collected_answers_end_at_stop_texts_and_ask_the_backend_although_it_has_weights(entry, base_folder):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from expertoken.data_prep.harness_models import BackendLM, language_model

    weights = lambda expert, base: Weights(Source(str(base_folder)))  # noqa: E731 - an ExpertKind takes such a function
    entry.kind = ExpertKind("mine", lambda expert, opening: Wrong([]), weights=weights)
    lm = language_model(Expert("a", "mine", "m"), None)
    assert isinstance(lm, BackendLM)
    until = {"until": ["1", "2", "3", "4", "STOP"]}
    request = Instance("generate_until", {}, ("hi", until), 0)
    assert lm.generate_until([request], disable_tqdm=True) == ["one "]


def test_experts_are_hashed_whatever_their_kind_knows():
    one = Expert("a", model="m", options={"x": [1]}, cost={"input": 1.0, "output": 2.0})
    assert len({one, Expert.from_entry(one.entry())}) == 1


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


def test_an_adapter_behind_an_address_is_an_endpoint(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    local = {"model": str(tmp_path)}
    assert recognised(local) == "adapter"
    assert recognised(local | {"base_url": "http://127.0.0.1:9/v1"}) == "openai"
    assert recognised({"model": "owner/name"}) == "transformers"
