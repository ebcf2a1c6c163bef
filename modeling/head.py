"""The output head with expert rows beside the vocabulary's."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .errors import ExpertokenError
from .sharding import full_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ExpertHead(nn.Linear):
    """The model's own output head plus one row per expert.

    It takes over the head's `weight` and `bias` Parameters (the same objects, so that tied models stay tied) and
    appends the experts' logits behind the vocabulary's V. Because it sits where the head sat, whatever the model's
    forward does to logits afterwards (soft-capping, scaling) is done to the experts' as well. Rejected: resizing the
    vocabulary, which changes the tokenizer and makes experts reachable by text, and PEFT's trainable tokens, which copy
    the vocabulary matrix at each forward and fail silently on untied models.

    Args:
        head: the model's output head.
        num_experts: K, the number of rows to append; they start at zero.

    Attributes:
        expert_rows: `[K, d]`, float32 whatever the model's dtype: they are what is trained, and they are kilobytes.

    Shapes: hidden states `[..., d]` to logits `[..., V + K]`.
    """

    def __init__(self, head: nn.Linear, num_experts: int) -> None:
        nn.Module.__init__(self)  # not Linear's: that would allocate a second vocabulary matrix
        self.out_features, self.in_features = full_shape(head.weight)
        self.weight = head.weight
        self.bias = head.bias
        rows = torch.zeros(num_experts, self.in_features, dtype=torch.float32, device=head.weight.device)
        self.expert_rows = nn.Parameter(rows)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the vocabulary, then of the experts."""
        vocabulary = F.linear(hidden, self.weight, self.bias)
        # Rows and their logits stay float32: bfloat16 has steps of 0.25 where Z lies, and near candidates would tie.
        # That widens the vocabulary's logits too, which is one row per query where a dispatch is decided or trained.
        # Without autocast, which would narrow them again under `--bf16`.
        with torch.autocast(hidden.device.type, enabled=False):
            experts = F.linear(hidden.float(), self.expert_rows.float())
        return torch.cat([vocabulary.float(), experts], dim=-1)


def output_head(model: "PreTrainedModel") -> nn.Linear:
    """Return the output head of a causal LM, typed: transformers promises a module only."""
    head: Any = model.get_output_embeddings()
    return head


def install_head(model: "PreTrainedModel", num_experts: int) -> ExpertHead:
    """Put an `ExpertHead` where the model's output head is, and return it.

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
    expert_head = ExpertHead(head, num_experts)
    model.set_output_embeddings(expert_head)
    return expert_head
