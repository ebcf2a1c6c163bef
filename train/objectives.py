"""Training objectives over the candidates' logits. Each takes the same arguments and returns a sum and its mass.

The loss is `sum / mass`. Returning both makes streaming exact. Sums and masses of the parts of a data set add up to the
sum and mass of the whole, for any weights and missing scores of the parts.

Arguments of every objective:
    logits: Logits of the candidates, `[N, C]` (see `dispatch.candidate_logits`).
    targets: Distribution over the candidates per query, `[N, C]`.
    scores: Each candidate's score in [0, 1], or its utility (score minus lambda times cost), `[N, C]`. NaN where the
        score is unknown: such a candidate is left out of the query.
    weights: Weights of the queries, `[N]`.

Objectives are plain functions of tensors, shared by the fit on cached states and the LoRA trainer. They import torch
inside, so that `--help` can list `OBJECTIVES` without it.
"""

from __future__ import annotations  # torch is imported inside the functions

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_OUT = -1e30  # logit of an excluded candidate: finite, since 0 * -inf is NaN


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cross-entropy to the target distribution, one-hot or soft.

    For a soft target it differs from the KL divergence by the target's entropy, which does not depend on the rows. So
    one function covers both (Expert-Token-Routing, arXiv 2403.16854, and soft targets as in ZOOTER, arXiv 2311.08692).
    A candidate whose score is unknown is excluded on that query. Otherwise its row would learn to lose there.
    """
    unknown = scores.isnan() & (targets == 0)
    logs = logits.masked_fill(unknown, _OUT).log_softmax(-1)
    return -(targets * logs).sum(-1).mul(weights).sum(), weights.sum()


def correctness(
    logits: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the binary cross-entropy of each candidate being right, self included.

    `sigmoid(l_k)` is candidate k's chance of being right (LLM Routing with Benchmark Datasets, arXiv 2309.15789). Each
    row is an independent problem, so an expert added later changes no other row. The scores must be no utilities, which
    would teach `p(1 - lambda c)` instead of `p - lambda c`. Costs are weighed against chances in the decision
    (`modeling.utility`).
    """
    import torch.nn.functional as F

    del targets
    losses = F.binary_cross_entropy_with_logits(logits, scores.nan_to_num(), reduction="none")
    mask = ~scores.isnan() * weights[:, None]
    return (losses * mask).sum(), mask.sum()


def expected_score(
    logits: torch.Tensor, targets: torch.Tensor, scores: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean score lost by drawing from the dispatch distribution: `mean(best - sum_k p_k score_k)`.

    It is a smooth version of the score that evaluation measures. It is not convex: start it from another objective's
    solution.
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
    """Compute the sample-LLM contrastive loss of RouterDC (arXiv 2409.19886): each good candidate against the bad ones.

    The loss is `sum over i in the best: -log(exp(l_i) / (exp(l_i) + sum over j in the worst: exp(l_j)))`, with the
    three best and the three worst candidates of a query. The best count only if they are right (score of 1/2 or more),
    the worst only if they are wrong (less). A query without a right or without a wrong candidate has no loss.
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
    # A query without a wrong candidate gets a finite substitute: its gradient must be zero, not NaN.
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
