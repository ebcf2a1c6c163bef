"""RouterDC in distribution, with SmolLM2-135M-Instruct as the meta LLM: `python benchmarks/routerdc_accuracy.py`.

The benchmark trains expert tokens for RouterDC's seven LLMs (arXiv 2409.19886) on the five whole train files. It tests
them on the five whole test files. It does so for every labelling rule and objective, on each state of `--states`. The
validation score selects the recipe. Train queries that also occur in a test file (a few do) are dropped. Prints a
Markdown table and writes `routerdc.json`.

The last column holds HumanEval at its best model. Each of its 49 queries is worth two points, which hides the effect of
the 9,359 others.
"""

import argparse
import json
import resource
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from expertoken.benchmarks import DATA
from expertoken.benchmarks.fitting import SIDES, fit
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.results import BenchmarkResults
from expertoken.data_prep.supervision import Supervision, build_supervision
from expertoken.evaluation.evaluate import evaluate
from expertoken.evaluation.metrics import bootstrap_interval
from expertoken.evaluation.report import Report
from expertoken.examples.smollm2 import smollm2
from expertoken.modeling.composite import Composite
from expertoken.modeling.files import atomic_file
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.source import Source
from expertoken.modeling.state import StateSpec
from expertoken.modeling.states import cache_layers, encode_all, state_logits, states_of

FILES = ("mmlu_{}", "gsm8k-{}", "cmmlu_{}", "arc_challenge_{}", "humaneval_{}")
COLUMNS = ("mmlu", "gsm8k", "cmmlu", "arc_challenge", "humaneval")
RECIPES = {
    "tokens, subject labels": ("subject", "cross_entropy"),
    "tokens, query labels": ("query", "cross_entropy"),
    "tokens, soft labels": ("soft", "cross_entropy"),
    "tokens, mixed labels": ("mixed", "cross_entropy"),
    "tokens, correctness": ("correctness", "correctness"),
    "tokens, expected score": ("expected_score", "expected_score"),
    "tokens, contrastive (RouterDC's loss)": ("query", "contrastive"),
}
PUBLISHED = {
    "RouterDC (published)": (61.07, 70.32, 51.77, 58.52, 51.02),
    "ZOOTER (published)": None,
    "LoraRetriever (published)": None,
}
PUBLISHED_MEAN = {"RouterDC (published)": 58.54, "ZOOTER (published)": 53.97, "LoraRetriever (published)": 55.77}


def read(folder: Path) -> BenchmarkResults:
    """Read the ten files as one set of results."""
    files = [folder / f"{name.format(side)}.json" for name in FILES for side in ("train", "test")]
    return BenchmarkResults.merge([read_results(file, "routerdc") for file in files])


def run_recipe(meta: MetaLLM, supervision: Supervision, objective: str, **routers: Any) -> tuple[Report, dict, str]:
    """Fit rows and evaluate them on the test split. `routers` are the arguments of `evaluate` for learnt baselines."""
    composite, found, seconds = fit(meta, supervision, objective)
    report = evaluate(composite, supervision, **routers)
    chosen = next(entry for entry in found.path if entry["l2"] == found.l2)
    return report, {**chosen, "fit_seconds": seconds}, held_gain(composite, supervision)


def told(difference: float, interval: tuple[float, float]) -> str:
    """Format a gain in points, with its interval."""
    return f"{100 * difference:+.2f} ({100 * interval[0]:+.2f} to {100 * interval[1]:+.2f})"


def held_gain(composite: Composite, supervision: Supervision) -> str:
    """Format the gain over the best model per dataset (of train and validation), with no gain on HumanEval."""
    known = np.concatenate([supervision.scores(side) for side in ("train", "validation")])
    kinds = np.concatenate([supervision.benchmarks(side) for side in ("train", "validation")])
    names, scores = supervision.benchmarks("test"), supervision.scores("test")
    best = {kind: int(known[kinds == kind].mean(0).argmax()) for kind in np.unique(kinds)}
    states = states_of(composite.meta, supervision.side("test")["messages"], label="test states")
    chosen = state_logits(composite.meta.rows, states, composite.meta.transform).argmax(-1).numpy()
    rows = np.arange(len(scores))
    gain = scores[rows, chosen] - scores[rows, [best[name] for name in names]]
    gain[names == "humaneval"] = 0
    mean = float(np.mean([gain[names == name].mean() for name in COLUMNS]))
    return told(mean, bootstrap_interval(gain, names))


def line(
    name: str, values: tuple[float, ...] | None, mean: float, interval: str = "", gain: str = "", held: str = ""
) -> str:
    """Format a row of the table."""
    cells = " | ".join(f"{value:.2f}" for value in values) if values else " | ".join("" for _ in COLUMNS)
    return f"| {name} | {cells} | {mean:.2f} | {interval} | {gain} | {held} |"


