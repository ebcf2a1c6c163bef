"""Expert-Token-Routing's setting (arXiv 2403.16854): one expert per MMLU domain, routed by the meta LLM.

There are six domains. Half of each domain's questions are the train split, the other half is the test split. An expert
is right in its own domain only, so the score is the routing accuracy. The benchmark prints the joint training beside
logistic regression on the same states and on words alone. Then it plugs in the domains in turn, in several orders, and
compares decisions on reworded questions.

Requires the domains' test files of MMLU (`etr/*_test.csv` with question, A, B, C, D, answer and no header).

    python benchmarks/etr.py --data FOLDER --splits 3 --orders 3
"""

import argparse
import csv
import logging
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from expertoken import Expert, ExpertPool, add_expert, train_composite
from expertoken.benchmarks import DATA
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import build_supervision
from expertoken.evaluation.metrics import bootstrap_interval
from expertoken.evaluation.robustness import robustness
from expertoken.examples.smollm2 import smollm2
from expertoken.modeling.composite import Composite, load_composite
from expertoken.modeling.states import state_logits, states_of

FIRST = 2  # domains that are trained together before the others are plugged in
REWORDED = 150


def read(folder: Path) -> pd.DataFrame:
    """Read the questions with their options and domains."""
    rows = []
    for file in sorted(folder.glob("*_test.csv")):
        domain = file.stem.removesuffix("_test")
        with file.open(newline="", encoding="utf-8") as stream:
            for number, (question, *options, _) in enumerate(csv.reader(stream)):
                lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
                rows.append((f"{domain}/{number}", "\n".join([question, *lines]), domain))
    return pd.DataFrame(rows, columns=["id", "prompt", "benchmark"]).assign(subject=None)


def halves(queries: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Assign a random half of each domain to the test split and the other half to the train split."""
    rng = np.random.default_rng(seed)
    side = np.full(len(queries), "train", dtype=object)
    for domain in queries["benchmark"].unique():
        inside = rng.permutation(np.flatnonzero((queries["benchmark"] == domain).to_numpy()))
        side[inside[: len(inside) // 2]] = "test"
    return queries.assign(split=side)


def results_of(queries: pd.DataFrame, domains: list[str]) -> BenchmarkResults:
    """Build results in which only the expert of a query's domain is right."""
    kept = queries[queries["benchmark"].isin(domains)].reset_index(drop=True)
    scores = (kept["benchmark"].to_numpy()[:, None] == np.array(domains)).astype(float)
    return BenchmarkResults(kept, domains, scores)


def expert(name: str) -> Expert:
    """Create an expert with a dummy model, because it is not called here."""
    return Expert(name, model=f"experts/{name}", description=name.replace("_", " "))


def train(queries: pd.DataFrame, domains: list[str], folder: Path, state: str) -> Path:
    """Train a composite of these domains' experts and return its folder."""
    data = build_supervision(
        results_of(queries, domains), ExpertPool([expert(name) for name in domains]), leaks="drop",
        near_duplicates="ignore",
    )  # fmt: skip
    return train_composite(str(smollm2()), data, folder, state=state, verify=False)


def routes(composite: Composite, queries: pd.DataFrame) -> np.ndarray:
    """Return the name of the chosen expert for each query."""
    states = states_of(composite.meta, queries["prompt"].tolist(), label="questions")
    logits = state_logits(composite.meta.rows, states, composite.meta.transform)
    return np.array(composite.pool.names)[logits.argmax(-1).numpy()]


def told(right: np.ndarray) -> str:
    """Format a share with its interval, in percent."""
    low, high = bootstrap_interval(right.astype(float), np.full(len(right), "all"))
    return f"{100 * right.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def rivals(composite: Composite, queries: pd.DataFrame) -> dict[str, np.ndarray]:
    """Predict domains on the test split with logistic regression on the same states, and on words alone."""
    train, test = (queries[queries["split"] == side] for side in ("train", "test"))
    states = {
        side: np.asarray(states_of(composite.meta, part["prompt"].tolist(), label=side).hidden)
        for side, part in (("train", train), ("test", test))
    }
    linear = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=[1e-3, 1e-2, 1e-1, 1.0], max_iter=500))
    words = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=100.0, max_iter=1000))
    return {
        "logistic regression, same states": linear.fit(states["train"], train["benchmark"]).predict(states["test"]),
        "words (TF-IDF)": words.fit(train["prompt"], train["benchmark"]).predict(test["prompt"]),
    }


