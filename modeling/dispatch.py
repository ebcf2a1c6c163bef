"""The decision: a distribution over the candidates, computed at ONE position of the meta LLM."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .state import last_positions, pooled


def gives_chances(objective: str | None) -> bool:
    """Check whether an objective trains rows whose `sigmoid(logit)` is a candidate's chance of being right."""
    return objective == "correctness"


@dataclass(frozen=True)
class Dispatch:
    """Result of a decision: the candidate that answers, and the reason.

    Attributes:
        expert: Name of the chosen candidate.
        probabilities: Probability of each candidate by name, in pool order. They sum to 1.
        chances: Calibrated probability that each candidate's answer is right, by name. None for a composite that was
            trained for another objective than `correctness`, because it has no such estimate.
        reason: Reason in one line for people.
        ranking: Candidates in the order of their attempts: the chosen one, then its fallbacks.
    """

    expert: str
    probabilities: dict[str, float]
    reason: str
    ranking: tuple[str, ...]
    chances: dict[str, float] | None = None

    @classmethod
    def from_logits(cls, names: list[str], logits: torch.Tensor, *, chances: bool = False) -> "Dispatch":
        """Choose the candidate with the greatest logit.

        `p(k) = exp(l_k) / sum_j exp(l_j)` over the candidates. Under the objective `correctness` a logit is the
        log-odds of being right, so the most probable candidate is the one with the best chance.

        Args:
            names: Names of the candidates.
            logits: Logits of the candidates, `[C]`.
            chances: True if a logit is the log-odds of being right.
        """
        table = dict(zip(names, logits.softmax(-1).tolist(), strict=True))
        ranking = tuple(sorted(table, key=table.__getitem__, reverse=True))
        reason = f"{ranking[0]} has probability {table[ranking[0]]:.2f}"
        if len(ranking) > 1:
            reason += f", next is {ranking[1]} with {table[ranking[1]]:.2f}"
        right = dict(zip(names, logits.sigmoid().tolist(), strict=True)) if chances else None
        return cls(ranking[0], table, reason, ranking, right)


_SPATIAL: "WeakKeyDictionary[nn.Module, str | None]" = WeakKeyDictionary()


def positions(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return positions that do not count padding.

    Without explicit positions a left-padded GPT-2 gives different logits. Models that give pictures positions in three
    dimensions (M-RoPE) would compute their own, but they store a part of the result on the module. Another thread's
    pass may have changed that part before an answer continues.

    Args:
        model: Causal LM, wrapped or not.
        batch: `input_ids` and `attention_mask` `[N, T]`, and the tensors of pictures.

    Returns:
        Positions `[N, T]`, or `[3, N, T]` for M-RoPE.
    """
    mask = batch["attention_mask"]
    plain = (mask.cumsum(-1) - 1).clamp(min=0)
    if model not in _SPATIAL:
        named = (name for name, module in model.named_modules() if hasattr(module, "get_rope_index"))
        _SPATIAL[model] = next(named, None)
    spatial = _SPATIAL[model]
    if spatial is None:
        return plain
    if "mm_token_type_ids" not in batch:
        return plain.expand(3, -1, -1)
    index: Any = model.get_submodule(spatial).get_rope_index
    known = inspect.signature(index).parameters
    return index(**{key: value for key, value in batch.items() if key in known})[0]


def dispatch_forward(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, pooling: str = "last", **forward: Any
) -> tuple[torch.Tensor, Any]:
    """Run one forward pass that computes logits at the dispatch positions only, or their means over all positions.

    Running the backbone and then the head would miss the soft-capping and scales that models apply in between.

    Args:
        model: Causal LM whose head is an `ExpertHead`, wrapped (PEFT, DDP, DeepSpeed) or not.
        input_ids: Token ids `[N, T]`, padded on either side.
        attention_mask: Attention mask `[N, T]`.
        pooling: Pooling of the positions. See `state.StateSpec`. A model that is not cut is read at its last token.
        **forward: Further arguments of the model's forward, such as the pixels of pictures. Unless one is passed, there
            is no KV cache.

    Returns:
        Logits `[N, V + C]`, or `[N, C]` for a cut model, and the model's output.
    """
    read = {"input_ids": input_ids, "attention_mask": attention_mask}
    forward = {"use_cache": False} | forward
    if "position_ids" not in forward:
        forward["position_ids"] = positions(model, read | forward)
    if pooling != "last":
        output = model(**read, **forward)
        return pooled_logits(output.logits, attention_mask, pooling), output
    last = last_positions(attention_mask)
    keep, column = last.unique(return_inverse=True)
    output = model(**read, logits_to_keep=keep, **forward)
    return output.logits[torch.arange(len(input_ids), device=last.device), column], output


def pooled_logits(logits: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return the candidates' logits by pooling their logits at all positions.

    This is exact, because a mean of products is the product of the mean.

    Args:
        logits: Logits `[N, T, C]`. For `both` `[N, T, 2C]`: the logits of the rows' first halves, then of the second.
        attention_mask: Attention mask `[N, T]`.
        pooling: Pooling of the positions. See `state.StateSpec`.

    Returns:
        Logits `[N, C]`.
    """
    if pooling != "both":
        return pooled(logits, attention_mask, pooling)
    last, mean = logits.chunk(2, -1)
    return pooled(last, attention_mask, "last") + pooled(mean, attention_mask, "mean")


def candidate_logits(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the candidates' logits: the experts' logits, then self's if it is a candidate.

    Self has its own row. Z, the log of the ordinary vocabulary's mass, was rejected as self's logit. Z moves with the
    conversation (an earlier turn raises it by one nat on SmolLM2), while the experts' rows do not. It gives no chance
    of being right either.

    Args:
        logits: Logits of the vocabulary and the candidates, `[..., V + C]`.
        vocab_size: V, the size of the vocabulary in the logits. 0 for a cut model.

    Returns:
        Logits `[..., C]`, float32.
    """
    return logits[..., vocab_size:].float()
