"""The composite on one side of a supervision, beside everything it has to beat."""

import logging
import math
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..data_prep.supervision import Supervision, supervision_of
from ..modeling.chat import text_of
from ..modeling.composite import Composite, load_composite, read_manifest
from ..modeling.errors import ExpertokenError, did_you_mean
from ..modeling.meta import library_versions
from ..train.features import cached_features
from ..train.tokens import problem_logits
from . import baselines as learnt
from . import metrics
from .report import Report, Row
from .robustness import robustness as measure_robustness

logger = logging.getLogger(__name__)

_LAMBDAS = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 61)])
_PARTIAL_ORACLE = 0.5


@dataclass
class Policy:
    """A way to choose.

    Attributes:
        kind: see `Row`.
        values: `[N]` score on each query; of a random choice its expectation.
        costs: `[N]` USD on each query, or None.
        predicted: `[N, C]` what a router expects of the candidates, for the trade-off of cost and quality.
        setting: what was chosen on validation.
    """

    kind: str
    values: np.ndarray
    costs: np.ndarray | None = None
    predicted: np.ndarray | None = None
    setting: Any = None


@dataclass(frozen=True)
class Split:
    """One side of the supervision, in the order of the composite's candidates.

    Attributes:
        raw: scores `[N, C]`, NaN where not measured.
        costs: `[N, C]` USD, or None.
        benchmarks: `[N]` names.
        features: `[N, d]` of the meta LLM.
        logits: `[N, C]` of the composite.
        targets: `[N, C]` of the labels.
        prompts: the last message of each conversation.
    """

    raw: np.ndarray
    costs: np.ndarray | None
    benchmarks: np.ndarray
    features: np.ndarray
    logits: np.ndarray
    targets: np.ndarray
    prompts: list[str]

    @property
    def scores(self) -> np.ndarray:
        """Scores with 0 where not measured."""
        return np.nan_to_num(self.raw)

    def choose(self, chosen: np.ndarray, kind: str, **more: Any) -> Policy:
        """The policy that makes these choices."""
        rows = np.arange(len(chosen))
        return Policy(kind, self.scores[rows, chosen], None if self.costs is None else self.costs[rows, chosen], **more)


def read_split(composite: Composite, supervision: Supervision, name: str, *, states: bool = True) -> Split:
    """A side with the composite's logits, by way of the feature cache. Queries nobody was measured on are left out.

    Args:
        composite: whose candidates and states.
        supervision: that has the side.
        name: of the side.
        states: whether features and logits are needed; without them they are empty.

    Raises:
        ExpertokenError: the supervision lacks the side or a candidate, or nobody was measured on it.
    """
    absent = [candidate for candidate in composite.pool.names if candidate not in supervision.info.candidates]
    if absent:
        raise ExpertokenError(
            f"the supervision has no scores of {', '.join(absent)}; it has {', '.join(supervision.info.candidates)}"
        )
    columns = [supervision.info.candidates.index(candidate) for candidate in composite.pool.names]
    side = supervision.side(name)
    raw, costs = supervision.scores(name)[:, columns], supervision.costs(name)
    kept = np.flatnonzero(~np.isnan(raw).all(1))
    if not len(kept):
        raise ExpertokenError(f"no candidate of the composite was measured on the {name} side; nothing to compare")
    if len(kept) < len(raw):
        logger.warning("%d queries that no candidate was measured on are left out", len(raw) - len(kept))
    messages = side["messages"]
    hidden = logits = np.zeros((len(raw), 0), np.float32)
    if states:
        meta = composite.meta
        features = cached_features(meta, messages, label=f"{name} features")
        hidden = np.asarray(features.hidden)
        logits = problem_logits(meta.rows, features, meta.transform, with_self=composite.pool.has_self).numpy()
    return Split(
        raw[kept],
        None if costs is None else costs[kept][:, columns],
        np.asarray(side["benchmark"], dtype=str)[kept],
        hidden[kept],
        logits[kept],
        supervision.arrays(name)[0][kept][:, columns],
        [text_of(messages[int(row)][-1]) for row in kept],
    )


