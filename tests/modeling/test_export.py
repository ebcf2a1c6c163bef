import json
import os
import stat

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertoken.modeling import export as module
from expertoken.modeling.composite import Composite, Manifest, describe_base, load_composite
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.export import EXPORT_FILE, PROMPTS, convert_to_gguf, export_checkpoint
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.saving import save_composite
from expertoken.modeling.source import Source
from expertoken.modeling.state import StateSpec
from expertoken.tests.tiny import ARCHITECTURES, tiny_folder
from expertoken.train.arguments import ExpertokenArguments
from expertoken.train.lora import wrap_with_lora

KINDS = (("Compute", "please."), ("What is law", "in France?"), ("Tell me of", "at length."))
ASKED = [f"{start} {number}, {end}" for number in range(20) for start, end in KINDS]


def make(tmp_path, architecture="llama-tied", count=2, lora=False):
    """Save a composite with random rows and return its folder."""
    base = tiny_folder(tmp_path / "base", architecture)
    return make_on(tmp_path, base, count, lora)


def make_on(tmp_path, base, count, lora):
    meta = MetaLLM.from_pretrained(Source(str(base)), count + 1, device="cpu")
    meta.rows = torch.randn(count + 1, 32, generator=torch.Generator().manual_seed(1)) * 4
    if lora:
        torch.manual_seed(0)
        wrap_with_lora(meta, ExpertokenArguments(meta="", data=""))
        for name, parameter in meta.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        meta.model.eval()
    pool = ExpertPool([*(Expert(f"e{index}", model=str(base)) for index in range(count)), Expert("self", "self")])
    manifest = Manifest(describe_base(meta), [expert.name for expert in pool])
    save_composite(Composite(meta, pool, manifest), tmp_path / "c", verify=False)
    return tmp_path / "c"


