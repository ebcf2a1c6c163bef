"""Plug-in of an expert into a trained composite, and its removal. The other rows keep the same bits."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data_prep.extension import extend_supervision
from ..data_prep.results import BenchmarkResults
from ..data_prep.supervision import Supervision, kept_at, supervision_of
from ..modeling.composite import POOL_FILE, Composite, load_composite, read_manifest
from ..modeling.consent import agree
from ..modeling.dispatch import gives_chances
from ..modeling.distributed import ALONE
from ..modeling.errors import ExpertokenError
from ..modeling.experts import Expert
from ..modeling.logits import LogitTransform
from ..modeling.meta import MetaLLM
from ..modeling.pool import ExpertPool
from ..modeling.saving import save_composite
from ..modeling.states import cached_states, state_logits
from .arguments import L2
from .prior import FEW, prior_of, thinned
from .processes import exclusive
from .row_optimizer import Fixed, Problem
from .tokens import Fit, fit_rows, mean_score

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """Effect of adding or removing an expert.

    Attributes:
        changed: Number of queries of the split that are dispatched to another candidate than before.
        queries: Number of queries of the split.
        before: Score of the composite before the change, mean over benchmarks.
        after: Score of the composite after the change, mean over benchmarks.
        split: Name of the split that was compared.
        unmeasured: Number of queries of the split in whose benchmark only the added or removed expert was measured.
            Any other candidate that answers them counts as wrong.
    """

    changed: int
    queries: int
    before: float
    after: float
    split: str
    unmeasured: int = 0

    def __str__(self) -> str:
        text = (
            f"routes changed: {self.changed} of {self.queries} ({self.split} split), "
            f"mean score over benchmarks {self.before:.4f} before, {self.after:.4f} after"
        )
        if self.unmeasured:
            text += f" (on {self.unmeasured} of them no other candidate was measured: all others count as wrong there)"
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
    Other queries join the train, validation and test splits.

    Args:
        folder: Composite folder.
        expert: New expert.
        results: Results with scores of the expert. Scores of other candidates on new queries are used too.
        data: Supervision of the composite, or its folder, if that was moved.
        l2: L2 strengths to try.
        verify: If true, check the saved folder in a fresh process.
        trust_remote_code: If true, allow the base model's repository to run its own code.

    Raises:
        ExpertokenError: The expert has no results, its name is taken, or the supervision is missing.
    """
    folder = Path(folder)
    agree([expert])
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
    read_manifest(folder)  # errors of the folder and the name are raised before a model is loaded
    ExpertPool.from_yaml(folder / POOL_FILE).with_expert(expert)
    composite = load_composite(folder, trust_remote_code=trust_remote_code)
    old_pool, new_pool = composite.pool, composite.pool.with_expert(expert)
    extended = extend_supervision(supervision_of(composite.manifest, folder, data), old_pool, expert, results)
    objective = composite.manifest.training.get("objective", "cross_entropy")
    if composite.manifest.training.get("dispatch") == "anywhere":
        logger.warning("the new row is learnt at the starts alone, the other rows were also learnt inside answers")
    old_rows, place = composite.meta.rows, new_pool.index(expert.name)
    fit = _fit_newcomer(composite.meta, extended, place, objective, l2)
    if edge := fit.edge():
        logger.warning("%s", edge)
    rows = torch.cat([old_rows[:place], fit.rows, old_rows[place:]])
    change = _compare(extended, (old_rows, composite), (rows, replace(composite, pool=new_pool)))
    training = composite.manifest.training
    added = [*training.get("added", []), {"expert": expert.name, "l2": fit.l2}]
    usd = extended.usd_per_query()
    composite.manifest.training = training | {"added": added, "usd_per_query": usd}
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
    """Remove an expert and save the composite. The arguments are as in `add_expert`.

    Returns:
        The effect of the removal, or None if the supervision is missing.

    Raises:
        PoolError: The expert does not exist, is self, or is the last one.
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
    kept = composite.manifest.calibration
    named = (kept or {}).get("policy", {})
    if name in (named.get("default"), *named.get("allow", ()), *named.get("deny", ())):
        logger.warning("the calibration names %s and is dropped. Run `expertoken calibrate` for a new one", name)
        kept = None
    after = replace(composite, pool=pool, manifest=replace(composite.manifest, calibration=kept))
    change = None
    try:
        supervision = supervision_of(composite.manifest, folder, data)
    except ExpertokenError as error:
        logger.warning("%s", error)
    else:
        change = _compare(supervision, (before, composite), (rows, after))
    training = composite.manifest.training
    if "added" in training:
        training["added"] = [entry for entry in training["added"] if entry["expert"] != name]
    composite.manifest.calibration = kept
    _save(composite, rows, pool, None, folder, verify=verify)
    return change


def _fit_newcomer(meta: MetaLLM, supervision: Supervision, place: int, objective: str, l2: Sequence[float]) -> Fit:
    """Fit the row of the candidate at `place` with the other rows fixed. See `fit_newcomer`."""
    sides = [side for side in ("train", "validation") if len(supervision.data[side])]
    parts = [_problem(meta, supervision, side, utilities=not gives_chances(objective)) for side in sides]
    problem = parts[0] + parts[1] if len(parts) > 1 else parts[0]
    name = supervision.pool.names[place]
    try:
        fit = fit_newcomer(problem, place, meta.rows, objective=objective, l2=l2, transform=meta.transform)
    except ExpertokenError as error:
        raise ExpertokenError(f"expert {name!r}: {error}") from None
    measured = supervision.measured()[name]
    if measured < FEW:
        logger.warning(
            "%s was measured on %d queries to learn from, fewer than %d. Its row is little more than the others' mean",
            name, measured, FEW,
        )  # fmt: skip
    return fit


def fit_newcomer(
    problem: Problem,
    place: int,
    rows: torch.Tensor,
    *,
    objective: str,
    l2: Sequence[float],
    transform: LogitTransform,
) -> Fit:
    """Fit one new candidate's row with the existing rows fixed.

    The row learns from the candidate's own results alone: beside 100,000 old queries, 300 new ones would be a rounding
    error of the mean loss. In benchmarks without results the candidate counts as wrong. All queries of these benchmarks
    together weigh at most as much as its own (under `correctness` a tenth, see `prior.thinned`).

    Args:
        problem: Problem of all candidates, the new one included. Its `absent` must be set.
        place: Column of the new candidate.
        rows: Rows of the other candidates, `[C - 1, width]`.
        objective: Objective that the other rows were trained with.
        l2: L2 strengths to try.
        transform: Cap and scale of the meta LLM's logits.

    Raises:
        ExpertokenError: The new candidate has no result to learn from.
    """
    assert problem.absent is not None
    absent = problem.absent[:, place]
    binary = gives_chances(objective)
    if binary:
        problem = replace(problem, left_out=thinned(problem.scores, problem.absent))
    prior = prior_of(problem)
    counts = (problem.weights > 0) & ~np.isnan(problem.scores[:, place])
    if problem.left_out is not None:
        counts &= ~problem.left_out[:, place]
    own, elsewhere = np.flatnonzero(counts & ~absent), np.flatnonzero(counts & absent)
    if not len(own):
        raise ExpertokenError(
            "expected results to learn from, found none on the train and validation splits. Add results on queries "
            "outside the test split"
        )
    # Queries of other benchmarks are thinned evenly to about the number of its own, at least 1,000: more add only cost.
    step = max(1, len(elsewhere) // max(len(own), 1000))
    elsewhere = elsewhere[::step]
    weights = problem.weights.copy()
    weights[elsewhere] *= min(1.0, weights[own].sum() / max(weights[elsewhere].sum(), 1e-9))
    problem = replace(problem, weights=weights).take(np.concatenate([own, elsewhere]))
    options: dict[str, Any] = {"objective": objective, "l2": l2, "transform": transform}
    if binary:  # each row is an independent problem
        return fit_rows(problem.columns([place]), prior=prior.columns([place]), company=rows, **options)
    rows = torch.cat([rows[:place], torch.zeros_like(rows[:1]), rows[place:]])
    return fit_rows(problem, prior=prior, fixed=Fixed(rows, [place]), **options)


def _problem(meta: MetaLLM, supervision: Supervision, side: str, *, utilities: bool = True) -> Problem:
    states = cached_states(meta, supervision.queries(side, meta), label=f"{side} states")
    groups = supervision.origins(side)
    arrays = supervision.arrays(side, utilities=utilities)
    return Problem(states, *arrays, supervision.benchmarks(side), groups, supervision.absent(side))


def _compare(
    supervision: Supervision, before: tuple[torch.Tensor, Composite], after: tuple[torch.Tensor, Composite]
) -> Change:
    """Compare the decisions of two sets of rows, as served, on the test split, or on validation without one."""
    split, meta = "test" if len(supervision.data["test"]) else "validation", before[1].meta
    queries = supervision.queries(split, meta)
    states, kinds = cached_states(meta, queries, label=f"{split} states"), supervision.benchmarks(split)
    lengths = [len(query) + query.cut for query in queries]
    picks = []
    for rows, composite in (before, after):
        columns = np.array(supervision.columns_of(composite.pool.names))
        picks.append(columns[composite.chosen(state_logits(rows, states, meta.transform), lengths)])
    scores, absent = supervision.scores(split), supervision.absent(split)
    measured = np.where(absent, 0, scores)  # evaluation counts scores, not utilities
    old, new = (mean_score(pick, measured, kinds) for pick in picks)
    # Candidates of both pools: the added or removed expert is in one only.
    names = after[1].pool.names
    stay = supervision.columns_of([name for name in before[1].pool.names if name in names])
    unmeasured = int(absent[:, stay].all(1).sum())
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
        manifest.data = info.described(path)
    save_composite(Composite(composite.meta, pool, manifest), folder, verify=verify)
