"""Tests on the real small LLM, for properties that random two-layer models lack."""

import random

import pytest
import torch

from expertoken.examples.skills.measure import HERE, full_pool
from expertoken.examples.skills.tasks import BENCHMARKS, SKILLS, side_of, tasks
from expertoken.inference.composite_model import CompositeModel
from expertoken.inference.loop import BackgroundLoop
from expertoken.modeling.backend import Generation
from expertoken.modeling.composite import Composite, Manifest, describe_base
from expertoken.modeling.experts import Expert
from expertoken.modeling.files import cache_folder
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.policy import Policy
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.source import Source

smollm2 = pytest.importorskip("expertoken.examples.smollm2")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf():
    try:
        return smollm2.smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def composite(gguf, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPERTOKEN_CACHE", str(tmp_path_factory.mktemp("gguf")))
        pool = full_pool()
        meta = MetaLLM.from_pretrained(Source(str(gguf)), len(pool.names), device="cpu")
        assert len(list(cache_folder("gguf").glob("*/config.json"))) == 1
    generator = torch.Generator().manual_seed(0)
    meta.rows = torch.stack([meta.initial_row(e.description) for e in pool.candidates]) + torch.randn(
        len(pool.names), 576, generator=generator
    )
    return CompositeModel(Composite(meta, pool, Manifest(describe_base(meta), [e.name for e in pool])))


def test_a_gguf_file_is_converted_once(gguf, monkeypatch):
    from expertoken.modeling import from_gguf as module

    first = module.converted(gguf)
    monkeypatch.setattr(module, "require_extra", lambda *_: pytest.fail("converted again"))
    assert module.converted(gguf) == first


def test_the_decision_of_a_batch_is_that_of_each_alone(composite):
    prompts = ["Hi", "What is 12 + 30?", "Explain photosynthesis to a child in three sentences, please. " * 5]
    for alone, batched in zip(map(composite.route, prompts), composite.route(prompts), strict=True):
        assert alone.probabilities == pytest.approx(batched.probabilities, abs=1e-4)


def test_control_tokens_typed_by_a_user_change_nothing_of_the_prompts_shape(composite):
    meta = composite.meta
    controls = [
        meta.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    ]
    benign = list(meta.encode("hello"))
    pieces = [
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "<|expert:sql|>",
        "<|endoftext|>",
        "hello",
        "\n",
        "\uff1c|im_end|\uff1e",
    ]
    rng = random.Random(0)
    for _ in range(300):
        ids = list(meta.encode("".join(rng.choices(pieces, k=rng.randint(1, 8)))))
        assert max(ids) < meta.vocab_size
        assert [ids.count(token) for token in controls] == [benign.count(token) for token in controls]


def test_self_answers_from_the_decisions_cache_as_the_plain_model_does(composite):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    question = composite._question(messages, Policy(allow=("self",)), answer=True)
    [decision] = composite._decider.decide([question])
    assert decision.own is not None
    pieces = BackgroundLoop.iterate(composite._self_answer(decision.own, Generation(20)))
    own = "".join(piece.text for piece in pieces)
    pieces = BackgroundLoop.iterate(composite.backend("self").stream(messages, Generation(20)))
    assert own == "".join(piece.text for piece in pieces)
    assert "Paris" in own


@pytest.mark.parametrize("skill", SKILLS)
def test_every_shipped_expert_can_do_its_skill(composite, skill):
    """It is far above the meta LLM alone on held-out tasks (`examples/skills/README.md` has the measured scores)."""
    asked = [task for task, _ in zip(tasks(skill, "held_out"), range(16), strict=False)]
    chats = [[{"role": "user", "content": task.prompt}] for task in asked]
    answers = [answer.text for answer in composite.backend(skill).complete(chats, Generation(48))]
    right = sum(SKILLS[skill].score(a, task.answer) for a, task in zip(answers, asked, strict=True))
    assert right >= 8, list(zip(answers, asked, strict=True))


def test_the_shipped_adapters_are_small():
    files = list((HERE / "adapters").glob("*/adapter_model.safetensors"))
    assert {file.parent.name for file in files} == set(SKILLS)
    assert sum(file.stat().st_size for file in files) < 12e6


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_generators_are_seeded_their_sides_disjoint_and_their_answers_right(benchmark):
    one = [task for task, _ in zip(tasks(benchmark, "held_out"), range(15), strict=False)]
    two = [task for task, _ in zip(tasks(benchmark, "held_out"), range(15), strict=False)]
    assert one == two
    assert len({task.prompt for task in one}) == 15
    for task in one:
        assert side_of(task.prompt) == "held_out"
        assert BENCHMARKS[benchmark].score(task.answer, task.answer) == 1
        assert BENCHMARKS[benchmark].score("I do not know", task.answer) == 0


def test_an_adapter_of_another_base_is_refused_by_the_real_model(composite, tmp_path):
    import json
    import shutil

    from expertoken.modeling.backend import Opening
    from expertoken.modeling.errors import ExpertFailedError

    shutil.copytree(HERE / "adapters" / "sql", tmp_path / "sql")
    config = json.loads((tmp_path / "sql" / "adapter_config.json").read_text())
    (tmp_path / "sql" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    [expert] = ExpertPool([Expert("x", "adapter", str(tmp_path / "sql"))])
    with pytest.raises(ExpertFailedError, match="does not fit the base"):
        expert.kind.open(expert, Opening(composite.meta.source, composite.local_models))
