"""The composite on one side of a supervision, beside everything it has to beat."""

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
    contexts: int = 0,
    resamples: int = 5000,
    trust_remote_code: bool = False,
) -> Report:
    """Score a composite against every single candidate, simple and learnt baselines and the per-query oracle.

    A candidate whose score on a query is unknown counts with its mean in the benchmark, in which it scores 0 where it
    has no score at all. Queries that nobody was measured on are left out.

    Args:
        composite: a folder, or a loaded one.
        data: a supervision folder, or a loaded one; the one it was trained on where not given (folders only).
        split: which side.
        baselines: names from `baselines.METHODS`. Where not given, all of them but those `ON_REQUEST`, if scikit-learn
            is installed.
        embedder: a sentence-transformers model (hub id or folder) that gives the baselines their features; the meta
            LLM's states, which the composite has too, where not given.
        encoder: also fine-tune this encoder (hub id or folder) as a baseline; takes its time.
        encoder_epochs: of that, over the train side.
        robustness: on how many queries to try changes of the text; 0 leaves that out.
        contexts: on how many queries to ask in a chat: behind system prompts, after earlier turns, as a follow-up; 0
            leaves that out.
        resamples: of the bootstrap.
        trust_remote_code: allow the base model's repository to run its own code.

    Raises:
        ExpertokenError: the supervision lacks the side, or a candidate of the composite.
    """
    started = time.perf_counter()
    _check_given(composite, robustness=robustness, contexts=contexts, resamples=resamples)
    baselines = [baselines] if isinstance(baselines, str) else baselines
    folder = None if isinstance(composite, Composite) else Path(composite)
    supervision = _supervision(folder, data)
    supervision.side(split)  # a misspelt split or baseline is an error before anything is loaded
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
    solved = test.scores.max(1) > 0  # a query that nobody solved has no right choice
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
        report.findings.append(f"The composite may have been fitted on the {split} side: its figures are in-sample.")
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
    """Raise ExpertokenError where an argument is none that `evaluate` takes."""
    for name, value in numbers.items():
        least = int(name == "resamples")
        if value < least:
            raise ExpertokenError(f"{name}: expected {least} or more, got {value}")
    if not isinstance(composite, Composite | Path | str):
        kind = type(composite).__name__
        raise ExpertokenError(f"composite: expected a folder or a `Composite` (`CompositeModel` has one), got {kind}")


