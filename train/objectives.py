"""Training objectives over the candidates' logits. Each takes the same arguments and returns a sum and its mass.

The loss is `sum / mass`. Returning both makes streaming exact: sums and masses of the parts of a data set add up to
those of the whole, whatever weights and missing measurements the parts have.

Arguments of every objective:
    logits: `[N, C]`, of the candidates (see `dispatch.candidate_logits`).
    targets: `[N, C]`, a distribution over the candidates per query.
    scores: `[N, C]`, each candidate's score in [0, 1], or utility (less lambda times cost). NaN where the score is
        unknown: such a candidate is left out of the query.
    weights: `[N]`, of the queries.

They are plain functions of tensors: the fit on cached states and the LoRA trainer share them. torch is imported inside
them, so that `--help` can list `OBJECTIVES` without it.
"""

from __future__ import annotations  # torch is imported inside the functions

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_OUT = -1e30  # a logit of nobody: finite, since 0 * -inf is NaN


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy to the target distribution, one-hot or soft.

    For a soft target it differs from the KL divergence by the target's entropy, which does not depend on the rows, so
    this one function is both (Expert-Token-Routing, arXiv 2403.16854; soft targets as in ZOOTER, arXiv 2311.08692). A
    candidate whose score is unknown is no alternative on that query: counted as one, it would be taught to lose.
    """
    unknown = scores.isnan() & (targets == 0)
    logs = logits.masked_fill(unknown, _OUT).log_softmax(-1)
    return -(targets * logs).sum(-1).mul(weights).sum(), weights.sum()


def correctness(
    logits: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One binary problem per candidate: is its answer right (LLM Routing with Benchmark Datasets, arXiv 2309.15789).

    `sigmoid(l_k)` is candidate k's chance of being right, self's like any other's. Each row is a problem of its own, so
    an expert added later changes no other. `scores` are the scores themselves: costs are weighed against chances where
    a candidate is chosen (`modeling.utility`). Utilities here would teach `p(1 - lambda c)` in place of `p - lambda c`.
    """
    import torch.nn.functional as F

    del targets
    losses = F.binary_cross_entropy_with_logits(logits, scores.nan_to_num(), reduction="none")
    mask = ~scores.isnan() * weights[:, None]
    return (losses * mask).sum(), mask.sum()


def expected_score(
    logits: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The score lost on average by choosing at random from the dispatch distribution: `mean(best - sum_k p_k score_k)`.

    What evaluation measures, made smooth. Not convex: start it from another objective's solution.
    """
    del targets
    unknown = scores.isnan()
    known = scores.nan_to_num()
    best = known.masked_fill(unknown, _OUT).amax(-1)
    regret = best - (logits.masked_fill(unknown, _OUT).softmax(-1) * known).sum(-1)
    regret = regret.masked_fill(unknown.all(-1), 0.0)
    return (regret * weights).sum(), weights.sum()


_CONTRASTED = 3  # positives and negatives of a query, as in RouterDC


def contrastive(
    logits: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample-LLM contrastive loss of RouterDC (arXiv 2409.19886): each good candidate against the bad ones.

    `sum over i in the best: -log(exp(l_i) / (exp(l_i) + sum over j in the worst: exp(l_j)))`, with the three best and
    the three worst candidates of a query. Of these only those count that are right (the best: 1/2 or more) or wrong
    (the worst: less); a query that leaves nobody on one of the sides teaches nothing.
    """
    import torch
    import torch.nn.functional as F

    del targets
    count = min(_CONTRASTED, logits.shape[-1])
    known = scores.nan_to_num()
    best = torch.where(scores.isnan(), -torch.inf, scores).topk(count, -1).indices
    worst = torch.where(scores.isnan(), torch.inf, scores).topk(count, -1, largest=False).indices
    measured = ~scores.isnan()
    good = (known >= 0.5) & measured
    bad = (known < 0.5) & measured
    opposed = torch.where(bad.gather(-1, worst), logits.gather(-1, worst), -torch.inf)
    some = bad.gather(-1, worst).any(-1)
    # A query without anybody to oppose gets a finite stand-in: its gradient must be zero, not NaN.
    rivals = torch.where(some[:, None], opposed, 0.0).logsumexp(-1)
    pairs = F.softplus(rivals[:, None] - logits.gather(-1, best))
    kept = good.gather(-1, best) & some[:, None]
    return (torch.where(kept, pairs, 0.0).sum(-1) * weights).sum(), weights.sum()


Objective = Callable[
    ["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"],
    "tuple[torch.Tensor, torch.Tensor]",
]

OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": cross_entropy,
    "correctness": correctness,
    "expected_score": expected_score,
    "contrastive": contrastive,
}
