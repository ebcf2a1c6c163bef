"""`expertoken keys`: API keys of a server's clients, and the experts that each key may use."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Add, list or remove API keys in a server's key file.", no_args_is_help=True)

_File = Annotated[Path, typer.Argument(help="Key file. It holds hashes of keys, never the keys.")]
_Name = Annotated[str, typer.Argument(help="Name of the client that holds the key.")]


@app.command()
def add(
    file: _File,
    name: _Name,
    expert: Annotated[
        list[str] | None, typer.Option(help="Expert that the key may use. Repeatable. Default: all.")
    ] = None,
) -> None:
    """Create a key and print it. Only its hash is stored, so keep the key."""
    from ..inference.server.keys import add_key

    typer.echo(add_key(file, name, expert))


@app.command("list")
def list_keys(file: _File) -> None:
    """List the clients in a key file, and the experts that they may use."""
    from rich.table import Table

    from ..inference.server.keys import read_keys
    from .tables import wide_console

    table = Table("name", "experts", "sha256 begins with")
    for client in read_keys(file):
        table.add_row(client.name, "all" if client.experts is None else ", ".join(client.experts), client.digest[:8])
    wide_console().print(table)


@app.command()
def remove(file: _File, name: _Name) -> None:
    """Remove a key from the file. A running server reads the file again on `kill -HUP`."""
    from ..inference.server.keys import remove_key

    remove_key(file, name)
    typer.echo(f"key of {name} removed. A running server accepts it until it reads {file} again (kill -HUP).")
