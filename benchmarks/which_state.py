"""Comparison of the states that `--state` offers, on two kinds of data: `python benchmarks/which_state.py`.

1. The topic of a query matters on Expert-Token-Routing's six MMLU domains, where an expert is right in its own domain
   only. The figure is routing accuracy over several draws of halves, beside words alone.
2. The difficulty of a query matters for RouteLLM's pair on 29 MMLU subjects. The figure is APGR on held-out subjects,
   over several draws of a fifth of the subjects, beside words and ridge regression.

Differences are paired over the draws. Folds choose the strength of the penalty (folds of whole subjects for RouteLLM).
The meta LLM is SmolLM2-135M-Instruct. One cached pass computes all layers.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from expertoken.benchmarks import DATA, etr
from expertoken.data_prep.labels import label
from expertoken.data_prep.reading import read_results
from expertoken.evaluation import metrics
from expertoken.examples.smollm2 import smollm2
from expertoken.modeling.logits import LogitTransform
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.state import StateSpec, candidates_for
from expertoken.modeling.states import States, cache_layers, cached_states, encode_all, state_logits
from expertoken.train.arguments import L2
from expertoken.train.row_optimizer import Problem
from expertoken.train.run import cheapest_of_the_best
from expertoken.train.tokens import Fit, fit_rows

PLAIN = LogitTransform()
STRONG = (300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3)


def states_of_all(meta: MetaLLM, prompts: list[str], specs: list[StateSpec]) -> dict[StateSpec, np.ndarray]:
    """Compute the states that each spec names, with all layers in one pass."""
    queries = encode_all(meta, prompts, "questions")
    started = time.perf_counter()
    layers = sorted({spec.layer or meta.layers for spec in specs})
    cache_layers(meta, queries, layers, max_tokens=None, label="all layers")
    print(f"\n{sum(map(len, queries)):,} tokens, {time.perf_counter() - started:.0f} s for layers {layers}", flush=True)
    found = {}
    for spec in specs:
        meta.read_at(spec if spec.layer else StateSpec(meta.layers), 2)  # the head's own is the last layer's
        found[spec] = np.ascontiguousarray(cached_states(meta, queries).hidden)
    return found


def problem_of(hidden: np.ndarray, scores: np.ndarray, labelling: str, groups: np.ndarray | None = None) -> Problem:
    """Label the scores as one benchmark and build the problem that the fit solves."""
    names = np.full(len(scores), "all")
    targets, weights = label(scores, names, labelling=labelling)
    mass = np.zeros(len(hidden), np.float32)
    return Problem(States(hidden, mass), targets, scores.astype(np.float32), weights, names, groups)


def logits_on(fit: Fit, hidden: np.ndarray) -> np.ndarray:
    """Compute the logits of the fitted rows on states."""
    return state_logits(fit.rows, States(hidden, np.zeros(len(hidden), np.float32)), PLAIN).numpy()


def show(title: str, found: dict[str, list[float]], layers: dict[str, str], share: float) -> None:
    """Print a table of means and of paired differences from the head's own state.

    Draws overlap, so their spread underestimates the error. Nadeau and Bengio (2003) add the ratio of test to train.
    """
    print(f"\n| {title} | layers computed | mean over the draws | beside the head's own, 95 % |\n|---|---|---|---|")
    own = np.array(found["head"])
    for name, values in found.items():
        difference = np.array(values) - own
        error = difference.std(ddof=1) * np.sqrt(1 / len(own) + share) * stats.t.ppf(0.975, len(own) - 1)
        low, high = difference.mean() - error, difference.mean() + error
        between = "" if name == "head" else f"{difference.mean():+.3f} ({low:+.3f} to {high:+.3f})"
        print(f"| {name} | {layers.get(name, '')} | {np.mean(values):.3f} | {between} |", flush=True)


def run_etr(meta: MetaLLM, folder: Path, draws: int) -> None:
    """Compare states by the topic of a query, on Expert-Token-Routing's domains."""
    queries = etr.read(folder)
    specs = candidates_for(meta.layers)
    states = states_of_all(meta, queries["prompt"].tolist(), specs)
    domains, codes = np.unique(queries["benchmark"], return_inverse=True)
    scores = (codes[:, None] == np.arange(len(domains))).astype(float)
    found: dict[str, list[float]] = {}
    for seed in range(draws):
        test = (etr.halves(queries, seed)["split"] == "test").to_numpy()
        losses = []
        right: list[np.ndarray] = []
        for spec in specs:
            known = problem_of(states[spec][~test], scores[~test], "query")
            fit = fit_rows(known, objective="cross_entropy", l2=sorted(L2)[::2], transform=PLAIN)
            losses.append(fit.fold_losses)
            right.append(logits_on(fit, states[spec][test]).argmax(1) == codes[test])
            found.setdefault(str(spec), []).append(float(right[-1].mean()))
        chosen = cheapest_of_the_best(np.stack(losses))
        found.setdefault("auto", []).append(float(right[chosen].mean()))
        print(f"draw {seed}: auto chooses {specs[chosen]}", flush=True)
        words = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=100.0, max_iter=1000))
        predicted = words.fit(queries["prompt"][~test], codes[~test]).predict(queries["prompt"][test])
        found.setdefault("words (TF-IDF, logistic regression)", []).append(float((predicted == codes[test]).mean()))
        for name, spec in (("8:mean", StateSpec(8, "mean")), ("head", StateSpec())):
            linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
            predicted = linear.fit(states[spec][~test], codes[~test]).predict(states[spec][test])
            key = f"logistic regression, C = 0.01, on {name}"
            found.setdefault(key, []).append(float((predicted == codes[test]).mean()))
    depths = {str(spec): f"{spec.layer or meta.layers} of {meta.layers}" for spec in specs}
    show("Expert-Token-Routing's domains, accuracy", found, depths, share=1.0)


