"""What a choice is worth: the chance that its answer is right, less what it costs.

One formula for labels, reports, calibration and serving, so that a point of a report's curve is the behaviour that is
served.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .experts import Expert

OUTPUT_TOKENS = 300
"""Length of an answer, in tokens, where costs are weighed before anything is answered."""


def utility(quality: np.ndarray, usd: np.ndarray | None, cost_weight: float) -> np.ndarray:
    """Return `quality - cost_weight * usd` (RouterBench, arXiv 2403.12031, section 3), without any clamp.

    Args:
        quality: `[..., C]` scores or chances of being right.
        usd: `[..., C]` cost of each candidate's answer, without gaps; None where `cost_weight` is 0.
        cost_weight: lambda, score per USD.
    """
    if usd is None or cost_weight == 0:
        return quality
    return (quality - cost_weight * usd).astype(quality.dtype)


def priced(usd: np.ndarray) -> np.ndarray:
    """Return costs `[..., C]` in which a candidate of unknown cost is as dear as the dearest known one.

    As free it would win for not saying what it costs; an error would let one candidate stop all the others.
    """
    known = np.where(np.isnan(usd), -np.inf, usd).max(-1, keepdims=True)
    return np.where(np.isnan(usd), np.where(np.isinf(known), 0.0, known), usd)


def expected_usd(
    experts: Sequence[Expert],
    prompt_tokens: int,
    measured: Mapping[str, float],
    cached: Mapping[str, int] | None = None,
) -> np.ndarray:
    """Return what each candidate is expected to cost on a request, `[C]` USD, NaN where nothing is known.

    The pool's price comes first, then the mean cost in the results that the composite was trained on. A model that runs
    here without a price is free.

    Args:
        experts: the candidates.
        prompt_tokens: tokens of the request.
        measured: mean USD of an answer by candidate, from results.
        cached: tokens of the request that a candidate has cached, by name.
    """
    found = []
    for expert in experts:
        price = expert.price(prompt_tokens, OUTPUT_TOKENS, (cached or {}).get(expert.name, 0))
        if price is None:
            price = measured.get(expert.name, np.nan if expert.kind.priced else 0.0)
        found.append(price)
    return np.array(found)
