"""Routing on results of vision-language models: `python benchmarks/seen_results.py`.

The data sets are MATH-Vision with its pictures (a random part is the test split), MathVista with held-out sources, and
BLINK's tasks. MathVista and BLINK come without pictures, because their pictures are not available here. A row of the
table is a router: the composite, the composite without pictures, or a trivial baseline. A cell is the mean score over
the draws. Beside it is the composite's mean gain over the row, with its range.

With pictures the meta LLM is the one of examples/pictures: SmolLM2 behind a random vision tower. The result is
therefore the gain from pictures without any training of the tower. Without pictures the meta LLM is SmolLM2 itself.
"""

import argparse
import re
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from expertoken.benchmarks import DATA
from expertoken.benchmarks.fitting import fit
from expertoken.data_prep.images import with_pictures
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import build_supervision
from expertoken.evaluation.evaluate import evaluate
from expertoken.examples.pictures.make_model import make_model
from expertoken.examples.smollm2 import smollm2
from expertoken.modeling.experts import Expert
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.source import Source
from expertoken.modeling.state import StateSpec

BASELINES = ("names", "words", "linear")
_BLIND = re.compile("text-only|Text Only|Text\\+Image")  # runs whose models received no picture


def read(file: Path, folder: Path, **columns: str) -> tuple[BenchmarkResults, ExpertPool]:
    """Read the results of a table and build a pool of the models that received the pictures."""
    frame = pd.read_csv(file, dtype={"id": str}).rename(columns=columns)
    scores = [name for name in frame if set(frame[name].dropna().unique()) <= {0, 1} and name != "testmini"]
    kept = [name for name in scores if not _BLIND.search(name)]
    queries = [name for name in ("id", "query", "image", "benchmark", "subject") if name in frame]
    if "query" not in frame:
        frame["query"] = frame["subject"] + ": " + frame["id"]  # BLINK's results have no other text of a query
        queries.append("query")
    frame = frame[[*queries, *kept]].rename(columns={name: re.sub(r"[^\w.-]", "-", name) for name in kept})
    if "benchmark" not in frame:
        frame["benchmark"] = file.parent.name
    copy = folder / f"{file.parent.name}.csv"
    frame.to_csv(copy, index=False)
    results = read_results(copy, "table")
    return results, ExpertPool(
        [Expert(name, "openai", name, base_url="http://localhost:1/v1") for name in results.models]
    )


def main() -> None:
    """Print a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", default="8:both")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--sets", nargs="+", default=["mathvision", "mathvista", "blink"])
    given = parser.parse_args()
    data, state = DATA / "vision", StateSpec.parse(given.state)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in given.sets:
            if name == "mathvision":
                results, pool = read(data / name / "results.csv", folder)
                with zipfile.ZipFile(data / name / "images-320.zip") as archive:
                    archive.extractall(folder / "pictures")
                below = next(path.parent for path in (folder / "pictures").rglob("*.webp"))
                images = [Path(one[0]).with_suffix(".webp").name for one in results.queries["images"]]
                results.queries["images"] = [(image,) for image in images]
                results = with_pictures(results, below)
                source = Source(str(make_model(folder / "model")))
            else:
                file = data / name / ("results.csv" if name == "mathvista" else "val-by-task.csv")
                results, pool = read(file, folder, **({"task": "subject"} if name == "blink" else {}))
                if "images" in results.queries:
                    results.queries.drop(columns="images", inplace=True)
                source = Source(str(smollm2()))
            meta = MetaLLM.from_pretrained(source, len(pool), device="cpu", state=state)
            measure(name, meta, results, pool, given.draws)


def measure(name: str, meta: MetaLLM, results: BenchmarkResults, pool: ExpertPool, draws: int) -> None:
    """Fit and evaluate on several draws and print the means."""
    reached, gains = defaultdict(list), defaultdict(list)
    sources = np.array(sorted(results.queries["benchmark"].unique()))
    for seed in range(draws):
        held = np.random.default_rng(seed).permutation(sources)[: len(sources) // 5]
        hold_out = ("benchmark", [str(source) for source in held]) if len(held) else None
        supervision = build_supervision(
            results, pool, leaks="keep", near_duplicates="ignore", seed=seed, hold_out=hold_out
        )
        composite, _, _ = fit(meta, supervision, "correctness")
        rows = [*BASELINES, *(["text-only"] if meta.sight else [])]
        report = evaluate(composite, supervision, baselines=rows, resamples=200)
        for row in report.results:
            label = re.sub(r" \(.*\)", "", row.name)
            if row.kind != "expert":
                reached[label].append(row.mean_score)
                gains[label].append(report.results[0].mean_score - row.mean_score)
    print(f"\n{name}, {len(results)} questions, {len(pool)} models, {draws} draws, state {meta.state}")
    print("| | score, % | the composite's gain |\n|---|---|---|")
    for label, values in sorted(reached.items(), key=lambda item: -np.mean(item[1])):
        gain = np.array(gains[label]) * 100
        told = "" if label == "composite" else f"{gain.mean():+.1f} ({gain.min():+.1f} to {gain.max():+.1f})"
        print(f"| {label} | {100 * np.mean(values):.1f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
