"""Labels from long Parquet at RouterEval's size: `python benchmarks/labels_at_scale.py --out /tmp/scale`.

Makes records of 8,500 models on a growing number of queries (23,530 of them make 200 million records), labels them in a
process of their own, and runs pandas beside it where pandas fits into memory. Prints seconds, peak memory, and ratios.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

MODELS = 8500
SUBJECTS = 57


def generate(folder: Path, queries: int) -> None:
    """Write `queries.parquet` and `records.parquet`, model after model, as leaderboards are collected."""
    import duckdb

    folder.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect()
    connection.execute("SET memory_limit = '2GiB'")
    connection.execute(
        f"COPY (SELECT 'mmlu/' || i AS id, 'Question ' || i AS prompt, 'b' || (i % 12) AS benchmark, "
        f"'s' || (i % {SUBJECTS}) AS subject, CASE WHEN hash(i) % 5 = 0 THEN 'test' ELSE 'train' END AS split "
        f"FROM range({queries}) t(i)) TO '{folder / 'queries.parquet'}' (FORMAT parquet)"
    )
    # Whether model m gets query q right: its skill and the query's ease, drawn once each.
    connection.execute(
        f"COPY (SELECT 'mmlu/' || (r % {queries}) AS id, 'org/model-' || (r // {queries}) AS model, "
        f"((hash(r) % 1000) < 300 + (hash(r // {queries}) % 400) + (hash((r % {queries}) + 7) % 300))::INT::FLOAT "
        "AS score "
        f"FROM range({queries}::BIGINT * {MODELS}) t(r)) TO '{folder / 'records.parquet'}' (FORMAT parquet)"
    )


def with_stream(folder: Path, strategy: str) -> None:
    """Ours."""
    from expertoken.data_prep.labels import Labelling
    from expertoken.data_prep.out_of_core import label_records

    labelling = Labelling(strategy, ties="best" if strategy == "query" else "all")
    label_records(folder / "records.parquet", folder / "queries.parquet", folder / "labels.parquet", labelling)


def with_pandas(folder: Path, strategy: str) -> None:
    """What one writes first: the whole table in memory."""
    import pandas as pd

    queries = pd.read_parquet(folder / "queries.parquet")
    records = pd.read_parquet(folder / "records.parquet")
    records["id"], records["model"] = records["id"].astype("category"), records["model"].astype("category")
    learning = records.merge(queries[queries["split"] != "test"], on="id")
    if strategy == "subject":
        means = learning.groupby(["benchmark", "subject", "model"], observed=True)["score"].mean()
        best = means.groupby(["benchmark", "subject"]).idxmax().str[2].rename("winner").reset_index()
        labels = queries.merge(best, on=["benchmark", "subject"], how="left")
    else:
        rank = learning.groupby("model", observed=True)["score"].mean().rank(ascending=False)
        records["key"] = records["score"] * 1e6 - records["model"].map(rank).astype(float)
        first = records.groupby("id", observed=True)["key"].idxmax()
        winner = records.loc[first, ["id", "model"]]
        labels = queries.merge(winner, on="id", how="left")
    labels.to_parquet(folder / "pandas.parquet")


def measure(side: str, folder: Path, strategy: str) -> tuple[float, float]:
    """Seconds and peak GiB of one side in a fresh process, imports included."""
    command = [sys.executable, __file__, "--run", side, "--out", str(folder), "--strategy", strategy]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scale"))
    parser.add_argument("--records", type=float, nargs="+", default=[2e6, 2e7, 2e8])
    parser.add_argument("--pandas-up-to", type=float, default=2e7)
    parser.add_argument("--run", choices=["stream", "pandas"], help=argparse.SUPPRESS)
    parser.add_argument("--strategy", default="subject", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        {"stream": with_stream, "pandas": with_pandas}[options.run](options.out, options.strategy)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    print(
        "| records | labels | seconds | peak GiB | pandas, seconds | pandas, peak GiB | time, pandas / ours | growth |"
    )
    print("|---|---|---|---|---|---|---|---|")
    before: dict[str, float] = {}
    for count in options.records:
        queries = round(count / MODELS)
        folder = options.out / f"{queries}"
        if not (folder / "records.parquet").exists():
            generate(folder, queries)
        for strategy in ("subject", "query"):
            seconds, peak = measure("stream", folder, strategy)
            cells = [f"{queries * MODELS:,}", strategy, f"{seconds:.1f}", f"{peak:.2f}", "", "", ""]
            if count <= options.pandas_up_to:
                other, other_peak = measure("pandas", folder, strategy)
                cells[4:7] = [f"{other:.1f}", f"{other_peak:.2f}", f"{other / seconds:.1f}x"]
            cells.append(f"{seconds / before[strategy]:.1f}x" if strategy in before else "")
            before[strategy] = seconds
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
