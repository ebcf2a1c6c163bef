"""Code that the router benchmarks share: a composite fitted in memory on a supervision's cached states."""

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
    """Compute or load the states of these splits."""
    return {side: states_of(meta, supervision.conversations(side), label=f"{side} states") for side in sides}


def problems_of(supervision: Supervision, found: dict[str, States]) -> tuple[Problem, Problem]:
    """Build the fit's problems of the train and validation splits."""
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
    """Fit rows, set them in the meta LLM, and return the composite, the fit, and the seconds of the fit alone.

    `sides` must include train and validation. States of the test split are cached for later use.
    """
    train, validation = problems_of(supervision, states(meta, supervision, sides))
    started = time.perf_counter()
    found = fit_rows(train + validation, objective=objective, l2=l2, transform=meta.transform)
    seconds = time.perf_counter() - started
    meta.rows = found.rows
    experts = [expert.name for expert in supervision.pool]
    manifest = Manifest(describe_base(meta), experts, {"objective": objective})
    return Composite(meta, supervision.pool, manifest), found, seconds
