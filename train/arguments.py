"""Training arguments. Each is documented here only: `--help`, YAML files and the manual are made from these fields.

The module imports no torch, so that `--help` answers at once.
"""

# ruff: noqa: RUF009 - `_option` returns a dataclass field, the right default here

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..modeling.batching import MAX_TOKENS
from ..modeling.source import ATTENTION, DTYPES, QUANTIZATIONS
from .objectives import OBJECTIVES

T = TypeVar("T")

METHODS = ("tokens", "lora", "qlora")
L2 = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""L2 strengths to try by default."""

_LEAST = {
    "max_tokens": 1,
    "ray_workers": 0,
    "ray_cpus": 0,
    "ray_gpus": 0,
    "context_tokens": 0,
    "anywhere": 0,
    "anywhere_tokens": 1,
    "lora_r": 1,
    "lora_alpha": 1,
}


def _option(default: T, text: str, choices: Iterable[str] | None = None) -> T:
    """Return a dataclass field with its help and the parser's choices. Its type is that of the value it will hold."""
    metadata: dict[str, Any] = {"help": text} | ({} if choices is None else {"choices": list(choices)})
    made: Any = (
        field(default_factory=lambda: list(default), metadata=metadata)
        if isinstance(default, list)
        else field(default=default, metadata=metadata)
    )
    return made


def is_of(value: Any, hint: Any) -> bool:
    """Check whether a value is of an annotated type. A whole number is also a float."""
    inner = get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(is_of(item, inner[0]) for item in value)
    if inner:
        return any(is_of(value, one) for one in inner)
    return isinstance(value, int | float if hint is float else hint) and (hint is bool or not isinstance(value, bool))


def type_name(hint: Any) -> str:
    """Return an annotated type as it is written in Python."""
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


@dataclass
class ExpertokenArguments:
    """Training arguments of expertoken, in addition to `transformers.TrainingArguments`.

    Raises:
        ValueError: Values are of another type or too small. The message names all of them.
    """

    meta: str = field(metadata={"help": "Meta LLM: hub id, local folder or GGUF file."})
    data: str = field(metadata={"help": "Supervision folder, made by `expertoken prepare`."})
    out: str | None = _option(None, "Composite folder to write. Required.")
    method: str = _option(
        "tokens",
        "Training method. tokens: the expert rows alone, on states computed once. lora: LoRA on the backbone and the "
        "rows. qlora: the same on a backbone in 4 bits (NF4, double quantization). Its head is not quantized.",
        METHODS,
    )
    objective: str | None = _option(
        None,
        "Training objective. cross_entropy: cross-entropy to the label's distribution, one-hot or soft. correctness: "
        "each candidate's chance of being right. expected_score: the score of a candidate drawn from the dispatch "
        "distribution. contrastive: the best candidates of a query against its worst (RouterDC). Defaults to the "
        "objective that the labels were made for.",
        OBJECTIVES,
    )
    revision: str | None = _option(None, "Git revision of a hub model.")
    dtype: str | None = _option(
        None,
        "Type of the meta LLM's weights. auto: the saved type. Defaults to float32 on a CPU, else to auto.",
        DTYPES,
    )
    quantization: str | None = _option(
        None,
        "Quantization of the meta LLM for method tokens, if it does not fit otherwise: 4 bits (nf4) or 8 (int8). "
        "Method qlora always uses nf4.",
        QUANTIZATIONS,
    )
    attn_implementation: str | None = _option(
        None, "Implementation of attention. Defaults to the one that transformers chooses for the model.", ATTENTION
    )
    trust_remote_code: bool = _option(False, "Allow the meta LLM's repository to run its own code on this machine.")
    max_tokens: int = _option(MAX_TOKENS, "Padded tokens in one batch of the forward pass. For method tokens.")
    ray_workers: int = _option(
        0,
        "Workers on a Ray cluster that compute the states, each with the whole meta LLM (extra ray). 0: this process.",
    )
    ray_address: str | None = _option(None, "Address of the Ray cluster. Defaults to a new local cluster.")
    ray_cpus: float = _option(1.0, "CPUs per Ray worker.")
    ray_gpus: float = _option(0.0, "GPUs per Ray worker.")
    context_tokens: int = _option(
        1024,
        "Tokens that a decision reads from the context of the newest request: system prompt, earlier turns and tool "
        "results, the newest first. The request itself is always read whole.",
    )
    state: str = _option(
        "head",
        "State that the expert rows read. head: the input of the model's head at the last token. LAYER:POOLING: the "
        "state behind a lower layer, at the last token (16:last), as the mean over all tokens (8:mean), or both "
        "(8:both). The layers above are computed only if the meta LLM itself answers. auto: the best state by five "
        "folds, the cheapest of those that tie.",
    )
    l2: list[float] = _option(
        list(L2),
        "L2 strengths to try for the expert rows. Five folds choose the one with the least loss on held-out queries.",
    )
    anywhere: int = _option(
        0,
        "Positions to learn inside the meta LLM's own answer to each query, so that the rows learn when to hand over "
        "in mid-answer and when to hold back. 0: the start alone. Needs self in the pool.",
    )
    anywhere_tokens: int = _option(64, "Length in tokens of the answers that --anywhere reads.")
    warm_start: bool = _option(
        True, "Start lora and qlora from the rows that method tokens finds, instead of from the descriptions."
    )
    lora_r: int = _option(8, "Rank of the LoRA adapters. For lora and qlora.")
    lora_alpha: int = _option(
        16, "Numerator of the LoRA adapters' scale, which is lora_alpha / lora_r. For lora and qlora."
    )
    lora_dropout: float = _option(0.05, "Dropout on the LoRA adapters' input. For lora and qlora.")
    lora_target_modules: list[str] = _option(["all-linear"], "Names of the layers to adapt. For lora and qlora.")
    rows_learning_rate: float | None = _option(
        None, "Learning rate of the expert rows. For lora and qlora. Defaults to learning_rate."
    )
    resume: str = _option(
        "auto",
        "Checkpoint to resume lora or qlora from: auto, never or a path. auto continues the last complete checkpoint "
        "of the same run in --out. never starts a new run.",
    )
    verify: bool = _option(
        True, "Load the saved composite in a fresh process and compare logits, if a second copy fits in memory."
    )

    def __post_init__(self) -> None:
        mistakes = []
        for name, hint in get_type_hints(type(self)).items():
            if isinstance(value := getattr(self, name), tuple):
                setattr(self, name, value := list(value))
            if not is_of(value, hint):
                mistakes.append(f"{name}: expected {type_name(hint)}, got {value!r}")
            elif name in _LEAST and value < _LEAST[name]:
                mistakes.append(f"{name}: expected {_LEAST[name]} or more, got {value}")
            elif name == "l2" and not (value and all(0 <= strength < math.inf for strength in value)):
                mistakes.append(f"l2: expected one or more numbers of 0 or more, got {value}")
            elif name == "rows_learning_rate" and value is not None and not 0 < value < math.inf:
                mistakes.append(f"rows_learning_rate: expected a number above 0, got {value}")
        if mistakes:
            raise ValueError("; ".join(mistakes))
