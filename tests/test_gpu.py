"""What only a GPU shows; skipped without one."""

import pytest
import torch

from expertoken.modeling.meta import MetaLLM, Source
from expertoken.tests.tiny import ARCHITECTURES, tiny_folder
from expertoken.train.features import cached_features

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
        assert cached_features(meta, ["hello", "there"]).computed == 2