def table(reports: dict[str, Report], held: dict[str, str]) -> list[str]:
    """Format the table: all recipes, the single models, the baselines and the published numbers."""
    lines = [
        "| | MMLU | GSM8K | CMMLU | ARC-C | HumanEval | mean | 95 % interval | gain over best per dataset "
        "| with HumanEval held |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        row = report.composite
        found = report.row("best per dataset").composite_gain
        assert found is not None
        lines.append(
            line(
                name,
                tuple(100 * row.score_by_benchmark[column] for column in COLUMNS),
                100 * row.mean_score,
                f"{100 * row.mean_score_interval[0]:.1f} to {100 * row.mean_score_interval[1]:.1f}",
                told(found.difference, found.interval),
                held[name],
            )
        )
    report = next(iter(reports.values()))
    for row in report.results[1:]:
        interval = f"{100 * row.mean_score_interval[0]:.1f} to {100 * row.mean_score_interval[1]:.1f}"
        lines.append(
            line(row.name, tuple(100 * row.score_by_benchmark[c] for c in COLUMNS), 100 * row.mean_score, interval)
        )
    lines += [line(name, values, PUBLISHED_MEAN[name]) for name, values in PUBLISHED.items()]
    return lines


def main() -> None:
    """Parse the command line, run every recipe, print the table and write `routerdc.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="Folder with routerdc/. Default: $EXPERTOKEN_DATA.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/routerdc"), help="Folder to write. Default: %(default)s."
    )
    parser.add_argument("--dtype", default="float32", help="Data type of the meta LLM. Default: %(default)s.")
    parser.add_argument(
        "--states", default="head,8:mean,15:both", help="States that the rows read. Default: %(default)s."
    )
    parser.add_argument("--encoder", help="Encoder (hub id or folder) to fine-tune as a router too. Default: none.")
    parser.add_argument("--encoder-epochs", type=int, default=3, help="Epochs of the encoder. Default: %(default)s.")
    parser.add_argument(
        "--embedder", help="A sentence-transformers model. Learnt routers run on its features too. Default: none."
    )
    options = parser.parse_args()
    results = read(options.data / "routerdc")
    meta = MetaLLM.from_pretrained(Source(str(smollm2())), len(results.models), dtype=options.dtype)
    specs = [StateSpec.parse(text) for text in options.states.split(",")]
    sides = build_supervision(results, labelling="subject", leaks="drop", near_duplicates="ignore")
    texts = [messages for side in SIDES for messages in sides.side(side)["messages"]]
    queries = encode_all(meta, texts, "questions")
    started = time.perf_counter()
    layers = sorted({spec.layer for spec in specs if spec.layer})
    cache_layers(meta, queries, layers, max_tokens=None, label="states")
    print(f"{sum(map(len, queries)):,} tokens, layers {layers}: {time.perf_counter() - started:.0f} s", flush=True)
    reports: dict[str, Any] = {}
    fits: dict[str, Any] = {}
    held: dict[str, str] = {}
    for spec in specs:
        meta.read_at(spec, len(results.models))
        for recipe, (strategy, objective) in RECIPES.items():
            supervision = build_supervision(results, labelling=strategy, leaks="drop", near_duplicates="ignore")
            # The learnt routers do not depend on the labels, so they run for the first recipe only.
            routers = {"encoder": options.encoder, "encoder_epochs": options.encoder_epochs}
            routers = {"baselines": []} if reports else routers
            name = f"{recipe}, {spec}"
            reports[name], fits[name], held[name] = run_recipe(meta, supervision, objective, **routers)
    if options.embedder:
        other, _, _ = run_recipe(meta, supervision, objective, embedder=options.embedder)
        first = next(iter(reports.values()))
        first.results += [
            replace(row, name=f"{row.name}, on {Path(options.embedder).name}")
            for row in other.results
            if row.kind == "router"
        ]
    best = max(fits, key=lambda name: fits[name]["validation_score"])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("\n".join(table(reports, held)))
    print(f"\nchosen on validation: {best} (validation scores: ", end="")
    print(", ".join(f"{name} {100 * fit['validation_score']:.2f}" for name, fit in fits.items()), end=")\n")
    print(
        f"all fits {np.sum([fit['fit_seconds'] for fit in fits.values()]):.0f} s, peak memory {memory:.1f} GiB, "
        f"{sides.info.leaks['equal']['found']} leaked train queries dropped, sizes {sides.info.sizes}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_file(options.out / "routerdc.json") as aside:
        document = {name: {"report": asdict(report), "fit": fits[name]} for name, report in reports.items()}
        aside.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
