"""Launch of `--accelerate_config NAME`: the same command under `accelerate launch` with a shipped configuration."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..modeling.errors import ExpertokenError, require_extra
from .presets import names, read

CONFIGS = Path(__file__).parent.parent / "configs" / "accelerate"
_FLAG = "--accelerate_config"
_LAUNCHER = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids")
_SWITCHES = ("zero3_init_flag",)
BESIDE = [f"--{name}" for name in (*_LAUNCHER, *_SWITCHES)]
"""Options of `accelerate launch` accepted with `--accelerate_config`. All others come from the configuration."""


def shipped() -> list[str]:
    """Return the names of the configurations shipped with expertoken."""
    return names(CONFIGS)


def read_config(name: str) -> tuple[Path, dict]:
    """Return a configuration's path and its content, by its path or by the name of a shipped one.

    Raises:
        ExpertokenError: The file does not exist or is not a YAML mapping.
    """
    return read(name, CONFIGS, f"{_FLAG} {name}: expected a file or a shipped configuration")


def launch_arguments(argv: Sequence[str]) -> list[str] | None:
    """Return the arguments of `accelerate launch` for `argv`, or None if `argv` names no configuration.

    Raises:
        ExpertokenError: The configuration does not exist, or a name has no value.
    """
    values, rest = _take(argv, (_FLAG.lstrip("-"), *_LAUNCHER, *_SWITCHES))
    if (name := values.pop("accelerate_config", None)) is None:
        return None
    path, _ = read_config(name)
    flags = [part for key, value in values.items() for part in (f"--{key}", value)]
    return ["--config_file", str(path), *flags, "-m", "expertoken.train", *rest]


def environment(argv: Sequence[str]) -> dict[str, str]:
    """Return the environment variables that a launch needs on a machine without an accelerator.

    A configuration file can't hold these settings.

    Raises:
        ExpertokenError: The configuration does not fit the number of processes, or needs a missing accelerator.
    """
    values, _ = _take(argv, (_FLAG.lstrip("-"), *_LAUNCHER))
    name = values["accelerate_config"]
    config = read_config(name)[1]
    kind = config.get("distributed_type")
    given = values.get("num_processes")
    if given is not None and not given.isdigit():
        raise ExpertokenError(f"--num_processes: expected a whole number, got {given}")
    processes = int(given or config.get("num_processes") or 1)
    if kind == "NO" and processes > 1:
        raise ExpertokenError(f"{_FLAG} {name}: expected one process, got {processes}. For several processes use ddp")
    import torch

    added = {}
    if not torch.accelerator.is_available():
        if kind == "FSDP":
            # accelerate would silently fall back to plain data parallelism.
            raise ExpertokenError(f"{_FLAG} {name}: FSDP needs accelerators, found none. On a CPU use ddp or zero3")
        if kind != "DEEPSPEED":  # for DeepSpeed the same variable switches DeepSpeed off
            added["ACCELERATE_USE_CPU"] = "true"
        here = processes // int(values.get("num_machines") or config.get("num_machines") or 1)
        added["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(
            max(1, (os.cpu_count() or 1) // max(1, here))
        )
    return added


def relaunch(argv: Sequence[str]) -> None:
    """Launch the same command as `accelerate launch` does, wait for its end, and exit. Return if none is requested.

    The launcher runs in this process: another one would import torch again, which takes seconds.

    Raises:
        ExpertokenError: An argument is wrong, or one of several processes failed.
        SystemExit: Training ended. Its exit status is passed on.
    """
    arguments = launch_arguments(argv)
    if arguments is None:
        return
    require_extra("accelerate", "train")
    os.environ.update(environment(argv))  # before accelerate is imported, which reads it
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:  # the process has printed its error
        sys.exit(error.returncode if error.returncode > 0 else 1)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ExpertokenError(f"process {rank} exited with {failure.exitcode}. Its error is printed above") from None
    sys.exit(0)


def _take(argv: Sequence[str], wanted: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split a command line into the values of wanted options, `--name value` or `--name=value`, and the rest.

    Raises:
        ExpertokenError: An option has no value.
    """
    values, rest = {}, []
    items = iter(argv)
    for item in items:
        key, equals, value = item.partition("=")
        if key.removeprefix("--") not in wanted or not key.startswith("--"):
            rest.append(item)
            continue
        following = value if equals else next(items, None)
        if following is None:
            raise ExpertokenError(f"{item}: expected a value after it")
        values[key.removeprefix("--")] = following
    return values, rest
