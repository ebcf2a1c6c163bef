"""Properties that a decision must have, checked on synthetic states on which the right candidate is known.

The first cases are self with a chance of its own, costs taken off chances, and the best expert measured on a part of
its queries. The others are a candidate with a few lucky answers, a plugged-in expert, and labels at random. A state is
the sum of a topic, a difficulty and noise, in 48 dimensions.

    python benchmarks/chances.py
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from expertoken.data_prep.labels import absent, label
from expertoken.modeling.experts import Expert
from expertoken.modeling.logits import LogitTransform
from expertoken.modeling.policy import Chooser, Policy
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.states import States, state_logits
from expertoken.train.arguments import L2
from expertoken.train.plugin import fit_newcomer
from expertoken.train.row_optimizer import Problem
from expertoken.train.tokens import fit_rows

WIDTH, TOPICS = 48, 4
SEEDS = range(5)
PLAIN = LogitTransform()


def states(topics: np.ndarray, rng: np.random.Generator, noise: float = 0.8) -> States:
    """Draw states of queries on these topics."""
    directions = np.random.default_rng(5).normal(size=(TOPICS, WIDTH))
    hard = np.outer(rng.normal(size=len(topics)), np.random.default_rng(6).normal(size=WIDTH))
    hidden = directions[topics] + 0.7 * hard + noise * rng.normal(size=(len(topics), WIDTH))
    hidden[:, 0] += 6
    return States(hidden.astype(np.float32), np.zeros(len(topics), np.float32))


def problem(found: States, scores: np.ndarray, strategy: str) -> Problem:
    """Label the scores as one benchmark and build the problem that the fit solves."""
    names = np.full(len(scores), "b")
    targets, weights = label(scores, names, labelling=strategy)
    return Problem(found, targets, scores.astype(np.float32), weights, names)


def chances(known: Problem, unseen: States, objective: str = "correctness") -> torch.Tensor:
    """Fit rows and return their logits on unseen queries, `[N, C]`."""
    return state_logits(fit_rows(known, objective=objective, l2=L2, transform=PLAIN).rows, unseen, PLAIN)


def constant(right: Sequence[float], seed: int) -> tuple[Problem, States, np.ndarray]:
    """Draw candidates with a constant chance: a problem of 600 queries, and 2,000 unseen states with their scores."""
    rng = np.random.default_rng(seed)
    sides = [(states(rng.integers(0, TOPICS, n), rng), rng.random((n, len(right))) < right) for n in (600, 2000)]
    return problem(sides[0][0], sides[0][1].astype(float), "correctness"), sides[1][0], sides[1][1]


def self_answers(seed: int) -> float:
    """Return the score where the experts are right on 60 and 55 % of the queries and self on 95 %."""
    known, unseen, scores = constant((0.60, 0.55, 0.95), seed)
    return float(scores[np.arange(2000), chances(known, unseen).argmax(1).numpy()].mean())


def costs_are_weighed(seed: int) -> float:
    """Return the share of queries for which the candidate of utility 0.30 is chosen over the one of 0.20."""
    known, unseen, _ = constant((0.80, 0.50), seed)
    pool = ExpertPool([Expert("dear", model="a"), Expert("cheap", model="b")])
    chooser = Chooser(pool, chances=True, usd_per_query={"dear": 0.06, "cheap": 0.02})
    policy = Policy(cost_weight=10.0)
    return float(np.mean([chooser.choose(policy, row).expert == "cheap" for row in chances(known, unseen)]))


def partly_measured(share: float, strategy: str, objective: str, seed: int) -> float:
    """Return the share of its queries that the best expert receives after measurement on a part of all queries."""
    rng = np.random.default_rng(seed)
    topics = rng.integers(0, TOPICS, 800)
    scores = (rng.random((800, TOPICS)) < np.where(np.arange(TOPICS) == topics[:, None], 0.9, 0.3)).astype(float)
    found = states(topics, rng)
    scores[rng.random(800) > share, 0] = np.nan
    asked = rng.integers(0, TOPICS, 2000)
    chosen = chances(problem(found, scores, strategy), states(asked, rng), objective).argmax(1).numpy()
    return float((chosen[asked == 0] == 0).mean())


def lucky(answers: int, seed: int) -> float:
    """Return the chance of a candidate that was right on a few queries, beside one that is right on 80 % of 600."""
    known, unseen, _ = constant((0.80, 1.0), seed)
    known.scores[answers:, 1] = np.nan
    return float(chances(known, unseen).sigmoid()[:, 1].mean())


def plugged_in(old: int, seed: int) -> float:
    """Return the AUC of a new expert's chance, learnt from its 300 results beside `old` queries without its results.

    The states are noisier here. Otherwise 300 results would identify the new expert's topic without an error.
    """
    rng = np.random.default_rng(seed)
    topics = rng.integers(0, TOPICS, old + 300)
    scores = (rng.random((old + 300, 2)) < (0.60, 0.55)).astype(float)
    found, names = states(topics, rng, noise=2.0), np.repeat(["old", "new"], [old, 300])
    own = rng.random((old + 300, 1)) < np.where(topics[:, None] == 0, 0.95, 0.05)
    scores = np.hstack([scores, np.where(names[:, None] == "new", own, np.nan)])
    scores[names == "new", :2] = np.nan
    measured = absent(scores, names)
    targets, weights = label(scores, names, labelling="correctness")
    known = np.where(measured, 0, scores).astype(np.float32)
    whole = Problem(found, targets, known, weights, names, absent=measured)
    others = fit_rows(whole.columns([0, 1]).take(np.arange(old)), objective="correctness", l2=L2, transform=PLAIN).rows
    fit = fit_newcomer(whole, 2, others, objective="correctness", l2=L2, transform=PLAIN)
    asked = rng.integers(0, TOPICS, 2000)
    return float(roc_auc_score(asked == 0, state_logits(fit.rows, states(asked, rng, noise=2.0), PLAIN)[:, 0].numpy()))


def random_labels(seed: int) -> float:
    """Return the cross-validated score on random labels of three equal candidates. The right value is 1/3."""
    rng = np.random.default_rng(seed)
    scores = np.eye(3)[rng.permutation(np.arange(600) % 3)]
    known = problem(states(rng.integers(0, TOPICS, 600), rng), scores, "query")
    return fit_rows(known, objective="cross_entropy", l2=L2, transform=PLAIN).chosen["validation_score"]


def main() -> None:
    """Print the table."""
    logging.basicConfig(level=logging.ERROR)
    rows: dict[str, Callable[[int], float]] = {
        "experts 60 and 55 %, self 95 %: score": self_answers,
        "utilities 0.20 and 0.30: share to the better": costs_are_weighed,
    }
    for share in (0.5, 0.1):
        for strategy, objective in (("query", "cross_entropy"), ("correctness", "correctness")):
            name = f"best expert measured on {share:.0%}, {objective}: share of its questions"
            rows[name] = partial(partly_measured, share, strategy, objective)
    for answers in (1, 5, 20):
        rows[f"{answers} lucky answers: chance"] = partial(lucky, answers)
    for old in (300, 100_000):
        rows[f"plugged in beside {old:,} old queries: AUC of its chance"] = partial(plugged_in, old)
    rows["labels at random: cross-validated score"] = random_labels
    print(f"| | mean of {len(SEEDS)} draws | least | greatest |\n|---|---|---|---|")
    for name, measure in rows.items():
        found = [measure(seed) for seed in SEEDS]
        print(f"| {name} | {np.mean(found):.3f} | {min(found):.3f} | {max(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
