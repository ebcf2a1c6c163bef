"""The input of a model: queries as a batch of tensors."""

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
    """Return a left-padded batch: `input_ids` and `attention_mask`, `[N, T]` each, and the tensors of pictures.

    With padding on the left all dispatch positions share one column, and one row of logits per query is computed.

    Args:
        queries: N queries.
        sight: Picture processor of the model, or None.
        device: Device of the batch.
        dtype: Type of the pixels.
    """
    longest = max(map(len, queries))
    # The padding id is masked, so any id serves. Every vocabulary has id 0, but not every one has a pad token.
    ids = np.zeros((len(queries), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, query in enumerate(queries):
        ids[row, longest - len(query) :] = query.ids
        mask[row, longest - len(query) :] = 1
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if sight is not None and any(query.media for query in queries):
        batch |= sight.inputs([query.media for query in queries], ids)
    return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in batch.items()}