def _check_baselines(names: Sequence[str], embedder: str | None, encoder: str | None) -> None:
    """Raise ExpertokenError where a baseline is not known, or can't be learnt so."""
    if unknown := [name for name in names if name not in learnt.METHODS]:
        raise ExpertokenError(f"no baseline {unknown[0]!r}, {did_you_mean(unknown[0], learnt.METHODS)}")
    if embedder and "untrained" in names:
        raise ExpertokenError("--baselines untrained: found an --embedder, which is trained; leave one of the two out")
    for model in filter(None, (embedder, encoder)):
        learnt.check_model(model)


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
    """Return the decisions that are served: by the composite's own policy, which may weigh costs."""
    probabilities = np.exp(test.logits - test.logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    chances = composite.chooser.chances
    # That differences of logits choose the same candidate says little of what is lost with another: weighing costs
    # against chances is worth 0.085 of APGR on RouteLLM's data (docs/results.md).
    expected = 1 / (1 + np.exp(-test.logits)) if chances else probabilities
    chosen = composite.chosen(torch.from_numpy(test.logits), test.lengths)
    return _Decided(chosen, probabilities, expected, chances)


def _judged(decided: _Decided, ours: RouterResult, test: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the queries on which confidence is judged, and the confidence and the outcome on each.

    The outcome is what the probabilities were trained to be: whether the answer is right, or the candidate's share of
    the label, which queries that all got right (or none) do not have.
    """
    chosen = decided.chosen
    judged = np.arange(len(chosen)) if decided.of_correctness else np.flatnonzero(test.weights)
    outcome = ours.values if decided.of_correctness else test.targets[np.arange(len(chosen)), chosen]
    confidence = decided.expected[np.arange(len(chosen)), chosen]
    return judged, confidence[judged], outcome[judged]


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
    pictures = [test.queries[index].media for index in place] if test.queries else None
    if pictures is not None and any(pictures):  # they are asked with the text, which has no placeholders then
        prompts = [text_of(_unseen(test.messages[index][-1])) for index in place]
    found = measure_robustness(composite.meta, prompts, test.scores[place], pictures)
    return [asdict(entry) for entry in found]


def _unseen(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without its pictures."""
    content = message["content"]
    texts = [part for part in content if part["type"] == "text"] if isinstance(content, list) else content
    return message | {"content": texts}


def _origin(composite: Composite, supervision: Supervision) -> dict[str, Any]:
    """Return what was evaluated, for the report."""
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
        raise ExpertokenError("a composite in memory does not know its supervision; say which with `data`")
    return Supervision.load(data)


def _results(routers: dict[str, RouterResult], benchmarks: np.ndarray, resamples: int) -> list[Result]:
    ours = routers["composite"].values
    rows: list[Result] = []
    for name, router in routers.items():
        known = ~np.isnan(router.values)  # an expert alone has benchmarks in which it has no score
        if not known.any():
            logger.warning("%s has no score in any benchmark of this side; it has no line", name)
            continue
        values, kinds = router.values[known], benchmarks[known]
        row = Result(
            name,
            router.kind,
            metrics.mean_over_benchmarks(values, kinds),
            metrics.bootstrap_interval(values, kinds, resamples=resamples),
            metrics.benchmark_means(values, kinds),
            # A mean over the queries whose cost happens to be known would be another router's.
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
    """Return what the composite's shares of traffic are worth where the query plays no part, in expectation."""
    return _mixture(np.bincount(chosen, minlength=test.scores.shape[1]) / len(chosen), test)


def _mixture(shares: np.ndarray, test: Split) -> RouterResult:
    """Return what is expected of a candidate drawn by shares `[C]` among those that are candidates for the query."""
    weights = shares * ~test.absent
    lost = weights.sum(1) == 0
    weights[lost] = ~test.absent[lost]
    weights /= weights.sum(1, keepdims=True)
    costs = None if test.costs is None else np.where(weights > 0, test.costs * weights, 0.0).sum(1)
    return RouterResult("baseline", (test.scores * weights).sum(1), costs)


def _simple(names: list[str], known: list[Split], test: Split) -> dict[str, RouterResult]:
    """Best single and best per dataset (both chosen on train and validation), random, and half an oracle."""
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
    """Routers from libraries, on the same states or on an embedder's."""
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
            logger.warning("no baseline `ensemble`, which reads the middle layer: %s", error)
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
    """Return what the composite decides where the same questions come without their pictures."""
    meta = composite.meta
    states = cached_states(meta, _texts(meta, test), label="states without pictures")
    logits = state_logits(meta.rows, states, meta.transform)
    return test.choose(composite.chosen(logits, test.lengths), "baseline")


def _texts(meta: MetaLLM, side: Split) -> list[Query]:
    """Return a side's queries with a placeholder for each picture."""
    texts = [[m | {"content": text_of(m, placeholders=True)} for m in messages] for messages in side.messages]
    return encode_all(meta, texts, "without pictures")


def _at_the_middle(meta: MetaLLM) -> MetaLLM:
    """Return the meta LLM, without an adapter, as it reads its middle layer.

    Raises:
        ExpertokenError: its layers can't be read.
    """
    middle = copy.copy(meta)
    middle.read_at(StateSpec(max(1, meta.layers // 2)), 1)
    return middle


def _untrained(meta: MetaLLM) -> MetaLLM:
    """Return the meta LLM with weights at random, read at the same state."""
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
    """The checkout's commit, where this is one; `-dirty` with changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own arguments
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": told.stdout.strip()}
