"""Evaluation of a composite on one split of a supervision, against experts, baselines and bounds."""

import copy
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
import torch
from tqdm.auto import tqdm

from ..data_prep.labels import fill_unknown
from ..data_prep.supervision import Supervision, supervision_of
from ..modeling.chat import Query, text_of
from ..modeling.composite import Composite, load_composite, read_manifest
from ..modeling.errors import ExpertokenError, did_you_mean
from ..modeling.fingerprint import library_versions
from ..modeling.meta import MetaLLM
from ..modeling.state import StateSpec
from ..modeling.states import cached_states, encode_all, state_logits
from . import baselines as learnt
from . import metrics
from .chats import in_chats
from .report import BLIND, WITHOUT_PICTURES, CalibrationBin, Gain, Report, Result
from .report_metrics import add_calibration, add_pair, add_scores, add_trade_offs
from .robustness import robustness as measure_robustness
from .splits import RouterResult, Split, expected_costs, read_split

logger = logging.getLogger(__name__)

_HALF = 0.5  # the p of RouterEval's r_o(p)
_CURVE_RESAMPLES = 1000  # resamples of metrics that are not means: each resample costs a curve
_FOLD = 5  # with only one split to learn from, every n-th query of it is validation


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
    contexts: int = 0,
    resamples: int = 5000,
    trust_remote_code: bool = False,
) -> Report:
    """Score a composite against every single candidate, simple and learnt baselines and the per-query oracle.

    An unknown score counts as the candidate's mean in the benchmark. A candidate without any score in a benchmark
    counts as 0 there. Queries without any score are left out.

    Args:
        composite: Composite folder, or a loaded composite.
        data: Supervision folder, or a loaded supervision. Defaults to the one that a composite folder was trained on.
        split: Name of the split to evaluate on.
        baselines: Names from `baselines.METHODS`. Defaults to all except `ON_REQUEST`, if scikit-learn is installed.
        embedder: Sentence-transformers model (hub id or folder) for the baselines' features. Defaults to the meta LLM's
            states, which the composite reads too.
        encoder: Encoder (hub id or folder) to fine-tune as an additional baseline. This is slow.
        encoder_epochs: Epochs of the encoder over the train split.
        robustness: Number of queries to test with changed texts. 0 skips the test.
        contexts: Number of queries to test in a chat: after system prompts, after earlier turns, and as a follow-up. 0
            skips the test.
        resamples: Number of bootstrap resamples.
        trust_remote_code: If true, allow the base model's repository to run its own code.

    Raises:
        ExpertokenError: The supervision lacks the split or a candidate of the composite, or an argument is invalid.
    """
    started = time.perf_counter()
    _check_given(composite, robustness=robustness, contexts=contexts, resamples=resamples)
    baselines = [baselines] if isinstance(baselines, str) else baselines
    folder = None if isinstance(composite, Composite) else Path(composite)
    supervision = _supervision(folder, data)
    supervision.side(split)  # a misspelt split or baseline raises before a model is loaded
    _check_baselines(baselines or (), embedder, encoder)
    if not isinstance(composite, Composite):
        composite = load_composite(composite, trust_remote_code=trust_remote_code)
    learns = baselines or (baselines is None and find_spec("sklearn"))
    names = composite.pool.names
    test, known = _splits(composite, supervision, split, states=bool(learns) and not embedder)
    pictured = any(query.media for query in test.queries)
    if baselines is None:
        left_out = {*learnt.ON_REQUEST} - ({learnt.TEXT_ONLY} if pictured else set())
        baselines = [name for name in learnt.METHODS if learns and name not in left_out]
    expected_cost = expected_costs(known, test)
    if test.costs is not None:
        test = replace(test, costs=np.where(np.isnan(test.costs), expected_cost, test.costs))
    decided = _decided(composite, test)
    chosen = decided.chosen
    routers = {"composite": test.choose(chosen, "composite", predicted=decided.expected)}
    routers |= {name: test.single(index) for index, name in enumerate(names)}
    routers |= _simple(names, known, test)
    routers[BLIND] = _blind(chosen, test)
    if pictured:
        routers[WITHOUT_PICTURES] = _without_pictures(composite, test)
    routers |= _learnt(composite.meta, baselines, embedder, (encoder, encoder_epochs), known, test)
    routers["oracle"] = test.choose(metrics.oracle(test.scores, test.costs), "bound")
    judged, confidence, outcome = _judged(decided, routers["composite"], test)
    solved = test.scores.max(1) > 0  # a query that no candidate solved has no right decision
    report = Report(
        results=_results(routers, test.benchmarks, resamples),
        share_of_queries={name: float((chosen == index).mean()) for index, name in enumerate(names)},
        queries_by_benchmark={
            str(n): int(c) for n, c in zip(*np.unique(test.benchmarks, return_counts=True), strict=True)
        },
        confusion_matrix=metrics.confusion(test.targets[solved], chosen[solved]).tolist(),
        calibration_bins=[CalibrationBin(*part) for part in metrics.calibration(confidence, outcome)],
    )
    counts = metrics.resample_counts(test.benchmarks, min(resamples, _CURVE_RESAMPLES))
    add_scores(report, routers, test, chosen, decided.probabilities, counts)
    if len(judged):
        add_calibration(report, confidence, outcome, counts[:, judged])
    add_pair(report, routers, known, test, counts)
    if test.costs is not None:
        served = np.stack([composite.chooser.usd(int(length)) for length in test.lengths])
        add_trade_offs(report, routers, test, expected_cost, served, counts)
    if robustness:
        report.robustness = _robustness(composite, test, robustness)
    if contexts:
        report.chats = [asdict(chat) for chat in in_chats(composite, test, test.messages, contexts)]
    if split != "test":
        report.findings.append(f"The composite may have been fitted on the {split} split: its scores are in-sample.")
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


