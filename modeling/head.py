"""The output head with a row per candidate beside the vocabulary's."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .errors import ExpertokenError
from .sharding import full_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ExpertHead(nn.Linear):
    """The model's own output head plus one row per candidate: the experts, then self where it is one.

    It takes over the head's `weight` and `bias` Parameters (the same objects, so that tied models stay tied) and
    appends the candidates' logits behind the vocabulary's V. Because it sits where the head sat, whatever the model's
    forward does to logits afterwards (soft-capping, scaling) is done to the candidates' as well. Rejected: resizing the
    vocabulary, which changes the tokenizer and makes experts reachable by text, and PEFT's trainable tokens, which copy
    the vocabulary matrix at each forward and fail silently on untied models.

    Args:
        head: the model's output head.
        num_candidates: C, the number of rows to append; they start at zero.
        vocabulary: whether to compute the vocabulary's logits. Behind a lower layer they mean nothing.
        parts: P, the states that a row reads side by side; see `state.StateSpec`.

    Attributes:
        expert_rows: `[C, P d]`, float32 whatever the model's dtype: they are what is trained, and they are kilobytes.

    Shapes: hidden states `[..., d]` to logits `[..., V + P C]`: for P = 2 those of the rows' first halves come first.
    """

    def __init__(self, head: nn.Linear, num_candidates: int, *, vocabulary: bool = True, parts: int = 1) -> None:
        nn.Module.__init__(self)  # not Linear's: that would allocate a second vocabulary matrix
        self.out_features, self.in_features = full_shape(head.weight)
        self.weight = head.weight
        self.bias = head.bias
        self.vocabulary, self.parts = vocabulary, parts
        rows = torch.zeros(num_candidates, parts * self.in_features, dtype=torch.float32, device=head.weight.device)
        self.expert_rows = nn.Parameter(rows)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits of the vocabulary, then of the candidates."""
        # Rows and their logits stay float32: bfloat16 has steps of 0.25 where Z lies, and near candidates would tie.
        # That widens the vocabulary's logits too, which is one row per query where a dispatch is decided or trained.
        # Without autocast, which would narrow them again under `--bf16`.
        with torch.autocast(hidden.device.type, enabled=False):
            rows = self.expert_rows.float()
            rows = rows if self.parts == 1 else torch.cat(rows.chunk(self.parts, dim=1))
            candidates = F.linear(hidden.float(), rows)
        if not self.vocabulary:
            return candidates
        vocabulary = F.linear(hidden, self.weight, self.bias)
        return torch.cat([vocabulary.float(), candidates], dim=-1)


def output_head(model: "PreTrainedModel") -> nn.Linear:
    """Return the output head of a causal LM, typed: transformers promises a module only."""
    head: Any = model.get_output_embeddings()
    return head


def install_head(
    model: "PreTrainedModel", num_candidates: int, *, vocabulary: bool = True, parts: int = 1
) -> ExpertHead:
    """Put an `ExpertHead` where the model's output head is, and return it. Arguments as `ExpertHead`.

    Raises:
        ExpertokenError: the model's head is not an `nn.Linear` (a quantized head, or no language model).
    """
    head = output_head(model)
    if not isinstance(head, nn.Linear) or len(full_shape(head.weight)) != 2:
        kind = type(head).__name__
        raise ExpertokenError(
            f"{type(model).__name__}: expected an nn.Linear output head, got {kind}; use a causal LM whose head is not "
            "quantized"
        )
    expert_head = ExpertHead(head, num_candidates, vocabulary=vocabulary, parts=parts)
    model.set_output_embeddings(expert_head)
    return expert_head
