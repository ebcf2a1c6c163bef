"""RouteLLM's pair, GPT-4 and Mixtral-8x7B, on MMLU's subjects: `python benchmarks/routellm_apgr.py`.

APGR and CPT (arXiv 2406.18665) measure the recovered part of the gap between a strong and a weak model, by the share of
strong calls. The benchmark computes them for every label, beside routers from libraries on the same states. It does
so on a random test split and on held-out subjects: five folds of subjects, each held out once, their queries pooled.
Prints two Markdown tables.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from expertoken.benchmarks import DATA
from expertoken.benchmarks.fitting import SIDES, problems_of, states
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import Supervision, build_supervision
from expertoken.evaluation import baselines, metrics
from expertoken.examples.smollm2 import smollm2
from expertoken.modeling.chat import text_of
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.source import Source
from expertoken.modeling.states import state_logits
from expertoken.train.arguments import L2
from expertoken.train.tokens import fit_rows

LABELS = {
    "tokens, correctness of the query": ("correctness", "correctness"),
    "tokens, correctness of the subject (its mean score)": ("correctness", "correctness"),
    "tokens, query labels": ("query", "cross_entropy"),
    "tokens, subject labels": ("subject", "cross_entropy"),
}
ROUTERS = tuple(name for name in baselines.METHODS if name not in baselines.ON_REQUEST)


def subject_means(supervision: Supervision, scores: np.ndarray) -> np.ndarray:
    """Replace the scores of each train query by the means of its subject."""
    subjects = np.asarray(supervision.side("train")["subject"], dtype=str)
    means = {name: scores[subjects == name].mean(0) for name in np.unique(subjects)}
    return np.stack([means[name] for name in subjects]).astype(np.float32)


def tokens(meta: MetaLLM, results: BenchmarkResults, name: str, **split: Any) -> tuple[np.ndarray, Supervision]:
    """Predict the two models' scores on the test split by expert tokens, `[N, 2]`, and return the supervision too."""
    label, objective = LABELS[name]
    supervision = build_supervision(results, labelling=label, leaks="drop", near_duplicates="ignore", **split)
    found = states(meta, supervision)
    train, validation = problems_of(supervision, found)
    if "subject (" in name:
        train = replace(train, scores=subject_means(supervision, train.scores))
    fit = fit_rows(train + validation, objective=objective, l2=L2, transform=meta.transform)
    logits = state_logits(fit.rows, found["test"], meta.transform).numpy()
    return 1 / (1 + np.exp(-logits)) if objective == "correctness" else logits, supervision


def router(meta: MetaLLM, results: BenchmarkResults, name: str, **split: Any) -> tuple[np.ndarray, Supervision]:
    """Predict the two models' scores on the test split by a library's router, and return the supervision too."""
    supervision = build_supervision(results, leaks="drop", near_duplicates="ignore", **split)
    found = states(meta, supervision)
    train, validation, asked = (
        baselines.Side(
            np.asarray(found[side].hidden),
            supervision.scores(side),
            np.asarray(supervision.side(side)["benchmark"], dtype=str),
            np.asarray(supervision.side(side)["subject"], dtype=str),
            np.array([text_of(messages[-1]) for messages in supervision.side(side)["messages"]], dtype=object),
        )
        for side in SIDES
    )

    def score(chosen: np.ndarray, side: baselines.Side) -> float:
        return float(metrics.chosen_scores(np.nan_to_num(side.scores), chosen).mean())

    return baselines.predict(name, train, validation, asked, score)[0], supervision


def figures(predicted: np.ndarray, scores: np.ndarray, resamples: int = 1000) -> list[str]:
    """Format APGR, its 95 % bootstrap interval, CPT(50 %) and CPT(80 %)."""
    weak, strong = scores.mean(0).argsort()
    preference = predicted[:, strong] - predicted[:, weak]

    def on(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return preference[rows], scores[rows, weak], scores[rows, strong]

    rng = np.random.default_rng(0)
    draws = [metrics.apgr(*on(rng.integers(0, len(scores), len(scores)))) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.025, 0.975])
    every = on(np.arange(len(scores)))
    shares = [f"{100 * metrics.cpt(*every, share):.1f} %" for share in (0.5, 0.8)]
    return [f"{metrics.apgr(*every):.3f}", f"{low:.3f} to {high:.3f}", *shares]


def main() -> None:
    """Parse the command line, evaluate every router and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="Folder with routellm/. Default: $EXPERTOKEN_DATA.")
    parser.add_argument("--dtype", default="float32", help="Data type of the meta LLM. Default: %(default)s.")
    options = parser.parse_args()
    started = time.perf_counter()
    results = read_results(options.data / "routellm", "routellm")
    meta = MetaLLM.from_pretrained(Source(str(smollm2())), len(results.models), dtype=options.dtype)
    subjects = np.random.default_rng(0).permutation(results.queries["subject"].unique())
    folds = [("subject", fold.tolist()) for fold in np.array_split(subjects, 5)]
    for title, splits in (
        ("random test side", [{}]),
        ("subjects held out", [{"hold_out": fold} for fold in folds]),
    ):
        print(
            f"\n| {title} | APGR | 95 % interval | strong calls for 50 % of the gap | for 80 % |\n|---|---|---|---|---|"
        )
        for name in (*LABELS, *ROUTERS):
            run = tokens if name in LABELS else router
            parts = [run(meta, results, name, **split) for split in splits]
            predicted = np.concatenate([part for part, _ in parts])
            scores = np.concatenate([supervision.scores("test") for _, supervision in parts])
            print(f"| {name} | {' | '.join(figures(predicted, scores))} |", flush=True)
    print(f"\n{len(results)} queries, {time.perf_counter() - started:.0f} s (states may come from the cache)")


if __name__ == "__main__":
    main()