def _check_given(composite: object, **numbers: int) -> None:
    """Raise ExpertokenError for an invalid argument of `evaluate`."""
    for name, value in numbers.items():
        least = int(name == "resamples")
        if value < least:
            raise ExpertokenError(f"{name}: expected {least} or more, got {value}")
    if not isinstance(composite, Composite | Path | str):
        kind = type(composite).__name__
        raise ExpertokenError(f"composite: expected a folder or a `Composite` (`CompositeModel` has one), got {kind}")


def _check_baselines(names: Sequence[str], embedder: str | None, encoder: str | None) -> None:
    """Raise ExpertokenError for an unknown baseline, or one that can't be learnt with these models."""
    if unknown := [name for name in names if name not in learnt.METHODS]:
        raise ExpertokenError(f"unknown baseline {unknown[0]!r}, {did_you_mean(unknown[0], learnt.METHODS)}")
    if embedder and "untrained" in names:
        raise ExpertokenError("--baselines untrained: found an --embedder, which is trained. Remove one of the two")
    for model in filter(None, (embedder, encoder)):
        learnt.check_model(model)


@dataclass(frozen=True)
class _Decided:
    """Decisions of the composite on a split.

    Attributes:
        chosen: Index of the chosen candidate, `[N]`.
        probabilities: Dispatch distribution, `[N, C]`.
        expected: Each candidate's chance of being right under the objective `correctness`, else its probability,
            `[N, C]`.
        of_correctness: True if `expected` holds chances.
    """

    chosen: np.ndarray
    probabilities: np.ndarray
    expected: np.ndarray
    of_correctness: bool

    @property
    def meaning(self) -> dict[str, str]:
        """Definitions of confidence and outcome, for the report."""
        if self.of_correctness:
            return {"confidence": "chance of being right", "outcome": "its mean score"}
        return {"confidence": "probability of the chosen candidate", "outcome": "its mean share of the label"}


