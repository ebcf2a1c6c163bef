"""Parity: every way to launch training gives the same weights. Two processes really run on the CPU."""

import json
import logging
import os
import random
import subprocess
import textwrap
import time
from contextlib import suppress

import psutil
import pytest
import torch

from expertoken.data_prep.supervision import build_supervision
from expertoken.modeling.meta import MetaLLM
from expertoken.tests import fresh
from expertoken.tests.tiny import tiny_pool, tiny_results
from expertoken.tests.train.launching import (
    SGD,
    assert_same,
    assert_same_weights,
    command,
    environment,
    kill,
    launch,
    start,
    trained,
)
from expertoken.train.checkpoints import last_complete_checkpoint
from expertoken.train.run import train

pytestmark = pytest.mark.slow

BATCH = 8


def of_two(*more):
    return (*SGD, "--per_device_train_batch_size", str(BATCH // 2), *more)


def losses(folder):
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def shared(tmp_path_factory, base_folder):
    """Make a supervision and the run of one process, with which all others are compared."""
    folder = tmp_path_factory.mktemp("parity")
    build_supervision(tiny_results(), tiny_pool(base_folder)).save(folder / "supervision")
    one = launch("cpu", folder / "one", base_folder, folder / "supervision", "lora", *SGD,
                 "--per_device_train_batch_size", str(BATCH))  # fmt: skip
    return folder / "supervision", one


def test_the_run_that_others_are_held_against_moves_every_weight(shared, base_folder):
    _, one = shared
    start = MetaLLM.from_pretrained(str(base_folder), 3, device="cpu")
    rows = torch.stack([start.initial_row(text) for text in ("Compute plus", "capital of France", "")])
    found = trained(one)
    assert (found.pop("expert_rows") - rows).abs().max() > 0.03
    assert all(value.abs().max() > 1e-4 for name, value in found.items() if "lora_B" in name)  # B starts at zero
    assert losses(one)[-1] < losses(one)[0]


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("ddp", ("--verify", "true")),
        ("zero1", ()),
        ("zero2", ()),
        ("zero3", ("--verify", "true")),
        ("zero3", ("--zero3_init_flag", "true")),
        ("zero2", ("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2")),
    ],
    ids=["ddp", "zero1", "zero2", "zero3", "zero3 split while loading", "zero2 accumulating"],
)
def test_two_processes_come_to_what_one_comes_to(tmp_path, shared, base_folder, config, more):
    supervision, one = shared
    two = launch(config, tmp_path / "two", base_folder, supervision, "lora", *of_two(*more))
    assert json.loads((two / "expertoken.json").read_text())["training"]["processes"] == 2
    assert_same(one, two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)  # the log has four decimals


