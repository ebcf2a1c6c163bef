"""Tests that need a GPU. They are skipped without one."""

import pytest
import torch

from expertoken.data_prep.supervision import build_supervision
from expertoken.modeling.composite import load_composite
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.source import Source
from expertoken.modeling.states import states_of
from expertoken.tests.tiny import ARCHITECTURES, tiny_folder
from expertoken.tests.train.launching import SGD, assert_same, launch
from expertoken.train.config import parse_arguments
from expertoken.train.run import train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_on_the_gpu_are_those_of_the_cpu(tmp_path, architecture):
    base = tiny_folder(tmp_path / "base", architecture)
    texts = ["hello", "What is the capital of France? " * 3]
    on = {d: MetaLLM.from_pretrained(Source(str(base)), 1, device=d, dtype=torch.float32) for d in ("cpu", "cuda")}
    states = {device: meta.states([meta.encode(text) for text in texts]) for device, meta in on.items()}
    for one, two in zip(states["cpu"], states["cuda"], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_bfloat16_states_pass_the_check_of_the_transform_and_are_cached_apart(tmp_path):
    base = tiny_folder(tmp_path / "base", "gemma2-softcap")
    for dtype in (torch.float32, torch.bfloat16):
        meta = MetaLLM.from_pretrained(Source(str(base)), 1, device="cuda", dtype=dtype)
        assert states_of(meta, ["hello", "there"]).computed == 2


def arguments_of(base, supervision, folder, *more):
    return ["--meta", str(base), "--data", str(supervision), "--out", str(folder), "--report_to", "none",
            "--max_steps", "4", "--save_steps", "4", *more]  # fmt: skip


@pytest.fixture
def supervision(tmp_path, results, pool):
    build_supervision(results, pool).save(tmp_path / "supervision")
    return tmp_path / "supervision"


@pytest.mark.parametrize("method", ["tokens", "lora", "qlora"])
def test_every_method_trains_in_bfloat16_and_a_fresh_process_comes_to_the_same_logits(tmp_path, supervision, method):
    base = tiny_folder(tmp_path / "base")
    more = () if method == "tokens" else ("--bf16", "true", "--gradient_checkpointing", "true")
    train(*parse_arguments([method, *arguments_of(base, supervision, tmp_path / "c", "--dtype", "bfloat16", *more)]))
    assert load_composite(tmp_path / "c").meta.device.type == "cuda"


several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="on one GPU nothing is split")


@several
def test_fsdp2_through_accelerate_comes_to_what_ddp_comes_to(tmp_path, base_folder, supervision):
    """On a CPU accelerate silently trains with plain data parallelism instead."""
    processes = ("--num_processes", str(torch.cuda.device_count()), "--per_device_train_batch_size", "4")
    one = launch("ddp", tmp_path / "ddp", base_folder, supervision, "lora", *SGD, *processes)
    assert_same(one, launch("fsdp2", tmp_path / "fsdp2", base_folder, supervision, "lora", *SGD, *processes), rtol=1e-3)


@several
@pytest.mark.parametrize("config", ["zero2", "zero3", "zero3-offload"])
def test_deepspeed_on_a_gpu_comes_to_what_ddp_comes_to(tmp_path, base_folder, supervision, config):
    adam = ("--optim", "adamw_torch", "--adam_epsilon", "0.1", "--learning_rate", "0.1")
    processes = ("--num_processes", str(torch.cuda.device_count()), "--per_device_train_batch_size", "4")
    one = launch("ddp", tmp_path / "ddp", base_folder, supervision, "lora", *SGD, *adam, *processes)
    assert_same(one, launch(config, tmp_path / config, base_folder, supervision, "lora", *SGD, *adam, *processes), 1e-3)
