import json
import math
from pathlib import Path

import pytest
import yaml

import expertoken
from expertoken.modeling.distributed import Team
from expertoken.modeling.errors import ConfigError, ExpertokenError
from expertoken.modeling.pool import ExpertPool
from expertoken.train import entry, launch
from expertoken.train.config import DEEPSPEED, RECIPES, make_arguments, parse_arguments
from expertoken.train.processes import exclusive

CONFIGS = Path(expertoken.__file__).parent / "configs"
NEEDED = ["--meta", "m", "--data", "d", "--out", "o"]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_training_recipe_goes_through_the_entry_point(recipe, monkeypatch, tmp_path):
    seen = []
    from expertoken.train import run

    monkeypatch.setattr(run, "train", lambda *parsed: seen.append(parsed))
    entry.main([recipe.stem, "--meta", "m", "--data", "d", "--out", str(tmp_path)])
    [(options, arguments)] = seen
    values = yaml.safe_load(recipe.read_text())
    assert recipe.stem.startswith(options.method)
    assert not set(values) & {"eval_strategy", "eval_steps"}  # decided by the method
    for key, value in values.items():
        holder = options if hasattr(options, key) else arguments
        found = getattr(holder, key)
        assert found == [value] if isinstance(found, list) else str(getattr(found, "value", found)) == str(value), key
    head = recipe.read_text().splitlines()
    assert head[0].startswith("# ")
    launched = [line for line in head if f"expertoken.train {recipe.stem} " in line or f" train {recipe.stem} " in line]
    assert launched
    for line in launched:  # the entry point accepts every launch line, and its configurations are ours
        words = line.removeprefix("#").split()
        argv = words[words.index(recipe.stem) :]
        if "--accelerate_config" in argv:
            argv = launch.launch_arguments(argv)
            argv = argv[argv.index("expertoken.train") + 1 :]
        assert parse_arguments(argv)[0].meta.count("/") == 1
    override = next(line for line in head if line.startswith("# One override, as an example: "))
    assert parse_arguments([recipe.stem, *NEEDED, *override.split(": ")[1].split()])


