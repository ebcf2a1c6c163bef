"""Plugging an expert into a trained composite, and taking one out. The other rows stay bit for bit as they are."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..data_prep.labels import Labelling
from ..data_prep.leaks import normalise
from ..data_prep.results import BenchmarkResults, ResultsError
from ..data_prep.supervision import Supervision, build_supervision, quiet_datasets, supervision_of
from ..modeling.chat import text_of
from ..modeling.composite import Composite, load_composite, save_composite
from ..modeling.errors import ExpertokenError
from ..modeling.experts import Expert, ExpertPool
from ..modeling.meta import MetaLLM
from .arguments import L2
from .features import cached_features
from .processes import Team, exclusive
from .tokens import Problem, fit_rows, mean_score, problem_logits

logger = logging.getLogger(__name__)

SUPERVISION_FOLDER = "supervision"
"""Where a composite keeps the supervision that came to be when an expert was added."""


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
    data: Path | None = None,
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
        data: the composite's supervision, where it was moved.
        l2: strengths to try.
        verify: check the saved folder in a fresh process.
        trust_remote_code: allow the base model's repository to run its own code.

    Raises:
        ExpertokenError: there are no results of the expert, its name is taken, or the supervision is gone.
    """
    folder = Path(folder)
    with exclusive(folder, Team()):
        return _add(folder, expert, results, data, l2, verify=verify, trust_remote_code=trust_remote_code)


def _add(
    folder: Path,
    expert: Expert,
    results: BenchmarkResults,
    data: Path | None,
    l2: Sequence[float],
    *,
    verify: bool,
    trust_remote_code: bool,
) -> Change:
    composite = load_composite(folder, trust_remote_code=trust_remote_code)
    old_pool, new_pool = composite.pool, composite.pool.with_expert(expert)
    column = expert.find_in(results.models)
    if column is None:
        raise ResultsError(f"no results under {expert.called}; results are of {', '.join(results.models)}")
    old = supervision_of(composite.manifest, folder, data)
    extended = extend_supervision(old, old_pool, expert, results.select([column, *_others(results, old_pool, column)]))
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
    data: Path | None = None,
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
    with exclusive(folder, Team()):
        return _remove(folder, name, data, verify=verify, trust_remote_code=trust_remote_code)


def _remove(folder: Path, name: str, data: Path | None, *, verify: bool, trust_remote_code: bool) -> Change | None:
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


def _others(results: BenchmarkResults, pool: ExpertPool, column: str) -> list[str]:
    found = (candidate.find_in(results.models) for candidate in pool.candidates)
    return [name for name in dict.fromkeys(found) if name and name != column]


def extend_supervision(old: Supervision, pool: ExpertPool, expert: Expert, results: BenchmarkResults) -> Supervision:
    """The old supervision with a further candidate, and with the queries that only its results have.

    The targets of queries on which the new expert was not measured stay what they were.

    Args:
        old: what the composite was trained on.
        pool: of the composite.
        expert: the new one.
        results: the new expert's column first, then those of other candidates.
    """
    known = _as_results(old, pool.names)
    ids = set(known.queries["id"])
    queries = results.queries.copy()
    queries["id"] = _known_ids(known, queries)
    first = ~queries["id"].duplicated().to_numpy()
    fresh = first & ~queries["id"].isin(ids).to_numpy()
    again = np.flatnonzero(first & ~fresh)
    names = {candidate.find_in(results.models): candidate.name for candidate in pool.candidates}
    columns = [expert.name, *(names[model] for model in results.models[1:])]
    name_of = dict(zip(results.models, columns, strict=True))
    flagged = frozenset((name_of[model], benchmark) for model, benchmark in results.contaminated if model in name_of)
    labelling = old.info.labelling
    parts = [known]
    if fresh.any():
        costs = None if results.costs is None else results.costs[fresh]
        new = BenchmarkResults(queries[fresh], columns, results.scores[fresh], costs, flagged)
        shares = {key: labelling[key] for key in ("validation", "test", "seed")}
        if labelling.get("hold_out"):
            shares["test"] = 0.0  # the test side is what is held out, and nothing else
        parts.append(new.split(**shares))
    if len(again):
        # On known queries only the new expert's scores count: the others' are what the composite was trained on.
        place = known.queries.set_index("id", drop=False).loc[queries["id"].iloc[again]]
        costs = None if results.costs is None else results.costs[again, :1]
        parts.append(BenchmarkResults(place, [expert.name], results.scores[again, :1], costs, flagged))
    extended = build_supervision(
        BenchmarkResults.merge(parts),
        ExpertPool([*pool.candidates, replace(expert, results=None)]),
        labelling=Labelling(
            **{item.name: labelling[item.name] for item in fields(Labelling) if item.name in labelling}
        ),
        hold_out=labelling.get("hold_out"),
        near_duplicates="ignore",
        leaks="keep" if old.info.leaks["equal"]["handled"] == "keep" else "drop",
        **{key: labelling[key] for key in ("validation", "test", "seed")},
    )
    extended.info.leaks["near"] = old.info.leaks.get("near", {})
    _keep_targets(extended, old, pool)
    return extended


