"""Training in processes of their own, as a user launches it."""

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from expertoken.tests import fresh

GLOO_ABORT = "terminate called without an active exception"  # at shutdown, see train/processes.py
SGD = ("--lora_dropout", "0", "--seed", "1", "--learning_rate", "0.3", "--warmup_steps", "0", "--logging_steps", "1",
       "--lr_scheduler_type", "constant", "--warm_start", "false", "--max_steps", "6", "--save_steps", "6",
       # The recipe's batches, grouped by length, are others for other numbers of processes.
       "--train_sampling_strategy", "random",
       # Adam makes a full step of any gradient, also of one that is zero but for rounding.
       "--optim", "sgd")  # fmt: skip


def command(config: str, folder: Path, base: Path, data: Path, method: str, *more: str) -> list[str]:
    # Not checked in a fresh process, which takes as long as such a run; of two values of an option the last one counts.
    return fresh.command("train", method, "--accelerate_config", config, "--meta", base, "--data", data,
                         "--out", folder, "--report_to", "none", "--verify", "false", *more)  # fmt: skip


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "EXPERTOKEN_CACHE": str(cache)}


def start(config: str, folder: Path, base: Path, data: Path, *more: str) -> psutil.Popen:
    """A training run in the background, for a test that kills it: the launcher is a process of Python's own."""
    _, *given = command(config, folder, base, data, "lora", "--main_process_port", "0", *more)
    variables = environment(folder.parent / "cache") | {"PYTHON_EXEC": fresh.python()}
    return psutil.Popen(given, env=variables, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def kill(process: psutil.Popen) -> None:
    """SIGKILL to a launcher and all its processes: they are in sessions of their own and would outlive it."""
    with suppress(psutil.NoSuchProcess):
        process.suspend()  # so that it starts no one more meanwhile
    everyone = [process, *process.children(recursive=True)] if process.is_running() else []
    for one in everyone:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(everyone)


def launch(config: str, folder: Path, base: Path, data: Path, method: str = "lora", *more: str) -> Path:
    """Train, and judge by what the launcher says; gloo's abort at shutdown, and only that, is tried again."""
    given = command(config, folder, base, data, method, "--main_process_port", "0", *more)
    variables = environment(folder.parent / "cache")
    for _ in range(3):
        done = subprocess.run(given, env=variables, capture_output=True, text=True, timeout=400)
        if GLOO_ABORT not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that training changed."""
    files = [folder / name for name in ("expert_tokens.safetensors", "adapter_model.safetensors")]
    return {name: value for file in files if file.exists() for name, value in load_file(file).items()}


def assert_same(one: Path, two: Path, rtol: float = 1e-4) -> None:
    """Two composites with equal weights."""
    assert_same_weights(trained(one), trained(two), rtol)


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], rtol: float) -> None:
    """Equal weights, each within `rtol` of the largest of its tensor."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        tolerance = rtol * float(value.abs().max())
        torch.testing.assert_close(second[name], value, rtol=0, atol=tolerance, msg=f"{name}: {{}}".format)