def run_routellm(meta: MetaLLM, folder: Path, draws: int, specs: list[StateSpec]) -> None:
    """Compare states by the difficulty of a query, on held-out subjects of RouteLLM's data."""
    results = read_results(folder, "routellm")
    prompts = results.queries["prompt"].tolist()
    subjects = results.queries["subject"].to_numpy(dtype=str)
    states = states_of_all(meta, prompts, specs)
    scores = results.scores
    weak, strong = scores.mean(0).argsort()
    names = np.unique(subjects)
    found: dict[str, list[float]] = {}
    for seed in range(draws):
        held = np.random.default_rng(seed).permutation(names)[: len(names) // 5]
        test = np.isin(subjects, held)

        def apgr(preference: np.ndarray, test: np.ndarray = test) -> float:
            return metrics.apgr(preference, scores[test, weak], scores[test, strong])

        losses, figures = [], []
        for spec in specs:
            known = problem_of(states[spec][~test], scores[~test], "correctness", subjects[~test])
            fit = fit_rows(known, objective="correctness", l2=STRONG, transform=PLAIN)
            chances = 1 / (1 + np.exp(-logits_on(fit, states[spec][test])))
            figures.append(apgr(chances[:, strong] - chances[:, weak]))
            losses.append(fit.fold_losses)
            found.setdefault(str(spec), []).append(figures[-1])
        chosen = cheapest_of_the_best(np.stack(losses))
        found.setdefault("auto", []).append(figures[chosen])
        print(f"draw {seed}: auto chooses {specs[chosen]}", flush=True)
        gap = scores[~test, strong] - scores[~test, weak]
        texts = pd.Series(prompts)
        words = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), RidgeCV(np.logspace(-1, 3, 9)))
        found.setdefault("words (TF-IDF, ridge)", []).append(apgr(words.fit(texts[~test], gap).predict(texts[test])))
        linear = make_pipeline(StandardScaler(), Ridge(alpha=_alpha(states[specs[-1]][~test], gap, subjects[~test])))
        predicted = linear.fit(states[specs[-1]][~test], gap).predict(states[specs[-1]][test])
        found.setdefault("ridge regression on head", []).append(apgr(predicted))
    depths = {str(spec): f"{spec.layer or meta.layers} of {meta.layers}" for spec in specs}
    show("RouteLLM, subjects held out, APGR", found, depths, share=0.25)


def _alpha(hidden: np.ndarray, gap: np.ndarray, groups: np.ndarray) -> float:
    """Choose the strength of ridge regression by folds of whole subjects."""
    strengths = np.logspace(1, 6, 11)
    errors = np.zeros(len(strengths))
    for train, held in GroupKFold(5).split(hidden, groups=groups):
        for place, strength in enumerate(strengths):
            model = make_pipeline(StandardScaler(), Ridge(alpha=strength)).fit(hidden[train], gap[train])
            errors[place] += np.square(model.predict(hidden[held]) - gap[held]).sum()
    return float(strengths[errors.argmin()])


def main() -> None:
    """Parse the command line, run one comparison or both, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=DATA, help="Folder with etr/ and routellm/. Default: $EXPERTOKEN_DATA."
    )
    parser.add_argument("--draws", type=int, default=10, help="Number of draws of each kind. Default: %(default)s.")
    parser.add_argument("--only", choices=("etr", "routellm"), help="Single comparison to run. Default: both.")
    options = parser.parse_args()
    meta = MetaLLM.from_pretrained(str(smollm2()), 2)
    if options.only != "routellm":
        run_etr(meta, options.data / "etr", options.draws)
    if options.only != "etr":
        texts = ("8:mean", "15:last", "15:mean", "15:both", "22:last", "head")
        run_routellm(meta, options.data / "routellm", options.draws, [StateSpec.parse(text) for text in texts])


if __name__ == "__main__":
    main()
