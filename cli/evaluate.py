"""`expertoken evaluate`: the composite against every expert, baselines and the oracle."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    composite: Annotated[Path, typer.Argument(help="Composite folder.")],
    data: Annotated[Path | None, typer.Option(help="Supervision folder. Default: what it was trained on.")] = None,
    split: Annotated[str, typer.Option(help="Which side: test, validation or train.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Where report.json goes. Default: COMPOSITE/report.")] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 5000,
    plot: Annotated[bool, typer.Option(help="Draw report.png too (needs the extra `eval`).")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
) -> None:
    """Score a composite on one side of a supervision."""
    from ..evaluation.evaluate import evaluate as run
    from .tables import report_table, wide_console

    report = run(composite, data, split, resamples=resamples, trust_remote_code=trust_remote_code)
    folder = out or composite / "report"
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder / "report.json")
    if plot:
        from ..evaluation.plots import draw_scores

        draw_scores(report, folder / "report.png")
    console = wide_console()
    console.print(report_table(report))
    console.print(f"written to {folder / 'report.json'}", markup=False)