def plug_in(queries: pd.DataFrame, domains: list[str], folder: Path, state: str) -> tuple[list[str], int, int]:
    """Plug in the domains in turn and return the accuracy after each step, changed old routes, and all old routes."""
    test = queries[queries["split"] == "test"].reset_index(drop=True)
    train(queries, domains[:FIRST], folder, state)
    found, changed, old = [], 0, 0
    for count in range(FIRST, len(domains) + 1):
        known = test[test["benchmark"].isin(domains[:count])].reset_index(drop=True)
        now = routes(load_composite(folder, device="cpu"), known)
        found.append(f"{100 * (now == known['benchmark']).mean():.1f}")
        if count == len(domains):
            break
        newcomer = domains[count]
        own = results_of(queries[queries["benchmark"] == newcomer], [newcomer])
        add_expert(folder, expert(newcomer), own, verify=False)
        after = routes(load_composite(folder, device="cpu"), known)
        changed, old = changed + int((after != now).sum()), old + len(known)
    return found, changed, old


def main() -> None:
    """Parse the command line, run the three parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="Folder with etr/. Default: $EXPERTOKEN_DATA.")
    parser.add_argument("--splits", type=int, default=3, help="Number of random splits. Default: %(default)s.")
    parser.add_argument("--state", default="head", help="State that the rows read. Default: %(default)s.")
    parser.add_argument("--orders", type=int, default=3, help="Number of orders of plugging in. Default: %(default)s.")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    queries = read(options.data / "etr")
    domains = sorted(queries["benchmark"].unique())
    rows: dict[str, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as work:
        for seed in range(options.splits):
            split = halves(queries, seed)
            test = split[split["split"] == "test"].reset_index(drop=True)
            composite = load_composite(train(split, domains, Path(work) / f"joint{seed}", options.state), device="cpu")
            decided = {"expert tokens, joint": routes(composite, test)} | rivals(composite, split)
            for name, chosen in decided.items():
                rows.setdefault(name, []).append(chosen == test["benchmark"].to_numpy())
            if seed == 0:
                first, kept = split, composite
        print("| routing accuracy, % | " + " | ".join(f"split {seed}" for seed in range(options.splits)) + " | mean |")
        print("|---" * (options.splits + 2) + "|")
        for name, right in rows.items():
            cells = [*(told(one) for one in right), f"{100 * np.mean([one.mean() for one in right]):.1f}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        steps = " | ".join(f"{count} experts" for count in range(FIRST, len(domains) + 1))
        print(f"\n| order | {steps} | old routes changed |")
        print("|---" * (len(domains) - FIRST + 3) + "|")
        for order in range(options.orders):
            names = [str(name) for name in np.random.default_rng(order).permutation(domains)]
            found, changed, old = plug_in(first, names, Path(work) / f"order{order}", options.state)
            print(f"| {', '.join(names)} | {' | '.join(found)} | {changed} of {old} |", flush=True)
        test = first[first["split"] == "test"]
        asked = test.iloc[np.linspace(0, len(test) - 1, REWORDED).astype(int)]
        scores = results_of(asked, domains).scores
        print("\n| change of the text | decisions flipped, % | accuracy lost, points |\n|---|---|---|")
        for entry in robustness(kept.meta, asked["prompt"].tolist(), scores):
            print(f"| {entry.change} | {100 * entry.share_flipped:.1f} | {100 * entry.score_lost:+.1f} |")


if __name__ == "__main__":
    main()
