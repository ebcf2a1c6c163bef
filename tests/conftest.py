import os

# Before any library is imported: nothing here may reach a hub, and bars only clutter a test log.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
# Where tests run beside each other, each has its share of the processors.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import pytest

from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.source import Source
from expertoken.tests.tiny import tiny_folder, tiny_pool, tiny_results


def pytest_collection_modifyitems(items):
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Every test has a cache of its own."""
    monkeypatch.setenv("EXPERTOKEN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A tiny tied Llama with a ChatML tokenizer, on disk."""
    return tiny_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def meta(base_folder):
    """The tiny base as a meta LLM with rows (zeros) of two experts and self."""
    return MetaLLM.from_pretrained(Source(str(base_folder)), 3, device="cpu")


@pytest.fixture
def pool(base_folder):
    return tiny_pool(base_folder)


@pytest.fixture
def results():
    return tiny_results()
