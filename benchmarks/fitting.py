"""What the measurements of routers share: a composite fitted in memory on a supervision's cached states."""

import time

from expertoken.data_prep.supervision import Supervision
from expertoken.modeling.composite import Composite, Manifest, describe_base
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.states import States, states_of
from expertoken.train.arguments import L2
from expertoken.train.row_optimizer import Problem
from expertoken.train.tokens import Fit, fit_rows

SIDES = ("train", "validation", "test")


def states(meta: MetaLLM, supervision: Supervision, sides: tuple[str, ...] = SIDES) -> dict[str, States]:
    """Of these sides."""
    return {side: states_of(meta, supervision.conversations(side), label=f"{side} states") for side in sides}


def problems_of(supervision: Supervision, found: dict[str, States]) -> tuple[Problem, Problem]:
    """Train and validation, as the fit wants them."""
    train, validation = (
        Problem(found[side], *supervision.arrays(side), supervision.side(side)["benchmark"]) for side in SIDES[:2]
    )
    return train, validation


def fit(
    meta: MetaLLM,
    supervision: Supervision,
    objective: str,
    l2: tuple[float, ...] = L2,
    sides: tuple[str, ...] = SIDES,
) -> tuple[Composite, Fit, float]:
    """A composite whose rows (also the meta LLM's, now) are fitted; the fit, and its seconds without the states'.

    `sides` are encoded: train and validation are needed, the test side's states are kept for what comes after.
    """
    train, validation = problems_of(supervision, states(meta, supervision, sides))
    started = time.perf_counter()
    found = fit_rows(train + validation, objective=objective, l2=l2, transform=meta.transform)
    seconds = time.perf_counter() - started
    meta.rows = found.rows
    experts = [expert.name for expert in supervision.pool]
    manifest = Manifest(describe_base(meta), experts, {"objective": objective})
    return Composite(meta, supervision.pool, manifest), found, seconds
