"""Training at a lower layer, with a given state and with `auto`."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import build_supervision
from expertoken.evaluation.evaluate import evaluate
from expertoken.modeling.composite import load_composite
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.state import StateSpec
from expertoken.train.plugin import add_expert
from expertoken.train.run import cheapest_of_the_best, train_composite

pytestmark = pytest.mark.usefixtures("checked_at_once")


@pytest.fixture
def supervision(results, pool):
    return build_supervision(results, pool)


def kinds_right(folder):
    """Return the share of unseen questions for which the right candidate of the tiny results is chosen."""
    composite = load_composite(folder, device="cpu")
    kinds = ("Compute {} plus 3.", "What is the law in case {}?", "Tell me something, take {}.")
    asked = [(kind, text.format(number)) for number in range(900, 920) for kind, text in enumerate(kinds)]
    logits = composite.meta.candidate_logits([composite.meta.encode(text) for _, text in asked])
    return float((logits.argmax(-1) == torch.tensor([kind for kind, _ in asked])).float().mean())


@pytest.mark.parametrize("state", ["1:last", "1:mean", "1:both", "2:mean"])
def test_tokens_are_learnt_at_the_state_that_is_named(tmp_path, base_folder, supervision, state):
    folder = train_composite(str(base_folder), supervision, tmp_path / "c", state=state)
    assert json.loads((folder / "expertoken.json").read_text())["decision"]["state"] == state
    assert kinds_right(folder) > 0.95
    assert evaluate(folder, baselines=[], resamples=50).results


def test_auto_takes_the_cheapest_of_those_that_tie_and_tells_all(tmp_path, base_folder, supervision):
    folder = train_composite(str(base_folder), supervision, tmp_path / "c", state="auto")
    manifest = json.loads((folder / "expertoken.json").read_text())
    told = {entry["state"]: entry["validation_loss"] for entry in manifest["training"]["states"]}
    assert list(told) == ["1:last", "1:mean", "1:both", "head", "2:mean", "2:both"]
    assert told[manifest["decision"]["state"]] < 2 * min(told.values()) + 0.05
    assert kinds_right(folder) > 0.95


def test_of_candidates_that_tie_the_cheapest_is_taken():
    losses = np.array([[5, 5, 5, 5, 5], [1.0, 2, 3, 2, 1], [1.1, 1.9, 3.1, 1.8, 1.0], [1.0, 1.5, 2.5, 1.5, 0.9]])
    assert cheapest_of_the_best(losses) == 3
    losses[1] = losses[3] + [0.1, -0.1, 0.1, -0.1, 0.05]
    assert cheapest_of_the_best(losses) == 1


def test_subjects_that_carry_over_are_worth_more(tmp_path, base_folder, pool):
    """If queries have subjects, folds of whole subjects are held out too."""
    rows, scores = [], []
    for index in range(120):
        kind, subject = index % 2, f"s{index % 12}"
        rows.append((f"q{index}", (f"Compute {index}.", f"Law case {index}?")[kind], "all", subject, None))
        scores.append([float(kind == column) for column in range(3)])
    frame = pd.DataFrame(rows, columns=["id", "prompt", "benchmark", "subject", "split"])
    supervision = build_supervision(BenchmarkResults(frame, ["math", "law", "meta"], np.array(scores)), pool)
    assert supervision.subjects("train")[0].startswith("all/s")
    train_composite(str(base_folder), supervision, tmp_path / "c", state="auto", verify=False)


def test_lora_adapts_the_layers_that_are_computed(tmp_path, base_folder, supervision):
    steps = {"max_steps": 4, "save_steps": 4, "save_strategy": "steps", "learning_rate": 1e-2}
    folder = train_composite(str(base_folder), supervision, tmp_path / "c", method="lora", state="1:both", **steps)
    names = load_file(folder / "adapter_model.safetensors")
    assert any("layers.0." in name for name in names)
    assert not any("layers.1." in name for name in names)
    assert load_composite(folder, device="cpu").meta.state == StateSpec(1, "both")
    assert kinds_right(folder) > 0.8


def test_an_expert_is_plugged_in_at_the_composites_state(tmp_path, base_folder, supervision):
    folder = train_composite(str(base_folder), supervision, tmp_path / "c", state="1:both", verify=False)
    before = load_composite(folder, device="cpu").meta.rows
    prompts = [f"Write an SQL query for the table t{i}." for i in range(40)]
    frame = pd.DataFrame({"id": prompts, "prompt": prompts, "benchmark": "sql", "subject": None, "split": None})
    results = BenchmarkResults(frame, ["sql"], [[1.0]] * 40)
    add_expert(folder, Expert("sql", model=str(base_folder)), results, verify=False)
    composite = load_composite(folder, device="cpu")
    assert torch.equal(composite.meta.rows[[0, 1, 3]], before)
    logits = composite.meta.candidate_logits([composite.meta.encode("Write an SQL query for the table t99.")])
    assert composite.pool.names[int(logits.argmax())] == "sql"


def test_what_cannot_be_is_told_before_a_model_is_loaded(tmp_path, supervision):
    with pytest.raises(ExpertokenError, match="state: expected head, or LAYER:POOLING such as 8:mean .*, got 'deep'"):
        train_composite("nowhere", supervision, tmp_path / "c", state="deep")
    with pytest.raises(ExpertokenError, match=r"--state 1:last: positions inside an answer .* expected head"):
        train_composite("nowhere", supervision, tmp_path / "c", state="1:last", anywhere=2)
