"""Supervision: the messages of each query and a target over the candidates, saved with `datasets`."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..modeling.consent import agree
from ..modeling.errors import ExpertokenError, ResultsError, did_you_mean, one_line
from ..modeling.experts import SELF, Expert
from ..modeling.files import PRODUCTS, atomic_folder, check_product, read_settled
from ..modeling.pictures import IMAGE, Picture, part_of
from ..modeling.pool import ExpertPool
from ..modeling.utility import utility
from . import SPLITS
from .contexts import copies, origin_of
from .labels import Labelling, absent, filled_costs, label
from .leaks import IMAGES, LEAKS, handle_leaks
from .results import BenchmarkResults, HoldOut, blank_contaminated
from .rows import make_datasets, messages_of
from .supervision_info import SupervisionInfo

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..modeling.chat import Message, Query
    from ..modeling.composite import Manifest
    from ..modeling.meta import MetaLLM

logger = logging.getLogger(__name__)

INFO_FILE = PRODUCTS["supervision"]
POOL_FILE = "experts.yaml"
_PICTURES = "images"


@dataclass
class Supervision:
    """Train, validation and test splits, with the pool of the targets.

    Columns of each split are `id`, `messages` (list of role and content parts), `benchmark` and `subject`. The others
    are `target` (list of C), `weight`, `scores` (list of C, NaN where not measured) and `costs` (list of C or empty).
    A picture is the message part `{"type": "image_url", "image": NAME}`. `pictures` maps names to available files.
    """

    data: "DatasetDict"
    pool: ExpertPool
    info: SupervisionInfo
    pictures: Mapping[str, Path] = field(default_factory=dict)
    _absent: dict[str, np.ndarray] | None = field(default=None, init=False, repr=False)

    def side(self, name: str) -> "Dataset":
        """Return a split.

        Raises:
            ExpertokenError: The supervision has no split of that name, or the split is empty.
        """
        if name not in self.data or not len(self.data[name]):
            there = ", ".join(f"{key} ({len(part)})" for key, part in self.data.items())
            raise ExpertokenError(
                f"the supervision has no {name!r} split, it has {there}. Give `expertoken prepare` more results, or a "
                "larger share with --validation or --test."
            )
        return self.data[name]

    def arrays(self, name: str, *, utilities: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return targets `[N, C]`, utilities `[N, C]` and weights `[N]` of a split, float32, for training.

        Utilities are the scores, minus lambda times cost if the labels weigh costs. A candidate without any score in a
        benchmark scores 0 in it. A score that is unknown, or of a contaminated pair, is NaN.

        Args:
            name: Name of the split.
            utilities: If true, costs are subtracted.
        """
        part = self.side(name).with_format("numpy")
        weight = self.info.labelling.get("cost_weight", 0.0) if utilities else 0.0
        known = np.where(self.absent(name), np.float32(0), self.scores(name))
        known = utility(known, self._paid(name) if weight else None, weight)
        contaminated = self.info.labelling.get("contaminated", ())
        known = blank_contaminated(known, self.benchmarks(name), self.info.candidates, contaminated)
        return np.asarray(part["target"], np.float32), known, np.asarray(part["weight"], np.float32)

    def columns_of(self, names: Sequence[str]) -> list[int]:
        """Return the columns of candidates in targets, scores and costs.

        Raises:
            ExpertokenError: The supervision has no scores of one of them.
        """
        if absent := [name for name in names if name not in self.info.candidates]:
            raise ExpertokenError(
                f"the supervision has no scores of {', '.join(absent)}, only of {', '.join(self.info.candidates)}"
            )
        return [self.info.candidates.index(name) for name in names]

    def benchmarks(self, name: str) -> np.ndarray:
        """Return the benchmark of each query of a split, `[N]`.

        Raises:
            ExpertokenError: The split does not exist or is empty.
        """
        return np.asarray(self.side(name)["benchmark"], dtype=str)

    def queries(self, name: str, meta: "MetaLLM", *, quiet: bool = False) -> "list[Query]":
        """Return the queries of a split as the meta LLM reads them.

        Raises:
            ExpertokenError: The split does not exist or is empty, or the chat template rejects a query.
        """
        from ..modeling.states import encode_all

        conversations = self.conversations(name)
        if not quiet:
            contents = (message["content"] for messages in conversations for message in messages)
            parts = (part for content in contents if isinstance(content, list) for part in content)
            shown = [part for part in parts if part["type"] == IMAGE]
            absent = sum(not isinstance(part.get("image"), Picture) for part in shown)
            if shown and meta.sight is None:
                logger.warning(
                    "%s: %s reads text only, so it reads a placeholder for each of the %d pictures",
                    name,
                    meta.source.model,
                    len(shown),
                )
            elif absent:
                logger.warning(
                    "%s: %d pictures are missing (see prepare --images), so the meta LLM reads a placeholder",
                    name,
                    absent,
                )
        return encode_all(meta, conversations, name, quiet=quiet)

    def conversations(self, name: str) -> "list[list[Message]]":
        """Return the conversations of a split, with their pictures as far as available.

        Raises:
            ExpertokenError: The split does not exist or is empty.
        """
        known = {key: part_of(Picture(file, bytes.fromhex(key))) for key, file in self.pictures.items()}
        messages: Any = self.side(name)["messages"][:]
        if not known:
            return messages
        return [
            [m | {"content": [known.get(part["image"] or "", part) for part in m["content"]]} for m in conversation]
            for conversation in messages
        ]

    def _paid(self, name: str) -> np.ndarray:
        """Return the costs of a split with gaps filled, as the labels used them."""
        sides = [side for side in SPLITS if len(self.data[side])]
        costs = np.concatenate([self._costs(side) for side in sides])
        of = np.repeat(sides, [len(self.data[side]) for side in sides])
        self_index = len(self.pool) if self.info.has_self else None
        return filled_costs(costs, of != "test", self_index=self_index, names=self.info.candidates)[of == name]

    def scores(self, name: str) -> np.ndarray:
        """Return a split's scores as measured, `[N, C]` float32, NaN where not measured. Evaluation uses them."""
        return np.array(self.side(name).with_format("numpy")["scores"], np.float32)

    def absent(self, name: str) -> np.ndarray:
        """Return where a candidate has no score in the query's benchmark, on any split, `[N, C]` bool."""
        if self._absent is None:
            sides = [side for side in SPLITS if len(self.data[side])]
            everywhere = absent(
                np.concatenate([self.scores(side) for side in sides]),
                np.concatenate([self.benchmarks(side) for side in sides]),
            )
            ends = np.cumsum([len(self.data[side]) for side in sides])[:-1]
            self._absent = dict(zip(sides, np.split(everywhere, ends), strict=True))
        return self._absent[name]

    def origins(self, name: str) -> np.ndarray:
        """Return the id of each query of a split, `[N]`. A copy in a context has the id of its question."""
        return np.array([origin_of(key) for key in self.side(name)["id"]], dtype=object)

    def subjects(self, name: str) -> np.ndarray | None:
        """Return benchmark and subject of each query of a split, `[N]`, or None if some query has no subject."""
        side = self.side(name)
        if any(subject is None for subject in side["subject"]):
            return None
        return np.array([f"{b}/{s}" for b, s in zip(side["benchmark"], side["subject"], strict=True)], dtype=object)

    def measured(self) -> dict[str, int]:
        """Return each candidate's number of usable scores on train and validation, without copies in contexts."""
        sides = [side for side in SPLITS if side != "test" and len(self.data[side])]
        own = {side: np.array([origin_of(key) == key for key in self.data[side]["id"]]) for side in sides}
        flagged = self.info.labelling.get("contaminated", ())
        clean = {
            side: blank_contaminated(self.scores(side), self.benchmarks(side), self.info.candidates, flagged)
            for side in sides
        }
        counts = sum((~np.isnan(clean[side][own[side]])).sum(0) for side in sides)
        return dict(zip(self.info.candidates, np.asarray(counts).tolist(), strict=True))

    def usd_per_query(self) -> dict[str, float]:
        """Return the mean USD of each candidate's answers on train and validation, as far as costs are known."""
        found = [self._costs(side) for side in SPLITS if side != "test" and len(self.data[side])]
        costs = np.concatenate(found)
        known = ~np.isnan(costs)
        means = np.nansum(costs, 0) / np.maximum(known.sum(0), 1)
        return {n: float(means[i]) for i, n in enumerate(self.info.candidates) if known[:, i].any()}

    def costs(self, name: str) -> np.ndarray | None:
        """Return the USD of each candidate's answers on a split `[N, C]`, NaN where unknown, or None if all are."""
        costs = self._costs(name)
        return None if np.isnan(costs).all() else costs

    def _costs(self, name: str) -> np.ndarray:
        unknown = [np.nan] * len(self.info.candidates)
        return np.asarray([row or unknown for row in self.side(name)["costs"]], np.float32)

    def stamp(self) -> None:
        """Set the fingerprint from the contents."""
        digest = hashlib.sha256("\n".join(self.info.candidates).encode())
        for name, part in self.data.items():
            digest.update(name.encode())
            digest.update(json.dumps([part["id"][:], part["messages"][:]]).encode())
            if len(part):
                for array in self.arrays(name):
                    digest.update(array.tobytes())
        self.info.fingerprint = digest.hexdigest()[:16]

    def save(self, path: Path | str) -> None:
        """Write the folder, completely or not at all.

        Raises:
            ExpertokenError: The folder cannot be written, or holds a composite.
        """
        check_product(path, "supervision")
        with atomic_folder(path) as folder:
            with quiet_datasets():
                # `load_from_disk` needs a file for an empty split too.
                shards = {side: None if len(rows) else 1 for side, rows in self.data.items()}
                self.data.save_to_disk(folder / "data", num_shards=shards)
            if self.pictures:
                _copy_pictures(self.pictures, folder / _PICTURES)
            self.pool.to_yaml(folder / POOL_FILE)
            (folder / INFO_FILE).write_text(json.dumps(asdict(self.info), indent=2) + "\n", "utf-8")

    @classmethod
    def load(cls, path: Path | str) -> "Supervision":
        """Read a supervision folder.

        Raises:
            ExpertokenError: The folder is missing or damaged.
        """
        import datasets

        path = Path(path)
        try:
            info = SupervisionInfo(**json.loads(read_settled(path / INFO_FILE)))
            with quiet_datasets():
                data = datasets.load_from_disk(str(path / "data"))
        except (OSError, ValueError, TypeError) as error:
            if not path.exists():
                raise ExpertokenError(
                    f"{path}: expected a supervision folder, found none. Create it with `expertoken prepare`."
                ) from None
            raise ExpertokenError(
                f"{path}: not a supervision folder, expected one written by `expertoken prepare` ({one_line(error)})"
            ) from None
        files = sorted((path / _PICTURES).glob("*.*"))
        pictures = {file.stem: file for file in files if re.fullmatch("[0-9a-f]{32}", file.stem)}
        return cls(data, ExpertPool.from_yaml(path / POOL_FILE), info, pictures)


