"""`expertoken collect` with the real harness, tasks from a local folder and tiny local models, without a hub."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from expertoken.data_prep.collect import Evaluation, collect
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.supervision import select_candidates
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.pool import ExpertPool

pytest.importorskip("lm_eval")

GENERATED = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{stem}}\\nAnswer:"
doc_to_choice: options
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def task_folder(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    sums = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    choices = [{"stem": f"Which is {i}?", "options": ["no", "yes"], "label": i % 2} for i in range(4)]
    for name, rows, text in (("sums", sums, GENERATED), ("choices", choices, CHOSEN)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


WINOGRANDE = """
task: pronouns
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pronouns.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: !function wino.doc_to_text
doc_to_choice: !function wino.doc_to_choice
doc_to_target: !function wino.doc_to_target
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WINOGRANDE_CODE = """
def doc_to_text(doc):
    return {"1": 0, "2": 1}[doc["answer"]]

def doc_to_choice(doc):
    place = doc["sentence"].index("_")
    return [doc["sentence"][:place] + doc[key] for key in ("option1", "option2")]

def doc_to_target(doc):
    return doc["sentence"][doc["sentence"].index("_") + 1:].strip()
"""
PASSAGE = """
task: passages
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/passages.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Read.\\n\\n{{passage}}\\nQuestion: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: METRIC, aggregation: mean, higher_is_better: true}]
"""


def write_task(folder, name, text, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)).replace("METRIC", "exact_match"))


