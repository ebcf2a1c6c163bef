from pathlib import Path

import pytest
import yaml

import expertoken
from expertoken.modeling.experts import ExpertPool
from expertoken.train import entry
from expertoken.train.config import RECIPES, ConfigError, parse_arguments

CONFIGS = Path(expertoken.__file__).parent / "configs"
NEEDED = ["--meta", "m", "--data", "d", "--output_dir", "o"]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_training_recipe_goes_through_the_entry_point(recipe, monkeypatch, tmp_path):
    seen = []
    from expertoken.train import run

    monkeypatch.setattr(run, "train", lambda *parsed: seen.append(parsed))
    entry.main([recipe.stem, "--meta", "m", "--data", "d", "--output_dir", str(tmp_path)])
    [(options, arguments)] = seen
    values = yaml.safe_load(recipe.read_text())
    assert options.method == recipe.stem
    assert not set(values) & {"eval_strategy", "eval_steps"}  # decided by the method
    for key, value in values.items():
        holder = options if hasattr(options, key) else arguments
        found = getattr(holder, key)
        assert found == [value] if isinstance(found, list) else str(getattr(found, "value", found)) == str(value), key
    head = recipe.read_text().splitlines()
    assert head[0].startswith("# ")
    assert any("accelerate launch -m expertoken.train" in line for line in head)


@pytest.mark.parametrize("pool", sorted((CONFIGS / "pools").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_pool_is_read(pool):
    assert len(ExpertPool.from_yaml(pool)) > 0


def test_no_yaml_is_outside_the_tested_folders():
    assert {path.parent.name for path in CONFIGS.rglob("*.yaml")} == {"train", "pools"}


def test_command_line_beats_yaml_beats_default(tmp_path):
    (tmp_path / "r.yaml").write_text("l2: [1.0, 1e-2]\nlearning_rate: 1e-3\nmax_tokens: 100\n")
    options, arguments = parse_arguments([str(tmp_path / "r.yaml"), *NEEDED, "--max_tokens", "200"])
    assert options.max_tokens == 200
    assert options.l2 == [1.0, 0.01]
    assert arguments.learning_rate == 1e-3
    assert options.method == "tokens"


def test_all_mistakes_are_reported_together_with_what_was_meant(tmp_path):
    (tmp_path / "r.yaml").write_text("metod: tokens\nobjective: crossentropy\n")
    with pytest.raises(ConfigError) as error:
        parse_arguments([str(tmp_path / "r.yaml"), "--lerning_rate", "1", "--meta", "m"])
    for part in (
        "metod: unknown key, did you mean 'method'?",
        "--lerning_rate: unknown argument, did you mean 'learning",
        "--data: missing",
        "--output_dir: missing",
        "objective: unknown value 'crossentropy', did you mean",
    ):
        assert part in str(error.value)


def test_a_missing_recipe_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        parse_arguments(["token", *NEEDED])


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="expected keys and values"):
        parse_arguments([str(tmp_path / "r.yaml"), *NEEDED])


def test_values_with_an_equals_sign_are_checked_and_negated_flags_are_known():
    with pytest.raises(ConfigError, match="method: unknown value 'lroa', did you mean 'lora'"):
        parse_arguments(["--method=lroa", *NEEDED])
    with pytest.raises(ConfigError, match="dtype: unknown value 'fp32'"):
        parse_arguments(["--dtype", "fp32", *NEEDED])
    assert parse_arguments(["--no_verify", *NEEDED])[0].verify is False


def test_one_value_in_yaml_is_a_list_of_one(tmp_path):
    (tmp_path / "r.yaml").write_text("l2: 0.1\n")
    assert parse_arguments([str(tmp_path / "r.yaml"), *NEEDED])[0].l2 == [0.1]


def test_what_the_method_decides_is_refused_and_a_wrong_number_is_named(tmp_path):
    (tmp_path / "r.yaml").write_text("l2: [abc]\neval_steps: 5\n")
    with pytest.raises(ConfigError, match=r"eval_steps: not to be set.*l2: expected float, got \['abc'\]"):
        parse_arguments([str(tmp_path / "r.yaml"), *NEEDED])
    with pytest.raises(ConfigError, match="load_best_model_at_end: not to be set"):
        parse_arguments(["--load_best_model_at_end", "true", *NEEDED])
