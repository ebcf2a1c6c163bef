"""Training in separate processes, as a user launches it."""

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
       # Grouping batches by length gives different batches for different numbers of processes.
       "--train_sampling_strategy", "random",
       # Adam takes a full step for any gradient, even for one that is only a rounding error.
       "--optim", "sgd")  # fmt: skip


def command(config: str, folder: Path, base: Path, data: Path, method: str, *more: str) -> list[str]:
    # Verification in a fresh process is off, because it takes as long as the run. `more` may set it again: the last
    # value of an option counts.
    return fresh.command("train", method, "--accelerate_config", config, "--meta", base, "--data", data,
                         "--out", folder, "--report_to", "none", "--verify", "false", *more)  # fmt: skip


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "EXPERTOKEN_CACHE": str(cache)}


def start(config: str, folder: Path, base: Path, data: Path, *more: str) -> psutil.Popen:
    """Start a training run in the background, for a test that kills it. The launcher is an ordinary Python process."""
    _, *given = command(config, folder, base, data, "lora", "--main_process_port", "0", *more)
    variables = environment(folder.parent / "cache") | {"PYTHON_EXEC": fresh.python()}
    return psutil.Popen(given, env=variables, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def kill(process: psutil.Popen) -> None:
    """Send SIGKILL to a launcher and to all its processes, which have their own sessions and would outlive it."""
    with suppress(psutil.NoSuchProcess):
        process.suspend()  # so that it starts no further process
    everyone = [process, *process.children(recursive=True)] if process.is_running() else []
    for one in everyone:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(everyone)


def launch(config: str, folder: Path, base: Path, data: Path, method: str = "lora", *more: str) -> Path:
    """Train and check the launcher's exit status. Only gloo's abort at shutdown is retried."""
    given = command(config, folder, base, data, method, "--main_process_port", "0", *more)
    variables = environment(folder.parent / "cache")
    for _ in range(3):
        done = subprocess.run(given, env=variables, capture_output=True, text=True, timeout=400)
        if GLOO_ABORT not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Load all tensors that training changed."""
    files = [folder / name for name in ("expert_tokens.safetensors", "adapter_model.safetensors")]
    return {name: value for file in files if file.exists() for name, value in load_file(file).items()}


def assert_same(one: Path, two: Path, rtol: float = 1e-4) -> None:
    """Check that two composites have equal weights."""
    assert_same_weights(trained(one), trained(two), rtol)


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], rtol: float) -> None:
    """Check that weights are equal, each within `rtol` of the largest value of its tensor."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        tolerance = rtol * float(value.abs().max())
        torch.testing.assert_close(second[name], value, rtol=0, atol=tolerance, msg=f"{name}: {{}}".format)
