"""Cost and quality on RouterBench's ARC-Challenge and Winogrande: `python benchmarks/routerbench_aiq.py`.

The benchmark has eleven models with costs (arXiv 2403.12031). Method tokens with correctness labels is compared with
routers from libraries on the same states. It reports the score when only quality counts, the cost of that, and AIQ. AIQ
is the mean height of the hull of cost and quality over one range of costs. Prints a Markdown table and the verdict, and
writes the whole report with its plots.
"""

import argparse
from pathlib import Path

from expertoken.benchmarks import DATA
from expertoken.benchmarks.fitting import fit
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.supervision import build_supervision
from expertoken.evaluation.evaluate import evaluate
from expertoken.evaluation.plots import draw_report
from expertoken.examples.smollm2 import smollm2
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.source import Source


def main() -> None:
    """Parse the command line, fit and evaluate a composite, print a table and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="Folder with routerbench/. Default: $EXPERTOKEN_DATA.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/routerbench"), help="Folder to write. Default: %(default)s."
    )
    parser.add_argument("--dtype", default="float32", help="Data type of the meta LLM. Default: %(default)s.")
    parser.add_argument("--encoder", help="Encoder (hub id or folder) to fine-tune as a router too. Default: none.")
    options = parser.parse_args()
    results = read_results(options.data / "routerbench", "routerbench")
    supervision = build_supervision(results, labelling="correctness", leaks="drop")
    meta = MetaLLM.from_pretrained(Source(str(smollm2())), len(results.models), dtype=options.dtype)
    composite, _, seconds = fit(meta, supervision, "correctness")
    report = evaluate(composite, supervision, encoder=options.encoder)
    report.save_folder(options.out, draw_report(report, options.out))
    print("| | score, everything for quality | USD per 1,000 | AIQ | 95 % interval |\n|---|---|---|---|---|")
    for row in report.results:
        aiq = report.metrics.get(f"AIQ, {row.name}")
        if aiq is None and row.kind == "expert":
            continue
        cells = [f"{100 * row.mean_score:.2f}", "" if row.usd_per_query is None else f"{1000 * row.usd_per_query:.3f}"]
        if aiq is not None:
            cells += [f"{aiq:.4f}", "{:.4f} to {:.4f}".format(*report.metric_intervals[f"AIQ, {row.name}"])]
        print(f"| {row.name} | {' | '.join([*cells, '', ''][:4])} |")
    low, high = report.metric_intervals["AIQ, single models"]
    print(f"| hull of the single models | | | {report.metrics['AIQ, single models']:.4f} | {low:.4f} to {high:.4f} |\n")
    print("\n".join(report.verdict()))
    error = report.metrics["calibration error (ECE)"]
    print(
        f"\nsizes {supervision.info.sizes}, calibration error {error:.3f}, fits {seconds:.0f} s, report {options.out}"
    )


if __name__ == "__main__":
    main()
