"""Resolution of training arguments: the command line overrides YAML, and YAML overrides defaults."""

import argparse
import itertools
import runpy
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ..modeling.errors import ConfigError, did_you_mean, one_line, require_extra
from .arguments import ExpertokenArguments, is_of, type_name
from .launch import BESIDE, shipped
from .presets import names, read

if TYPE_CHECKING:
    from transformers import HfArgumentParser, TrainingArguments

RECIPES = Path(__file__).parent.parent / "configs" / "train"
DEEPSPEED = RECIPES.parent / "deepspeed"

_USAGE = (
    "expertoken train [RECIPE] --meta MODEL --data SUPERVISION --out COMPOSITE [--key value ...]\n"
    "       expertoken train ... --accelerate_config NAME [--num_processes N ...]\n"
    "       accelerate launch -m expertoken.train ..."
)
_EPILOG = (
    "RECIPE is a YAML file or the name of a shipped one ({recipes}). The command line overrides YAML, and YAML "
    "overrides defaults. Every argument of transformers.TrainingArguments is accepted too (--learning_rate, "
    "--report_to tensorboard, ...). --help-all lists them. `expertoken train ... --accelerate_config NAME` launches "
    "the command under accelerate with a file or a shipped configuration ({configs}). With it, {beside} are accepted. "
    "--deepspeed takes a file or the name of a shipped one ({deepspeed}), for torchrun and DeepSpeed's own launcher."
)