def _decided(composite: Composite, test: Split) -> _Decided:
    """Return the decisions as served, by the composite's own policy, which may weigh costs."""
    probabilities = np.exp(test.logits - test.logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    chances = composite.chooser.chances
    # Chances, since differences of logits give the same decision but say little of the loss with another candidate:
    # weighing costs against chances gains 0.085 of APGR on RouteLLM's data (docs/results.md).
    expected = 1 / (1 + np.exp(-test.logits)) if chances else probabilities
    chosen = composite.chosen(torch.from_numpy(test.logits), test.lengths)
    return _Decided(chosen, probabilities, expected, chances)


def _judged(decided: _Decided, ours: RouterResult, test: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of the queries on which confidence is judged, and the confidence and the outcome on each.

    The outcome is the training target of the probabilities: the correctness of the answer, or the candidate's share of
    the label. Queries that all candidates (or none) answered correctly have no label.
    """
    chosen = decided.chosen
    judged = np.arange(len(chosen)) if decided.of_correctness else np.flatnonzero(test.weights)
    outcome = ours.values if decided.of_correctness else test.targets[np.arange(len(chosen)), chosen]
    confidence = decided.expected[np.arange(len(chosen)), chosen]
    return judged, confidence[judged], outcome[judged]


def _splits(composite: Composite, supervision: Supervision, split: str, *, states: bool) -> tuple[Split, list[Split]]:
    """Return the split to evaluate on, and the splits that baselines learn from, with or without states.

    Raises:
        ExpertokenError: The supervision has no split to learn from.
    """
    test = read_split(composite, supervision, split)
    # Never the split that is scored: baselines would be trained on their test questions.
    others = [name for name in ("train", "validation") if len(supervision.data[name]) and name != split]
    if not others:
        raise ExpertokenError(
            f"expected a train or validation split to choose baselines on, found only the {split} split. Prepare the "
            "supervision with one"
        )
    return test, [read_split(composite, supervision, name, states=states) for name in others]


def _robustness(composite: Composite, test: Split, count: int) -> list[dict[str, Any]]:
    place = np.random.default_rng(0).permutation(len(test.prompts))[:count]
    prompts = [test.prompts[index] for index in place]
    pictures = [test.queries[index].media for index in place] if test.queries else None
    if pictures is not None and any(pictures):  # encoded with the text, which must have no placeholders then
        prompts = [text_of(_unseen(test.messages[index][-1])) for index in place]
    found = measure_robustness(composite.meta, prompts, test.scores[place], pictures)
    return [asdict(entry) for entry in found]


def _unseen(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without its pictures."""
    content = message["content"]
    texts = [part for part in content if part["type"] == "text"] if isinstance(content, list) else content
    return message | {"content": texts}


def _origin(composite: Composite, supervision: Supervision) -> dict[str, Any]:
    """Return the origin of composite and data, for the report."""
    return {
        "data_fingerprint": supervision.info.fingerprint,
        "base": composite.manifest.base,
        "training": composite.manifest.training,
        "labelling": supervision.info.labelling,
        "versions": library_versions() | _commit(),
    }


def _supervision(folder: Path | None, data: Supervision | Path | str | None) -> Supervision:
    if isinstance(data, Supervision):
        return data
    if folder is not None:
        return supervision_of(read_manifest(folder), folder, data)
    if data is None:
        raise ExpertokenError("a composite in memory has no path to its supervision. Pass the supervision as `data`")
    return Supervision.load(data)


def _results(routers: dict[str, RouterResult], benchmarks: np.ndarray, resamples: int) -> list[Result]:
    ours = routers["composite"].values
    rows: list[Result] = []
    for name, router in routers.items():
        known = ~np.isnan(router.values)  # an expert alone may have no score in some benchmarks
        if not known.any():
            logger.warning("%s has no score in any benchmark of this split and is left out of the report", name)
            continue
        values, kinds = router.values[known], benchmarks[known]
        row = Result(
            name,
            router.kind,
            metrics.mean_over_benchmarks(values, kinds),
            metrics.bootstrap_interval(values, kinds, resamples=resamples),
            metrics.benchmark_means(values, kinds),
            # A mean over only the queries with a known cost would belong to another router.
            None if router.costs is None or np.isnan(router.costs).any() else float(router.costs.mean()),
            hyperparameter=router.setting,
            coverage=router.coverage,
            milliseconds=None if router.seconds is None else 1000 * router.seconds / len(values),
        )
        if name != "composite":
            difference = ours[known] - values
            row.composite_gain = Gain(
                metrics.mean_over_benchmarks(difference, kinds),
                metrics.bootstrap_interval(difference, kinds, resamples=resamples),
                metrics.paired_p_value(difference, kinds, resamples=resamples),
            )
        rows.append(row)
    held = [(row, row.composite_gain) for row in rows if row.composite_gain and row.kind in ("baseline", "router")]
    for (row, gain), p_value in zip(held, metrics.holm([gain.p_value for _, gain in held]), strict=True):
        row.composite_gain = replace(gain, p_holm=p_value)
    return rows


def _blind(chosen: np.ndarray, test: Split) -> RouterResult:
    """Return the expected result of the composite's shares of traffic, independent of the query."""
    return _mixture(np.bincount(chosen, minlength=test.scores.shape[1]) / len(chosen), test)


def _mixture(shares: np.ndarray, test: Split) -> RouterResult:
    """Return the expected result of a candidate drawn by shares `[C]` from the query's candidates."""
    weights = shares * ~test.absent
    lost = weights.sum(1) == 0
    weights[lost] = ~test.absent[lost]
    weights /= weights.sum(1, keepdims=True)
    costs = None if test.costs is None else np.where(weights > 0, test.costs * weights, 0.0).sum(1)
    return RouterResult("baseline", (test.scores * weights).sum(1), costs)


def _simple(names: list[str], known: list[Split], test: Split) -> dict[str, RouterResult]:
    """Return best single and best per dataset (both chosen on train and validation), random, and half an oracle."""
    benchmarks = np.concatenate([side.benchmarks for side in known])
    scores = fill_unknown(np.concatenate([side.raw for side in known]), benchmarks)
    kinds = np.unique(benchmarks)
    means = np.stack([scores[benchmarks == name].mean(0) for name in kinds])
    single = int(means.mean(0).argmax())
    best_of = {name: int(row.argmax()) for name, row in zip(kinds, means, strict=True)}
    per_dataset = np.array([best_of.get(name, single) for name in test.benchmarks])
    random = _mixture(np.ones(len(names)), test)
    every = np.arange(len(test.raw))
    best = metrics.oracle(test.scores, test.costs)
    half_costs = (
        None
        if random.costs is None or test.costs is None
        else metrics.mixed(test.costs[every, best], random.costs, _HALF)
    )
    return {
        f"best single ({names[single]})": test.choose(np.full(len(test.raw), single), "baseline"),
        "best per dataset": test.choose(per_dataset, "baseline"),
        "random": random,
        f"half oracle, r_o({_HALF})": RouterResult(
            "bound", metrics.mixed(test.scores.max(1), random.values, _HALF), half_costs
        ),
    }


def _learnt(
    meta: MetaLLM,
    names: Sequence[str],
    embedder: str | None,
    encoder: tuple[str | None, int],
    known: list[Split],
    test: Split,
) -> dict[str, RouterResult]:
    """Return the results of learnt routers, on the composite's states or on an embedder's."""
    if len(known) == 1:
        rows = np.arange(len(known[0].raw))
        known = [known[0].take(rows[rows % _FOLD > 0]), known[0].take(rows[rows % _FOLD == 0])]
    sides = (*known, test)
    features = [side.features for side in sides]
    if embedder and names:
        every = learnt.embed(embedder, [prompt for side in sides for prompt in side.prompts])
        features = np.split(every, np.cumsum([len(side.prompts) for side in sides])[:-1])
    none: list[Any] = [None] * len(sides)
    middle = none
    if "ensemble" in names and not embedder:
        try:
            middle = _states_of(_at_the_middle(meta), sides)
        except ExpertokenError as error:
            logger.warning("baseline `ensemble` is skipped, since it reads the middle layer: %s", error)
            names = [name for name in names if name != "ensemble"]
    raw = _states_of(_untrained(meta), sides) if "untrained" in names else none
    unseen = [replace(side, queries=_texts(meta, side)) for side in sides] if learnt.TEXT_ONLY in names else []
    blind = _states_of(meta, unseen) if unseen else none
    train, validation, asked = (
        learnt.Side(found, side.raw, side.benchmarks, side.subjects, np.array(side.prompts, dtype=object), *more)
        for found, side, *more in zip(features, sides, middle, raw, blind, strict=True)
    )

    def score(chosen: np.ndarray, side: learnt.Side) -> float:
        return metrics.mean_over_benchmarks(metrics.chosen_scores(side.filled, chosen), side.benchmarks)

    found = {}
    bar = tqdm(names, desc="baselines", unit="router", leave=False, disable=not names)
    for name in bar:
        bar.set_postfix_str(name)
        predicted, setting, seconds = learnt.predict(name, train, validation, asked, score)
        more = {"predicted": predicted, "setting": setting, "seconds": seconds}
        found[name] = test.choose(predicted.argmax(1), "router", **more)
    model, epochs = encoder
    if model:
        texts = {"train": known[0].prompts, "test": test.prompts}
        predicted = learnt.encoder(model, texts, train, epochs=epochs)
        setting = f"{model}, {epochs} epochs"
        found["encoder"] = test.choose(predicted.argmax(1), "router", predicted=predicted, setting=setting)
    return found


def _without_pictures(composite: Composite, test: Split) -> RouterResult:
    """Return the result of the composite's decisions on the same questions without their pictures."""
    meta = composite.meta
    states = cached_states(meta, _texts(meta, test), label="states without pictures")
    logits = state_logits(meta.rows, states, meta.transform)
    return test.choose(composite.chosen(logits, test.lengths), "baseline")


def _texts(meta: MetaLLM, side: Split) -> list[Query]:
    """Return a split's queries with a placeholder for each picture."""
    texts = [[m | {"content": text_of(m, placeholders=True)} for m in messages] for messages in side.messages]
    return encode_all(meta, texts, "without pictures")


def _at_the_middle(meta: MetaLLM) -> MetaLLM:
    """Return a copy of the meta LLM that reads its middle layer, without an adapter.

    Raises:
        ExpertokenError: The layers can't be read.
    """
    middle = copy.copy(meta)
    middle.read_at(StateSpec(max(1, meta.layers // 2)), 1)
    return middle


def _untrained(meta: MetaLLM) -> MetaLLM:
    """Return the meta LLM with random weights, read at the same state."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    family: Any = AutoModelForCausalLM if meta.sight is None else AutoModelForImageTextToText
    options = {"dtype": meta.head.weight.dtype, "trust_remote_code": meta.source.trust_remote_code}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = family.from_config(meta.plain.config, **options).to(meta.device).eval()
    found = MetaLLM(model, meta.tokenizer, meta.source, 1, state=meta.state)
    found.view = meta.view
    return found


def _states_of(meta: MetaLLM, sides: Sequence[Split]) -> list[np.ndarray]:
    found = cached_states(meta, [query for side in sides for query in side.queries], label="baselines' states")
    return np.split(np.asarray(found.hidden), np.cumsum([len(side.queries) for side in sides])[:-1])


def _peak_gib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def _commit() -> dict[str, str]:
    """Return the commit of the checkout, with `-dirty` if it has changes, or an empty mapping without a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own arguments
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": told.stdout.strip()}
