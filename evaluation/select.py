"""Choice of one model for a new task, from its inputs alone (LLM Routing with Benchmark Datasets, arXiv 2309.15789)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data_prep.supervision import Supervision, supervision_of
from ..modeling.composite import Composite, load_composite
from ..modeling.errors import ExpertokenError, require_extra
from ..modeling.states import states_of
from .baselines import Side, knn, means_of

_NEIGHBOURS = 5
_RIGHT = 0.5
_FOLDS = 5
_PRIOR = 5.0  # weight of the estimate from distance, in labelled examples


@dataclass(frozen=True)
class Ranking:
    """Expected performance of one model on the new task.

    Attributes:
        name: Name of the model.
        s1: Mean predicted probability that the model is right.
        s2: Share of inputs on which the model is predicted to be right.
        s3: s2 corrected by the predictor's expected accuracy on this task.
        trust: p(d, m), the predictor's expected accuracy on this task.
        average: Mean score of the model over the known benchmarks. "Best on average" ranks by it.
    """

    name: str
    s1: float
    s2: float
    s3: float
    trust: float
    average: float


def select(
    composite: Path | str,
    queries: Sequence[str],
    *,
    labelled: tuple[Sequence[str], np.ndarray] | None = None,
    data: Path | str | None = None,
    trust_remote_code: bool = False,
) -> list[Ranking]:
    """Rank the experts of a composite for an unlabelled task, best S3 first.

    A predictor per model estimates on which inputs the model is right. It uses k nearest neighbours on the meta LLM's
    states, where the paper uses sentence embeddings. The accuracy of the predictor on a task, p(d, m), falls with the
    task's distance from the benchmarks.

    To estimate it, each benchmark in turn is held out, and also a part of each, which the paper does not do. A Gaussian
    kernel smoother over (distance, accuracy) then gives p(d, m) at the new task's distance.

    Args:
        composite: Composite folder.
        queries: Inputs of the task.
        labelled: A few further inputs of the task with scores `[n, C]` over the composite's candidates, NaN where not
            measured. They join the predictors' examples and correct p(d, m).
        data: Supervision folder, if it was moved.
        trust_remote_code: If true, allow the base model's repository to run its own code.

    Raises:
        ExpertokenError: There are no queries, or results of one benchmark only, so none can be held out.
        ImportError: The extra `eval` is not installed.
    """
    require_extra("sklearn", "eval")
    if not len(queries):
        raise ExpertokenError("expected at least one query of the task, found none")
    folder = Path(composite)
    loaded = load_composite(folder, trust_remote_code=trust_remote_code)
    supervision = supervision_of(loaded.manifest, folder, data)
    names = loaded.pool.names
    known = _known(loaded, supervision)
    if len(np.unique(known.benchmarks)) < 2:
        raise ExpertokenError(
            "expected results of at least two benchmarks, found one. The accuracy on a new task can't be estimated"
        )
    states = np.asarray(states_of(loaded.meta, list(queries), label="task states").hidden)
    distances, accuracies = _observed(known)
    trust = _smooth(distances, accuracies, _distance(states, known.features))
    examples = known
    if labelled is not None:
        texts, scores = labelled
        extra = np.asarray(states_of(loaded.meta, list(texts), label="labelled states").hidden)
        trust = _corrected(trust, knn(known, _NEIGHBOURS)(Side.asked(extra)), scores)
        examples = known + Side(extra, scores, np.full(len(extra), "(task)"))
    predicted = knn(examples, _NEIGHBOURS)(Side.asked(states))
    s1, s2 = predicted.mean(0), (predicted > _RIGHT).mean(0)
    s3 = s2 * trust + (1 - s2) * (1 - trust)
    kinds = np.unique(known.benchmarks)
    # A candidate without any score in a benchmark has a mean of 0 there.
    means = np.stack([means_of(known.scores[known.benchmarks == kind]) for kind in kinds])
    average = means.mean(0)
    found = [Ranking(name, *map(float, row)) for name, *row in zip(names, s1, s2, s3, trust, average, strict=True)]
    return sorted(found, key=lambda entry: (-entry.s3, -entry.s1))


def _known(loaded: Composite, supervision: Supervision) -> Side:
    """Return the train and validation splits, with candidates in the composite's order."""
    columns = supervision.columns_of(loaded.pool.names)
    sides = [name for name in ("train", "validation") if len(supervision.data[name])]
    features = [
        np.asarray(states_of(loaded.meta, supervision.conversations(name), label=f"{name} states").hidden)
        for name in sides
    ]
    scores = [np.where(supervision.absent(name), 0, supervision.scores(name))[:, columns] for name in sides]
    benchmarks = [supervision.benchmarks(name) for name in sides]
    return Side(np.concatenate(features), np.concatenate(scores), np.concatenate(benchmarks))


def _distance(states: np.ndarray, examples: np.ndarray) -> float:
    """Return u(d), the mean cosine distance of a task's inputs to their nearest examples."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=min(_NEIGHBOURS, len(examples)), metric="cosine").fit(examples)
    return float(index.kneighbors(states)[0].mean())


def _observed(known: Side) -> tuple[np.ndarray, np.ndarray]:
    """Return distances `[2B]` and accuracies of the predictors `[2B, C]`, at two distances per benchmark.

    The far distance is for predictors without the benchmark, as in the paper. The near distance is for predictors
    without a fifth of its queries. So a task similar to a benchmark is not judged by tasks that are similar to none.
    """
    fold = np.random.default_rng(0).integers(_FOLDS, size=len(known.features))
    distances, accuracies = [], []
    for kind in np.unique(known.benchmarks):
        inside = known.benchmarks == kind
        for held in (inside, inside & (fold == 0)):
            if not held.any():
                continue
            rest = Side(known.features[~held], known.scores[~held], known.benchmarks[~held])
            predicted = knn(rest, _NEIGHBOURS)(Side.asked(known.features[held])) > _RIGHT
            measured = ~np.isnan(known.scores[held])
            right = (predicted == (known.scores[held] > _RIGHT)) & measured
            distances.append(_distance(known.features[held], rest.features))
            accuracies.append(np.where(measured.any(0), right.sum(0) / np.maximum(measured.sum(0), 1), 0.5))
    return np.array(distances), np.array(accuracies)


def _smooth(distances: np.ndarray, accuracies: np.ndarray, at: float) -> np.ndarray:
    """Return the Nadaraya-Watson estimate at a distance, `[C]`, with Silverman's bandwidth of the distances."""
    width = 1.06 * distances.std() * len(distances) ** -0.2 or 1e-6
    log = -0.5 * ((distances - at) / width) ** 2
    weights = np.exp(log - log.max())  # far from all distances, only the nearest counts
    return weights @ accuracies / weights.sum()


def _corrected(trust: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return p(d, m) corrected by labelled examples: the mean over these and `_PRIOR` examples of the estimate."""
    measured = ~np.isnan(truth)
    right = ((predicted > _RIGHT) == (truth > _RIGHT)) & measured
    return (right.sum(0) + _PRIOR * trust) / (measured.sum(0) + _PRIOR)
