"""Whole benchmarks held out, one at a time, on RouterDC's five and ARC-Easy: `python benchmarks/held_out.py`.

The benchmark repeats the experiments of two papers on the same seven LLMs.

1. Bench-CoE (arXiv 2412.04167) compares labels by subject with labels by query, in distribution and on a held-out
   benchmark. The baselines are the best single model, the benchmark's name, words, and kNN.
2. LLM Routing with Benchmark Datasets (arXiv 2309.15789) selects one model for a new task by S1, S2 and S3. The
   baselines are the model that is best on average and the best model on the task.

The meta LLM is SmolLM2-135M-Instruct. Prints two Markdown tables.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from expertoken import train_composite
from expertoken.benchmarks import DATA
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import Supervision, build_supervision
from expertoken.evaluation.evaluate import evaluate
from expertoken.evaluation.report import Report
from expertoken.evaluation.select import select
from expertoken.examples.smollm2 import smollm2
from expertoken.modeling.chat import text_of

FILES = ("mmlu_{}", "gsm8k-{}", "cmmlu_{}", "arc_challenge_{}", "humaneval_{}", "arc_easy_{}")
LABELS = ("subject", "query", "correctness")
RIVALS = ("names", "words", "kNN")
CHOICES = ("s3", "s2", "s1", "average")


def read(folder: Path, sample: int | None) -> BenchmarkResults:
    """Read the twelve files as one set of results, or `sample` queries of each benchmark."""
    files = [folder / f"{name.format(side)}.json" for name in FILES for side in ("train", "test")]
    results = BenchmarkResults.merge([read_results(file, "routerdc") for file in files])
    if sample is None:
        return results
    rng, names = np.random.default_rng(0), results.queries["benchmark"].to_numpy()
    rows = [rng.permutation(np.flatnonzero(names == name))[:sample] for name in np.unique(names)]
    return results.take(np.sort(np.concatenate(rows)))


def supervision_of(results: BenchmarkResults, labelling: str, held: str | None) -> Supervision:
    """Build a supervision in distribution, or with the benchmark `held` as the test split."""
    more: dict[str, Any] = {} if held is None else {"hold_out": ("benchmark", [held])}
    return build_supervision(results, labelling=labelling, leaks="drop", near_duplicates="ignore", **more)


def told(report: Report, name: str) -> str:
    """Format a row's mean score and the interval of the composite's gain over it, in percent."""
    row = report.composite if name == "composite" else next(r for r in report.results if r.name.startswith(name))
    if row.composite_gain is None:
        return f"{100 * row.mean_score:.2f}"
    low, high = row.composite_gain.interval
    return f"{100 * row.mean_score:.2f} ({100 * low:+.1f} to {100 * high:+.1f})"


def chosen_models(folder: Path, supervision: Supervision) -> dict[str, tuple[str, float]]:
    """Return the model that each rule selects for the test split, with its score there. `best` is the best model."""
    scores = supervision.scores("test").mean(0)
    names = supervision.info.candidates
    prompts = [text_of(messages[-1]) for messages in supervision.side("test")["messages"]]
    ranking = select(folder, prompts)
    found = {rule: max(ranking, key=lambda entry: getattr(entry, rule)).name for rule in CHOICES}
    found["best"] = names[int(scores.argmax())]
    return {rule: (name, float(scores[names.index(name)])) for rule, name in found.items()}


def main() -> None:
    """Parse the command line, hold out each benchmark in turn and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="Folder with routerdc/. Default: $EXPERTOKEN_DATA.")
    parser.add_argument("--state", default="head", help="State that the rows read. Default: %(default)s.")
    parser.add_argument("--sample", type=int, help="Number of queries of each benchmark. Default: all.")
    options = parser.parse_args()
    results = read(options.data / "routerdc", options.sample)
    benchmarks = sorted(results.queries["benchmark"].unique())
    lines = ("composite", "best single", *RIVALS, "random", "oracle")
    print(f"| held out | labels | {' | '.join(lines)} |\n|---|---|{'---|' * len(lines)}", flush=True)
    picks: dict[str, dict[str, tuple[str, float]]] = {}
    with tempfile.TemporaryDirectory() as work:
        for held in (None, *benchmarks):
            for labelling in LABELS:
                supervision = supervision_of(results, labelling, held)
                out = Path(work) / f"{held}-{labelling}"
                folder = train_composite(str(smollm2()), supervision, out, state=options.state, verify=False)
                report = evaluate(folder, baselines=list(RIVALS))
                cells = " | ".join(told(report, name) for name in lines)
                print(f"| {held or 'nothing'} | {labelling} | {cells} |", flush=True)
            if held is not None:
                picks[held] = chosen_models(folder, supervision)
    rules = (*CHOICES, "best")
    print(f"\n| task | {' | '.join(rules)} |\n|---|{'---|' * len(rules)}")
    for held, found in picks.items():
        print(f"| {held} | {' | '.join(f'{found[rule][0]}, {100 * found[rule][1]:.1f}' for rule in rules)} |")
    means = [f"{100 * np.mean([found[rule][1] for found in picks.values()]):.2f}" for rule in rules]
    print(f"| mean | {' | '.join(means)} |")


if __name__ == "__main__":
    main()
