"""The output head with one row per candidate beside the vocabulary's rows."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from .errors import ExpertokenError
from .sharding import full_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ExpertHead(nn.Linear):
    """The model's own output head with one more row per candidate: the experts, then self if it is a candidate.

    It shares the head's `weight` and `bias` Parameters (the same objects, so that tied models stay tied). It appends
    the candidates' logits behind the vocabulary's V. It replaces the head, so the model's forward applies its
    soft-capping and scaling to the candidates' logits too.

    Two alternatives were rejected. Resizing the vocabulary changes the tokenizer and makes experts reachable by text.
    PEFT's trainable tokens copy the vocabulary matrix at each forward and fail silently on untied models.

    Args:
        head: Output head of the model.
        num_candidates: C, the number of rows to append. They start at zero.
        vocabulary: If true, the vocabulary's logits are computed. Behind a lower layer they mean nothing.
        parts: P, the number of states side by side that a row reads. See `state.StateSpec`.

    Attributes:
        expert_rows: Rows `[C, P d]`, float32 whatever the model's dtype. They are trained, and take kilobytes only.

    Shapes: hidden states `[..., d]` to logits `[..., V + P C]`. For P = 2 the logits of the rows' first halves come
    first.
    """

    def __init__(self, head: nn.Linear, num_candidates: int, *, vocabulary: bool = True, parts: int = 1) -> None:
        nn.Module.__init__(self)  # Linear's would allocate a second vocabulary matrix
        self.out_features, self.in_features = full_shape(head.weight)
        self.weight = head.weight
        self.bias = head.bias
        self.vocabulary, self.parts = vocabulary, parts
        rows = torch.zeros(num_candidates, parts * self.in_features, dtype=torch.float32, device=head.weight.device)
        self.expert_rows = nn.Parameter(rows)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of the vocabulary, then of the candidates."""
        # Rows and their logits stay float32: at the size of Z bfloat16 has steps of 0.25, and near candidates would
        # tie. This widens the vocabulary's logits too, which are one row per query in a decision or in training.
        # Autocast is off, because it would narrow them again under `--bf16`.
        with torch.autocast(hidden.device.type, enabled=False):
            rows = self.expert_rows.float()
            rows = rows if self.parts == 1 else torch.cat(rows.chunk(self.parts, dim=1))
            candidates = F.linear(hidden.float(), rows)
        if not self.vocabulary:
            return candidates
        vocabulary = F.linear(hidden, self.weight, self.bias)
        return torch.cat([vocabulary.float(), candidates], dim=-1)


def output_head(model: "PreTrainedModel") -> nn.Linear:
    """Return the output head of a causal LM with its type, because transformers annotates a module only."""
    head: Any = model.get_output_embeddings()
    return head


def install_head(
    model: "PreTrainedModel", num_candidates: int, *, vocabulary: bool = True, parts: int = 1
) -> ExpertHead:
    """Replace the model's output head by an `ExpertHead`, and return it. Arguments as for `ExpertHead`.

    Raises:
        ExpertokenError: The model's head is not an `nn.Linear` (a quantized head, or no language model).
    """
    head = output_head(model)
    if not isinstance(head, nn.Linear) or len(full_shape(head.weight)) != 2:
        kind = type(head).__name__
        raise ExpertokenError(
            f"{type(model).__name__}: expected an nn.Linear output head, got {kind}. Use a causal LM whose head is not "
            "quantized"
        )
    expert_head = ExpertHead(head, num_candidates, vocabulary=vocabulary, parts=parts)
    model.set_output_embeddings(expert_head)
    return expert_head
