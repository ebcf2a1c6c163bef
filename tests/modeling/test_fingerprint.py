import pytest
import torch
from transformers import AutoModelForCausalLM

from expertoken.modeling.fingerprint import fingerprint, fingerprints, same_model
from expertoken.tests.tiny import tiny_folder, tiny_model


def test_a_model_keeps_its_fingerprint_when_it_is_saved_and_loaded(tmp_path):
    base = tiny_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    assert fingerprint(model) == fingerprint(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"))


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("llama-tied", {"rms_norm_eps": 1e-3}),
        ("llama-tied", {"hidden_act": "gelu"}),
        ("llama-tied", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("cohere-scaled", {"logit_scale": 0.5}),
        ("mistral-window", {"sliding_window": 8}),
        ("gpt2", {"layer_norm_epsilon": 1e-3}),
    ],
)
def test_the_same_weights_with_another_configuration_are_another_model(architecture, change):
    model = tiny_model(architecture)
    before = fingerprint(model)
    for key, value in change.items():
        assert getattr(model.config, key) != value
        setattr(model.config, key, value)
    assert fingerprint(model) != before


@torch.no_grad()
def test_no_row_of_a_matrix_can_be_replaced_unseen():
    model = tiny_model("llama-untied")
    before = fingerprint(model)
    head = model.get_output_embeddings().weight
    for row in (0, 1, 100, 255, 510, 511):
        kept = head[row].clone()
        head[row] = torch.randn_like(kept)
        assert fingerprint(model) != before, row
        head[row] = kept
    assert fingerprint(model) == before


@pytest.mark.parametrize("trained", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_a_base_is_known_again_in_another_type_of_weights(trained, saved):
    def view(dtype):
        return tiny_model().to(saved).to(dtype)

    known = fingerprints(view(trained))
    loaded = [trained, torch.float32] if trained == torch.bfloat16 else [torch.float32, torch.float16]
    for dtype in loaded:
        assert same_model(view(dtype), known), dtype
    other = tiny_model(seed=1)
    assert not same_model(other.to(trained), known)
