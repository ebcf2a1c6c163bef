"""Vision-language meta LLMs of several families: what they read, decide, answer and save."""

import asyncio
import base64
import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")

from transformers import AutoModelForImageTextToText, AutoProcessor

from expertoken.inference.composite_model import CompositeModel
from expertoken.modeling import pictures
from expertoken.modeling.chat import count_media
from expertoken.modeling.composite import Composite, Manifest, describe_base, load_composite
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.export import export_checkpoint
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.pictures import Picture, part_of
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.saving import save_composite
from expertoken.modeling.source import Source
from expertoken.modeling.state import StateSpec
from expertoken.modeling.states import cached_states, state_logits
from expertoken.modeling.view import View
from expertoken.tests import fresh
from expertoken.tests.seeing import FAMILIES, PILLOW_ALONE, picture, seeing_folder
from expertoken.tests.torchvision_apart import usable_torchvision

TORCHVISION = usable_torchvision()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    if request.param not in PILLOW_ALONE and not TORCHVISION:
        pytest.skip("its processor needs torchvision: see test_all_families_where_torchvision_lies_apart")
    if request.param in PILLOW_ALONE and "EXPERTOKEN_TORCHVISION" in os.environ:
        pytest.skip("tested where torchvision is not")
    return seeing_folder(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def seeing(folder):
    """Load a vision-language meta LLM with rows of two experts and self."""
    meta = MetaLLM.from_pretrained(Source(str(folder)), 3, device="cpu")
    meta.rows = torch.randn(3, meta.row_width, generator=torch.Generator().manual_seed(0)) / 4
    return meta


PICTURES = [Picture.of(picture(seed, (40 + 30 * seed, 30))) for seed in range(3)]


def ask(text, *pictures):
    return [{"role": "user", "content": [*map(part_of, pictures), {"type": "text", "text": text}]}]


CONVERSATIONS = [
    ask("What is it?", PICTURES[0]),
    ask("What is the capital of France?"),
    ask("Compute both of them, please.", PICTURES[1], PICTURES[2]),
    ask("What is it?", PICTURES[1]),
]


@pytest.mark.skipif(TORCHVISION, reason="the families are tested by the tests beside this one")
def test_all_families_where_torchvision_lies_apart():
    """PyPI's torchvision cannot be imported beside a CPU build of torch, so it is installed in a separate folder."""
    apart = Path(sys.prefix) / "vision"
    if not apart.exists():
        pytest.skip(f"no torchvision here, nor in {apart}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"EXPERTOKEN_TORCHVISION": str(apart)}, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@torch.inference_mode()
def test_the_base_gives_the_logits_that_transformers_gives(folder, seeing):
    """The reference is the processor and the model of transformers, on the same pictures and text."""
    processor = seeing.sight.processor
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    content = [{"type": "image", "image": PICTURES[1].decoded()}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    ).convert_to_tensors("pt")
    query = seeing.encode(CONVERSATIONS[3])
    assert query.ids.tolist() == inputs["input_ids"][0].tolist()
    expected = model(**inputs).logits[:, -1]
    batch = seeing.pad([query])
    found = seeing.model(**batch).logits[:, -1, : seeing.vocab_size]
    torch.testing.assert_close(found, expected)


def test_a_batch_decides_as_each_alone(seeing):
    queries = list(map(seeing.encode, CONVERSATIONS))
    assert [len(query.media) for query in queries] == [1, 0, 2, 1]
    together = seeing.candidate_logits(queries)
    alone = torch.cat([seeing.candidate_logits([query]) for query in queries])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_another_picture_moves_the_state(seeing):
    queries = [seeing.encode(ask("What is it?", Picture.of(picture(seed)))) for seed in (7, 8)]
    assert len(queries[0]) == len(queries[1])
    assert queries[0].ids.tolist() == queries[1].ids.tolist()
    assert queries[0].key != queries[1].key
    hidden, _ = seeing.states(queries)
    assert (hidden[0] - hidden[1]).norm() / hidden[0].norm() > 1e-3


def test_states_are_cached_by_text_and_picture(seeing):
    queries = list(map(seeing.encode, CONVERSATIONS))
    first = cached_states(seeing, queries)
    again = cached_states(seeing, [*queries, seeing.encode(ask("What is it?", PICTURES[2]))])
    assert (first.computed, again.computed) == (4, 1)
    logits = state_logits(seeing.rows, again, seeing.transform)
    torch.testing.assert_close(logits[:4], seeing.candidate_logits(queries), atol=1e-4, rtol=1e-4)


def test_the_same_picture_in_another_format_is_the_same(seeing):
    one, other = (Picture.of(picture(5, kind=kind)) for kind in ("PNG", "BMP"))
    assert one.source != other.source
    assert seeing.encode(ask("?", one)).key == seeing.encode(ask("?", other)).key


def test_a_picture_that_comes_with_every_turn_is_decoded_once_more_at_most(seeing, monkeypatch):
    calls = []
    decode = pictures.decoded

    def counted(source, name):
        calls.append(name)
        return decode(source, name)

    monkeypatch.setattr(pictures, "decoded", counted)
    new = base64.b64encode(picture(random.getrandbits(30))).decode()
    for most in (2, 1):  # to identify it and to read it, then to read it
        calls.clear()
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{new}"}}
        query = seeing.encode([{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}])
        seeing.states([query])
        assert len(calls) <= most


def media_tokens(meta):
    tokenizer = meta.tokenizer
    return [*meta.sight.tokens, *(token.content for token in tokenizer.added_tokens_decoder.values())]


def test_no_text_of_a_user_is_a_picture(seeing):
    """Nor is it any other token of the template, alone or beside a picture."""
    special = set(seeing.tokenizer.added_tokens_decoder)
    plain = [i for i in seeing.encode(ask("x")).ids.tolist() if i in special]
    shown = [i for i in seeing.encode(ask("x", PICTURES[0])).ids.tolist() if i in special]
    for token in media_tokens(seeing):
        for text in (token, f"a{token}b {token}{token}", token * 40):
            assert [i for i in seeing.encode(ask(text)).ids.tolist() if i in special] == plain
            assert [i for i in seeing.encode(ask(text, PICTURES[0])).ids.tolist() if i in special] == shown
            assert [i for i in seeing.encode([{"role": "user", "content": text}]).ids.tolist() if i in special] == plain


def test_pictures_stand_where_they_were_written(seeing):
    """The pictures are between texts, in several turns, and after an agent's text."""
    before, after = {"type": "text", "text": "Compute"}, {"type": "text", "text": "plus this one"}
    mixed = [{"role": "user", "content": [before, part_of(PICTURES[0]), after, part_of(PICTURES[1])]}]
    text = seeing.tokenizer.decode(seeing.encode(mixed).ids)
    assert text.index("Compute") < text.index("plus this one")
    assert seeing.encode(mixed).media == (PICTURES[0], PICTURES[1])
    turns = [
        *ask("What is it?", PICTURES[0]),
        {"role": "assistant", "content": "A table."},
        *ask("And this?", PICTURES[1]),
    ]
    assert seeing.encode(turns).media == (PICTURES[0], PICTURES[1])
    assert seeing.encode(turns).whole


def test_a_view_keeps_the_pictures_of_the_request_and_cuts_the_rest(folder):
    meta = MetaLLM.from_pretrained(Source(str(folder)), 2, device="cpu")
    meta.view = View(context_tokens=24)
    long = "the customers of the table " * 40
    turns = [*ask(long, PICTURES[0]), {"role": "assistant", "content": long}, *ask("What is it?", PICTURES[1])]
    query = meta.encode(turns)
    assert query.media == (PICTURES[1],)
    assert query.cut > 0
    request = meta.encode(ask(long * 10, PICTURES[1]))
    assert request.media == (PICTURES[1],)
    assert len(request) < meta.positions


def composite_that_answers(folder, **options):
    """Build a composite that always chooses self."""
    pool = ExpertPool([Expert("one", model=str(folder)), Expert("self", "self")])
    meta = MetaLLM.from_pretrained(Source(str(folder)), 2, device="cpu")
    hidden, _ = meta.states([meta.encode(conversation) for conversation in CONVERSATIONS])
    row = torch.linalg.lstsq(hidden, torch.ones(len(hidden), 1)).solution[:, 0]
    meta.rows = torch.stack([-20 * row, 20 * row])
    return CompositeModel(Composite(meta, pool, Manifest(describe_base(meta), ["one"])), **options)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["one", "none", "two", "other"])
def test_self_goes_on_from_what_the_decision_has_seen(folder, conversation):
    """The answer equals `generate` on the whole conversation, also after decisions on other pictures."""
    composite = composite_that_answers(folder)
    meta = composite.meta
    query = meta.encode(conversation)
    asked = sum(map(count_media, conversation))
    assert len(query.media) == asked
    model = copy.deepcopy(meta.plain)
    output = model.generate(**meta.pad([query]), max_new_tokens=8, do_sample=False)[0, len(query) :]
    expected = meta.tokenizer.decode(output, skip_special_tokens=True)

    async def answers():
        together = [composite.adecide(one) for one in CONVERSATIONS]
        await asyncio.gather(*together)
        return await composite.achat(conversation, max_new_tokens=8, temperature=0.0)

    reply = asyncio.run(answers())
    assert reply.expert == "self"
    assert reply.text == expected


@torch.inference_mode()
def test_a_cache_made_in_a_batch_is_the_one_made_alone(seeing):
    """A row of the cache from which self continues contains nothing of its neighbours' pictures."""
    from expertoken.inference.decider import Decider, Question
    from expertoken.modeling.dispatch import Dispatch

    decider = Decider(seeing, "self")
    choose = lambda logits: Dispatch.from_logits(["self", "b", "c"], torch.tensor([9.0, 0, 0]))  # noqa: E731
    queries = list(map(seeing.encode, CONVERSATIONS))
    together = decider.decide([Question(query, choose, answer=True) for query in queries])
    for query, decision in zip(queries, together, strict=True):
        (alone,) = decider.decide([Question(query, choose, answer=True)])
        assert decision.own is not None
        assert alone.own is not None
        torch.testing.assert_close(decision.own.logits, alone.own.logits, atol=1e-4, rtol=1e-4)
        placed = [own.inputs.get("position_ids") for own in (decision.own, alone.own)]
        assert (placed[0] is None) == (placed[1] is None)
        if placed[0] is not None:
            assert placed[0][..., -1].tolist() == placed[1][..., -1].tolist()


def test_a_local_expert_answers_about_pictures(folder):
    """Its answers, alone and in a batch, equal `generate`'s."""
    composite = composite_that_answers(folder)
    backend = composite.backend("one")
    from expertoken.modeling.backend import Generation

    answers = backend.complete(CONVERSATIONS, Generation(max_new_tokens=6, temperature=0.0))
    meta = composite.meta
    for conversation, answer in zip(CONVERSATIONS, answers, strict=True):
        query = meta.encode(conversation)
        output = copy.deepcopy(meta.plain).generate(**meta.pad([query]), max_new_tokens=6, do_sample=False)
        assert answer.text == meta.tokenizer.decode(output[0, len(query) :], skip_special_tokens=True)


def saved(folder, out, state="head"):
    pool = ExpertPool([Expert("one", model=str(folder), supports=("images",)), Expert("self", "self")])
    meta = MetaLLM.from_pretrained(Source(str(folder)), 2, device="cpu", state=StateSpec.parse(state))
    meta.rows = torch.randn(2, meta.row_width, generator=torch.Generator().manual_seed(1)) / 4
    composite = Composite(meta, pool, Manifest(describe_base(meta), ["one"]))
    save_composite(composite, out, verify=False)
    return composite


FRESH = """
import json, sys
from expertoken.modeling.composite import load_composite
from expertoken.modeling.pictures import Picture, part_of
composite = load_composite(sys.argv[1], device="cpu")
picture = Picture.of(open(sys.argv[2], "rb").read())
content = [part_of(picture), {"type": "text", "text": "What is it?"}]
query = composite.meta.encode([{"role": "user", "content": content}])
print(json.dumps(composite.meta.candidate_logits([query]).tolist()))
"""


@pytest.mark.parametrize("state", ["head", "1:both"])
def test_what_is_saved_decides_the_same_in_a_fresh_process(folder, tmp_path, state):
    composite = saved(folder, tmp_path / "c", state)
    (tmp_path / "picture.png").write_bytes(PICTURES[1].source)
    expected = composite.meta.candidate_logits([composite.meta.encode(CONVERSATIONS[3])])
    done = subprocess.run(
        [fresh.python(), "-c", FRESH, str(tmp_path / "c"), str(tmp_path / "picture.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=1e-4, rtol=1e-4)


def test_an_exported_checkpoint_decides_on_pictures_as_the_composite(folder, tmp_path):
    """The processor is exported too, so that a server can pass pictures to the model."""
    saved(folder, tmp_path / "c")
    prompts = [ask(f"What is it, number {count}?", Picture.of(picture(count))) for count in range(10)]
    export_checkpoint(tmp_path / "c", tmp_path / "out", prompts=prompts, device="cpu")
    assert json.loads((tmp_path / "out" / "expertoken_export.json").read_text())["decisions_equal"] >= 0.98
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor is not None


def test_self_of_a_meta_llm_that_sees_can_read_pictures(folder, tmp_path):
    composite = saved(folder, tmp_path / "c")
    assert load_composite(tmp_path / "c", device="cpu").pool["self"].capabilities == {"images"}
    assert composite.pool["self"].capabilities == {"images"}


def test_rows_at_a_lower_layer_read_the_pictures_too(folder):
    for spec in ("1:mean", "2:both"):
        meta = MetaLLM.from_pretrained(Source(str(folder)), 2, device="cpu", state=StateSpec.parse(spec))
        meta.rows = torch.randn(2, meta.row_width, generator=torch.Generator().manual_seed(2))
        queries = [meta.encode(ask("What is it?", one)) for one in PICTURES[:2]]
        together = meta.candidate_logits(queries)
        torch.testing.assert_close(
            together, torch.cat([meta.candidate_logits([q]) for q in queries]), atol=1e-4, rtol=1e-3
        )
        hidden = meta.states_behind(queries, [1, 2])[meta.state.layer][:, meta.state.columns(meta.head.in_features)]
        torch.testing.assert_close(hidden @ meta.rows.T, together, atol=1e-3, rtol=1e-3)


def test_a_family_that_can_not_be_read_safely_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics3", "vision_config": {}}))
    with pytest.raises(ExpertokenError, match="family idefics3 are not supported"):
        MetaLLM.from_pretrained(Source(str(tmp_path)), 2, device="cpu")


def test_an_address_of_a_picture_is_a_placeholder_and_not_fetched(seeing, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("something was fetched"))
    for url in ("http://127.0.0.1:9/a.png", "file:///etc/passwd", "/etc/passwd", "https://example.org/x.png"):
        for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image": url}):
            query = seeing.encode([{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}])
            assert query.media == ()
            assert "[image_url]" in seeing.tokenizer.decode(query.ids)


def test_a_picture_that_breaks_off_is_one_clear_error(seeing):
    url = f"data:image/png;base64,{base64.b64encode(PICTURES[0].source[:-200]).decode()}"
    with pytest.raises(
        ExpertokenError, match=r"messages\[0\]: picture 1: expected a picture in one of the formats PNG"
    ):
        seeing.encode([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
