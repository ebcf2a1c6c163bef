import json

import pytest
import torch

from expertoken.modeling.experts import Expert
from expertoken.tests import fresh
from expertoken.tests.inference.conftest import composite_of

lm_eval = pytest.importorskip("lm_eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: question
metadata: {{version: 1.0}}
"""
GENERATED = """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ["2"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": q, "answer": "one0 one1 one", "choices": [" yes", " no"]} for q in ("hello", "hello there")]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, kind in (("say", GENERATED), ("choose", CHOICE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    return folder


def test_the_harness_generates_with_the_expert_that_the_meta_llm_chooses(base_folder, words, tasks, tmp_path):
    """The command runs as for a user, and the experts' endpoint is a separate process."""
    composite_of(base_folder, [*words, Expert("self", "self")]).save_pretrained(tmp_path / "c", verify=False)
    done = fresh.expertoken("lm-eval", "run", "--model", "expertoken", "--model_args", f"pretrained={tmp_path / 'c'}",
                            "--device", "cpu", "--tasks", "say", "--include_path", tasks,
                            "--output_path", tmp_path / "out", "--apply_chat_template")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["say"]["exact_match,none"] == 1.0


def test_log_likelihoods_are_those_of_the_chosen_local_model(base_folder, tasks):
    from lm_eval.api.instance import Instance

    from expertoken.inference.lm_eval_model import CompositeLM

    model = CompositeLM.__new__(CompositeLM)
    model.composite = composite_of(base_folder, [Expert("local", model=str(base_folder))])
    [(found, greedy)] = model.loglikelihood([Instance("loglikelihood", {}, ("hello", " there"), 0)], disable_tqdm=True)
    meta = model.composite.meta
    ids, wanted = list(meta.encode("hello")), meta.tokenizer("there", add_special_tokens=False).input_ids
    logits = meta.plain(torch.tensor([ids + wanted])).logits[0].log_softmax(-1)
    expected = sum(float(logits[len(ids) - 1 + place, token]) for place, token in enumerate(wanted))
    assert found == pytest.approx(expected, abs=1e-4)
    assert greedy == all(int(logits[len(ids) - 1 + p].argmax()) == t for p, t in enumerate(wanted))
