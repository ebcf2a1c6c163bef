"""Pools in RouterEval's shape, of 3 to 1,000 experts on real questions: `python benchmarks/hard_pool.py`.

The questions are MMLU's as RouteLLM publishes them. The experts are synthetic. Each has a general ability and strengths
and weaknesses by subject. Its chance of a right answer follows an item-response model: the ability in the subject minus
the question's difficulty.

RouterEval's three pools (arXiv 2503.10657) are drawn from 3,000 such experts, each in every size. They are the best
(all_strong), the worst (all_weak), and as many spread from the best to the worst (strong_to_weak). They are written as
RouterEval's pickle and read by its reader. Composites trained on them are measured by RouterEval's figures: mu, V_R,
V_B, E_p. Prints a Markdown table.
"""

import argparse
import itertools
import pickle
import resource
from pathlib import Path

import numpy as np
import pandas as pd

from expertoken.benchmarks import DATA
from expertoken.benchmarks.fitting import fit
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.supervision import build_supervision
from expertoken.evaluation.evaluate import evaluate
from expertoken.evaluation.metrics import reference_score
from expertoken.evaluation.report import Report
from expertoken.examples.smollm2 import smollm2
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.source import Source
from expertoken.modeling.state import StateSpec

KINDS = ("all_strong", "all_weak", "strong_to_weak")
LABELS = {"correctness": "correctness", "query": "cross_entropy"}
STRENGTHS = (0.3, 0.1, 0.03, 0.01, 0.003)
POPULATION = 3000
SIZES = {"easy": (3, 5), "hard": (10, 100, 1000)}  # RouterEval's levels
_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def answers(subjects: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the scores of all experts on all questions, `[N, POPULATION]` of 0 and 1."""
    kinds, index = np.unique(subjects, return_inverse=True)
    ability = rng.normal(0.5, 0.7, (POPULATION, 1)) + rng.normal(0, 0.7, (POPULATION, len(kinds)))
    difficulty = rng.normal(0, 1, len(subjects)) + rng.normal(0, 0.5, len(kinds))[index]
    odds = ability[:, index].T - difficulty[:, None]
    return (rng.random(odds.shape) < 1 / (1 + np.exp(-1.7 * odds))).astype(np.float32)


def write(queries: pd.DataFrame, file: Path, seed: int = 0) -> None:
    """Write a file in the format of RouterEval's `mmlu_router_dataset.pkl`."""
    rng = np.random.default_rng(seed)
    right = answers(queries["subject"].to_numpy(dtype=str), rng)
    order = rng.permutation(len(queries))
    ends = np.cumsum([round(share * len(queries)) for share in _SHARES.values()])[:-1]
    sides = dict(zip(_SHARES, np.split(order, ends), strict=True))
    ranked = right[sides["train"]].mean(0).argsort()[::-1]

    def group(size: int) -> dict[str, dict]:
        spread = ranked[np.linspace(0, POPULATION - 1, size).astype(int)]
        pools = {"all_strong": ranked[:size], "all_weak": ranked[-size:], "strong_to_weak": spread}
        return {
            kind: {
                "data": {f"{side}_score": right[np.ix_(rows, chosen)] for side, rows in sides.items()},
                "model": [f"expert-{index}" for index in chosen],
            }
            for kind, chosen in pools.items()
        }

    prompts = {f"{side}_prompt": queries["prompt"].iloc[rows].tolist() for side, rows in sides.items()}
    levels = {level: {size: group(size) for size in sizes} for level, sizes in SIZES.items()}
    document = {**levels, "split_index": {}, "prompt": prompts}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(document))


def learn(meta: MetaLLM, file: Path, size: int, kind: str, label: str, routers: list[str]) -> tuple[Report, float]:
    """Fit tokens for a pool, evaluate them, and return the report and the seconds of the fit."""
    level = next(level for level, sizes in SIZES.items() if size in sizes)
    results = read_results(file, "routereval", difficulty=level, candidates=str(size), kind=kind)
    supervision = build_supervision(results, labelling=label, leaks="drop", near_duplicates="ignore")
    composite, _, seconds = fit(meta, supervision, LABELS[label], STRENGTHS)
    return evaluate(composite, supervision, baselines=routers, resamples=1000), seconds


def main() -> None:
    """Parse the command line, run every pool and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="Folder with routellm/. Default: $EXPERTOKEN_DATA.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/hard_pool"), help="Folder to write. Default: %(default)s."
    )
    parser.add_argument("--dtype", default="float32", help="Data type of the meta LLM. Default: %(default)s.")
    parser.add_argument("--state", default="head", help="State that the rows read. Default: %(default)s.")
    parser.add_argument("--sizes", default="3,5,10,100,1000", help="Sizes of the pools. Default: %(default)s.")
    parser.add_argument(
        "--routers", default="names,words,kNN,linear,clusters", help="Learnt baselines. Default: %(default)s."
    )
    options = parser.parse_args()
    queries = read_results(options.data / "routellm", "routellm").queries
    file = options.out / "mmlu_router_dataset.pkl"
    write(queries, file)
    meta = MetaLLM.from_pretrained(Source(str(smollm2())), 2, dtype=options.dtype)
    print("| experts | pool | router | mu | 95 % interval | V_R | V_B | E_p, bits |\n|---|---|---|---|---|---|---|---|")
    fits = []
    for size, kind in itertools.product(map(int, options.sizes.split(",")), KINDS):
        meta.read_at(StateSpec.parse(options.state), size)
        for number, label in enumerate(LABELS):
            report, seconds = learn(meta, file, size, kind, label, [] if number else options.routers.split(","))
            fits.append(seconds)
            figures = report.metrics
            entropy = {"composite": f"{figures['entropy of the predictions, bits (E_p)']:.2f}"}
            best = max(row.mean_score for row in report.results if row.kind == "expert")
            reference = reference_score("mmlu") or 1.0
            for row in report.results:
                if row.kind == "expert" or (number and row.kind != "composite"):
                    continue
                name = f"tokens, {label}" if row.kind == "composite" else row.name
                interval = f"{100 * row.mean_score_interval[0]:.1f} to {100 * row.mean_score_interval[1]:.1f}"
                ratios = f"{row.mean_score / reference:.3f} | {row.mean_score / best:.3f}"
                mean, bits = f"{100 * row.mean_score:.2f}", entropy.get(row.name, "")
                print(
                    f"| {size:,} | {kind} | {name} | {mean} | {interval} | {ratios} | {bits} |",
                    flush=True,
                )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{report.settings['queries']} test queries; fits of {len(STRENGTHS)} strengths "
        f"{', '.join(f'{seconds:.0f}' for seconds in fits)} s; peak memory {memory:.1f} GiB"
    )


if __name__ == "__main__":
    main()
