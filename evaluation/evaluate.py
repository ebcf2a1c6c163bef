"""The composite on one side of a supervision, beside everything it has to beat."""

import logging
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data_prep.supervision import Supervision, supervision_of
from ..modeling.composite import Composite, load_composite, read_manifest
from ..modeling.errors import ExpertokenError, did_you_mean
from ..modeling.fingerprint import library_versions
from . import baselines as learnt
from . import metrics
from .report import CalibrationBin, Gain, Report, Result
from .report_metrics import add_calibration, add_pair, add_scores, add_trade_offs
from .robustness import robustness as measure_robustness
from .splits import RouterResult, Split, expected_costs, read_split

logger = logging.getLogger(__name__)

_PARTIAL_ORACLE = 0.5
_CURVE_RESAMPLES = 1000  # resamples of metrics that are not means: each of them costs a curve
_FOLD = 5  # where there is one side to learn from, every n-th query of it is validation


def evaluate(
    composite: Composite | Path | str,
    data: Supervision | Path | str | None = None,
    split: str = "test",
    *,
    baselines: Sequence[str] | str | None = None,
    embedder: str | None = None,
    encoder: str | None = None,
    encoder_epochs: int = 3,
    robustness: int = 0,
    resamples: int = 5000,
    trust_remote_code: bool = False,
) -> Report:
    """Score a composite against every single candidate, simple and learnt baselines and the per-query oracle.

    A candidate that was not measured on a query scores 0 there; queries that nobody was measured on are left out.

    Args:
        composite: a folder, or a loaded one.
        data: a supervision folder, or a loaded one; the one it was trained on where not given (folders only).
        split: which side.
        baselines: names from `baselines.METHODS`. Where not given, all of them if scikit-learn is installed.
        embedder: a sentence-transformers model (hub id or folder) that gives the baselines their features; the meta
            LLM's states, which the composite has too, where not given.
        encoder: also fine-tune this encoder (hub id or folder) as a baseline; takes its time.
        encoder_epochs: of that, over the train side.
        robustness: on how many queries to try changes of the text; 0 leaves that out.
        resamples: of the bootstrap.
        trust_remote_code: allow the base model's repository to run its own code.

    Raises:
        ExpertokenError: the supervision lacks the side, or a candidate of the composite.
    """
    started = time.perf_counter()
    if not isinstance(composite, Composite | Path | str):
        kind = type(composite).__name__
        raise ExpertokenError(f"composite: expected a folder or a `Composite` (`CompositeModel` has one), got {kind}")
    baselines = [baselines] if isinstance(baselines, str) else baselines
    folder = None if isinstance(composite, Composite) else Path(composite)
    supervision = _supervision(folder, data)
    supervision.side(split)  # a misspelt split or baseline is an error before anything is loaded
    if unknown := [name for name in baselines or () if name not in learnt.METHODS]:
        raise ExpertokenError(f"no baseline {unknown[0]!r}, {did_you_mean(unknown[0], learnt.METHODS)}")
    for model in filter(None, (embedder, encoder)):
        learnt.check_model(model)
    if not isinstance(composite, Composite):
        composite = load_composite(composite, trust_remote_code=trust_remote_code)
    if baselines is None:
        baselines = list(learnt.METHODS) if find_spec("sklearn") else []
    names = composite.pool.names
    test, known = _splits(composite, supervision, split, states=bool(baselines) and not embedder)
    expected_cost = expected_costs(known, test)
    if test.costs is not None:
        test = replace(test, costs=np.where(np.isnan(test.costs), expected_cost, test.costs))
    decided = _decided(composite, test)
    chosen = decided.chosen
    routers = {"composite": test.choose(chosen, "composite", predicted=decided.expected)}
    routers |= {name: test.choose(np.full(len(chosen), index), "expert") for index, name in enumerate(names)}
    routers |= _simple(names, known, test)
    routers |= _learnt(baselines, embedder, (encoder, encoder_epochs), known, test)
    routers["oracle"] = test.choose(metrics.oracle(test.scores, test.costs), "bound")
    judged, confidence, outcome = _judged(decided, routers["composite"], test)
    report = Report(
        results=_results(routers, test.benchmarks, resamples),
        share_of_queries={name: float((chosen == index).mean()) for index, name in enumerate(names)},
        queries_by_benchmark={
            str(n): int(c) for n, c in zip(*np.unique(test.benchmarks, return_counts=True), strict=True)
        },
        confusion_matrix=metrics.confusion(test.targets, chosen).tolist(),
        calibration_bins=[CalibrationBin(*part) for part in metrics.calibration(confidence, outcome)],
    )
    counts = metrics.resample_counts(test.benchmarks, min(resamples, _CURVE_RESAMPLES))
    add_scores(report, routers, test, chosen, decided.probabilities, counts)
    if len(judged):
        add_calibration(report, confidence, outcome, counts[:, judged])
    add_pair(report, routers, known, test, counts)
    if test.costs is not None:
        add_trade_offs(report, routers, test, expected_cost, counts)
    if robustness:
        report.robustness = _robustness(composite, test, robustness)
    report.settings = {
        "split": split,
        "queries": len(chosen),
        "resamples": resamples,
        "baselines_on": embedder or "states of the meta LLM",
        **decided.meaning,
        "without_known_cost": [n for n, cost in zip(names, expected_cost, strict=True) if np.isnan(cost)],
        **_origin(composite, supervision),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gib": round(_peak_gib(), 2),
    }
    return report