def _known_ids(known: BenchmarkResults, queries: pd.DataFrame) -> list[str]:
    """For each query the id that the supervision knows it by, or its own.

    By id and text first, then by text alone; where several known queries have one text, they are taken in their order.

    Raises:
        ResultsError: an id stands for another question in the supervision.
    """
    text_of = dict(zip(known.queries["id"], map(normalise, known.queries["prompt"]), strict=True))
    texts = [normalise(prompt) for prompt in queries["prompt"]]
    found = [key if text_of.get(key) == text else None for key, text in zip(queries["id"], texts, strict=True)]
    taken, free = set(found), defaultdict(list)
    for key, text in reversed(text_of.items()):
        if key not in taken:
            free[text].append(key)
    for place, (key, text) in enumerate(zip(queries["id"], texts, strict=True)):
        if found[place] is None and free[text]:
            found[place] = free[text].pop()
        elif found[place] is None and key in text_of:
            raise ResultsError(
                f"query id {key!r} stands for another question in the composite's supervision; rename the ids of the "
                "new results, or leave their `id` column out"
            )
        found[place] = found[place] or key
    return found


def _keep_targets(extended: Supervision, old: Supervision, pool: ExpertPool) -> None:
    """Give queries that the new expert was not measured on the target and weight that they had."""
    columns = [old.info.candidates.index(name) for name in pool.names]
    places = [extended.info.candidates.index(name) for name in pool.names]
    known = {}
    for part in old.data.values():
        for row in part.select_columns(["id", "target", "weight"]):
            known[row["id"]] = (row["target"], row["weight"])
    newcomer = next(i for i, name in enumerate(extended.info.candidates) if name not in pool.names)

    def keep(row: dict) -> dict:
        if row["id"] not in known or not np.isnan(row["scores"][newcomer]):
            return {}
        before, weight = known[row["id"]]
        target = [0.0] * len(row["target"])
        for place, column in zip(places, columns, strict=True):
            target[place] = before[column]
        return {"target": target, "weight": weight if sum(target) > 0 else 0.0}

    for side, part in extended.data.items():
        if len(part):
            with quiet_datasets():
                extended.data[side] = part.map(keep, features=part.features)
    extended.stamp()


def _as_results(supervision: Supervision, names: list[str]) -> BenchmarkResults:
    """A supervision's queries, scores and costs as results again, of the named candidates."""
    frames, scores, costs = [], [], []
    columns = [supervision.info.candidates.index(name) for name in names]
    for side, part in supervision.data.items():
        if not len(part):
            continue
        frame = part.select_columns(["id", "benchmark", "subject"]).to_pandas()
        frame["prompt"] = [text_of(messages[-1]) for messages in part["messages"]]
        frame["split"] = side
        frames.append(frame)
        scores.append(supervision.scores(side)[:, columns])
        known = supervision.costs(side)
        costs.append(np.full_like(scores[-1], np.nan) if known is None else known[:, columns])
    return BenchmarkResults(
        pd.concat(frames, ignore_index=True),
        list(names),
        np.concatenate(scores),
        np.concatenate(costs),
        frozenset((name, benchmark) for name, benchmark in supervision.info.labelling.get("contaminated", ())),
    )


def _problem(meta: MetaLLM, supervision: Supervision, side: str) -> Problem:
    part = supervision.side(side)
    features = cached_features(meta, part["messages"], label=f"{side} features")
    return Problem(features, *supervision.arrays(side), part["benchmark"])


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
        logits = problem_logits(rows, problem.features, meta.transform, with_self=pool.has_self)
        columns = np.array([supervision.info.candidates.index(name) for name in pool.names])
        picks.append(columns[logits.argmax(-1).numpy()])
    measured = supervision.scores(split)  # as evaluation counts: scores, not utilities
    scores = [mean_score(pick, measured, problem.benchmarks) for pick in picks]
    # Names of both pools that are in both: the expert that comes or goes is in one.
    stay = [supervision.info.candidates.index(name) for name in before[1].names if name in after[1].names]
    unmeasured = int(np.isnan(measured[:, stay]).all(1).sum())
    return Change(int((picks[0] != picks[1]).sum()), len(picks[0]), *scores, split, unmeasured)


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
        # Under a name of its contents, so that the composite that is there keeps the one that it points to.
        name = f"{SUPERVISION_FOLDER}/{supervision.info.fingerprint}"
        supervision.save(folder / name)
        path, info = str((folder / name).resolve()), supervision.info
        manifest.data = {"path": path, "fingerprint": info.fingerprint, "sizes": info.sizes}
    save_composite(Composite(composite.meta, pool, manifest), folder, verify=verify)
