"""Extension of a supervision by one candidate, with labels for new queries and unchanged labels elsewhere."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from ..modeling.errors import ResultsError
from ..modeling.experts import Expert
from ..modeling.pool import ExpertPool
from . import SPLITS
from .contexts import copies, origin_of
from .labels import Labelling, absent, label
from .leaks import IMAGES, handle_leaks, questions_of
from .results import BenchmarkResults, blank_contaminated
from .rows import make_datasets, messages_of, question_of
from .supervision import Supervision
from .supervision_info import SupervisionInfo


@dataclass
class _Rows:
    """Queries and all their values in a supervision, `[N]` or `[N, C]`, in the order of the extended candidates.

    Attributes:
        queries: One row per query with `id`, `prompt`, `benchmark`, `subject` and `split`.
        messages: Conversations.
        scores: Scores, NaN where not measured.
        costs: USD, NaN where not known.
        targets: Targets without the new expert. Zero for new queries.
        weights: Weights without the new expert. Zero for new queries.
        new: True for queries that are not in the old supervision, `[N]`.
    """

    queries: pd.DataFrame
    messages: list[Any]
    scores: np.ndarray
    costs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    new: np.ndarray

    def __add__(self, other: "_Rows") -> "_Rows":
        return _Rows(
            pd.concat([self.queries, other.queries], ignore_index=True),
            self.messages + other.messages,
            *(np.concatenate([getattr(self, name), getattr(other, name)]) for name in _ARRAYS),
        )

    def take(self, kept: np.ndarray) -> "_Rows":
        rows = np.flatnonzero(kept)
        return _Rows(
            self.queries.iloc[rows].reset_index(drop=True),
            [self.messages[row] for row in rows],
            *(getattr(self, name)[rows] for name in _ARRAYS),
        )


_ARRAYS = ("scores", "costs", "targets", "weights", "new")


def extend_supervision(old: Supervision, pool: ExpertPool, expert: Expert, results: BenchmarkResults) -> Supervision:
    """Extend a supervision by a candidate and by the queries that only its results have.

    Targets of queries on which the new expert was not measured do not change.

    Args:
        old: Supervision of the composite.
        pool: Pool of the composite.
        expert: New expert.
        results: Results of the new expert, and of other candidates as far as they were measured on new queries.

    Raises:
        ResultsError: The expert has no results, or an id belongs to another question in the supervision.
    """
    results = _with_newcomer_first(results, pool, expert)
    extended = ExpertPool([*pool.candidates, replace(expert, results=None)])
    newcomer = extended.names.index(expert.name)
    rows = _known_rows(old, pool, extended.names)
    ids = known_ids(rows.queries, results.queries)
    first = ~pd.Series(ids).duplicated().to_numpy()
    known = {key: row for row, key in enumerate(rows.queries["id"])}
    again = [place for place in np.flatnonzero(first) if ids[place] in known]
    fresh = np.array([place for place in np.flatnonzero(first) if ids[place] not in known], dtype=int)
    if held_out := old.info.labelling.get("hold_out"):
        # With held-out benchmarks or subjects, the test split has no other queries.
        field, held = held_out
        other = (results.queries["split"] == "test") & ~results.queries[field].isin(held)
        fresh = fresh[~other.to_numpy()[fresh]]
    # On known queries only the new expert's scores are read, because the composite was trained on the others' old ones.
    where = [known[ids[place]] for place in again]
    rows.scores[where, newcomer] = results.scores[again, 0]
    if results.costs is not None:
        rows.costs[where, newcomer] = results.costs[again, 0]
    for key, row in known.items():  # a copy in a context has the scores of its question
        for values in (rows.scores, rows.costs):
            values[row, newcomer] = values[known.get(origin_of(key), row), newcomer]
    name_of = dict(zip(results.models, _names(results, pool, expert), strict=True))
    if len(fresh):
        rows += _new_rows(results.take(fresh), name_of, extended.names, old.info.labelling)
        rows += _copies(rows, old.info.labelling)
    flagged = {(name_of[model], benchmark) for model, benchmark in results.contaminated if model in name_of}
    flagged |= {(name, benchmark) for name, benchmark in old.info.labelling.get("contaminated", ())}
    flagged = {pair for pair in flagged if pair[0] in extended.names}
    known_leaks = old.info.leaks
    kept, leaks = handle_leaks(rows.queries, "keep" if known_leaks["equal"]["handled"] == "keep" else "drop", "ignore")
    leaks["near"] = known_leaks.get("near", {})
    rows = rows if kept.all() else rows.take(kept)
    found = _labelled(rows, extended, newcomer, old, sorted(flagged), leaks)
    found.pictures = {**old.pictures, **results.pictures}
    return found


def _with_newcomer_first(results: BenchmarkResults, pool: ExpertPool, expert: Expert) -> BenchmarkResults:
    """Return the results of the new expert and of the pool's candidates, with the new expert first."""
    column = expert.find_in(results.models)
    if column is None:
        raise ResultsError(f"no results under {expert.called}, only of {', '.join(results.models)}")
    found = (candidate.find_in(results.models) for candidate in pool.candidates)
    return results.select([column, *(name for name in dict.fromkeys(found) if name and name != column)])


