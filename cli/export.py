"""`expertoken export`: a composite or a supervision in the form that other programs read."""

from pathlib import Path
from typing import Annotated

import typer

from ..modeling.source import DTYPES
from .choice import one_of


def export(
    folder: Annotated[Path, typer.Argument(help="Composite folder; with --sft a supervision folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    gguf: Annotated[Path | None, typer.Option(help="A GGUF file too, by llama.cpp's convert_hf_to_gguf.py.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="To compare decisions on: a text file, one a line, or a table with `query`.")
    ] = None,
    sft: Annotated[bool, typer.Option("--sft", help="Chat data for TRL and LLaMA-Factory instead.")] = False,
    dtype: Annotated[
        str | None, typer.Option(**one_of("dtype", DTYPES), help="Type of the weights. Default: that of the training.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the first accelerator, or cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the base model's repository run its own code.")] = False,
) -> None:
    """Write a plain Hugging Face checkpoint with a real token for every expert, its decisions checked on prompts."""
    if sft and (gguf or prompts or dtype):
        raise typer.BadParameter("chat data has no weights: without --gguf, --prompts and --dtype", param_hint="--sft")
    if sft:
        from ..data_prep.sft import export_sft
        from ..data_prep.supervision import Supervision

        counts = export_sft(Supervision.load(folder), out)
        typer.echo(f"{out}: " + ", ".join(f"{name} {count} lines" for name, count in counts.items()))
        return
    from ..data_prep.reading import read_queries
    from ..modeling.export import PROMPTS, convert_to_gguf, export_checkpoint, find_converter

    if gguf:
        find_converter()  # told before anything is written
    asked = read_queries(prompts) if prompts else PROMPTS
    ids = export_checkpoint(folder, out, prompts=asked, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    typer.echo(f"{out}: " + ", ".join(f"{name} = {place}" for name, place in ids.items()))
    typer.echo(f"decides as the composite does on {len(asked)} prompts")
    if gguf:
        convert_to_gguf(out, gguf)
        typer.echo(str(gguf))