@pytest.mark.parametrize("pool", sorted((CONFIGS / "pools").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_pool_is_read(pool):
    assert len(ExpertPool.from_yaml(pool)) > 0


def test_no_yaml_is_outside_the_tested_folders():
    assert {path.parent.name for path in CONFIGS.rglob("*.yaml")} == {"train", "pools", "accelerate"}


@pytest.mark.parametrize("name", launch.shipped())
def test_every_launch_configuration_says_what_it_is_for_and_accelerate_reads_it(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path, document = launch.read_config(name)
    head = path.read_text().splitlines()
    assert head[0].startswith("# ")
    assert any(f"expertoken train lora --accelerate_config {name} " in line for line in head) or name == "cpu"
    found = load_config_from_file(str(path))
    assert found.num_processes == document["num_processes"]
    assert str(getattr(found.distributed_type, "value", found.distributed_type)) == document["distributed_type"]


def test_a_launch_configuration_becomes_one_command():
    argv = ["lora", "--accelerate_config", "zero3", "--num_processes=8", "--meta", "m", "--zero3_init_flag", "true"]
    flag, path, *rest = launch.launch_arguments(argv)
    assert flag == "--config_file"
    assert Path(path).name == "zero3.yaml"
    assert rest == [
        "--num_processes",
        "8",
        "--zero3_init_flag",
        "true",
        "-m",
        "expertoken.train",
        "lora",
        "--meta",
        "m",
    ]
    assert launch.launch_arguments(["lora", "--meta", "m"]) is None
    with pytest.raises(
        ExpertokenError, match="zero33: expected a file or a shipped configuration, did you mean 'zero3'"
    ):
        launch.launch_arguments(["--accelerate_config", "zero33"])
    with pytest.raises(ExpertokenError, match="--accelerate_config: expected a value after it"):
        launch.launch_arguments(["--accelerate_config"])


def test_on_a_machine_without_accelerators_each_kind_of_launch_gets_what_it_needs(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert launch.environment(["--accelerate_config", "ddp"])["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in launch.environment(["--accelerate_config", "zero2"])
    with pytest.raises(ExpertokenError, match="fsdp2: FSDP needs accelerators, found none. On a CPU use ddp or zero3"):
        launch.environment(["--accelerate_config", "fsdp2"])


@pytest.mark.parametrize("name", sorted(DEEPSPEED.glob("*.json")), ids=lambda path: path.stem)
def test_a_deepspeed_configuration_says_the_same_as_accelerates_of_that_name(name):
    said = json.loads(name.read_text())
    inline = launch.read_config(name.stem)[1]["deepspeed_config"]
    zero = said["zero_optimization"]
    assert f"configs/accelerate/{name.stem}.yaml" in said["_for"]
    assert zero["stage"] == inline["zero_stage"]
    for key in ("offload_optimizer", "offload_param"):
        assert zero.get(key, {"device": "none"})["device"] == inline[f"{key}_device"]
    _, arguments = parse_arguments([*NEEDED, "--deepspeed", name.stem])
    assert arguments.deepspeed == str(name)


def test_a_missing_deepspeed_configuration_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="--deepspeed zero4: expected a file or a shipped one, did you mean 'zero3'"):
        parse_arguments([*NEEDED, "--deepspeed", "zero4"])


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
        "--out: missing",
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


def test_a_flag_of_the_launcher_alone_says_what_it_goes_with():
    with pytest.raises(ConfigError, match="--num_processes: goes with --accelerate_config"):
        parse_arguments([*NEEDED, "--num_processes", "2"])


def test_the_help_of_an_opposite_says_so():
    from expertoken.train.config import make_parser

    shown = " ".join(make_parser(everything=False).format_help().split())
    assert "--no_verify" in shown
    assert "Opposite of --verify." in shown


def test_the_trainers_name_of_the_folder_is_answered_with_ours():
    with pytest.raises(ConfigError, match="output_dir: spelt --out, as in the other commands"):
        parse_arguments(["--meta", "m", "--data", "d", "--output_dir", "o"])
    options, arguments = parse_arguments(NEEDED)
    assert options.out == arguments.output_dir == "o"


def test_a_recipe_may_name_the_folder(tmp_path):
    (tmp_path / "r.yaml").write_text("out: there\n")
    options, arguments = parse_arguments([str(tmp_path / "r.yaml"), "--meta", "m", "--data", "d"])
    assert options.out == arguments.output_dir == "there"
    options, arguments = parse_arguments([str(tmp_path / "r.yaml"), *NEEDED])
    assert options.out == arguments.output_dir == "o"


def test_python_gives_options_by_their_names_and_is_told_all_mistakes_at_once():
    options, arguments = make_arguments("m", "d", "o", {"method": "lora", "learning_rate": 1e-3, "dtype": "auto"})
    assert (options.meta, options.data, options.out, options.method, options.dtype) == ("m", "d", "o", "lora", "auto")
    assert (arguments.output_dir, arguments.learning_rate, arguments.report_to) == ("o", 1e-3, [])
    with pytest.raises(ConfigError) as error:
        make_arguments("m", "d", "o", {"metod": "lora", "objective": "accuracy", "eval_steps": 3})
    for part in (
        "metod: unknown argument, did you mean 'method'?",
        "objective: unknown value 'accuracy'",
        "eval_steps: not to be set",
    ):
        assert part in str(error.value)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with exclusive(tmp_path / "c", Team()):
        with (
            pytest.raises(ExpertokenError, match="another run writes there"),
            exclusive(tmp_path / "c", Team()),
        ):
            pass
        with exclusive(tmp_path / "other", Team()):
            pass
    with exclusive(tmp_path / "c", Team()):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": None}, "method: expected str, got None"),
        ({"l2": 0.1}, r"l2: expected list\[float\], got 0.1"),
        ({"l2": []}, "l2: expected one or more numbers"),
        ({"l2": [-1.0]}, "l2: expected one or more numbers"),
        ({"l2": [math.nan]}, "l2: expected one or more numbers"),
        ({"rows_learning_rate": 0.0}, "rows_learning_rate: expected a number above 0, got 0.0"),
        ({"rows_learning_rate": math.nan}, "rows_learning_rate: expected a number above 0, got nan"),
        ({"warm_start": "false"}, "warm_start: expected bool, got 'false'"),
        ({"anywhere": -1, "max_tokens": 0}, "max_tokens: expected 1 or more, got 0; anywhere: expected 0 or more"),
        ({"learning_rate": "abc"}, "learning_rate: expected float, got 'abc'"),
        ({"lora_target_modules": "q_proj"}, r"lora_target_modules: expected list\[str\]"),
        ({"help": True}, "help: unknown argument"),
    ],
)
def test_values_of_another_type_are_told_before_anything_is_loaded(options, message):
    with pytest.raises(ConfigError, match=message):
        make_arguments("m", "d", "o", options)


def test_a_tuple_is_a_list_and_no_tracker_may_be_none():
    options, arguments = make_arguments("m", "d", "o", {"l2": (0.1, 1), "report_to": None})
    assert options.l2 == [0.1, 1]
    assert arguments.report_to == []


def test_nothing_is_no_folder_and_no_method(tmp_path):
    (tmp_path / "r.yaml").write_text("out:\nmethod:\n")
    with pytest.raises(ConfigError, match="--out: missing"):
        parse_arguments([str(tmp_path / "r.yaml"), "--meta", "m", "--data", "d"])
    with pytest.raises(ConfigError, match="--out: missing"):
        parse_arguments(["--meta", "m", "--data", "d", "--out", ""])
    with pytest.raises(ConfigError, match="method: expected str, got None"):
        parse_arguments([str(tmp_path / "r.yaml"), *NEEDED])
    with pytest.raises(ConfigError, match="max_tokens: expected 1 or more, got 0"):
        parse_arguments(["--max_tokens", "0", *NEEDED])
    with pytest.raises(ConfigError, match="out: missing"):
        make_arguments("m", "d", "", {})