@pytest.fixture
def adapter(base_folder, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder), LoraConfig(r=2, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def endpoint(monkeypatch):
    """Run a chat endpoint that adds numbers."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append((self.path, self.headers["authorization"], body))
            number = int(body["messages"][-1]["content"].split()[2])
            choice = {"index": 0, "delta": {"role": "assistant", "content": str(number + 1)}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 100 + number, "completion_tokens": 10}
            chunks = [{"choices": [choice]}, {"choices": [], "usage": usage}]
            answer = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            answer = answer.encode()
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ADDER_KEY", "very-secret")
    url = f"http://127.0.0.1:{server.server_port}/v1"
    cost = {"input": 1000.0, "output": 5000.0}
    yield Expert("adder", "openai", "some/adder", base_url=url, api_key_env="ADDER_KEY", cost=cost), seen
    server.shutdown()


def test_every_kind_of_expert_is_run_and_prepare_reads_what_comes_out(
    base_folder, adapter, endpoint, task_folder, tmp_path
):
    remote, seen = endpoint
    pool = ExpertPool(
        [
            Expert("local", model=str(base_folder)),
            Expert("lora", "adapter", str(adapter), cost={"input": 1e4, "output": 0}),
            remote,
            Expert("self", "self"),
        ]
    )
    evaluation = Evaluation(str(task_folder), meta=str(base_folder), batch_size=2)
    files = collect(pool, ["sums"], tmp_path / "out", evaluation)
    assert [file.name for file in files] == [f"{name}--sums.jsonl" for name in pool.names]
    results = select_candidates(read_results(tmp_path / "out"), pool)
    assert results.queries["prompt"].tolist() == [f"What is {i} + 1?" for i in range(4)]
    assert set(results.queries["benchmark"]) == {"sums"}
    assert results.scores[:, 2].tolist() == [1, 1, 1, 1]
    assert results.scores[:, 0].tolist() == results.scores[:, 3].tolist()
    # The endpoint's cost is the usage it reports at the pool's price. A local expert's tokens are counted here.
    # Without a price there is no cost.
    assert results.costs[:, 2] == pytest.approx([(1000 * (100 + i) + 50000) / 1e6 for i in range(4)])
    assert (results.costs[:, 1] >= 5 * 1e4 / 1e6).all()
    assert np.isnan(results.costs[:, [0, 3]]).all()
    assert {(path, key) for path, key, _ in seen} == {("/v1/chat/completions", "Bearer very-secret")}
    assert {body["model"] for *_, body in seen} == {"some/adder"}
    for file in (tmp_path / "out").iterdir():
        assert "very-secret" not in file.read_text()


def test_pairs_that_are_done_are_not_run_again_and_other_settings_are_refused(base_folder, task_folder, tmp_path):
    pool = ExpertPool([Expert("one", model=str(base_folder))])
    evaluation = Evaluation(str(task_folder), limit=2)
    [first] = collect(pool, ["choices"], tmp_path / "out", evaluation)
    stamp = first.stat().st_mtime_ns
    collect(pool, ["choices", "sums"], tmp_path / "out", evaluation)
    assert first.stat().st_mtime_ns == stamp
    results = read_results(tmp_path / "out")
    # A document without a question field is identified by the task's text, without a chat template.
    assert "Question: Which is 0?\nAnswer:" in results.queries["prompt"].tolist()
    assert len(results) == 4
    with pytest.raises(ExpertokenError, match="collected otherwise.*limit 2 then, 3 now.*another --out"):
        collect(pool, ["choices"], tmp_path / "out", Evaluation(str(task_folder), limit=3))
    with pytest.raises(ExpertokenError, match="expert 'one' was another model or had another cost"):
        collect(ExpertPool([Expert("one", model="else")]), ["sums"], tmp_path / "out", evaluation)


def test_the_query_is_what_was_asked_and_never_the_number_of_the_right_answer(base_folder, task_folder, tmp_path):
    (task_folder / "wino.py").write_text(WINOGRANDE_CODE)
    sentence = {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    write_task(task_folder, "pronouns", WINOGRANDE, [sentence])
    passages = [{"passage": f"The {c} house is old.", "question": "Which colour?", "answer": c} for c in ("red", "tan")]
    write_task(task_folder, "passages", PASSAGE, passages)
    pool = ExpertPool([Expert("one", model=str(base_folder))])
    collect(pool, ["pronouns", "passages"], tmp_path / "out", Evaluation(str(task_folder)))
    assert set(read_results(tmp_path / "out").queries["prompt"]) == {
        "Ann thanked Eve because _ had helped.\nAnn\nEve",
        "The red house is old.\nQuestion: Which colour?",
        "The tan house is old.\nQuestion: Which colour?",
    }


def test_a_task_that_asks_something_else_under_the_same_name_is_refused(base_folder, task_folder, tmp_path):
    pool = ExpertPool([Expert("one", model=str(base_folder))])
    collect(pool, ["sums"], tmp_path / "out", Evaluation(str(task_folder)))
    (task_folder / "sums.jsonl").write_text(json.dumps({"question": "What is 7 + 1?", "answer": "8"}) + "\n")
    with pytest.raises(ExpertokenError, match="collected otherwise \\(task 'sums' had other questions\\)"):
        collect(pool, ["sums"], tmp_path / "out", Evaluation(str(task_folder)))
    (tmp_path / "out" / "collect.json").write_text("{")
    with pytest.raises(ExpertokenError, match=r"collect.json: damaged .*Choose another --out"):
        collect(pool, ["sums"], tmp_path / "out", Evaluation(str(task_folder)))


def test_a_task_without_a_score_of_single_samples_is_told_before_any_model_is_loaded(task_folder, tmp_path):
    text = PASSAGE.replace("METRIC", "bleu")
    write_task(task_folder, "passages", text, [{"passage": "It is old.", "question": "What is?", "answer": "it"}])
    with pytest.raises(ExpertokenError, match="task passages: no metric acc_norm or .*Pass --metric with one .*: bleu"):
        collect(ExpertPool([Expert("one", model="./nowhere")]), ["passages"], tmp_path, Evaluation(str(task_folder)))


def test_a_pair_that_fails_does_not_stop_the_others(base_folder, endpoint, task_folder, tmp_path):
    remote, _ = endpoint
    pool = ExpertPool([remote, Expert("gone", model="./nowhere"), Expert("local", model=str(base_folder))])
    with pytest.raises(ExpertokenError, match="2 of 3 pairs failed .*needs log-probabilities"):
        collect(pool, ["choices"], tmp_path / "out", Evaluation(str(task_folder)))
    assert (tmp_path / "out" / "local--choices.jsonl").exists()


@pytest.mark.parametrize(
    ("experts", "tasks", "message"),
    [
        ([Expert("a", model="m")], ["choicez"], "no task 'choicez' in the harness, did you mean 'choices'"),
        ([Expert("a", "adapter", "m")], ["sums"], "expert 'a' runs on the meta LLM. Pass the meta LLM with --meta"),
        ([Expert("a", "openai", "m", api_key_env="UNSET_KEY")], ["sums"], "UNSET_KEY, which is not set"),
    ],
)
def test_mistakes_are_told_before_anything_runs(experts, tasks, message, task_folder, tmp_path):
    with pytest.raises(ExpertokenError, match=message):
        collect(ExpertPool(experts), tasks, tmp_path / "out", Evaluation(str(task_folder)))


def test_the_command_runs_pairs_on_a_local_ray_cluster(base_folder, task_folder, tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "pool.yaml").write_text(
        f"experts:\n- {{name: one, model: {base_folder}}}\n- {{name: self, backend: self}}\n"
    )
    command = [str(Path(sys.executable).parent / "expertoken"), "collect", "pool.yaml", "--tasks", "sums,choices"]
    command += ["--out", "out", "--meta", str(base_folder), "--include-path", str(task_folder), "--engine", "ray"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=550)
    assert done.returncode == 0, done.stderr
    assert "4 results in out" in done.stdout
    on_ray = read_results(tmp_path / "out")
    pool = ExpertPool.from_yaml(tmp_path / "pool.yaml")
    collect(pool, ["sums", "choices"], tmp_path / "local", Evaluation(str(task_folder), meta=str(base_folder)))
    assert on_ray.scores.tolist() == read_results(tmp_path / "local").scores.tolist()
