"""`expertoken keys`: who may use a server, and which experts."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Add, list or remove API keys of a server's key file.", no_args_is_help=True)

_File = Annotated[Path, typer.Argument(help="The key file; it holds hashes, never the keys.")]
_Name = Annotated[str, typer.Argument(help="Whose key it is.")]


@app.command()
def add(
    file: _File,
    name: _Name,
    expert: Annotated[
        list[str] | None, typer.Option(help="An expert that the key may use; may be repeated. Default: all.")
    ] = None,
) -> None:
    """Make a key and print it. It is stored nowhere: keep it."""
    from ..inference.server.keys import add_key

    typer.echo(add_key(file, name, expert))


@app.command("list")
def list_keys(file: _File) -> None:
    """List whose keys a file knows, and what they may use."""
    from rich.table import Table

    from ..inference.server.keys import read_keys
    from .tables import wide_console

    table = Table("name", "experts", "sha256 begins with")
    for client in read_keys(file):
        table.add_row(client.name, "all" if client.experts is None else ", ".join(client.experts), client.digest[:8])
    wide_console().print(table)


@app.command()
def remove(file: _File, name: _Name) -> None:
    """Take a key out of the file; `kill -HUP` tells a running server."""
    from ..inference.server.keys import remove_key

    remove_key(file, name)
    typer.echo(f"{name} can't ask any more, once the server has read {file} again")
