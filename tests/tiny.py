"""Tiny models and a tokenizer, made in the process: hermetic, random, with two layers."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from expertoken.data_prep.results import BenchmarkResults
from expertoken.modeling.experts import Expert
from expertoken.modeling.pool import ExpertPool

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
PIECES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|' + 'end' + '|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|' + 'assistant' + '|>' }}{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"]),
    "pieces": (PIECES, ["<|user|>", "<|assistant|>", "<|end|>"]),
}

_CORPUS = [
    "What is the capital of France? Compute 12 plus 30. Write an SQL query for the table customers.",
    "system user assistant model expert math law physics You are a helpful assistant. self tokens and text",
]


@lru_cache
def tiny_tokenizer(template: str = "chatml") -> t.PreTrainedTokenizerFast:
    text, specials = TEMPLATES[template]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [] if template == "pieces" else specials
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if template == "pieces":  # added, but not special
        added = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        added.add_tokens(specials)
        added.chat_template = text
        return added
    fast = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=specials[-1], pad_token=specials[-1])
    fast.add_special_tokens({"additional_special_tokens": specials})
    fast.chat_template = text
    return fast


_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_EOS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}


def _config(architecture: str) -> t.PretrainedConfig:
    common: dict[str, Any] = _SIZES | _EOS
    heads = {key: value for key, value in common.items() if key != "num_key_value_heads"}
    makers = {
        "llama-tied": lambda: t.LlamaConfig(**common, tie_word_embeddings=True),
        "llama-untied": lambda: t.LlamaConfig(**common, tie_word_embeddings=False),
        "qwen2": lambda: t.Qwen2Config(**common),
        "qwen3": lambda: t.Qwen3Config(**common, head_dim=8),
        "mistral": lambda: t.MistralConfig(**common, sliding_window=None),
        "phi3": lambda: t.Phi3Config(**common),
        "phi-bias": lambda: t.PhiConfig(**common),
        "gemma2-softcap": lambda: t.Gemma2Config(
            **common, head_dim=8, final_logit_softcapping=5.0, query_pre_attn_scalar=8
        ),
        "gemma3": lambda: t.Gemma3TextConfig(**common, head_dim=8, query_pre_attn_scalar=8),
        "cohere-scaled": lambda: t.CohereConfig(**common, logit_scale=0.25),
        "granite-scaled": lambda: t.GraniteConfig(**common, logits_scaling=4.0),
        "gpt-neox": lambda: t.GPTNeoXConfig(**heads),
        "mistral-window": lambda: t.MistralConfig(**common, sliding_window=16),
        "lfm2": lambda: t.Lfm2Config(**common, layer_types=["conv", "full_attention"]),
        "falcon-h1": lambda: t.FalconH1Config(
            **common, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=16
        ),
        "gpt2": lambda: t.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=512, **_EOS),
    }
    return makers[architecture]()


ARCHITECTURES = (
    "llama-tied",
    "llama-untied",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "phi-bias",
    "gemma2-softcap",
    "gemma3",
    "cohere-scaled",
    "granite-scaled",
    "gpt-neox",
    "gpt2",
)


def tiny_model(architecture: str = "llama-tied", seed: int = 0) -> t.PreTrainedModel:
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(_config(architecture)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the default weights are so small that soft caps and norms have no effect
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_folder(path: Path, architecture: str = "llama-tied", template: str = "chatml", seed: int = 0) -> Path:
    tiny_model(architecture, seed).save_pretrained(path)
    tiny_tokenizer(template).save_pretrained(path)
    return path


def tiny_pool(base: Path) -> ExpertPool:
    """Return a pool of two experts and self. The experts are the base itself, so that they can answer."""
    return ExpertPool(
        [
            Expert("math", model=str(base), description="Compute plus"),
            Expert("law", model=str(base), description="capital of France"),
            Expert("self", backend="self", results="meta"),
        ]
    )


def tiny_results() -> BenchmarkResults:
    """Return results of 120 queries in three benchmarks. Each benchmark has one model, which is right only there."""
    rows, scores = [], []
    for index in range(120):
        kind = index % 3
        prompt = (f"Compute {index} plus 3.", f"What is the law in case {index}?", f"Tell me something, take {index}.")
        rows.append((f"q{index}", prompt[kind], ("sums", "cases", "chats")[kind], None, None))
        scores.append([float(kind == column) for column in range(3)])
    frame = pd.DataFrame(rows, columns=["id", "prompt", "benchmark", "subject", "split"])
    return BenchmarkResults(frame, ["math", "law", "meta"], np.array(scores))
