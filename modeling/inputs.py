"""What a model reads: queries as a batch of tensors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from .chat import Query
    from .sight import Sight


def padded(
    queries: "Sequence[Query]", sight: "Sight | None", device: torch.device | str, dtype: torch.dtype
) -> dict[str, Any]:
    """Return a left-padded batch: `input_ids` and `attention_mask`, `[N, T]` each, and what a model sees beside them.

    Left, so that all dispatch positions fall into one column and one row of logits per query is computed.

    Args:
        queries: N queries.
        sight: what sees for the model, or None.
        device: device of the batch.
        dtype: type of the pixels.
    """
    longest = max(map(len, queries))
    # Which id pads does not matter: it is masked. 0 exists in every vocabulary, a pad token does not.
    ids = np.zeros((len(queries), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, query in enumerate(queries):
        ids[row, longest - len(query) :] = query.ids
        mask[row, longest - len(query) :] = 1
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if sight is not None and any(query.media for query in queries):
        batch |= sight.inputs([query.media for query in queries], ids)
    return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in batch.items()}
