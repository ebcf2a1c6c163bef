"""Supervision: per query the messages and a target over the candidates, saved with `datasets`."""

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
class SupervisionInfo:
    """What a supervision folder says about itself.

    Attributes:
        candidates: names, in the order of every target and score.
        has_self: whether the last candidate is the meta LLM itself.
        labelling: strategy and its parameters, shares of the sides, contaminated (candidate, benchmark) pairs.
        sizes: queries per split.
        leaks: equal and near pairs (train id, test id, similarity) that were found, and what was done about them.
        fingerprint: of queries, scores, targets and weights.
        datasets: hub ids of the datasets that the results came from.
    """

    candidates: list[str]
    has_self: bool
    labelling: dict[str, Any]
    sizes: dict[str, int] = field(default_factory=dict)
    leaks: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    datasets: list[str] = field(default_factory=list)

    def described(self, path: Path) -> dict[str, Any]:
        """Return the description of a supervision that a composite's manifest keeps."""
        found = {"path": str(path), "fingerprint": self.fingerprint, "sizes": self.sizes}
        return found | ({"datasets": self.datasets} if self.datasets else {})


@dataclass
class Supervision:
    """Train, validation and test sides, with the pool that the targets are about.

    Columns of each side: `id`, `messages` (list of role and content parts), `benchmark`, `subject`, `target` (list of
    C), `weight`, `scores` (list of C, NaN where not measured), `costs` (list of C or empty). A part of a message that
    stands for a picture is `{"type": "image_url", "image": NAME}`; `pictures` has the files by name, as far as they are
    here.
    """

    data: "DatasetDict"
    pool: ExpertPool
    info: SupervisionInfo
    pictures: Mapping[str, Path] = field(default_factory=dict)
    _absent: dict[str, np.ndarray] | None = field(default=None, init=False, repr=False)

    def side(self, name: str) -> "Dataset":
        """One side.

        Raises:
            ExpertokenError: there is none of that name, or it is empty.
        """
        if name not in self.data or not len(self.data[name]):
            there = ", ".join(f"{key} ({len(part)})" for key, part in self.data.items())
            raise ExpertokenError(
                f"the supervision has no {name!r} side; it has {there}: give `expertoken prepare` more results, or a "
                "larger share by --validation or --test"
            )
        return self.data[name]

    def arrays(self, name: str, *, utilities: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what is learnt from a side: targets `[N, C]`, utilities `[N, C]` and weights `[N]`, float32.

        Utilities are the scores, less lambda times cost where the labels count costs. A candidate without any score in
        a benchmark scores 0 there; a score that is merely unknown, or of a contaminated pair, is NaN.

        Args:
            name: name of the side.
            utilities: whether costs are taken off.
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
            ExpertokenError: the supervision has no scores of one of them.
        """
        if absent := [name for name in names if name not in self.info.candidates]:
            raise ExpertokenError(
                f"the supervision has no scores of {', '.join(absent)}; it has {', '.join(self.info.candidates)}"
            )
        return [self.info.candidates.index(name) for name in names]

    def benchmarks(self, name: str) -> np.ndarray:
        """Return the benchmark of each query of a side, `[N]`.

        Raises:
            ExpertokenError: there is no such side, or it is empty.
        """
        return np.asarray(self.side(name)["benchmark"], dtype=str)

    def queries(self, name: str, meta: "MetaLLM", *, quiet: bool = False) -> "list[Query]":
        """Return the queries of a side as the meta LLM reads them.

        Raises:
            ExpertokenError: there is no such side, or it is empty; or the chat template refuses a query.
        """
        from ..modeling.states import encode_all

        conversations = self.conversations(name)
        if meta.sight is not None and not quiet:
            parts = (part for messages in conversations for message in messages for part in message["content"])
            if absent := sum(part["type"] == IMAGE and not isinstance(part.get("image"), Picture) for part in parts):
                logger.warning("%s: %d pictures are not here (prepare --images): a placeholder is read", name, absent)
        return encode_all(meta, conversations, name, quiet=quiet)

    def conversations(self, name: str) -> "list[list[Message]]":
        """Return the conversations of a side, with their pictures as far as those are here.

        Raises:
            ExpertokenError: there is no such side, or it is empty.
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
        """Costs of a side without gaps, as the labels were made with them."""
        sides = [side for side in SPLITS if len(self.data[side])]
        costs = np.concatenate([self._costs(side) for side in sides])
        of = np.repeat(sides, [len(self.data[side]) for side in sides])
        self_index = len(self.pool) if self.info.has_self else None
        return filled_costs(costs, of != "test", self_index=self_index, names=self.info.candidates)[of == name]

    def scores(self, name: str) -> np.ndarray:
        """Scores of a side as measured, `[N, C]` float32, NaN where a candidate was not: what evaluation counts."""
        return np.array(self.side(name).with_format("numpy")["scores"], np.float32)

    def absent(self, name: str) -> np.ndarray:
        """Return where a candidate of a side has no score in the whole benchmark, on any side, `[N, C]` bool."""
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
        """Return the id of each query of a side, of a copy in a context that of its question, `[N]`."""
        return np.array([origin_of(key) for key in self.side(name)["id"]], dtype=object)

    def subjects(self, name: str) -> np.ndarray | None:
        """Return benchmark and subject of each query of a side, `[N]`; None where a query has no subject."""
        side = self.side(name)
        if any(subject is None for subject in side["subject"]):
            return None
        return np.array([f"{b}/{s}" for b, s in zip(side["benchmark"], side["subject"], strict=True)], dtype=object)

    def measured(self) -> dict[str, int]:
        """Return on how many queries of the learning sides each candidate has a usable score, without copies."""
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
        """Return the mean USD of each candidate's answers on the learning sides, as far as costs are known."""
        found = [self._costs(side) for side in SPLITS if side != "test" and len(self.data[side])]
        costs = np.concatenate(found)
        known = ~np.isnan(costs)
        means = np.nansum(costs, 0) / np.maximum(known.sum(0), 1)
        return {n: float(means[i]) for i, n in enumerate(self.info.candidates) if known[:, i].any()}

    def costs(self, name: str) -> np.ndarray | None:
        """USD of each candidate's answers `[N, C]` of a side, NaN where not known; None where nothing is known."""
        costs = self._costs(name)
        return None if np.isnan(costs).all() else costs

    def _costs(self, name: str) -> np.ndarray:
        unknown = [np.nan] * len(self.info.candidates)
        return np.asarray([row or unknown for row in self.side(name)["costs"]], np.float32)

    def stamp(self) -> None:
        """Set the fingerprint to that of the contents."""
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
            ExpertokenError: it could not be written, or holds a composite.
        """
        check_product(path, "supervision")
        with atomic_folder(path) as folder:
            with quiet_datasets():
                # A side without queries gets its file, too: `load_from_disk` can't do without.
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
            ExpertokenError: it is missing or damaged.
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
                    f"{path}: there is no supervision folder; `expertoken prepare` makes one"
                ) from None
            raise ExpertokenError(
                f"{path}: not a supervision folder, made by `expertoken prepare` ({one_line(error)})"
            ) from None
        files = sorted((path / _PICTURES).glob("*.*"))
        pictures = {file.stem: file for file in files if re.fullmatch("[0-9a-f]{32}", file.stem)}
        return cls(data, ExpertPool.from_yaml(path / POOL_FILE), info, pictures)


def _copy_pictures(pictures: Mapping[str, Path], folder: Path) -> None:
    """Copy pictures into a folder, each once, by the name of its content."""
    from .images import suffix_of

    folder.mkdir()
    for name, file in pictures.items():
        shutil.copyfile(file, folder / f"{name}{suffix_of(file)}")


def kept_at(supervision: Supervision, composite: Path) -> Path:
    """Return where a supervision is kept inside a composite's folder.

    The folder is named after its contents, so that a composite that is there keeps the supervision it points to.
    """
    return (composite / "supervision" / supervision.info.fingerprint).resolve()


def supervision_of(manifest: "Manifest", folder: Path, data: Supervision | Path | str | None = None) -> Supervision:
    """The supervision a composite was trained on; `data` where it is given.

    Raises:
        ExpertokenError: it is not where the composite remembers it.
    """
    if isinstance(data, Supervision):
        return data
    path = Path(data or manifest.data.get("path", ""))
    if data is None and not path.is_absolute():
        path = folder / path  # as the manifest has it on disk
    if data is None and not path.exists():
        raise ExpertokenError(f"{folder}: its supervision is not at {path} any more; say where with --data")
    loaded = Supervision.load(path)
    trained_on = manifest.data.get("fingerprint")
    if data is None and trained_on not in (None, loaded.info.fingerprint):
        # Its test side may hold what the composite was trained on.
        raise ExpertokenError(
            f"{path}: another supervision stands there than the composite in {folder} was trained on; say "
            f"--data {path} to take it all the same"
        )
    return loaded


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the bars of `datasets`: what they count takes milliseconds."""
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


def pool_of(results: BenchmarkResults, self_model: str | None = None) -> ExpertPool:
    """A pool made from the models that results name, for those who have not written one yet.

    Raises:
        ResultsError: there are no results of `self_model`.
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
    """The results with one column per candidate of the pool, in its order and under its names.

    Raises:
        ResultsError: results of a candidate are missing.
    """
    columns = []
    for expert in pool.candidates:
        found = expert.find_in(results.models)
        if found is None:
            raise ResultsError(
                f"expert {expert.name!r}: no results under {expert.called}; results are of "
                f"{', '.join(results.models)}. Name the right one as `results:` in the pool"
            )
        columns.append(found)
    chosen = results.select(columns)
    name_of = dict(zip(columns, pool.names, strict=True))
    contaminated = frozenset((name_of[model], b) for model, b in results.contaminated if model in name_of)
    return replace(chosen, models=pool.names, contaminated=contaminated)


def check_shared(results: BenchmarkResults) -> None:
    """Tell of candidates that share no query with any other: nothing says who is better where they are.

    Raises:
        ResultsError: there are several candidates, and that holds for all of them.
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
            f"{told} ({where}): nothing says who is better. If questions are the same in several files, they need the "
            "same 'benchmark' and text, or the same 'id', in each"
        )
    logger.warning("%s (%s): only the benchmark's name tells them apart", told, where)


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
        results: scores of the pool's candidates; other models are left out.
        pool: the experts; made from the results' models where not given.
        labelling: strategy and parameters, or a strategy's name (see `labels.STRATEGIES`).
        leaks: what to do about train queries that stand in the test side: `refuse`, `drop` (from train) or `keep`.
        near_duplicates: the same about train queries that are nearly a test query; `ignore` does not look for them. By
            default they are looked for where the extra `data` is installed, told, and kept.
        validation: share of train that becomes validation, where the results name no validation side.
        test: share of all that becomes test, where the results name no test side.
        seed: of those draws.
        hold_out: benchmarks or subjects that are the test side instead, see `BenchmarkResults.split`.
        contexts: share of the train and validation questions that get a copy in a context (`contexts.CONTEXTS` in
            turn), so that rows learn what of a chat to ignore and what a follow-up is about.

    Raises:
        ResultsError: results of a candidate are missing.
        LeakError: there are leaks and `leaks` is `refuse`.
        ExpertokenError: there is no such strategy or way to handle leaks, or costs are needed and not there; or these
            are no results.
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
        raise ResultsError(f"no train queries (sides: {', '.join(sorted(set(side)))}); nothing could be learnt")
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
        raise ResultsError("every candidate scores alike on every train query; there is nothing to learn from")
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
