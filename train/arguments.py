"""Training arguments, each documented once, here: `--help`, YAML files and the manual are made from these fields.

Imports no torch, so that `--help` answers at once.
"""

# ruff: noqa: RUF009 - `_option` makes a dataclass field, which is what belongs there

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
"""L2 strengths to try where none are given."""

_LEAST = {"max_tokens": 1, "context_tokens": 0, "anywhere": 0, "anywhere_tokens": 1, "lora_r": 1, "lora_alpha": 1}


def _option(default: T, text: str, choices: Iterable[str] | None = None) -> T:
    """Return a dataclass field with its help and, for the parser, its choices. Typed as the value it will hold."""
    metadata: dict[str, Any] = {"help": text} | ({} if choices is None else {"choices": list(choices)})
    made: Any = (
        field(default_factory=lambda: list(default), metadata=metadata)
        if isinstance(default, list)
        else field(default=default, metadata=metadata)
    )
    return made


def is_of(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type; a whole number is a float, too."""
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
    """What expertoken adds to `transformers.TrainingArguments`.

    Raises:
        ValueError: with every value that is of another type or too small.
    """

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
        "cross_entropy: to the label's distribution, one-hot or soft. correctness: each candidate's chance of being "
        "right. expected_score: the score of a choice drawn from the dispatch distribution. contrastive: the best "
        "candidates of a query against its worst (RouterDC). Default: what the labels were made for.",
        OBJECTIVES,
    )
    revision: str | None = _option(None, "Git revision of a hub model.")
    dtype: str | None = _option(
        None,
        "Type of the meta LLM's weights; auto is the saved type. Default: float32 on a CPU, else auto.",
        DTYPES,
    )
    quantization: str | None = _option(
        None,
        "tokens: load the meta LLM in 4 bits (nf4) or 8 (int8), where it does not fit otherwise. qlora is nf4 always.",
        QUANTIZATIONS,
    )
    attn_implementation: str | None = _option(
        None, "Implementation of attention. Default: what transformers chooses for the model.", ATTENTION
    )
    trust_remote_code: bool = _option(False, "Allow the meta LLM's repository to run its own code here.")
    max_tokens: int = _option(MAX_TOKENS, "tokens: padded tokens of one batch of the forward pass.")
    context_tokens: int = _option(
        1024,
        "Tokens that a decision reads of what surrounds the newest request: system prompt, earlier turns, tool "
        "results, the newest first. The request is read whole.",
    )
    state: str = _option(
        "head",
        "State that the expert rows read. head: that of the model's head at the last token. LAYER:POOLING: the state "
        "behind a lower layer, at the last token (16:last), its mean over all tokens (8:mean), or both; the layers "
        "above are computed only where the meta LLM itself answers. auto: five folds choose, the cheaper one where two "
        "tie.",
    )
    l2: list[float] = _option(
        list(L2),
        "tokens: L2 strengths to try; five folds choose the one with the least loss on the queries left out.",
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