def _names(results: BenchmarkResults, pool: ExpertPool, expert: Expert) -> list[str]:
    """Return the candidate's name for each column of the results."""
    names = {candidate.find_in(results.models): candidate.name for candidate in pool.candidates}
    return [expert.name, *(names[model] for model in results.models[1:])]


def _known_rows(old: Supervision, pool: ExpertPool, names: Sequence[str]) -> _Rows:
    columns = old.columns_of(pool.names)
    places = [names.index(name) for name in pool.names]
    frames, messages = [], []
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in _ARRAYS}
    for side, part in old.data.items():
        if not len(part):
            continue
        frame = part.select_columns(["id", "benchmark", "subject"]).to_pandas()
        conversations = part["messages"][:]
        asked = [question_of(conversation) for conversation in conversations]
        frame["prompt"] = [text for text, _ in asked]
        if any(images for _, images in asked):
            frame[IMAGES] = pd.Series([images for _, images in asked], index=frame.index, dtype=object)
        frame["split"] = side
        frames.append(frame)
        messages += conversations
        targets, _, weights = old.arrays(side)
        costs = old.costs(side)
        kept = targets[:, columns]
        for name, values, blank in (
            ("scores", old.scores(side)[:, columns], np.nan),
            ("costs", np.full_like(kept, np.nan) if costs is None else costs[:, columns], np.nan),
            ("targets", kept, 0.0),
        ):
            wide = np.full((len(part), len(names)), blank, dtype=np.float32)
            wide[:, places] = values
            arrays[name].append(wide)
        arrays["weights"].append(np.where(kept.sum(1) > 0, weights, 0.0).astype(np.float32))
        arrays["new"].append(np.zeros(len(part), dtype=bool))
    frame = pd.concat(frames, ignore_index=True).astype(object)
    frame = frame.where(frame.notna(), None)  # pandas' text columns hold NaN for a missing subject
    return _Rows(frame, messages, *(np.concatenate(arrays[name]) for name in _ARRAYS))


def _new_rows(
    results: BenchmarkResults, name_of: dict[str, str], names: Sequence[str], labelling: dict[str, Any]
) -> _Rows:
    shares = {key: labelling[key] for key in ("validation", "test", "seed")}
    held_out = labelling.get("hold_out")
    if held_out:
        shares["test"] = 0.0
    split = results.split(**shares)
    if held_out:
        field, names_held = held_out
        split.queries.loc[split.queries[field].isin(names_held), "split"] = "test"
    places = [names.index(name_of[model]) for model in results.models]
    shape = (len(split), len(names))
    scores, costs = (np.full(shape, np.nan, dtype=np.float32) for _ in range(2))
    scores[:, places] = split.scores
    if split.costs is not None:
        costs[:, places] = split.costs
    messages, no_targets = messages_of(split.queries), np.zeros(shape, np.float32)
    return _Rows(split.queries, messages, scores, costs, no_targets, no_targets[:, 0], np.ones(len(split), dtype=bool))


