"""Utility of a candidate: the chance that its answer is right, minus its weighted cost.

Labels, reports, calibration and serving share one formula, so that a point of a report's curve is the behaviour that is
served.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .experts import Expert

OUTPUT_TOKENS = 300
"""Expected length of an answer, in tokens, for the costs in a decision."""


def utility(quality: np.ndarray, usd: np.ndarray | None, cost_weight: float) -> np.ndarray:
    """Return `quality - cost_weight * usd` (RouterBench, arXiv 2403.12031, section 3), without any clamp.

    Args:
        quality: Scores or chances of being right, `[..., C]`.
        usd: Cost of each candidate's answer, `[..., C]`, without gaps. It may be None if `cost_weight` is 0.
        cost_weight: Weight of the cost (lambda), score per USD.
    """
    if usd is None or cost_weight == 0:
        return quality
    return (quality - cost_weight * usd).astype(quality.dtype)


def priced(usd: np.ndarray) -> np.ndarray:
    """Return costs `[..., C]` in which a candidate of unknown cost costs as much as the most expensive known one.

    A cost of 0 would reward a missing price. An error would let one candidate block all the others.
    """
    known = np.where(np.isnan(usd), -np.inf, usd).max(-1, keepdims=True)
    return np.where(np.isnan(usd), np.where(np.isinf(known), 0.0, known), usd)


def expected_usd(
    experts: Sequence[Expert],
    prompt_tokens: int,
    measured: Mapping[str, float],
    cached: Mapping[str, int] | None = None,
) -> np.ndarray:
    """Return each candidate's expected cost of a request, `[C]` USD, with NaN for unknown costs.

    The pool's price comes first, then the mean cost in the results that the composite was trained on. A model in this
    process without a price is free.

    Args:
        experts: Candidates in pool order.
        prompt_tokens: Tokens of the request.
        measured: Mean USD of an answer by candidate, from results.
        cached: Tokens of the request that a candidate has cached, by name.
    """
    found = []
    for expert in experts:
        price = expert.price(prompt_tokens, OUTPUT_TOKENS, (cached or {}).get(expert.name, 0))
        if price is None:
            price = measured.get(expert.name, np.nan if expert.kind.priced else 0.0)
        found.append(price)
    return np.array(found)
