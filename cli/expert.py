"""`expertoken expert`: add an expert to a trained composite, list its experts, remove one."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data_prep.readers import formats
from ..modeling.experts import SELF, kind_names
from .choice import one_of

logger = logging.getLogger(__name__)

app = typer.Typer(help="Add, list or remove experts of a composite.", no_args_is_help=True)

_Composite = Annotated[Path, typer.Argument(help="Composite folder.")]
_Name = Annotated[str, typer.Option(help="Name of the expert.")]
_Data = Annotated[Path | None, typer.Option(help="Supervision folder of the composite, if it was moved.")]
_Trust = Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")]
_Verify = Annotated[bool, typer.Option(help="Check the saved folder in a fresh process.")]


@app.command()
def add(
    composite: _Composite,
    name: _Name,
    model: Annotated[str, typer.Option(help="Hub id, folder, or the model's id at an endpoint.")],
    results: Annotated[Path, typer.Option(help="Benchmark results of the new expert.")],
    backend: Annotated[
        str | None,
        typer.Option(
            **one_of("backend", [name for name in kind_names() if name != SELF]),
            help="Kind of the expert. Default: recognised from --base-url or from the folder of --model.",
        ),
    ] = None,
    format: Annotated[  # noqa: A002
        str, typer.Option(**one_of("format", ["auto", *formats()]), help="Format of the results.")
    ] = "auto",
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Option of the reader as KEY=VALUE, as in prepare. Repeatable.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder with the pictures that the results name, as in prepare.")
    ] = None,
    description: Annotated[str, typer.Option(help="Short description of the expert's strengths.")] = "",
    base: Annotated[str | None, typer.Option(help="Base model of a LoRA adapter. Default: the meta LLM's.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Base URL of an endpoint.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="NAME of the environment variable with the endpoint's key.")
    ] = None,
    input_price: Annotated[
        float | None, typer.Option(min=0, help="Price of input tokens, in USD per million. Needs --output-price.")
    ] = None,
    output_price: Annotated[
        float | None, typer.Option(min=0, help="Price of output tokens, in USD per million. Needs --input-price.")
    ] = None,
    results_name: Annotated[
        str | None, typer.Option(help="Name of the expert in the results. Default: --name or --model.")
    ] = None,
    l2: Annotated[list[float] | None, typer.Option(help="L2 strength to try. Repeatable.", min=0)] = None,
    data: _Data = None,
    verify: _Verify = True,
    trust_remote_code: _Trust = False,
) -> None:
    """Add an expert: fit its token. The other tokens stay identical, bit for bit."""
    from ..modeling.experts import recognised
    from ..modeling.pool import ExpertPool
    from ..train.arguments import L2
    from ..train.plugin import add_expert
    from .prepare import read_all

    given: dict[str, Any] = {
        "name": name,
        "backend": backend,
        "model": model,
        "description": description,
        "base": base,
        "base_url": base_url,
        "api_key_env": api_key_env,
        "results": results_name,
    }
    if (input_price is None) != (output_price is None):
        raise typer.BadParameter("expected both options or none of them", param_hint="--input-price, --output-price")
    if input_price is not None:
        given["cost"] = {"input": input_price, "output": output_price}
    entry = {key: value for key, value in given.items() if value is not None}
    entry.setdefault("backend", recognised(entry))
    pool = ExpertPool.parse({"experts": [entry]}, "the new expert", Path.cwd())
    [expert] = pool.candidates
    for sentence in pool.missing():
        logger.warning(sentence)
    read = read_all([results], format, option)
    if images is not None:
        from ..data_prep.images import with_pictures

        read = with_pictures(read, images)
    change = add_expert(
        composite,
        expert,
        read,
        data=data,
        l2=l2 or L2,
        verify=verify,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(f"{name} added as {expert.token}, {change}")


@app.command("list")
def list_experts(composite: _Composite) -> None:
    """List the experts of a composite."""
    from rich.table import Table
    from rich.text import Text

    from ..modeling.composite import POOL_FILE, read_manifest
    from ..modeling.pool import ExpertPool
    from .tables import wide_console

    vocabulary = read_manifest(composite).base["vocab_size"]
    pool = ExpertPool.from_yaml(composite / POOL_FILE)
    table = Table("id", "name", "backend", "model", "good at")
    for index, expert in enumerate(pool):
        cells = (str(vocabulary + index), expert.name, expert.backend, expert.model or "", expert.description)
        table.add_row(*(Text(cell) for cell in cells))  # as Text, so that "[/b]" in a description is not read as markup
    if pool.self_expert:
        table.add_row("-", pool.self_expert.name, "self", "(meta LLM)", Text(pool.self_expert.description))
    wide_console().print(table)


@app.command()
def remove(
    composite: _Composite,
    name: _Name,
    data: _Data = None,
    verify: _Verify = True,
    trust_remote_code: _Trust = False,
) -> None:
    """Remove an expert. The other tokens stay identical, bit for bit."""
    from ..train.plugin import remove_expert

    change = remove_expert(composite, name, data=data, verify=verify, trust_remote_code=trust_remote_code)
    typer.echo(f"{name} removed" + (f", {change}" if change else ""))
