"""The composite on one side of a supervision, beside everything it has to beat."""

import logging
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..data_prep.supervision import Supervision, supervision_of
from ..modeling.composite import Composite, load_composite, read_manifest
from ..modeling.errors import ExpertokenError, did_you_mean
from ..modeling.meta import library_versions
from . import baselines as learnt
from . import metrics
from .figures import add_calibration, add_pair, add_scores, add_trade_offs
from .report import Report, Row
from .robustness import robustness as measure_robustness
from .sides import Policy, Split, expected_costs, read_split

logger = logging.getLogger(__name__)

_PARTIAL_ORACLE = 0.5
_FIGURES = 1000  # resamples of figures that are not means: each of them costs a curve
_FOLD = 5  # where there is one side to learn from, every so-manieth query of it is validation


def evaluate(
    composite: Composite | Path | str,
    data: Supervision | Path | str | None = None,
    split: str = "test",
    *,
    baselines: Sequence[str] | None = None,
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
    folder = None if isinstance(composite, Composite) else Path(composite)
    supervision = _supervision(folder, data)
    supervision.side(split)  # a misspelt side or baseline is told before anything is loaded
    if unknown := [name for name in baselines or () if name not in learnt.METHODS]:
        raise ExpertokenError(f"no baseline {unknown[0]!r}, {did_you_mean(unknown[0], learnt.METHODS)}")
    for model in filter(None, (embedder, encoder)):
        learnt.check_model(model)
    if folder is not None:
        composite = load_composite(folder, trust_remote_code=trust_remote_code)
    if baselines is None:
        baselines = list(learnt.METHODS) if find_spec("sklearn") else []
    names = composite.pool.names
    test = read_split(composite, supervision, split)
    # Never the side that is scored: baselines would be learnt on the questions that they are asked.
    sides = [side for side in ("train", "validation") if len(supervision.data[side]) and side != split]
    if not sides:
        raise ExpertokenError(f"nothing but the {split} side: baselines have nothing to be chosen on")
    known = [read_split(composite, supervision, side, states=bool(baselines) and not embedder) for side in sides]
    expected_cost = expected_costs(known, test)
    if test.costs is not None:
        test = replace(test, costs=np.where(np.isnan(test.costs), expected_cost, test.costs))
    chosen = test.logits.argmax(1)
    probabilities = np.exp(test.logits - test.logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    of_correctness = composite.manifest.training.get("objective") == "correctness"
    expected = _chances(test.logits, with_self=composite.pool.has_self) if of_correctness else probabilities
    policies = {"composite": test.choose(chosen, "composite", predicted=expected)}
    policies |= {name: test.choose(np.full(len(chosen), index), "expert") for index, name in enumerate(names)}
    policies |= _simple(names, known, test)
    policies |= _learnt(baselines, embedder, (encoder, encoder_epochs), known, test)
    policies["oracle"] = test.choose(metrics.oracle(test.scores, test.costs), "bound")
    confidence = expected.max(1)
    # What the probabilities were trained to be: the chance of being right, or the candidate's share of the label, which
    # queries that all got right (or none) do not have.
    judged = np.arange(len(chosen)) if of_correctness else np.flatnonzero(test.weights)
    outcome = (policies["composite"].values if of_correctness else test.targets[np.arange(len(chosen)), chosen])[judged]
    report = Report(
        rows=_rows(policies, test.benchmarks, resamples),
        shares={name: float((chosen == index).mean()) for index, name in enumerate(names)},
        queries={str(n): int(c) for n, c in zip(*np.unique(test.benchmarks, return_counts=True), strict=True)},
        confusion=metrics.confusion(test.targets, chosen).tolist(),
        reliability=metrics.calibration(confidence[judged], outcome) if len(judged) else [],
    )
    counts = metrics.resample_counts(test.benchmarks, min(resamples, _FIGURES))
    add_scores(report, policies, test, chosen, probabilities, counts)
    if len(judged):
        add_calibration(report, confidence[judged], outcome, counts[:, judged])
    add_pair(report, policies, known, test, counts)
    if test.costs is not None:
        add_trade_offs(report, policies, test, expected_cost, counts)
    if robustness:
        place = np.random.default_rng(0).permutation(len(chosen))[:robustness]
        found = measure_robustness(
            composite.meta, [test.prompts[i] for i in place], test.scores[place], with_self=composite.pool.has_self
        )
        report.robustness = [asdict(entry) for entry in found]
    report.settings = {
        "split": split,
        "queries": len(chosen),
        "resamples": resamples,
        "baselines_on": embedder or "states of the meta LLM",
        "confidence": "chance of being right" if of_correctness else "probability of the chosen candidate",
        "outcome": "its mean score" if of_correctness else "its mean share of the label",
        "without_known_cost": [n for n, cost in zip(names, expected_cost, strict=True) if np.isnan(cost)],
        "data_fingerprint": supervision.info.fingerprint,
        "base": composite.manifest.base,
        "training": composite.manifest.training,
        "labelling": supervision.info.labelling,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_gib": round(_peak_gib(), 2),
        "versions": library_versions() | _commit(),
    }
    return report


def _chances(logits: np.ndarray, *, with_self: bool) -> np.ndarray:
    """Each candidate's probability of being right, `[N, C]`, as the objective `correctness` means it (of self, 1/2).

    Differences of logits choose the same candidate, but say little about what is lost with another: that costs are
    weighed against these is worth 0.085 of APGR on RouteLLM's data (docs/results.md).
    """
    return 1 / (1 + np.exp((logits[:, -1:] if with_self else 0.0) - logits))


def _supervision(folder: Path | None, data: Supervision | Path | str | None) -> Supervision:
    if isinstance(data, Supervision):
        return data
    if folder is None and data is None:
        raise ExpertokenError("a composite in memory does not know its supervision; say which with `data`")
    return supervision_of(read_manifest(folder), folder, data) if folder else Supervision.load(data)


def _rows(policies: dict[str, Policy], benchmarks: np.ndarray, resamples: int) -> list[Row]:
    ours = policies["composite"].values
    rows = []
    for name, policy in policies.items():
        row = Row(
            name,
            policy.kind,
            metrics.mean_over_benchmarks(policy.values, benchmarks),
            metrics.bootstrap_interval(policy.values, benchmarks, resamples=resamples),
            metrics.benchmark_means(policy.values, benchmarks),
            # A mean over the queries whose cost happens to be known would be another router's.
            None if policy.costs is None or np.isnan(policy.costs).any() else float(policy.costs.mean()),
            setting=policy.setting,
        )
        if name != "composite":
            difference = ours - policy.values
            gain = metrics.mean_over_benchmarks(difference, benchmarks)
            row.gain = (gain, *metrics.bootstrap_interval(difference, benchmarks, resamples=resamples))
            row.p_value = metrics.paired_p_value(difference, benchmarks, resamples=resamples)
        rows.append(row)
    return rows


def _simple(names: list[str], known: list[Split], test: Split) -> dict[str, Policy]:
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
        "random": Policy("baseline", test.scores.mean(1), costs),
        f"half oracle, r_o({_PARTIAL_ORACLE})": test.choose(half, "bound"),
    }


def _learnt(
    names: Sequence[str], embedder: str | None, encoder: tuple[str | None, int], known: list[Split], test: Split
) -> dict[str, Policy]:
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