def test_accumulated_batches_come_to_what_a_large_one_comes_to(tmp_path, shared, base_folder):
    supervision, one = shared
    more = ("--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "2")
    assert_same(one, launch("cpu", tmp_path / "small", base_folder, supervision, "lora", *SGD, *more))


def test_two_machines_come_to_what_one_process_comes_to(tmp_path, shared, base_folder):
    """Two launchers meet at an address, as on a cluster. Here both are on the loopback."""
    supervision, one = shared
    port = str(20000 + os.getpid() % 20000)
    more = of_two("--num_machines", "2", "--num_processes", "2", "--main_process_port", port)
    given = command("multi-node", tmp_path / "two", base_folder, supervision, "lora", *more)
    machines = [
        subprocess.Popen([*given, "--machine_rank", rank], env=environment(tmp_path / "cache"), stderr=subprocess.PIPE)
        for rank in "01"
    ]
    for machine in machines:
        told = machine.communicate(timeout=550)[1].decode()
        assert machine.returncode == 0, told[-3000:]
    assert_same(one, tmp_path / "two")


def test_tokens_of_two_processes_are_those_of_one(tmp_path, shared, base_folder):
    supervision, _ = shared
    one = launch("cpu", tmp_path / "one" / "c", base_folder, supervision, "tokens")
    two = launch("ddp", tmp_path / "two" / "c", base_folder, supervision, "tokens")
    assert_same(one, two, rtol=1e-3)


def test_with_optimizer_states_on_the_cpu_adam_comes_to_what_one_process_comes_to(tmp_path, shared, base_folder):
    """A large epsilon makes Adam's steps proportional to the gradients."""
    supervision, _ = shared
    adam = ("--optim", "adamw_torch", "--adam_epsilon", "0.1", "--learning_rate", "0.1")
    one = launch("cpu", tmp_path / "one", base_folder, supervision, "lora", *SGD, *adam,
                 "--per_device_train_batch_size", str(BATCH))  # fmt: skip
    two = launch("zero3-offload", tmp_path / "two", base_folder, supervision, "lora", *of_two(*adam))
    assert_same(one, two)


def test_with_optimizer_states_on_the_cpu_any_other_optimizer_is_refused(tmp_path, shared, base_folder):
    supervision, _ = shared
    given = command("zero3-offload", tmp_path / "c", base_folder, supervision, "lora", *of_two())
    done = subprocess.run(given, env=environment(tmp_path), capture_output=True, text=True, timeout=550)
    assert done.returncode
    assert "error: --optim sgd: with optimizer states on the CPU DeepSpeed replaces any optimizer" in done.stderr


@pytest.mark.parametrize("config", ["cpu", "ddp", "zero3"])
def test_a_killed_run_goes_on_to_the_very_same_weights(tmp_path, shared, base_folder, config):
    """All its processes receive SIGKILL at a random moment. Dropout and Adam's states are restored too."""
    supervision, _ = shared
    more = ("--max_steps", "40", "--save_steps", "5", "--logging_steps", "40", "--lora_dropout", "0.1", "--seed", "3",
            "--learning_rate", "1e-3", "--warm_start", "false", "--save_total_limit", "2")  # fmt: skip
    straight = launch(config, tmp_path / "straight", base_folder, supervision, "lora", *more)
    killed = tmp_path / "killed"
    process = start(config, killed, base_folder, supervision, *more)
    deadline = time.monotonic() + 200
    drawn, pause = random.choice(range(5, 36, 5)), random.random() / 5
    logging.getLogger(__name__).info("killed %.3f s after checkpoint-%d", pause, drawn)  # pytest shows it on a failure
    while not (killed.exists() and (last := last_complete_checkpoint(killed)) and int(last.name[11:]) >= drawn):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(pause)
    kill(process)
    assert not (killed / "expertoken.json").exists()
    launch(config, killed, base_folder, supervision, "lora", *more)
    assert_same(straight, killed, rtol=0 if config != "zero3" else 1e-6)
    assert len(list(killed.glob("checkpoint-*"))) <= 3  # the two newest and the best


def test_processes_that_outlived_their_launcher_keep_a_second_run_out(tmp_path, shared, base_folder):
    """If only a launcher is killed, its processes keep running. Two runs in one folder would corrupt each other."""
    supervision, _ = shared
    folder = tmp_path / "c"
    more = ("--max_steps", "2000", "--save_steps", "5", "--num_train_epochs", "1000", "--warm_start", "false")
    process = start("ddp", folder, base_folder, supervision, *more)
    workers = []
    try:
        deadline = time.monotonic() + 200
        while not (folder.exists() and last_complete_checkpoint(folder)):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        workers = process.children(recursive=True)
        process.kill()
        again = command("ddp", folder, base_folder, supervision, "lora", "--main_process_port", "0", *more)
        second = subprocess.run(again, env=environment(tmp_path / "cache"), capture_output=True, text=True)
        assert second.returncode != 0
        assert "another run writes there, maybe a process that outlived its launcher" in second.stderr
    finally:
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        kill(process)


FSDP2 = """
import sys
import torch
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from safetensors.torch import save_file
from expertoken.modeling.dispatch import candidate_logits, dispatch_forward
from expertoken.modeling.meta import MetaLLM
from expertoken.train.objectives import cross_entropy
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.lora import wrap_with_lora
from expertoken.train.processes import leave

base, out, sharded = sys.argv[1], sys.argv[2], sys.argv[3] == "sharded"
torch.manual_seed(0)
meta = MetaLLM.from_pretrained(base, 3, device="cpu")
meta.rows = 0.1 * torch.randn(3, meta.head.in_features, generator=torch.Generator().manual_seed(1))  # large rows: chaos
wrap_with_lora(meta, ExpertokenArguments(meta=base, data="", lora_dropout=0.0))
rank = 0
if sharded:
    init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    for layer in meta.model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(meta.model, mesh=mesh)
optimizer = torch.optim.SGD([p for p in meta.model.parameters() if p.requires_grad], lr=0.3)
texts = ["Compute 1 plus 2.", "What is the capital of France?", "hello", "Compute 7 plus 7, please."]
share = texts[rank * 2 : rank * 2 + 2] if sharded else texts
for _ in range(4):
    logits, _ = dispatch_forward(meta.model, **meta.pad([meta.encode(text) for text in share], "cpu"))
    candidates = candidate_logits(logits, meta.vocab_size)
    targets = torch.eye(3)[[len(text) % 3 for text in share]]
    total, _ = cross_entropy(candidates, targets, targets, torch.ones(len(share)))
    (total / len(share)).backward()
    optimizer.step()
    optimizer.zero_grad()
found = {"expert_rows": meta.rows, **meta.adapter_state()}
if rank == 0:
    save_file({name: value.contiguous() for name, value in found.items()}, out)
leave()
"""


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied"])
def test_fsdp2_of_two_processes_comes_to_what_one_comes_to(tmp_path, architecture):
    """PyTorch's own FSDP2 runs on a CPU mesh. Through accelerate it needs an accelerator (see the GPU test)."""
    from safetensors.torch import load_file

    from expertoken.tests.tiny import tiny_folder

    base = tiny_folder(tmp_path / "base", architecture)
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(FSDP2))
    torchrun = [fresh.python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, mode in (([fresh.python()], "whole"), (torchrun, "sharded")):
        given = [*launcher, str(script), str(base), str(tmp_path / f"{mode}.safetensors"), mode]
        done = subprocess.run(given, env=environment(tmp_path), capture_output=True, text=True, timeout=200)
        assert (tmp_path / f"{mode}.safetensors").exists(), done.stderr[-3000:]
    one, two = (load_file(tmp_path / f"{mode}.safetensors") for mode in ("whole", "sharded"))
    assert_same_weights(one, two, rtol=1e-3)


def test_training_through_python_comes_to_what_the_launcher_comes_to(tmp_path, shared, base_folder, checked_at_once):
    from expertoken.train.config import parse_arguments

    supervision, one = shared
    argv = ["lora", "--meta", str(base_folder), "--data", str(supervision), "--out", str(tmp_path / "c"),
            "--report_to", "none", *SGD, "--per_device_train_batch_size", str(BATCH)]  # fmt: skip
    assert_same(one, train(*parse_arguments(argv)))
