"""Answers and states by workers of a real Ray cluster, on this machine."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from expertoken.data_prep.supervision import build_supervision
from expertoken.inference import batch
from expertoken.inference.batch import generate_file
from expertoken.inference.factory import open_model
from expertoken.modeling import cluster as cluster_module
from expertoken.modeling.backend import Generation
from expertoken.modeling.chat import Query
from expertoken.modeling.cluster import Cluster
from expertoken.modeling.composite import load_composite
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.pictures import Picture
from expertoken.modeling.state_workers import StateWorkers, _portable
from expertoken.modeling.states import cached_states, encode_all, states_of
from expertoken.tests.inference.conftest import composite_of
from expertoken.tests.seeing import picture
from expertoken.tests.tiny import tiny_pool, tiny_results
from expertoken.train.run import train_composite

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")

COUNT = 60


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Start one cluster for all tests, because its start takes as long as a test."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def setting(tmp_path, base_folder):
    """Save a composite whose experts the workers load themselves, and a file of conversations."""
    composite = composite_of(
        base_folder,
        [Expert("one", model=str(base_folder)), Expert("two", model=str(base_folder)), Expert("self", "self")],
    )
    composite.meta.rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    composite.save_pretrained(tmp_path / "c", verify=False)
    rows = [json.dumps({"prompt": f"question {number} of {number * 7}"}) for number in range(COUNT)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def killed_once(method, seconds=120):
    """Kill one of the workers while it runs a method. Return its thread and the killed processes."""

    def kill():
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for process in psutil.process_iter(["cmdline"]):
                if f"ray::_Worker.{method}" in " ".join(process.info["cmdline"] or []):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
            time.sleep(0.02)

    killed = []
    thread = threading.Thread(target=kill)
    thread.start()
    return thread, killed


def test_workers_answer_a_file_as_one_process_does_though_one_is_killed(setting, monkeypatch):
    from expertoken.inference.spread import RayWorkers

    monkeypatch.setattr(batch, "_BLOCK", 10)
    given = {"generation": Generation(max_new_tokens=16)}
    generate_file(open_model(setting / "c", device="cpu"), setting / "in.jsonl", setting / "here.jsonl", **given)
    with RayWorkers(setting / "c", 2, Cluster(cpus=1), device="cpu") as workers:
        thread, killed = killed_once("answers")
        counts = generate_file(workers, setting / "in.jsonl", setting / "there.jsonl", **given)
        thread.join()
        with pytest.raises(ExpertokenError, match="exists already and is complete"):
            generate_file(workers, setting / "in.jsonl", setting / "there.jsonl", **given)
    assert killed
    assert sum(counts.values()) == COUNT
    here, there = (
        [json.loads(line) for line in (setting / name).read_text().splitlines()]
        for name in ("here.jsonl", "there.jsonl")
    )
    assert [row["expert"] for row in there] == [row["expert"] for row in here]
    assert [row["answer"] for row in there] == [row["answer"] for row in here]


def test_what_is_wrong_with_the_composite_is_told_as_it_is_here(tmp_path):
    from expertoken.inference.spread import RayWorkers

    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    with (
        RayWorkers(tmp_path / "none", 1, Cluster(cpus=0)) as workers,
        pytest.raises(ExpertokenError, match="none: expected a composite folder"),
    ):
        generate_file(workers, tmp_path / "in.jsonl", tmp_path / "out.jsonl")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Return a function that switches to an empty cache of states."""

    def switch(name):
        monkeypatch.setenv("EXPERTOKEN_CACHE", str(tmp_path / name))

    switch("first")
    return switch


def test_workers_compute_the_states_of_one_process_though_one_is_killed(meta, elsewhere):
    texts = [f"question {number} of {number * 7}" for number in range(COUNT)]
    here = states_of(meta, texts)
    elsewhere("second")
    with StateWorkers(meta, 2, Cluster(cpus=1)) as workers:
        thread, killed = killed_once("states")
        there = cached_states(meta, encode_all(meta, texts), max_tokens=64, workers=workers)
        thread.join()
    assert killed
    assert there.computed == here.computed == COUNT
    np.testing.assert_allclose(there.hidden, here.hidden, atol=1e-5)
    np.testing.assert_allclose(there.log_mass, here.log_mass, atol=1e-5)
    assert cached_states(meta, encode_all(meta, texts)).computed == 0  # they are in this machine's cache


def test_more_workers_than_the_cluster_has_room_for_do_not_stop_the_work(meta, elsewhere, caplog, monkeypatch):
    monkeypatch.setattr(cluster_module, "_PATIENCE", 1.0)
    with StateWorkers(meta, 3, Cluster(cpus=1)) as workers:  # on two CPUs
        assert cached_states(meta, encode_all(meta, ["one", "two"]), workers=workers).computed == 2
    with StateWorkers(meta, 1, Cluster(cpus=100)) as workers:

        def wait():
            with suppress(ExpertokenError):  # the end of the block ends the worker
                list(workers.states(encode_all(meta, ["a"]), max_tokens=8, label="states"))

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        waiting.join(5)
        assert "no room for a worker so far. Each of the 1 needs 100 CPUs and 0 GPUs" in caplog.text


def test_resources_that_ray_refuses_are_one_clear_error(meta):
    with pytest.raises(ExpertokenError, match="workers of a Ray cluster: "), StateWorkers(meta, 1, Cluster(gpus=1.5)):
        pass


def test_workers_get_pictures_and_no_paths(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    query = replace(Query.of([1, 2]), media=(Picture.of(tmp_path / "a.png"),))
    [sent] = _portable(query).media
    assert sent.source == picture(1)
    assert _portable(query).key == query.key


def test_other_weights_on_a_machine_of_the_cluster_are_noticed(meta, elsewhere):
    meta.base_fingerprint = "another"
    with (
        StateWorkers(meta, 1, Cluster(cpus=1)) as workers,
        pytest.raises(ExpertokenError, match="other weights under this name"),
    ):
        cached_states(meta, encode_all(meta, ["hello"]), workers=workers)


def test_a_run_with_workers_trains_the_rows_of_a_run_without(base_folder, tmp_path, elsewhere):
    data = build_supervision(tiny_results(), tiny_pool(base_folder))
    how = {"state": "auto", "verify": False}
    alone = train_composite(str(base_folder), data, tmp_path / "alone", **how)
    elsewhere("second")
    spread = train_composite(str(base_folder), data, tmp_path / "spread", ray_workers=2, **how)
    found = [load_composite(folder, device="cpu") for folder in (alone, spread)]
    assert found[0].meta.state == found[1].meta.state
    torch.testing.assert_close(found[0].meta.rows, found[1].meta.rows, rtol=1e-3, atol=1e-3)