def _copies(rows: _Rows, labelling: dict[str, Any]) -> _Rows:
    """Return copies of the new queries in contexts, drawn as in the supervision."""
    bare = rows.take(np.array([origin_of(key) == key for key in rows.queries["id"]]))
    share, seed = labelling.get("contexts", 0.0), labelling["seed"]
    chosen, queries, messages = copies(bare.queries, bare.messages, share, seed, only=bare.new)
    arrays = (getattr(bare, name)[chosen] for name in _ARRAYS)
    return _Rows(queries.reset_index(drop=True), messages, *arrays)


def _labelled(
    rows: _Rows,
    pool: ExpertPool,
    newcomer: int,
    old: Supervision,
    contaminated: list[tuple[str, str]],
    leaks: dict[str, Any],
) -> Supervision:
    """Label the rows that are new or that the new expert was measured on, and assemble the supervision."""
    known = old.info.labelling
    labelling = Labelling(**{item.name: known[item.name] for item in fields(Labelling) if item.name in known})
    clean = blank_contaminated(rows.scores, rows.queries["benchmark"], pool.names, contaminated)
    costs = None if np.isnan(rows.costs).all() else rows.costs
    changed = ~np.isnan(rows.scores[:, newcomer]) | rows.new
    side = rows.queries["split"].to_numpy()
    targets, weights = label(
        clean,
        rows.queries["benchmark"],
        rows.queries["subject"],
        side != "test",
        labelling,
        costs=costs,
        self_index=len(pool) if pool.has_self else None,
        names=pool.names,
        rows=changed,
        missing=absent(rows.scores, rows.queries["benchmark"]),
    )
    rows.targets[changed], rows.weights[changed] = targets, weights
    if not rows.weights[side == "train"].any():
        raise ResultsError(
            "every candidate has the same score on every train query: nothing to learn from. Add other results."
        )
    data = make_datasets(rows.queries, rows.messages, rows.scores, costs, rows.targets, rows.weights)
    recorded = known | {"contaminated": [list(pair) for pair in contaminated]}
    sizes = {name: len(data[name]) for name in SPLITS}
    info = SupervisionInfo(pool.names, pool.has_self, recorded, sizes, leaks, datasets=old.info.datasets)
    supervision = Supervision(data, pool, info)
    supervision.stamp()
    return supervision


def known_ids(known: pd.DataFrame, queries: pd.DataFrame) -> list[str]:
    """Return for each query the id of the same known query, or its own id.

    A match of id and text comes first, then a match of the text alone. Several known queries with one text are matched
    in their order.

    Args:
        known: Known queries with `id`, `prompt` and optionally `images`.
        queries: Queries to look up, with the same columns.

    Raises:
        ResultsError: An id belongs to another question among the known queries.
    """
    text_by_id = dict(zip(known["id"], questions_of(known), strict=True))
    texts = questions_of(queries)
    found = [key if text_by_id.get(key) == text else None for key, text in zip(queries["id"], texts, strict=True)]
    taken, free = set(found), defaultdict(list)
    for key, text in reversed(text_by_id.items()):
        if key not in taken:
            free[text].append(key)
    for place, (key, text) in enumerate(zip(queries["id"], texts, strict=True)):
        if found[place] is None and free[text]:
            found[place] = free[text].pop()
        elif found[place] is None and key in text_by_id:
            raise ResultsError(
                f"query id {key!r} belongs to another question in the composite's supervision. Rename the ids of the "
                "new results, or drop their `id` column."
            )
        found[place] = found[place] or key
    return [str(key) for key in found]
