import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from expertoken.modeling.experts import Expert
from expertoken.modeling.model_card import BROKEN, add_scores, copy_scores, model_card
from expertoken.modeling.pool import ExpertPool

POOL = ExpertPool([Expert("math", model="org/math-7b", description="sums | products"), Expert("self", "self")])


def card(model="org/base", data=None, **options):
    data = {"sizes": {"train": 2}} if data is None else data
    text = model_card(POOL, str(model), {"method": "tokens"}, data, {"torch": "2"}, **options)
    return ModelCard(text)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "composite").mkdir()
    card().save(tmp_path / "composite" / "README.md")
    return tmp_path / "composite"


def test_the_hub_reads_what_a_composite_is():
    data = card(data={"datasets": ["org/results"]}).data
    assert data.base_model == "org/base"
    assert data.library_name == "expertoken"
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["org/results"]


def test_a_composite_that_sees_is_found_among_such_models():
    assert card(sees=True).data.pipeline_tag == "image-text-to-text"


def test_the_licence_is_that_of_the_base_models_own_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert card(tmp_path).data.license == "apache-2.0"


def test_a_licence_of_its_own_keeps_its_name_and_link(tmp_path):
    terms = {"license": "other", "license_name": "qwen-research", "license_link": "https://example.org/LICENSE"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(terms)}---\n")
    data = card(tmp_path).data
    assert (data.license, data.license_name, data.license_link) == tuple(terms.values())


def test_a_link_to_a_file_beside_the_licence_is_no_link_from_here(tmp_path):
    terms = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(terms)}---\n")
    assert card(tmp_path).data.license_link is None


def test_a_card_names_no_folder_even_of_experts_that_are_elsewhere():
    pool = ExpertPool([Expert("far", model="/home/someone/models/math-7b")])
    text = model_card(pool, "org/base", {}, {}, {})
    assert "`math-7b`" in text
    assert "/home" not in text


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "", "no metadata"])
def test_a_broken_card_of_the_base_costs_nothing(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert card(tmp_path).data.license == "other"


def test_a_base_that_is_a_folder_is_no_id_of_the_hub(tmp_path):
    assert card(tmp_path).data.base_model is None


def test_a_licence_that_nobody_states_is_not_invented():
    data = card().data
    assert data.license == "other"
    assert data.license_name
    assert "licences of the base model and of each expert" in card().text


def test_a_card_names_no_folder_of_the_machine_that_wrote_it(tmp_path):
    text = str(card(tmp_path / "base", data={"path": str(tmp_path)}))
    (tmp_path / "base").mkdir()
    text = str(card(tmp_path / "base", data={"path": str(tmp_path)}))
    assert str(tmp_path) not in text


def test_scores_of_an_evaluation_are_its_model_index(folder):
    before = ModelCard.load(folder / "README.md").text
    add_scores(folder, {np.str_("gsm8k"): np.float64(0.81234), "law": 0.5}, "test")
    found = ModelCard.load(folder / "README.md")
    assert [(r.dataset_name, r.dataset_split, r.metric_value) for r in found.data.eval_results] == [
        ("gsm8k", "test", 0.8123),
        ("law", "test", 0.5),
    ]
    assert found.data.model_name == "composite"
    assert found.text.strip() == before.strip()


def test_a_second_evaluation_replaces_the_scores_of_the_first(folder):
    add_scores(folder, {"gsm8k": 0.8}, "test")
    add_scores(folder, {"law": 0.5}, "test")
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    [model] = metadata["model-index"]
    assert [result["dataset"]["name"] for result in model["results"]] == ["law"]


def test_a_folder_without_a_card_gets_none(tmp_path):
    add_scores(tmp_path, {"gsm8k": 0.8}, "test")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["---\non: push\n---\nx", "---\na: [\n---\n", "---\n- a\n---\n"])
def test_a_card_that_was_broken_by_hand_costs_the_scores_alone(folder, tmp_path, caplog, text):
    (folder / "README.md").write_text(text)
    (tmp_path / "copy").mkdir()
    copy_scores(folder, tmp_path / "copy")
    with pytest.raises(BROKEN):
        add_scores(folder, {"gsm8k": 0.8}, "test")
    assert "are not copied" in caplog.text


@pytest.mark.parametrize("model", ["a/b--c", "a/b@main", "./gone"])
def test_a_base_that_is_no_id_of_the_hub_has_no_terms(model):
    assert card(model).data.license == "other"


def test_scores_go_along_with_a_copy(folder, tmp_path):
    (tmp_path / "copy").mkdir()
    card().save(tmp_path / "copy" / "README.md")
    add_scores(folder, {"gsm8k": 0.8}, "test")
    copy_scores(folder, tmp_path / "copy")
    [result] = ModelCard.load(tmp_path / "copy" / "README.md").data.eval_results
    assert result.metric_value == 0.8
