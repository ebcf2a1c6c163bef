"""Training arguments, each documented once, here: `--help`, YAML files and the manual are made from these fields.

Imports no torch, so that `--help` answers at once.
"""

# ruff: noqa: RUF009 - `_option` makes a dataclass field, which is what belongs there

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..modeling.batching import MAX_TOKENS
from ..modeling.source import ATTENTION, DTYPES
from .objectives import OBJECTIVES

T = TypeVar("T")

METHODS = ("tokens", "lora", "qlora")
L2 = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""L2 strengths to try where none are given."""


def _option(default: T, text: str, choices: Iterable[str] | None = None) -> T:
    """Return a dataclass field with its help and, for the parser, its choices. Typed as the value it will hold."""
    metadata: dict[str, Any] = {"help": text} | ({} if choices is None else {"choices": list(choices)})
    made: Any = (
        field(default_factory=lambda: list(default), metadata=metadata)
        if isinstance(default, list)
        else field(default=default, metadata=metadata)
    )
    return made


@dataclass
class ExpertokenArguments:
    """What expertoken adds to `transformers.TrainingArguments`."""

    meta: str = field(metadata={"help": "The meta LLM: hub id, local folder or GGUF file."})
    data: str = field(metadata={"help": "Supervision folder, made by `expertoken prepare`."})
    out: str | None = _option(None, "Composite folder to write; needed.")
    method: str = _option(
        "tokens",
        "tokens: only the expert rows are trained, on states computed once. lora: LoRA on the backbone and the rows. "
        "qlora: the same on a backbone in 4 bits (NF4, double quantization; the head stays as it is).",
        METHODS,
    )
    objective: str | None = _option(
        None,
        "cross_entropy: to the label's distribution, one-hot or soft. correctness: one binary problem per expert. "
        "expected_score: the score of a choice drawn from the dispatch distribution. contrastive: the best candidates "
        "of a query against its worst (RouterDC). Default: what the labels were made for.",
        OBJECTIVES,
    )
    revision: str | None = _option(None, "Git revision of a hub model.")
    dtype: str | None = _option(
        None,
        "Type of the meta LLM's weights; auto is the saved type. Default: float32 on a CPU, else auto.",
        DTYPES,
    )
    attn_implementation: str | None = _option(
        None, "Implementation of attention. Default: what transformers chooses for the model.", ATTENTION
    )
    trust_remote_code: bool = _option(False, "Allow the meta LLM's repository to run its own code here.")
    max_tokens: int = _option(MAX_TOKENS, "tokens: padded tokens of one batch of the forward pass.")
    l2: list[float] = _option(
        list(L2),
        "tokens: L2 strengths to try; the one with the best validation score is kept.",
    )
    anywhere: int = _option(
        0,
        "Positions inside the meta LLM's own answer to each query that are learnt too, so that the rows know when to "
        "hand over in mid-answer and when to hold back. 0: only the start. Needs self in the pool.",
    )
    anywhere_tokens: int = _option(64, "anywhere: length of those answers, in tokens.")
    warm_start: bool = _option(
        True, "lora, qlora: start from the rows that method tokens finds, not from the descriptions."
    )
    lora_r: int = _option(8, "lora, qlora: rank.")
    lora_alpha: int = _option(16, "lora, qlora: scale is lora_alpha / lora_r.")
    lora_dropout: float = _option(0.05, "lora, qlora: dropout on the adapters' input.")
    lora_target_modules: list[str] = _option(["all-linear"], "lora, qlora: names of the layers to adapt.")
    rows_learning_rate: float | None = _option(
        None, "lora, qlora: learning rate of the expert rows. Default: learning_rate."
    )
    resume: str = _option(
        "auto",
        "lora, qlora: auto continues the last complete checkpoint of the same run in --out; never starts anew; or "
        "the path of a checkpoint.",
    )
    verify: bool = _option(
        True, "Load the saved composite in a fresh process and compare logits, where a second copy has room."
    )
