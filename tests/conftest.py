import os
import shutil
import sys

# Set before any library is imported: no test may reach a hub, and progress bars clutter the log.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
# Parallel workers share the processors.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

from expertoken.tests.torchvision_apart import usable_torchvision

usable_torchvision()

import pytest
from transformers import TrainingArguments

from expertoken.data_prep.supervision import build_supervision
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.source import Source
from expertoken.tests import fresh
from expertoken.tests.tiny import tiny_folder, tiny_pool, tiny_results
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.run import train


def pytest_collection_modifyitems(items):
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Give every test its own cache."""
    monkeypatch.setenv("EXPERTOKEN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def checked_at_once(monkeypatch):
    """Verify saved composites with a Python that starts without import time (`fresh`)."""
    monkeypatch.setattr(sys, "executable", fresh.python())


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """Return the folder of a tiny tied Llama with a ChatML tokenizer."""
    return tiny_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def meta(base_folder):
    """Load the tiny base as a meta LLM with rows of zeros for two experts and self."""
    return MetaLLM.from_pretrained(Source(str(base_folder)), 3, device="cpu")


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, base_folder):
    """Train a composite once, because it takes seconds and many tests use it. Its folder holds a supervision too."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTOKEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        build_supervision(tiny_results(), tiny_pool(base_folder)).save(folder / "supervision")
        options = ExpertokenArguments(meta=str(base_folder), data=str(folder / "supervision"), verify=False)
        train(options, TrainingArguments(output_dir=str(folder / "composite"), use_cpu=True, report_to="none"))
    return folder


@pytest.fixture
def composite_folder(tmp_path, trained_once):
    """Copy the trained composite and its supervision for one test."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "composite"


@pytest.fixture
def pool(base_folder):
    return tiny_pool(base_folder)


@pytest.fixture
def results():
    return tiny_results()
