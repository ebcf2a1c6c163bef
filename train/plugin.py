"""Plugging an expert into a trained composite, and taking one out. The other rows stay bit for bit as they are."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data_prep.extension import extend_supervision
from ..data_prep.results import BenchmarkResults
from ..data_prep.supervision import Supervision, kept_at, supervision_of
from ..modeling.composite import Composite, load_composite
from ..modeling.distributed import ALONE
from ..modeling.errors import ExpertokenError
from ..modeling.experts import Expert
from ..modeling.meta import MetaLLM
from ..modeling.pool import ExpertPool
from ..modeling.saving import save_composite
from ..modeling.states import cached_states, state_logits
from .arguments import L2
from .processes import exclusive
from .row_optimizer import Problem
from .tokens import fit_rows, mean_score

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """What adding or removing an expert changed.

    Attributes:
        changed: queries of the side that are dispatched to someone else now.
        queries: queries of the side.
        before: the composite's score before, mean over benchmarks.
        after: and after.
        split: which side these are about.
        unmeasured: queries of the side that only the expert in question was measured on; whoever else answers
            them counts as wrong.
    """

    changed: int
    queries: int
    before: float
    after: float
    split: str
    unmeasured: int = 0

    def __str__(self) -> str:
        text = (
            f"routes changed: {self.changed} of {self.queries} ({self.split} side); "
            f"score {self.before:.4f} before, {self.after:.4f} after"
        )
        if self.unmeasured:
            text += f" (on {self.unmeasured} of them nobody else was measured: all others count as wrong there)"
        return text


def add_expert(
    folder: Path | str,
    expert: Expert,
    results: BenchmarkResults,
    *,
    data: Supervision | Path | str | None = None,
    l2: Sequence[float] = L2,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> Change:
    """Fit a row for a new expert on its results and save the composite with it.

    Queries that the composite was trained on are recognised by their text, and their cached states are used again.
    Other queries join the train, validation and test sides.

    Args:
        folder: of the composite.
        expert: the new one.
        results: that have scores of it; of other candidates too, where they were measured on new queries.
        data: the composite's supervision or its folder, where that was moved.
        l2: strengths to try.
        verify: check the saved folder in a fresh process.
        trust_remote_code: allow the base model's repository to run its own code.

    Raises:
        ExpertokenError: there are no results of the expert, its name is taken, or the supervision is gone.
    """
    folder = Path(folder)
    with exclusive(folder, ALONE):
        return _add(folder, expert, results, data, l2, verify=verify, trust_remote_code=trust_remote_code)


def _add(
    folder: Path,
    expert: Expert,
    results: BenchmarkResults,
    data: Supervision | Path | str | None,
    l2: Sequence[float],
    *,
    verify: bool,
    trust_remote_code: bool,
) -> Change:
    composite = load_composite(folder, trust_remote_code=trust_remote_code)
    old_pool, new_pool = composite.pool, composite.pool.with_expert(expert)
    extended = extend_supervision(supervision_of(composite.manifest, folder, data), old_pool, expert, results)
    objective = composite.manifest.training.get("objective", "cross_entropy")
    if composite.manifest.training.get("dispatch") == "anywhere":
        logger.warning("the new row is learnt at the starts alone; the composite's others also inside answers")
    old_rows = composite.meta.rows
    problems = {side: _problem(composite.meta, extended, side) for side in ("train", "validation")}
    fit = fit_rows(
        problems["train"],
        problems["validation"],
        objective=objective,
        l2=l2,
        transform=composite.meta.transform,
        with_self=new_pool.has_self,
        fixed_rows=old_rows,
    )
    rows = torch.cat([old_rows, fit.rows])
    change = _compare(composite.meta, extended, (old_rows, old_pool), (rows, new_pool))
    training = composite.manifest.training
    added = [*training.get("added", []), {"expert": expert.name, "l2": fit.l2}]
    composite.manifest.training = training | {"added": added}
    _save(composite, rows, new_pool, extended, folder, verify=verify)
    return change


def remove_expert(
    folder: Path | str,
    name: str,
    *,
    data: Supervision | Path | str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> Change | None:
    """Take an expert out and save the composite. Arguments as in `add_expert`.

    Returns:
        what changed, or None where the supervision is gone and it can't be told.

    Raises:
        PoolError: there is no such expert, it is self, or it is the last one.
    """
    folder = Path(folder)
    with exclusive(folder, ALONE):
        return _remove(folder, name, data, verify=verify, trust_remote_code=trust_remote_code)


def _remove(
    folder: Path, name: str, data: Supervision | Path | str | None, *, verify: bool, trust_remote_code: bool
) -> Change | None:
    composite = load_composite(folder, trust_remote_code=trust_remote_code)
    index = composite.pool.index(name)
    pool = composite.pool.without(name)
    before = composite.meta.rows
    rows = torch.cat([before[:index], before[index + 1 :]])
    change = None
    try:
        supervision = supervision_of(composite.manifest, folder, data)
    except ExpertokenError as error:
        logger.warning("%s", error)
    else:
        change = _compare(composite.meta, supervision, (before, composite.pool), (rows, pool))
    training = composite.manifest.training
    if "added" in training:
        training["added"] = [entry for entry in training["added"] if entry["expert"] != name]
    named = (composite.manifest.calibration or {}).get("policy", {})
    if name in (named.get("default"), *named.get("allow", ()), *named.get("deny", ())):
        logger.warning("the calibration names %s and is dropped; `expertoken calibrate` makes a new one", name)
        composite.manifest.calibration = None
    _save(composite, rows, pool, None, folder, verify=verify)
    return change


def _problem(meta: MetaLLM, supervision: Supervision, side: str) -> Problem:
    states = cached_states(meta, supervision.queries(side, meta), label=f"{side} states")
    return Problem(states, *supervision.arrays(side), supervision.benchmarks(side))


def _compare(
    meta: MetaLLM,
    supervision: Supervision,
    before: tuple[torch.Tensor, ExpertPool],
    after: tuple[torch.Tensor, ExpertPool],
) -> Change:
    """Decisions of two sets of rows on the test side, or on validation where there is none."""
    split = "test" if len(supervision.data["test"]) else "validation"
    problem = _problem(meta, supervision, split)
    picks = []
    for rows, pool in (before, after):
        logits = state_logits(rows, problem.states, meta.transform, with_self=pool.has_self)
        columns = np.array(supervision.columns_of(pool.names))
        picks.append(columns[logits.argmax(-1).numpy()])
    measured = supervision.scores(split)  # as evaluation counts: scores, not utilities
    old, new = (mean_score(pick, measured, problem.benchmarks) for pick in picks)
    # Names of both pools that are in both: the expert that comes or goes is in one.
    stay = supervision.columns_of([name for name in before[1].names if name in after[1].names])
    unmeasured = int(np.isnan(measured[:, stay]).all(1).sum())
    return Change(int((picks[0] != picks[1]).sum()), len(picks[0]), old, new, split, unmeasured)


def _save(
    composite: Composite,
    rows: torch.Tensor,
    pool: ExpertPool,
    supervision: Supervision | None,
    folder: Path,
    *,
    verify: bool,
) -> None:
    composite.meta.rows = rows
    manifest = composite.manifest
    if supervision is not None:
        path, info = kept_at(supervision, folder), supervision.info
        supervision.save(path)
        manifest.data = {"path": str(path), "fingerprint": info.fingerprint, "sizes": info.sizes}
    save_composite(Composite(composite.meta, pool, manifest), folder, verify=verify)