@dataclass(frozen=True)
class _Decided:
    """The composite's decisions on a split.

    Attributes:
        chosen: index of the candidate chosen, `[N]`.
        probabilities: dispatch distribution, `[N, C]`.
        expected: what the composite expects of each candidate, `[N, C]`: chances of being right under the objective
            `correctness`, else the probabilities.
        of_correctness: whether `expected` holds chances.
    """

    chosen: np.ndarray
    probabilities: np.ndarray
    expected: np.ndarray
    of_correctness: bool

    @property
    def meaning(self) -> dict[str, str]:
        """What confidence and outcome are, for the report."""
        if self.of_correctness:
            return {"confidence": "chance of being right", "outcome": "its mean score"}
        return {"confidence": "probability of the chosen candidate", "outcome": "its mean share of the label"}


def _decided(composite: Composite, test: Split) -> _Decided:
    probabilities = np.exp(test.logits - test.logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    of_correctness = composite.manifest.training.get("objective") == "correctness"
    expected = _chances(test.logits, with_self=composite.pool.has_self) if of_correctness else probabilities
    return _Decided(test.logits.argmax(1), probabilities, expected, of_correctness)


def _judged(decided: _Decided, ours: RouterResult, test: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the queries on which confidence is judged, and the confidence and the outcome on each.

    The outcome is what the probabilities were trained to be: whether the answer is right, or the candidate's share of
    the label, which queries that all got right (or none) do not have.
    """
    chosen = decided.chosen
    judged = np.arange(len(chosen)) if decided.of_correctness else np.flatnonzero(test.weights)
    outcome = ours.values if decided.of_correctness else test.targets[np.arange(len(chosen)), chosen]
    return judged, decided.expected.max(1)[judged], outcome[judged]


def _splits(composite: Composite, supervision: Supervision, split: str, *, states: bool) -> tuple[Split, list[Split]]:
    """Return the split to evaluate on, and those that baselines learn from, with or without states.

    Raises:
        ExpertokenError: there is nothing to learn from.
    """
    test = read_split(composite, supervision, split)
    # Never the split that is scored: baselines would be learnt on the questions that they are asked.
    others = [name for name in ("train", "validation") if len(supervision.data[name]) and name != split]
    if not others:
        raise ExpertokenError(f"nothing but the {split} side: baselines have nothing to be chosen on")
    return test, [read_split(composite, supervision, name, states=states) for name in others]


def _robustness(composite: Composite, test: Split, count: int) -> list[dict[str, Any]]:
    place = np.random.default_rng(0).permutation(len(test.prompts))[:count]
    prompts = [test.prompts[index] for index in place]
    found = measure_robustness(composite.meta, prompts, test.scores[place], with_self=composite.pool.has_self)
    return [asdict(entry) for entry in found]


def _origin(composite: Composite, supervision: Supervision) -> dict[str, Any]:
    """Return what was evaluated, for the report."""
    return {
        "data_fingerprint": supervision.info.fingerprint,
        "base": composite.manifest.base,
        "training": composite.manifest.training,
        "labelling": supervision.info.labelling,
        "versions": library_versions() | _commit(),
    }


def _chances(logits: np.ndarray, *, with_self: bool) -> np.ndarray:
    """Each candidate's probability of being right, `[N, C]`, as the objective `correctness` means it (of self, 1/2).

    Differences of logits choose the same candidate, but say little about what is lost with another: that costs are
    weighed against these is worth 0.085 of APGR on RouteLLM's data (docs/results.md).
    """
    return 1 / (1 + np.exp((logits[:, -1:] if with_self else 0.0) - logits))


def _supervision(folder: Path | None, data: Supervision | Path | str | None) -> Supervision:
    if isinstance(data, Supervision):
        return data
    if folder is not None:
        return supervision_of(read_manifest(folder), folder, data)
    if data is None:
        raise ExpertokenError("a composite in memory does not know its supervision; say which with `data`")
    return Supervision.load(data)


def _results(routers: dict[str, RouterResult], benchmarks: np.ndarray, resamples: int) -> list[Result]:
    ours = routers["composite"].values
    rows = []
    for name, router in routers.items():
        row = Result(
            name,
            router.kind,
            metrics.mean_over_benchmarks(router.values, benchmarks),
            metrics.bootstrap_interval(router.values, benchmarks, resamples=resamples),
            metrics.benchmark_means(router.values, benchmarks),
            # A mean over the queries whose cost happens to be known would be another router's.
            None if router.costs is None or np.isnan(router.costs).any() else float(router.costs.mean()),
            hyperparameter=router.setting,
        )
        if name != "composite":
            difference = ours - router.values
            row.composite_gain = Gain(
                metrics.mean_over_benchmarks(difference, benchmarks),
                metrics.bootstrap_interval(difference, benchmarks, resamples=resamples),
                metrics.paired_p_value(difference, benchmarks, resamples=resamples),
            )
        rows.append(row)
    return rows


def _simple(names: list[str], known: list[Split], test: Split) -> dict[str, RouterResult]:
    """Best single and best per dataset (both chosen on train and validation), random, and half an oracle."""
    scores = np.concatenate([side.scores for side in known])
    benchmarks = np.concatenate([side.benchmarks for side in known])
    kinds = np.unique(benchmarks)
    means = np.stack([scores[benchmarks == name].mean(0) for name in kinds])
    single = int(means.mean(0).argmax())
    best_of = {name: int(row.argmax()) for name, row in zip(kinds, means, strict=True)}
    per_dataset = np.array([best_of.get(name, single) for name in test.benchmarks])
    half = metrics.partial_oracle(test.scores, _PARTIAL_ORACLE, test.costs)
    costs = None if test.costs is None else test.costs.mean(1)
    return {
        f"best single ({names[single]})": test.choose(np.full(len(test.raw), single), "baseline"),
        "best per dataset": test.choose(per_dataset, "baseline"),
        "random": RouterResult("baseline", test.scores.mean(1), costs),
        f"half oracle, r_o({_PARTIAL_ORACLE})": test.choose(half, "bound"),
    }


def _learnt(
    names: Sequence[str], embedder: str | None, encoder: tuple[str | None, int], known: list[Split], test: Split
) -> dict[str, RouterResult]:
    """Routers from libraries, on the same states or on an embedder's."""
    if len(known) == 1:
        rows = np.arange(len(known[0].raw))
        known = [known[0].take(rows[rows % _FOLD > 0]), known[0].take(rows[rows % _FOLD == 0])]
    sides = (*known, test)
    features = [side.features for side in sides]
    if embedder and names:
        every = learnt.embed(embedder, [prompt for side in sides for prompt in side.prompts])
        features = np.split(every, np.cumsum([len(side.prompts) for side in sides])[:-1])
    train, validation = (
        learnt.Side(found, side.raw, side.benchmarks) for found, side in zip(features[:2], known, strict=True)
    )

    def score(chosen: np.ndarray, side: learnt.Side) -> float:
        got = metrics.chosen_scores(np.nan_to_num(side.scores), chosen)
        return metrics.mean_over_benchmarks(got, side.benchmarks)

    found = {}
    bar = tqdm(names, desc="baselines", unit="router", leave=False, disable=not names)
    for name in bar:
        bar.set_postfix_str(name)
        predicted, setting = learnt.predict(name, train, validation, features[-1], score)
        found[name] = test.choose(predicted.argmax(1), "router", predicted=predicted, setting=setting)
    model, epochs = encoder
    if model:
        texts = {"train": known[0].prompts, "test": test.prompts}
        predicted = learnt.encoder(model, texts, train, epochs=epochs)
        setting = f"{model}, {epochs} epochs"
        found["encoder"] = test.choose(predicted.argmax(1), "router", predicted=predicted, setting=setting)
    return found


def _peak_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def _commit() -> dict[str, str]:
    """The checkout's commit, where this is one; `-dirty` with changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own arguments
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": told.stdout.strip()}