def evaluate(
    composite: Composite | Path | str,
    data: Supervision | Path | str | None = None,
    split: str = "test",
    *,
    baselines: Sequence[str] | None = None,
    embedder: str | None = None,
    encoder: str | None = None,
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
    chosen = test.logits.argmax(1)
    probabilities = np.exp(test.logits - test.logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    of_correctness = composite.manifest.training.get("objective") == "correctness"
    expected = _chances(test.logits, with_self=composite.pool.has_self) if of_correctness else test.logits
    policies = {"composite": test.choose(chosen, "composite", predicted=expected)}
    policies |= {name: test.choose(np.full(len(chosen), index), "expert") for index, name in enumerate(names)}
    policies |= _simple(names, known, test)
    policies |= _learnt(baselines, embedder, encoder, known, test)
    policies["oracle"] = test.choose(test.scores.argmax(1), "bound")
    confidence = (expected if of_correctness else probabilities).max(1)
    error, reliability = metrics.calibration(confidence, policies["composite"].values)
    report = Report(
        rows=_rows(policies, test.benchmarks, resamples),
        shares={name: float((chosen == index).mean()) for index, name in enumerate(names)},
        queries={str(n): int(c) for n, c in zip(*np.unique(test.benchmarks, return_counts=True), strict=True)},
        confusion=metrics.confusion(test.targets, chosen).tolist(),
        reliability=reliability,
    )
    report.metrics = _metrics(report, test, chosen, probabilities) | {"calibration error (ECE)": error}
    _trade_offs(report, policies, known, test)
    if robustness:
        place = np.random.default_rng(0).permutation(len(chosen))[:robustness]
        found = measure_robustness(
            composite.meta, [test.prompts[i] for i in place], test.scores[place], with_self=composite.pool.has_self
        )
        report.robustness = [asdict(entry) for entry in found]
    report.metrics = {name: value for name, value in report.metrics.items() if math.isfinite(value)}
    report.settings = {
        "split": split,
        "queries": len(chosen),
        "resamples": resamples,
        "baselines_on": embedder or "states of the meta LLM",
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
            None if policy.costs is None or np.isnan(policy.costs).all() else float(np.nanmean(policy.costs)),
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
    half = metrics.partial_oracle(test.scores, _PARTIAL_ORACLE)
    costs = None if test.costs is None else np.nanmean(test.costs, 1)
    return {
        f"best single ({names[single]})": test.choose(np.full(len(test.raw), single), "baseline"),
        "best per dataset": test.choose(per_dataset, "baseline"),
        "random": Policy("baseline", test.scores.mean(1), costs),
        f"r_o({_PARTIAL_ORACLE})": test.choose(half, "bound"),
    }


def _learnt(
    names: Sequence[str], embedder: str | None, encoder: str | None, known: list[Split], test: Split
) -> dict[str, Policy]:
    """Routers from libraries, on the same states or on an embedder's."""
    if len(known) < 2:
        return {}
    sides = (*known, test)
    features = [learnt.embed(embedder, side.prompts) if embedder and names else side.features for side in sides]
    train, validation = (
        learnt.Side(found, side.raw, side.benchmarks) for found, side in zip(features[:2], known, strict=True)
    )

    def score(chosen: np.ndarray, side: learnt.Side) -> float:
        got = metrics.chosen_scores(np.nan_to_num(side.scores), chosen)
        return metrics.mean_over_benchmarks(got, side.benchmarks)

    found = {}
    for name in tqdm(names, desc="baselines", unit="router", leave=False, disable=not names):
        predicted, setting = learnt.predict(name, train, validation, features[-1], score)
        found[name] = test.choose(predicted.argmax(1), "router", predicted=predicted, setting=setting)
    if encoder:
        texts = {"train": known[0].prompts, "test": test.prompts}
        predicted = learnt.encoder(encoder, texts, train)
        found["encoder"] = test.choose(predicted.argmax(1), "router", predicted=predicted, setting=encoder)
    return found


def _metrics(report: Report, test: Split, chosen: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """RouterEval's and LLMRouterBench's figures of the composite."""
    mean = report.composite.mean
    best = max(row.mean for row in report.rows if row.kind == "expert")
    oracle, random = report.row("oracle").mean, report.row("random").mean
    found = {
        "mean score (RouterEval mu, AvgAcc)": mean,
        "over the best single, mu / best (V_B)": mean / best if best else math.nan,
        "entropy of the predictions, bits (E_p)": metrics.entropy_bits(probabilities),
        "relative gain over random (Gain@R)": mean / random - 1 if random else math.nan,
        "relative gain over the best single (Gain@B)": mean / best - 1 if best else math.nan,
        "relative gap to the oracle (Gap@O)": 1 - mean / oracle if oracle else math.nan,
        "dispatch accuracy": metrics.dispatch_accuracy(test.scores, chosen),
    }
    references = [metrics.REFERENCE_SCORES.get(name.lower().replace("-", "_")) for name in report.queries]
    if all(references):
        found["over the reference, mu / reference (V_R)"] = mean / float(np.mean(references))
    for count, share in metrics.recall_when_few_can(test.scores, chosen).items():
        found[f"recall where {count} candidate{'s' if count > 1 else ''} can"] = share
    return found


def _trade_offs(report: Report, policies: dict[str, Policy], known: list[Split], test: Split) -> None:
    """Curves of cost and quality with AIQ, PerfGain and CostSave; APGR and CPT where there are two candidates."""
    scores = test.scores
    if test.raw.shape[1] == 2:
        weak, strong = np.concatenate([side.scores for side in known]).mean(0).argsort()
        if scores[:, strong].mean() > scores[:, weak].mean():
            for name, policy in policies.items():
                if policy.predicted is not None:
                    preference = policy.predicted[:, strong] - policy.predicted[:, weak]
                    pair = (preference, scores[:, weak], scores[:, strong])
                    report.metrics[f"APGR, {name}"] = metrics.apgr(*pair)
                    for share in (0.5, 0.8):
                        report.metrics[f"CPT({share:.0%}), {name}"] = metrics.cpt(*pair, share)
    if test.costs is None or np.isnan(test.costs).all(0).any():
        return
    expected = np.nanmean(test.costs, 0)
    best = int(scores.mean(0).argmax())
    points = metrics.Curve(expected, scores.mean(0))
    curves = {"single models": points}
    for name, policy in policies.items():
        if policy.predicted is not None:
            spread = policy.predicted.std() / max(np.ptp(expected), 1e-12)
            curves[name] = metrics.trade_off(policy.predicted, scores, test.costs, _LAMBDAS * spread)
    low, high = float(expected.min()), float(expected.max())
    for name, curve in curves.items():
        costs, qualities = curve.hull()
        report.curves[name] = {"costs": costs.tolist(), "qualities": qualities.tolist()}
        report.metrics[f"AIQ, {name}"] = curve.aiq(low, high)
        if name != "single models":
            report.metrics[f"PerfGain, {name}"] = metrics.perf_gain(curve, scores[:, best].mean())
            report.metrics[f"CostSave, {name}"] = metrics.cost_save(curve, scores[:, best].mean(), expected[best])


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
