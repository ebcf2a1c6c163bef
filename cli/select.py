"""`expertoken select`: the best expert for a whole new task."""

from pathlib import Path
from typing import Annotated

import typer


def select(
    composite: Annotated[Path, typer.Argument(help="Composite folder.")],
    queries: Annotated[
        Path, typer.Option(help="Inputs of the task: a text file with one per line, or a table with `query`.")
    ],
    labelled: Annotated[
        Path | None,
        typer.Option(
            help="Results of the experts on a few more inputs of the task, which correct the ranking. Any format of "
            "`expertoken prepare`."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Supervision folder. Default: the supervision that the composite was trained on."),
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
) -> None:
    """Rank the experts for a whole new task by its inputs alone.

    The table has S1, S2 and S3 of arXiv 2309.15789, and each expert's average score so far.
    """
    from rich.table import Table

    from ..data_prep.reading import read_queries, read_results
    from ..evaluation.select import select as run
    from ..modeling.composite import POOL_FILE
    from ..modeling.pool import ExpertPool
    from .tables import escape, wide_console

    examples = None
    if labelled:
        results = read_results(labelled)
        pool = ExpertPool.from_yaml(composite / POOL_FILE)
        examples = (results.queries["prompt"].tolist(), results.columns_of(pool))
    ranking = run(composite, read_queries(queries), labelled=examples, data=data, trust_remote_code=trust_remote_code)
    best = max(ranking, key=lambda entry: entry.average)
    table = Table("expert", "S1", "S2", "S3", "predictor accuracy", "average so far", title="expected on this task")
    for entry in ranking:
        values = (entry.s1, entry.s2, entry.s3, entry.trust, entry.average)
        table.add_row(escape(entry.name), *(f"{value:.3f}" for value in values))
    console = wide_console()
    console.print(table)
    console.print(f"best by S3: {ranking[0].name}, best on average so far: {best.name}", markup=False)
