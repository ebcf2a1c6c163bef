"""`expertoken label`: labels for results that are larger than memory."""

from pathlib import Path
from typing import Annotated

import typer

from ..data_prep.labels import TIES
from ..data_prep.out_of_core import MAKERS
from .choice import one_of


def label(
    records: Annotated[Path, typer.Argument(help="Parquet file or folder: id, model, score and maybe cost.")],
    queries: Annotated[Path, typer.Option(help="Parquet file: id, benchmark, subject, split.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write: id, benchmark, subject, split, winners, weight.")],
    label: Annotated[
        str,
        typer.Option(**one_of("label", MAKERS), help="query: each query's own winner. subject: its subject's winner."),
    ] = "query",
    ties: Annotated[
        str, typer.Option(**one_of("ties", TIES), help="Which of several winners share the label; best: best overall.")
    ] = "all",
    shrinkage: Annotated[float, typer.Option(help="Queries of the benchmark's mean that top up each subject.")] = 0.0,
    cost_weight: Annotated[float, typer.Option(help="Score per USD: labels see score - cost_weight * cost.")] = 0.0,
    memory: Annotated[float, typer.Option(help="GiB that the database may use; the rest goes to disk.")] = 2.0,
) -> None:
    """Label hundreds of millions of records, streaming from Parquet."""
    from ..data_prep.labels import Labelling
    from ..data_prep.out_of_core import label_records

    labelling = Labelling(label, ties=ties, shrinkage=shrinkage, cost_weight=cost_weight)
    done = label_records(records, queries, out, labelling, memory_gib=memory)
    typer.echo(
        f"{done.records:,} records of {done.models:,} models: {done.queries:,} queries have a label, written to {out}"
    )
