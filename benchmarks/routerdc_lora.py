"""Method lora beside method tokens on RouterDC, sized for a CPU: `python benchmarks/routerdc_lora.py`.

Both methods use the same labels, objective and queries. Method lora starts from the rows of tokens and takes a limited
number of steps. The train and test splits keep their first queries only, because a model with LoRA cannot use cached
states. Prints a Markdown table.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from expertoken.benchmarks import DATA
from expertoken.benchmarks.routerdc_accuracy import COLUMNS, line, read
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import build_supervision
from expertoken.evaluation.evaluate import evaluate
from expertoken.examples.smollm2 import smollm2


def first_of_each(results: BenchmarkResults, counts: dict[str, int]) -> BenchmarkResults:
    """Return the results with at most `counts[split]` queries of each split and benchmark."""
    queries = results.queries
    place = queries.groupby(["benchmark", "split"]).cumcount()
    return results.take((place < queries["split"].map(counts)).to_numpy())


def train(method: str, meta: str, data: Path, out: Path, *options: str) -> float:
    """Train a composite in its own process and return the seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "expertoken.train", method, "--meta", meta, "--data", str(data)]
    subprocess.run([*command, "--out", str(out), "--use_cpu", "true", *options], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Train and evaluate both methods and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA / "routerdc")
    parser.add_argument("--out", type=Path, default=Path("routerdc_lora"))
    parser.add_argument("--label", default="soft")
    parser.add_argument("--objective", default="cross_entropy")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--train", type=int, default=300, help="Train queries of each benchmark.")
    parser.add_argument("--test", type=int, default=150, help="Test queries of each benchmark.")
    parser.add_argument("--learning-rate", default="1e-4")
    options = parser.parse_args()

    supervision = build_supervision(
        first_of_each(read(options.data), {"train": options.train, "test": options.test}),
        labelling=options.label,
        leaks="drop",
    )
    supervision.save(options.out / "supervision")
    sizes = supervision.info.sizes
    meta, common = str(smollm2()), ("--objective", options.objective)
    steps = ("--max_steps", str(options.steps), "--save_steps", str(options.steps // 2))
    seconds = {"tokens": train("tokens", meta, options.out / "supervision", options.out / "tokens", *common)}
    seconds["lora"] = train(
        "lora", meta, options.out / "supervision", options.out / "lora", *common, *steps,
        "--learning_rate", options.learning_rate, "--rows_learning_rate", "1e-3",
    )  # fmt: skip
    reports = {method: evaluate(options.out / method, baselines=[]) for method in seconds}
    print(
        f"train {sizes['train']}, validation {sizes['validation']}, test {sizes['test']} queries, {options.steps} steps"
    )
    rows = {f"{method} ({seconds[method]:.0f} s)": report.composite for method, report in reports.items()}
    rows |= {name: reports["tokens"].row(name) for name in ("best per dataset", "oracle")}
    for name, row in rows.items():
        interval = "{:.1f} to {:.1f}".format(*(100 * bound for bound in row.mean_score_interval))
        print(
            line(
                name, tuple(100 * row.score_by_benchmark[column] for column in COLUMNS), 100 * row.mean_score, interval
            )
        )


if __name__ == "__main__":
    main()
