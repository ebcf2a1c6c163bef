import os

# Before any library is imported: nothing here may reach a hub, and bars only clutter a test log.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")

import pandas as pd
import pytest

from expertoken.data_prep.results import BenchmarkResults
from expertoken.modeling.experts import Expert, ExpertPool
from expertoken.modeling.meta import MetaLLM, Source
from expertoken.tests.tiny import tiny_folder


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
    """The tiny base as a meta LLM with two expert rows (zeros)."""
    return MetaLLM.from_pretrained(Source(str(base_folder)), 2, device="cpu")


@pytest.fixture
def pool(base_folder):
    """Two experts and self; the experts are the base itself, so that they can really answer."""
    return ExpertPool(
        [
            Expert("math", model=str(base_folder), description="Compute plus"),
            Expert("law", model=str(base_folder), description="capital of France"),
            Expert("self", backend="self", results="meta"),
        ]
    )


@pytest.fixture
def results():
    """120 queries of three benchmarks, each with a model that is right there and nowhere else."""
    rows, scores = [], []
    for index in range(120):
        kind = index % 3
        prompt = (f"Compute {index} plus 3.", f"What is the law in case {index}?", f"Tell me something, take {index}.")
        rows.append((f"q{index}", prompt[kind], ("sums", "cases", "chats")[kind], None, None))
        scores.append([float(kind == column) for column in range(3)])
    frame = pd.DataFrame(rows, columns=["id", "prompt", "benchmark", "subject", "split"])
    return BenchmarkResults(frame, ["math", "law", "meta"], scores)
