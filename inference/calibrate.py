"""Calibration of a composite's policy on its owner's own prompts, for a share of requests or a cost per request."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..modeling.errors import ExpertokenError
from ..modeling.policy import Policy
from ..modeling.states import cached_states, encode_all, state_logits
from .composite_model import CompositeModel

_BEYOND = 1.001
_NEAR = 0.02  # accepted distance from the requested share
_STEPS = 60  # steps of the bisection, which resolve a double to its last digit


@dataclass(frozen=True)
class Calibration:
    """The calibrated policy, and its effect on the calibration prompts.

    Attributes:
        policy: Calibrated policy.
        prompts: Number of prompts.
        share: Share of requests that experts answer instead of the default, 0 to 1.
        cost: Expected cost in USD per request.
        before: Expected cost in USD per request with the policy from training.
        shares: Share of requests by candidate. A server reports its distance from these shares.
    """

    policy: Policy
    prompts: int
    share: float
    cost: float
    before: float
    shares: dict[str, float]


def calibrate(
    composite: CompositeModel,
    prompts: Sequence[str],
    *,
    share: float | None = None,
    cost: float | None = None,
    default: str | None = None,
) -> Calibration:
    """Find a threshold for a share of requests, or a cost weight for a cost per request.

    An earlier calibration is ignored, because a threshold and a weight that were fitted separately do not fit each
    other.

    Args:
        composite: Composite whose policy is calibrated.
        prompts: Typical prompts of its users.
        share: Share of requests that may go to another candidate than the default, 0 to 1.
        cost: Average cost in USD per request, as estimated by `utility.expected_usd`.
        default: Name of the candidate that answers below the threshold. Defaults to self.

    Raises:
        ExpertokenError: Both or none of `share` and `cost` are set, the target can't be reached, no cost is known, or
            costs can't be weighed (see `Chooser.candidates`).
    """
    if (share is None) == (cost is None):
        raise ExpertokenError("calibrate: expected one of --share and --cost, got both or none")
    base = replace(composite.composite.trained_policy, default=default)
    # Before the forward passes, so that a wrong name fails early.
    composite.chooser.candidates(replace(base, cost_weight=1.0) if cost is not None else base)
    meta = composite.meta
    queries = encode_all(meta, prompts, "prompts")
    lengths = np.array([len(query) + query.cut for query in queries])
    states = cached_states(meta, queries, label="prompts")
    logits = state_logits(meta.rows, states, meta.transform)
    if share is not None:
        policy = _for_share(composite, base, logits, share)
    elif cost is not None:
        policy = _for_cost(composite, base, logits, lengths, cost)
    chosen = _choices(composite, policy, logits, lengths)
    fallback = policy.fallback(composite.pool)
    reached = float(np.mean([name != fallback for name in chosen]))
    if share is not None and abs(reached - share) > max(_NEAR, 1 / len(prompts)):
        raise ExpertokenError(
            f"--share {share}: the nearest threshold gives {reached:.2f}, since many prompts have the same probability "
            "(1.00 for the best expert, most likely). Nothing was changed."
        )
    return Calibration(
        policy,
        len(prompts),
        reached,
        _spent(composite, chosen, lengths),
        _spent(composite, _choices(composite, composite.composite.trained_policy, logits, lengths), lengths),
        {name: chosen.count(name) / len(chosen) for name in composite.pool.names},
    )


def _choices(composite: CompositeModel, policy: Policy, logits: torch.Tensor, lengths: np.ndarray) -> list[str]:
    return [
        composite.chooser.choose(policy, row, prompt_tokens=int(length)).expert
        for row, length in zip(logits, lengths, strict=True)
    ]


def _for_share(composite: CompositeModel, base: Policy, logits: torch.Tensor, share: float) -> Policy:
    if not 0 <= share <= 1:
        raise ExpertokenError(f"--share {share}: expected a number from 0 to 1")
    default = base.fallback(composite.pool)
    if default is None:
        raise ExpertokenError(
            "--share: expected self among the candidates, and it is missing. Name the default candidate with --default."
        )
    best = []  # best shares of the prompts on which another candidate than the default is best
    for row in logits:
        shares = composite.chooser.shares(base, row)
        winner = max(shares, key=shares.__getitem__)
        if winner != default:
            best.append(shares[winner])
    confident = np.sort(np.array(best))[::-1]
    wanted = round(share * len(logits))
    if wanted > len(confident):
        raise ExpertokenError(
            f"--share {share}: experts other than {default!r} are the best on {len(confident) / len(logits):.2f} of "
            "the prompts. Use a share up to that."
        )
    # Between the last prompt that goes to an expert and the first that does not.
    edges = np.concatenate([[1.0], confident, [0.0]])
    threshold = float((edges[wanted] + edges[wanted + 1]) / 2) if wanted else 1.0
    return replace(base, threshold=threshold)


def _for_cost(
    composite: CompositeModel, base: Policy, logits: torch.Tensor, lengths: np.ndarray, cost: float
) -> Policy:
    def spent(weight: float) -> float:
        return _spent(composite, _choices(composite, replace(base, cost_weight=weight), logits, lengths), lengths)

    if spent(0.0) <= cost:
        return base
    high = 1.0
    while spent(high) > cost:
        high *= 4
        if high > 1e15:
            raise ExpertokenError(
                f"--cost {cost:g}: expected at least {spent(high):.3g} USD per request, the cheapest decisions' cost"
            )
    low = 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > cost else (low, middle)
    # Slightly beyond the weight at which a prompt's decision flips: exactly there, the rounding of another batch would
    # flip it back.
    return replace(base, cost_weight=high * _BEYOND)


def _spent(composite: CompositeModel, chosen: Sequence[str], lengths: np.ndarray) -> float:
    """Return the average expected cost in USD per request."""
    place = {name: index for index, name in enumerate(composite.pool.names)}
    costs = [composite.chooser.usd(int(length))[place[name]] for name, length in zip(chosen, lengths, strict=True)]
    return float(np.mean(costs))
