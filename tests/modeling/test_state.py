import numpy as np
import pytest
import torch

from expertoken.inference.composite_model import CompositeModel
from expertoken.modeling.composite import Composite, Manifest, describe_base, load_composite
from expertoken.modeling.dispatch import dispatch_forward
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.loading import share_weights
from expertoken.modeling.logits import LogitTransform
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.saving import save_composite
from expertoken.modeling.source import Source
from expertoken.modeling.state import POOLINGS, StateSpec, candidates_for
from expertoken.modeling.states import cache_layers, cached_states, state_logits
from expertoken.tests.tiny import ARCHITECTURES, tiny_folder, tiny_pool

TEXTS = ("hello", "What is the capital of France?", "Compute 12 plus 30, please.", "self tokens and text " * 5)
HYBRIDS = ("lfm2", "falcon-h1", "mistral-window")


def meta_of(folder, state, count=3):
    return MetaLLM.from_pretrained(Source(str(folder)), count, device="cpu", state=StateSpec.parse(state))


def with_rows(meta):
    shape = (3, meta.row_width)
    meta.rows = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return meta


def columns_of(meta, values):
    return values[:, meta.state.columns(meta.head.in_features)]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *HYBRIDS])
def test_a_cut_model_gives_the_states_that_the_whole_one_has_there(tmp_path, architecture):
    base = tiny_folder(tmp_path / "base", architecture)
    for layer in (1, 2):
        meta = meta_of(base, f"{layer}:both")
        queries = [meta.encode(text) for text in TEXTS]
        cut, _ = meta.states(queries)
        torch.testing.assert_close(meta.states_behind(queries, [1, 2])[layer], cut, rtol=1e-4, atol=1e-4)
        alone = torch.cat([meta.states([query])[0] for query in queries])
        torch.testing.assert_close(alone, cut, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_the_last_layer_the_last_token_is_the_heads_own_state(tmp_path, architecture):
    base = tiny_folder(tmp_path / "base", architecture)
    whole, own = meta_of(base, "2:last"), meta_of(base, "head")
    queries = [own.encode(text) for text in TEXTS]
    torch.testing.assert_close(columns_of(whole, whole.states(queries)[0]), own.states(queries)[0])


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *HYBRIDS])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_models_logits_are_the_rows_products_with_the_cached_states(tmp_path, architecture, pooling):
    """The model's soft caps and scales do not apply, because they are made for the last layer's logits."""
    meta = with_rows(meta_of(tiny_folder(tmp_path / "base", architecture), f"1:{pooling}"))
    queries = [meta.encode(text) for text in TEXTS]
    states = cached_states(meta, queries)
    assert states.hidden.shape == (len(TEXTS), meta.row_width)
    expected = state_logits(meta.rows, states, meta.transform)
    assert meta.transform == LogitTransform()
    torch.testing.assert_close(meta.candidate_logits(queries), expected, rtol=1e-3, atol=1e-3)


def test_a_cut_model_has_its_lower_layers_only_and_the_whole_one_keeps_all(base_folder):
    meta = meta_of(base_folder, "1:mean")
    assert len(meta.model.model.layers) == meta.model.config.num_hidden_layers == 1
    assert len(meta.plain.model.layers) == meta.layers == 2
    weights = meta.model.model.layers[0].mlp.up_proj.weight
    assert weights is meta.plain.model.layers[0].mlp.up_proj.weight


def test_one_pass_fills_the_cache_of_every_layer(base_folder, monkeypatch):
    meta = meta_of(base_folder, "1:both")
    queries = [meta.encode(text) for text in (*TEXTS, TEXTS[0])]
    expected = {state: cached_states(meta_of(base_folder, state), queries).hidden for state in ("1:mean", "2:both")}
    monkeypatch.setenv("EXPERTOKEN_CACHE", str(base_folder.parent / "another"))
    cache_layers(meta, queries, [1, 2], max_tokens=None, label="states")
    for state, hidden in expected.items():
        found = cached_states(meta_of(base_folder, state), queries)
        assert found.computed == 0
        np.testing.assert_allclose(found.hidden, hidden, rtol=1e-4, atol=1e-5)


@pytest.fixture
def composite(base_folder):
    """Build a composite that reads a lower layer's mean. It chooses math for `hello` and self for the long text."""
    meta = meta_of(base_folder, "1:mean")
    hidden = cached_states(meta, [meta.encode(text) for text in TEXTS]).hidden
    wanted = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 9, 0], [0, 0, 9]])
    meta.rows = torch.linalg.lstsq(torch.from_numpy(np.ascontiguousarray(hidden)), wanted).solution.T
    return Composite(meta, tiny_pool(base_folder), Manifest(describe_base(meta), ["math", "law"]))


