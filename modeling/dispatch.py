"""The decision: a distribution over pool + self, read off ONE position of the meta LLM."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Dispatch:
    """Who answers, and why.

    Attributes:
        expert: name of the candidate chosen.
        probabilities: of every candidate by name, in pool order; they sum to 1.
        reason: one line for people.
        ranking: who is asked, in order: the one chosen, then who is next when it fails.
    """

    expert: str
    probabilities: dict[str, float]
    reason: str
    ranking: tuple[str, ...]

    @classmethod
    def from_probabilities(cls, names: list[str], probabilities: torch.Tensor) -> "Dispatch":
        """Choose the most probable candidate.

        Args:
            names: of the candidates.
            probabilities: `[C]`.
        """
        table = dict(zip(names, probabilities.tolist(), strict=True))
        ranking = tuple(sorted(table, key=table.__getitem__, reverse=True))
        reason = f"{ranking[0]} has probability {table[ranking[0]]:.2f}"
        if len(ranking) > 1:
            reason += f", next is {ranking[1]} with {table[ranking[1]]:.2f}"
        return cls(ranking[0], table, reason, ranking)


def last_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index of each row's last real token, `[N]`, whichever side is padded."""
    length = attention_mask.shape[1]
    return length - 1 - attention_mask.flip(1).argmax(1)


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that do not count padding, `[N, T]`: without them a left-padded GPT-2 gives other logits."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def dispatch_forward(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, **forward: Any
) -> tuple[torch.Tensor, Any]:
    """One forward pass that computes logits at the dispatch positions only.

    Not the backbone followed by the head: that would miss the soft-capping and scales that models apply in between.

    Args:
        model: a causal LM whose head is an `ExpertHead`, wrapped (PEFT, DDP, DeepSpeed) or not.
        input_ids: `[N, T]`, padded on either side.
        attention_mask: `[N, T]`.
        **forward: passed to the model's forward (a cache, for instance).

    Returns:
        logits `[N, V + K]` and the model's output.
    """
    last = last_positions(attention_mask)
    keep, column = last.unique(return_inverse=True)
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        logits_to_keep=keep,
        **forward,
    )
    return output.logits[torch.arange(len(input_ids), device=last.device), column], output


def candidate_logits(logits: torch.Tensor, vocab_size: int, *, with_self: bool) -> torch.Tensor:
    """Logits over the candidates: the experts', then Z, the log of the ordinary vocabulary's mass, for self.

    Args:
        logits: `[..., V + K]`.
        vocab_size: V.
        with_self: whether self is a candidate.

    Returns:
        `[..., K + 1]` with self, `[..., K]` without, float32.
    """
    experts = logits[..., vocab_size:].float()
    if not with_self:
        return experts
    ordinary = logits[..., :vocab_size].float().logsumexp(-1, keepdim=True)
    return torch.cat([experts, ordinary], dim=-1)


def dispatch_distribution(logits: torch.Tensor, vocab_size: int, *, with_self: bool) -> torch.Tensor:
    """`p(k) = exp(l_k) / (exp(Z) + sum_j exp(l_j))` and `p(self) = exp(Z) / (...)`; over experts alone without self.

    Shapes as in `candidate_logits`.
    """
    return candidate_logits(logits, vocab_size, with_self=with_self).softmax(-1)
