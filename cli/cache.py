"""`expertoken cache`: list and prune the cached states of meta LLMs."""

from datetime import datetime
from typing import Annotated

import typer

app = typer.Typer(help="List or prune the cached states of meta LLMs.", no_args_is_help=True)

_DAY = 86400


@app.command("list")
def list_models() -> None:
    """List the models whose states are cached.

    The least recently written model comes first.
    """
    from rich.table import Table

    from ..modeling.files import cache_folder
    from ..modeling.state_cache import cached_models
    from .tables import wide_console

    console = wide_console()
    table = Table("model", "queries", "MiB", "last written", title=str(cache_folder("states")))
    for model in cached_models():
        written = datetime.fromtimestamp(model.used).strftime("%Y-%m-%d %H:%M")
        table.add_row(model.folder.name, f"{model.queries:,}", f"{model.size / 2**20:.1f}", written)
    console.print(table)


@app.command()
def prune(
    days: Annotated[
        float, typer.Option(min=0, help="Days since the last write after which the states of a model are removed.")
    ],
) -> None:
    """Remove the cached states of models without recent writes. They are recomputed when needed."""
    from ..modeling.state_cache import prune as remove

    gone = remove(days * _DAY)
    typer.echo(f"{len(gone)} models removed, {sum(model.size for model in gone) / 2**20:.1f} MiB")