_OURS = dict.fromkeys(
    ("eval_strategy", "eval_steps", "metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
    "not to be set: method lora evaluates each checkpoint and keeps the best by score (save_steps sets the interval)",
) | {"output_dir": "spelt --out, as in the other commands"}


_DEFAULTS: dict[str, Any] = {
    # Shares of all steps: with the Trainer's default of 500 a run of 62 steps would log and save nothing.
    "logging_steps": 0.02,
    "save_steps": 0.1,
    "include_num_input_tokens_seen": True,  # for tokens per second in the log
}


def make_parser(*, everything: bool) -> "HfArgumentParser":
    """Return the argument parser. Without `everything` it knows our own arguments only and needs no torch."""
    kinds: list[Any] = [ExpertokenArguments]
    if everything:
        require_extra("accelerate", "train")
        from transformers import HfArgumentParser, TrainingArguments

        parser_class = HfArgumentParser
        kinds.append(TrainingArguments)
    else:
        parser_class = _argument_parser()
    recipes = ", ".join(names(RECIPES))
    parser = parser_class(
        kinds,
        prog="expertoken train",
        usage=_USAGE,
        description="Train expert tokens from supervision and write a composite folder.",
        epilog=_EPILOG.format(
            recipes=recipes, configs=", ".join(shipped()), deepspeed=", ".join(_deepspeed()), beside=", ".join(BESIDE)
        ),
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.dest == "output_dir":
            action.help = argparse.SUPPRESS  # expertoken's option is `--out`
        if any(flag.startswith("--no_") for flag in action.option_strings):
            action.help = f"Opposite of --{action.dest}."
    return parser


def _argument_parser() -> type["HfArgumentParser"]:
    """Load transformers' parser from its file, since importing the package takes over a second and help needs none."""
    package = find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    return runpy.run_path(str(Path(package.origin).with_name("hf_argparser.py")))["HfArgumentParser"]


def _deepspeed() -> dict[str, Path]:
    """Return the shipped DeepSpeed configurations by name."""
    return {file.stem: file for file in sorted(DEEPSPEED.glob("*.json"))}


def read_recipe(name: str) -> dict[str, Any]:
    """Return a recipe's keys and values, by its path or by the name of a shipped one.

    Raises:
        ConfigError: The file does not exist or is not a YAML mapping.
    """
    return read(name, RECIPES, f"{name}: expected a YAML file or the name of a shipped recipe, found neither")[1]


def parse_arguments(argv: Sequence[str]) -> tuple[ExpertokenArguments, "TrainingArguments"]:
    """Resolve a recipe and command-line overrides.

    Raises:
        ConfigError: Keys or values are unknown, or arguments are missing. The message names all of them.
        SystemExit: Help was requested, or a value is not of its option's type.
    """
    argv = list(argv)
    if "--help" in argv or "-h" in argv or "--help-all" in argv:
        make_parser(everything="--help-all" in argv).print_help()
        sys.exit(0)
    parser = make_parser(everything=True)
    recipe = read_recipe(argv.pop(0)) if argv and not argv[0].startswith("-") else {}
    for values in (recipe, _values(argv)):
        _check_deepspeed(values.get("deepspeed"))
    actions = {action.dest: action for action in parser._actions}
    mistakes = [f"{key}: unknown key, {did_you_mean(str(key), actions)}" for key in recipe if key not in actions]
    given = {item.split("=")[0][2:].replace("-", "_") for item in argv if item.startswith("--")}
    flags = {flag[2:].replace("-", "_") for action in parser._actions for flag in action.option_strings} - {""}
    beside = {name.removeprefix("--") for name in BESIDE}
    for key in sorted(given - flags):
        told = "goes with --accelerate_config" if key in beside else f"unknown argument, {did_you_mean(key, flags)}"
        mistakes.append(f"--{key}: {told}")
    for key in ("meta", "data", "out"):
        if not _values(argv).get(key, recipe.get(key)):
            mistakes.append(f"--{key}: missing")
        actions[key].required = False
    mistakes += [f"{key}: {_OURS[key]}" for key in _OURS if key in recipe or key in given]
    defaults = {}
    for key, value in recipe.items():
        if key in actions:
            try:
                defaults[key] = _typed(value, actions[key])
            except (TypeError, ValueError):
                mistakes.append(f"{key}: expected {getattr(actions[key].type, '__name__', 'a value')}, got {value!r}")
    mistakes += _choices({**recipe, **_values(argv)}, actions)
    if mistakes:
        raise ConfigError("training arguments: " + "; ".join(mistakes))
    parser.set_defaults(**_DEFAULTS | defaults)
    try:
        argv = _with_deepspeed_file(_cpu_by_default(argv, recipe), recipe)
        argv += ["--output_dir", str(_values(argv).get("out", recipe.get("out")))]  # the Trainer's name for `--out`
        ours, theirs = parser.parse_args_into_dataclasses(argv)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training arguments: {one_line(error)}") from None
    return ours, theirs


def make_arguments(
    meta: str, data: str, out: str, options: dict[str, Any]
) -> tuple[ExpertokenArguments, "TrainingArguments"]:
    """Return the arguments of a run that Python code starts.

    Args:
        meta: Meta LLM: hub id, local folder or GGUF file.
        data: Supervision folder.
        out: Composite folder to write.
        options: Fields of `ExpertokenArguments` and of `transformers.TrainingArguments`.

    Raises:
        ConfigError: Keys are unknown or values are invalid. The message names all of them.
        ImportError: The extra `train` is not installed.
    """
    require_extra("accelerate", "train")
    import torch
    from transformers import TrainingArguments

    actions = {action.dest: action for action in make_parser(everything=True)._actions if action.dest != "help"}
    mistakes = [f"{key}: missing" for key, value in (("meta", meta), ("data", data), ("out", out)) if not value]
    mistakes += [f"{key}: unknown argument, {did_you_mean(key, actions)}" for key in options if key not in actions]
    mistakes += [f"{key}: {_OURS[key]}" for key in options if key in _OURS]
    mistakes += _choices(options, actions)
    for key, hint in get_type_hints(TrainingArguments).items():
        if hint in (int, float, bool) and key in options and not is_of(options[key], hint):
            mistakes.append(f"{key}: expected {type_name(hint)}, got {options[key]!r}")
    if mistakes:
        raise ConfigError("training arguments: " + "; ".join(mistakes))
    names = {item.name for item in fields(ExpertokenArguments)}
    ours = {key: value for key, value in options.items() if key in names}
    theirs: dict[str, Any] = {**_DEFAULTS, "use_cpu": not torch.accelerator.is_available(), "report_to": "none"}
    theirs |= {key: value for key, value in options.items() if key not in names and value is not None}
    try:
        return ExpertokenArguments(meta, data, out, **ours), TrainingArguments(output_dir=out, **theirs)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training arguments: {one_line(error)}") from None


def _typed(value: Any, action: argparse.Action) -> Any:
    """Convert a YAML value as argparse would: YAML reads `1e-4` as text, and argparse converts text but not lists."""
    convert: Any = action.type
    if action.nargs in ("+", "*"):
        return [convert(item) if convert else item for item in (value if isinstance(value, list) else [value])]
    return str(value) if isinstance(value, float) else value


def _check_deepspeed(name: Any) -> None:
    if isinstance(name, str) and Path(name).suffix != ".json" and name not in _deepspeed():
        raise ConfigError(f"--deepspeed {name}: expected a file or a shipped one, {did_you_mean(name, _deepspeed())}")


def _with_deepspeed_file(argv: list[str], recipe: dict[str, Any]) -> list[str]:
    """Replace the name of a shipped DeepSpeed configuration, in the command line or the recipe, by its file."""
    name = _values(argv).get("deepspeed", recipe.get("deepspeed"))
    file = _deepspeed().get(name) if isinstance(name, str) else None
    return argv if file is None else [*argv, "--deepspeed", str(file)]  # argparse uses the last of two values


def _values(argv: Sequence[str]) -> dict[str, str]:
    """Parse `--key value` and `--key=value` of a command line into values by name."""
    values = {}
    for item, following in itertools.pairwise([*argv, ""]):
        if item.startswith("--"):
            key, equals, value = item[2:].partition("=")
            values[key.replace("-", "_")] = value if equals else following
    return values


def _choices(values: dict[str, Any], actions: dict[str, argparse.Action]) -> list[str]:
    """Return an error message for each of our own options whose value is not among its choices."""
    allowed = {item.name: actions[item.name].choices for item in fields(ExpertokenArguments)}
    return [
        f"{key}: unknown value {values[key]!r}, {did_you_mean(str(values[key]), known)}"
        for key, known in allowed.items()
        if known is not None and values.get(key) is not None and values[key] not in known
    ]


def _cpu_by_default(argv: Sequence[str], recipe: dict[str, Any]) -> list[str]:
    """Append `--use_cpu` without an accelerator, since several CPU processes would otherwise each train alone."""
    import torch

    if torch.accelerator.is_available() or "use_cpu" in recipe or "use_cpu" in _values(argv):
        return list(argv)
    return [*argv, "--use_cpu", "true"]