def test_the_upper_layers_run_only_where_self_answers(composite):
    model = CompositeModel(composite)
    ran = []
    composite.meta.plain.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    assert composite.meta.reader  # creating the reader passes one token through the whole model, once
    ran.clear()
    for text, name in zip(TEXTS[:3], ("math", "law", "law"), strict=True):
        question = model._question([{"role": "user", "content": text}], None, answer=True)
        [decision] = model._decider.decide([question])
        assert (decision.dispatch.expert, decision.own, ran) == (name, None, [])
    question = model._question([{"role": "user", "content": TEXTS[3]}], None, answer=True)
    [decision] = model._decider.decide([question])
    assert decision.dispatch.expert == "self"
    assert decision.own is not None
    assert ran == [1]


def test_selfs_answer_goes_on_from_the_pass_that_decided_it(composite):
    model = CompositeModel(composite)
    plain, tokenizer = share_weights(composite.meta.plain), composite.meta.tokenizer
    ids = tokenizer.apply_chat_template([{"role": "user", "content": TEXTS[3]}], add_generation_prompt=True)
    ids = torch.tensor([ids["input_ids"] if hasattr(ids, "keys") else ids])
    with torch.no_grad():
        expected = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    reply = model.chat(TEXTS[3], max_new_tokens=8)
    assert reply.expert == "self"
    assert reply.text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_batch_in_which_somebody_is_selfs_decides_as_each_alone(composite):
    model = CompositeModel(composite)
    questions = [model._question([{"role": "user", "content": text}], None, answer=True) for text in TEXTS]
    together = [decision.dispatch.expert for decision in model._decider.decide(questions)]
    assert together == ["math", "law", "law", "self"]


def test_a_saved_composite_decides_alike_in_a_fresh_process(composite, tmp_path, checked_at_once):
    save_composite(composite, tmp_path / "c", verify=True)
    again = load_composite(tmp_path / "c", device="cpu")
    assert again.meta.state == StateSpec(1, "mean")
    queries = [again.meta.encode(text) for text in TEXTS]
    torch.testing.assert_close(again.meta.candidate_logits(queries), composite.meta.candidate_logits(queries))


def test_a_state_is_a_layer_and_a_pooling():
    assert StateSpec.parse("head") == StateSpec()
    assert StateSpec.parse("16") == StateSpec.parse("16:last") == StateSpec(16, "last")
    assert str(StateSpec.parse("8:both")) == "8:both"
    for text in ("", "mean", "0:mean", "-1", "8:median", "8.5:last", "9" * 5000, 8, None):
        with pytest.raises(ExpertokenError, match=f"state: expected head, or LAYER:POOLING.*got {text!r}"):
            StateSpec.parse(text)


def test_rows_of_a_lower_layer_can_be_trained_as_they_are(base_folder):
    meta = meta_of(base_folder, "1:mean")
    assert not meta.rows.any()
    batch = meta.pad([meta.encode(text) for text in TEXTS])
    logits, _ = dispatch_forward(meta.model, **batch, pooling="mean")
    logits.sum().backward()
    assert meta.head.expert_rows.grad.abs().sum() > 0


def test_a_layer_that_the_model_has_not_is_refused(base_folder):
    with pytest.raises(ExpertokenError, match="expected one of the model's 2 layers, from 1 to 2, got 3"):
        meta_of(base_folder, "3:last")


def test_auto_tries_the_cheap_ones_first_and_of_whole_models_the_plain_one():
    specs = candidates_for(30)
    assert [str(spec) for spec in specs[:3]] == ["8:last", "8:mean", "8:both"]
    assert specs[-3] == StateSpec()
    layers = [spec.layer or 30 for spec in specs]
    assert layers == sorted(layers)


def test_nothing_is_handed_over_in_mid_answer_by_a_lower_layer(composite):
    with pytest.raises(ExpertokenError, match="anywhere: expected a composite whose rows read the head, found --state"):
        CompositeModel(composite, anywhere=True)


@pytest.mark.parametrize("architecture", ["llama-tied", "gemma2-softcap"])
def test_a_model_that_does_more_to_its_logits_than_is_known_is_refused(tmp_path, architecture, monkeypatch):
    base = tiny_folder(tmp_path / "base", architecture)
    meta = meta_of(base, "head")
    kind = type(meta.model)
    forward = kind.forward

    def scaled(self, *args, **options):
        output = forward(self, *args, **options)
        output.logits = output.logits * 0.25
        return output

    monkeypatch.setattr(kind, "forward", scaled)
    with pytest.raises(
        ExpertokenError, match=r"can't be read at layer 1 \(the logits or states of the cut model differ"
    ):
        meta.read_at(StateSpec(1), 3)


def test_states_that_are_not_finite_are_not_kept(base_folder, monkeypatch):
    meta = meta_of(base_folder, "1:mean")
    behind = type(meta).states_behind

    def broken(self, queries, layers):
        return {layer: states * float("nan") for layer, states in behind(self, queries, layers).items()}

    with monkeypatch.context() as patched:
        patched.setattr(type(meta), "states_behind", broken)
        with pytest.raises(ExpertokenError, match="no finite logits for the query ending in"):
            cache_layers(meta, [meta.encode(text) for text in TEXTS], [1, 2], max_tokens=None, label="states")
    assert cached_states(meta, [meta.encode(TEXTS[0])]).computed == 1