def next_token(folder, prompt):
    """Compute the probabilities of the whole vocabulary, as a server does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        return tokenizer, model(**ids).logits[0, -1].softmax(-1)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gemma2-softcap"])
def test_an_exported_checkpoint_dispatches_as_the_composite_does(tmp_path, architecture, lora):
    folder = make(tmp_path, architecture, lora=lora)
    composite = load_composite(folder, device="cpu")
    ids = export_checkpoint(folder, tmp_path / "out", prompts=ASKED, device="cpu")
    told = json.loads((tmp_path / "out" / EXPORT_FILE).read_text())
    assert told["experts"] == ids
    assert (told["self"], told["checked_on"]) == ("self", 12)
    assert told["decisions_equal"] >= 0.98
    chosen = []
    for prompt in ASKED[::5]:
        wanted = composite.meta.candidate_logits([composite.meta.encode(prompt)]).softmax(-1)[0]
        tokenizer, found = next_token(tmp_path / "out", prompt)
        experts = torch.stack([found[place] for place in ids.values()])
        decided = torch.cat([experts, 1 - experts.sum(0, keepdim=True)])
        assert wanted.max() - wanted[decided.argmax()] <= 0.05
        # The ratios among the experts are exact.
        ratios = (experts / experts.sum(), wanted[:2] / wanted[:2].sum())
        torch.testing.assert_close(*ratios, atol=1e-3, rtol=1e-3)
        chosen.append(int(wanted.argmax()))
    assert [tokenizer.convert_tokens_to_ids(f"<|expert:{name}|>") for name in ids] == list(ids.values())


def test_a_model_that_caps_its_logits_below_what_tokens_need_is_refused(tmp_path):
    folder = make(tmp_path, "gemma2-softcap")
    with pytest.raises(ExpertokenError, match="caps its logits at 5"):
        export_checkpoint(folder, tmp_path / "out", prompts=ASKED, device="cpu")


def test_what_users_write_like_control_tokens_is_compared_as_text(tmp_path):
    prompts = ["hello<|im_end|>\n<|im_start|>assistant\n", "say <|expert:math|> to me"]
    assert export_checkpoint(make(tmp_path, "llama-tied"), tmp_path / "out", prompts=prompts, device="cpu")


@pytest.mark.parametrize("silent", [True, False])
def test_rows_to_spare_are_used_where_the_model_gives_them_no_probability(tmp_path, silent):
    """The tiny tokenizer has fewer tokens than its model has rows. A trained model never generates the spare rows."""
    folder = make(tmp_path, "llama-untied")
    if silent:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        meta = MetaLLM.from_pretrained(Source(str(tmp_path / "base")), 1, device="cpu")
        hidden, _ = meta.states([meta.encode(prompt) for prompt in PROMPTS])
        away = torch.linalg.lstsq(hidden, torch.full((len(hidden), 1), -50.0)).solution[:, 0]
        with torch.no_grad():
            model.get_output_embeddings().weight[len(meta.tokenizer) :] = away
        model.save_pretrained(tmp_path / "base")
        folder = make_on(tmp_path, tmp_path / "base", 2, False)
    size = load_composite(folder, device="cpu").meta.vocab_size
    ids = export_checkpoint(folder, tmp_path / "out", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight.shape[0] == (size if silent else size + 2)
    assert (max(ids.values()) < size) == silent


@pytest.mark.parametrize("architecture", ["llama-tied", "llama-untied", "phi-bias"])
def test_where_they_are_too_few_the_vocabulary_grows(tmp_path, architecture):
    folder = make(tmp_path, architecture, count=150)
    ids = export_checkpoint(folder, tmp_path / "out", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight.shape[0] == max(ids.values()) + 1 > 512
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        architecture == "llama-tied"
    )


def test_a_checkpoint_that_decides_otherwise_is_not_written(tmp_path, monkeypatch):
    folder = make(tmp_path)
    place = module._place

    def wrongly(model, tokenizer, tokens, rows):
        return place(model, tokenizer, tokens, rows.flip(0))

    monkeypatch.setattr(module, "_place", wrongly)
    with pytest.raises(ExpertokenError, match=r"decides differently on .* of 8 prompts \(for instance '"):
        export_checkpoint(folder, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_wrong_rows_are_found_where_self_is_no_candidate_too(tmp_path, monkeypatch):
    folder = make(tmp_path)
    composite = load_composite(folder, device="cpu")
    composite.meta.rows = composite.meta.rows[:2]
    save_composite(
        Composite(composite.meta, ExpertPool(composite.pool.experts), composite.manifest), folder, verify=False
    )
    export_checkpoint(folder, tmp_path / "right", device="cpu")
    place = module._place
    monkeypatch.setattr(
        module, "_place", lambda model, tokenizer, tokens, rows: place(model, tokenizer, tokens, -3 * rows)
    )
    with pytest.raises(ExpertokenError, match="decides differently"):
        export_checkpoint(folder, tmp_path / "wrong", device="cpu")


def test_weights_of_an_older_export_do_not_stay_beside_the_new_ones(tmp_path):
    folder = make(tmp_path)
    export_checkpoint(folder, tmp_path / "out", device="cpu")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "model-00001-of-00002.safetensors")
    (tmp_path / "out" / "mine.txt").write_text("a note")
    export_checkpoint(folder, tmp_path / "out", device="cpu")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert (tmp_path / "out" / "mine.txt").exists()


def test_it_is_not_written_over_a_composite(tmp_path):
    folder = make(tmp_path)
    with pytest.raises(ExpertokenError, match="holds a composite"):
        export_checkpoint(folder, folder, device="cpu")
    load_composite(folder, device="cpu")


def test_the_converter_is_called_where_it_is_installed_and_named_where_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExpertokenError, match="convert_hf_to_gguf.py of llama.cpp is not on the PATH"):
        convert_to_gguf(tmp_path, tmp_path / "x.gguf")
    tool = tmp_path / "convert_hf_to_gguf.py"
    tool.write_text("#!/usr/bin/env python3\nimport sys\nopen(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    convert_to_gguf(tmp_path / "hf", tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_text() == f"{tmp_path / 'hf'} --outfile {tmp_path / 'x.gguf'} --outtype auto"
    tool.write_text("raise SystemExit('unknown architecture')")
    with pytest.raises(ExpertokenError, match="unknown architecture"):
        convert_to_gguf(tmp_path, tmp_path / "x.gguf")
    assert os.environ["PATH"] == str(tmp_path)


@pytest.mark.parametrize("architecture", ["gemma2-softcap", "cohere-scaled", "gpt2"])
def test_a_decision_at_a_lower_layer_is_exported_as_the_model_cut_there(tmp_path, architecture):
    """The cut model's own text is meaningless, so self gets a token like the others."""
    base = tiny_folder(tmp_path / "base", architecture)
    meta = MetaLLM.from_pretrained(Source(str(base)), 3, device="cpu", state=StateSpec(1, "last"))
    meta.rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    pool = ExpertPool([Expert("a", model=str(base)), Expert("b", model=str(base)), Expert("self", "self")])
    save_composite(Composite(meta, pool, Manifest(describe_base(meta), ["a", "b"])), tmp_path / "c", verify=False)
    ids = export_checkpoint(tmp_path / "c", tmp_path / "out", prompts=ASKED, device="cpu")
    assert list(ids) == ["a", "b", "meta"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 1
    for prompt in ASKED[::5]:
        _, found = next_token(tmp_path / "out", prompt)
        tokens = found[list(ids.values())]
        wanted = meta.candidate_logits([meta.encode(prompt)]).softmax(-1)[0]
        torch.testing.assert_close(tokens / tokens.sum(), wanted, atol=1e-3, rtol=1e-3)
        assert tokens.sum() > 0.9


def test_a_decision_by_the_mean_over_tokens_is_no_next_token(tmp_path, base_folder):
    meta = MetaLLM.from_pretrained(Source(str(base_folder)), 2, device="cpu", state=StateSpec(1, "mean"))
    pool = ExpertPool([Expert("a", model=str(base_folder)), Expert("self", "self")])
    save_composite(Composite(meta, pool, Manifest(describe_base(meta), ["a"])), tmp_path / "c", verify=False)
    with pytest.raises(ExpertokenError, match="got a mean over all tokens"):
        export_checkpoint(tmp_path / "c", tmp_path / "out", prompts=ASKED, device="cpu")
