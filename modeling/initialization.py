"""Initialisation of expert rows."""

from typing import TYPE_CHECKING

import torch

from .head import output_head
from .sharding import gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def initial_row(model: "PreTrainedModel", description_ids: list[int]) -> torch.Tensor:
    """Return the initial value of an expert row: the mean head row of the description's tokens, or of the vocabulary.

    Args:
        model: Model of the meta LLM.
        description_ids: Token ids of the description. They may be empty.

    Returns:
        Row `[d]`, float32.
    """
    weight = output_head(model).weight
    with gathered([weight]):
        values = weight.detach()
        rows = values[torch.tensor(sorted(set(description_ids)), device=values.device)] if description_ids else values
        return rows.float().mean(0)