def _copy_pictures(pictures: Mapping[str, Path], folder: Path) -> None:
    """Copy pictures into a folder, each once, named by a hash of its content."""
    from .images import suffix_of

    folder.mkdir()
    for name, file in pictures.items():
        shutil.copyfile(file, folder / f"{name}{suffix_of(file)}")


def kept_at(supervision: Supervision, composite: Path) -> Path:
    """Return the path of a supervision inside a composite folder.

    The path has the fingerprint of the contents, so that an existing composite keeps the supervision it refers to.
    """
    return (composite / "supervision" / supervision.info.fingerprint).resolve()


def supervision_of(manifest: "Manifest", folder: Path, data: Supervision | Path | str | None = None) -> Supervision:
    """Return the supervision that a composite was trained on, or `data` if not None.

    Raises:
        ExpertokenError: The supervision is not at the path in the manifest.
    """
    if isinstance(data, Supervision):
        return data
    path = Path(data or manifest.data.get("path", ""))
    if data is None and not path.is_absolute():
        path = folder / path  # the manifest has a path relative to the folder
    if data is None and not path.exists():
        raise ExpertokenError(f"{folder}: its supervision is no longer at {path}. Pass its folder with --data.")
    loaded = Supervision.load(path)
    trained_on = manifest.data.get("fingerprint")
    if data is None and trained_on not in (None, loaded.info.fingerprint):
        # Its test split may hold queries that the composite was trained on.
        raise ExpertokenError(
            f"{path}: holds a different supervision from the one that the composite in {folder} was trained on. "
            f"Pass --data {path} to use it anyway."
        )
    return loaded


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Disable the progress bars of `datasets`, because loading and saving take milliseconds."""
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def pool_of(results: BenchmarkResults, self_model: str | None = None) -> ExpertPool:
    """Make a pool from the models of results, for users without a pool file.

    Raises:
        ResultsError: The results have no model `self_model`.
    """
    if self_model is not None and self_model not in results.models:
        raise ResultsError(f"self model: no results of {self_model!r}, {did_you_mean(self_model, results.models)}")
    experts = []
    for model in results.models:
        if model == self_model:
            experts.append(Expert(SELF, backend=SELF, results=model))
        else:
            name = "".join(c if c.isalnum() or c in "._-" else "-" for c in model.split("/")[-1]).lstrip("._-")
            experts.append(Expert(f"{name}-model" if name in ("", SELF) else name, model=model))
    return ExpertPool(experts)


def select_candidates(results: BenchmarkResults, pool: ExpertPool) -> BenchmarkResults:
    """Select one column of the results per candidate of the pool, in its order and under its names.

    Raises:
        ResultsError: Results of a candidate are missing.
    """
    columns = []
    for expert in pool.candidates:
        found = expert.find_in(results.models)
        if found is None:
            raise ResultsError(
                f"expert {expert.name!r}: no results under {expert.called}, only of {', '.join(results.models)}. Set "
                "`results:` in the pool to the right name."
            )
        columns.append(found)
    chosen = results.select(columns)
    name_of = dict(zip(columns, pool.names, strict=True))
    contaminated = frozenset((name_of[model], b) for model, b in results.contaminated if model in name_of)
    return replace(chosen, models=pool.names, contaminated=contaminated)


def check_shared(results: BenchmarkResults) -> None:
    """Warn of candidates that share no query with any other, because the results cannot compare them.

    Raises:
        ResultsError: There are several candidates, and none shares a query with another.
    """
    shared = results.shared()
    alone = [name for index, name in enumerate(results.models) if shared[index].sum() == shared[index, index]]
    if len(results.models) < 2 or not alone:
        return
    kinds = results.coverage()
    where = "; ".join(f"{name} on {', '.join(map(str, kinds.index[kinds[name] > 0][:3]))}" for name in alone[:4])
    told = f"no query was answered by {alone[0]} and by another candidate" if len(alone) == 1 else (
        f"{len(alone)} of {len(results.models)} candidates share no query with any other"
    )  # fmt: skip
    if len(alone) == len(results.models):
        raise ResultsError(
            f"{told} ({where}), so results cannot compare them. Questions that are the same in several files need the "
            "same 'benchmark' and text, or the same 'id', in each."
        )
    logger.warning("%s (%s), so only the benchmark's name distinguishes them", told, where)


def build_supervision(
    results: BenchmarkResults,
    pool: ExpertPool | None = None,
    *,
    labelling: Labelling | str = "query",
    leaks: str = "refuse",
    near_duplicates: str | None = None,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    hold_out: HoldOut | None = None,
    contexts: float = 0.0,
) -> Supervision:
    """Label benchmark results.

    Args:
        results: Scores of the pool's candidates. Other models are left out.
        pool: Pool of the experts. Defaults to a pool made from the results' models.
        labelling: Strategy and parameters, or a strategy's name (see `labels.STRATEGIES`).
        leaks: Handling of train queries that are also in the test split: `refuse`, `drop` (from train) or `keep`.
        near_duplicates: Handling of train queries that are nearly equal to a test query. `ignore` does not search for
            them. By default they are searched for if the extra `data` is installed, logged, and kept.
        validation: Share of train that becomes validation, if the results name no validation split.
        test: Share of all queries that becomes test, if the results name no test split.
        seed: Seed of the draws of validation, test and contexts.
        hold_out: Benchmarks or subjects that are the test split instead, see `BenchmarkResults.split`.
        contexts: Share of the train and validation questions that get a copy in a context (`contexts.CONTEXTS` in
            turn). Rows learn from it which parts of a chat to ignore, and the question that a follow-up refers to.

    Raises:
        ResultsError: Results of a candidate are missing.
        LeakError: There are leaks, and `leaks` is `refuse`.
        ExpertokenError: The strategy or the handling of leaks is unknown, costs are needed and missing, or `results`
            is of another type.
    """
    if not isinstance(results, BenchmarkResults):
        kind = type(results).__name__
        raise ExpertokenError(f"results: expected BenchmarkResults (see `read_results`), got {kind}")
    if leaks not in LEAKS:
        raise ExpertokenError(f"leaks: expected one of {', '.join(LEAKS)}, got {leaks!r}")
    if near_duplicates not in (None, "ignore", *LEAKS):
        raise ExpertokenError(f"near_duplicates: expected ignore, {', '.join(LEAKS)}, got {near_duplicates!r}")
    if pool is not None:
        agree(pool)
    labelling = Labelling(labelling) if isinstance(labelling, str) else labelling
    pool = pool or pool_of(results)
    results = select_candidates(results, pool)
    check_shared(results)
    results = results.without_lone_side().split(validation=validation, test=test, seed=seed, hold_out=hold_out)
    if near_duplicates is None:
        near_duplicates = "keep" if find_spec("datasketch") else "ignore"
    kept, found = handle_leaks(results.queries, leaks, near_duplicates)
    results = results if kept.all() else results.take(kept)
    side = results.queries["split"].to_numpy()
    if not (side == "train").any():
        raise ResultsError(
            f"expected train queries, found only the splits {', '.join(sorted(set(side)))}. Add results to train on."
        )
    targets, weights = label(
        results.clean_scores,
        results.queries["benchmark"],
        results.queries["subject"],
        side != "test",
        labelling,
        costs=results.costs,
        self_index=len(pool) if pool.has_self else None,
        names=pool.names,
        missing=absent(results.scores, results.queries["benchmark"]),
    )
    if not weights[side == "train"].any():
        raise ResultsError(
            "every candidate has the same score on every train query: nothing to learn from. Add other results."
        )
    messages, queries = messages_of(results.queries), results.queries
    rows, copied, conversations = copies(queries, messages, contexts, seed)
    queries, messages = pd.concat([queries, copied], ignore_index=True), messages + conversations
    rows = np.concatenate([np.arange(len(results)), rows]).astype(int)
    costs = None if results.costs is None else results.costs[rows]
    data = make_datasets(queries, messages, results.scores[rows], costs, targets[rows], weights[rows])
    recorded = asdict(labelling) | {"validation": validation, "test": test, "seed": seed, "contexts": contexts}
    recorded["hold_out"] = None if hold_out is None else [hold_out[0], list(hold_out[1])]
    recorded["contaminated"] = sorted(list(pair) for pair in results.contaminated)
    info = SupervisionInfo(pool.names, pool.has_self, recorded, {k: len(part) for k, part in data.items()}, found)
    supervision = Supervision(data, pool, info, _named(results.pictures, results.queries))
    supervision.stamp()
    return supervision


def _named(pictures: Mapping[str, Path], queries: "pd.DataFrame") -> dict[str, Path]:
    """Return the pictures that queries name."""
    names = {name for images in queries.get(IMAGES, ()) for name in images or ()}
    return {name: file for name, file in pictures.items() if name in names}
