import pytest
import torch

from expertoken.modeling.chat import Query
from expertoken.modeling.dispatch import dispatch_forward
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.head import ExpertHead, install_head
from expertoken.modeling.initialization import initial_row
from expertoken.modeling.loading import share_weights
from expertoken.modeling.logits import LogitTransform
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.source import Source
from expertoken.tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

IDS = torch.arange(20, 32)[None]


def with_rows(architecture, count=3):
    model = tiny_model(architecture)
    plain = share_weights(model)
    head = install_head(model, count)
    with torch.no_grad():
        head.expert_rows.normal_(generator=torch.Generator().manual_seed(1))
    return model, plain, head


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_vocabulary_keeps_its_logits_and_rows_pass_the_models_own_transform(architecture):
    model, plain, head = with_rows(architecture)
    captured = []
    head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    with torch.no_grad():
        logits = model(IDS).logits
        expected = plain(IDS).logits
    torch.testing.assert_close(logits[..., :512], expected, rtol=0, atol=1e-6)
    rows = LogitTransform.of(model.config)(captured[0] @ head.expert_rows.T)
    torch.testing.assert_close(logits[..., 512:], rows.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_reach_the_rows_and_tying_stays(architecture):
    model, plain, head = with_rows(architecture)
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    model.tie_weights()
    assert (model.get_input_embeddings().weight is head.weight) == tied
    model(IDS).logits[..., 512:].sum().backward()
    assert head.expert_rows.grad.abs().sum() > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_side_and_batch_do_not_change_a_decision(architecture):
    model, _, _ = with_rows(architecture)
    sequences = [list(range(10, 10 + length)) for length in (5, 12, 9)]
    longest = 12
    alone = []
    with torch.no_grad():
        for ids in sequences:
            one = torch.tensor([ids])
            alone.append(dispatch_forward(model, one, torch.ones_like(one))[0])
        for side in ("left", "right"):
            pads = [[0] * (longest - len(ids)) for ids in sequences]
            rows = [p + ids if side == "left" else ids + p for ids, p in zip(sequences, pads, strict=True)]
            marks = [[0] * len(p) + [1] * len(i) for i, p in zip(sequences, pads, strict=True)]
            masks = marks if side == "left" else [mark[::-1] for mark in marks]
            logits, _ = dispatch_forward(model, torch.tensor(rows), torch.tensor(masks))
            torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_give_the_same_logits_as_the_forward_pass(architecture):
    meta = MetaLLM(tiny_model(architecture), tiny_tokenizer(), Source(architecture), 2)
    meta.rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    sequences = [Query.of(range(20, 30)), Query.of(range(40, 47))]
    hidden, log_mass = meta.states(sequences)
    probed = meta.probe(sequences)
    torch.testing.assert_close(meta.transform(hidden @ meta.rows.T), probed[:, :2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_mass, probed[:, 2], rtol=1e-5, atol=1e-5)


def test_an_unknown_transform_behind_the_head_is_refused():
    meta = MetaLLM(tiny_model("cohere-scaled"), tiny_tokenizer(), Source("strange"), 1)
    meta.transform = LogitTransform()
    with pytest.raises(ExpertokenError, match="its forward changes them differently"):
        meta.states([Query.of([20, 21, 22])])


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "phi-bias"])
def test_generation_and_adapters_leave_the_head_alone(architecture):
    from peft import LoraConfig, get_peft_model

    model, plain, head = with_rows(architecture)
    with torch.no_grad():
        head.expert_rows.zero_().sub_(100)  # never the most likely token
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    text = plain.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    same = model.generate(IDS, attention_mask=torch.ones_like(IDS), suppress_tokens=[512, 513, 514], **options)
    assert same.tolist() == text.tolist()
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert isinstance(wrapped.get_output_embeddings(), ExpertHead)


def test_a_row_starts_at_its_description_or_at_the_mean_of_the_vocabulary():
    model = tiny_model()
    weight = model.get_output_embeddings().weight.detach()
    torch.testing.assert_close(initial_row(model, []), weight.mean(0))
    torch.testing.assert_close(initial_row(model, [7, 9, 7]), weight[[7, 9]].mean(0))


def test_a_head_that_is_not_linear_is_refused():
    model = tiny_model()
    model.set_output_embeddings(torch.nn.Identity())
    with pytest.raises(ExpertokenError, match="expected an nn.Linear output head"):
        install_head(model, 1)


def test_shared_weights_are_the_same_tensors_in_other_modules():
    model = tiny_model()
    view = share_weights(model)
    assert view is not model
    assert {p.data_ptr() for p in view.parameters()} == {p.data_ptr() for p in model.parameters()}


def test_rows_stay_float32_under_autocast():
    head = ExpertHead(torch.nn.Linear(64, 8, bias=False), 2)
    hidden = torch.randn(4, 64)
    with torch.no_grad():
        head.expert_rows.copy_(torch.randn(2, 64) * 10)
        exact = head(hidden)[:, 8:]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(head(hidden)[:, 8:], exact)
